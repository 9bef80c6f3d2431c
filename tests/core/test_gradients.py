"""Saliency, gradient x input and SmoothGrad: closed forms, captum, slow re-statements, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from core.models import BATCH_TOLERANCE, FAMILIES, TEXTS, Shelf, count_passes
from core.test_engine import LONG_TEXT, MULTI_LABEL, assert_close, explanations, only, word_scores
from core.test_methods import Formula, points
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.methods import Attribution, Evaluate, Inputs, find_method
from lexplain.methods.gradients import Norm, gradient_x_input, saliency, smoothgrad
from lexplain.methods.noise import draw_normal

NORMS: tuple[Norm, ...] = ("l2_squared", "l2", "l1")
METHODS = ("saliency", "gradient_x_input", "smoothgrad")


def explainer(classifier: Classifier, method: Any, **changes: Any) -> Explainer:
    settings: dict[str, Any] = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum"}
    settings |= {"budget_tokens": 600, "top_k": None}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    return Explainer(classifier, method, changes, **settings)


def run_and_keep(classifier: Classifier, name: str, texts: list[str], **options: Any) -> tuple[Inputs, Attribution]:
    """What a method was given for texts in one batch, and what it returned."""
    original, seen = find_method(name), []

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        seen.append((inputs, original.function(evaluate, inputs, **options)))
        return seen[-1][1]

    spy = dataclasses.replace(original, function=function)
    explainer(classifier, spy, max_windows=1, budget_tokens=10_000, **options).explain(texts)
    ((inputs, attribution),) = seen
    return inputs, attribution


def curved(seed: int) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda point: torch.tanh(point @ weight).cumsum(-1).prod(-1)


# --- closed forms -------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_linear_function_is_its_weight() -> None:
    x, baseline = points(0, rows=3, tokens=4, size=5)
    weight = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    formula = Formula(lambda point: (weight * point).sum((1, 2)), x, baseline)
    sizes = {"l2_squared": weight.square().sum(-1), "l2": weight.norm(dim=-1), "l1": weight.abs().sum(-1)}
    times_x = (weight * x).sum(-1)
    for norm, size in sizes.items():
        for found in (
            saliency(formula, formula.inputs, norm=norm),
            smoothgrad(formula, formula.inputs, norm=norm, samples=3),
        ):
            torch.testing.assert_close(found.scores, size.expand(3, 4), rtol=0, atol=1e-12)
        signed = saliency(formula, formula.inputs, norm=norm, sign="gradient_x_input")
        torch.testing.assert_close(signed.scores, torch.copysign(size.expand(3, 4), times_x), rtol=0, atol=1e-12)
    found = gradient_x_input(formula, formula.inputs)
    torch.testing.assert_close(found.scores, times_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.completeness_gap, -formula.formula(baseline), rtol=0, atol=1e-12)
    assert (times_x < 0).any()
    assert (times_x > 0).any()


def test_a_token_of_zeros_keeps_its_saliency_when_signed() -> None:
    """The sign of gradient x input is 0 there for a sign function, which would wipe the score out."""
    x = torch.zeros(1, 2, 1, dtype=torch.float64)
    formula = Formula(lambda point: 3 * point[:, 0, 0] - 2 * point[:, 1, 0], x, x - 1)
    assert saliency(formula, formula.inputs, sign="gradient_x_input").scores.tolist() == [[9.0, 4.0]]


def test_gradients_are_averaged_before_they_are_squared() -> None:
    """F = u^2 at 0 with normal noise s: the mean gradient tends to 0, the mean square to 4 s^2."""
    x = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64)  # standard deviation 1
    formula = Formula(lambda point: point[:, 0, 0] ** 2, x, x)
    found = smoothgrad(formula, formula.inputs, samples=900, noise=0.5).scores
    assert 0 <= float(found[0, 0]) < 4 * 0.25 * 16 / 900  # four standard errors of the mean, squared
    assert float(found[0, 1]) == 0.0


# --- slow re-statements -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_saliency_equals_the_slow_one(norm: Norm) -> None:
    x, baseline = points(5, rows=2, tokens=4, size=3)
    score = curved(3)
    formula = Formula(score, x, baseline)
    found = saliency(formula, formula.inputs, norm=norm)
    for row in range(2):
        expected = oracles.saliency(lambda point: score(point[None])[0], x[row], norm)
        np.testing.assert_allclose(found.scores[row], expected, rtol=0, atol=1e-12)
    assert found.evaluations.tolist() == [1, 1]
    assert formula.gradients == 2
    torch.testing.assert_close(found.baseline_score, score(baseline))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sign", ["none", "gradient_x_input"])
def test_smoothgrad_equals_the_slow_one(norm: Norm, sign: Any) -> None:
    x, baseline = points(6, rows=2, tokens=4, size=3)
    score = curved(4)
    formula = Formula(score, x, baseline)
    special = torch.tensor([[True, False, False, True]] * 2)
    inputs = dataclasses.replace(formula.inputs, special=special, seeds=torch.tensor([11, 2**62]))
    found = smoothgrad(formula, inputs, samples=5, noise=0.3, norm=norm, sign=sign)
    for row in range(2):
        spread = x[row, 1:3].std(correction=0)
        noises = draw_normal(inputs.seeds[[row] * 5], torch.arange(5), 4, 3).double() * 0.3 * spread
        noises[:, special[row]] = 0.0
        gradient = oracles.smoothgrad(lambda point: score(point[None])[0], x[row], list(noises))
        expected = oracles.measure_gradients(gradient, norm)
        if sign != "none":
            expected = np.copysign(expected, (x[row] * gradient).sum(-1).numpy())
        np.testing.assert_allclose(found.scores[row, 1:3], expected[1:3], rtol=0, atol=1e-7)  # noise is float32
        assert found.scores[row, [0, 3]].tolist() == [0.0, 0.0]
    assert found.evaluations.tolist() == [5, 5]


def test_smoothgrad_without_noise_is_saliency() -> None:
    x, baseline = points(7, rows=2, tokens=4, size=3)
    formula = Formula(curved(5), x, baseline)
    for noise, samples in ((0.0, 3), (0.0, 1)):
        smooth = smoothgrad(formula, formula.inputs, noise=noise, samples=samples)
        torch.testing.assert_close(smooth.scores, saliency(formula, formula.inputs).scores, rtol=1e-12, atol=0)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_captums(shelf: Shelf, family: str) -> None:
    """Also on a padded batch; SmoothGrad as captum's saliency at the same noisy points, averaged."""
    captum = pytest.importorskip("captum.attr")
    classifier = shelf.classifier(family)
    texts = sorted(TEXTS, key=lambda text: -len(classifier.encode(
        text, max_tokens=40, overlap=6, max_windows=1).windows[0].ids))  # fmt: skip
    found = explainer(classifier, find_method("saliency"), max_windows=1).explain(texts)
    targets = [classifier.labels.index(only(outcome).label) for outcome in found]
    inputs, attribution = run_and_keep(classifier, "saliency", texts)

    def logits(embeddings: Tensor) -> Tensor:
        return classifier.logits(embeddings, inputs.mask, None)

    def check(scores: Tensor, expected: Tensor) -> None:
        expected = expected.detach().double().masked_fill(inputs.special, 0.0)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=BATCH_TOLERANCE)

    x = inputs.x.clone().requires_grad_(True)
    gradients = captum.Saliency(logits).attribute(x, target=targets, abs=False)
    check(attribution.scores, gradients.square().sum(-1))
    times_x = captum.InputXGradient(logits).attribute(x, target=targets)
    check(run_and_keep(classifier, "gradient_x_input", texts)[1].scores, times_x.sum(-1))
    seeded, smooth = run_and_keep(classifier, "smoothgrad", texts, samples=3, noise=0.1)
    spread = torch.stack([x[~special].std(correction=0) for x, special in zip(inputs.x, inputs.special, strict=True)])
    noisy = []
    for sample in range(3):
        normal = draw_normal(seeded.seeds, torch.full_like(seeded.seeds, sample), *inputs.x.shape[1:])
        normal = (0.1 * spread[:, None, None] * normal).masked_fill(inputs.special[..., None], 0.0)
        point = (inputs.x + normal).requires_grad_(True)
        noisy.append(captum.Saliency(logits).attribute(point, target=targets, abs=False))
    check(smooth.scores, torch.stack(noisy).mean(0).square().sum(-1))


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_batch_mates(shelf: Shelf, method: str) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    texts = [*TEXTS, LONG_TEXT]
    together = explainer(classifier, find_method(method)).explain(texts)
    again = explainer(classifier, find_method(method)).explain(texts[::-1])[::-1]
    for text, outcome, repeated in zip(texts, together, again, strict=True):
        alone = explainer(classifier, find_method(method), budget_tokens=1).explain([text])[0]
        assert_close(only(outcome), only(alone), BATCH_TOLERANCE)
        assert only(outcome).words == only(repeated).words


@pytest.mark.parametrize("method", METHODS)
def test_special_tokens_and_padding_have_no_score(shelf: Shelf, method: str) -> None:
    inputs, attribution = run_and_keep(shelf.classifier("roberta"), method, list(TEXTS))
    assert not inputs.mask.all()
    assert (attribution.scores[inputs.special] == 0).all()
    assert (attribution.scores[~inputs.special] != 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_targets_share_the_forward_part(shelf: Shelf, method: str) -> None:
    """And each has its own scores: those that it has when it is the only target."""
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    samples = 4 if method == "smoothgrad" else 1
    options = {"samples": samples} if method == "smoothgrad" else {}
    with count_passes(classifier) as passes:
        found = explanations(explainer(classifier, find_method(method), **options).explain([TEXTS[0]])[0])
    assert len(found) > 1
    assert passes.sequences == 1 + samples + 1  # prediction, gradients, baseline
    assert passes.backward == len(found)
    for one, other in pairwise(found):
        assert not np.allclose(word_scores(one), word_scores(other))


def test_a_pass_that_is_tried_again_counts_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out between two targets of a pass, when the first has been seen."""
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    expected = explanations(explainer(classifier, find_method("smoothgrad"), samples=6).explain([TEXTS[0]])[0])
    grad, calls = torch.autograd.grad, []

    def fail_second(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", fail_second)
    found = explanations(explainer(classifier, find_method("smoothgrad"), samples=6).explain([TEXTS[0]])[0])
    assert len(calls) > len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, BATCH_TOLERANCE)
