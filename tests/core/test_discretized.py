"""DIG and UDIG: paths, a slow re-statement of the scores, what the factor does, batches."""

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
from core.test_gradients import explainer, run_and_keep
from lexplain.anchors import AnchorRule, Anchors
from lexplain.classifier import Classifier
from lexplain.explanation import Outcome
from lexplain.methods import Attribution, Evaluate, Inputs, find_method
from lexplain.methods.discretized import make_rule

METHODS = ("discretized_integrated_gradients", "uniform_discretized_integrated_gradients")
SMALL = {"steps": 4, "neighbours": 9}


def keep_points(classifier: Classifier, name: str, texts: list[str], **options: Any) -> tuple[Inputs, Tensor, Tensor]:
    """What a method was given, and all points of all rows that it visited, (B, points, S, D), with the steps."""
    original, kept = find_method(name), []

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        plain = evaluate.visit

        def visit(rows: Tensor, place: Any, see: Any, **others: Any) -> None:
            points = place(torch.arange(len(rows)), inputs.x.shape[1])
            kept.append((inputs, points.view(len(inputs.x), -1, *inputs.x.shape[1:])))
            plain(rows, place, see, **others)

        evaluate.visit = visit  # type: ignore[method-assign]
        return original.function(evaluate, inputs, **options)

    spy = dataclasses.replace(original, function=function)
    explainer(classifier, spy, max_windows=1, budget_tokens=10_000, **options).explain(texts)
    inputs, points = kept[0]  # the other visit is that of F(baseline)
    return inputs, points, torch.cat([points, inputs.x[:, None]], dim=1)


def search_of(classifier: Classifier, name: str, options: dict[str, Any]) -> oracles.AnchorSearch:
    completed = find_method(name).complete_options(options)
    vocabulary = classifier.model.get_input_embeddings().weight.detach().double().numpy()
    return oracles.AnchorSearch(
        vocabulary, classifier.find_token(str(completed["baseline"])), int(completed["steps"]),
        int(completed["neighbours"]), str(completed["strategy"]), name.startswith("uniform"),
    )  # fmt: skip


def test_they_are_registered_with_their_presets() -> None:
    dig, udig = (find_method(name) for name in METHODS)
    assert (dig.id, udig.id) == tuple(f"{name}.v1" for name in METHODS)
    assert (
        (dig.signed, dig.complete, dig.stochastic)
        == (udig.signed, udig.complete, udig.stochastic)
        == (True, False, False)
    )
    assert dig.complete_options({}) == {
        "steps": 30, "neighbours": 500, "strategy": "greedy", "factor": 0, "baseline": "mask", "target": "fixed",
    }  # fmt: skip
    assert dig.complete_options(dig.presets["dig-2021"]) == dig.complete_options({"baseline": "pad", "target": "max"})
    assert udig.complete_options(udig.presets["udig-2024"]) == udig.complete_options({}) == {
        "steps": 30, "neighbours": 50, "strategy": "maxcount", "factor": 1, "baseline": "mask", "target": "fixed",
    }  # fmt: skip
    bert = udig.complete_options(udig.presets["udig-2024-bert"])
    assert (bert["factor"], bert["strategy"]) == (2, "greedy")
    assert dig.prepares(dig.complete_options({})) == udig.prepares(udig.complete_options({})) == "anchors"
    assert str(dig.check({"steps": 1})[0]).startswith("method.steps=1 must be between 2 and 500")
    for name, uniform in zip(METHODS, (False, True), strict=True):
        rule = make_rule(name, dig.complete_options({"steps": 7}), 103)
        assert rule == AnchorRule(103, 7, 500, "greedy", uniform)


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strategy", ["greedy", "maxcount"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paths_are_monotone_from_the_baseline_to_the_input(
    shelf: Shelf, name: str, strategy: str, dtype: torch.dtype
) -> None:
    """In every dimension, in floating point as well; special tokens and padding stay where they are."""
    inputs, _, path = keep_points(shelf.classifier("bert", dtype=dtype), name, list(TEXTS), strategy=strategy, factor=2)
    assert torch.equal(path[:, 0], inputs.baseline)
    assert torch.equal(path[:, -1], inputs.x)
    ascending = (inputs.x >= inputs.baseline)[:, None]
    steps = path.diff(dim=1)
    assert (torch.where(ascending, steps, -steps) >= 0).all()
    assert torch.equal(path.movedim(1, 2)[inputs.special], inputs.x[inputs.special][:, None].expand(-1, 125, -1))
    content = path.movedim(1, 2)[~inputs.special]
    assert (content.diff(dim=1) != 0).any(-1).float().mean() > 0.9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("factor", "points"), [(0, 32), (1, 63), (2, 125)])
def test_the_number_of_points(shelf: Shelf, name: str, factor: int, points: int) -> None:
    inputs, _, path = keep_points(shelf.classifier("distilbert"), name, [TEXTS[3]], factor=factor)
    assert path.shape[1] == points
    (outcome,) = explainer(shelf.classifier("distilbert"), find_method(name), factor=factor).explain([TEXTS[3]])
    assert only(outcome).evaluations == points - 1
    assert inputs.baseline_id == shelf.classifier("distilbert").find_token("mask")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["bert", "albert", "roberta", "textcnn"])
@pytest.mark.parametrize("factor", [0, 2])
def test_points_are_those_of_the_slow_search(shelf: Shelf, name: str, family: str, factor: int) -> None:
    classifier = shelf.classifier(family, dtype=torch.float64)
    options: dict[str, Any] = SMALL | {"factor": factor}
    inputs, _, path = keep_points(classifier, name, [TEXTS[0], TEXTS[3]], **options)
    search = search_of(classifier, name, options)
    for row, place in (~inputs.special).nonzero().tolist():
        expected = search.points(int(inputs.ids[row, place]), factor)
        np.testing.assert_allclose(path[row, :, place].numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_points_do_not_depend_on_which_share_a_pass(shelf: Shelf, name: str) -> None:
    classifier = shelf.classifier("bert")
    together = keep_points(classifier, name, list(TEXTS), **SMALL)[1]
    again = []

    original = find_method(name)

    def function(evaluate: Evaluate, inputs: Inputs, **options: Any) -> Attribution:
        plain = evaluate.visit

        def visit(rows: Tensor, place: Any, see: Any, **others: Any) -> None:
            again.extend(place(torch.tensor([number]), inputs.x.shape[1])[0] for number in range(len(rows)))
            plain(rows, place, see, **others)

        evaluate.visit = visit  # type: ignore[method-assign]
        return original.function(evaluate, inputs, **options)

    spy = dataclasses.replace(original, function=function)
    explainer(classifier, spy, max_windows=1, budget_tokens=10_000, **SMALL).explain(list(TEXTS))
    alone = torch.stack(again[: together.shape[0] * together.shape[1]])
    assert torch.equal(alone, together.reshape(alone.shape))


# --- scores -------------------------------------------------------------------------------------------------------


def logits_of(classifier: Classifier, point: Tensor) -> Tensor:
    return classifier.logits(point[None], torch.ones((1, len(point)), dtype=torch.bool), None)[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("target", ["fixed", "max"])
def test_scores_equal_the_slow_ones(shelf: Shelf, name: str, target: str) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64, labels=tuple("abcdefgh"), seed=3)
    options: dict[str, Any] = SMALL | {"factor": 1, "target": target, "baseline": "pad"}
    texts = [TEXTS[0], TEXTS[1], TEXTS[3]]
    inputs, found = run_and_keep(classifier, name, texts, **options)
    search = search_of(classifier, name, options)
    switched = 0
    for row in range(len(texts)):
        length = int(inputs.mask[row].sum())
        paths = [
            np.repeat(inputs.x[row, None, place].numpy(), 11, axis=0) if inputs.special[row, place]
            else search.points(int(inputs.ids[row, place]), 1)
            for place in range(length)
        ]  # fmt: skip
        label = int(logits_of(classifier, inputs.x[row, :length]).argmax())

        def score(point: Tensor, label: int = label) -> Tensor:
            logits = logits_of(classifier, point)
            return logits.max() if target == "max" else logits[label]

        expected = oracles.discretized_integrated_gradients(score, paths)
        np.testing.assert_allclose(found.scores[row, :length].numpy(), expected, rtol=0, atol=1e-10)
        points = np.stack(paths, axis=1)
        switched += any(int(logits_of(classifier, torch.from_numpy(point)).argmax()) != label for point in points)
        start = logits_of(classifier, inputs.baseline[row, :length])[label]
        assert float(found.baseline_score[row]) == pytest.approx(float(start))
        gap = inputs.target_score[row] - start - found.scores[row].sum()
        assert float(found.completeness_gap[row]) == pytest.approx(float(gap))
    assert switched, "the two targets must differ somewhere"


@pytest.mark.parametrize("name", METHODS)
def test_the_gap_shrinks_with_the_factor(shelf: Shelf, name: str) -> None:
    """By half for each: the sum is a left Riemann one."""
    classifier = shelf.classifier("bert", dtype=torch.float64)
    gaps = []
    for factor in (1, 3, 6):
        outcomes = explainer(classifier, find_method(name), factor=factor).explain(list(TEXTS))
        gaps.append(np.mean([abs(only(outcome).completeness_gap) for outcome in outcomes]))
    assert gaps[0] > 2 * gaps[1] > 8 * gaps[2] > 0


@pytest.mark.parametrize("name", METHODS)
def test_scores_do_not_depend_on_batch_mates(shelf: Shelf, name: str) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    texts = [*TEXTS, LONG_TEXT]
    together = explainer(classifier, find_method(name), **SMALL).explain(texts)
    again = explainer(classifier, find_method(name), **SMALL).explain(texts[::-1])[::-1]
    for text, outcome, repeated in zip(texts, together, again, strict=True):
        alone = explainer(classifier, find_method(name), budget_tokens=1, **SMALL).explain([text])[0]
        assert_close(only(outcome), only(alone), 1e-6)
        assert_close(only(outcome), only(repeated), 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_special_tokens_and_padding_have_no_score(shelf: Shelf, name: str) -> None:
    inputs, attribution = run_and_keep(shelf.classifier("roberta"), name, list(TEXTS), **SMALL)
    assert not inputs.mask.all()
    assert (attribution.scores[inputs.special] == 0).all()
    assert (attribution.scores[~inputs.special] != 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_targets_share_the_forward_part(shelf: Shelf, name: str) -> None:
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    with count_passes(classifier) as passes:
        found = explanations(explainer(classifier, find_method(name), factor=0, **SMALL).explain([TEXTS[0]])[0])
    assert len(found) > 1
    assert passes.sequences == 1 + 5 + 1  # prediction, gradients, baseline
    for one, other in pairwise(found):
        assert not np.allclose(word_scores(one), word_scores(other))


@pytest.mark.parametrize("name", METHODS)
def test_a_lack_of_memory_counts_no_point_twice(shelf: Shelf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out between two targets of a pass, when the first has been seen."""
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    expected = explanations(explainer(classifier, find_method(name), **SMALL).explain([TEXTS[0]])[0])
    grad, calls = torch.autograd.grad, []

    def fail_second(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", fail_second)
    found = explanations(explainer(classifier, find_method(name), **SMALL).explain([TEXTS[0]])[0])
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, BATCH_TOLERANCE)


def test_a_text_of_baselines_is_explained(shelf: Shelf) -> None:
    """A content token that is the baseline word itself stays where it is."""
    classifier = shelf.classifier("bert")
    found = explainer(classifier, find_method(METHODS[0]), baseline="phone", **SMALL).explain(["phone", "phone team"])
    assert (word_scores(only(found[0])) == 0.0).all()
    scores = {word.key: score for word, score in only(found[1]).words}
    assert scores["phone"] == 0.0
    assert scores["team"] != 0.0


def outcome_with(classifier: Classifier, name: str, prepared: Anchors | None) -> Outcome:
    from lexplain.engine import Explainer

    return Explainer(
        classifier, find_method(name), SMALL | {"strategy": "maxcount"}, max_tokens=40, overlap=6, max_windows=None,
        merge="sum", budget_tokens=600, prepared=prepared,
    ).explain([TEXTS[0]])[0]  # fmt: skip


def test_prepared_anchors_are_followed(shelf: Shelf) -> None:
    """And give the scores of anchors searched on the fly, when they are the same."""
    texts = explainer(shelf.classifier("electra"), find_method(METHODS[0])).read_texts([TEXTS[0]])
    tokens = explainer(shelf.classifier("electra"), find_method(METHODS[0])).list_tokens(texts)
    classifier = Classifier.load(shelf.folder("electra"))  # one that remembers no path
    rule = make_rule(METHODS[0], SMALL | {"strategy": "maxcount"}, classifier.find_token("mask"))
    search = search_of(classifier, METHODS[0], SMALL | {"strategy": "maxcount"})
    right = np.array([search.run(token) for token in tokens], dtype=np.int32)
    ids = np.array(tokens, dtype=np.int32)
    found = outcome_with(classifier, METHODS[0], Anchors(rule, ids, right))
    assert only(found).words == only(outcome_with(shelf.classifier("electra"), METHODS[0], None)).words
    straight = Anchors(rule, ids, np.full_like(right, rule.baseline_id))
    other = only(outcome_with(Classifier.load(shelf.folder("electra")), METHODS[0], straight))
    assert other.words != only(found).words
