"""When is a class's keyword list settled: the overlap predicted between the list so far and that of the whole corpus.

Chunks are random samples of the corpus by text, so what was read says what is still to come. A look draws plausible whole
corpora given the words so far (`lexplain.extrapolation`), applies the keyword rules to each, and compares each list with the
one so far. Numbers in, numbers out: no Spark, no tables, no text.

- **Finite population.** What was read stays: the whole corpus's mean joins it to that of the documents to come, so that
  an interval shrinks to nothing as the share that was read goes to 1.
- **Repeated looks.** Draws from a posterior may be looked at as often as one likes: given what was read, their distribution
  does not depend on why one looks (the stopping rule principle). That holds as far as the model does; so a class is settled
  only when two looks running say so, looks become rarer as the share grows, and the simulation of `tests/bench` measures the
  coverage at the moment of stopping, not only at fixed ones.
- **Interval.** It takes the estimated priors for the true ones, so it would be too short; it is widened.

Source: finite-population posterior, Ghosh & Meeden 1997; short intervals, Laird & Louis 1987; stopping rule principle,
Berger & Wolpert 1988.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lexplain.extrapolation import (
    REACH,
    ClassModel,
    Evidence,
    Floats,
    Integers,
    ListRules,
    find_chance_of_none,
    find_selection_rate,
    find_spread,
    fit_class,
)
from lexplain.overlap import overlap_at

P = 0.9
"""Weight of a rank relative to the one before."""

DRAWS = 100
"""Whole corpora that a look draws."""

CONSECUTIVE_LOOKS = 2
"""So many looks running must find a list settled."""

LOOK_GROWTH = 1.25
"""A look is due when the share that was read has grown so much since the last one: looks cost a part of the reading each."""

_INTERVAL = (0.025, 0.975)

# Chosen on other runs of the simulation than those that are reported.
_WIDENING = 1.75

# Prior of the documents that hold a word and do not select it: most words that are selected are so in most documents.
_UNSELECTED_SHAPE = 0.1
_RARE = 3  # documents
_NEW, _NONE = -1, -2  # a word that no document has had yet; no word


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
    models = [fit_class(evidence, rules, label, random) for label in range(len(lists))]
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
    evidence: Evidence, models: Sequence[ClassModel], rows: Integers, draws: int, random: np.random.Generator
) -> Integers | None:
    """Return in how many classes each distinct word will pass that have not had it yet, (draws, R').

    By the law of new words: each class in which one document has had the word tells of classes in which none has yet.
    """
    if not len(rows):
        return None
    rates = np.where(
        evidence.n_documents[rows] == 1, _per_row(evidence, rows, [model.arrivals for model in models]), 0.0
    )
    expected = np.add.reduceat(rates, _find_starts(evidence.word[rows]))
    return np.asarray(random.poisson(expected, (draws, len(expected))))


def _draw_lists(
    evidence: Evidence, rules: ListRules, models: Sequence[ClassModel], draws: int, random: np.random.Generator
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
    evidence: Evidence, models: Sequence[ClassModel], rows: Integers, draws: int, random: np.random.Generator
) -> Integers:
    """Return the documents to come that select each row's word, (draws, N)."""
    share = evidence.shares[evidence.label[rows]]
    shape = evidence.n_documents[rows] - _per_row(evidence, rows, [model.discount for model in models])
    rates = random.standard_gamma(shape, (draws, len(rows))) * ((1 - share) / share)
    return np.asarray(random.poisson(rates))


def _draw_passes(
    evidence: Evidence, rules: ListRules, models: Sequence[ClassModel], rows: Integers, to_come: Integers,
    random: np.random.Generator,
) -> NDArray[np.bool_]:  # fmt: skip
    """Return which rows pass the rules of selection frequency and document frequency in each corpus, (draws, N)."""
    passes = np.ones(to_come.shape, dtype=bool)
    short = np.flatnonzero(evidence.n_selected[rows] < rules.min_splits)
    if len(short):
        own = rows[short]
        rate, before = find_selection_rate(evidence, rules, own), evidence.n_documents[own].astype(float)
        strength = _per_row(evidence, own, [model.strength for model in models])
        chance = 1 - find_chance_of_none(rate, strength, before, to_come[:, short])
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


def _draw_means(evidence: Evidence, model: ClassModel, to_come: Integers, random: np.random.Generator) -> Floats:
    """Return each candidate's mean over the whole corpus, (draws, M)."""
    rows, (draws, count) = model.candidates, to_come.shape
    # One search for all rows: each row's cumulative probabilities are lifted above those of the row before.
    lifted = (model.cumulative + np.arange(count)[:, None]).ravel()
    sought = random.random((draws, count)) + np.arange(count)
    upper = np.minimum(np.searchsorted(lifted, sought), len(lifted) - 1)
    flat = model.points.ravel()
    lower = np.where(upper % model.points.shape[1] > 0, upper - 1, upper)
    true = flat[upper] + random.random((draws, count)) * (flat[lower] - flat[upper])
    noise = random.standard_normal((draws, count)) * np.sqrt(
        model.freedom / random.chisquare(model.freedom, (draws, count))
    )
    spread = find_spread(model.variance, np.maximum(to_come, 1))
    scores = np.exp(true + np.clip(noise, -REACH, REACH) * spread - spread**2 / 2)
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
