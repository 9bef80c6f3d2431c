"""Controls: what any method has to beat. Random scores, and occlusion, which needs no gradient.

Shape letters: B rows, S tokens, U units of the row that has most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lexplain.methods import Attribution, Evaluate, Inputs, method
from lexplain.methods.noise import draw_uniform
from lexplain.methods.units import count_tokens, number_units, spread_over_tokens


@method(version=1, signed=False, stochastic=True, by_word=True, cite="none", cost=lambda options, tokens: 1)
def random(evaluate: Evaluate, inputs: Inputs, *, baseline: str = "mask") -> Attribution:
    """Return scores drawn from [0, 1), one a word, in equal parts on its tokens.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        baseline: Token whose logit is reported as the baseline score; no score depends on it.

    Returns:
        The same for each target of a window; exactly 0.0 on special tokens and padding.

    Note:
        Runs on: executor. Cost: one forward pass a row, for F(baseline).
    """
    units = number_units(inputs)
    counts = count_tokens(units)
    seeds = inputs.seeds.to(inputs.x.device)
    scores = draw_uniform(seeds, torch.zeros_like(seeds), counts.shape[1]) / counts.clamp(min=1)
    return Attribution.from_scores(spread_over_tokens(scores, units), evaluate, inputs, evaluations=0)


@method(version=1, signed=True, by_word=True, cite="zeiler2014visualizing", cost=lambda options, tokens: tokens + 1)
def occlusion(evaluate: Evaluate, inputs: Inputs, *, baseline: str = "mask") -> Attribution:
    """Return what the target logit loses when a word is taken away, in equal parts on its tokens.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        baseline: Token put in the place of each token of the word, named as in `integrated_gradients`.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. A token outside words is
        taken away alone. Two words that say the same cover for each other, and both get little.

    Note:
        Runs on: executor. Cost: one forward pass for each word of a row and for F(baseline); targets of one
        window share them. Source: Zeiler and Fergus 2014, section 2; words as in Li et al. 2016.
    """
    units = number_units(inputs)
    counts = count_tokens(units)
    present = (counts > 0).nonzero()  # (P, 2) row and unit of each point
    owners, occluded = present.unbind(1)
    values = torch.full((len(present),), math.nan, dtype=torch.float64, device=inputs.x.device)

    def place(points: Tensor, length: int) -> Tensor:
        row = owners[points]
        taken = units[row, :length] == occluded[points, None]
        return torch.where(taken[..., None], inputs.baseline[row, :length], inputs.x[row, :length])

    def see(points: Tensor, seen: Tensor, gradients: Tensor | None) -> None:
        values[points] = seen

    evaluate.visit(owners.cpu(), place, see, share=occluded.cpu(), gradients=False)
    scores = torch.zeros(counts.shape, dtype=torch.float64, device=values.device)
    scores[owners, occluded] = (inputs.target_score[owners] - values) / counts[owners, occluded]
    return Attribution.from_scores(spread_over_tokens(scores, units), evaluate, inputs, evaluations=0)
