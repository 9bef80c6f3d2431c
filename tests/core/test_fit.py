"""Methods and models that do not fit each other are told while the plan is checked, as the kernel would tell them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.models import FAMILIES, Shelf, save_trainable
from core.test_gradients import explainer
from lexplain.classifier import Classifier
from lexplain.errors import MethodError, ModelError, PlanError
from lexplain.methods import find_method
from lexplain.plan import Plan

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lrp", {}), ("lrp", {"rule": "epsilon"}), ("lrp", {"rule": "attnlrp"}), ("lafa", {}), ("lafa", {"layer": 2}),
    ("lafa", {"layer": 40}), ("marc", {}), ("captum.deep_lift", {}), ("saliency", {}),
    ("discretized_integrated_gradients", {"target": "max"}),
]  # fmt: skip


def check(
    folder: Path, model: Path, method: str, options: dict[str, Any], *, chosen: dict[str, Any] | None = None,
    labels: str | None = "label", **models: Any,
) -> Plan:  # fmt: skip
    (folder / "corpus.jsonl").write_text("{}\n", encoding="utf-8")
    source = {"path": str(folder / "corpus.jsonl"), "columns": {"labels": labels} if labels else {}}
    plan = {
        "name": "fit", "corpus": source, "method": {"id": method, "options": options} | (chosen or {}),
        "models": models or {"uris": [str(model)], "corpus": "unseen"},
        "text": {"max_tokens": 24, "overlap": 4}, "sink": {"path": str(folder / "tables")},
    }  # fmt: skip
    if models:
        plan["training"] = source
    return Plan.parse(yaml.safe_dump(plan), find_method, folder=folder)


@pytest.mark.parametrize("family", [*FAMILIES, "textcnn"])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_plan_is_refused_where_the_kernel_would_refuse(
    shelf: Shelf, tmp_path: Path, family: str, method: str, options: dict[str, Any]
) -> None:
    refused = None
    try:
        explainer(shelf.classifier(family), find_method(method), **options)
    except (ModelError, MethodError) as error:
        refused = str(error)
    if refused is None:
        check(tmp_path, shelf.folder(family), method, options)
        return
    with pytest.raises(PlanError) as caught:
        check(tmp_path, shelf.folder(family), method, options)
    (problem,) = caught.value.problems
    assert problem.field == "method.id"
    assert refused.split(". ")[0] in problem.rule


def test_a_regression_has_no_rationale(shelf: Shelf, tmp_path: Path) -> None:
    folder = shelf.folder("bert", labels=["price"], problem_type="regression")
    check(tmp_path, folder, "saliency", {})
    with pytest.raises(PlanError, match="regression"):
        check(tmp_path, folder, "marc", {})


def test_a_base_model_is_what_it_will_be_fine_tuned_to(shelf: Shelf, tmp_path: Path) -> None:
    regression = shelf.folder("bert", labels=["price"], problem_type="regression")
    check(tmp_path, regression, "marc", {}, base=str(regression))
    with pytest.raises(PlanError, match="epsilon"):
        check(tmp_path, regression, "lrp", {"rule": "epsilon"}, base=str(regression))


def test_a_textcnn_says_at_which_rate_it_learns(shelf: Shelf, tmp_path: Path) -> None:
    folder = str(shelf.folder("textcnn"))
    with pytest.raises(PlanError) as caught:
        check(tmp_path, tmp_path, "saliency", {}, base=folder)
    assert [problem.field for problem in caught.value.problems] == ["models.learning_rate"]
    check(tmp_path, tmp_path, "saliency", {}, base=folder, learning_rate=0.01)
    save_trainable(tmp_path / "base")
    check(tmp_path, tmp_path, "saliency", {}, base=str(tmp_path / "base"))


@pytest.mark.parametrize("name", ["discretized_integrated_gradients", "uniform_discretized_integrated_gradients"])
def test_the_greatest_logit_explains_no_other_label(shelf: Shelf, tmp_path: Path, name: str) -> None:
    """It is one for all labels of a text, so each would have got the same words."""
    method, options = find_method(name), {"target": "max"}
    several = shelf.classifier("bert", labels=tuple("abcdef"), problem_type="multi_label_classification", seed=1)
    folder = shelf.folder("bert", labels=tuple("abcdef"), problem_type="multi_label_classification", seed=1)
    with pytest.raises(ModelError, match="explains only the most probable one"):
        explainer(several, method, **options)
    with pytest.raises(PlanError, match="explains only the most probable one"):
        check(tmp_path, folder, name, options)
    single = shelf.classifier("bert")
    with pytest.raises(ModelError, match="Leave out label and top_k"):
        explainer(single, method, top_k=2, **options)
    explainer(single, method, top_k=1, **options)
    explainer(single, method, top_k=2)
    with pytest.raises(PlanError, match=r"method\.top_k=2 asks for other targets"):
        check(tmp_path, shelf.folder("bert"), name, options, chosen={"top_k": 2})
    check(tmp_path, shelf.folder("bert"), name, {}, chosen={"top_k": 2})
    base = {"base": str(save_trainable(tmp_path / "base")), "splits": 2}
    with pytest.raises(PlanError, match=r"models\.multi_label=True asks for other targets"):
        check(tmp_path, folder, name, options, **base, multi_label=True)
    check(tmp_path, folder, name, options, **base)


def test_a_baseline_that_the_tokenizer_does_not_know_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    """Before anything is trained, too: the base's tokenizer is that of all models."""
    for models in ({}, {"base": str(save_trainable(tmp_path / "base")), "splits": 2}):
        with pytest.raises(PlanError, match=r"method\.options\.baseline='nosuchtoken' is no token of models\."):
            check(tmp_path, shelf.folder("bert"), "saliency", {"baseline": "nosuchtoken"}, **models)
        check(tmp_path, shelf.folder("bert"), "saliency", {"baseline": "the"}, **models)


def test_keyword_accuracy_of_another_method_is_one_error(shelf: Shelf, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        check(tmp_path, shelf.folder("bert"), "lrp", {}, chosen={"accuracy": "keywords"})
    assert [problem.field for problem in caught.value.problems] == ["method.accuracy"]


def test_a_choice_among_one_class_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shelf.folder("bert", labels=("spam",)), folder)
    config = json.loads((folder / "config.json").read_text())
    # what older versions of transformers wrote; today's neither writes nor reads it
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "single_label_classification"}))
    with pytest.raises(PlanError, match="has one class, and problem_type"):
        check(tmp_path, folder, "saliency", {})


def test_a_textcnn_takes_as_many_tokens_as_its_tokenizer_says(shelf: Shelf, tmp_path: Path) -> None:
    """Its config knows no positions."""
    folder = tmp_path / "textcnn"
    shutil.copytree(shelf.folder("textcnn"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 20}))
    with pytest.raises(PlanError) as caught:
        check(tmp_path, folder, "saliency", {})
    (problem,) = caught.value.problems
    assert (problem.field, problem.value, problem.remedy) == ("text.max_tokens", 24, "Write max_tokens: 20")
    assert Classifier.load(folder).max_tokens == 20
    (folder / "tokenizer_config.json").write_text("[]")
    check(tmp_path, folder, "saliency", {})
