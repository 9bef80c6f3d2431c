"""Units: what a method that works on words keeps or takes away as a whole.

Shape letters: B rows, S tokens, U units of the row that has most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexplain.methods import Inputs


def number_units(inputs: Inputs) -> Tensor:
    """Return the unit of each token, (B, S) long: 0, 1, ... along the window, -1 on special tokens and padding.

    All tokens of a word are one unit. A token outside words (punctuation, symbols) is a unit of its own: in the
    corpora that such methods were published on, punctuation marks are words.
    """
    content = ~inputs.special
    inside = content & (inputs.words >= 0)
    highest = inputs.words.cummax(dim=1).values
    before = torch.cat([torch.full_like(highest[:, :1], -1), highest[:, :-1]], dim=1)
    first = inside & (inputs.words > before)
    numbers = (first | (content & ~inside)).cumsum(1)
    # a token outside words may lie between two pieces of one word, which stays one unit all the same
    own = torch.where(first, numbers, 0).cummax(dim=1).values
    return torch.where(inside, own, numbers).sub_(1).masked_fill_(inputs.special, -1)


def count_tokens(units: Tensor) -> Tensor:
    """Return the tokens of each unit, (B, U) long, U at least 1; 0 where a row has fewer units.

    Args:
        units: (B, S), as from `number_units`.
    """
    size = max(int(units.max()) + 1, 1)
    counts = torch.zeros((len(units), size), dtype=torch.long, device=units.device)
    return counts.scatter_add_(1, units.clamp(min=0), (units >= 0).long())


def spread_over_tokens(scores: Tensor, units: Tensor) -> Tensor:
    """Return (B, S) the score of each token's unit; exactly 0.0 on special tokens and padding.

    Args:
        scores: (B, U).
        units: (B, S), as from `number_units`.
    """
    return scores.gather(1, units.clamp(min=0)).masked_fill_(units < 0, 0.0)
