"""The adaptive rule of Integrated Gradients: as many points as a row needs, and the truth about those it lacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import Akima1DInterpolator
from torch import Tensor

from core.models import TEXTS, Shelf
from core.test_engine import LONG_TEXT, explainer, only, word_scores
from core.test_methods import Formula
from lexplain.calibration import fit_calibration
from lexplain.errors import MethodError
from lexplain.explanation import Rejection
from lexplain.methods import Attribution
from lexplain.methods.paths import akima_slopes, integrated_gradients

TOLERANCES = (0.2, 0.05, 0.01)


def steps(sharpness: float, places: Tensor) -> Callable[[Tensor], Tensor]:
    """A logit that each token pushes up or down where the sum of all passes a place of its own."""

    def formula(points: Tensor) -> Tensor:
        total = points.sum((1, 2))[:, None]
        return (points.sum(2) * torch.sigmoid(sharpness * (total - places))).sum(1)

    return formula


def make(sharpness: float, rows: int = 6, tokens: int = 5) -> Formula:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, tokens, 3, dtype=torch.float64, generator=generator).abs()
    places = 4 + 6 * torch.rand(tokens, dtype=torch.float64, generator=generator)
    return Formula(steps(sharpness, places), x, torch.zeros_like(x))


def errors(found: Attribution, formula: Formula) -> np.ndarray:
    exact = integrated_gradients(formula, formula.inputs, rule="gauss_legendre", nodes=1500).scores
    return ((found.scores - exact).norm(dim=1) / exact.norm(dim=1)).numpy()


@pytest.mark.parametrize("sharpness", [2.0, 8.0, 30.0])
def test_the_scores_are_within_the_tolerance(sharpness: float) -> None:
    formula, evaluations = make(sharpness), []
    for tolerance in TOLERANCES:
        found = integrated_gradients(formula, formula.inputs, tolerance=tolerance, max_nodes=400)
        assert found.converged.all()
        assert (errors(found, formula) <= 2 * tolerance).all()
        evaluations.append(found.evaluations.double().mean().item())
    assert evaluations == sorted(evaluations)
    assert evaluations[0] < evaluations[-1]


def test_what_is_left_is_distributed_and_told() -> None:
    formula = make(4.0)
    found = integrated_gradients(formula, formula.inputs, tolerance=0.2)
    difference = formula.inputs.target_score - found.baseline_score
    np.testing.assert_allclose(found.scores.sum(-1), difference, rtol=0, atol=1e-12)
    assert (found.completeness_gap.abs() > 1e-9).all(), "the gap is what was missing before"


def test_a_straight_line_needs_the_first_points_only() -> None:
    x = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
    formula = Formula(lambda points: points.sum((1, 2)) * 0.5, x, torch.ones_like(x))
    found = integrated_gradients(formula, formula.inputs)
    np.testing.assert_allclose(found.scores, ((x - 1) * 0.5).sum(-1), rtol=0, atol=1e-12)
    assert found.evaluations.tolist() == [7, 7]
    assert found.converged.all()


def test_points_are_where_the_gradient_moves() -> None:
    """A gradient that rests but for one place: few points elsewhere, and far fewer than a fixed rule needs."""
    formula = make(30.0)
    found = integrated_gradients(formula, formula.inputs, max_nodes=200)
    adaptive = errors(found, formula).max()
    count = int(found.evaluations.max())
    fixed = errors(integrated_gradients(formula, formula.inputs, rule="midpoint", nodes=count), formula).max()
    assert found.converged.all()
    assert adaptive < fixed / 2


def test_a_row_that_is_too_sharp_is_marked() -> None:
    formula = make(300.0)
    few = integrated_gradients(formula, formula.inputs, tolerance=0.002, max_nodes=16)
    assert not few.converged.any()
    assert (few.evaluations == 16).all()
    more = integrated_gradients(formula, formula.inputs, tolerance=0.002, max_nodes=16, unconverged="more")
    assert (more.evaluations > 16).all()
    assert (more.evaluations <= 64).all()
    assert errors(more, formula).mean() < errors(few, formula).mean()


@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_rows_do_not_know_each_other(sharpness: float) -> None:
    formula = make(sharpness)
    together = integrated_gradients(formula, formula.inputs)
    for row in range(len(formula.x)):
        single = Formula(formula.formula, formula.x[row : row + 1], formula.baseline[row : row + 1])
        alone = integrated_gradients(single, single.inputs)
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=0, atol=1e-12)
        assert alone.evaluations[0] == together.evaluations[row]


def test_rows_without_scores_and_rows_that_overflow_end() -> None:
    x = torch.ones(3, 2, 2, dtype=torch.float64)
    x[1] = float("nan")
    baseline = torch.zeros_like(x)
    baseline[2] = x[2]
    formula = Formula(lambda points: points.sum((1, 2)) ** 2, x, baseline)
    found = integrated_gradients(formula, formula.inputs)
    assert found.converged.tolist() == [True, False, True]
    assert found.scores[1].isnan().all()
    assert (found.scores[2] == 0).all()


@pytest.mark.parametrize("nodes", [3, 4, 9, 30])
def test_slopes_are_those_of_modified_akima(nodes: int) -> None:
    generator = np.random.default_rng(nodes)
    places = np.cumsum(generator.uniform(0.1, 1.0, nodes))
    values = generator.normal(size=(nodes, 7))
    widths = torch.tensor(np.diff(places))[None, :, None]
    found = akima_slopes(widths, torch.tensor(values)[None])[0].numpy()
    expected = Akima1DInterpolator(places, values, method="makima")(places, nu=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


# --- on classifiers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "distilbert", "electra", "textcnn"])
def test_a_classifiers_scores_are_within_the_tolerance(shelf: Shelf, family: str) -> None:
    texts = [*TEXTS, LONG_TEXT]
    exact = explainer(shelf.classifier(family), rule="gauss_legendre", nodes=300).explain(texts)
    # a network whose gradient jumps is off further than a small tolerance says
    tolerances, most = ((0.05,), 2.5) if family in ("textcnn", "distilbert") else ((0.05, 0.01), 2.0)
    for tolerance in tolerances:
        outcomes = explainer(shelf.classifier(family), rule="adaptive", tolerance=tolerance).explain(texts)
        for outcome, expected in zip(outcomes, exact, strict=True):
            found = only(outcome)
            off = np.linalg.norm(word_scores(found) - word_scores(only(expected)))
            assert off <= most * tolerance * np.linalg.norm(word_scores(only(expected)))
            assert found.converged
            assert word_scores(found).sum() == pytest.approx(found.target_score - found.baseline_score, abs=1e-9)
            assert found.evaluations >= 7 * found.n_windows


def test_calibrated_nodes_are_few(shelf: Shelf) -> None:
    """They are fitted to other texts, and each window takes as many as the rule has."""
    classifier = shelf.classifier("bert")
    words = (LONG_TEXT + " " + TEXTS[0]).split()
    texts = [" ".join(words[start::5]) for start in range(5)] + [
        " ".join(words[start : start + 9]) for start in range(40)
    ]
    sampler = explainer(classifier)
    sample = sampler.sample_paths(sampler.read_texts(texts), 33)
    assert [len(path.words) for path in sample] == [path.derivatives.shape[1] for path in sample]
    calibration = fit_calibration(sample, n_documents=1000)
    exact = explainer(classifier, rule="gauss_legendre", nodes=300).explain(TEXTS)
    found = explainer(classifier, rule="calibrated", nodes=8, prepared=calibration).explain(TEXTS)
    assert {only(each).evaluations for each in found} == {8, 16}, "one of the texts has two windows"
    for few, expected in zip(map(only, found), map(only, exact), strict=True):
        off = np.linalg.norm(word_scores(few) - word_scores(expected))
        assert off <= 0.1 * np.linalg.norm(word_scores(expected))


def test_the_calibrated_rule_needs_a_calibration(shelf: Shelf) -> None:
    with pytest.raises(MethodError, match="needs a calibration"):
        explainer(shelf.classifier("bert"), rule="calibrated").explain([TEXTS[0]])


def test_an_unconverged_text_may_be_rejected(shelf: Shelf) -> None:
    options = {"rule": "adaptive", "tolerance": 0.001, "max_nodes": 16}
    kept = only(explainer(shelf.classifier("bert"), **options).explain([LONG_TEXT])[0])
    assert not kept.converged
    (rejected,) = explainer(shelf.classifier("bert"), **options, unconverged="reject").explain([LONG_TEXT])
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "not_converged"
