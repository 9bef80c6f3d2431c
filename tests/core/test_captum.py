"""captum's methods behind our interface: against captum as its own users call it, closed forms, and slow re-statements."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from captum import attr
from captum._utils.models.linear_model import SkLearnLasso
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import oracles
from core.models import BATCH_TOLERANCE, FAMILIES, TEXTS, Shelf
from core.test_controls import with_words
from core.test_engine import LONG_TEXT, MULTI_LABEL, assert_close, explanations, only, word_scores
from core.test_gradients import explainer, run_and_keep
from core.test_methods import Formula, points
from lexplain.classifier import Classifier
from lexplain.errors import ModelError
from lexplain.explanation import Rejection
from lexplain.methods import METHODS, find_method
from lexplain.methods.captum import gradient_shap, layer_integrated_gradients, lime, shapley_value_sampling

NAMES = ("layer_integrated_gradients", "gradient_shap", "deep_lift", "lime", "shapley_value_sampling")
PAIRS = [
    (f"captum.{name}", "textcnn" if name == "deep_lift" else family) for name in NAMES for family in ("bert", "textcnn")
]
PAIRS = sorted(set(PAIRS))
FEW = {
    "captum.lime": {"n_samples": 20},
    "captum.shapley_value_sampling": {"n_samples": 3},
    "captum.gradient_shap": {"n_samples": 7},
}


class User:
    """What somebody who calls captum directly has: a model and a tokenizer of transformers, and one text."""

    def __init__(self, shelf: Shelf, family: str, text: str) -> None:
        folder = shelf.folder(family)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        self.ids, self.mask = encoded["input_ids"], encoded["attention_mask"]
        self.content = encoded["special_tokens_mask"][0] == 0
        empty = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.pad_token_id
        self.empty = torch.where(self.content, empty, self.ids)
        with torch.no_grad():
            self.target = int(self.logits(self.ids, self.mask)[0].argmax())

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids).detach()[:, self.content]

    def score(self, content: Tensor) -> Tensor:
        """The target's logit, with these embeddings between the special tokens."""
        whole = self.model.get_input_embeddings()(self.ids).detach().repeat(len(content), 1, 1)
        whole[:, self.content] = content
        mask = self.mask.expand(len(content), -1)
        return self.model(inputs_embeds=whole, attention_mask=mask).logits[:, self.target]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


# --- against captum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "textcnn"])
@pytest.mark.parametrize("rule", ["gausslegendre", "riemann_left"])
def test_integrated_gradients_are_those_of_the_embedding_layer(shelf: Shelf, family: str, rule: str) -> None:
    user = User(shelf, family, TEXTS[0])
    layer = attr.LayerIntegratedGradients(user.logits, user.model.get_input_embeddings())
    expected = layer.attribute(
        user.ids, user.empty, target=user.target, additional_forward_args=(user.mask,), n_steps=7, method=rule
    )
    classifier = shelf.classifier(family, dtype=torch.float64)
    _, found = run_and_keep(classifier, "captum.layer_integrated_gradients", [TEXTS[0]], n_steps=7, rule=rule)
    np.testing.assert_allclose(found.scores[0], expected.sum(-1)[0].detach(), rtol=0, atol=1e-6)
    assert found.evaluations.tolist() == [7]


@pytest.mark.parametrize("family", ["bert", "roberta", "textcnn"])
def test_gradient_shap_draws_as_captum_does(shelf: Shelf, family: str) -> None:
    user = User(shelf, family, TEXTS[0])
    options = {"n_samples": 7, "stdevs": 0.2}
    inputs, found = run_and_keep(
        shelf.classifier(family, dtype=torch.float64), "captum.gradient_shap", [TEXTS[0]], **options
    )
    x, empty = user.embed(user.ids), user.embed(user.empty)
    seed_all(int(inputs.seeds[0]))
    first, rest = (
        attr.GradientShap(user.score)
        .attribute(x, empty, n_samples=size, stdevs=0.2 * float(x.std(correction=0)))
        .sum(-1)
        for size in (5, 2)
    )
    expected = (5 * first[0] + 2 * rest[0]) / 7
    np.testing.assert_allclose(found.scores[0, user.content], expected.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "roberta", "textcnn"])
@pytest.mark.parametrize("name", ["lime", "shapley_value_sampling"])
def test_methods_on_words_are_captums(shelf: Shelf, family: str, name: str) -> None:
    user = User(shelf, family, TEXTS[1])
    options = FEW[f"captum.{name}"]
    inputs, found = run_and_keep(shelf.classifier(family, dtype=torch.float64), f"captum.{name}", [TEXTS[1]], **options)
    numbers = inputs.words[0, user.content]  # the text has no punctuation
    theirs: Any = attr.ShapleyValueSampling(user.score)
    if name == "lime":
        theirs = attr.Lime(user.score, interpretable_model=SkLearnLasso(alpha=0.01))
    seed_all(int(inputs.seeds[0]))
    expected = theirs.attribute(
        user.embed(user.ids), user.embed(user.empty), feature_mask=numbers[None, :, None], **options
    )
    tokens = torch.tensor([int((numbers == number).sum()) for number in numbers])
    assert family == "textcnn" or int(tokens.max()) > 1
    np.testing.assert_allclose(found.scores[0, user.content], expected[0, :, 0] / tokens, rtol=0, atol=1e-7)
    assert float(found.scores.abs().max()) > 0


def test_deep_lift_of_a_textcnn_equals_the_slow_one(shelf: Shelf) -> None:
    classifier = shelf.classifier("textcnn", dtype=torch.float64)
    filters, output, _ = oracles.textcnn_weights(classifier.model)
    inputs, found = run_and_keep(classifier, "captum.deep_lift", [TEXTS[0], TEXTS[1]])
    for row in range(2):
        length = int(inputs.mask[row].sum())
        x, baseline = (part[row, :length].double().numpy() for part in (inputs.x, inputs.baseline))
        logits = classifier.logits(inputs.x[[row]], inputs.mask[[row]], None)[0]
        label = int((logits - inputs.target_score[row]).abs().argmin())
        expected = oracles.textcnn_deep_lift(x, baseline, filters, output, label)
        np.testing.assert_allclose(found.scores[row, :length], expected.sum(-1), rtol=0, atol=1e-9)
    assert float(found.completeness_gap.abs().max()) < 1e-9


@pytest.mark.parametrize("text", ["phone", "the phone", "a new phone"])
def test_deep_lift_of_texts_about_as_long_as_the_filters_is_complete(shelf: Shelf, text: str) -> None:
    found = only(
        explainer(shelf.classifier("textcnn", dtype=torch.float64), find_method("captum.deep_lift")).explain([text])[0]
    )
    assert found.target_score != found.baseline_score
    assert abs(found.completeness_gap) < 1e-9


# --- closed forms -------------------------------------------------------------------------------------------------


def linear(rows: int) -> tuple[Formula, Tensor]:
    """A linear function of five tokens: the second and third are a word, the last is special; and w (x - x')."""
    x, baseline = points(2, rows=rows, tokens=5, size=4)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    formula = Formula(lambda point: (weight * point).sum((1, 2)) + 3, x, baseline)
    formula.inputs = with_words(formula.inputs, [[0, 1, 1, -1, -1]] * rows, [[0, 0, 0, 0, 1]] * rows)
    formula.baseline = formula.inputs.baseline
    return formula, (weight * (x - formula.baseline)).sum(-1)


def test_a_linear_function_gives_weight_times_difference() -> None:
    formula, expected = linear(3)
    word = expected[:, 1:3].mean(1)
    by_word = torch.stack([expected[:, 0], word, word, expected[:, 3], expected[:, 4]], dim=1)
    for function, options, answer in (
        (layer_integrated_gradients, {"n_steps": 3}, expected),
        (gradient_shap, {"n_samples": 4}, expected),
        (shapley_value_sampling, {"n_samples": 2}, by_word),
        (lime, {"n_samples": 400, "alpha": 1e-6}, by_word),
    ):
        found = function(formula, formula.inputs, **options)
        torch.testing.assert_close(found.scores, answer, rtol=0, atol=1e-4)
        assert (found.scores[:, 4] == 0).all()


def test_noise_of_gradient_shap_is_a_share_of_the_spread() -> None:
    """F = w x with noise e: each score is w (x + e - x'), its deviation |w| times the noise's."""
    x = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64)  # standard deviation 1
    formula = Formula(lambda point: 3 * point[:, 0, 0], x, x - 1)
    found = gradient_shap(formula, formula.inputs, n_samples=2000, stdevs=0.5).scores
    assert float(found[0, 0]) == pytest.approx(3.0, abs=4 * 3 * 0.5 / 2000**0.5)
    assert float(found[0, 0]) != 3.0
    assert float(found[0, 1]) == 0.0


def test_shapley_values_equal_the_slow_ones() -> None:
    """A product of tokens, where what a word adds depends on those that are there."""
    x, baseline = points(4, rows=2, tokens=6, size=3)
    weight = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def score(point: Tensor) -> Tensor:
        return torch.tanh(point @ weight).cumsum(-1).prod(-1)

    formula = Formula(score, x, baseline)
    inputs = with_words(formula.inputs, [[-1, 0, 0, 1, -1, -1], [-1, 2, 3, 3, 3, -1]], [[1, 0, 0, 0, 0, 1]] * 2)
    formula.baseline = inputs.baseline
    found = shapley_value_sampling(formula, inputs, n_samples=6)
    for row, words in enumerate([[[1, 2], [3], [4]], [[1], [2, 3, 4]]]):
        torch.manual_seed(int(inputs.seeds[row]))
        orders = [torch.randperm(len(words)).tolist() for _ in range(6)]
        expected = oracles.shapley_values(
            lambda point: score(point[None])[0], x[row], inputs.baseline[row], words, orders
        )
        np.testing.assert_allclose(found.scores[row], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.completeness_gap, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_scores_do_not_depend_on_batch_mates(shelf: Shelf, name: str, family: str) -> None:
    classifier = shelf.classifier(family, dtype=torch.float64)
    texts, options = [*TEXTS, LONG_TEXT], FEW.get(name, {})
    together = explainer(classifier, find_method(name), **options).explain(texts)
    assert [only(outcome).n_windows for outcome in together][-1] > 1
    for text, outcome in zip(texts, together, strict=True):
        alone = explainer(classifier, find_method(name), budget_tokens=1, **options).explain([text])[0]
        assert_close(only(outcome), only(alone), 1e-6)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_only_content_has_scores_and_complete_ones_sum_up(shelf: Shelf, name: str, family: str) -> None:
    inputs, found = run_and_keep(shelf.classifier(family), name, list(TEXTS), **FEW.get(name, {}))
    assert not inputs.mask.all()
    assert (found.scores[inputs.special] == 0).all()
    assert found.scores.isfinite().all()
    explained = (found.scores != 0).any(dim=1)
    assert explained.any() if name == "captum.lime" else explained.all()  # its lasso may drop every word
    if METHODS[f"{name}.v1"].complete and name != "captum.layer_integrated_gradients":
        assert float(found.completeness_gap.abs().max()) < BATCH_TOLERANCE


@pytest.mark.parametrize("name", [f"captum.{name}" for name in NAMES])
def test_targets_have_scores_of_their_own(shelf: Shelf, name: str) -> None:
    family = "textcnn" if name == "captum.deep_lift" else "bert"
    classifier = shelf.classifier(family, problem_type=MULTI_LABEL, labels=tuple("abcdefgh"), dtype=torch.float64)
    options = FEW.get(name, {}) | ({"n_samples": 40} if name == "captum.lime" else {})
    every = explainer(classifier, find_method(name), **options)
    found = explanations(every.explain([TEXTS[0]])[0])
    assert len(found) > 1
    for one in found[1:]:
        assert not np.allclose(word_scores(one), word_scores(found[0]))


@pytest.mark.parametrize("name", [f"captum.{name}" for name in NAMES])
def test_a_one_logit_model_has_both_signs(shelf: Shelf, name: str) -> None:
    classifier = shelf.classifier("textcnn", labels=("spam",), dtype=torch.float64)
    options = {"n_samples": 40, "alpha": 1e-4} if name == "captum.lime" else FEW.get(name, {})
    one, other = explanations(explainer(classifier, find_method(name), top_k=2, **options).explain([TEXTS[0]])[0])
    assert {one.label, other.label} == {"spam", "not spam"}
    assert one.target_score == -other.target_score
    assert np.abs(word_scores(one)).max() > 1e-3
    np.testing.assert_allclose(word_scores(one), -word_scores(other), rtol=0, atol=1e-6)
    if name in ("captum.deep_lift", "captum.shapley_value_sampling"):
        assert max(abs(one.completeness_gap), abs(other.completeness_gap)) < 1e-6


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_nothing_is_left_behind(shelf: Shelf, name: str, family: str) -> None:
    """No hook, no attribute of a module, no gradient, and nobody's random numbers move; twice the same."""
    classifier = shelf.classifier(family)
    weights = {key: weight.clone() for key, weight in classifier.model.state_dict().items()}
    attributes = [set(vars(module)) for module in classifier.model.modules()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first, second = (
        explainer(classifier, find_method(name), **FEW.get(name, {})).explain(list(TEXTS[:2])) for _ in range(2)
    )
    assert [only(one).words for one in first] == [only(one).words for one in second]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1][1])
    assert np.random.get_state()[2] == states[1][2]
    assert random.getstate() == states[2]
    assert all(torch.equal(weight, weights[key]) for key, weight in classifier.model.state_dict().items())
    assert [set(vars(module)) for module in classifier.model.modules()] == attributes
    for module in classifier.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(weight.grad is None and not weight.requires_grad for weight in classifier.model.parameters())


class Memory:
    """Lets a classifier's passes fail that hold more than so many sequences."""

    def __init__(self, classifier: Classifier, monkeypatch: pytest.MonkeyPatch, sequences: int) -> None:
        original = classifier.logits

        def logits(embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
            if len(embeddings) > sequences:
                raise torch.OutOfMemoryError
            return original(embeddings, mask, token_types)

        monkeypatch.setattr(classifier, "logits", logits)


@pytest.mark.parametrize("name", ["captum.layer_integrated_gradients", "captum.lime", "captum.shapley_value_sampling"])
def test_passes_shrink_when_memory_runs_out(shelf: Shelf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    options = FEW.get(name, {})
    expected = only(explainer(classifier, find_method(name), **options).explain([TEXTS[0]])[0])
    Memory(classifier, monkeypatch, 2)
    small = explainer(classifier, find_method(name), **options)
    assert_close(only(small.explain([TEXTS[0]])[0]), expected, 1e-6)
    assert small.budget_tokens < 600


def test_a_text_that_does_not_fit_is_rejected(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepLIFT needs the text and its baseline in one pass."""
    classifier = shelf.classifier("textcnn")
    Memory(classifier, monkeypatch, 1)
    small = explainer(classifier, find_method("captum.deep_lift"))
    outcome = small.explain([TEXTS[0]])[0]
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "out_of_memory"
    assert small.budget_tokens == 600, "smaller passes do not help it"


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:captum")
@pytest.mark.parametrize("family", FAMILIES)
def test_deep_lift_refuses_transformers_since_captum_is_wrong_there(shelf: Shelf, family: str) -> None:
    """Nothing in these models is a module that captum has a rule for: its scores miss the difference by far."""
    with pytest.raises(ModelError, match=r"model_type=.* must be one of textcnn for captum\.deep_lift\.v1"):
        explainer(shelf.classifier(family), find_method("captum.deep_lift"))
    user = User(shelf, family, TEXTS[0])

    class Scored(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = user.model

        def forward(self, content: Tensor) -> Tensor:
            return user.score(content)

    x, empty = user.embed(user.ids), user.embed(user.empty)
    found = attr.DeepLift(Scored()).attribute(x, empty).detach()
    with torch.no_grad():
        difference = user.score(x) - user.score(empty)
    assert abs(float(found.sum() - difference)) > 0.1 * abs(float(difference))


def test_they_are_listed_as_not_batched() -> None:
    assert {method.id for method in METHODS.values() if not method.batched} == {f"captum.{name}.v1" for name in NAMES}
    assert find_method("captum.lime").id == "captum.lime.v1"
