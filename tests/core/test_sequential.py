"""Sequential Integrated Gradients: closed forms, a slow re-statement, completeness of each token, batches."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from core.models import BATCH_TOLERANCE, TEXTS, Shelf, count_passes
from core.test_engine import LONG_TEXT, MULTI_LABEL, assert_close, explanations, only, word_scores
from core.test_gradients import curved, explainer, run_and_keep
from core.test_methods import RULES, Formula, points
from lexplain.methods import find_method, sequential
from lexplain.methods.paths import FixedRule
from lexplain.methods.sequential import sequential_integrated_gradients

METHOD = "sequential_integrated_gradients"


def test_it_is_registered_as_published() -> None:
    found = find_method(METHOD)
    assert (found.id, found.complete, found.signed, found.stochastic) == (f"{METHOD}.v1", False, True, False)
    assert found.complete_options(found.presets["sig-2023"]) == {
        "rule": "gauss_legendre",
        "nodes": 50,
        "baseline": "mask",
    }
    (problem,) = found.check({"rule": "adaptive"})
    assert str(problem).startswith("method.rule='adaptive' must be one of midpoint, trapezoid, gauss_legendre")


def test_each_factor_of_a_product_gets_what_the_text_loses_without_it() -> None:
    """F = a * b with baseline (1, 1): a alone moves over (a - 1) b, b alone over a (b - 1); they do not sum to ab - 1."""
    x = torch.tensor([[[3.0], [4.0]]], dtype=torch.float64)
    formula = Formula(lambda point: point[:, 0, 0] * point[:, 1, 0], x, torch.ones_like(x))
    found = sequential_integrated_gradients(formula, formula.inputs, nodes=3)
    assert found.scores.tolist() == [pytest.approx([8.0, 9.0])]
    assert found.baseline_score.tolist() == [1.0]
    assert found.completeness_gap.tolist() == pytest.approx([12.0 - 1.0 - 17.0])
    assert found.evaluations.tolist() == [6]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("visit_points", [10, 65_536])
def test_it_equals_the_slow_one(rule: FixedRule, visit_points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many visits its points are dealt to."""
    monkeypatch.setattr(sequential, "_VISIT_POINTS", visit_points)
    x, baseline = points(5, rows=2, tokens=4, size=3)
    score = curved(3)
    formula = Formula(score, x, baseline)
    special = torch.tensor([[True, False, False, False], [True, False, False, True]])
    inputs = dataclasses.replace(formula.inputs, special=special)
    found = sequential_integrated_gradients(formula, inputs, rule=rule, nodes=7)
    for row in range(2):
        expected = oracles.sequential_integrated_gradients(
            lambda point: score(point[None])[0], x[row], baseline[row], rule, 7
        )
        expected[special[row]] = 0.0
        np.testing.assert_allclose(found.scores[row], expected, rtol=0, atol=1e-12)
    assert found.evaluations.tolist() == [21, 14]
    assert formula.gradients == 35
    torch.testing.assert_close(found.baseline_score, score(baseline))


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "textcnn"])
def test_each_token_is_complete(shelf: Shelf, family: str) -> None:
    """Its score is the logit of the text less that of the text with this token at the baseline."""
    classifier = shelf.classifier(family, dtype=torch.float64)
    inputs, attribution = run_and_keep(classifier, METHOD, list(TEXTS[:2]), rule="midpoint", nodes=400)
    outcomes = explainer(classifier, find_method(METHOD), nodes=2, max_windows=1).explain(list(TEXTS[:2]))
    label_of = {len(classifier.encode(text, max_tokens=40, overlap=6, max_windows=1).windows[0].ids): only(outcome).label
                for text, outcome in zip(TEXTS, outcomes, strict=False)}  # fmt: skip
    for row in range(2):
        length = int(inputs.mask[row].sum())
        label = classifier.labels.index(label_of[length])
        x, baseline = inputs.x[row, :length], inputs.baseline[row, :length]

        def logit(embeddings: Tensor, label: int = label, length: int = length) -> float:
            mask = torch.ones((1, length), dtype=torch.bool)
            return float(classifier.logits(embeddings[None], mask, None)[0, label])

        for token in range(length):
            without = x.clone()
            without[token] = baseline[token]
            lost = logit(x) - logit(without)
            assert float(attribution.scores[row, token]) == pytest.approx(lost, abs=2e-3)


def test_scores_do_not_depend_on_batch_mates(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    texts = [*TEXTS, LONG_TEXT[:300]]
    together = explainer(classifier, find_method(METHOD), nodes=3).explain(texts)
    again = explainer(classifier, find_method(METHOD), nodes=3).explain(texts[::-1])[::-1]
    for text, outcome, repeated in zip(texts, together, again, strict=True):
        alone = explainer(classifier, find_method(METHOD), nodes=3, budget_tokens=1).explain([text])[0]
        assert_close(only(outcome), only(alone), 1e-6)
        assert only(outcome).words == only(repeated).words


def test_special_tokens_and_padding_have_no_score(shelf: Shelf) -> None:
    inputs, attribution = run_and_keep(shelf.classifier("roberta"), METHOD, list(TEXTS), nodes=3)
    assert not inputs.mask.all()
    assert (attribution.scores[inputs.special] == 0).all()
    assert (attribution.scores[~inputs.special] != 0).all()


def test_targets_share_the_forward_part(shelf: Shelf) -> None:
    """And each has its own scores."""
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    with count_passes(classifier) as passes:
        found = explanations(explainer(classifier, find_method(METHOD), nodes=2).explain([TEXTS[1]])[0])
    assert len(found) > 1
    assert passes.sequences == 1 + 2 * found[0].n_tokens + 1  # prediction, gradients, baseline
    assert {explanation.evaluations for explanation in found} == {2 * found[0].n_tokens}
    for one, other in pairwise(found):
        assert not np.allclose(word_scores(one), word_scores(other))


def test_a_lack_of_memory_counts_no_point_twice(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = shelf.classifier("bert")
    expected = only(explainer(classifier, find_method(METHOD), nodes=4).explain([TEXTS[0]])[0])
    grad, calls = torch.autograd.grad, []

    def fail_second(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", fail_second)
    found = only(explainer(classifier, find_method(METHOD), nodes=4).explain([TEXTS[0]])[0])
    assert_close(found, expected, BATCH_TOLERANCE)
