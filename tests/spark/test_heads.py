"""One-logit and regression models, methods with masks and methods without a sign: from a plan to tables and terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from core.models import FILLER, save_classifier
from lexplain.cli import app
from lexplain.errors import ModelError, PlanError
from lexplain.methods import find_method
from lexplain.pipeline import Run, open_tables
from lexplain.plan import Sink
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

LABELS = {"not sport", "sport"}
STAGES = ("attribute", "aggregate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of each kind, and a corpus that has both labels of the one-logit ones, and ratings."""
    folder = tmp_path_factory.mktemp("heads")
    for seed in range(2):
        save_classifier(folder / f"binary{seed}", "bert", labels=("sport",), seed=seed)
        save_classifier(folder / f"stars{seed}", "bert", labels=("stars",), problem_type="regression", seed=seed)
    documents = [
        {"doc_id": one["doc_id"], "text": one["text"], "topic": "sport" if number % 2 else "not sport", "rating": "4.5"}
        for number, one in enumerate(plant(60, seed=5))
    ]
    write_json(folder / "training.jsonl", documents)
    return folder


def plan_over(folder: Path, kind: str, labels: str, **changes: Any) -> dict[str, Any]:
    """A plan over the models of a kind; each of a name of its own, all into one sink."""
    models = {"uris": [str(folder / f"{kind}{seed}") for seed in range(2)], "corpus": "unseen"}
    source = {"path": str(folder / "training.jsonl"), "columns": {"doc_id": "doc_id", "labels": labels}}
    keywords = {"min_df": 0, "theta": 0.5, "max_classes": None}
    plan = make_plan(folder, training=None, models=models, mlflow={"enabled": False}) | {"corpus": source}
    return plan | {"keywords": keywords} | changes


def print_run(folder: Path, plan: Mapping[str, Any], capfd: pytest.CaptureFixture[str]) -> str:
    """Run a plan by the command line, in this session; what it prints."""
    path = folder / f"{plan['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(plan)), encoding="utf-8")
    capfd.readouterr()
    done = CliRunner().invoke(app, ["run", str(path)])
    printed = capfd.readouterr().out
    assert done.exit_code == 0, printed
    return printed


# --- one logit ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def binary(spark: SparkSession, folder: Path) -> Run:
    """One-logit models, explained by a method that makes masks, so also spans."""
    method = {"id": "marc", "options": {"steps": 6, "noise": 0.0, "forced": 0.0, "sign": "gradient_x_input"}}
    return run_plan(spark, plan_over(folder, "binary", "topic", name="masks", method=method), stages=STAGES)


def test_one_logit_models_give_keywords_of_both_labels(binary: Run) -> None:
    assert binary.labels == sorted(LABELS)
    rows = binary.tables.read("explanations").collect()
    assert {row["label"] for row in rows} == LABELS
    assert all(row["probability"] > 0.5 and row["target"] == "logit" for row in rows)
    assert {row["is_gold"] for row in rows if row["label"] == "sport"} == {True, False}
    keywords = binary.tables.read("keywords").collect()
    assert {row["label"] for row in keywords if row["kept"]} == LABELS
    held = {(row["label"], word["word"]) for row in rows if row["is_gold"] for word in row["words"]}
    assert {(row["label"], row["word"]) for row in keywords} <= held
    assert {row["problem"] for row in binary.tables.read("models").collect()} == {"binary"}


def test_spans_become_keyphrases_beside_the_keywords(binary: Run) -> None:
    rows = binary.tables.spark.sql("SELECT * FROM keyphrases_current WHERE name = 'masks'").collect()
    assert rows
    explained = binary.tables.read("explanations").where("is_gold").collect()
    holding: dict[tuple[str, str], set[str]] = {}
    for row in explained:
        for span in row["spans"] or ():
            holding.setdefault((row["label"], " ".join(span["words"])), set()).add(row["doc_id"])
    for row in rows:
        assert row["keyword_key"] == binary.record["keyword_key"]
        assert row["document_frequency"] == len(holding[row["label"], row["phrase"]])
        assert row["signed"]
        assert row["score_mean"] >= 0
    ranks = {label: sorted(row["rank"] for row in rows if row["label"] == label) for label in LABELS}
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in ranks.values())
    assert any(" " in row["phrase"] for row in rows)
    assert "keyword and keyphrase tables ready" in binary.progress.text  # type: ignore[attr-defined]


def test_keywords_of_a_method_without_a_sign_are_marked(
    spark: SparkSession, folder: Path, binary: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = binary.tables.versions()
    plan = plan_over(folder, "binary", "topic", name="unsigned", method={"id": "saliency", "options": {}})
    printed = print_run(folder, plan, capfd)
    assert "unsigned: scores of saliency.v1 have no sign" in printed
    assert "Write method.options.sign: gradient_x_input." in printed
    for view in ("keywords_current", "keyword_evidence"):
        marks = spark.sql(f"SELECT DISTINCT name, signed FROM {view} WHERE name IN ('unsigned', 'masks')").collect()
        assert {tuple(row) for row in marks} == {("unsigned", False), ("masks", True)}
    # a method without masks costs no phrase a query
    after = binary.tables.versions()
    assert all(after[name] == before[name] for name in ("phrase_sums", "phrase_statistics", "keyphrases"))
    rules = plan["keywords"] | {"labels": ["not sport"]}
    signed = {"id": "saliency", "options": {"sign": "gradient_x_input"}}
    printed = print_run(folder, plan | {"name": "borrowed", "method": signed, "keywords": rules}, capfd)
    assert "unsigned" not in printed
    assert "not sport  (" in printed
    marks = spark.sql("SELECT DISTINCT label, signed FROM keywords_current WHERE name = 'borrowed'").collect()
    assert [tuple(row) for row in marks] == [("not sport", True)]


# --- regression ---------------------------------------------------------------------------------------------------


def test_a_regression_is_explained_and_stays_out_of_class_keywords(
    spark: SparkSession, folder: Path, binary: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_over(folder, "stars", "rating", name="stars")
    printed = print_run(folder, plan, capfd)
    assert "no class keywords: the models are regressions" in printed
    assert "120 made now" in printed
    tables = binary.tables
    rows = tables.read("explanations").where("label = 'stars'").collect()
    assert len({(row["explain_key"], row["doc_id"]) for row in rows}) == len(rows) == 120
    assert {(row["status"], row["target"], row["probability"], row["is_gold"]) for row in rows} == {
        ("explained", "output", None, None)
    }
    assert all(row["words"] for row in rows)
    (run,) = tables.read("runs").where("name = 'stars'").collect()
    assert (run["status"], run["keyword_key"], len(run["explain_keys"])) == ("finished", None, 2)
    assert run["documents_by_status"]["explained"] == 120
    assert tables.read("keywords").where("label = 'stars'").count() == 0
    assert spark.sql("SELECT 1 FROM runs_current WHERE name = 'stars'").count() == 0
    assert "120 (model, document) pairs, 0 made now" in print_run(folder, plan, capfd)
    # the latest run in this sink: the function of SQL is its first model's
    open_tables(spark, Sink(path=plan["sink"]["path"]), find_method)
    text = f"{FILLER[0]} striker"
    (answer,) = spark.sql(f"SELECT explain('{text}') AS answer").collect()
    (explanation,) = answer["answer"]["explanations"]
    assert (explanation["label"], explanation["probability"], len(explanation["words"])) == ("stars", None, 2)


def test_a_method_that_needs_classes_refuses_a_regression_before_the_first_task(
    spark: SparkSession, folder: Path, binary: Run
) -> None:
    plan = plan_over(folder, "stars", "rating", name="masks-of-stars", method={"id": "marc", "options": {"steps": 6}})
    with pytest.raises(PlanError, match=r"models\.uris\[1\].*needs the probability of a class"):
        run_plan(spark, plan, stages=STAGES)
    before = binary.tables.versions()["explanations"]
    # The models of a registry are out of the plan's reach: the run looks at them before it explains.
    with pytest.raises(ModelError, match="needs the probability of a class"):
        run_plan(spark, plan, stages=STAGES, check_files=False)
    assert binary.tables.versions()["explanations"] == before


def test_models_of_two_kinds_are_refused(spark: SparkSession, folder: Path, binary: Run) -> None:
    """They call their one output alike, and mean different things."""
    sigmoid = save_classifier(
        folder / "sigmoid", "bert", labels=("stars",), problem_type="multi_label_classification", seed=3
    )
    plan = plan_over(folder, "stars", "rating", name="mixed")
    plan["models"]["uris"][1] = str(sigmoid)
    with pytest.raises(ModelError, match="the first model \\(regression\\)"):
        run_plan(spark, plan, stages=STAGES)
