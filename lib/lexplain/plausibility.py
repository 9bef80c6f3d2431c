"""Plausibility of word scores: how well they find the words that people, or those who made a text, hold for evidence.

Gold evidence is spans of characters. A word is gold where it shares a character with a span.

Shape letters: W words of a text, K sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARES = tuple(percent / 100 for percent in range(5, 100, 5))
"""Sizes of a rationale over which figures are averaged where no size is given: 5 to 95 % of a text's words."""

_LEAST_OVERLAP = 0.5


@dataclass(frozen=True, slots=True)
class GoldSpan:
    """A span of gold evidence.

    Attributes:
        start: First character.
        end: One past the last.
        score: How strong it is; 1 where nobody says.
    """

    start: int
    end: int
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well scores agree with gold evidence in one text; None where a figure has no meaning.

    Attributes:
        precision: Share of the chosen words that are gold, at the size that the caller gives.
        recall: Share of the gold words that are chosen, at that size.
        f1: Their harmonic mean.
        mean_f1: F1 averaged over `SHARES`.
        f1_at_gold_size: F1 where as many words are chosen as are gold.
        iou_f1: F1 of runs of chosen words against gold spans, at the size that the caller gives: a run counts that
            shares half of the words that it and some gold span have together.
        mean_iou_f1: The same averaged over `SHARES`.
        iou_f1_at_gold_size: The same where as many words are chosen as are gold.
        average_precision: Over all sizes; None where all words are gold, or none.
        roc_auc: Chance that a gold word scores above another, ties count half; None as there.
        pearson: Correlation of scores with the gold spans' own scores, 0 on words without; None where either is constant.
    """

    precision: float
    recall: float
    f1: float
    mean_f1: float
    f1_at_gold_size: float
    iou_f1: float
    mean_iou_f1: float
    iou_f1_at_gold_size: float
    average_precision: float | None
    roc_auc: float | None
    pearson: float | None


def compare_with_gold(
    words: Sequence[tuple[int, int, float]], gold: Sequence[GoldSpan], share: float
) -> Agreement | None:
    """Compare an explanation's word scores with gold evidence.

    Args:
        words: Start, end and score of W words, in any order; equal scores are ranked in the order of the text.
        gold: Spans of the same text.
        share: Of the words, what a rationale is allowed: the mean share of gold words in the corpus (ERASER).

    Returns:
        The figures, or None where the text has no word, or no word is gold.

    Note:
        Runs on: executor. Cost: W log W, and W for each size.
        Source: DeYoung et al. 2020, section 5 (IoU: the same runs counted for precision and recall); Brinner and
        Zarriess 2024 (means over sizes, gold size); Zhang et al. 2022, section 4 (ROC-AUC, Pearson).
    """
    ordered = sorted(words)
    scores = np.array([score for *_, score in ordered], dtype=np.float64)
    strengths = _strengths(ordered, gold)
    is_gold = ~np.isnan(strengths)
    if not is_gold.any():
        return None
    order = np.argsort(-scores, kind="stable")
    spans = _find_runs(is_gold, _span_numbers(ordered, gold))

    def measure(size: int) -> tuple[float, float, float, float]:
        chosen = np.zeros(len(scores), dtype=bool)
        chosen[order[:size]] = True
        hits = int((chosen & is_gold).sum())
        precision, recall = hits / max(size, 1), hits / int(is_gold.sum())
        return precision, recall, _harmonic(precision, recall), _iou_f1(_find_runs(chosen), spans)

    def size_of(share: float) -> int:
        return min(len(scores), max(1, math.floor(share * len(scores) + 0.5)))

    precision, recall, f1, iou = measure(size_of(share))
    over_sizes = np.array([measure(size_of(each))[2:] for each in SHARES]).mean(0)
    at_gold = measure(int(is_gold.sum()))
    return Agreement(
        precision=precision, recall=recall, f1=f1, mean_f1=float(over_sizes[0]), f1_at_gold_size=at_gold[2],
        iou_f1=iou, mean_iou_f1=float(over_sizes[1]), iou_f1_at_gold_size=at_gold[3],
        average_precision=_average_precision(scores, is_gold), roc_auc=_roc_auc(scores, is_gold),
        pearson=_pearson(scores, np.nan_to_num(strengths)),
    )  # fmt: skip


def share_of_gold(words: Sequence[tuple[int, int, float]], gold: Sequence[GoldSpan]) -> float:
    """Return the share of a text's words that are gold: the mean of a corpus's texts is what `compare_with_gold` takes."""
    strengths = _strengths(sorted(words), gold)
    return float((~np.isnan(strengths)).mean()) if len(strengths) else 0.0


def _strengths(words: Sequence[tuple[int, int, float]], gold: Sequence[GoldSpan]) -> NDArray[np.float64]:
    """Return the largest score of the spans that a word shares a character with, (W,), NaN where there is none."""
    strengths = np.full(len(words), np.nan)
    for number, (start, end, _) in enumerate(words):
        met = [span.score for span in gold if span.start < end and start < span.end]
        if met:
            strengths[number] = max(met)
    return strengths


def _span_numbers(words: Sequence[tuple[int, int, float]], gold: Sequence[GoldSpan]) -> NDArray[np.int64]:
    """Return the number of the first gold span that a word belongs to, (W,), -1 for none: neighbours stay two spans."""
    numbers = np.full(len(words), -1, dtype=np.int64)
    ordered = sorted(range(len(gold)), key=lambda number: (gold[number].start, gold[number].end))
    for word, (start, end, _) in enumerate(words):
        for number in ordered:
            if gold[number].start < end and start < gold[number].end:
                numbers[word] = number
                break
    return numbers


def _find_runs(chosen: NDArray[np.bool_], kinds: NDArray[np.int64] | None = None) -> list[tuple[int, int]]:
    """Return start and stop of each run of chosen words that are of one kind."""
    runs: list[tuple[int, int]] = []
    for number in np.flatnonzero(chosen).tolist():
        if runs and runs[-1][1] == number and (kinds is None or kinds[number] == kinds[number - 1]):
            runs[-1] = runs[-1][0], number + 1
        else:
            runs.append((number, number + 1))
    return runs


def _iou_f1(runs: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> float:
    hits = sum(max(_overlap(run, span) for span in spans) >= _LEAST_OVERLAP for run in runs)
    return _harmonic(hits / max(len(runs), 1), min(1.0, hits / len(spans)))


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> float:
    shared = max(0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _average_precision(scores: NDArray[np.float64], is_gold: NDArray[np.bool_]) -> float | None:
    """Return the mean over gold words of the precision down to each, words of equal score taken together."""
    if is_gold.all():
        return None
    values, places = np.unique(-scores, return_inverse=True)
    hits = np.bincount(places, weights=is_gold, minlength=len(values))
    seen = np.bincount(places, minlength=len(values)).cumsum()
    return float((hits * hits.cumsum() / seen).sum() / hits.sum())


def _roc_auc(scores: NDArray[np.float64], is_gold: NDArray[np.bool_]) -> float | None:
    if is_gold.all():
        return None
    differences = scores[is_gold][:, None] - scores[~is_gold]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def _pearson(scores: NDArray[np.float64], strengths: NDArray[np.float64]) -> float | None:
    if np.ptp(scores) == 0 or np.ptp(strengths) == 0:
        return None
    return float(np.corrcoef(scores, strengths)[0, 1])
