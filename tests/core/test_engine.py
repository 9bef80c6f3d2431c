"""Explainer: against captum and a slow float64 oracle, windows, batches, memory, rejections."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import oracles
from core.models import BATCH_TOLERANCE, FAMILIES, TEXTS, Shelf, count_passes
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.errors import ModelError, PlanError
from lexplain.explanation import Explanation, Outcome, Rejection
from lexplain.methods import Attribution, Evaluate, Inputs, find_method
from lexplain.words import segment

LONG_TEXT = " ".join(
    f"The bank warned of {number} weak quarters, the unbelievable striker scored." for number in range(9)
)
MULTI_LABEL = "multi_label_classification"
LABELS = ("business", "politics", "NA")


def explainer(classifier: Classifier, *, method: Any = None, **changes: Any) -> Explainer:
    """An explainer with windows of 40 tokens and 9 nodes, unless told otherwise."""
    settings = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum", "budget_tokens": 600}
    names = [name for name in changes if name in settings]
    settings |= {name: changes.pop(name) for name in names}
    settings |= {name: changes.pop(name) for name in ("prepared", "top_k") if name in changes}
    options = changes if changes.get("rule") == "adaptive" else {"rule": "midpoint", "nodes": 9} | changes
    method = method or find_method("integrated_gradients")
    return Explainer(classifier, method, options, **settings)


def explanations(outcome: Outcome) -> list[Explanation]:
    assert isinstance(outcome, list)
    return outcome


def only(outcome: Outcome) -> Explanation:
    (explanation,) = explanations(outcome)
    return explanation


def word_scores(explanation: Explanation) -> np.ndarray:
    """Word scores in the order of the text, then what is outside words."""
    in_order = sorted(explanation.words, key=lambda pair: pair[0].start)
    return np.array([*(score for _, score in in_order), explanation.other_score])


def assert_close(found: Explanation, expected: Explanation, tolerance: float = BATCH_TOLERANCE) -> None:
    """Equal in everything countable, and within the tolerance in every figure."""
    for field in dataclasses.fields(Explanation):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, float) and field.name != "completeness_gap_relative":
            assert mine == pytest.approx(theirs, abs=tolerance), field.name
        elif field.name not in ("words", "completeness_gap_relative"):
            assert mine == theirs, field.name
    np.testing.assert_allclose(word_scores(found), word_scores(expected), rtol=0, atol=tolerance)


class Spy:
    """Integrated Gradients that keeps what it was given and what it returned."""

    def __init__(self) -> None:
        original = find_method("integrated_gradients")
        self.seen: list[tuple[Inputs, Attribution]] = []

        def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
            attribution = original.function(evaluate, inputs, **options)
            self.seen.append((inputs, attribution))
            return attribution

        self.method = dataclasses.replace(original, function=function)


# --- against captum and the oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_captums(shelf: Shelf, family: str, padded: bool) -> None:
    """captum's IntegratedGradients on a function of embeddings, with its two rules that are right."""
    captum = pytest.importorskip("captum.attr")
    classifier = shelf.classifier(family)
    texts = list(TEXTS) if padded else [TEXTS[0]]
    for rule, name in (("midpoint", "riemann_middle"), ("gauss_legendre", "gausslegendre")):
        spy = Spy()
        found = explainer(classifier, method=spy.method, rule=rule, nodes=12, max_windows=1, budget_tokens=10_000)
        outcomes = found.explain(texts)
        ((inputs, attribution),) = spy.seen
        labels = {text: classifier.labels.index(only(o).label) for text, o in zip(texts, outcomes, strict=True)}
        by_length = sorted(texts, key=lambda text: -len(classifier.encode(
            text, max_tokens=40, overlap=6, max_windows=1).windows[0].ids))  # fmt: skip

        def logits(embeddings: Tensor, mask: Tensor) -> Tensor:
            return classifier.logits(embeddings, mask, None)

        expected = captum.IntegratedGradients(logits).attribute(
            inputs.x, inputs.baseline, target=[labels[text] for text in by_length],
            additional_forward_args=(inputs.mask,), n_steps=12, method=name,
        )  # fmt: skip
        np.testing.assert_allclose(attribution.scores, expected.sum(-1).detach(), rtol=0, atol=BATCH_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["midpoint", "trapezoid", "gauss_legendre"])
def test_explanations_equal_the_slow_ones(shelf: Shelf, family: str, rule: str) -> None:
    """In float64 to ten digits: windows, batches, padding and shared passes change nothing."""
    slow = oracles.SlowExplainer(shelf.folder(family))
    classifier = shelf.classifier(family, dtype=torch.float64)
    mask_token = AutoTokenizer.from_pretrained(shelf.folder(family)).mask_token
    texts = [*TEXTS, LONG_TEXT]
    for text, outcome in zip(texts, explainer(classifier, rule=rule, nodes=5).explain(texts), strict=True):
        found = only(outcome)
        expected = slow.integrated_gradients(
            text, LABELS.index(found.label), baseline=mask_token, rule=rule, nodes=5, max_tokens=40, overlap=6
        )
        spans = [(word.start, word.end) for word, _ in sorted(found.words, key=lambda pair: pair[0].start)]
        words, other = oracles.words_by_character(text, spans, expected.offsets, expected.token_scores.tolist())
        np.testing.assert_allclose(word_scores(found), [*words, other], rtol=0, atol=1e-10)
        assert found.target_score == pytest.approx(expected.target_score, abs=1e-10)
        assert found.baseline_score == pytest.approx(expected.baseline_score, abs=1e-10)
        gap = expected.target_score - expected.baseline_score - expected.token_scores.sum()
        assert found.completeness_gap == pytest.approx(gap, abs=1e-10)
        assert found.token_norm == pytest.approx(np.linalg.norm(expected.token_scores), abs=1e-10)
        assert (found.n_windows, found.n_tokens) == (expected.n_windows, len(expected.offsets))
        assert found.evaluations == 5 * expected.n_windows


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_stays_within_the_tolerance_of_float64(shelf: Shelf, family: str) -> None:
    texts = [*TEXTS, LONG_TEXT]
    long = explainer(shelf.classifier(family, dtype=torch.float64)).explain(texts)
    short = explainer(shelf.classifier(family)).explain(texts)
    for found, expected in zip(short, long, strict=True):
        assert_close(only(found), only(expected))


def test_bfloat16_is_told_by_its_gap(shelf: Shelf) -> None:
    """E5: a shorter body costs accuracy; the gap says how much, and paths stay in float32."""
    short = only(explainer(shelf.classifier("bert", dtype=torch.bfloat16), nodes=200).explain([TEXTS[0]])[0])
    long = only(explainer(shelf.classifier("bert"), nodes=200).explain([TEXTS[0]])[0])
    np.testing.assert_allclose(word_scores(short), word_scores(long), rtol=0, atol=0.1)
    assert abs(long.completeness_gap) < abs(short.completeness_gap) < 0.1


# --- completeness and signs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness_comes_with_nodes(shelf: Shelf, family: str) -> None:
    texts = [*TEXTS[:2], LONG_TEXT[:300]]
    worst = []
    for nodes in (4, 24, 144):
        outcomes = explainer(shelf.classifier(family), nodes=nodes).explain(texts)
        worst.append(max(abs(only(outcome).completeness_gap) for outcome in outcomes))
        for outcome in outcomes:
            found = only(outcome)
            difference = found.target_score - found.baseline_score
            assert word_scores(found).sum() + found.completeness_gap == pytest.approx(difference, abs=1e-9)
            assert found.completeness_gap_relative == pytest.approx(abs(found.completeness_gap / difference))
    assert worst[0] > worst[1] > worst[2]
    assert worst[2] < worst[0] / 20


def test_e2_the_pad_baseline_of_roberta_is_complete(shelf: Shelf) -> None:
    """captum takes its delta from token ids: with `<pad>` RoBERTa's positions change too, and the delta is wrong."""
    outcomes = explainer(shelf.classifier("roberta"), baseline="pad", nodes=200).explain(TEXTS)
    found = [only(outcome) for outcome in outcomes]
    assert max(abs(each.target_score - each.baseline_score) for each in found) > 0.1
    assert max(abs(each.completeness_gap) for each in found) < 1e-3


def test_e9_e10_scores_have_both_signs_and_explain_the_logit(shelf: Shelf) -> None:
    """interpreto's scores are absolute values; transformers-interpret explains the probability, which saturates."""
    found = only(explainer(shelf.classifier("bert"), nodes=100).explain([LONG_TEXT])[0])
    scores = word_scores(found)
    assert (scores > 0).any()
    assert (scores < 0).any()
    assert found.target_score == pytest.approx(found.baseline_score + scores.sum(), abs=1e-3)
    assert 0 < found.probability < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_and_padding_have_no_score(shelf: Shelf, family: str) -> None:
    spy = Spy()
    explainer(shelf.classifier(family), method=spy.method, max_windows=1, budget_tokens=10_000).explain(TEXTS)
    ((inputs, attribution),) = spy.seen
    assert not inputs.mask.all()
    assert (attribution.scores[~inputs.mask] == 0).all()
    last = inputs.mask.sum(1) - 1
    assert (attribution.scores[torch.arange(len(last)), last] == 0).all()
    assert (attribution.scores[:, 0] == 0).all()
    assert (attribution.scores[:, 1] != 0).all()


def test_a_text_that_equals_its_baseline_has_no_relative_gap(shelf: Shelf) -> None:
    found = only(explainer(shelf.classifier("bert"), baseline="phone").explain(["phone"])[0])
    assert found.completeness_gap_relative is None or found.completeness_gap == 0.0
    assert found.token_norm == 0.0


# --- windows ----------------------------------------------------------------------------------------------------


def test_e15_a_text_of_583_tokens_is_explained_whole(shelf: Shelf) -> None:
    """transformers-interpret crashes past the model's positions; others cut in silence."""
    classifier = shelf.classifier("bert")
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder("bert"))
    whole = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 2]
    text = " ".join(whole[number % len(whole)] for number in range(583))
    found = only(explainer(classifier, max_tokens=64, overlap=8, nodes=48).explain([text])[0])
    assert found.n_tokens == len(tokenizer(text)["input_ids"]) - 2 == 583
    assert [(word.start, word.end) for word, _ in sorted(found.words, key=lambda pair: pair[0].start)] == [
        (word.start, word.end) for word in segment(text)
    ]
    assert found.n_windows == 11
    assert found.evaluations == 48 * 11
    difference = found.target_score - found.baseline_score
    assert word_scores(found).sum() + found.completeness_gap == pytest.approx(difference, abs=1e-9)
    assert abs(found.completeness_gap) < 5e-3


def test_three_windows_are_complete_for_the_mean_logit(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    text = " ".join([TEXTS[0]] * 6)
    found = only(explainer(classifier, nodes=400).explain([text])[0])
    encoding = classifier.encode(text, max_tokens=40, overlap=6, max_windows=None)
    assert found.n_windows == len(encoding.windows) == 3
    batch = classifier.collate(encoding.windows)
    logits = classifier.logits(classifier.embed(batch.ids), batch.mask, batch.token_types)
    assert found.target_score == pytest.approx(logits[:, LABELS.index(found.label)].mean().item(), abs=1e-12)
    assert found.probability == pytest.approx(logits.mean(0).softmax(-1).max().item(), abs=1e-12)
    difference = found.target_score - found.baseline_score
    assert word_scores(found).sum() == pytest.approx(difference, abs=1e-5)


def test_a_word_cut_by_a_windows_edge_is_one_word(shelf: Shelf) -> None:
    """Its tokens lie in two windows; none is lost, none counted twice."""
    classifier = shelf.classifier("bert")
    word = "unbelievable"
    text = " ".join([word] * 12)
    encoding = classifier.encode(text, max_tokens=12, overlap=0, max_windows=None)
    cuts = [encoding.offsets[window.start, 0] for window in encoding.windows[1:]]
    assert any(text[cut - 1] != " " for cut in cuts), "a window must start within a word"
    found = only(explainer(classifier, max_tokens=12, overlap=0, nodes=300).explain([text])[0])
    assert [each.key for each, _ in found.words] == [word] * 12
    step = len(word) + 1
    assert {(each.start, each.end) for each, _ in found.words} == {(step * i, step * (i + 1) - 1) for i in range(12)}
    difference = found.target_score - found.baseline_score
    assert word_scores(found).sum() == pytest.approx(difference, abs=2e-3)
    assert found.n_tokens == len(encoding.offsets)


def test_one_window_that_did_not_converge_is_told(shelf: Shelf) -> None:
    original = find_method("integrated_gradients")

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        attribution = original.function(evaluate, inputs, **options)
        return dataclasses.replace(attribution, converged=inputs.mask.sum(1) < inputs.mask.shape[1])

    method = dataclasses.replace(original, function=function)
    text = " ".join([TEXTS[0]] * 4)
    found = explainer(shelf.classifier("bert"), method=method, budget_tokens=5000).explain([text, "phone"])
    assert only(found[0]).n_windows == 2
    assert not only(found[0]).converged
    assert only(found[1]).converged
    assert only(explainer(shelf.classifier("bert")).explain([text])[0]).converged


def test_words_that_no_window_held_are_not_listed(shelf: Shelf) -> None:
    """A word the model never saw has no score, which is not a score of 0."""
    classifier = shelf.classifier("bert")
    found = only(explainer(classifier, max_windows=1).explain([LONG_TEXT])[0])
    seen = classifier.encode(LONG_TEXT, max_tokens=40, overlap=6, max_windows=1).offsets
    assert found.n_windows == 1
    assert found.n_tokens == 38
    assert max(word.start for word, _ in found.words) < seen[:, 1].max() < len(LONG_TEXT)
    assert_close(only(explainer(classifier, max_windows=1).explain([LONG_TEXT[: seen[-1, 1]]])[0]), found, 0.0)


# --- batches ----------------------------------------------------------------------------------------------------


def many_texts() -> list[str]:
    """Texts of many lengths, some of them twice."""
    words = LONG_TEXT.split() + TEXTS[2].split()
    generator = random.Random(3)
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 30))) for _ in range(10)]
    return [*texts, *texts[:3], "!?", ""]


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_mates_move_a_score_by_rounding_only(shelf: Shelf, family: str) -> None:
    texts = many_texts()
    together = explainer(shelf.classifier(family), nodes=4, budget_tokens=2000).explain(texts)
    alone = explainer(shelf.classifier(family), nodes=4, budget_tokens=1)
    for text, outcome in zip(texts, together, strict=True):
        (expected,) = alone.explain([text])
        if isinstance(outcome, Rejection):
            assert outcome == expected
        else:
            assert_close(only(outcome), only(expected))


def test_the_order_of_the_texts_changes_nothing(shelf: Shelf) -> None:
    """To the last bit, also where texts of one length compete for the places of a pass."""
    words = ["party", "tax", "team", "bank", "phone", "final", "cup"]
    texts = [*many_texts(), *(" ".join(words[:i] + words[i + 1 :]) for i in range(7))]
    found = explainer(shelf.classifier("bert"), budget_tokens=150)
    expected = found.explain(texts)
    for seed in range(4):
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        assert found.explain([texts[number] for number in order]) == [expected[number] for number in order]
    assert expected[10:13] == expected[:3]


def test_equal_texts_are_explained_once(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    with count_passes(classifier) as once:
        explainer(classifier).explain([TEXTS[0]])
    with count_passes(classifier) as thrice:
        outcomes = explainer(classifier).explain([TEXTS[0]] * 3)
    assert outcomes[0] == outcomes[2]
    assert once == thrice


@pytest.mark.parametrize("budget", [1, 60, 300, 5000])
def test_e4_points_share_passes_under_the_budget(shelf: Shelf, budget: int) -> None:
    """captum cannot go below one point of every document, and ignores their lengths."""
    classifier = shelf.classifier("bert")
    texts = [LONG_TEXT, *TEXTS]
    windows = sum(len(classifier.encode(t, max_tokens=40, overlap=6, max_windows=None).windows) for t in texts)
    with count_passes(classifier) as passes:
        outcomes = explainer(classifier, budget_tokens=budget).explain(texts)
    assert passes.largest_tokens <= max(budget, 40)
    baselines = {
        (len(window.ids), only(outcome).label)
        for text, outcome in zip(texts, outcomes, strict=True)
        for window in classifier.encode(text, max_tokens=40, overlap=6, max_windows=None).windows
    }
    # one prediction and nine nodes for each window; windows of equal length and target in a batch share a baseline
    shared = passes.sequences - 10 * windows
    assert len(baselines) <= shared <= windows
    assert budget < 5000 or shared == len(baselines) < windows
    assert passes.forward >= passes.sequences * 2 / max(budget, 2)
    if budget == 1:
        assert passes.forward == passes.sequences
    if budget == 5000:
        assert passes.forward <= 5


def test_the_trapezoid_takes_no_pass_for_the_baseline(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    with count_passes(classifier) as passes:
        explainer(classifier, rule="trapezoid").explain(TEXTS[:2])
    assert passes.sequences == 2 * (1 + 9)


def test_e11_targets_of_a_text_share_the_forward_part_of_a_pass(shelf: Shelf) -> None:
    """interpreto takes one backward a document and target over the whole batch; captum one forward a target."""
    classifier = shelf.classifier("bert", labels=tuple("abcdef"), problem_type=MULTI_LABEL, seed=1)
    outcomes = dict(zip(TEXTS, explainer(classifier).explain(TEXTS), strict=True))
    windows = {t: classifier.encode(t, max_tokens=40, overlap=6, max_windows=None).windows for t in TEXTS}
    # those of equal length would share their baseline
    texts = list({len(found[0].ids): text for text, found in windows.items() if len(found) == 1}.values())
    targets = [len(explanations(outcomes[text])) for text in texts]
    assert max(targets) >= 3
    with count_passes(classifier) as passes:
        explainer(classifier, budget_tokens=100_000).explain(texts)
    # the prediction, and for each text with a target nine nodes and one baseline, however many its targets
    assert passes.sequences == len(texts) + 10 * sum(count > 0 for count in targets)
    # texts with equally many targets share a pass, which goes backward once a target
    assert passes.forward == 1 + 2 * len(set(targets) - {0})
    assert passes.backward == sum(set(targets))


def test_texts_of_equal_length_share_the_gradient_at_their_baseline(shelf: Shelf) -> None:
    """What each makes of it is its own: the scores are those that it has alone."""
    classifier = shelf.classifier("bert", dtype=torch.float64)
    words = TEXTS[0].rstrip(".").split()
    texts = [" ".join(words[turn:] + words[:turn]) for turn in range(6)]
    alone = [only(explainer(classifier, rule="trapezoid").explain([text])[0]) for text in texts]
    with count_passes(classifier) as passes:
        together = [only(each) for each in explainer(classifier, rule="trapezoid").explain(texts)]
    baselines = len({found.label for found in alone})
    assert passes.backward_sequences == 6 * 8 + baselines < 6 * 9
    assert passes.sequences == 6 + passes.backward_sequences
    for found, expected in zip(together, alone, strict=True):
        assert found.baseline_score == pytest.approx(expected.baseline_score, abs=1e-12)
        np.testing.assert_allclose(word_scores(found), word_scores(expected), rtol=0, atol=1e-12)


def test_targets_that_share_passes_are_explained_as_if_alone(shelf: Shelf) -> None:
    folder = shelf.folder("bert", problem_type=MULTI_LABEL, labels=tuple("abcdef"), seed=1)
    slow = oracles.SlowExplainer(folder)
    classifier = shelf.classifier("bert", dtype=torch.float64, problem_type=MULTI_LABEL, labels=tuple("abcdef"), seed=1)
    texts = [*TEXTS, LONG_TEXT]
    outcomes = explainer(classifier, budget_tokens=400).explain(texts)
    assert max(len(explanations(outcome)) for outcome in outcomes) > 1
    for text, outcome in zip(texts, outcomes, strict=True):
        probabilities = [found.probability for found in explanations(outcome)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert all(probability > 0.5 for probability in probabilities)
        for rank, found in enumerate(explanations(outcome)):
            expected = slow.integrated_gradients(
                text, "abcdef".index(found.label), baseline="[MASK]", rule="midpoint", nodes=9, max_tokens=40, overlap=6
            )
            assert found.label_rank == rank
            assert found.target_score == pytest.approx(expected.target_score, abs=1e-10)
            assert found.token_norm == pytest.approx(np.linalg.norm(expected.token_scores), abs=1e-10)


# --- labels -----------------------------------------------------------------------------------------------------


def test_no_label_above_half_is_an_empty_list(shelf: Shelf, tmp_path: Path) -> None:
    """No label is an answer of the classifier, not a rejection."""
    folder = edited_weights(
        shelf.folder("bert", problem_type=MULTI_LABEL), tmp_path, lambda w: w["classifier.bias"].fill_(-99.0)
    )
    assert explainer(Classifier.load(folder)).explain([TEXTS[0], LONG_TEXT]) == [[], []]


@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_either_side_of_one_logit_is_explained(shelf: Shelf, tmp_path: Path, bias: float) -> None:
    """A predicted "not X" is explained by -z, so a positive score always speaks for the predicted label."""
    folder = edited_weights(
        shelf.folder("bert", labels=("toxic",)), tmp_path, lambda w: w["classifier.bias"].fill_(bias)
    )
    found = only(explainer(Classifier.load(folder, dtype=torch.float64)).explain([TEXTS[0]])[0])
    expected = oracles.SlowExplainer(folder).integrated_gradients(
        TEXTS[0], int(bias > 0), baseline="[MASK]", rule="midpoint", nodes=9, max_tokens=40, overlap=6
    )
    assert found.label == ("toxic" if bias > 0 else "not toxic")
    assert found.target_score == pytest.approx(expected.target_score, abs=1e-10)
    assert found.target_score > 40
    assert word_scores(found).sum() == pytest.approx(expected.token_scores.sum(), abs=1e-10)


def test_words_fall_by_score_and_ties_stand_in_the_order_of_the_text(shelf: Shelf) -> None:
    found = only(explainer(shelf.classifier("bert")).explain([LONG_TEXT])[0])
    ranked = [(-score, word.start) for word, score in found.words]
    assert ranked == sorted(ranked)
    tied = only(explainer(shelf.classifier("bert"), baseline="phone").explain(["phone phone phone"])[0])
    assert [word.start for word, _ in tied.words] == [0, 6, 12]
    assert {score for _, score in tied.words} == {0.0}


def test_absmax_gives_a_word_its_strongest_token(shelf: Shelf) -> None:
    spy = Spy()
    found = only(explainer(shelf.classifier("bert"), method=spy.method, merge="absmax").explain(["unbelievable"])[0])
    scores = spy.seen[0][1].scores[0].tolist()
    assert len(scores) > 4
    assert found.words[0][1] == pytest.approx(max(scores, key=abs), abs=1e-12)


# --- what cannot be explained -----------------------------------------------------------------------------------


def test_texts_without_words_are_rejected_beside_the_others(shelf: Shelf) -> None:
    found = explainer(shelf.classifier("bert")).explain(["", TEXTS[0], " \n", "?!", "\ud800 phone"])
    assert [outcome.reason for outcome in found if isinstance(outcome, Rejection)] == [
        "no_words", "no_words", "no_words", "lone_surrogate",
    ]  # fmt: skip
    assert_close(only(found[1]), only(explainer(shelf.classifier("bert")).explain([TEXTS[0]])[0]))


def test_no_texts_give_no_outcomes(shelf: Shelf) -> None:
    assert explainer(shelf.classifier("bert")).explain([]) == []


def edited_weights(folder: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder with other weights."""
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(target / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_text_that_overflows_is_rejected_alone(shelf: Shelf, value: float) -> None:
    tokens = [set(AutoTokenizer.from_pretrained(shelf.folder("bert"))(text)["input_ids"]) for text in TEXTS]
    broken = Classifier.load(shelf.folder("bert"))
    break_token(broken, min(tokens[1] - tokens[0] - tokens[3]), value)
    found = explainer(broken).explain([TEXTS[0], TEXTS[1], TEXTS[3]])
    assert isinstance(found[1], Rejection)
    assert found[1].reason == "not_finite"
    expected = explainer(shelf.classifier("bert")).explain([TEXTS[0], TEXTS[3]])
    for outcome, other in zip((found[0], found[2]), expected, strict=True):
        assert_close(only(outcome), only(other))


def break_token(classifier: Classifier, token: int, value: float) -> None:
    with torch.no_grad():
        classifier.model.get_input_embeddings().weight[token] = value


def test_a_baseline_that_overflows_is_told_by_the_scores(shelf: Shelf) -> None:
    """The prediction is finite; only the path is not."""
    broken = Classifier.load(shelf.folder("bert"))
    break_token(broken, broken.find_token("mask"), float("nan"))
    (outcome,) = explainer(broken).explain([TEXTS[0]])
    assert isinstance(outcome, Rejection)
    assert outcome.reason == "not_finite"
    assert "scores" in outcome.message


class SmallMemory:
    """Makes a classifier's passes fail as CUDA does when they hold more tokens than fit."""

    def __init__(self, classifier: Classifier, monkeypatch: pytest.MonkeyPatch, *, forward: int, backward: int) -> None:
        self.failures = 0
        original = classifier.logits

        def logits(embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
            tokens = embeddings.shape[0] * embeddings.shape[1]
            if tokens > (backward if embeddings.requires_grad else forward):
                self.failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(embeddings, mask, token_types)

        monkeypatch.setattr(classifier, "logits", logits)


def test_a_lack_of_memory_halves_the_budget_and_is_remembered(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = many_texts()
    expected = explainer(shelf.classifier("bert")).explain(texts)
    classifier = Classifier.load(shelf.folder("bert"))
    memory = SmallMemory(classifier, monkeypatch, forward=400, backward=100)
    found = explainer(classifier, budget_tokens=2000)
    for outcome, other in zip(found.explain(texts), expected, strict=True):
        if isinstance(other, list):
            assert_close(only(outcome), only(other))
        else:
            assert outcome == other
    assert 1 <= memory.failures <= 8
    assert 40 <= found.budget_tokens <= 100
    before = memory.failures
    found.explain(texts)
    assert memory.failures == before


@pytest.mark.parametrize("limits", [{"forward": 30, "backward": 30}, {"forward": 100, "backward": 30}])
def test_a_text_that_fits_no_memory_is_rejected_alone(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    classifier = Classifier.load(shelf.folder("bert"))
    memory = SmallMemory(classifier, monkeypatch, **limits)
    short = [TEXTS[0], TEXTS[1]]
    found = explainer(classifier).explain([LONG_TEXT, *short])
    assert isinstance(found[0], Rejection)
    assert found[0].reason == "out_of_memory"
    assert "40 tokens" in found[0].message
    for outcome, expected in zip(found[1:], explainer(shelf.classifier("bert")).explain(short), strict=True):
        assert_close(only(outcome), only(expected))
    assert memory.failures < 20


def test_texts_that_share_a_baseline_that_does_not_fit_are_all_told_so(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their one pass there is made for the first of them alone."""
    classifier = Classifier.load(shelf.folder("bert"))
    words = TEXTS[0].rstrip(".").split()
    texts = [" ".join(words[turn:] + words[:turn]) for turn in range(4)]
    original, predicted = classifier.logits, []

    def logits(embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
        if predicted and not embeddings.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        predicted.append(len(embeddings))
        return original(embeddings, mask, token_types)

    monkeypatch.setattr(classifier, "logits", logits)
    found = explainer(classifier, budget_tokens=5000).explain(texts)
    assert predicted[0] == 4
    assert [outcome.reason for outcome in found if isinstance(outcome, Rejection)] == ["out_of_memory"] * 4


# --- heads of one output ----------------------------------------------------------------------------------------

REGRESSION = {"labels": ("stars",), "problem_type": "regression"}


def test_the_output_of_a_regression_is_explained_for_every_text(shelf: Shelf) -> None:
    """The same weights read as one sigmoid have the same output, so the same scores; only their probability differs."""
    texts = [*TEXTS, LONG_TEXT]
    found = explainer(shelf.classifier("bert", **REGRESSION)).explain(texts)
    as_class = shelf.classifier("bert", labels=("stars",), problem_type=MULTI_LABEL)
    expected = explainer(as_class, top_k=1).explain(texts)
    predicted = [len(explanations(outcome)) for outcome in explainer(as_class).explain(texts)]
    assert 0 in predicted  # below 0 the sigmoid predicts nothing, and the regression is explained all the same
    for outcome, other in zip(found, expected, strict=True):
        mine, theirs = only(outcome), only(other)
        assert (mine.label, mine.label_rank, mine.probability) == ("stars", 0, None)
        assert theirs.probability is not None
        assert_close(dataclasses.replace(mine, probability=theirs.probability), theirs)
        total = sum(score for _, score in mine.words) + mine.other_score
        assert total == pytest.approx(mine.target_score - mine.baseline_score - mine.completeness_gap, abs=1e-5)


def test_the_output_of_a_regression_is_that_of_the_model(shelf: Shelf) -> None:
    folder = shelf.folder("bert", **REGRESSION)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = explainer(shelf.classifier("bert", **REGRESSION), max_tokens=64).explain(TEXTS)
    for text, outcome in zip(TEXTS, found, strict=True):
        explanation = only(outcome)
        assert explanation.n_windows == 1
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt")).logits.item()
        assert explanation.target_score == pytest.approx(output, abs=1e-5)


def test_a_method_that_needs_a_probability_refuses_a_regression(shelf: Shelf) -> None:
    with pytest.raises(ModelError, match="needs the probability of a class"):
        Explainer(
            shelf.classifier("bert", **REGRESSION), find_method("marc"), {}, max_tokens=40, overlap=6, max_windows=None,
            merge="sum", budget_tokens=600,
        )  # fmt: skip


def test_both_labels_of_one_logit_are_explained_by_opposite_scores(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", labels=("toxic",), dtype=torch.float64)
    labels = set()
    for outcome in explainer(classifier, top_k=2).explain([*TEXTS, LONG_TEXT]):
        first, second = explanations(outcome)
        labels.add(first.label)
        assert {first.label, second.label} == {"not toxic", "toxic"}
        assert first.probability + second.probability == pytest.approx(1)  # type: ignore[operator]
        assert first.probability >= 0.5  # type: ignore[operator]
        np.testing.assert_allclose(word_scores(first), -word_scores(second), rtol=0, atol=1e-12)
    assert len(labels) == 2


# --- what is refused before the first text ----------------------------------------------------------------------


def test_wrong_options_are_told_together(shelf: Shelf) -> None:
    with pytest.raises(PlanError, match="3 problems") as caught:
        explainer(shelf.classifier("bert"), nodes=0, steps=3, budget_tokens=0)
    assert [problem.field for problem in caught.value.problems] == [
        "method.nodes", "method.steps", "execution.budget_tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_tokens": 65}, "at most 64"), ({"overlap": 38}, "overlap=38"), ({"baseline": "nonesuch"}, "nonesuch")],
)
def test_what_the_model_cannot_do_is_refused(shelf: Shelf, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        explainer(shelf.classifier("bert"), **changes)


# --- what is left behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_e18_the_model_is_left_as_it_was(shelf: Shelf, family: str) -> None:
    """LXT replaces LayerNorm.forward for the whole process; captum's LRP changes weights."""
    classifier = shelf.classifier(family)
    model = classifier.model
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    classes = {type(module) for module in model.modules()}
    attributes = {cls: dict(vars(cls)) for cls in classes}
    explainer(classifier).explain([*TEXTS, LONG_TEXT])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    assert {cls: dict(vars(cls)) for cls in classes} == attributes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert torch.is_grad_enabled()
