"""Random numbers that depend on a row's seed alone: not on its batch mates, padding, passes or the device.

A generator hands its numbers out in order, so a batch of rows would need one generator a row, asked in a loop.
Here a number is a hash of the seed, the number of the draw and the place in it (SplitMix64), so that whole batches
are drawn at once and any number can be had again.

Shape letters: B rows, N draws, S tokens, D embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lexplain.methods import Inputs


def _signed(constant: int) -> int:
    """Return the 64-bit signed integer with the same bits: torch has no arithmetic for unsigned ones."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FIRST_MULTIPLIER = _signed(0xBF58476D1CE4E5B9)
_SECOND_MULTIPLIER = _signed(0x94D049BB133111EB)


def draw_uniform(seeds: Tensor, draws: Tensor, *shape: int) -> Tensor:
    """Return numbers from [0, 1), (N, *shape) float64.

    Args:
        seeds: (N,) long; numbers come to the device of the seeds.
        draws: (N,) long, not negative; draws of one seed are independent of one another.
        *shape: Of one draw. A larger first dimension adds numbers and leaves the others as they are.
    """
    return _shift(_draw_bits(seeds, draws, shape), 11).double() * 2.0**-53


def draw_normal(seeds: Tensor, draws: Tensor, *shape: int) -> Tensor:
    """Return standard normal numbers, (N, *shape) float32, by the transform of Box and Muller.

    Args:
        seeds: As in `draw_uniform`.
        draws: As in `draw_uniform`.
        *shape: As in `draw_uniform`.
    """
    bits = _draw_bits(seeds, draws, shape)
    radius = (_shift(bits, 32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0)).sqrt_()
    return bits.bitwise_and_(0xFFFFFFFF).float().mul_(2.0 * math.pi * 2.0**-32).cos_().mul_(radius)


def measure_spread(inputs: Inputs) -> Tensor:
    """Return the standard deviation of each row's content embeddings, (B,) float64; 0.0 for a row without any.

    Noise is told as a share of it: word embeddings of one model are some 20 times those of another.
    """
    spreads = []
    for x, special in zip(inputs.x, inputs.special, strict=True):
        content = x[~special].double()
        spreads.append(content.std(correction=0) if len(content) else content.sum())
    return torch.stack(spreads)


def _draw_bits(seeds: Tensor, draws: Tensor, shape: tuple[int, ...]) -> Tensor:
    starts = _mix(seeds + draws * _INCREMENT)
    steps = torch.arange(1, math.prod(shape) + 1, device=seeds.device).mul_(_INCREMENT).view(shape)
    return _mix(starts.view(-1, *[1] * len(shape)) + steps)


def _mix(bits: Tensor) -> Tensor:
    """Return the finishing hash of SplitMix64 (Steele et al. 2014); products wrap round, as they should."""
    bits = (bits ^ _shift(bits, 30)).mul_(_FIRST_MULTIPLIER)
    bits = (bits ^ _shift(bits, 27)).mul_(_SECOND_MULTIPLIER)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Return the bits shifted right, zeros following: torch's own shift keeps the sign."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)
