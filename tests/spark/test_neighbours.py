"""LAFA as a job: reference documents indexed once for each model, kept in their table, used by every later explanation."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession

from core.models import CLUES, save_classifier, save_trainable
from lexplain.attribution import Attribution, ExplainedModel
from lexplain.errors import MethodError
from lexplain.neighbours import ReferenceIndex
from lexplain.pipeline import Run
from lexplain.plan import Sink
from lexplain.preparation.neighbours import find_neighbours, index_neighbours
from lexplain.tables import Tables, quote_list, quote_text
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

OPTIONS = {"base": "saliency", "sign": "gradient_x_input", "quantile": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neighbours")
    save_trainable(folder / "base")
    save_classifier(folder / "ready", "bert", labels=sorted(CLUES))
    write_json(folder / "training.jsonl", plant(120, seed=1))
    write_json(folder / "corpus.jsonl", plant(60, seed=2))
    return folder


def plan(folder: Path, **changes: Any) -> dict[str, Any]:
    models = make_plan(folder)["models"] | {"splits": 2}
    common = {"name": "borrowed", "models": models, "mlflow": {"enabled": False}, "execution": {"chunk_documents": 500}}
    return make_plan(folder, **common) | {"method": {"id": "lafa", "options": OPTIONS}} | changes


@pytest.fixture(scope="module")
def first(spark: SparkSession, folder: Path) -> Run:
    return run_plan(spark, plan(folder))


def read_indexes(run: Run) -> list[Row]:
    digests = quote_list([model.digest for model in run.models])
    return run.tables.read("neighbours").where(f"model_digest IN ({digests})").collect()


def read_explanations(run: Run) -> list[Row]:
    keys = quote_list([model.explain_key for model in run.models])
    rows = run.tables.read("explanations").where(f"explain_key IN ({keys}) AND {run.corpus.where}")
    return rows.orderBy("split", "doc_id", "label_rank").collect()


def test_keywords_at_the_end(first: Run) -> None:
    rows = read_explanations(first)
    assert {row["method"] for row in rows} == {"lafa.v1"}
    assert {row["status"] for row in rows} == {"explained"}
    assert {row["evaluations"] for row in rows} == {1}
    key = quote_text(str(first.record["keyword_key"]))
    best = first.tables.read("keywords").where(f"keyword_key = {key} AND rank = 1").collect()
    assert {row["label"]: row["word"] for row in best} == CLUES


def test_each_model_is_prepared_with_its_own_training_half(first: Run) -> None:
    rows = {row["model_digest"]: row for row in read_indexes(first)}
    staged = first.tables.read("staged").where(first.corpus.where)
    for model in first.models:
        row = rows[model.digest]
        path = first.tables.folder / "prepared" / row["file"]  # type: ignore[operator]
        assert model.prepared == str(path)
        assert model.drawn is not None
        trained = {each["text_digest"] for each in staged.where(model.drawn.sql("text_digest")).collect()}
        index = ReferenceIndex.load(path)
        assert row["n_references"] == len(index.texts) == len(trained)
        assert set(index.texts.tolist()) == {int(digest[:16], 16) >> 1 for digest in trained}
        assert row["layer"] == index.layer == 1 + row["layer_precision"].index(max(row["layer_precision"]))
        assert len(row["layer_precision"]) == 2
    assert len(rows) == len(first.models) == 2
    assert "index neighbours" in first.progress.text  # type: ignore[attr-defined]


def test_a_second_run_and_other_options_make_nothing_anew(spark: SparkSession, folder: Path, first: Run) -> None:
    before = sorted(folder.glob("tables/prepared/*"))
    again = run_plan(spark, plan(folder))
    assert "index neighbours" not in again.progress.text  # type: ignore[attr-defined]
    other = run_plan(spark, plan(folder, name="other", method={"id": "lafa", "options": OPTIONS | {"weight": 9.0}}))
    assert [model.prepared for model in other.models] == [model.prepared for model in first.models]
    assert sorted(folder.glob("tables/prepared/*")) == before
    assert len(before) == 2
    first_rows, other_rows = read_explanations(first), read_explanations(other)
    assert [row["doc_id"] for row in first_rows] == [row["doc_id"] for row in other_rows]
    changed = sum(
        mine["token_norm"] != theirs["token_norm"] for mine, theirs in zip(first_rows, other_rows, strict=True)
    )
    assert changed > len(first_rows) / 2


def test_the_sql_function_compares_with_the_same_documents(spark: SparkSession, first: Run) -> None:
    run = run_plan(spark, plan(Path(first.plan.sink.path or "").parent), stages=("attribute",))
    stored = next(row for row in read_explanations(run) if row["split"] == 0)
    run.tables.read("staged").where(
        f"{run.corpus.where} AND doc_id = {quote_text(stored['doc_id'])}"
    ).createOrReplaceTempView("one_text")
    (row,) = spark.sql("SELECT explain(text) AS answer FROM one_text").collect()
    (answer,) = row["answer"]["explanations"]
    assert [word["word"] for word in answer["words"]] == [word["word"] for word in stored["words"]]
    assert [word["score"] for word in answer["words"]] == pytest.approx(
        [word["score"] for word in stored["words"]], rel=1e-4
    )


def test_models_that_were_brought_are_compared_with_the_corpus(spark: SparkSession, folder: Path) -> None:
    """The plan has training documents too, for their labels: these models were not trained on them here."""
    source = {"path": str(folder / "corpus.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    brought = plan(
        folder, name="brought", corpus=source, models={"uris": [str(folder / "ready")], "corpus": "unseen"},
        method={"id": "lafa", "options": OPTIONS | {"layer": 2, "neighbours": 3}},
    )  # fmt: skip
    assert brought["training"]["path"] != source["path"]
    run = run_plan(spark, brought)
    assert len(read_explanations(run)) == 60
    rows = [row for row in read_indexes(run) if row["corpus_key"] == run.corpus.key]
    assert [(row["layer"], row["layer_precision"], row["n_references"]) for row in rows] == [(2, None, 60)]
    assert find_neighbours(run.tables, run.plan, run.find_method, run.models) == run.models


def test_no_document_with_a_label_is_told(spark: SparkSession, folder: Path) -> None:
    write_json(folder / "empty.jsonl", [{"doc_id": "1", "text": "...", "labels": ["sport"]}])
    source = {"path": str(folder / "empty.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    models = {"uris": [str(folder / "ready")], "corpus": "unseen"}
    empty = plan(folder, name="empty", corpus=source, models=models, limits={"rejected_share": None})
    del empty["training"]
    with pytest.raises(MethodError, match=r"model .*references=0 documents"):
        run_plan(spark, empty)


def test_a_sink_that_was_moved_finds_its_files(spark: SparkSession, tmp_path: Path, first: Run) -> None:
    """The latest run's stored plan still names the old place."""
    for name in ("neighbours", "prepared"):
        shutil.copytree(first.tables.folder / name, tmp_path / name)  # type: ignore[operator]
    moved = Tables(spark, Sink(path=str(tmp_path)))
    found = find_neighbours(moved, first.plan, first.find_method, first.models)
    assert {Path(str(model.prepared)).parent for model in found} == {tmp_path / "prepared"}
    assert [Path(str(model.prepared)).name for model in found] == [
        Path(str(model.prepared)).name for model in first.models
    ]


def test_a_lost_file_is_told_and_made_again(first: Run, caplog: pytest.LogCaptureFixture) -> None:
    lost, kept = first.models
    before = ReferenceIndex.load(str(lost.prepared)).texts.clone()
    Path(str(lost.prepared)).unlink()
    with caplog.at_level(logging.WARNING):
        found = find_neighbours(first.tables, first.plan, first.find_method, first.models)
    assert [model.prepared for model in found] == [None, kept.prepared]
    assert f"neighbours={lost.prepared!r} is not there" in caplog.text
    made = index_neighbours(
        first.tables, first.plan, first.find_method, first.models, first.corpus, first.training, first.progress
    )
    assert made[1] == kept
    assert ReferenceIndex.load(str(made[0].prepared)).texts.equal(before)
    assert len(read_indexes(first)) == 2


def test_the_time_of_preparation_is_not_that_of_explaining(spark: SparkSession, first: Run) -> None:
    before = read_explanations(first)
    spark.sql(f"DELETE FROM {first.tables.name('explanations')} WHERE explain_key = '{first.models[0].explain_key}'")

    def prepare(models: Sequence[ExplainedModel]) -> Sequence[ExplainedModel]:
        time.sleep(3.0)
        return models

    stage = Attribution(
        first.tables, first.plan, first.find_method, first.models, first.corpus, first.training, prepare
    )
    started = time.monotonic()
    done = stage.explain(first.progress)
    assert (done.device, done.n_pairs) == ("cpu", sum(row["split"] == 0 for row in before))
    assert 0.0 < done.seconds <= time.monotonic() - started - 3.0
    # made without the other model's documents beside them: equal beyond rounding
    for row, other in zip(read_explanations(first), before, strict=True):
        found, expected = row.asDict(recursive=True), other.asDict(recursive=True)
        words, right = ({word["start"]: word["score"] for word in each.pop("words")} for each in (found, expected))
        assert words == pytest.approx(right, rel=1e-5, abs=1e-7)
        assert found == {
            name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            for name, value in expected.items()
        }
