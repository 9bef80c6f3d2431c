"""Overlap of ranked lists: by its definition as a sum without end, and by hand."""

from __future__ import annotations

import random

import pytest

from lexplain.overlap import jaccard, rank_biased_overlap
from pandas_oracle import overlap_rank_biased


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_it_is_the_sum_over_all_depths(p: float) -> None:
    draw = random.Random(4)
    for _ in range(60):
        first = [str(each) for each in draw.sample(range(30), draw.randint(0, 25))]
        second = [str(each) for each in draw.sample(range(30), draw.randint(0, 25))]
        found = rank_biased_overlap(first, second, p)
        assert found == pytest.approx(overlap_rank_biased(first, second, p), abs=1e-9)
        assert found == rank_biased_overlap(second, first, p)
        assert 0 <= found <= 1 + 1e-12


def test_by_hand() -> None:
    assert rank_biased_overlap("abc", "abc") == pytest.approx(1)
    assert rank_biased_overlap("abc", "def") == 0
    assert rank_biased_overlap("abc", "") == rank_biased_overlap("", "") == 0
    assert rank_biased_overlap("abc", "acb") == pytest.approx(1 / 9 * (0.9 + 0.81 / 2 + 0.729) + 0.729)
    assert (jaccard("abc", "abd"), jaccard("", "a"), jaccard("", "")) == (0.5, 0, 0)
