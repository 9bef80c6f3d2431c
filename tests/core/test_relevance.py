"""LRP: against slow re-derivations in float64, what it conserves, and that nothing of it stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import oracles
from core.models import BATCH_TOLERANCE, TEXTS, Shelf, count_passes
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.errors import ModelError
from lexplain.explanation import Explanation
from lexplain.methods import METHODS, find_method
from lexplain.passes import Evaluation
from lexplain.words import segment

TRANSFORMERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")
MULTI_LABEL = "multi_label_classification"
CONSERVING = {"eps": 0.01, "bias_factor": 1.0}


def explainer(classifier: Classifier, method: str = "lrp", *, budget: int = 600, **options: Any) -> Explainer:
    return Explainer(
        classifier, find_method(method), options, max_tokens=40, overlap=6, max_windows=None, merge="sum",
        budget_tokens=budget,
    )  # fmt: skip


def test_the_preset_of_attnlrp_has_no_stabiliser(shelf: Shelf) -> None:
    """The 1e-10 of its authors is that of activations, which needs none here: 0 stays 0."""
    classifier, lrp = shelf.classifier("bert", dtype=torch.float64), find_method("lrp")
    asked = lrp.presets["attnlrp-2024"]
    assert lrp.complete_options(asked)["eps"] is None
    found, without = (explain(classifier, TEXTS[0], **options) for options in (asked, {"rule": "attnlrp", "eps": 0.0}))
    assert (scores(found) == scores(without)).all()


def explain(classifier: Classifier, text: str, **options: Any) -> Explanation:
    ((found,),) = explainer(classifier, **options).explain([text])
    return found


def scores(found: Explanation) -> np.ndarray:
    """Word scores in the order of the text, then what is outside words."""
    in_order = sorted(found.words, key=lambda pair: pair[0].start)
    return np.array([*(score for _, score in in_order), found.other_score])


def by_words(classifier: Classifier, text: str, content: np.ndarray) -> np.ndarray:
    """The same figures from token scores, one character at a time."""
    spans = [(word.start, word.end) for word in segment(text)]
    offsets = classifier.encode(text, max_tokens=40, overlap=6, max_windows=1).offsets.tolist()
    words, other = oracles.words_by_character(text, spans, offsets, content.tolist())
    return np.array([*words, other])


def slow(classifier: Classifier, text: str, label: int, eps: float, bias_factor: float) -> tuple[float, np.ndarray]:
    filters, output, vectors = oracles.textcnn_weights(classifier.model)
    (window,) = classifier.encode(text, max_tokens=40, overlap=6, max_windows=None).windows
    score, relevance = oracles.textcnn_relevance(
        vectors[list(window.ids)], filters, output, label, eps=eps, bias_factor=bias_factor
    )
    return score, relevance.sum(-1)


# --- TextCNN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "bias_factor"), [(0.01, 1.0), (0.001, 0.0), (0.3, 0.4), (0.0, 1.0), (None, 0.0)])
def test_textcnn_equals_the_equations(shelf: Shelf, eps: float | None, bias_factor: float) -> None:
    """To ten digits, padded batches and texts shorter than a filter among them."""
    classifier = shelf.classifier("textcnn", dtype=torch.float64)
    options = {"eps": eps, "bias_factor": bias_factor, "rule": "epsilon"}
    for text, outcome in zip(TEXTS, explainer(classifier, **options).explain(TEXTS), strict=True):
        (found,) = outcome
        label = classifier.labels.index(found.label)
        score, expected = slow(classifier, text, label, 0.001 if eps is None else eps, bias_factor)
        np.testing.assert_allclose(scores(found), by_words(classifier, text, expected), rtol=0, atol=1e-10)
        assert found.target_score == pytest.approx(score, abs=1e-12)
        assert found.completeness_gap == pytest.approx(score - expected.sum(), abs=1e-10)
        assert (found.baseline_score, found.evaluations, found.converged) == (0.0, 1, True)


def test_the_shares_conserve_the_score(shelf: Shelf) -> None:
    """Also of the mean over several windows, in float32; without the shares the biases' part is missing."""
    texts = [*TEXTS, " ".join([TEXTS[0]] * 9)]
    for outcome in explainer(shelf.classifier("textcnn"), **CONSERVING).explain(texts):
        (found,) = outcome
        assert scores(found).sum() == pytest.approx(found.target_score, abs=1e-5)
        assert abs(found.completeness_gap) < 1e-5
    assert found.n_windows > 2
    without = explain(shelf.classifier("textcnn"), TEXTS[0])
    assert abs(without.completeness_gap) > 1e-3
    assert scores(without).sum() + without.completeness_gap == pytest.approx(without.target_score, abs=1e-9)


def edit(shelf: Shelf, change: Callable[[Any], object], **options: Any) -> Classifier:
    """A TextCNN of its own, with weights changed in place, in float64."""
    classifier = Classifier.load(shelf.folder("textcnn", **options), dtype=torch.float64)
    with torch.no_grad():
        change(classifier.model)
    return classifier


def test_a_negative_score_is_shared_out_too(shelf: Shelf) -> None:
    classifier = edit(shelf, lambda model: model.classifier.bias.sub_(5.0))
    found = explain(classifier, TEXTS[0], **CONSERVING)
    assert found.target_score < 0
    _, expected = slow(classifier, TEXTS[0], classifier.labels.index(found.label), 0.01, 1.0)
    np.testing.assert_allclose(scores(found), by_words(classifier, TEXTS[0], expected), rtol=0, atol=1e-10)
    assert scores(found).sum() == pytest.approx(found.target_score, abs=1e-10)


def test_one_logit_explains_both_answers(shelf: Shelf) -> None:
    """The score of "not X" is the logit's negative, and so is every share."""
    seen = set()
    for shift in (-3.0, 3.0):
        classifier = edit(shelf, lambda model, shift=shift: model.classifier.bias.fill_(shift), labels=("sport",))
        found = explain(classifier, TEXTS[0], **CONSERVING)
        score, expected = slow(classifier, TEXTS[0], 0, 0.01, 1.0)
        sign = 1 if found.label == "sport" else -1
        assert found.target_score == pytest.approx(sign * score, abs=1e-12)
        np.testing.assert_allclose(scores(found), sign * by_words(classifier, TEXTS[0], expected), rtol=0, atol=1e-10)
        seen.add(found.label)
    assert seen == {"sport", "not sport"}


def test_several_labels_share_one_forward_pass(shelf: Shelf) -> None:
    classifier = edit(shelf, lambda model: model.classifier.bias.add_(4.0), problem_type=MULTI_LABEL)
    with count_passes(classifier) as passes:
        (found,) = explainer(classifier, **CONSERVING).explain([TEXTS[0]])
    assert len(found) == 3
    assert passes.forward == 2, "one to predict, one to explain"
    for each in found:
        _, expected = slow(classifier, TEXTS[0], classifier.labels.index(each.label), 0.01, 1.0)
        np.testing.assert_allclose(scores(each), by_words(classifier, TEXTS[0], expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias_factor", [0.0, 1.0])
def test_only_winning_windows_are_touched(shelf: Shelf, bias_factor: float) -> None:
    classifier = shelf.classifier("textcnn")
    text = " ".join(word for line in TEXTS[:2] for word in line.split()) + " the quarter and costs the final the cup"
    found = explain(classifier, text, bias_factor=bias_factor, eps=0.01)
    batch = classifier.collate(classifier.encode(text, max_tokens=40, overlap=6, max_windows=None).windows)
    won = set()
    for width, maps in zip((2, 3), classifier.model.scan(classifier.embed(batch.ids), batch.mask), strict=True):
        starts = set(maps.argmax(-1).flatten().tolist())
        assert len(starts) <= 6
        won |= {start + place for start in starts for place in range(width)}
    spans = {start for number, (start, _) in enumerate(classifier.encode(
        text, max_tokens=40, overlap=6, max_windows=None).offsets.tolist()) if number in won}  # fmt: skip
    nonzero = {word.start for word, score in found.words if score != 0}
    assert nonzero == {word.start for word, _ in found.words} & spans
    assert 0 < len(nonzero) < len(found.words)


def test_of_equal_windows_the_first_wins(shelf: Shelf) -> None:
    found = explain(shelf.classifier("textcnn"), " ".join(["phone"] * 8), bias_factor=1.0)
    assert [score != 0 for score in scores(found)] == [True] * 3 + [False] * 6


def test_filters_that_do_not_fire_hand_on_their_bias_share(shelf: Shelf) -> None:
    """All maps are zero after the ReLU: the window nearest to firing wins, not the first of the text."""

    def silence(model: Any) -> None:
        for convolution in model.convolutions:
            convolution.bias.sub_(100.0)

    classifier = edit(shelf, silence)
    found = explain(classifier, TEXTS[0], **CONSERVING)
    _, expected = slow(classifier, TEXTS[0], classifier.labels.index(found.label), 0.01, 1.0)
    np.testing.assert_allclose(scores(found), by_words(classifier, TEXTS[0], expected), rtol=0, atol=1e-10)
    assert scores(found).sum() == pytest.approx(found.target_score, abs=1e-10)
    assert (np.abs(scores(found)[4:]) > 1e-6).any()


def test_nothing_divided_by_nothing_is_nothing(shelf: Shelf) -> None:
    """Without a stabiliser, outputs that are exactly 0 have nothing to share."""

    def clear(model: Any) -> None:
        for convolution in model.convolutions:
            convolution.weight.zero_()
            convolution.bias.zero_()

    found = explain(edit(shelf, clear), TEXTS[0], eps=0.0)
    assert not scores(found).any()
    assert found.completeness_gap == pytest.approx(found.target_score)


# --- transformers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [None, 0.01])
@pytest.mark.parametrize("rule", ["attnlrp", "cp_lrp"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_equal_the_relevance_handed_from_layer_to_layer(
    shelf: Shelf, family: str, rule: str, eps: float | None
) -> None:
    classifier = shelf.classifier(family, dtype=torch.float64)
    oracle = oracles.TransformerRelevance(shelf.folder(family), rule, eps or 0.0)
    texts = [TEXTS[0], TEXTS[3]]
    for text, outcome in zip(texts, explainer(classifier, rule=rule, eps=eps).explain(texts), strict=True):
        (found,) = outcome
        (window,) = classifier.encode(text, max_tokens=40, overlap=6, max_windows=None).windows
        score, relevance = oracle.explain(window.ids, classifier.labels.index(found.label))
        content = relevance[~np.array(window.special)]
        np.testing.assert_allclose(scores(found), by_words(classifier, text, content), rtol=0, atol=1e-10)
        assert found.target_score == pytest.approx(score, abs=1e-10)
        assert found.completeness_gap == pytest.approx(score - content.sum(), abs=1e-10)
        assert (found.baseline_score, found.evaluations) == (0.0, 1)


def test_auto_means_the_first_rule_that_fits(shelf: Shelf) -> None:
    for family, rule in (("bert", "attnlrp"), ("textcnn", "epsilon")):
        classifier = shelf.classifier(family)
        np.testing.assert_array_equal(
            scores(explain(classifier, TEXTS[0])), scores(explain(classifier, TEXTS[0], rule=rule))
        )


def test_the_rules_are_not_each_other_nor_the_plain_gradient(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    found = [scores(explain(classifier, TEXTS[0], rule=rule)) for rule in ("attnlrp", "cp_lrp")]
    plain = by_words(classifier, TEXTS[0], gradient_times_input(classifier, TEXTS[0]))
    for one, other in ((found[0], found[1]), (found[0], plain), (found[1], plain)):
        assert np.abs(one - other).max() > 1e-2


def gradient_times_input(classifier: Classifier, text: str) -> np.ndarray:
    """Of the most probable label, without anything of ours but the classifier."""
    batch = classifier.collate(classifier.encode(text, max_tokens=40, overlap=6, max_windows=1).windows)
    x = classifier.embed(batch.ids).requires_grad_(True)
    (gradient,) = torch.autograd.grad(classifier.logits(x, batch.mask, batch.token_types).max(), x)
    return (x * gradient).sum(-1)[~batch.special].detach().double().numpy()


@pytest.mark.parametrize("family", [*TRANSFORMERS, "textcnn"])
def test_values_stay_as_they_are(shelf: Shelf, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that hands relevance back has the very logit of the pass that predicts."""
    classifier, visit = shelf.classifier(family), Evaluation.visit
    seen: list[Tensor] = []

    def spy(evaluation: Evaluation, rows: Tensor, place: Any, see: Any, **asked: Any) -> None:
        def keep(points: Tensor, values: Tensor, gradients: Tensor | None) -> None:
            seen.append(values)
            see(points, values, gradients)

        visit(evaluation, rows, place, keep, **asked)

    monkeypatch.setattr(Evaluation, "visit", spy)
    with count_passes(classifier) as passes:
        found = explain(classifier, TEXTS[0], eps=0.1)
    assert (passes.forward, passes.backward) == (2, 1)
    (values,) = seen
    assert values.tolist() == pytest.approx([found.target_score], abs=1e-6)


@pytest.mark.parametrize("family", [*TRANSFORMERS, "textcnn"])
def test_a_batch_gives_what_each_text_gives_alone(shelf: Shelf, family: str) -> None:
    classifier = shelf.classifier(family)
    texts = [*TEXTS, " ".join([TEXTS[0]] * 9)]
    together = explainer(classifier, budget=10_000).explain(texts)
    for text, (found,) in zip(texts, together, strict=True):
        ((alone,),) = explainer(classifier, budget=1).explain([text])
        np.testing.assert_allclose(scores(found), scores(alone), rtol=0, atol=BATCH_TOLERANCE)
        assert found.completeness_gap == pytest.approx(alone.completeness_gap, abs=BATCH_TOLERANCE)
        total = scores(found).sum() + found.completeness_gap
        assert total == pytest.approx(found.target_score, abs=1e-6)


@pytest.mark.parametrize("family", ["bert", "textcnn"])
def test_bfloat16_stays_near_float32(shelf: Shelf, family: str) -> None:
    short = explain(shelf.classifier(family, dtype=torch.bfloat16), TEXTS[0])
    long = explain(shelf.classifier(family), TEXTS[0])
    assert short.label == long.label
    assert np.abs(scores(short) - scores(long)).max() < 0.1 * np.abs(scores(long)).max()


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("albert", {}, "model_type='albert' must be one of textcnn, bert"),
        ("deberta-v2", {}, "model_type='deberta-v2'"),
        ("modernbert", {"rule": "attnlrp"}, "model_type='modernbert'"),
        ("bert", {"rule": "epsilon"}, "method.rule='epsilon' must be attnlrp or cp_lrp for a bert model"),
        ("textcnn", {"rule": "cp_lrp"}, "method.rule='cp_lrp' must be epsilon for a textcnn model"),
        ("bert", {"bias_factor": 1.0}, "method.bias_factor=1 must be 0 for a bert model"),
    ],
)
def test_what_has_no_rule_is_refused(shelf: Shelf, family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        explain(shelf.classifier(family), TEXTS[0], **options)
    assert ("textcnn", *TRANSFORMERS) == METHODS["lrp.v1"].models


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "gelu_new"), ("_attn_implementation", "eager")])
def test_layers_of_another_make_are_refused(shelf: Shelf, field: str, value: str) -> None:
    """The pieces of `gelu_new` and of the eager attention would each get a rule, or none."""
    classifier = Classifier.load(shelf.folder("bert"))
    setattr(classifier.model.config, field, value)
    with pytest.raises(ModelError, match=f"for lrp, and has .*{value}"):
        explain(classifier, TEXTS[0])


# --- what is left behind ----------------------------------------------------------------------------------------


class Interruption(Exception):
    """Comes out of the middle of a pass."""


@pytest.mark.parametrize("broken", [False, True], ids=["success", "exception"])
@pytest.mark.parametrize("family", [*TRANSFORMERS, "textcnn"])
def test_e18_nothing_stays_behind(shelf: Shelf, family: str, broken: bool) -> None:
    """LXT replaces LayerNorm.forward for the whole process; captum's LRP changes weights."""
    classifier = Classifier.load(shelf.folder(family))
    model = classifier.model
    plain = gradient_times_input(classifier, TEXTS[0])
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    holders = [*{type(module) for module in model.modules()}, functional, torch, Tensor]
    attributes = [dict(vars(holder)) for holder in holders]
    own = [set(vars(module)) for module in model.modules()]
    if broken:
        with pytest.raises(Interruption):
            interrupt(classifier)
    else:
        explain(classifier, TEXTS[0])
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    assert [dict(vars(holder)) for holder in holders] == attributes
    assert [set(vars(module)) for module in model.modules()] == own
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    np.testing.assert_array_equal(gradient_times_input(classifier, TEXTS[0]), plain)


def interrupt(classifier: Classifier) -> None:
    """Explain, and fail in the last layer of the pass that records gradients."""
    last = [module for module in classifier.model.modules() if isinstance(module, torch.nn.Linear)][-1]

    def fail(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            raise Interruption

    handle = last.register_forward_pre_hook(fail)
    try:
        explain(classifier, TEXTS[0])
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["bert", "textcnn"])
def test_other_methods_may_use_the_model_meanwhile(shelf: Shelf, family: str) -> None:
    """Another thread's LRP stands still in the middle of its pass while this one explains with the same network."""
    classifier = Classifier.load(shelf.folder(family))
    alone = (
        explain(classifier, TEXTS[0]),
        explain(classifier, TEXTS[0], method="integrated_gradients", rule="midpoint", nodes=5),
    )
    inside, done = threading.Event(), threading.Event()
    found: list[Explanation] = []
    worker = threading.Thread(target=lambda: found.append(explain(classifier, TEXTS[0])))

    def wait(module: torch.nn.Module, args: Any) -> None:
        if threading.current_thread() is worker and torch.is_grad_enabled():
            inside.set()
            assert done.wait(60)

    handle = classifier.model.register_forward_pre_hook(wait)
    try:
        worker.start()
        assert inside.wait(60)
        found.append(explain(classifier, TEXTS[0], method="integrated_gradients", rule="midpoint", nodes=5))
        meanwhile = explain(classifier, TEXTS[0])
        done.set()
        worker.join(60)
    finally:
        done.set()
        handle.remove()
    np.testing.assert_array_equal(scores(found[0]), scores(alone[1]))
    np.testing.assert_array_equal(scores(found[1]), scores(alone[0]))
    np.testing.assert_array_equal(scores(meanwhile), scores(alone[0]))
