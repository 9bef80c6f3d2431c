"""How much two ranked lists agree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray


def rank_biased_overlap(first: Sequence[Hashable], second: Sequence[Hashable], p: float = 0.9) -> float:
    """Return the extrapolated rank-biased overlap of two lists without repeated entries, whatever their lengths.

    Args:
        first: Entries, best first.
        second: The other list.
        p: Weight of a rank relative to the one before, above 0 and below 1; .9 gives the first 10 ranks 86 %.

    Returns:
        1 for equal lists, 0 for lists that share nothing or of which one is empty.
    """
    places = {entry: place for place, entry in enumerate(first)}
    found = np.array([[places.get(entry, len(first)) for entry in second]], dtype=np.int64)
    return float(overlap_at(found, len(first), p)[0])


def overlap_at(places: NDArray[np.int64], length: int, p: float = 0.9) -> NDArray[np.float64]:
    """Return the extrapolated rank-biased overlap of one list with each of N others that are of one length, (N,).

    Args:
        places: (N, L) where the one list has the other's entries, from 0; `length` where it has them not.
        length: Of the one list.
        p: As above.

    Source: Webber, Moffat & Zobel 2010, equation 32.
    """
    s, l = sorted((places.shape[1], length))  # noqa: E741  # as in the paper
    if not s:
        return np.zeros(len(places))
    met = np.where(places < length, np.maximum(places, np.arange(places.shape[1])), l)
    depth = np.arange(1, l + 1)
    shared = (met[:, :, None] < depth).sum(1)  # X_d: entries that the first d ranks of both have in common
    agreed = (shared / depth * p**depth).sum(1)
    assumed = (shared[:, s - 1 : s] * (depth[s:] - s) / (s * depth[s:]) * p ** depth[s:]).sum(1)
    beyond = ((shared[:, l - 1] - shared[:, s - 1]) / l + shared[:, s - 1] / s) * p**l
    return np.asarray((1 - p) / p * (agreed + assumed) + beyond)


def jaccard(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of all entries that both lists have; 0 where both are empty."""
    either = set(first) | set(second)
    return len(set(first) & set(second)) / len(either) if either else 0.0
