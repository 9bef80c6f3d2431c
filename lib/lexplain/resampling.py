"""Statistics by resampling: intervals of means, tests of paired differences, tests taken together. Driver only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Bootstrap samples."""

FLIPS = 9999
"""Random sign patterns of a paired test; all of them where there are fewer."""


def bootstrap_means(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Return the means of samples of the same size, (resamples,); the same samples for a seed."""
    known: NDArray[np.float64] = np.array(values)
    draws = np.random.default_rng(seed).integers(len(known), size=(resamples, len(known)))
    return np.asarray(known[draws].mean(1))


def bootstrap_mean(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Return mean, and the 2.5 and 97.5 % quantiles of the means of bootstrap samples."""
    return float(np.mean(values)), *find_interval(bootstrap_means(values, resamples))


def find_interval(sampled: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % interval: the 2.5 and 97.5 % quantiles of what samples gave."""
    low, high = np.quantile(sampled, (0.025, 0.975))
    return float(low), float(high)


def permute_signs(differences: Sequence[float], flips: int = FLIPS) -> float:
    """Return the two-sided p-value of a paired permutation test: is the mean difference 0?

    Under the null hypothesis either of a pair's values could have been the other's, so each difference may have either sign.

    Args:
        differences: One a pair.
        flips: Random sign patterns.

    Returns:
        Above 0 and at most 1; never below 1 / (flips + 1). 1 where all differences are 0, or there is only one.

    Note:
        Runs on: driver. Cost: `flips` sums over the pairs.
        Source: scipy.stats.permutation_test, `permutation_type='samples'`.
    """
    from scipy.stats import permutation_test

    values = np.array(differences, dtype=np.float64)
    if len(values) < 2 or not values.any():
        return 1.0
    found = permutation_test(
        (values, np.zeros_like(values)), lambda one, other, axis: (one - other).mean(axis),
        permutation_type="samples", vectorized=True, n_resamples=flips, batch=1000, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values of tests taken together (Holm 1979), in their order: compare each with the level itself."""
    count = len(p_values)
    order = sorted(range(count), key=lambda number: p_values[number])
    adjusted, largest = [0.0] * count, 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p_values[number]))
        adjusted[number] = largest
    return adjusted
