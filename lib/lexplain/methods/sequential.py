"""Attribution by moving one token at a time from its baseline to the input.

Shape letters: B rows, S tokens of the padded length, D embedding, K (row, token) pairs, P path points, N points of a
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lexplain.methods import Attribution, Evaluate, Inputs, method
from lexplain.methods.paths import FixedRule, quadrature

# Points of one visit: enough to fill the passes of any device, few enough that their numbers stay small beside the
# model. A visit holds at least one node of all pairs, so that the targets of a window share the forward part.
_VISIT_POINTS = 65_536


@method(
    version=1, signed=True, cite="enguehard2023sequential", ranges={"nodes": (2, 2000)},
    presets={"sig-2023": {"rule": "gauss_legendre", "nodes": 50, "baseline": "mask"}},
    cost=lambda options, tokens: 2 * options["nodes"] * tokens + 1,
)  # fmt: skip
def sequential_integrated_gradients(
    evaluate: Evaluate, inputs: Inputs, *, rule: FixedRule = "gauss_legendre", nodes: int = 50, baseline: str = "mask"
) -> Attribution:
    """Return one score a token: the gradient integrated while this token alone moves from the baseline to x.

    All other tokens stay at x, so every point of the path is the text with one word that is not quite there.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        rule: Where the points of a token lie on its line, see `lexplain.methods.paths.quadrature`.
        nodes: Points of each token, 2 to 2000.
        baseline: Token that stands for the absence of a word: `mask`, `pad`, or a token of the vocabulary.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. The score of a token is what the
        text loses without it, F(x) - F(x with this token at the baseline), up to the error of the rule. Together
        they sum to no difference of logits: the completeness gap is what they leave of F(x) - F(baseline).

    Note:
        Runs on: executor. Cost: `nodes` forward and backward passes a content token, so the number of tokens times as
        much as Integrated Gradients; one forward pass a row for F(baseline).
        Source: Enguehard 2023. Published scores are divided by their L2 norm over the text, as keyword tables do
        here.
    """
    content = ~inputs.special & inputs.mask
    row, place = (numbers.cpu() for numbers in content.nonzero(as_tuple=True))  # (K,) each
    alphas, weights = quadrature(rule, nodes)
    scores = torch.zeros(inputs.special.shape, dtype=torch.float64, device=inputs.x.device)
    together = max(1, _VISIT_POINTS // max(len(row), 1))
    for start in range(0, nodes, together):
        part = slice(start, start + together)
        found = _differentiate(evaluate, inputs, row, place, torch.tensor(alphas[part], dtype=torch.float64))
        scores[row, place] += found @ torch.tensor(weights[part], dtype=torch.float64, device=found.device)
    return Attribution.from_scores(scores, evaluate, inputs, evaluations=content.sum(1) * nodes)


def _differentiate(evaluate: Evaluate, inputs: Inputs, row: Tensor, place: Tensor, alphas: Tensor) -> Tensor:
    """Return the derivative of F along the line of one token each, (K, alphas) float64.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        row: (K,) row of each pair, CPU.
        place: (K,) the token that moves, CPU.
        alphas: Where on its line, CPU.
    """
    device, count = inputs.x.device, len(alphas)
    owners, moving = row.repeat_interleave(count).to(device), place.repeat_interleave(count).to(device)
    steps = alphas.repeat(len(row)).to(inputs.x)
    found = torch.zeros(len(owners), dtype=torch.float64, device=device)

    def put(points: Tensor, length: int) -> Tensor:
        rows, tokens = owners[points], moving[points]
        embeddings = inputs.x[rows, :length]  # a copy, as every choice of rows is
        start, end = inputs.baseline[rows, tokens], inputs.x[rows, tokens]
        embeddings[torch.arange(len(points), device=device), tokens] = torch.lerp(start, end, steps[points, None])
        return embeddings

    def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None  # they were asked for
        rows, tokens = owners[points], moving[points]
        line = inputs.x[rows, tokens] - inputs.baseline[rows, tokens]
        gradient = gradients[torch.arange(len(points), device=device), tokens]
        found[points] = (line * gradient).sum(-1, dtype=torch.float64)

    # rows of one window have the same tokens and nodes: they lie at one place
    share = place[:, None] * count + torch.arange(count)
    evaluate.visit(row.repeat_interleave(count), put, see, share=share.reshape(-1))
    return found.view(len(row), count)
