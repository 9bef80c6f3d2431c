"""Paths of DIG and UDIG: searched once for a vocabulary, kept in their table, extended by new documents' tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import Row, SparkSession

import oracles
from core.models import CLUES, save_trainable
from lexplain.anchors import Anchors
from lexplain.attribution import ExplainedModel
from lexplain.classifier import Classifier
from lexplain.corpus import Staged
from lexplain.finetune import Recipe, fine_tune
from lexplain.keys import path_key
from lexplain.methods import find_method
from lexplain.pipeline import Run
from lexplain.preparation.anchors import prepare_anchors
from lexplain.tables import Tables
from spark.planted import RecordedProgress, load_plan, make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

DIG = "discretized_integrated_gradients"
OPTIONS = {"steps": 5, "neighbours": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with one encoder, and a corpus that they have not seen."""
    folder = tmp_path_factory.mktemp("paths")
    save_trainable(folder / "base")
    documents = plant(90, seed=1)
    recipe = Recipe(epochs=12, learning_rate=3e-3, batch_size=8, max_tokens=32, patience=12)
    for number, train in enumerate(("full", "head")):
        base = folder / "base" if train == "full" else folder / "model-0"
        fine_tune(
            base, [each["text"] for each in documents], [each["labels"] for each in documents],
            [document % 3 > 0 for document in range(90)], label_names=sorted(CLUES), multi_label=False,
            recipe=Recipe(**{**vars(recipe), "train": train}), seed=number, folder=folder / f"model-{number}",
            features=None,
        )  # fmt: skip
    write_json(folder / "corpus.jsonl", plant(60, seed=2))
    return folder


def plan(folder: Path, **changes: Any) -> dict[str, Any]:
    source = {"path": str(folder / "corpus.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    models = {"uris": [str(folder / f"model-{number}") for number in range(2)], "corpus": "unseen"}
    method = {"id": f"{DIG}.v1", "options": OPTIONS}
    common = {"training": None, "models": models, "method": method, "mlflow": {"enabled": False}}
    made = make_plan(folder, **common) | {"corpus": source, "method": method} | changes
    return {key: value for key, value in made.items() if value is not None}


@pytest.fixture(scope="module")
def first(spark: SparkSession, folder: Path) -> Run:
    return run_plan(spark, plan(folder))


def read_paths(run: Run) -> list[Row]:
    return run.tables.read("dig_paths").orderBy("path_key", "token_id").collect()


def explained(run: Run) -> list[Row]:
    rows = run.tables.read("explanations").where(f"status = 'explained' AND method = '{run.plan.method.id}'")
    keys = {model.explain_key for model in run.models}
    return [row for row in rows.orderBy("split", "doc_id").collect() if row["explain_key"] in keys]


def test_a_plan_ends_in_a_keyword_table(first: Run) -> None:
    rows = explained(first)
    assert len(rows) == 120
    assert {row["evaluations"] for row in rows} == {6}
    kept = first.tables.read("keywords").where("kept AND rank = 1").collect()
    assert {row["label"]: row["word"] for row in kept} == CLUES


def test_models_that_share_their_embeddings_share_one_table(first: Run, folder: Path) -> None:
    """Its paths are those of the slow search, for every token of the corpus and no other."""
    rows = read_paths(first)
    one, other = first.models
    assert one.digest != other.digest
    assert one.prepared == other.prepared
    classifier = Classifier.load(folder / "model-0")
    vocabulary = classifier.model.get_input_embeddings().weight.detach().double().numpy()
    search = oracles.AnchorSearch(vocabulary, classifier.find_token("mask"), 5, 20, "greedy", False)
    assert {row["token_id"]: row["anchors"] for row in rows} == {
        row["token_id"]: search.run(row["token_id"]) for row in rows
    }
    held: set[int] = set()
    for document in plant(60, seed=2):
        encoding = classifier.encode(document["text"], max_tokens=32, overlap=0, max_windows=1)
        held |= {token for window in encoding.windows for token in window.ids[1:-1]}
    assert [row["token_id"] for row in rows] == sorted(held)
    table = Anchors.load(str(one.prepared))
    assert Path(str(one.prepared)).parent == folder / "tables" / "prepared"
    assert table.token_ids.tolist() == sorted(held)
    assert table.anchors.tolist() == [row["anchors"] for row in rows]
    assert f"{len(held)} tokens searched now" in first.progress.text  # type: ignore[attr-defined]


def test_a_second_plan_searches_nothing(spark: SparkSession, folder: Path, first: Run) -> None:
    """Other windows make other explanations, of the same paths."""
    before = read_paths(first)
    again = run_plan(spark, plan(folder, name="again", text={"max_tokens": 20, "overlap": 0, "max_windows": 2}))
    assert {model.explain_key for model in again.models}.isdisjoint(model.explain_key for model in first.models)
    assert read_paths(again) == before
    assert again.models[0].prepared == first.models[0].prepared
    assert "0 tokens searched now" in again.progress.text  # type: ignore[attr-defined]
    versions = again.tables.spark.sql(f"DESCRIBE HISTORY {again.tables.name('dig_paths')}").collect()
    assert [row["operation"] for row in versions].count("MERGE") == 1


def test_new_documents_extend_the_table(spark: SparkSession, folder: Path, first: Run) -> None:
    """By the tokens that are new; explanations of the old documents stay as they are."""
    before, rows_before = read_paths(first), explained(first)
    added = [{"doc_id": "new", "text": "Weather in Köln: the striker was cheered.", "labels": ["sport"]}]
    write_json(folder / "corpus.jsonl", [*plant(60, seed=2), *added])
    longer = run_plan(spark, plan(folder))
    rows = read_paths(longer)
    assert len(rows) > len(before)
    assert [row for row in rows if row in before] == before
    assert len(Anchors.load(str(longer.models[0].prepared)).token_ids) == len(rows)
    assert [row for row in explained(longer) if row["doc_id"] != "new"] == rows_before
    assert len(explained(longer)) == 122
    assert f"{len(rows) - len(before)} tokens searched now" in longer.progress.text  # type: ignore[attr-defined]


def test_a_text_seen_later_is_searched_where_it_is_read(spark: SparkSession, folder: Path, first: Run) -> None:
    """The SQL function, in a run that prepares nothing: the same scores, and tokens that no table has."""
    run = run_plan(spark, plan(folder), stages=["aggregate"])
    assert run.models[0].prepared is None
    stored = explained(first)[0]
    text = next(each["text"] for each in plant(60, seed=2) if each["doc_id"] == stored["doc_id"])
    rows = (
        spark.createDataFrame([(text,), ("Räksmörgås torget bank",)], "text STRING")
        .selectExpr("explain(text) AS e")
        .collect()
    )
    (answer,) = rows[0]["e"]["explanations"]
    found = np.array([word["score"] for word in answer["words"]])
    assert found == pytest.approx(np.array([word["score"] for word in stored["words"]]), abs=1e-5)
    assert rows[1]["e"]["status"] == "explained"


def test_uniform_paths_have_a_key_of_their_own(spark: SparkSession, folder: Path, first: Run) -> None:
    method = {"id": f"uniform_{DIG}.v1", "options": OPTIONS | {"factor": 0}}
    uniform = run_plan(spark, plan(folder, name="uniform", method=method))
    keys = {row["path_key"] for row in read_paths(uniform)}
    assert len(keys) == 2
    assert {row["status"] for row in uniform.tables.read("explanations").collect()} == {"explained"}
    kept = uniform.tables.read("keywords").where(f"keyword_key = '{uniform.record['keyword_key']}' AND rank = 1")
    assert {row["label"]: row["word"] for row in kept.collect()} == CLUES


def test_the_key_is_of_what_paths_depend_on(folder: Path) -> None:
    def key(options: dict[str, object], embeddings: str = "a", baseline_id: int = 4) -> str:
        method = {"id": f"{DIG}.v1", "options": OPTIONS | options}
        return path_key(load_plan(plan(folder, method=method)), find_method, embeddings, baseline_id)

    assert key({}) == key({"factor": 2}) == key({"target": "max"})
    others = [key({"steps": 6}), key({"neighbours": 21}), key({"strategy": "maxcount"}), key({}, "b"), key({}, "a", 5)]
    assert len({key({}), *others}) == 6


def test_a_sink_without_a_folder_has_no_table(spark: SparkSession, caplog: pytest.LogCaptureFixture) -> None:
    """Executors could read no file of it: they search by themselves, and the job says so."""
    somewhere = load_plan({**plan(Path("/nowhere")), "sink": {"schema": "somewhere"}})
    tables, corpus = Tables(spark, somewhere.sink), Staged("corpus", 1, 60)
    models = [ExplainedModel(0, "key", "/nowhere/model-0", "digest", ("a", "b"), "single_label", None)]
    with caplog.at_level(logging.WARNING):
        made = prepare_anchors(tables, somewhere, find_method, models, corpus, None, RecordedProgress())
    assert made == models
    assert "each of them searches the paths of its own tokens" in caplog.text
