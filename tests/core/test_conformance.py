"""What every method promises the engine, for each of them and several kinds of model, alone and in a padded batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from core.models import BATCH_TOLERANCE, LINES, Shelf
from core.test_engine import only, word_scores
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.errors import MethodError
from lexplain.methods import METHODS, Attribution, Evaluate, Inputs, find_method
from lexplain.neighbours import ReferenceIndex

TEXTS = (LINES[0], "phone", "Köttbullar & räksmörgås, said the user!", " ".join(LINES[:2]))
MODELS = ("bert", "roberta", "xlm-roberta", "distilbert", "textcnn")

# As few points as show everything; the others run at their defaults.
SMALL: dict[str, dict[str, Any]] = {
    # the adaptive rule hands its gap out, see test_adaptive.py
    "integrated_gradients": {"rule": "midpoint", "nodes": 100}, "captum.layer_integrated_gradients": {"n_steps": 100},
    "smoothgrad": {"samples": 3}, "lafa": {"samples": 3, "layer": 1, "quantile": 1.0, "same_class": False},
    "sequential_integrated_gradients": {"nodes": 4}, "marc": {"steps": 12},
    "discretized_integrated_gradients": {"steps": 4, "neighbours": 6},
    "uniform_discretized_integrated_gradients": {"steps": 4, "neighbours": 6},
    "captum.lime": {"n_samples": 30}, "captum.shapley_value_sampling": {"n_samples": 2},
    "captum.gradient_shap": {"n_samples": 4},
}  # fmt: skip

# MaRC takes a dozen steps of AdamW, which divide by the gradient's size: rounding grows.
TOLERANCES = {"marc": 2e-3}

OURS = [method.name for method in METHODS.values() if method.package is None]


def fits(name: str, family: str) -> bool:
    method = find_method(name)
    return (not method.models or family in method.models) and not (name == "lafa" and family == "textcnn")


PAIRS = [(name, family) for name in OURS for family in MODELS if fits(name, family)]


def open_explainer(classifier: Classifier, name: str, method: Any = None, **changes: Any) -> Explainer:
    def make(method: Any, prepared: object) -> Explainer:
        settings = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum", "budget_tokens": 2000}
        return Explainer(classifier, method, SMALL.get(name, {}), prepared=prepared, **(settings | changes))

    found = find_method(name)
    prepared = None
    if name == "lafa":
        sampling = make(found, None)
        prepared = ReferenceIndex.build(sampling.sample_references(sampling.read_texts(LINES), 1), 1)
    return make(method or found, prepared)


def test_every_method_is_here() -> None:
    assert set(SMALL) <= set(OURS)
    assert {name for name, _ in PAIRS} == set(OURS)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_method_keeps_its_promises(shelf: Shelf, name: str, family: str) -> None:
    classifier, method = shelf.classifier(family), find_method(name)
    model, tolerance = classifier.model, TOLERANCES.get(name, BATCH_TOLERANCE)
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    kept: list[tuple[Inputs, Attribution]] = []

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        kept.append((inputs, method.function(evaluate, inputs, **options)))
        return kept[-1][1]

    spy = dataclasses.replace(method, function=function)
    explainer = open_explainer(classifier, name, spy)
    together = [only(outcome) for outcome in explainer.explain(TEXTS)]

    # shapes, and nothing on special tokens and padding
    assert any(not inputs.mask.all() for inputs, _ in kept), "no batch was padded"
    for inputs, attribution in kept:
        assert attribution.scores.shape == inputs.mask.shape
        assert attribution.scores.dtype == torch.float64
        assert (attribution.scores[inputs.special] == 0).all()
        assert attribution.scores.isfinite().all()
        assert (attribution.scores != 0).any()

    # the same once more, alone, in another order, and with passes of one point
    again = [only(outcome) for outcome in open_explainer(classifier, name).explain(TEXTS)]
    backwards = [only(outcome) for outcome in open_explainer(classifier, name).explain(TEXTS[::-1])][::-1]
    narrow = [only(outcome) for outcome in open_explainer(classifier, name, budget_tokens=1).explain(TEXTS)]
    for number, (text, found) in enumerate(zip(TEXTS, together, strict=True)):
        alone = only(open_explainer(classifier, name).explain([text])[0])
        np.testing.assert_array_equal(word_scores(again[number]), word_scores(found))
        for other in (alone, backwards[number], narrow[number]):
            size = max(1.0, float(np.abs(word_scores(found)).max()))
            np.testing.assert_allclose(word_scores(other), word_scores(found), rtol=0, atol=tolerance * size)
            assert (other.label, other.n_tokens, other.evaluations) == (found.label, found.n_tokens, found.evaluations)

    # what is declared
    for found in together:
        values = word_scores(found)
        if method.signed:
            assert found.completeness_gap is not None
            total = values.sum() + found.completeness_gap
            assert total == pytest.approx(found.target_score - found.baseline_score, abs=1e-4)
        else:
            assert (values >= 0).all()
            assert (found.completeness_gap is None) == (not method.mask)
        if method.complete:
            assert found.completeness_gap is not None
            # a ReLU's kink between two nodes leaves some thousandths of a logit
            assert abs(found.completeness_gap) < max(0.05 * np.abs(values).sum(), 0.005)
        assert bool(found.spans) <= method.mask
    if not method.mask:  # a mask may keep everything after so few steps
        assert len({round(score, 9) for _, score in together[0].words}) > 1

    # the model is as it was
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
    for module in model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
        assert not module.training


@pytest.mark.parametrize("name", [name for name in OURS if not find_method(name).mask])
def test_the_largest_piece_of_a_word_is_taken_only_where_pieces_have_scores(shelf: Shelf, name: str) -> None:
    """What is of whole words comes in equal parts: the largest would be a part of it."""
    family = "textcnn" if find_method(name).models == ("textcnn",) else "bert"
    text = LINES[1]
    summed, largest = (
        only(open_explainer(shelf.classifier(family), name, merge=merge).explain([text])[0])
        for merge in ("sum", "absmax")
    )
    if find_method(name).by_word:
        np.testing.assert_array_equal(word_scores(summed), word_scores(largest))
    elif family == "bert":  # a TextCNN's words are one token each
        assert np.abs(word_scores(summed) - word_scores(largest)).max() > 1e-6


@pytest.mark.parametrize("name", ["random", "saliency", "smoothgrad", "lafa", "marc"])
def test_sizes_do_not_add_up_where_windows_overlap(shelf: Shelf, name: str) -> None:
    """A word in two windows has the mean of what it has in each, weighted towards the nearer one."""
    text = "the new tax was cut and the party said a bank fell and the team was ready"
    explainer = open_explainer(shelf.classifier("bert"), name, max_tokens=14, overlap=6)
    found = only(explainer.explain([text])[0])
    assert found.n_windows == 2
    scores = word_scores(found)[:-1]
    assert len(scores) == 17, "each word is one token"
    alone = open_explainer(shelf.classifier("bert"), name, max_tokens=14, label=found.label)
    windows = [
        word_scores(only(alone.explain([part])[0]))[:-1]
        for part in (" ".join(text.split()[:12]), " ".join(text.split()[6:]))
    ]
    if name == "saliency":  # the others draw other numbers for another text
        np.testing.assert_allclose(scores[:6], windows[0][:6], rtol=1e-4)
        shares = np.arange(6, 0, -1) / 7
        np.testing.assert_allclose(scores[6:12], shares * windows[0][6:] + (1 - shares) * windows[1][:6], rtol=1e-4)
    if name == "random":
        assert (scores < 1).all()
        assert scores[6:12].mean() < 1.6 * scores.mean()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("scores", lambda found: torch.cat([found, found[:, :1]], dim=1)),
        ("scores", lambda found: found[:, 1:]),
        ("scores", lambda found: found.float()),
        ("baseline_score", lambda found: found[:1]),
        ("converged", lambda found: found.long()),
        ("evaluations", lambda found: found.double()),
    ],
)
def test_what_a_method_returns_is_checked(shelf: Shelf, field: str, change: Any) -> None:
    """A column too many would have been taken, every score one token further."""
    saliency = find_method("saliency")

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        found = saliency.function(evaluate, inputs, **options)
        return dataclasses.replace(found, **{field: change(getattr(found, field))})

    foreign = dataclasses.replace(saliency, function=function, package="their-methods 1.0")
    explainer = open_explainer(shelf.classifier("bert"), "saliency", foreign)
    with pytest.raises(MethodError, match=rf"returned {field} of shape .* of the package their-methods 1\.0"):
        explainer.explain(TEXTS)
