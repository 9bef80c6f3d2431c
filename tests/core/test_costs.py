"""What methods say that they cost, against the passes that they are seen to take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from core.models import Shelf, count_passes
from core.test_engine import only
from core.test_gradients import explainer
from lexplain.methods import METHODS, find_method

# Every word is one token of the tiny models, and there is no punctuation.
TEXT = "the new tax was cut and the party said a bank fell"
TOKENS = 12

CHANGES: dict[str, list[dict[str, Any]]] = {
    "integrated_gradients.v1": [
        {"rule": "midpoint"}, {"rule": "midpoint", "nodes": 7}, {"rule": "trapezoid", "nodes": 7},
        {"rule": "gauss_legendre", "nodes": 30},
    ],
    "smoothgrad.v1": [{}, {"samples": 3}],
    "captum.layer_integrated_gradients.v1": [{}, {"n_steps": 7}],
    "captum.gradient_shap.v1": [{}, {"n_samples": 7}],
    "captum.lime.v1": [{"n_samples": 30}],
    "captum.shapley_value_sampling.v1": [{}, {"n_samples": 2}],
    "sequential_integrated_gradients.v1": [{}, {"nodes": 3, "rule": "midpoint"}],
    "discretized_integrated_gradients.v1": [{"neighbours": 5}, {"neighbours": 5, "steps": 4, "factor": 2}],
    "uniform_discretized_integrated_gradients.v1": [{"neighbours": 5}],
}  # fmt: skip

# These decide themselves when to stop: what they can cost at most, from their options.
MOST: dict[str, Any] = {
    "integrated_gradients.v1": lambda options: (
        2 * options["max_nodes"] * (4 if options["unconverged"] == "more" else 1)
    ),
    "marc.v1": lambda options: 4 * options["steps"] + 4,
}
STEERED: list[tuple[str, dict[str, Any]]] = [
    ("integrated_gradients.v1", {}), ("integrated_gradients.v1", {"max_nodes": 16}),
    ("integrated_gradients.v1", {"tolerance": 0.2}), ("marc.v1", {"steps": 120}), ("marc.v1", {"steps": 60, "sufficiency": 0.0}),
    ("marc.v1", {"steps": 20, "sign": "gradient_x_input"}),
]  # fmt: skip


def count(shelf: Shelf, name: str, options: Mapping[str, Any]) -> int:
    """Sequences that went forward and backward through the model for one row, the prediction's not counted."""
    method = find_method(name)
    classifier = shelf.classifier(
        next(family for family in ("bert", "textcnn") if family in (method.models or ("bert",)))
    )
    with count_passes(classifier) as passes:
        found = only(explainer(classifier, method, **options).explain([TEXT])[0])
    assert (found.n_tokens, len(found.words), found.n_windows) == (TOKENS, TOKENS, 1)
    return passes.sequences - 1 + passes.backward_sequences


FIXED = [
    (name, options)
    for name, method in sorted(METHODS.items())
    if method.package is None and method.prepares(method.complete_options({})) != "neighbours"  # see test_neighbours.py
    for options in CHANGES.get(name, [] if name in MOST else [{}])
]


@pytest.mark.parametrize(("name", "options"), FIXED)
def test_a_fixed_cost_is_what_is_counted(shelf: Shelf, name: str, options: dict[str, Any]) -> None:
    method = METHODS[name]
    declared = method.tell_cost(options, TOKENS)
    assert declared == count(shelf, name, options)


@pytest.mark.parametrize(("name", "options"), STEERED)
def test_a_typical_cost_lies_below_the_most(shelf: Shelf, name: str, options: dict[str, Any]) -> None:
    method = METHODS[name]
    most, declared = MOST[name](method.complete_options(options)), method.tell_cost(options, TOKENS)
    assert 0 < count(shelf, name, options) <= most
    assert declared is not None
    assert 0 < declared <= most


def test_every_method_of_ours_tells_its_cost() -> None:
    assert {name for name, method in METHODS.items() if method.package is None and method.cost is None} == set()
