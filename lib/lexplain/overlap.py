"""How much two ranked lists agree."""

from __future__ import annotations

from collections.abc import Sequence


def rank_biased_overlap(first: Sequence[str], second: Sequence[str], p: float = 0.9) -> float:
    """Return the extrapolated rank-biased overlap of two lists without repeated entries, whatever their lengths.

    Args:
        first: Entries, best first.
        second: The other list.
        p: Weight of a rank relative to the one before, above 0 and below 1; .9 gives the first 10 ranks 86 %.

    Returns:
        1 for equal lists, 0 for lists that share nothing or of which one is empty.

    Source: Webber, Moffat & Zobel 2010, equation 32.
    """
    short, long = sorted((first, second), key=len)
    s, l = len(short), len(long)  # noqa: E741  # as in the paper
    if not s:
        return 0.0
    shared = [0]  # X_d: entries that the first d ranks of both have in common
    for depth in range(1, l + 1):
        shared.append(len(set(short[:depth]) & set(long[:depth])))
    agreed = sum(shared[d] / d * p**d for d in range(1, l + 1))
    assumed = sum(shared[s] * (d - s) / (s * d) * p**d for d in range(s + 1, l + 1))
    beyond = ((shared[l] - shared[s]) / l + shared[s] / s) * p**l
    return (1 - p) / p * (agreed + assumed) + beyond


def jaccard(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of all entries that both lists have; 0 where both are empty."""
    either = set(first) | set(second)
    return len(set(first) & set(second)) / len(either) if either else 0.0
