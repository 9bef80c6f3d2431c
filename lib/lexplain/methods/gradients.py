"""Attribution by the gradient at the input: saliency (sensitivity analysis), gradient x input, SmoothGrad.

Shape letters: B rows, S tokens, D embedding, N points of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lexplain.methods import Attribution, Evaluate, Inputs, method
from lexplain.methods.noise import draw_normal, measure_spread

Norm = Literal["l2_squared", "l2", "l1"]
Sign = Literal["none", "gradient_x_input"]


@method(
    version=1, signed=False, cite="arras2016explaining", presets={"sa-2016": {"norm": "l2_squared"}},
    cost=lambda options, tokens: 3,
)  # fmt: skip
def saliency(
    evaluate: Evaluate, inputs: Inputs, *, norm: Norm = "l2_squared", sign: Sign = "none", baseline: str = "mask"
) -> Attribution:
    """Return one score a token: the size of the gradient of the target logit at its embedding.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        norm: `l2_squared`: sum of squares over the embedding, which is sensitivity analysis. `l2`: its root.
            `l1`: sum of absolute values.
        sign: `none`: no score is negative, so counter-evidence counts as evidence. `gradient_x_input`: each
            score has the sign of gradient x input.
        baseline: Token whose logit is reported as the baseline score; no score depends on it.

    Returns:
        Scores in squared logits per squared embedding, or their root; exactly 0.0 on special tokens and
        padding. Their sum is no part of F(x).

    Note:
        Runs on: executor. Cost: one forward and one backward pass a row, one forward pass for F(baseline).
        Source: Arras et al. 2016 (sensitivity analysis).
    """
    scores = torch.zeros(inputs.special.shape, dtype=torch.float64, device=inputs.x.device)

    def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None  # they were asked for
        length = gradients.shape[1]
        scores[points, :length] = _size(gradients, inputs.x[points, :length], norm, sign)

    visit_inputs(evaluate, inputs, see)
    return Attribution.from_scores(scores.masked_fill_(inputs.special, 0.0), evaluate, inputs, evaluations=1)


@method(version=1, signed=True, cite="shrikumar2016not", cost=lambda options, tokens: 3)
def gradient_x_input(evaluate: Evaluate, inputs: Inputs, *, baseline: str = "mask") -> Attribution:
    """Return one score a token: its embedding times the gradient of the target logit, summed.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        baseline: Token whose logit is reported as the baseline score; no score depends on it.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. What is attributed to is the
        zero vector, not the baseline token: the scores are exact where F is linear and F(0) is 0.

    Note:
        Runs on: executor. Cost: one forward and one backward pass a row, one forward pass for F(baseline).
        Source: Shrikumar et al. 2016.
    """
    return Attribution.from_scores(measure_products(evaluate, inputs), evaluate, inputs, evaluations=1)


@method(
    version=1, signed=False, stochastic=True, cite="smilkov2017smoothgrad",
    ranges={"samples": (1, 1000), "noise": (0.0, 10.0)}, cost=lambda options, tokens: 2 * options["samples"] + 1,
)  # fmt: skip
def smoothgrad(
    evaluate: Evaluate, inputs: Inputs, *, samples: int = 25, noise: float = 0.15, norm: Norm = "l2_squared",
    sign: Sign = "none", baseline: str = "mask",
) -> Attribution:  # fmt: skip
    """Return one score a token: the size of the mean gradient over noisy copies of the input.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        samples: Noisy copies, 1 to 1000.
        noise: Standard deviation of the Gaussian noise on content tokens, as a share of that of the row's own
            embeddings. There is no published value for text: 0.15 is ours.
        norm: Of the mean gradient, as in `saliency`: the gradients are averaged first, so that what is only
            noise cancels out.
        sign: As in `saliency`, with the mean gradient.
        baseline: Token whose logit is reported as the baseline score; no score depends on it.

    Returns:
        Scores as those of `saliency`, which 1 sample without noise is.

    Note:
        Runs on: executor. Cost: `samples` forward and backward passes a row, one forward pass for F(baseline).
        Memory: one gradient a row. Targets of one window see the same noise and share the forward part.
        Source: Smilkov et al. 2017; sum of squares as in Zhang et al. 2022 (LAFA).
    """
    x, count = inputs.x, len(inputs.x)
    rows = torch.arange(count).repeat_interleave(samples)
    owners, seeds, spread = rows.to(x.device), inputs.seeds.to(x.device), noise * measure_spread(inputs)
    total = torch.zeros_like(x)

    def place(points: Tensor, length: int) -> Tensor:
        row = owners[points]
        normal = draw_normal(seeds[row], points % samples, length, x.shape[2]).to(x)
        normal *= spread[row, None, None].to(x)
        return x[row, :length] + normal.masked_fill_(inputs.special[row, :length, None], 0.0)

    def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None  # they were asked for
        total[:, : gradients.shape[1]].index_add_(0, owners[points], gradients.to(x))

    evaluate.visit(rows, place, see, share=torch.arange(samples).repeat(count))
    scores = _size(total.div_(samples), x, norm, sign)
    return Attribution.from_scores(scores.masked_fill_(inputs.special, 0.0), evaluate, inputs, evaluations=samples)


def visit_inputs(evaluate: Evaluate, inputs: Inputs, see: Callable[[Tensor, Tensor, Tensor | None], None]) -> None:
    """Take the gradient of each row at x; the targets of a window share the forward part.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows; points have their numbers.
        see: As in `Evaluate.visit`.
    """
    rows = torch.arange(len(inputs.x))

    def place(points: Tensor, length: int) -> Tensor:
        return inputs.x[points, :length]

    evaluate.visit(rows, place, see, share=torch.zeros_like(rows))


def measure_products(evaluate: Evaluate, inputs: Inputs) -> Tensor:
    """Return the gradient of each row at x times x, summed over the embedding, (B, S) float64.

    Exactly 0.0 on special tokens and padding. One forward and one backward pass a row.
    """
    products = torch.zeros(inputs.special.shape, dtype=torch.float64, device=inputs.x.device)

    def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None  # they were asked for
        length = gradients.shape[1]
        products[points, :length] = (inputs.x[points, :length] * gradients).sum(-1, dtype=torch.float64)

    visit_inputs(evaluate, inputs, see)
    return products.masked_fill_(inputs.special, 0.0)


def _size(gradients: Tensor, x: Tensor, norm: Norm, sign: Sign) -> Tensor:
    """Return (N, S) float64 from gradients and embeddings (N, S, D)."""
    if norm == "l1":
        sizes = gradients.abs().sum(-1, dtype=torch.float64)
    else:
        sizes = gradients.square().sum(-1, dtype=torch.float64)
        sizes = sizes.sqrt() if norm == "l2" else sizes
    if sign == "none":
        return sizes
    negative = (x * gradients).sum(-1, dtype=torch.float64) < 0  # a sign function would give 0.0 at 0
    return torch.where(negative, -sizes, sizes)
