"""Agreement with gold evidence: against scikit-learn and scipy, and a slow restatement with sets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

from lexplain.plausibility import SHARES, GoldSpan, compare_with_gold, share_of_gold

Scored = list[tuple[int, int, float]]


def place(scores: Sequence[float]) -> Scored:
    """Words of three characters, one apart, in a mixed order."""
    words = [(4 * number, 4 * number + 3, score) for number, score in enumerate(scores)]
    return words[::2] + words[1::2]


def choose(scores: Sequence[float], size: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:size])


def runs_of(chosen: set[int]) -> list[set[int]]:
    found: list[set[int]] = []
    for number in sorted(chosen):
        if found and number - 1 in found[-1]:
            found[-1].add(number)
        else:
            found.append({number})
    return found


def slow_iou_f1(chosen: set[int], spans: list[set[int]]) -> float:
    hits = sum(max(len(run & span) / len(run | span) for span in spans) >= 0.5 for run in runs_of(chosen))
    precision, recall = hits / len(runs_of(chosen)), min(1.0, hits / len(spans))
    return 2 * precision * recall / (precision + recall) if hits else 0.0


texts = st.integers(2, 14).flatmap(
    lambda size: st.tuples(
        st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0]), min_size=size, max_size=size),
        st.lists(st.tuples(st.integers(0, size - 1), st.integers(1, 4), st.floats(0.1, 4)), min_size=1, max_size=3),
        st.floats(0.05, 1.0),
    )
)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_figures_are_those_of_other_libraries(drawn: tuple[list[float], list[tuple[int, int, float]], float]) -> None:
    scores, raw, share = drawn
    # spans of whole words that do not meet
    spans, free = [], 0
    for first, length, strength in sorted(raw):
        start, stop = max(first, free), min(max(first, free) + length, len(scores))
        if start < stop:
            spans.append((set(range(start, stop)), strength))
            free = stop
    gold = [GoldSpan(4 * min(each), 4 * max(each) + 3, strength) for each, strength in spans]
    members = set().union(*(each for each, _ in spans))
    found = compare_with_gold(place(scores), gold, share)
    assert found is not None
    assert share_of_gold(place(scores), gold) == len(members) / len(scores)
    truth = [number in members for number in range(len(scores))]

    def f1(size: int) -> float:
        guess = [number in choose(scores, size) for number in range(len(scores))]
        return float(precision_recall_fscore_support(truth, guess, average="binary", zero_division=0)[2])

    size = min(len(scores), max(1, math.floor(share * len(scores) + 0.5)))
    guess = [number in choose(scores, size) for number in range(len(scores))]
    precision, recall, expected, _ = precision_recall_fscore_support(truth, guess, average="binary", zero_division=0)
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, expected))
    sizes = [min(len(scores), max(1, math.floor(each * len(scores) + 0.5))) for each in SHARES]
    assert found.mean_f1 == pytest.approx(np.mean([f1(each) for each in sizes]))
    assert found.f1_at_gold_size == pytest.approx(f1(len(members)))
    groups = [each for each, _ in spans]
    assert found.iou_f1 == pytest.approx(slow_iou_f1(choose(scores, size), groups))
    assert found.mean_iou_f1 == pytest.approx(np.mean([slow_iou_f1(choose(scores, each), groups) for each in sizes]))
    assert found.iou_f1_at_gold_size == pytest.approx(slow_iou_f1(choose(scores, len(members)), groups))
    if all(truth):
        assert found.average_precision is found.roc_auc is None
    else:
        assert found.average_precision == pytest.approx(average_precision_score(truth, scores))
        assert found.roc_auc == pytest.approx(roc_auc_score(truth, scores))
    strengths = [next((strength for each, strength in spans if number in each), 0.0) for number in range(len(scores))]
    if len(set(scores)) == 1 or len(set(strengths)) == 1:
        assert found.pearson is None
    else:
        assert found.pearson == pytest.approx(pearsonr(scores, strengths).statistic, abs=1e-9)


def test_one_word() -> None:
    found = compare_with_gold([(0, 5, 0.3)], [GoldSpan(0, 5)], 0.2)
    assert found is not None
    assert (found.precision, found.recall, found.f1, found.mean_f1, found.iou_f1) == (1, 1, 1, 1, 1)
    assert found.average_precision is found.roc_auc is found.pearson is None


def test_without_gold_or_words_there_is_nothing_to_compare() -> None:
    assert compare_with_gold([(0, 5, 0.3)], [], 0.2) is None
    assert compare_with_gold([(0, 5, 0.3)], [GoldSpan(5, 9)], 0.2) is None
    assert compare_with_gold([], [GoldSpan(0, 5)], 0.2) is None
    assert share_of_gold([], [GoldSpan(0, 5)]) == 0.0


def test_a_word_is_gold_where_a_span_touches_it() -> None:
    """A span that ends inside a word has it; the strongest span counts."""
    words = [(0, 4, 1.0), (5, 9, 2.0), (10, 14, 3.0)]
    found = compare_with_gold(words, [GoldSpan(0, 6, 0.5), GoldSpan(8, 9, 2.0)], 0.34)
    assert found is not None
    assert share_of_gold(words, [GoldSpan(0, 6), GoldSpan(8, 9)]) == pytest.approx(2 / 3)
    assert found.precision == 0.0
    assert found.pearson == pytest.approx(pearsonr([1, 2, 3], [0.5, 2.0, 0.0]).statistic)


def test_spans_that_touch_stay_two() -> None:
    """One run over both halves the overlap with each: it hits both or neither, never as one."""
    words = [(0, 1, 4.0), (2, 3, 3.0), (4, 5, 2.0), (6, 7, 1.0)]
    two = compare_with_gold(words, [GoldSpan(0, 3), GoldSpan(4, 7)], 1.0)
    one = compare_with_gold(words, [GoldSpan(0, 7)], 1.0)
    assert one is not None
    assert two is not None
    assert one.iou_f1 == 1.0
    assert two.iou_f1 == pytest.approx(2 / 3)  # one run, two spans: found one of two
