"""Resampling statistics beside closed forms and scipy's own tests."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from lexplain.resampling import FLIPS, adjust_holm, bootstrap_mean, permute_signs


def test_few_pairs_have_every_sign_pattern() -> None:
    """By hand: the share of all 2^7 patterns whose mean is at least as far from 0."""
    values = [0.3, -0.1, 0.25, 0.4, 0.05, 0.2, -0.02]
    means = [abs(np.dot(signs, values)) for signs in product((-1, 1), repeat=len(values))]
    expected = np.mean(np.array(means) >= abs(sum(values)) - 1e-12)
    assert permute_signs(values) == pytest.approx(expected)


def test_many_pairs_give_what_a_t_test_gives() -> None:
    values = np.random.default_rng(1).normal(0.12, 1.0, size=200)
    assert permute_signs(values.tolist()) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.02)


def test_a_sure_difference_is_never_certain() -> None:
    assert permute_signs([1.0] * 50) == pytest.approx(2 / (FLIPS + 1), rel=0.51)
    assert permute_signs([0.0] * 5) == 1.0
    assert permute_signs([2.0]) == 1.0


def test_equal_methods_are_rarely_told_apart() -> None:
    draw = np.random.default_rng(0)
    found = [permute_signs(draw.normal(size=12).tolist(), flips=499) for _ in range(200)]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.1


def test_an_interval_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, size=400)
    mean, low, high = bootstrap_mean(values.tolist())
    error = values.std(ddof=1) / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert bootstrap_mean(values.tolist()) == (mean, low, high)


def test_holm_by_hand() -> None:
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([0.6, 0.7]) == [1.0, 1.0]
    assert adjust_holm([]) == []


@given(st.lists(st.floats(1e-6, 1.0), max_size=12))
def test_holm_keeps_the_order_and_lies_between_one_test_and_bonferroni(p_values: list[float]) -> None:
    found = adjust_holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * p) + 1e-12 for p, q in zip(p_values, found, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(found)[order]) >= 0).all()
