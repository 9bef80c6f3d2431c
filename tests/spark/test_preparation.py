"""Calibrations: made once from a sample of the corpus, kept in their table, used by every later explanation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import Row, SparkSession

from core.models import CLUES, save_trainable
from lexplain.calibration import SAMPLE_DOCUMENTS, Calibration
from lexplain.errors import MethodError
from lexplain.finetune import Recipe, fine_tune
from lexplain.pipeline import Run
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One fine-tuned model, and corpora that it has not seen: 450 documents, and 60 more."""
    folder = tmp_path_factory.mktemp("prepared")
    save_trainable(folder / "base")
    documents = plant(120, seed=1)
    fine_tune(
        folder / "base", [each["text"] for each in documents], [each["labels"] for each in documents],
        [number % 3 > 0 for number in range(120)], label_names=sorted(CLUES), multi_label=False,
        recipe=Recipe(epochs=12, learning_rate=3e-3, batch_size=8, max_tokens=32, patience=12), seed=1,
        folder=folder / "model", features=None,
    )  # fmt: skip
    write_json(folder / "corpus.jsonl", plant(450, seed=2))
    write_json(folder / "small.jsonl", plant(60, seed=3))
    return folder


def plan(folder: Path, file: str, **changes: object) -> dict[str, object]:
    source = {"path": str(folder / file), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    models = {"uris": [str(folder / "model")], "corpus": "unseen"}
    common = {"training": None, "models": models, "method": {"options": {}}, "mlflow": {"enabled": False}}
    made = make_plan(folder, **common) | {"corpus": source} | changes
    return {key: value for key, value in made.items() if value is not None}


def explanations(run: Run) -> list[Row]:
    (model,) = run.models
    rows = run.tables.read("explanations").where(f"explain_key = '{model.explain_key}' AND status = 'explained'")
    return rows.where(run.corpus.where).orderBy("doc_id").collect()


def scores(row: Row) -> np.ndarray:
    return np.array([word["score"] for word in sorted(row["words"], key=lambda word: word["start"])])


@pytest.fixture(scope="module")
def adaptive(spark: SparkSession, folder: Path) -> Run:
    return run_plan(spark, plan(folder, "corpus.jsonl", name="adaptive"))


def calibrations(run: Run) -> list[Row]:
    return run.tables.read("calibrations").collect()


def test_explanations_need_no_calibration(adaptive: Run) -> None:
    rows = explanations(adaptive)
    assert len(rows) == 450
    assert min(row["evaluations"] for row in rows) == 7
    assert np.mean([row["evaluations"] for row in rows]) < 16
    assert {row["accuracy"] for row in rows} == {"document"}
    assert not calibrations(adaptive)
    for row in rows[:50]:
        assert scores(row).sum() + row["other_score"] == pytest.approx(row["target_score"] - row["baseline_score"])


def test_they_are_within_the_tolerance_of_many_points(spark: SparkSession, folder: Path, adaptive: Run) -> None:
    options = {"options": {"rule": "midpoint", "nodes": 200}}
    source = {"path": str(folder / "corpus.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}, "limit": 60}
    exact = run_plan(spark, plan(folder, "corpus.jsonl", name="exact", method=options, corpus=source))
    found = {row["doc_id"]: row for row in explanations(adaptive)}
    off = []
    for row in explanations(exact):
        reference = scores(row)
        off.append(np.linalg.norm(scores(found[row["doc_id"]]) - reference) / np.linalg.norm(reference))
        assert not found[row["doc_id"]]["converged"] or off[-1] <= 0.1
    assert np.median(off) < 0.05
    assert not calibrations(exact), "a fixed rule needs none"


@pytest.fixture(scope="module")
def few(spark: SparkSession, folder: Path, adaptive: Run) -> Run:
    """In the sink of the adaptive one."""
    return run_plan(spark, plan(folder, "corpus.jsonl", name="few", method={"accuracy": "keywords"}))


def test_a_model_is_calibrated_on_a_sample_of_the_corpus(few: Run) -> None:
    (row,) = calibrations(few)
    (model,) = few.models
    assert (row["model_digest"], row["corpus_key"]) == (model.digest, few.corpus.key)
    assert row["n_documents"] == 450
    assert row["n_sampled"] == SAMPLE_DOCUMENTS
    assert model.prepared == row["calibration"]
    calibration = Calibration.from_json(row["calibration"])
    assert calibration.keywords.nodes == row["keyword_nodes"]
    assert row["reference_error"] <= 0.04
    assert "calibrate" in few.progress.text  # type: ignore[attr-defined]


def test_keyword_accuracy_takes_the_calibrated_nodes(adaptive: Run, few: Run) -> None:
    (calibration,), rows = calibrations(few), explanations(few)
    assert {row["accuracy"] for row in rows} == {"keywords"}
    assert {row["evaluations"] for row in rows} == {calibration["keyword_nodes"]}
    assert few.models[0].explain_key != adaptive.models[0].explain_key
    first = {}
    for run in (few, adaptive):
        kept = run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}' AND rank = 1").collect()
        first[run.plan.name] = {row["label"]: row["word"] for row in kept}
    assert first["few"] == first["adaptive"] == CLUES


def test_a_calibration_is_made_once(spark: SparkSession, folder: Path, few: Run) -> None:
    again = run_plan(spark, plan(folder, "corpus.jsonl", name="again", method={"accuracy": "keywords"}))
    assert calibrations(again) == calibrations(few)
    assert "calibrate" not in again.progress.text  # type: ignore[attr-defined]


def test_drilling_down_is_at_document_accuracy(spark: SparkSession, adaptive: Run, few: Run) -> None:
    place = f"doc_id = '{explanations(adaptive)[0]['doc_id']}'"
    few.tables.read("staged").where(f"{few.corpus.where} AND {place}").createOrReplaceTempView("one_document")
    (row,) = spark.sql("SELECT explain(text) AS answer FROM one_document").collect()
    stored = explanations(adaptive)[0]
    (answer,) = row["answer"]["explanations"]
    assert answer["target_score"] == pytest.approx(stored["target_score"], abs=1e-5)
    assert [word["word"] for word in answer["words"]][:3] == [word["word"] for word in stored["words"]][:3]
    assert scores(answer) == pytest.approx(scores(stored), abs=1e-5)


def test_keyword_accuracy_of_too_few_documents_is_refused(spark: SparkSession, folder: Path) -> None:
    write_json(folder / "tiny.jsonl", plant(8, seed=4))
    sink = {"path": str(folder / "tiny-tables")}
    with pytest.raises(MethodError, match="sample=8 documents"):
        run_plan(spark, plan(folder, "tiny.jsonl", name="tiny", sink=sink, method={"accuracy": "keywords"}))
