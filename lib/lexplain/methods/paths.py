"""Attribution by integrating gradients along a path from a baseline to the input.

Shape letters: B rows, S tokens, P path points.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from lexplain.methods import Attribution, Evaluate, Inputs, method

Rule = Literal["midpoint", "trapezoid", "gauss_legendre"]


@lru_cache(maxsize=64)
def quadrature(rule: Rule, nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return nodes on [0, 1], ascending, and their weights, which sum to 1 (float64).

    Args:
        rule: `midpoint`: centres of equal intervals. `trapezoid`: equally spaced, both ends among them, with
            half weight. `gauss_legendre`: exact for polynomials up to degree 2 nodes - 1, but dense at the
            ends, where the gradient of a classifier seldom moves.
        nodes: At least 1, for the trapezoid at least 2.
    """
    if rule == "midpoint":
        alphas, weights = (np.arange(nodes) + 0.5) / nodes, np.full(nodes, 1.0 / nodes)
    elif rule == "trapezoid":
        alphas, weights = np.linspace(0.0, 1.0, nodes), np.full(nodes, 1.0 / (nodes - 1))
        weights[[0, -1]] /= 2
    else:
        abscissae, doubled = np.polynomial.legendre.leggauss(nodes)
        alphas, weights = (abscissae + 1.0) / 2, doubled / 2
    return tuple(alphas.tolist()), tuple(weights.tolist())


# Gauss-Legendre nodes are the eigenvalues of a (nodes, nodes) matrix: past 2000 they cost more than the model
@method(version=1, complete=True, signed=True, cite="sundararajan2017axiomatic", ranges={"nodes": (2, 2000)})
def integrated_gradients(
    evaluate: Evaluate, inputs: Inputs, *, rule: Rule = "midpoint", nodes: int = 50, baseline: str = "mask"
) -> Attribution:
    """Return one score a token: the gradient of the target logit, integrated along the straight line to x.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        rule: Where the points lie, see `quadrature`. The gradient moves in a narrow band inside the path, so
            the midpoint rule needs fewer points than Gauss-Legendre.
        nodes: Points, 2 to 2000.
        baseline: Token that stands for the absence of a word: `mask`, `pad`, or a token of the vocabulary.
            The engine has built `inputs.baseline` from it.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. Their sum comes the
        closer to F(x) - F(baseline) the more points there are.

    Note:
        Runs on: executor. Cost: `nodes` forward and backward passes a row, and one forward pass for
        F(baseline), which the trapezoid does not need.
        Source: Sundararajan et al. 2017, section 3. The target is fixed along the path, and is a logit: a
        probability saturates, and would need twice the points.
    """
    alphas, weights = quadrature(rule, nodes)
    count = len(inputs.x)
    rows = torch.arange(count)
    values, derivatives = evaluate.directional(
        rows.repeat_interleave(nodes), torch.tensor(alphas, dtype=torch.float64).repeat(count)
    )
    weight = torch.tensor(weights, dtype=torch.float64, device=derivatives.device)
    scores = (weight[:, None] * derivatives.view(count, nodes, -1)).sum(1)  # (B, P/B, S) to (B, S)
    if rule == "trapezoid":
        baseline_score = values.view(count, nodes)[:, 0]
    else:
        baseline_score = evaluate.logits(rows, torch.zeros(count, dtype=torch.float64))
    return Attribution(
        scores=scores,
        baseline_score=baseline_score,
        completeness_gap=inputs.target_score - baseline_score - scores.sum(-1),
        evaluations=torch.full((count,), nodes),
        converged=torch.ones(count, dtype=torch.bool),
    )
