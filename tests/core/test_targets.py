"""What is explained: a label's logit, or what it has more than another's; of predicted labels, or of others too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from core.models import TEXTS, Shelf
from core.test_engine import explainer, explanations, word_scores
from core.test_executor import assert_same, explain, make_task, model_task, stage
from core.test_fit import check
from lexplain.engine import Explainer
from lexplain.errors import ModelError, PlanError
from lexplain.methods import find_method

# Methods that are linear in the explained function, with options that fix their points.
LINEAR = {
    "integrated_gradients": {"rule": "midpoint", "nodes": 9},
    "gradient_x_input": {},
    "occlusion": {},
    "captum.layer_integrated_gradients": {"n_steps": 9},
}


def make(shelf: Shelf, family: str, name: str, options: dict[str, Any], **changes: Any) -> Explainer:
    settings: dict[str, Any] = {
        "max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum", "budget_tokens": 600, "top_k": 3,
    }  # fmt: skip
    return Explainer(shelf.classifier(family), find_method(name), options, **settings | changes)


@pytest.mark.parametrize("family", ["bert", "textcnn"])
@pytest.mark.parametrize("name", list(LINEAR))
def test_a_contrast_is_the_difference_of_two_explanations(shelf: Shelf, family: str, name: str) -> None:
    """Closed form: what is linear in F gives for F_A - F_B the scores of A less those of B."""
    labels = shelf.classifier(family).labels
    alone = make(shelf, family, name, LINEAR[name]).explain(TEXTS)
    against = make(shelf, family, name, LINEAR[name], against=labels[1]).explain(TEXTS)
    for one, other in zip(alone, against, strict=True):
        known = {each.label: each for each in explanations(one)}
        assert [each.label for each in explanations(other)] == [
            each.label for each in explanations(one) if each.label != labels[1]
        ]
        for each in explanations(other):
            expected = word_scores(known[each.label]) - word_scores(known[labels[1]])
            np.testing.assert_allclose(word_scores(each), expected, rtol=0, atol=2e-4 * np.abs(expected).max() + 1e-5)
            difference = known[each.label].target_score - known[labels[1]].target_score
            assert each.target_score == pytest.approx(difference, abs=1e-4)
            assert each.probability == pytest.approx(known[each.label].probability)


@pytest.mark.parametrize(("name", "options"), [
    ("integrated_gradients", {}), ("lrp", {"rule": "epsilon"}), ("marc", {"steps": 3}), ("smoothgrad", {"samples": 2}),
])  # fmt: skip
def test_every_kind_of_method_explains_a_contrast(shelf: Shelf, name: str, options: dict[str, Any]) -> None:
    """And a complete one is complete: its parts add up to the difference of the differences."""
    labels = shelf.classifier("textcnn").labels
    for outcome in make(shelf, "textcnn", name, options, against=labels[0], top_k=2).explain(TEXTS):
        for each in explanations(outcome):
            assert each.label != labels[0]
            assert np.isfinite(word_scores(each)).all()
            if name == "integrated_gradients":
                assert word_scores(each).sum() == pytest.approx(each.target_score - each.baseline_score, abs=1e-3)


def test_a_label_against_itself_leaves_nothing_to_explain(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    predicted = explanations(explainer(classifier).explain([TEXTS[0]])[0])[0].label
    method = find_method("integrated_gradients")
    (outcome,) = Explainer(
        classifier, method, {}, max_tokens=40, overlap=6, max_windows=None, merge="sum", budget_tokens=600, against=predicted
    ).explain([TEXTS[0]])  # fmt: skip
    assert outcome == []


def test_rows_say_what_was_explained(shelf: Shelf) -> None:
    label = shelf.classifier("bert").labels[0]
    task = make_task(model_task(shelf.folder("bert")), against=label, top_k=3)
    rows = explain([stage(TEXTS[:2])], task)
    assert {row["target"] for row in rows} == {f"logit less that of {label}"}
    assert label not in {row["label"] for row in rows}


def test_an_unknown_label_is_refused(shelf: Shelf) -> None:
    with pytest.raises(ModelError, match="against='nobody' must be one of"):
        make(shelf, "bert", "saliency", {}, against="nobody")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"against": "NA", "accuracy": "keywords"}, r"method\.against='NA' is of accuracy: document"),
        ({"gold": True, "accuracy": "keywords"}, r"method\.gold=True is of accuracy: document"),
        (
            {"against": "weather"},
            r"method\.against='weather' is no label of models\.uris.*Write one of: business, politics, NA",
        ),
        ({"gold": True}, r"method\.gold=True needs corpus\.columns\.labels"),
    ],
)
def test_a_plan_asks_for_targets_that_fit(tmp_path: Any, shelf: Shelf, chosen: dict[str, Any], message: str) -> None:
    labels = None if "needs" in message else "label"
    with pytest.raises(PlanError, match=message):
        check(tmp_path, shelf.folder("bert"), "integrated_gradients", {}, chosen=chosen, labels=labels)


@pytest.mark.parametrize("family", ["bert", "textcnn"])
def test_settled_labels_are_told_and_not_explained(shelf: Shelf, family: str) -> None:
    """What is left is as it is without: ranks among all labels, scores to the rounding of a batch; unreadable texts between."""
    labels = shelf.classifier(family).labels
    model = model_task(shelf.folder(family))
    texts = [TEXTS[0], "...", TEXTS[1], b"\xff", TEXTS[0], TEXTS[2]]
    whole = explain([stage(texts, labels=[labels[0]])], make_task(model, top_k=3))
    asked = (labels[0], labels[2], "nobody")
    part = explain([stage(texts, labels=[labels[0]])], make_task(model, top_k=3, settled=asked))
    place = ("doc_id", "label", "label_rank", "is_gold", "probability")
    assert sorted(str([row[name] for name in place]) for row in part) == sorted(
        str([row[name] for name in place]) for row in whole
    )
    statuses = {(row["doc_id"], row["label"]): row["status"] for row in part}
    assert set(statuses.values()) == {"explained", "settled", "rejected"}
    for row in whole:
        if row["status"] == "explained" and row["label"] in asked:
            assert statuses[row["doc_id"], row["label"]] == "settled"
    settled = [row for row in part if row["status"] == "settled"]
    assert all(row[name] is None for row in settled for name in ("words", "reason", "target_score", "evaluations"))
    left = [row for row in whole if row["label"] not in asked]
    assert_same([row for row in part if row["status"] != "settled"], left)


def test_settled_texts_take_no_gradient(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    found = make(shelf, "bert", "saliency", {}, settled=frozenset(classifier.labels))
    before = classifier.n_passes
    documents = found.read_texts(TEXTS)
    assert found.explain_documents(documents) == [[]] * len(TEXTS)
    assert [[each.label_rank for each in settled] for settled in documents.settled] == [[0, 1, 2]] * len(TEXTS)
    forward = classifier.n_passes - before
    make(shelf, "bert", "saliency", {}).explain(TEXTS)
    assert classifier.n_passes - before - forward > forward
