"""When is a class's keyword list settled: the overlap predicted between the list so far and that of the whole corpus.

Chunks are random samples of the corpus by text, so what was read says what is still to come. A look draws plausible whole
corpora given the words so far, applies the keyword rules to each, and compares each list with the one so far. Numbers in,
numbers out: no Spark, no tables, no text.

Drawn of each class and word, with f the share of the class's documents that were read:

- **Documents.** The number still to come that select the word is Poisson with a gamma rate: t documents so far give the
  rate the shape t - a. The discount a is that of the class's rare words: of Good and Turing's 1 - 2 N2 / N1, with N1 words met in
  one document and N2 in two. The same law tells how many words will come that no document has had yet.
- **Splits.** A split that has not selected the word does so by a beta-binomial over the documents to come.
- **Scores.** A word that stands high after few documents stands there partly by luck. The prior of the words' means, by
  how often they were met, is estimated from all of the class's words (empirical Bayes); their variance is a function of
  the mean, scaled for each word by what its own documents show.
- **Finite population.** What was read stays: the whole corpus's mean joins it to that of the documents to come, so that
  an interval shrinks to nothing as f goes to 1.

Draws from a posterior may be looked at as often as one likes: given what was read, their distribution does not depend on
why one looks (the stopping rule principle). That holds as far as the model does; so a class is settled only when two looks
running say so, and the simulations of `tests/bench` measure the coverage at the moment of stopping, not at a fixed one.

Source: finite-population posterior, Ghosh & Meeden 1997; discount, Good 1953 and Pitman & Yor 1997; empirical prior of means,
Kiefer & Wolfowitz 1956 by EM (Laird 1978); stopping rule principle, Berger & Wolpert 1988.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lexplain.overlap import overlap_at

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

P = 0.9
"""Weight of a rank relative to the one before."""

DRAWS = 100
"""Whole corpora that a look draws."""

CONSECUTIVE_LOOKS = 2
"""So many looks running must find a list settled."""

LOOK_GROWTH = 1.25
"""A look is due when the share that was read has grown so much since the last one: looks cost a part of the reading each."""

_INTERVAL = (0.025, 0.975)

# An interval takes the estimated priors for the true ones, so it is too short (Laird & Louis 1987). By so much, on runs of
# the simulation other than those that are reported.
_WIDENING = 1.75

# Words are put together by how many documents selected them: few have many, so the steps grow.
_STRATA = np.array([2, 3, 4, 6, 9, 13, 21, 41, 101])
_STRATUM_WORDS = 30
_GRID = 150
_SMALLEST = 1e-4
_EM_STEPS = 25
# What a word's own variance is weighed against: that of words with its mean, worth so many documents.
_VARIANCE_DOCUMENTS = 4.0
_VARIANCE_WORDS = 25
# Standard deviations beyond which a word is no candidate, and that a posterior's points span.
_REACH = 4.0
_POINTS = np.linspace(-6.0, 5.0, 49)
# A word is left out whose mean hardly comes so near to the k-th best's surest mean; so many are expected to be wrongly.
_NEAR = 0.4  # in logarithms
_LEFT_OUT = 0.05
# Prior of the documents that hold a word and do not select it: most words that are selected are so in most documents.
_UNSELECTED_SHAPE = 0.1
_NEW_WORDS = 4000
_RARE = 3  # documents
_NEW, _NONE = -1, -2  # a word that no document has had yet; no word
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
class Prediction:
    """The overlap of a class's list so far with that of the whole corpus.

    Attributes:
        label: Number of the class.
        overlap: Mean over the corpora drawn; 0 without a list.
        low: Lower end of the 95 % interval.
        high: Its upper end.
        n_words: Words in the list so far.
        share: Share of the corpus that was read.
    """

    label: int
    overlap: float
    low: float
    high: float
    n_words: int
    share: float


def is_due(share: float, last: float) -> bool:
    """Tell whether a look is due at this share of the corpus; `last` is that of the last look, 0 before the first."""
    return share >= LOOK_GROWTH * last - 1e-9


def is_settled(looks: Sequence[Prediction], threshold: float, k: int) -> bool:
    """Tell whether the last looks at a class, in their order, all find the lower end at the threshold or above.

    A list that has not its k words yet is never settled: of the ranks it lacks, the overlap assumes that they will agree
    as the others do.
    """
    last = looks[-CONSECUTIVE_LOOKS:]
    return len(last) == CONSECUTIVE_LOOKS and all(look.low >= threshold and look.n_words == k for look in last)


def rank_words(evidence: Evidence, rules: ListRules) -> list[list[int]]:
    """Return the numbers of each class's words so far, best first, at most k."""
    passes = (evidence.n_selected >= rules.min_splits) & (evidence.document_frequency > rules.min_df)
    kept = np.flatnonzero(_keep_distinct(evidence.word, passes[None], rules)[0])
    mean = evidence.mean
    order = kept[np.lexsort((evidence.word[kept], -mean[kept]))]
    labels = evidence.label[order]
    return [evidence.word[order[labels == label]][: rules.k].tolist() for label in range(len(evidence.shares))]


def predict_overlaps(evidence: Evidence, rules: ListRules, *, draws: int = DRAWS, seed: int = 0) -> list[Prediction]:
    """Return for each class how much its list so far will agree with that of the whole corpus.

    Args:
        evidence: What was read.
        rules: Of the lists.
        draws: Whole corpora.
        seed: Of the draws.

    Note:
        Runs on: driver. Cost: a few numpy passes over the rows, and `draws` over the words that may be among the best k.
    """
    random = np.random.default_rng(seed)
    lists = rank_words(evidence, rules)
    models = [_fit_class(evidence, rules, label, random) for label in range(len(lists))]
    drawn = _draw_lists(evidence, rules, models, draws, random)
    found = []
    for label, listed in enumerate(lists):
        if not listed:
            found.append(Prediction(label, 0.0, 0.0, 1.0, 0, float(evidence.shares[label])))
            continue
        values = _compare(listed, drawn[label])
        overlap = float(values.mean())
        low, high = (overlap + _WIDENING * (float(end) - overlap) for end in np.quantile(values, _INTERVAL))
        share = float(evidence.shares[label])
        found.append(Prediction(label, overlap, max(0.0, low), min(1.0, high), len(listed), share))
    return found


# --- what is known of a class's words -------------------------------------------------------------------------


@dataclass(frozen=True)
class _ClassModel:
    """One class: N rows of the evidence, of which some may be among the best k.

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


def _fit_class(evidence: Evidence, rules: ListRules, label: int, random: np.random.Generator) -> _ClassModel:
    rows = np.flatnonzero(evidence.label == label)
    share = float(evidence.shares[label])
    if not len(rows):
        none: Floats = np.zeros((0, len(_POINTS)))
        return _ClassModel(rows, rows, share, 0.0, 1.0, none, none, none[:, 0], none[:, 0], 0.0, 0.0, none[:, 0])
    documents, logs = evidence.n_documents[rows].astype(float), _log_means(evidence, rows)
    variance_of, scale, freedom = _fit_variance(evidence, rows, logs)
    passes = (evidence.n_selected[rows] >= rules.min_splits) & (evidence.document_frequency[rows] > rules.min_df)
    surely = np.sort((logs - _REACH * _spread(variance_of(logs) * scale, documents))[passes])
    bar = float(surely[-rules.k]) if len(surely) >= rules.k else -np.inf
    near = np.flatnonzero(logs + _REACH * _spread(variance_of(logs) * scale, documents) >= bar)
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
    return _ClassModel(
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


def _spread(variance: Floats, documents: Floats | Integers) -> Floats:
    """Return the deviation of the logarithm of a mean over documents that vary so much, each in relation to the mean.

    Scores that count are above 0, and what a text does to them multiplies: their means are taken as log-normal.
    """
    return np.asarray(np.sqrt(np.log1p(variance / documents)))


def _fit_variance(evidence: Evidence, rows: Integers, logs: Floats) -> tuple[_Variance, Floats, Floats]:
    """Return the relative variance of a document's mean score as a function of the word's; each word's ratio to it, (N,);
    and the degrees of freedom of that, (N,)."""
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
    grid = lowest + (np.arange(_GRID) + 0.5) * step
    strata = np.searchsorted(bounds, documents, side="right")
    densities = np.empty((len(bounds) + 1, _GRID))
    for stratum in range(len(bounds) + 1):
        own = strata == stratum
        counts = np.bincount(((logs[own] - lowest) / step).astype(int), minlength=_GRID)
        typical = np.array([np.exp(np.log(documents[own]).mean()) if own.any() else 1.0])
        densities[stratum] = _deconvolve(counts, grid, _spread(variance_of(grid), typical), step)
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
    points = logs[:, None] + _POINTS * _spread(variance_of(logs) * scale, documents)[:, None]
    spread = _spread(variance_of(points) * scale[:, None], documents[:, None])
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
    rate = _selection_rate(evidence, rules, some)
    expected = [
        float((rules.n_splits * _chance_of_none(rate, strength, np.zeros(len(some)), evidence.n_documents[some])).sum())
        for strength in tried
    ]
    return float(tried[np.argmin(np.abs(np.array(expected) - missing))])


def _selection_rate(evidence: Evidence, rules: ListRules, rows: Integers) -> Floats:
    """Return the share of (document, split) pairs that selected a word, among documents in which some split did."""
    rate = evidence.n_split_documents[rows] / (rules.n_splits * evidence.n_documents[rows])
    return np.asarray(np.clip(rate, 0.01, 0.99))


def _chance_of_none(rate: Floats, strength: float | Floats, before: Floats, to_come: NDArray[np.generic]) -> Floats:
    """Return the chance that a split selects a word in none of the documents to come, as in none before."""
    from scipy.special import gammaln

    whole, beside = strength + before, strength * (1 - rate) + before
    logs = gammaln(beside + to_come) + gammaln(whole) - gammaln(whole + to_come) - gammaln(beside)
    return np.asarray(np.exp(logs))


def _expect_new_words(
    evidence: Evidence, rules: ListRules, rows: Integers, discount: float, strength: float, prior: _Prior,
    variance_of: _Variance, bar: float, random: np.random.Generator,
) -> tuple[float, float, Floats]:  # fmt: skip
    """Return how many words to expect that no document has had so far and that pass the rules, for each that one has had;
    how many that pass the bar as well; and their means.

    They are like the words that one document has had: in their means, and in the documents that hold and do not select them.
    """
    from scipy.special import gammaln

    once = rows[evidence.n_documents[rows] == 1]
    share = float(evidence.shares[evidence.label[rows[0]]])
    if not len(once) or share == 1.0:
        return 0.0, 0.0, np.zeros(0)
    count = np.arange(1, _NEW_DOCUMENTS + 1)
    logs = count * np.log1p(-share) + gammaln(count - discount) - gammaln(count + 1) - gammaln(1 - discount)
    rate = float(np.mean(_selection_rate(evidence, rules, once)))
    none = _chance_of_none(np.full(len(count), rate), strength, np.zeros(len(count)), count)
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
    spread = _spread(variance_of(true), documents)
    means = np.exp(true + random.standard_normal(_NEW_WORDS) * spread - spread**2 / 2)
    passing = frequency > rules.min_df
    good = means[(means >= np.exp(bar)) & passing]
    total = float(rates.sum())
    return total * float(passing.mean()) / len(once), total * len(good) / _NEW_WORDS, good


# --- draws ----------------------------------------------------------------------------------------------------


def _keep_distinct(
    word: Integers, passes: NDArray[np.bool_], rules: ListRules, arrived: Integers | None = None
) -> NDArray[np.bool_]:
    """Return which rows are kept, (draws, R): those that pass, of words that at most so many classes keep.

    `arrived`, (draws, R'), are further classes of each of the R' distinct words.
    """
    if rules.max_classes is None or not len(word):
        return passes
    starts = _find_starts(word)
    counts = np.add.reduceat(passes.astype(np.int64), starts, axis=1) + (0 if arrived is None else arrived)
    return np.asarray(passes & np.repeat(counts <= rules.max_classes, np.diff(np.append(starts, len(word))), axis=1))


def _find_starts(word: Integers) -> Integers:
    return np.flatnonzero(np.append(True, word[1:] != word[:-1]))


def _draw_arrivals(
    evidence: Evidence, models: Sequence[_ClassModel], rows: Integers, draws: int, random: np.random.Generator
) -> Integers | None:
    """Return in how many classes each distinct word will pass that have not had it yet, (draws, R').

    By the law of new words: each class in which one document has had the word tells of classes in which none has yet.
    """
    if not len(rows):
        return None
    rates = np.where(evidence.n_documents[rows] == 1, _per_row(evidence, rows, [model.arrivals for model in models]), 0.0)
    expected = np.add.reduceat(rates, _find_starts(evidence.word[rows]))
    return np.asarray(random.poisson(expected, (draws, len(expected))))


def _draw_lists(
    evidence: Evidence, rules: ListRules, models: Sequence[_ClassModel], draws: int, random: np.random.Generator
) -> list[Integers]:
    """Return for each class its list in each whole corpus drawn, (draws, k); `_NEW` and `_NONE` stand for other words."""
    candidates = np.concatenate([model.candidates for model in models])
    rows = np.flatnonzero(np.isin(evidence.word, np.unique(evidence.word[candidates])))
    place = np.full(len(evidence.word), -1)
    place[rows] = np.arange(len(rows))
    to_come = _draw_documents(evidence, models, rows, draws, random)
    passes = _draw_passes(evidence, rules, models, rows, to_come, random)
    arrived = _draw_arrivals(evidence, models, rows, draws, random)
    kept = _keep_distinct(evidence.word[rows], passes, rules, arrived)
    found = []
    for model in models:
        where = place[model.candidates]
        means = _draw_means(evidence, model, to_come[:, where], random)
        means = np.where(kept[:, where], means, -np.inf)
        # New words are as often those of too many classes as rare ones are.
        rare = where[evidence.n_documents[model.candidates] <= _RARE]
        distinct = (kept[:, rare].sum() + 1) / (passes[:, rare].sum() + 1)
        new_words = random.poisson(model.new_rate * distinct, draws)
        found.append(_take_best(means, evidence.word[model.candidates], new_words, model.new_means, rules.k, random))
    return found


def _per_row(evidence: Evidence, rows: Integers, values: Sequence[float]) -> Floats:
    return np.asarray(np.array(values)[evidence.label[rows]])


def _draw_documents(
    evidence: Evidence, models: Sequence[_ClassModel], rows: Integers, draws: int, random: np.random.Generator
) -> Integers:
    """Return the documents to come that select each row's word, (draws, N)."""
    share = evidence.shares[evidence.label[rows]]
    shape = evidence.n_documents[rows] - _per_row(evidence, rows, [model.discount for model in models])
    rates = random.standard_gamma(shape, (draws, len(rows))) * ((1 - share) / share)
    return np.asarray(random.poisson(rates))


def _draw_passes(
    evidence: Evidence, rules: ListRules, models: Sequence[_ClassModel], rows: Integers, to_come: Integers,
    random: np.random.Generator,
) -> NDArray[np.bool_]:  # fmt: skip
    """Return which rows pass the rules of selection frequency and document frequency in each corpus, (draws, N)."""
    passes = np.ones(to_come.shape, dtype=bool)
    short = np.flatnonzero(evidence.n_selected[rows] < rules.min_splits)
    if len(short):
        own = rows[short]
        rate, before = _selection_rate(evidence, rules, own), evidence.n_documents[own].astype(float)
        strength = _per_row(evidence, own, [model.strength for model in models])
        chance = 1 - _chance_of_none(rate, strength, before, to_come[:, short])
        more = random.binomial(rules.n_splits - evidence.n_selected[own], np.clip(chance, 0.0, 1.0))
        passes[:, short] = evidence.n_selected[own] + more >= rules.min_splits
    rare = np.flatnonzero(evidence.document_frequency[rows] <= rules.min_df)
    if not len(rare):
        return passes
    if rules.known_frequencies:
        passes[:, rare] = False
        return passes
    own = rows[rare]
    share = evidence.shares[evidence.label[own]]
    beside = np.maximum(evidence.document_frequency[own] - evidence.n_documents[own], 0) + _UNSELECTED_SHAPE
    others = random.poisson(random.standard_gamma(beside, (len(to_come), len(own))) * ((1 - share) / share))
    passes[:, rare] &= evidence.document_frequency[own] + to_come[:, rare] + others > rules.min_df
    return passes


def _draw_means(evidence: Evidence, model: _ClassModel, to_come: Integers, random: np.random.Generator) -> Floats:
    """Return each candidate's mean over the whole corpus, (draws, M)."""
    rows, (draws, count) = model.candidates, to_come.shape
    # One search for all rows: each row's cumulative probabilities are lifted above those of the row before.
    lifted = (model.cumulative + np.arange(count)[:, None]).ravel()
    sought = random.random((draws, count)) + np.arange(count)
    upper = np.minimum(np.searchsorted(lifted, sought), len(lifted) - 1)
    flat = model.points.ravel()
    lower = np.where(upper % model.points.shape[1] > 0, upper - 1, upper)
    true = flat[upper] + random.random((draws, count)) * (flat[lower] - flat[upper])
    noise = random.standard_normal((draws, count)) * np.sqrt(model.freedom / random.chisquare(model.freedom, (draws, count)))
    spread = _spread(model.variance, np.maximum(to_come, 1))
    scores = np.exp(true + np.clip(noise, -_REACH, _REACH) * spread - spread**2 / 2)
    occurrences = to_come * (evidence.n_occurrences[rows] / evidence.n_documents[rows])
    whole = evidence.score_sum[rows] + occurrences * scores
    return np.asarray(whole / (evidence.n_occurrences[rows] + occurrences))


def _take_best(
    means: Floats, words: Integers, new_words: Integers, new_means: Floats, k: int, random: np.random.Generator
) -> Integers:
    """Return the best k words of each corpus, best first, (draws, k); so many of each corpus are new."""
    more = int(new_words.max())
    if more:
        new = random.choice(new_means, (len(means), more))
        means = np.hstack([means, np.where(np.arange(more) < new_words[:, None], new, -np.inf)])
        words = np.append(words, np.full(more, _NEW))
    short = k - means.shape[1]
    if short > 0:
        means, words = np.pad(means, ((0, 0), (0, short)), constant_values=-np.inf), np.pad(words, (0, short))
    best = np.argpartition(-means, k - 1, axis=1)[:, :k]
    scores = np.take_along_axis(means, best, 1)
    order = np.argsort(-scores, axis=1, kind="stable")
    best, scores = np.take_along_axis(best, order, 1), np.take_along_axis(scores, order, 1)
    return np.where(np.isfinite(scores), words[best], _NONE)


def _compare(listed: Sequence[int], drawn: Integers) -> Floats:
    """Return the overlap of a list with each of those drawn, (draws,)."""
    order = np.argsort(listed)
    known = np.array(listed)[order]
    at = np.minimum(np.searchsorted(known, drawn), len(known) - 1)
    places = np.where(known[at] == drawn, order[at], len(listed))
    lengths = (drawn != _NONE).sum(1)
    overlaps = np.zeros(len(drawn))
    for length in np.unique(lengths):
        overlaps[lengths == length] = overlap_at(places[lengths == length, :length], len(listed), P)
    return overlaps
