"""The registry of methods, quadrature rules, and Integrated Gradients on functions with a closed form."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from lexplain.errors import MethodError
from lexplain.methods import METHODS, Attribution, Evaluate, Inputs, Method, find_method, method
from lexplain.methods.paths import Rule, integrated_gradients, quadrature

if TYPE_CHECKING:
    from lexplain.methods import Objective, Place, Score, See

RULES: tuple[Rule, ...] = ("midpoint", "trapezoid", "gauss_legendre")

some_rules = st.sampled_from(RULES)
some_nodes = st.integers(2, 120)


class Formula:
    """F of a formula over (P, S, D) points, in float64: an `Evaluate` without a neural network."""

    def __init__(self, formula: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> None:
        self.formula, self.x, self.baseline = formula, x, baseline
        self.gradients = 0
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        nothing = torch.zeros(x.shape[:2], dtype=torch.long)
        self.inputs = Inputs(
            x=x, baseline=baseline, ids=nothing, mask=mask, special=~mask, words=nothing, seeds=nothing[:, 0],
            target_score=formula(x), baseline_id=0,
        )  # fmt: skip

    def _points(self, rows: Tensor, alphas: Tensor) -> Tensor:
        return torch.lerp(self.baseline[rows], self.x[rows], alphas[:, None, None])

    def logits(self, rows: Tensor, alphas: Tensor) -> Tensor:
        return self.formula(self._points(rows, alphas))

    def directional(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        self.gradients += len(rows)
        points = self._points(rows, alphas).requires_grad_(True)
        values = self.formula(points)
        (gradient,) = torch.autograd.grad(values.sum(), points)
        return values.detach(), ((self.x - self.baseline)[rows] * gradient).sum(-1)

    def visit(
        self, rows: Tensor, place: Place, see: See, *, share: Tensor | None = None, objective: Objective | None = None,
        gradients: bool = True,
    ) -> None:  # fmt: skip
        """In passes of three points, the last ones first; the only logit is F."""
        for points in reversed(torch.arange(len(rows)).split(3)):
            leaf = place(points, self.x.shape[1]).detach().requires_grad_(gradients)
            values = self.formula(leaf)
            if objective is not None:
                values = objective(values[:, None], rows[points])
            found = torch.autograd.grad(values.sum(), leaf)[0] if gradients else None
            self.gradients += len(points) if gradients else 0
            see(points, values.detach(), found)

    def probabilities(self, logits: Tensor, rows: Tensor) -> Tensor:
        return logits[:, 0].sigmoid()

    def visit_alone(self, row: int, explain: Callable[[Score, int], None]) -> None:
        explain(self.formula, 3)


@pytest.fixture
def scratch_registry() -> None:
    """Forget the methods that a test registers."""
    before = dict(METHODS)
    yield
    registered = sys.modules["lexplain.methods"]._registered
    for identity in set(registered) - set(before):
        del registered[identity]


# --- quadrature -------------------------------------------------------------------------------------------------


@given(rule=some_rules, nodes=some_nodes)
def test_e1_weights_sum_to_one_and_nodes_are_the_textbooks(rule: Rule, nodes: int) -> None:
    """captum's trapezoid weights sum to (n-1)/n, so that every score shrinks."""
    alphas, weights = quadrature(rule, nodes)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-13)
    expected = oracles.quadrature(rule, nodes)
    np.testing.assert_allclose(alphas, [alpha for alpha, _ in expected], atol=1e-14)
    np.testing.assert_allclose(weights, [weight for _, weight in expected], atol=1e-14)


@pytest.mark.parametrize("nodes", [2, 5, 20, 50])
def test_e1_e20_the_integral_of_a_square_in_closed_form(nodes: int) -> None:
    """The known error of each rule; LIT leaves alpha = 1 out, which gives (n-1)(2n-1)/6n^2 instead."""
    errors = {"midpoint": -1 / (12 * nodes**2), "trapezoid": 1 / (6 * (nodes - 1) ** 2), "gauss_legendre": 0.0}
    for rule, error in errors.items():
        alphas, weights = quadrature(rule, nodes)
        found = sum(weight * alpha**2 for alpha, weight in zip(alphas, weights, strict=True))
        assert found == pytest.approx(1 / 3 + error, abs=1e-14)


@pytest.mark.parametrize("nodes", [2, 3, 10])
def test_gauss_legendre_is_exact_to_degree_two_nodes_less_one(nodes: int) -> None:
    alphas, weights = quadrature("gauss_legendre", nodes)
    for degree in range(2 * nodes):
        found = sum(weight * alpha**degree for alpha, weight in zip(alphas, weights, strict=True))
        assert found == pytest.approx(1 / (degree + 1), abs=1e-13)


def test_the_trapezoid_holds_both_ends() -> None:
    alphas, weights = quadrature("trapezoid", 5)
    assert alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert weights == (0.125, 0.25, 0.25, 0.25, 0.125)


# --- Integrated Gradients in closed form --------------------------------------------------------------------------


def points(seed: int, rows: int, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, size, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, tokens, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_a_linear_function_gives_weight_times_difference(rule: Rule) -> None:
    x, baseline = points(0, rows=3, tokens=4, size=5)
    weight = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    formula = Formula(lambda point: (weight * point).sum((1, 2)) + 7, x, baseline)
    found = integrated_gradients(formula, formula.inputs, rule=rule, nodes=2)
    torch.testing.assert_close(found.scores, (weight * (x - baseline)).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.completeness_gap, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found.scores > 0).any()
    assert (found.scores < 0).any()


@pytest.mark.parametrize("nodes", [2, 7, 40])
def test_a_cubic_gives_the_known_error_of_each_rule(nodes: int) -> None:
    """F = sum u^3 with baseline 0: dF/dalpha of a token is 3 alpha^2 sum x^3, so IG is sum x^3 times the rule's."""
    x, _ = points(2, rows=2, tokens=3, size=4)
    formula = Formula(lambda point: (point**3).sum((1, 2)), x, torch.zeros_like(x))
    cubes = (x**3).sum(-1)
    factors = {"midpoint": 1 - 1 / (4 * nodes**2), "trapezoid": 1 + 1 / (2 * (nodes - 1) ** 2), "gauss_legendre": 1.0}
    for rule, factor in factors.items():
        found = integrated_gradients(formula, formula.inputs, rule=rule, nodes=nodes)
        torch.testing.assert_close(found.scores, factor * cubes, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.completeness_gap, (1 - factor) * cubes.sum(-1), rtol=1e-9, atol=1e-12)


def test_a_product_of_tokens_is_shared_between_them() -> None:
    """F = a * b from (0, 0): each factor gets half of the product."""
    x = torch.tensor([[[3.0], [4.0]]], dtype=torch.float64)
    formula = Formula(lambda point: point[:, 0, 0] * point[:, 1, 0], x, torch.zeros_like(x))
    found = integrated_gradients(formula, formula.inputs, nodes=10)
    assert found.scores.tolist() == [pytest.approx([6.0, 6.0])]
    assert found.baseline_score.tolist() == [0.0]


@given(rule=some_rules, nodes=some_nodes, seed=st.integers(0, 1000))
def test_integrated_gradients_equals_the_slow_one(rule: Rule, nodes: int, seed: int) -> None:
    x, baseline = points(seed, rows=2, tokens=3, size=2)
    weight = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def score(point: Tensor) -> Tensor:
        return torch.tanh(point @ weight).prod(-1).sum(-1)

    formula = Formula(score, x, baseline)
    found = integrated_gradients(formula, formula.inputs, rule=rule, nodes=nodes)
    for row in range(2):
        expected = oracles.integrated_gradients(lambda point: score(point[None])[0], x[row], baseline[row], rule, nodes)
        np.testing.assert_allclose(found.scores[row].numpy(), expected, atol=1e-12)
    assert formula.gradients == 2 * nodes
    assert found.evaluations.tolist() == [nodes, nodes]
    torch.testing.assert_close(found.baseline_score, score(baseline))


# --- the registry -------------------------------------------------------------------------------------------------


def register(version: int) -> Method:
    @method(version=version, cite="nobody2000", ranges={"share": (0.0, 1.0)})
    def half(
        evaluate: Evaluate,
        inputs: Inputs,
        *,
        share: float = 0.5,
        limit: int | None = None,
        kind: Literal["a", "b"] = "a",
        exact: bool = False,
    ) -> Attribution:
        raise NotImplementedError

    return METHODS[f"half.v{version}"]


def test_a_method_is_found_by_name_and_by_id() -> None:
    found = find_method("integrated_gradients")
    assert found.id == "integrated_gradients.v1"
    assert find_method("integrated_gradients.v1") is found is METHODS["integrated_gradients.v1"]
    assert found.function is integrated_gradients
    assert (found.complete, found.signed, found.stochastic) == (True, True, False)
    assert list(found.options) == ["rule", "nodes", "baseline", "tolerance", "max_nodes", "unconverged"]


@pytest.mark.usefixtures("scratch_registry")
def test_a_name_means_its_newest_version() -> None:
    for version in (2, 10, 9):
        register(version)
    assert find_method("half").id == "half.v10"
    assert find_method("half.v2").id == "half.v2"


@pytest.mark.usefixtures("scratch_registry")
def test_an_id_is_registered_once() -> None:
    register(1)
    with pytest.raises(MethodError, match=r"half\.v1.*registered once.*version=2"):
        register(1)


@pytest.mark.usefixtures("scratch_registry")
def test_a_range_must_name_an_option() -> None:
    with pytest.raises(MethodError, match=r"ranges=\['shares'\]"):

        @method(version=1, cite="nobody2000", ranges={"shares": (0, 1)})
        def third(evaluate: Evaluate, inputs: Inputs, *, share: float = 0.5) -> Attribution:
            raise NotImplementedError


@pytest.mark.parametrize("name", ["integrated_gradient", "integrated_gradients.v7", "lime", ""])
def test_an_unknown_method_lists_the_known_ones(name: str) -> None:
    with pytest.raises(MethodError, match=r"is no known method.*integrated_gradients\.v1") as caught:
        find_method(name)
    assert ("Write integrated_gradients" in str(caught.value)) == name.startswith("integrated")


def test_options_that_are_right_give_no_problem() -> None:
    found = find_method("integrated_gradients")
    assert found.check({}) == []
    assert found.check({"rule": "trapezoid", "nodes": 2000, "baseline": "-"}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 1}, "method.nodes=1 must be between 2 and 2000"),
        ({"nodes": 2001}, "method.nodes=2001 must be between 2 and 2000"),
        ({"nodes": 10.0}, "method.nodes=10.0 must be a whole number"),
        ({"nodes": True}, "method.nodes=True must be a whole number"),
        ({"nodes": "50"}, "method.nodes='50' must be a whole number"),
        (
            {"rule": "simpson"},
            "method.rule='simpson' must be one of adaptive, calibrated, midpoint, trapezoid, gauss_legendre",
        ),
        ({"baseline": 3}, "method.baseline=3 must be text"),
        ({"node": 10}, "method.node=10 is no option of integrated_gradients.v1"),
        ({"nodes": 10}, "method.nodes=10 is not read by rule: adaptive"),
        ({"rule": "midpoint", "tolerance": 0.1}, "method.tolerance=0.1 is not read by rule: midpoint"),
    ],
)
def test_options_that_are_wrong_are_told(options: dict[str, object], message: str) -> None:
    (problem,) = find_method("integrated_gradients").check(options)
    assert str(problem).startswith(message)
    assert problem.consequence
    assert problem.remedy


def test_every_wrong_option_is_told_and_the_nearest_name_suggested() -> None:
    problems = find_method("integrated_gradients").check({"node": 10, "rule": 1, "nodes": -1})
    assert [problem.field for problem in problems] == ["method.node", "method.rule", "method.nodes"]
    assert problems[0].remedy == "Write nodes"


@pytest.mark.usefixtures("scratch_registry")
def test_option_types() -> None:
    half = register(1)
    assert half.check({"share": 1, "limit": None, "kind": "b", "exact": True}) == []
    assert half.check({"limit": 3}) == []
    wrong = {"share": math.nan, "limit": 0.5, "kind": True, "exact": 1}
    assert [problem.field for problem in half.check(wrong)] == [f"method.{name}" for name in wrong]
    assert "must be a whole number or null" in str(half.check({"limit": 0.5})[0])
    assert len(half.check({"share": math.inf})) == len(half.check({"share": 1.01})) == 1


@pytest.mark.usefixtures("scratch_registry")
def test_completed_options_hold_every_default_and_one_type_a_value() -> None:
    """1 and 1.0 are one option value, so they must give one key."""
    found = find_method("integrated_gradients").complete_options({"nodes": 9, "tolerance": 0.1})
    assert found == {
        "rule": "adaptive",
        "nodes": 9,
        "baseline": "mask",
        "tolerance": 0.1,
        "max_nodes": 64,
        "unconverged": "keep",
    }
    completed = register(1).complete_options({"share": 1, "limit": 1})
    assert [(name, type(value)) for name, value in completed.items()] == [
        ("share", float),
        ("limit", int),
        ("kind", str),
        ("exact", bool),
    ]


def test_the_registry_alone_does_not_import_torch() -> None:
    code = (
        "import sys, lexplain.methods as m\n"
        "assert 'torch' not in sys.modules\n"
        "m.METHODS\n"
        "assert 'torch' in sys.modules and not {'captum', 'pyspark', 'mlflow', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "options", "signed"),
    [
        ("integrated_gradients", {}, True), ("gradient_x_input", {}, True), ("occlusion", {}, True),
        ("random", {}, False), ("saliency", {}, False), ("saliency", {"sign": "none"}, False),
        ("saliency", {"sign": "gradient_x_input"}, True), ("smoothgrad", {"norm": "l1"}, False),
        ("smoothgrad", {"sign": "gradient_x_input"}, True), ("marc", {}, False), ("marc", {"sign": "gradient_x_input"}, True),
    ],
)  # fmt: skip
def test_a_method_without_a_sign_can_borrow_one(name: str, options: dict[str, str], signed: bool) -> None:
    assert find_method(name).is_signed(options) == signed


def test_every_method_has_a_sign_or_says_how_to_get_one() -> None:
    """Apart from the control, which has no evidence of either kind."""
    for found in METHODS.values():
        assert found.signed or "sign" in found.options or found.id == "random.v1"
