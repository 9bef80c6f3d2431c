"""A finished run of which nothing has changed is left as it is; whatever changes, its plan runs."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType
from rich.console import Console

from core.models import CLUES, save_trainable
from lexplain.errors import CorpusError
from lexplain.methods import find_method
from lexplain.outcome import show_keywords, show_place
from lexplain.pipeline import Run, open_run
from lexplain.schema import SCHEMA_VERSION, TABLES
from lexplain.tables import Tables
from lexplain.upkeep import forget_documents
from spark.planted import RecordedProgress, load_plan, make_plan, plant, stop_plan, write_json

DOCUMENTS = plant(140, seed=1)
MODELS = {"splits": 2, "epochs": 12, "patience": 12, "learning_rate": 3e-3, "batch_size": 8}

# As schema version 8 created it.
RUNS_8 = """
    run_id STRING, name STRING, status STRING, started_at TIMESTAMP, finished_at TIMESTAMP, plan STRING,
    corpus_key STRING, corpus_snapshot STRING, training_snapshot STRING, labelled_snapshot STRING,
    explain_keys ARRAY<STRING>, keyword_key STRING,
    evidence STRUCT<policy: STRING, probability: DOUBLE, top_n: INT, word_rule: STRING, increments: INT>,
    mlflow_run_id STRING, documents_by_status MAP<STRING, BIGINT>, documents_per_second DOUBLE, device STRING,
    versions MAP<STRING, STRING>, detail STRING"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unchanged")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", DOCUMENTS[:120])
    return folder


@pytest.fixture(scope="module")
def plan(folder: Path) -> dict[str, Any]:
    return make_plan(folder, models=MODELS | {"base": str(folder / "base")})


@pytest.fixture(scope="module")
def first(spark: SparkSession, plan: dict[str, Any]) -> Run:
    return start(spark, plan)


def start(spark: SparkSession, plan: dict[str, Any], *, check_files: bool = True) -> Run:
    """Run a plan as `lexplain run` does."""
    loaded = load_plan(plan, check_files=check_files)
    with open_run(spark, loaded, find_method, RecordedProgress(), skip_unchanged=True) as run:
        if not run.unchanged:
            run.read_sources()
            run.fine_tune()
            run.attribute()
            run.aggregate()
        run.finish("finished")
    return run


def show(run: Run) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    show_keywords(console, run, run.record["keyword_key"])
    show_place(console, run)
    return stream.getvalue()


def describe_versions(tables: Tables) -> dict[str, int]:
    """The versions as Delta tells them."""
    history = {name: tables.spark.sql(f"DESCRIBE HISTORY {tables.name(name)} LIMIT 1").collect() for name in TABLES}
    return {name: int(rows[0]["version"]) for name, rows in history.items()}


def test_nothing_is_written_and_the_same_is_shown(spark: SparkSession, plan: dict[str, Any], first: Run) -> None:
    assert not first.unchanged
    before = describe_versions(first.tables)
    assert first.tables.versions() == before
    again = start(spark, plan)
    assert again.unchanged
    assert describe_versions(again.tables) == before
    assert "nothing has changed since the run finished: nothing is left to do" in again.progress.text  # type: ignore[attr-defined]
    assert again.record | {"resumed": False} == again.record | {"resumed": False} | {
        name: first.record[name] for name in ("run_id", "keyword_key", "mlflow_run_id", "documents_by_status")
    }
    assert show(again) == show(first)
    assert all(word in show(again) for word in CLUES.values())


def test_new_documents_are_explained(spark: SparkSession, plan: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    source = {
        "path": str(write_json(tmp_path / "growing.jsonl", DOCUMENTS[120:130])),
        "columns": plan["corpus"]["columns"],
    }
    growing = plan | {"name": "growing", "corpus": source}
    assert not start(spark, growing).unchanged
    assert start(spark, growing).unchanged
    write_json(tmp_path / "growing.jsonl", DOCUMENTS[120:])
    grown = start(spark, growing)
    assert not grown.unchanged
    assert sum(grown.record["documents_by_status"].values()) == 2 * 20
    assert start(spark, growing).unchanged
    (tmp_path / "growing.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"growing\.jsonl"):  # the stage that reads it tells, not the look at it
        start(spark, growing, check_files=False)


@pytest.mark.slow
def test_whatever_changes_the_plan_runs(spark: SparkSession, plan: dict[str, Any], first: Run) -> None:
    """After each of these there is something to do, and after that nothing again."""

    def touch() -> dict[str, Any]:
        os.utime(plan["corpus"]["path"])
        return plan

    def forget() -> dict[str, Any]:
        with first.tables.lock():
            forget_documents(first.tables, load_plan(plan), [DOCUMENTS[0]["doc_id"]])
        return plan

    def compact() -> dict[str, Any]:
        first.tables.compact("keywords")
        return plan

    def choose_theta() -> dict[str, Any]:
        return plan | {"keywords": {"min_df": 2, "theta": 1.0}}

    def choose_nodes() -> dict[str, Any]:
        return plan | {"method": {"options": {"rule": "midpoint", "nodes": 4}}}

    def fail() -> dict[str, Any]:
        with pytest.raises(KeyboardInterrupt), open_run(spark, load_plan(plan), find_method, RecordedProgress()):
            raise KeyboardInterrupt
        return plan

    # Back to the plan after another one of its name: the views must show its keywords again.
    changes: list[Callable[[], dict[str, Any]]] = [
        touch,
        forget,
        compact,
        choose_theta,
        lambda: plan,
        choose_nodes,
        lambda: plan,
        fail,
    ]
    for change in changes:
        changed = change()
        run = start(spark, changed)
        assert not run.unchanged, change
        shown = spark.sql(f"SELECT DISTINCT keyword_key FROM keywords_current WHERE name = '{plan['name']}'").collect()
        assert [row["keyword_key"] for row in shown] == [run.record["keyword_key"]]
        assert start(spark, changed).unchanged, change
    stop_plan(spark, plan, Run.read_sources)
    # With the documents of the start that was stopped: whether there are new ones is not known.
    assert [start(spark, plan).unchanged for _ in range(3)] == [False, False, True]


@pytest.mark.slow
def test_in_a_schema_a_run_beside_which_nothing_was_written(
    spark: SparkSession, plan: dict[str, Any], tmp_path: Path
) -> None:
    spark.sql(f"CREATE SCHEMA unchanged LOCATION '{tmp_path}/unchanged'")
    models = plan["models"] | {"folder": str(tmp_path / "models")}
    there = plan | {"models": models, "sink": {"schema": "unchanged"}, "mlflow": {"enabled": False}}
    runs = [start(spark, there) for _ in range(3)]
    # The first one wrote its tables itself; only the second can tell that nobody else did.
    assert [run.unchanged for run in runs] == [False, False, True]
    assert runs[2].tables.versions() == describe_versions(runs[2].tables)


@pytest.mark.slow
@pytest.mark.parametrize(("version", "columns"), [(8, RUNS_8), (9, f"{RUNS_8}, fingerprint STRING")])
def test_a_finished_run_of_an_earlier_schema_version_goes_on(
    spark: SparkSession, plan: dict[str, Any], tmp_path: Path, version: int, columns: str
) -> None:
    sink = {"path": str(tmp_path / "tables")}
    run = start(spark, plan | {"sink": sink})
    tables = run.tables
    names = StructType.fromDDL(columns).fieldNames()
    kept = tables.read("runs").select(*names).collect()
    older = spark.createDataFrame(kept, columns).write.format("delta").mode("overwrite").partitionBy("run_id")
    older.option("overwriteSchema", "true").save(str(tmp_path / "tables" / "runs"))
    for name in TABLES:
        spark.sql(f"ALTER TABLE {tables.name(name)} SET TBLPROPERTIES ('lexplain.schemaVersion' = '{version}')")
    catalog = tmp_path / "tables" / "catalog.sql"
    written = catalog.read_text(encoding="utf-8")
    catalog.write_text(
        written.replace(f"schema version {SCHEMA_VERSION}.", f"schema version {version}."), encoding="utf-8"
    )
    made = {name: tables.read(name).count() for name in TABLES}
    before = describe_versions(tables)
    upgraded = start(spark, plan | {"sink": sink})
    assert not upgraded.unchanged
    assert upgraded.record["keyword_key"] == run.record["keyword_key"]
    assert {name: tables.read(name).count() for name in TABLES} == made
    after = describe_versions(tables)
    assert {name: after[name] - before[name] for name in TABLES if name != "runs"} == dict.fromkeys(
        set(TABLES) - {"runs"}, 1
    )
    assert catalog.read_text(encoding="utf-8") == written
    assert start(spark, plan | {"sink": sink}).unchanged
