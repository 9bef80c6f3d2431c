"""What a class's words may come to over the whole corpus, estimated from the part that was read.

Drawn of each class and word, with f the share of the class's documents that were read:

- **Documents.** The number still to come that select the word is Poisson with a gamma rate: t documents so far give the
  rate the shape t - a. The discount a is that of the class's rare words: Good and Turing's 1 - 2 N2 / N1, with N1 words met in
  one document and N2 in two. The same law tells how many words will come that no document has had yet, and in how many
  further classes a word will come.
- **Splits.** A split that has not selected the word does so by a beta-binomial over the documents to come.
- **Scores.** Those that count are above 0 and vary by factors, so means are taken as log-normal. A word that stands high
  after few documents stands there partly by luck: the prior of the words' means, by how often they were met, is estimated
  from all of the class's words (empirical Bayes). Their variance in relation to the mean is a function of the mean, scaled
  for each word by what its own documents show.

Source: discount, Good 1953 and Pitman & Yor 1997; prior of means, Kiefer & Wolfowitz 1956 by EM (Laird 1978).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

REACH = 4.0
"""Standard deviations beyond which nothing is expected."""

_POINTS = np.linspace(-6.0, 5.0, 49)

# Words are put together by how many documents selected them: few have many, so the steps grow.
_STRATA = np.array([2, 3, 4, 6, 9, 13, 21, 41, 101])
_STRATUM_WORDS = 30
_GRID = 150
_SMALLEST = 1e-4
_EM_STEPS = 25
# What a word's own variance is weighed against: that of words with its mean, worth so many documents.
_VARIANCE_DOCUMENTS = 4.0
_VARIANCE_WORDS = 25
# A word is left out whose mean hardly comes so near to the k-th best's surest mean; so many are expected to be wrongly.
_NEAR = 0.4  # in logarithms
_LEFT_OUT = 0.05
_NEW_WORDS = 4000
_NEW_DOCUMENTS = 200


@dataclass(frozen=True, kw_only=True)
class ListRules:
    """What decides which words are in a list.

    Attributes:
        k: Words of a list.
        n_splits: Splits.
        min_splits: A word needs so many that selected it.
        min_df: And more documents of its class that hold it.
        max_classes: And at most so many classes whose other rules it passes; None: any number.
        known_frequencies: Document frequencies are those of the whole corpus from the start, as labelled documents give.
    """

    k: int
    n_splits: int
    min_splits: int
    min_df: int
    max_classes: int | None
    known_frequencies: bool


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was read so far: one row a class and word that a split has selected, sorted by word, then by class.

    A cell is a group of documents of a chunk, as `word_sums` has them. Squares are summed over cells.

    Attributes:
        label: (R,) number of the class.
        word: (R,) number of the word, by the order of the words' bytes; words without a letter are left out.
        n_selected: (R,) splits that selected it.
        n_documents: (R,) documents in which a split selected it.
        n_split_documents: (R,) the same, summed over splits.
        document_frequency: (R,) documents of the class that hold it, selected or not.
        n_occurrences: (R,) occurrences that count.
        score_sum: (R,) their scores.
        n_cells: (R,) cells with an occurrence.
        score_squares: (R,) squares of a cell's score sum.
        occurrence_squares: (R,) squares of a cell's occurrences.
        products: (R,) products of the two.
        shares: (C,) share of the corpus that was read for each class; above 0, at most 1.
    """

    label: Integers
    word: Integers
    n_selected: Integers
    n_documents: Integers
    n_split_documents: Integers
    document_frequency: Integers
    n_occurrences: Integers
    score_sum: Floats
    n_cells: Integers
    score_squares: Floats
    occurrence_squares: Floats
    products: Floats
    shares: Floats

    @property
    def mean(self) -> Floats:
        """Mean score of a word's occurrences, (R,)."""
        return np.asarray(self.score_sum / self.n_occurrences)


@dataclass(frozen=True)
class ClassModel:
    """What may become of one class's words: N rows of the evidence, of which some may be among the best k.

    Attributes:
        rows: (N,) the class's rows.
        candidates: (M,) those that may be among the best.
        share: f.
        discount: a.
        strength: Worth of a word's own rate of selection, in documents, for a split that has not selected it.
        points: (M, J) logarithms of the means that a candidate may have.
        cumulative: (M, J) their posterior probabilities, added up.
        variance: (M,) of a document's mean score about the word's, over the square of that.
        freedom: (M,) degrees of freedom of the variance.
        arrivals: Expected number of words that no document has had yet and that pass the rules, for each that one has had.
        new_rate: Expected number of them that may be among the best.
        new_means: (V,) means over the whole corpus that such words may have; empty where there are none.
    """

    rows: Integers
    candidates: Integers
    share: float
    discount: float
    strength: float
    points: Floats
    cumulative: Floats
    variance: Floats
    freedom: Floats
    arrivals: float
    new_rate: float
    new_means: Floats


def fit_class(evidence: Evidence, rules: ListRules, label: int, random: np.random.Generator) -> ClassModel:
    """Return the model of one class, estimated from its own words.

    Note:
        Runs on: driver. Cost: a few numpy passes over the class's rows.
    """
    rows = np.flatnonzero(evidence.label == label)
    share = float(evidence.shares[label])
    if not len(rows):
        none: Floats = np.zeros((0, len(_POINTS)))
        return ClassModel(rows, rows, share, 0.0, 1.0, none, none, none[:, 0], none[:, 0], 0.0, 0.0, none[:, 0])
    documents, logs = evidence.n_documents[rows].astype(float), _log_means(evidence, rows)
    variance_of, scale, freedom = _fit_variance(evidence, rows, logs)
    passes = (evidence.n_selected[rows] >= rules.min_splits) & (evidence.document_frequency[rows] > rules.min_df)
    surely = np.sort((logs - REACH * find_spread(variance_of(logs) * scale, documents))[passes])
    bar = float(surely[-rules.k]) if len(surely) >= rules.k else -np.inf
    near = np.flatnonzero(logs + REACH * find_spread(variance_of(logs) * scale, documents) >= bar)
    prior = _fit_prior(logs, documents, variance_of)
    points, cumulative = _find_posterior(logs[near], documents[near], scale[near], freedom[near], prior, variance_of)
    # Left out are words of which, all together, almost none is expected to come near the bar.
    chance = np.where(logs[near] < bar - _NEAR, 1 - _look_up(points, cumulative, bar - _NEAR), 1.0)
    order = np.argsort(chance)
    likely = np.sort(order[np.cumsum(chance[order]) > _LEFT_OUT])
    near, points, cumulative = near[likely], points[likely], cumulative[likely]
    discount = _fit_discount(documents)
    strength = _fit_strength(evidence, rules, rows)
    arrivals, new_rate, new_means = _expect_new_words(
        evidence, rules, rows, discount, strength, prior, variance_of, bar, random
    )
    return ClassModel(
        rows, rows[near], share, discount, strength, points, cumulative, variance_of(logs[near]) * scale[near],
        freedom[near], arrivals, new_rate, new_means,
    )  # fmt: skip


def _fit_discount(documents: Floats) -> float:
    """Return the discount of a class's rare words, from how many one document has selected, and how many two."""
    once, twice = np.count_nonzero(documents == 1), np.count_nonzero(documents == 2)
    return float(np.clip(1.0 - 2.0 * (twice + 0.5) / (once + 1.0), -1.0, 0.9))


def _log_means(evidence: Evidence, rows: Integers) -> Floats:
    """Return logarithms of the words' means, (N,); very small ones, and 0, count as `_SMALLEST` of the largest."""
    means = evidence.mean[rows]
    return np.asarray(np.log(np.maximum(means, max(float(means.max()), 1e-12) * _SMALLEST)))


def find_spread(variance: Floats, documents: Floats | Integers) -> Floats:
    """Return the deviation of the logarithm of a mean over documents that vary so much, each in relation to the mean.

    Scores that count are above 0, and what a text does to them multiplies: their means are taken as log-normal.
    """
    return np.asarray(np.sqrt(np.log1p(variance / documents)))


def _fit_variance(evidence: Evidence, rows: Integers, logs: Floats) -> tuple[_Variance, Floats, Floats]:
    """Return how much documents' mean scores vary about a word's.

    Returns:
        The variance, in relation to the mean, as a function of the mean; each word's ratio to it, (N,); and the degrees of
        freedom of that, (N,).
    """
    mean, cells, documents = evidence.mean[rows], evidence.n_cells[rows], evidence.n_documents[rows]
    squares = evidence.score_squares[rows] - 2 * mean * evidence.products[rows]
    squares = np.maximum(squares + mean**2 * evidence.occurrence_squares[rows], 0.0)
    freedom = np.minimum(cells, documents) - 1.0
    own = squares / evidence.n_occurrences[rows] ** 2 * documents * (freedom + 1) / np.maximum(freedom, 1)
    own = own / np.exp(2 * logs)
    told = np.flatnonzero((freedom >= 2) & (mean > 0))
    variance_of = _Variance(np.array([0.0]), np.array([np.log(0.25)]))  # half of the mean, where too little tells
    if len(told) >= _VARIANCE_WORDS:
        told = told[np.argsort(-logs[told])]
        # The best words are few and count most, so bins double from the top.
        ends = _VARIANCE_WORDS * 2 ** np.arange(1 + int(np.log2(len(told) / _VARIANCE_WORDS)))
        bins = np.split(told, ends[:-1])
        weights = [np.minimum(freedom[part], 50.0) for part in bins]
        relative = np.array([np.average(own[part], weights=weight) for part, weight in zip(bins, weights, strict=True)])
        centres = np.array([np.average(logs[part], weights=weight) for part, weight in zip(bins, weights, strict=True)])
        variance_of = _Variance(centres[::-1], np.log(np.maximum(relative[::-1], 1e-9)))
    ratio = np.where(freedom >= 1, own / variance_of(logs), 1.0)
    freedom = np.maximum(freedom, 0.0)
    scale = (_VARIANCE_DOCUMENTS + freedom * ratio) / (_VARIANCE_DOCUMENTS + freedom)
    return variance_of, np.clip(scale, 0.1, 10.0), _VARIANCE_DOCUMENTS + freedom


@dataclass(frozen=True)
class _Variance:
    """Variance over squared mean: log-linear between some means, constant beyond them.

    Attributes:
        means: Logarithms, ascending.
        relative: Logarithms of the ratio there.
    """

    means: Floats
    relative: Floats

    def __call__(self, logs: Floats) -> Floats:
        """Return the ratio for words whose means have these logarithms."""
        return np.asarray(np.exp(np.interp(logs, self.means, self.relative)))


@dataclass(frozen=True)
class _Prior:
    """Distribution of the logarithms of the words' means, by how many documents selected them.

    Attributes:
        lowest: Where the grid begins.
        step: Width of a cell.
        densities: (T, G) for each stratum, adding up to 1.
        strata: (T - 1,) number of documents from which the next stratum is.
    """

    lowest: float
    step: float
    densities: Floats
    strata: Integers

    def __call__(self, logs: Floats, documents: Floats) -> Floats:
        """Return the density at (N, J) of words with so many documents, (N,)."""
        place = np.clip((logs - self.lowest) / self.step - 0.5, 0.0, self.densities.shape[1] - 1.001)
        lower = place.astype(int)
        rows = np.searchsorted(self.strata, documents, side="right")[:, None]
        part = place - lower
        return np.asarray(self.densities[rows, lower] * (1 - part) + self.densities[rows, lower + 1] * part)

    def draw(self, count: int, random: np.random.Generator) -> Floats:
        """Return so many of the words of the lowest stratum."""
        chances = self.densities[0] / self.densities[0].sum()
        return np.asarray(self.lowest + (random.choice(_GRID, count, p=chances) + 0.5) * self.step)


def _fit_prior(logs: Floats, documents: Floats, variance_of: _Variance) -> _Prior:
    bounds = _STRATA
    while len(bounds):  # a stratum of few words is put to its smaller neighbour
        counts = np.bincount(np.searchsorted(bounds, documents, side="right"), minlength=len(bounds) + 1)
        small = np.flatnonzero(counts < _STRATUM_WORDS)
        if not len(small):
            break
        bounds = np.delete(bounds, max(0, small[-1] - 1))
    lowest, highest = float(logs.min()) - 0.5, float(logs.max()) + 0.5
    step = (highest - lowest) / _GRID
    grid: Floats = lowest + (np.arange(_GRID, dtype=np.float64) + 0.5) * step
    strata = np.searchsorted(bounds, documents, side="right")
    densities = np.empty((len(bounds) + 1, _GRID))
    for stratum in range(len(bounds) + 1):
        own = strata == stratum
        counts = np.bincount(((logs[own] - lowest) / step).astype(int), minlength=_GRID)
        typical = np.array([np.exp(np.log(documents[own]).mean()) if own.any() else 1.0])
        densities[stratum] = _deconvolve(counts, grid, find_spread(variance_of(grid), typical), step)
    return _Prior(lowest, step, densities, bounds)


def _deconvolve(counts: Integers, grid: Floats, spread: Floats, step: float) -> Floats:
    """Return the distribution of true means that makes observed ones, counted on the grid, likely; (G,).

    Few steps of EM from the observed: more would follow the noise of the counts.
    """
    variance = spread**2 + step**2 / 12
    distance = grid[:, None] - (grid - spread**2 / 2)  # observed, true
    likelihood = np.exp(-(distance**2) / (2 * variance)) / np.sqrt(variance)
    weights = (counts + 0.01 / len(grid)) / (counts.sum() + 0.01)
    seen = counts > 0
    for _ in range(_EM_STEPS):
        fitted = likelihood[seen] @ weights
        weights = weights * (likelihood[seen].T @ (counts[seen] / np.maximum(fitted, 1e-300)))
        weights /= max(weights.sum(), 1e-300)
    return np.asarray(weights + 0.01 / max(counts.sum(), 1) / len(grid))


def _find_posterior(
    logs: Floats, documents: Floats, scale: Floats, freedom: Floats, prior: _Prior, variance_of: _Variance
) -> tuple[Floats, Floats]:
    """Return points (M, J) and their cumulative probabilities; the likelihood is Student's, the variance being estimated."""
    points = logs[:, None] + _POINTS * find_spread(variance_of(logs) * scale, documents)[:, None]
    spread = find_spread(variance_of(points) * scale[:, None], documents[:, None])
    distance = np.log1p((logs[:, None] - points + spread**2 / 2) ** 2 / (spread**2 * freedom[:, None]))
    found = np.log(prior(points, documents)) - (freedom[:, None] + 1) / 2 * distance - np.log(spread)
    cumulative = np.cumsum(np.exp(found - found.max(1, keepdims=True)), axis=1)
    return points, cumulative / cumulative[:, -1:]


def _look_up(points: Floats, cumulative: Floats, mean: float) -> Floats:
    """Return each row's probability of a mean below this one, (M,)."""
    above = np.argmax(points >= mean, axis=1)
    below = np.take_along_axis(cumulative, np.maximum(above - 1, 0)[:, None], 1)[:, 0]
    return np.where(points[:, -1] < mean, 1.0, np.where(above == 0, 0.0, below))


def _fit_strength(evidence: Evidence, rules: ListRules, rows: Integers) -> float:
    """Return how many documents a word's own rate is worth for a split that has not selected it.

    Of all splits and words with 2 to 30 documents so many splits have not selected the word; the strength is the one that
    expects as many.
    """
    documents = evidence.n_documents[rows]
    some = rows[(documents >= 2) & (documents <= 30)]
    missing = float((rules.n_splits - evidence.n_selected[some]).sum())
    tried = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    rate = find_selection_rate(evidence, rules, some)
    expected = [
        float(
            (
                rules.n_splits * find_chance_of_none(rate, strength, np.zeros(len(some)), evidence.n_documents[some])
            ).sum()
        )
        for strength in tried
    ]
    return float(tried[np.argmin(np.abs(np.array(expected) - missing))])


def find_selection_rate(evidence: Evidence, rules: ListRules, rows: Integers) -> Floats:
    """Return the share of (document, split) pairs that selected a word, among documents in which some split did."""
    rate = evidence.n_split_documents[rows] / (rules.n_splits * evidence.n_documents[rows])
    return np.asarray(np.clip(rate, 0.01, 0.99))


def find_chance_of_none(rate: Floats, strength: float | Floats, before: Floats, to_come: Floats | Integers) -> Floats:
    """Return the chance that a split selects a word in none of the documents to come, as in none before."""
    from scipy.special import gammaln

    whole, beside = strength + before, strength * (1 - rate) + before
    logs = gammaln(beside + to_come) + gammaln(whole) - gammaln(whole + to_come) - gammaln(beside)
    return np.asarray(np.exp(logs))


def _expect_new_words(
    evidence: Evidence, rules: ListRules, rows: Integers, discount: float, strength: float, prior: _Prior,
    variance_of: _Variance, bar: float, random: np.random.Generator,
) -> tuple[float, float, Floats]:  # fmt: skip
    """Return what to expect of words that no document has had so far.

    They are like the words that one document has had: in their means, and in the documents that hold and do not select them.

    Returns:
        How many pass the rules, for each word that one document has had; how many pass the bar as well; and their means.
    """
    from scipy.special import gammaln

    once = rows[evidence.n_documents[rows] == 1]
    share = float(evidence.shares[evidence.label[rows[0]]])
    if not len(once) or share == 1.0:
        return 0.0, 0.0, np.zeros(0)
    count = np.arange(1, _NEW_DOCUMENTS + 1)
    logs = count * np.log1p(-share) + gammaln(count - discount) - gammaln(count + 1) - gammaln(1 - discount)
    rate = float(np.mean(find_selection_rate(evidence, rules, once)))
    none = find_chance_of_none(np.full(len(count), rate), strength, np.zeros(len(count)), count)
    splits = np.arange(rules.min_splits, rules.n_splits + 1)
    ways = np.exp(gammaln(rules.n_splits + 1) - gammaln(splits + 1) - gammaln(rules.n_splits - splits + 1))
    enough = (ways * (1 - none[:, None]) ** splits * none[:, None] ** (rules.n_splits - splits)).sum(1)
    rates = len(once) * share**-discount * np.exp(logs) * enough
    if not rates.sum():
        return 0.0, 0.0, np.zeros(0)
    documents = random.choice(count, _NEW_WORDS, p=rates / rates.sum())
    like = random.choice(once, _NEW_WORDS)
    frequency = evidence.document_frequency[like]
    if not rules.known_frequencies:
        frequency = documents + random.poisson((frequency - 1) / share)
    true = prior.draw(_NEW_WORDS, random)
    spread = find_spread(variance_of(true), documents)
    means = np.exp(true + random.standard_normal(_NEW_WORDS) * spread - spread**2 / 2)
    passing = frequency > rules.min_df
    good = means[(means >= np.exp(bar)) & passing]
    total = float(rates.sum())
    return total * float(passing.mean()) / len(once), total * len(good) / _NEW_WORDS, good
