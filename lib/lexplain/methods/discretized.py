"""Attribution by gradients along a path from word to word of the vocabulary: DIG and UDIG.

Shape letters: B rows, S tokens of the padded length, D embedding, m anchors a token, R rows of a pass, N its points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from lexplain.anchors import AnchorRule, Anchors, Strategy, monotonize, open_finder, read_vocabulary
from lexplain.methods import Attribution, Evaluate, Inputs, find_method, method

Target = Literal["fixed", "max"]

_RANGES = {"steps": (2.0, 500.0), "neighbours": (1.0, 5000.0), "factor": (0.0, 6.0)}


def _needs_anchors(options: Mapping[str, object]) -> Literal["anchors"]:
    return "anchors"


def _follows_greatest(options: Mapping[str, object]) -> bool:
    """Tell whether the greatest logit is differentiated: it is the same for all labels of a text."""
    return options["target"] == "max"


def _tell_cost(options: Mapping[str, Any], tokens: int) -> float:
    """Return forward-equivalents: a gradient at each point of the path but the last, and F(baseline)."""
    return float(2 * 2 ** options["factor"] * (options["steps"] + 1) + 1)


@method(
    version=1, signed=True, cite="sanyal2021discretized", ranges=_RANGES, prepares=_needs_anchors, cost=_tell_cost,
    foremost=_follows_greatest,
    presets={"dig-2021": {"steps": 30, "factor": 0, "neighbours": 500, "strategy": "greedy", "baseline": "pad", "target": "max"}},
)  # fmt: skip
def discretized_integrated_gradients(
    evaluate: Evaluate, inputs: Inputs, *, steps: int = 30, neighbours: int = 500, strategy: Strategy = "greedy",
    factor: int = 0, baseline: str = "mask", target: Target = "fixed",
) -> Attribution:  # fmt: skip
    """Return one score a token: the gradient integrated along a path that keeps close to words of the vocabulary.

    All tokens of a text move together, each along its own path from the baseline word to itself.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        steps: Anchors of each token's path, 2 to 500.
        neighbours: Words next to an anchor among which the next one is chosen, 1 to 5000.
        strategy: Of the choice, see `lexplain.anchors.AnchorRule`.
        factor: How often a point is put between any two; 2^factor (steps + 1) + 1 points in all. More of them narrow
            the completeness gap; more anchors need not.
        baseline: Token that stands for the absence of a word: `mask`, `pad`, or a token of the vocabulary.
        target: `fixed`: the row's own logit everywhere. `max`, as published: the greatest logit of each point, so
            that another class may be explained on a part of the path; of a text's most probable label only.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. With `fixed` they sum to about
        F(x) - F(baseline): the sum is a left Riemann one over few points, and its gap can be as large as itself.

    Note:
        Runs on: executor. Cost: 2^factor (steps + 1) forward and backward passes a row and one forward pass for
        F(baseline). Paths are looked up; those that no table holds are searched, see `AnchorFinder.find`.
        Source: Sanyal & Ren 2021. Published scores are divided by their L2 norm over the text, as keyword tables do
        here, and their BERT and RoBERTa added positions twice, which is not repeated.
    """
    rule = AnchorRule(inputs.baseline_id, steps, neighbours, strategy, uniform=False)
    return _integrate(evaluate, inputs, rule, factor, target)


@method(
    version=1, signed=True, cite="roy2024uniform", ranges=_RANGES, prepares=_needs_anchors, cost=_tell_cost,
    foremost=_follows_greatest,
    presets={
        "udig-2024": {"steps": 30, "neighbours": 50, "factor": 1, "strategy": "maxcount", "baseline": "mask"},
        "udig-2024-bert": {"steps": 30, "neighbours": 50, "factor": 2, "strategy": "greedy", "baseline": "mask"},
    },
)  # fmt: skip
def uniform_discretized_integrated_gradients(
    evaluate: Evaluate, inputs: Inputs, *, steps: int = 30, neighbours: int = 50, strategy: Strategy = "maxcount",
    factor: int = 1, baseline: str = "mask", target: Target = "fixed",
) -> Attribution:  # fmt: skip
    """Return one score a token, as `discretized_integrated_gradients`, by anchors that are spread evenly.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        steps: Anchors of each token's path, 2 to 500: one for each of so many equal steps of the straight line.
        neighbours: Words next to a point of the line among which its anchor is chosen, 1 to 5000.
        strategy: As in `discretized_integrated_gradients`.
        factor: As there.
        baseline: As there.
        target: As there.

    Returns:
        As there.

    Note:
        Runs on: executor. Cost: as there. Candidates depend on the token as well, so searching a new token's path
        takes several times as long as there.
        Source: Sinha Roy & Kundu 2024. Where no candidate is left, the path goes to the baseline and stays, as in
        DIG; the published code fails there.
    """
    rule = AnchorRule(inputs.baseline_id, steps, neighbours, strategy, uniform=True)
    return _integrate(evaluate, inputs, rule, factor, target)


def make_rule(method_id: str, options: Mapping[str, object], baseline_id: int) -> AnchorRule:
    """Return what a method's paths follow.

    Args:
        method_id: DIG or UDIG.
        options: All of its options.
        baseline_id: What the tokenizer makes of its option `baseline`.
    """
    uniform = find_method(method_id).function is uniform_discretized_integrated_gradients
    steps, neighbours = cast(int, options["steps"]), cast(int, options["neighbours"])
    return AnchorRule(baseline_id, steps, neighbours, cast(Strategy, options["strategy"]), uniform)


def _integrate(evaluate: Evaluate, inputs: Inputs, rule: AnchorRule, factor: int, target: Target) -> Attribution:
    """Sum gradient times step over the points of each row's path but the last."""
    paths = _Paths(inputs, rule, evaluate.model, parts=2**factor)
    count, n_points = len(inputs.x), 2**factor * (rule.steps + 1)
    rows, numbers = torch.arange(count).repeat_interleave(n_points), torch.arange(n_points).repeat(count)
    owners = rows.to(inputs.x.device)
    scores = torch.zeros(inputs.special.shape, dtype=torch.float64, device=inputs.x.device)
    moves = inputs.x[:0]

    def place(points: Tensor, length: int) -> Tensor:
        nonlocal moves
        points = points.cpu()
        places, moves = paths.place(rows[points], numbers[points], length)
        return places

    def see(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
        assert gradients is not None  # they were asked for
        # all targets of a pass are seen at the places that were made last, in their order
        products = (gradients * moves).sum(-1, dtype=torch.float64)
        scores[:, : gradients.shape[1]].index_add_(0, owners[points], products)

    def find_greatest(logits: Tensor, _: Tensor) -> Tensor:
        return logits.max(-1).values

    evaluate.visit(rows, place, see, share=numbers, objective=find_greatest if target == "max" else None)
    return Attribution.from_scores(scores.masked_fill_(inputs.special, 0.0), evaluate, inputs, evaluations=n_points)


class _Paths:
    """The points of each row's path, made of its tokens' anchors whenever a pass needs them."""

    def __init__(self, inputs: Inputs, rule: AnchorRule, model: nn.Module, parts: int) -> None:
        """Look the anchors of all tokens up.

        Args:
            inputs: The rows.
            rule: Which anchors.
            model: The network, whose first layer embeds words.
            parts: Into how many equal parts the line from anchor to anchor is cut.
        """
        self._inputs, self._steps, self._parts = inputs, rule.steps, parts
        self._embed = cast(Callable[[], Callable[[Tensor], Tensor]], model.get_input_embeddings)()
        table = inputs.prepared if isinstance(inputs.prepared, Anchors) else None
        # special tokens and padding are at their baseline already, where every path stays
        ids = inputs.ids.masked_fill(inputs.special, rule.baseline_id)
        distinct, places = np.unique(ids.cpu().numpy(), return_inverse=True)
        anchors = open_finder(model, rule, table).find(distinct, lambda: read_vocabulary(model))
        self._anchors = torch.from_numpy(anchors.astype(np.int64)).to(ids.device)  # (distinct tokens, m)
        self._tokens = torch.from_numpy(places.reshape(ids.shape)).to(ids.device)  # (B, S), rows of the above

    def place(self, rows: Tensor, numbers: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return points (N, length, D) and the step from each to the next.

        The path is walked from x, which its points depend on, as far as the farthest point that is wanted.

        Args:
            rows: (N,) CPU.
            numbers: (N,) of the points on their rows' paths, CPU; 0 is the baseline.
            length: Of the pass.
        """
        device = self._inputs.x.device
        distinct, numbers_of_rows = np.unique(rows.numpy(), return_inverse=True)
        row, owners = torch.from_numpy(distinct).to(device), torch.from_numpy(numbers_of_rows)
        tokens = self._tokens[row, :length]
        end, upper = self._inputs.baseline[row, :length], self._inputs.x[row, :length]
        places = torch.empty((len(rows), *end.shape[1:]), dtype=end.dtype, device=device)
        moves = torch.empty_like(places)
        hops = self._steps - numbers // self._parts  # between which two of x, the anchors' points, the baseline
        shares = (numbers % self._parts / self._parts).to(end)
        for hop in range(int(hops.max()) + 1):
            lower = end
            if hop < self._steps:
                with torch.no_grad():
                    word = self._embed(self._anchors[tokens, hop]).to(end.dtype)
                lower = monotonize(end, upper, word, self._steps)
            here = (hops == hop).nonzero()[:, 0]
            if len(here):
                low, high = lower[owners[here].to(device)], upper[owners[here].to(device)]
                here = here.to(device)
                places[here] = torch.lerp(low, high, shares[here, None, None])
                moves[here] = (high - low) / self._parts
            upper = lower
        return places, moves
