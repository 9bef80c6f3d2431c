"""Attribution by integrating gradients along a path from a baseline to the input.

Shape letters: B rows, S tokens, P path points, N nodes of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexplain.calibration import MOST_NODES, Calibration
from lexplain.errors import MethodError, Problem
from lexplain.methods import Attribution, Evaluate, Inputs, method, score_baselines

Rule = Literal["adaptive", "calibrated", "midpoint", "trapezoid", "gauss_legendre"]
FixedRule = Literal["midpoint", "trapezoid", "gauss_legendre"]

# Evenly spaced points that every row starts with. A bump of the gradient between two of them moves the logit, so that it
# shows, unless tokens cancel.
_FIRST_NODES = 7
# An interval's error is the largest of three things that hint at it, each with its weight: what the cubic adds to the
# trapezoid (more of it the rougher the gradient), what the integral lacks to the difference of the logits, and how far the
# gradient jumps, to the power 3/2: where a steep flank lies in one interval the others may be small by chance, and where none
# does it vanishes. Errors of neighbours neither add up nor are independent, so a row's error is their 3/2-norm. Weights are
# those with the fewest points, of some sixty tried, that kept the texts of eleven samples within twice the tolerance.
_BEND_WEIGHT, _GAP_WEIGHT, _JUMP_WEIGHT = 0.3, 0.15, 0.3
_NORM = 1.5
# Below this norm (logits) a tolerance relative to the scores would ask for accuracy that float32 does not have.
_SMALLEST_NORM = 1e-3
# How many times the points a row may have under `unconverged: more`.
_MORE = 4
# Points of a document of a fine-tuned classifier: at the default tolerance, and for keywords.
_TYPICAL_NODES, _TYPICAL_CALIBRATED_NODES = 13, 4


@lru_cache(maxsize=64)
def quadrature(rule: FixedRule, nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
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


def check_rule(options: Mapping[str, object]) -> list[Problem]:
    """Return what is wrong between the options: a number that the chosen rule would never read."""
    rule = str(options.get("rule", "adaptive"))
    unread = [("nodes", "adaptive")] if rule == "adaptive" else []
    unread += [(name, rule) for name in ("tolerance", "max_nodes", "unconverged") if rule != "adaptive"]
    nodes = options.get("nodes")
    too_many = rule == "calibrated" and isinstance(nodes, int) and nodes > MOST_NODES
    problems = [
        Problem("method.nodes", nodes, f"must be at most {MOST_NODES} with accuracy: keywords",
                "No such rule is fitted, and every task would have failed", "Leave nodes out: the job chooses them")
    ] if too_many else []  # fmt: skip
    return problems + [
        Problem(f"method.{name}", options[name], f"is not read by rule: {used}",
                "The explanations would not have been as accurate, or as cheap, as the plan says",
                "Leave it out, or write rule: midpoint" if name == "nodes" else "Leave it out, or write rule: adaptive")
        for name, used in unread if name in options
    ]  # fmt: skip


def _needs_calibration(options: Mapping[str, object]) -> Literal["calibration"] | None:
    return "calibration" if options["rule"] == "calibrated" else None


def _tell_cost(options: Mapping[str, Any], tokens: int) -> float:
    if options["rule"] == "adaptive":
        return float(2 * min(_TYPICAL_NODES, options["max_nodes"]))
    if options["rule"] == "calibrated":
        return float(2 * (options["nodes"] or _TYPICAL_CALIBRATED_NODES) + 1)
    return float(2 * (options["nodes"] or 50) + (options["rule"] != "trapezoid"))  # which has a node at the baseline


@method(
    version=1, complete=True, signed=True, cite="sundararajan2017axiomatic", across=check_rule, prepares=_needs_calibration,
    cost=_tell_cost,
    # Gauss-Legendre nodes are the eigenvalues of a (nodes, nodes) matrix: past 2000 they cost more than the model
    ranges={"nodes": (2, 2000), "tolerance": (0.001, 0.5), "max_nodes": (16, 2000)},
)  # fmt: skip
def integrated_gradients(
    evaluate: Evaluate, inputs: Inputs, *, rule: Rule = "adaptive", nodes: int | None = None, baseline: str = "mask",
    tolerance: float = 0.05, max_nodes: int = 64, unconverged: Literal["keep", "more", "reject"] = "keep",
) -> Attribution:  # fmt: skip
    """Return one score a token: the gradient of the target logit, integrated along the straight line to x.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        rule: Where the points lie. `adaptive`: as many as each row needs, see `_integrate_adaptively`;
            `calibrated`: few, fitted to this model on a sample of the corpus, for class keyword tables; the
            others see `quadrature`.
        nodes: Points of the fixed rules, 2 to 2000, 50 where left out; of the calibrated rule, what the job
            chooses where left out.
        baseline: Token that stands for the absence of a word: `mask`, `pad`, or a token of the vocabulary.
            The engine has built `inputs.baseline` from it.
        tolerance: Adaptive rule: L2 error of a row's scores, relative to their own L2 norm. It is estimated: smaller in
            nearly all texts of trained models, up to twice as large where the gradient jumps (ReLU, max pooling) or
            weights are drawn; there a tolerance below the default promises too much.
        max_nodes: Adaptive rule: points a row at most.
        unconverged: Adaptive rule: what becomes of a row that has not met the tolerance then. `keep` it, marked;
            `more`: up to 4 times as many points; `reject` its text.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. Under the adaptive rule
        they sum to F(x) - F(baseline); under the others the closer the more points there are.

    Raises:
        MethodError: The calibrated rule, and nothing was calibrated for this model.

    Note:
        Runs on: executor. Cost: a forward and a backward pass a point, and one forward pass for F(baseline)
        where no point lies there.
        Source: Sundararajan et al. 2017, section 3. The target is fixed along the path, and is a logit: a
        probability saturates, and would need twice the points.
    """
    if rule == "adaptive":
        return _integrate_adaptively(
            evaluate, inputs, tolerance=tolerance, max_nodes=max_nodes * (_MORE if unconverged == "more" else 1)
        )
    if rule == "calibrated":
        calibration = inputs.prepared
        if not isinstance(calibration, Calibration):
            raise MethodError(
                "rule='calibrated' needs a calibration of the model. No point would have been placed. Run the "
                "plan, which makes one, or write rule: adaptive."
            )
        fitted = calibration.rule(nodes or calibration.keywords.nodes)
        alphas, weights = fitted.nodes, fitted.weights
    else:
        alphas, weights = quadrature(rule, nodes or 50)
    count = len(inputs.x)
    values, derivatives = _evaluate_grid(evaluate, count, alphas)
    scores = weigh_nodes(weights, derivatives)
    baseline_score = values[:, 0] if alphas[0] == 0.0 else score_baselines(evaluate, inputs)
    return Attribution(
        scores=scores,
        baseline_score=baseline_score,
        completeness_gap=inputs.target_score - baseline_score - scores.sum(-1),
        evaluations=torch.full((count,), len(alphas)),
        converged=torch.ones(count, dtype=torch.bool),
    )


def weigh_nodes(weights: Sequence[float], derivatives: Tensor) -> Tensor:
    """Return the weighted sum over the nodes, (B, n, S) to (B, S); weights go in float64."""
    weight = torch.tensor(weights, dtype=torch.float64, device=derivatives.device)
    return (weight[:, None] * derivatives).sum(1)


def _integrate_adaptively(evaluate: Evaluate, inputs: Inputs, *, tolerance: float, max_nodes: int) -> Attribution:
    """Give each row the points that it needs, then distribute what is left of F(x) - F(baseline).

    In each interval between two points the gradient is interpolated by modified Akima cubics. Of a row whose estimated
    error is above the tolerance, the worst intervals are halved, as few as leave an error within it, and all of it is
    done again. Rounds take the points of all rows together.
    """
    count = len(inputs.x)
    alphas = tuple(np.linspace(0.0, 1.0, _FIRST_NODES).tolist())
    values, derivatives = _evaluate_grid(evaluate, count, alphas)
    baseline_score = values[:, 0]
    difference = inputs.target_score - baseline_score
    lines = _Lines(alphas, values, derivatives)
    scores = torch.zeros_like(derivatives[:, 0])
    left, converged = np.arange(count), torch.ones(count, dtype=torch.bool)
    while len(left):
        wanted_rows, wanted_alphas = [], []
        for rows, sums, errors, edges in lines.integrate(left):
            scores[torch.from_numpy(rows)] = sums.sum(1)
            for row, error, edge in zip(rows, errors.cpu().numpy(), edges, strict=True):
                halved = _choose_intervals(error, tolerance, max_nodes - len(edge))
                wanted_rows += [row] * len(halved)
                wanted_alphas += ((edge[halved] + edge[halved + 1]) / 2).tolist()
                if not len(halved):
                    converged[row] = bool(_sum_errors(error) <= tolerance)
        lines.add(evaluate, np.array(wanted_rows, dtype=np.int64), np.array(wanted_alphas))
        left = np.unique(np.array(wanted_rows, dtype=np.int64))
    gap = difference - scores.sum(-1)
    size = scores.abs().sum(-1)
    shares = torch.where(size[:, None] > 0, scores.abs() / size.clamp_min(1e-300)[:, None], 0.0)
    return Attribution(
        scores=scores + gap[:, None] * shares,
        baseline_score=baseline_score,
        completeness_gap=gap,
        evaluations=torch.from_numpy(lines.counts()),
        converged=converged & ((size > 0) | (gap == 0)).cpu(),
    )


def _choose_intervals(errors: NDArray[np.float64], tolerance: float, room: int) -> NDArray[np.int64]:
    """Return the intervals to halve, worst first; none if the error is within the tolerance, or there is no room.

    Not finite errors stop the row: its scores are not finite either, and the engine rejects its text.
    """
    if not _sum_errors(errors) > tolerance or not np.isfinite(errors).all() or room < 1:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-errors, kind="stable")
    rest = np.append(np.cumsum(errors[order[:0:-1]] ** _NORM)[::-1], 0.0)  # of all but the worst 1, 2, ...
    needed = int(np.argmax(rest <= tolerance**_NORM)) + 1
    return order[: min(needed, room)]


def _sum_errors(errors: NDArray[np.float64]) -> float:
    """Return a row's error from those of its intervals."""
    return float((errors**_NORM).sum() ** (1 / _NORM))


class _Lines:
    """The points of each row so far: alphas, ascending, and derivatives by token."""

    def __init__(self, alphas: tuple[float, ...], values: Tensor, derivatives: Tensor) -> None:
        self._alphas = [np.array(alphas)] * len(derivatives)
        self._values = list(values)
        self._derivatives = list(derivatives)

    def counts(self) -> NDArray[np.int64]:
        """Return how many points each row has, (B,)."""
        return np.array([len(alphas) for alphas in self._alphas], dtype=np.int64)

    def add(self, evaluate: Evaluate, rows: NDArray[np.int64], alphas: NDArray[np.float64]) -> None:
        """Evaluate more points, and put them in their places."""
        if not len(rows):
            return
        values, found = evaluate.directional(torch.from_numpy(rows), torch.from_numpy(alphas))
        for row in np.unique(rows):
            mine = rows == row
            joined = np.concatenate([self._alphas[row], alphas[mine]])
            order, points = torch.from_numpy(np.argsort(joined)), torch.from_numpy(np.flatnonzero(mine))
            self._alphas[row] = np.sort(joined)
            self._values[row] = torch.cat([self._values[row], values[points]])[order]
            self._derivatives[row] = torch.cat([self._derivatives[row], found[points]])[order]

    def integrate(self, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], Tensor, Tensor, NDArray[np.float64]]]:
        """Integrate over each interval; rows with equally many points are done together.

        Returns:
            For each such group (rows (R,), integrals (R, N-1, S), errors relative to the scores' norm (R, N-1),
            alphas (R, N)).
        """
        counts, found = self.counts(), []
        for count in np.unique(counts[rows]):
            group = rows[counts[rows] == count]
            edges = np.stack([self._alphas[row] for row in group])
            points = torch.stack([self._derivatives[row] for row in group])
            widths = torch.from_numpy(np.diff(edges)).to(points.device)[:, :, None]
            slopes = akima_slopes(widths, points)
            bend = widths**2 / 12 * (slopes[:, :-1] - slopes[:, 1:])
            integrals = widths / 2 * (points[:, :-1] + points[:, 1:]) + bend
            gaps = torch.stack([self._values[row] for row in group]).diff(dim=1) - integrals.sum(-1)
            jumps = (widths * points.diff(dim=1)).norm(dim=-1)
            norms = integrals.sum(1).norm(dim=-1).clamp_min(_SMALLEST_NORM)[:, None]
            bends, gaps, jumps = bend.norm(dim=-1) / norms, gaps.abs() / norms, jumps / norms
            # a gradient that its points resolve bends little beside how far it goes; one with kinks always bends
            roughness = (12 * bends / jumps.clamp_min(1e-300)).clamp(_BEND_WEIGHT, 1.0)
            hints = (roughness * bends, _GAP_WEIGHT * gaps, _JUMP_WEIGHT * jumps**1.5)
            found.append((group, integrals, torch.stack(hints).amax(0), edges))
        return found


def akima_slopes(widths: Tensor, points: Tensor) -> Tensor:
    """Return the slope at each point of the modified Akima interpolation.

    Its cubics do not overshoot between unevenly spaced points, as splines do; each slope depends on five points.

    Args:
        widths: (R, N-1, 1) distances between neighbours, N at least 3.
        points: (R, N, S) values.

    Returns:
        (R, N, S).

    Source: Akima 1970, with the weights |a - b| + |a + b| / 2 of its common modification.
    """
    inner = points.diff(dim=1) / widths
    first, last = 2 * inner[:, :1] - inner[:, 1:2], 2 * inner[:, -1:] - inner[:, -2:-1]
    before, after = 2 * first - inner[:, :1], 2 * last - inner[:, -1:]
    secants = torch.cat([before, first, inner, last, after], dim=1)  # (R, N+3, S)
    turns = (secants[:, 1:] - secants[:, :-1]).abs() + (secants[:, 1:] + secants[:, :-1]).abs() / 2
    left, right = turns[:, 2:], turns[:, :-2]  # the weights of the secant before and of the secant after a point
    total = left + right
    weighted = left * secants[:, 1:-2] + right * secants[:, 2:-1]
    return torch.where(total > 0, weighted / torch.where(total > 0, total, 1.0), 0.0)


def _evaluate_grid(evaluate: Evaluate, count: int, alphas: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return values (B, N) and derivatives (B, N, S) of all rows at the same alphas."""
    values, derivatives = evaluate.directional(
        torch.arange(count).repeat_interleave(len(alphas)), torch.tensor(alphas, dtype=torch.float64).repeat(count)
    )
    return values.view(count, len(alphas)), derivatives.view(count, len(alphas), -1)
