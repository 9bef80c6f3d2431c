"""Attribution by masks: what has to stay for the prediction to hold, found by gradient descent on the mask itself.

Shape letters: B rows, A rows still optimised, S tokens, U units (words) of the row that has most, D embedding, P
points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexplain.errors import ModelError, Problem
from lexplain.methods import Attribution, Evaluate, Inputs, method, score_baselines
from lexplain.methods.gradients import Sign, measure_products
from lexplain.methods.noise import draw_normal, draw_uniform, measure_spread
from lexplain.methods.units import count_tokens, number_units, spread_over_tokens

Kernel = Literal["sigma_squared", "sigma"]
Complement = Literal["one_minus_p", "log_p"]

_INITIAL_WEIGHT = 1.2
_INITIAL_WIDTH = 2.0
# Below it a word reaches no other; a width that a step takes to 0 or past it has no logarithm.
_SMALLEST_WIDTH = 0.01
# The probability is squeezed into (0, 1), so that its logarithms and their slopes stay finite.
_SQUEEZE, _SQUEEZE_OFFSET = 0.99999, 5e-6
_CHECK_STEPS = 50
_TYPICAL_STEPS = 400
# Numbers in a (rows, U, U) tensor: 64 MB of float64
_KERNEL_NUMBERS = 2**23


def _check_across(options: Mapping[str, object]) -> list[Problem]:
    """Return what is wrong between options: a mask has to hear of the model."""
    if options.get("sufficiency") == 0 == options.get("comprehensiveness"):
        return [Problem("method.comprehensiveness", options["comprehensiveness"], "must be above 0 where sufficiency is 0",
                        "No mask would have depended on the model", "Write comprehensiveness: 1.0")]  # fmt: skip
    if options.get("comprehensiveness") == 0 and "complement" in options:
        return [Problem("method.complement", options["complement"], "is not read with comprehensiveness: 0",
                        "It would have been ignored", "Leave out complement, or comprehensiveness")]  # fmt: skip
    return []


def _need_probability(config: Any, options: Mapping[str, Any]) -> None:
    """Refuse a network whose output is no logit; one that will be fine-tuned gets logits."""
    if getattr(config, "problem_type", None) == "regression":
        raise ModelError(
            "method='marc' needs the probability of a class, and this model is a regression. A mask would have been fitted "
            "to the sigmoid of a number that is no logit. Write a method that explains any output, such as "
            "integrated_gradients."
        )


def _tell_cost(options: Mapping[str, Any], tokens: int) -> float:
    """Return a typical cost: the mask of most texts settles before the last step."""
    terms = sum(options[name] > 0 for name in ("sufficiency", "comprehensiveness"))
    return float(2 * terms * min(options["steps"], _TYPICAL_STEPS) + 2 + 2 * (options["sign"] != "none"))


@method(
    version=1, signed=False, stochastic=True, mask=True, cite="brinner2023model", across=_check_across,
    fits=_need_probability,
    ranges={
        "steps": (1, 10_000), "learning_rate": (1e-5, 1.0), "weight_decay": (0.0, 1.0), "sufficiency": (0.0, 100.0),
        "comprehensiveness": (0.0, 100.0), "sparsity": (0.0, 100.0), "smoothness": (0.0, 100.0), "forced": (0.0, 0.5),
        "noise": (0.0, 10.0),
    },
    presets={
        # the released code, and the paper's own equations, which fix no steps and know neither forced tokens nor noise
        "marc-2023": {
            "kernel": "sigma_squared", "complement": "one_minus_p", "steps": 900, "learning_rate": 0.03, "weight_decay": 0.01,
            "sufficiency": 1.0, "comprehensiveness": 1.0, "sparsity": 1.0, "smoothness": 1.2, "forced": 0.05, "noise": 0.03,
            "baseline": "pad",
        },
        "marc-paper": {
            "kernel": "sigma", "complement": "log_p", "weight_decay": 0.0, "sufficiency": 1.0, "comprehensiveness": 1.0,
            "sparsity": 1.0, "smoothness": 1.2, "forced": 0.0, "noise": 0.0,
        },
    },
    cost=_tell_cost,
)  # fmt: skip
def marc(
    evaluate: Evaluate, inputs: Inputs, *, steps: int = 900, learning_rate: float = 0.03, weight_decay: float = 0.01,
    kernel: Kernel = "sigma_squared", complement: Complement = "one_minus_p", sufficiency: float = 1.0,
    comprehensiveness: float = 1.0, sparsity: float = 1.0, smoothness: float = 1.2, forced: float = 0.05,
    noise: float = 0.03, sign: Sign = "none", baseline: str = "pad",
) -> Attribution:  # fmt: skip
    """Return a mask over words: how much of each is kept, when as little as possible has to give the target.

    MaRC. A word i has a weight w_i and a width sigma_i, and pulls up itself and its neighbours j, d words away:
    lambda_j = sigmoid(sum over i of w_i exp(-d^2 / sigma_i^2)). The kept text is lambda x + (1 - lambda) baseline,
    its complement (1 - lambda) x + lambda baseline, p and p' their probabilities of the target. AdamW minimises

        - sufficiency log p - comprehensiveness log(1 - p') + sparsity mean(lambda)^2 - smoothness mean(log sigma)

    for all rows together; a row whose mask has settled leaves the batch.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows. A token outside words is a word of its own.
        steps: At most so many. After every 50 a row stops if its mean mask moved by less than 1/200 (1/80 below
            0.2) since the last look, is below 0.45, and is below 0.3 or 200 steps are over.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW, on weights and widths; 0 gives Adam, the optimiser of the paper's text.
        kernel: `sigma_squared`: as above, as in the released code. `sigma`: exp(-d^2 / sigma), as in the paper.
        complement: `one_minus_p`: - log(1 - p'), as in the released code. `log_p`: + log p', as in the paper.
        sufficiency: Weight of the kept text; 0 switches the term off and saves its passes, as for all four.
        comprehensiveness: Weight of the complement.
        sparsity: Weight of the squared mean mask (compactness).
        smoothness: Weight of the mean log width.
        forced: Share of tokens that a step shows whole whatever the mask says, and share of those it hides.
        noise: Standard deviation of the Gaussian noise on content tokens of both texts, as a share of that of the
            row's own embeddings. The released code adds 0.03 to embeddings of about unit size, behind a LayerNorm.
        sign: `none`: the mask itself, which counts a word against the target as one for it. `gradient_x_input`: the
            mask with the sign that the word's gradient x input at x has, which takes one gradient more a row.
        baseline: Token that fills the masked places, named as in `integrated_gradients`.

    Returns:
        Scores: lambda, in [0, 1] before its sign, equal on the pieces of one word; exactly 0.0 on special tokens and
        padding. They
        are a joint choice of words, not shares of F(x), so the completeness gap is F(x) - F(kept text): what the
        mask fails to keep. `converged`: the row stopped early; only then is its mean mask below 0.45 for sure.

    Note:
        Runs on: executor. Cost: two forward and backward passes a row and step, up to 1800; at the end two forward
        passes. Memory: (rows, words, words) for the kernels, cut to 64 MB at a time. Rounding grows over hundreds of
        steps: with a float32 model, batch mates may move a mask by some thousandths.
        Source: Brinner and Zarriess 2023, equations 5 to 8, and the behaviour of the released code. Here masked
        word embeddings enter the model once, not behind its own embedding layer, and windows are rows of their own.
    """
    units = number_units(inputs)
    masks = _Masks(units, kernel)
    terms = _Terms(evaluate, inputs, units, complement, sufficiency, comprehensiveness, forced, noise)
    active = torch.arange(len(units), device=units.device)
    taken = torch.zeros_like(active)
    converged = torch.zeros_like(active, dtype=torch.bool)
    before = masks.compute_means(active)
    for step in range(steps):
        gradient = terms.differentiate(active, masks.compute(active), step)
        masks.descend(active, gradient, step, learning_rate, weight_decay, sparsity, smoothness)
        taken[active] += terms.points_a_step
        if (step + 1) % _CHECK_STEPS == 0:
            now = masks.compute_means(active)
            settled = has_settled(now, before, step)
            converged[active[settled]] = True
            stays = ~settled & now.isfinite()  # a model's NaN goes into the mask, and never leaves it
            active, before = active[stays], now[stays]
            if len(active) == 0:
                break
    scores = spread_over_tokens(masks.compute(torch.arange(len(units), device=units.device)), units)
    kept_score = _score_kept(evaluate, inputs, scores)
    if sign == "gradient_x_input":
        scores = torch.where(_find_negative(evaluate, inputs, units), -scores, scores)
        taken += 1
    return Attribution(
        scores=scores,
        baseline_score=score_baselines(evaluate, inputs),
        completeness_gap=inputs.target_score - kept_score,
        evaluations=taken.cpu(),
        converged=converged.cpu(),
    )


class _Masks:
    """The weights and widths of every row's units, the masks they make, and AdamW's state of each."""

    def __init__(self, units: Tensor, kernel: Kernel) -> None:
        counts = count_tokens(units)
        self._units = units
        self._present = counts > 0
        self._sizes = self._present.sum(1).clamp(min=1)  # (B,) words, 1 for a window without content
        self._kernel: Kernel = kernel
        places = torch.arange(counts.shape[1], dtype=torch.float64, device=units.device)
        self._squares = (places[:, None] - places).square()  # (U, U) d^2
        start = torch.tensor([_INITIAL_WEIGHT, _INITIAL_WIDTH], dtype=torch.float64, device=units.device)
        self._parameters = start[:, None, None].repeat(1, *counts.shape)  # (2, B, U): weights, then widths
        self._first = torch.zeros_like(self._parameters)
        self._second = torch.zeros_like(self._parameters)

    def compute(self, rows: Tensor) -> Tensor:
        """Return lambda of the rows' units, (A, U) float64; 0.0 where a row has fewer units."""
        masks = [
            torch.einsum("ru,ruv->rv", self._parameters[0, some] * self._present[some], torch.exp(-self._decay(some)))
            for some in self._split(rows)
        ]
        return torch.cat(masks).sigmoid() * self._present[rows]

    def compute_means(self, rows: Tensor) -> Tensor:
        """Return the mean lambda of the rows, (A,)."""
        return self.compute(rows).sum(1) / self._sizes[rows]

    def descend(
        self, rows: Tensor, token_gradient: Tensor, step: int, learning_rate: float, weight_decay: float,
        sparsity: float, smoothness: float,
    ) -> None:  # fmt: skip
        """Take one step of AdamW.

        Args:
            rows: (A,) those still optimised; all have taken the same steps so far.
            token_gradient: (A, S) float64, the model's part of the objective, differentiated by the tokens' lambda.
            step: From 0.
            learning_rate: As in `marc`.
            weight_decay: As in `marc`.
            sparsity: As in `marc`.
            smoothness: As in `marc`.
        """
        gradient = self._pull_back(rows, token_gradient, sparsity, smoothness)
        first = self._first[:, rows].lerp(gradient, 1 - 0.9)
        second = self._second[:, rows].lerp(gradient.square(), 1 - 0.999)
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        decayed = self._parameters[:, rows] * (1 - learning_rate * weight_decay)
        parameters = decayed - learning_rate * (first / (1 - 0.9 ** (step + 1))) / size
        parameters[1].clamp_(min=_SMALLEST_WIDTH)
        self._first[:, rows], self._second[:, rows], self._parameters[:, rows] = first, second, parameters

    def _pull_back(self, rows: Tensor, token_gradient: Tensor, sparsity: float, smoothness: float) -> Tensor:
        """Return the whole objective's gradient by weights and widths, (2, A, U)."""
        masks, present, sizes = self.compute(rows), self._present[rows], self._sizes[rows, None]
        gradient = torch.zeros_like(masks).scatter_add_(1, self._units[rows].clamp(min=0), token_gradient)
        gradient += sparsity * 2 * masks.sum(1, keepdim=True) / sizes.square()
        by_sum = gradient * masks * (1 - masks)
        weights, widths = self._parameters[:, rows]
        by_weight, by_decay = [], []
        for some, pulled in zip(self._split(rows), self._split(by_sum), strict=True):
            decay = self._decay(some)
            reach = torch.exp(-decay)
            by_weight.append(torch.einsum("rv,ruv->ru", pulled, reach))
            by_decay.append(torch.einsum("rv,ruv->ru", pulled, reach.mul_(decay)))
        power = 2 if self._kernel == "sigma_squared" else 1
        by_width = weights * torch.cat(by_decay) * power / widths - smoothness / (sizes * widths)
        return torch.stack([torch.cat(by_weight), by_width]) * present

    def _decay(self, rows: Tensor) -> Tensor:
        """Return d^2 / sigma_i^2, or d^2 / sigma_i, from unit i (dimension 1) to unit j (dimension 2)."""
        widths = self._parameters[1, rows, :, None]
        return self._squares / (widths.square() if self._kernel == "sigma_squared" else widths)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, max(1, _KERNEL_NUMBERS // self._squares.numel()))


class _Terms:
    """The two terms of the objective that the model computes, and their gradient by the mask.

    Attributes:
        points_a_step: Points that a row takes in one step: one for each term that is switched on.
    """

    def __init__(
        self, evaluate: Evaluate, inputs: Inputs, units: Tensor, complement: Complement, sufficiency: float,
        comprehensiveness: float, forced: float, noise: float,
    ) -> None:  # fmt: skip
        self._evaluate = evaluate
        self._inputs = inputs
        self._units = units
        self._complement: Complement = complement
        self._weights = torch.tensor([sufficiency, comprehensiveness], dtype=torch.float64, device=units.device)
        self._sides = self._weights.nonzero()[:, 0]  # 0 the kept text, 1 its complement
        self._forced = forced
        self._noise = noise * measure_spread(inputs)
        self._seeds = inputs.seeds.to(units.device)
        self.points_a_step = len(self._sides)

    def differentiate(self, rows: Tensor, masks: Tensor, step: int) -> Tensor:
        """Return the gradient of the terms by the tokens' lambda, (A, S) float64; NaN for a row that fits no memory.

        Args:
            rows: (A,) those still optimised.
            masks: (A, U) lambda of their units.
            step: From 0; gives the noise.
        """
        inputs = self._inputs
        kept, free = self._force(rows, spread_over_tokens(masks, self._units[rows]), step)
        sides = self._sides.repeat_interleave(len(rows))
        owners = rows.repeat(len(self._sides))
        shares = torch.cat([kept if side == 0 else 1 - kept for side in self._sides.tolist()] or [kept[:0]])
        found = torch.full(shares.shape, math.nan, dtype=torch.float64, device=shares.device)

        def place(points: Tensor, length: int) -> Tensor:
            row = owners[points]
            x, fill = inputs.x[row, :length], inputs.baseline[row, :length]
            mixed = torch.lerp(fill, x, shares[points, :length, None].to(x))
            normal = draw_normal(self._seeds[row], 3 * step + 1 + sides[points], length, x.shape[2]).to(x)
            normal *= self._noise[row, None, None].to(x)
            return mixed + normal.masked_fill_(inputs.special[row, :length, None], 0.0)

        def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
            assert gradients is not None  # they were asked for
            row, length = owners[points], gradients.shape[1]
            line = inputs.x[row, :length] - inputs.baseline[row, :length]
            along = (line * gradients).sum(-1, dtype=torch.float64)
            found[points, :length] = self._slopes(values, sides[points])[:, None] * along

        # the probability itself is differentiated: its logarithms differ between the points of one pass
        self._evaluate.visit(owners.cpu(), place, see, objective=self._evaluate.probabilities)
        return torch.where(free, found.view(len(self._sides), *kept.shape).sum(0), 0.0)

    def _force(self, rows: Tensor, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the tokens' lambda with some of them set to 0 or 1, and which tokens the mask still moves."""
        draws = torch.full_like(rows, 3 * step)
        hidden, shown = (draw_uniform(self._seeds[rows], draws, masks.shape[1], 2) < self._forced).unbind(-1)
        forced = hidden ^ shown  # a token that is both stays as it is
        return torch.where(forced, shown.to(masks), masks), ~forced & (self._units[rows] >= 0)

    def _slopes(self, values: Tensor, sides: Tensor) -> Tensor:
        """Return the terms' slopes by lambda over that of the probability by the share of x, (N,).

        Args:
            values: (N,) probabilities.
            sides: (N,) 0 for kept texts, 1 for complements, whose share of x is 1 - lambda.
        """
        squeezed = _SQUEEZE * values + _SQUEEZE_OFFSET
        by_probability = 1 / (1 - squeezed) if self._complement == "one_minus_p" else 1 / squeezed
        return -_SQUEEZE * self._weights[sides] * torch.where(sides == 0, 1 / squeezed, by_probability)


def has_settled(now: Tensor, before: Tensor, step: int) -> Tensor:
    """Tell which rows stop, (A,) bool.

    Args:
        now: (A,) mean mask.
        before: (A,) mean mask at the last look, 50 steps earlier.
        step: Number of the step just taken, from 0.
    """
    change = (now - before).abs()
    calm = (change < 1 / 200) | ((change < 1 / 80) & (now < 0.2))
    return calm & ((now < 0.3) | (step >= 199)) & (now < 0.45)


def _score_kept(evaluate: Evaluate, inputs: Inputs, masks: Tensor) -> Tensor:
    """Return F of the texts that the masks keep, (B,) float64.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        masks: (B, S) lambda of the tokens.
    """
    kept = torch.full((len(masks),), math.nan, dtype=torch.float64, device=masks.device)

    def place(points: Tensor, length: int) -> Tensor:
        x, fill = inputs.x[points, :length], inputs.baseline[points, :length]
        return torch.lerp(fill, x, masks[points, :length, None].to(x))

    def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
        kept[points] = values

    evaluate.visit(torch.arange(len(masks)), place, see, gradients=False)
    return kept


def _find_negative(evaluate: Evaluate, inputs: Inputs, units: Tensor) -> Tensor:
    """Tell which tokens belong to a unit whose gradient x input at x is below 0, (B, S) bool."""
    products = measure_products(evaluate, inputs)
    sums = torch.zeros(count_tokens(units).shape, dtype=torch.float64, device=units.device)
    sums.scatter_add_(1, units.clamp(min=0), products)
    return spread_over_tokens(sums, units) < 0


@dataclass(frozen=True, slots=True)
class Span:
    """A rationale: neighbouring words that are kept.

    Attributes:
        start: Number of the first word.
        stop: One past that of the last.
        score: Mean score of the words.
    """

    start: int
    stop: int
    score: float


def find_spans(
    masks: NDArray[np.float64], scores: NDArray[np.float64] | None = None, *, threshold: float = 0.5
) -> list[Span]:
    """Return the longest runs of words whose mask is at or above the threshold, in the order of the text.

    Args:
        masks: (W,) mask of each word, in the order of the text.
        scores: (W,) of each word, the mask with its sign; None: the mask itself.
        threshold: From 0 to 1; the mask of MaRC starts near 1 and ends near 0 or 1, so that 0.5 parts them.
    """
    scores = masks if scores is None else scores
    kept = np.concatenate(([False], masks >= threshold, [False]))
    edges = np.flatnonzero(kept[1:] != kept[:-1]).reshape(-1, 2)
    return [Span(start, stop, float(scores[start:stop].mean())) for start, stop in edges.tolist()]


def weigh_windows(ranges: Sequence[tuple[int, int]]) -> list[NDArray[np.float64]]:
    """Return what each window counts for each of its tokens, when the masks of a text's windows become one mask.

    Where two windows overlap, the weight goes over from the one to the other in equal steps. The weights of a token
    sum to 1, so a text's mask stays in [0, 1]; additive scores are divided by the number of windows instead, which
    would fade a mask wherever one window alone has seen the token.

    Args:
        ranges: Numbers of the first and one past the last content token of each window, in the order of the text,
            with no gap between windows.

    Returns:
        Of each window (stop - start,) float64.
    """
    weights = []
    for number, (start, stop) in enumerate(ranges):
        weight = np.ones(stop - start)
        if number > 0 and (shared := ranges[number - 1][1] - start) > 0:
            weight = np.minimum(weight, np.arange(1, stop - start + 1) / (shared + 1))
        if number < len(ranges) - 1 and (shared := stop - ranges[number + 1][0]) > 0:
            weight = np.minimum(weight, np.arange(stop - start, 0, -1) / (shared + 1))
        weights.append(weight)
    total = np.zeros(ranges[-1][1])
    for (start, stop), weight in zip(ranges, weights, strict=True):
        total[start:stop] += weight
    return [weight / total[start:stop] for (start, stop), weight in zip(ranges, weights, strict=True)]
