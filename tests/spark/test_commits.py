"""Jobs that write to one sink at once, and rows that went missing: every row is there once in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from core.models import CLUES, save_classifier
from lexplain.methods import find_method
from lexplain.pipeline import Run, open_run
from lexplain.plan import Sink
from lexplain.schema import TABLES
from lexplain.tables import Tables
from spark.planted import RecordedProgress, load_plan, make_plan, plant, run_plan, write_json

N_DOCUMENTS = 90


class RacingTables(Tables):
    """Tables of a job that another job overtakes: between its last look at a table and its own commit to it."""

    def __init__(self, tables: Tables, table: str, overtake: Callable[[], object]) -> None:
        super().__init__(tables.spark, tables.sink)
        self.table = table
        self.overtake: Callable[[], object] | None = overtake
        self.replaced: list[str] = []

    def replace(self, rows: DataFrame, table: str, *, where: str) -> None:
        overtake = self.overtake
        if table == self.table and overtake is not None:
            self.overtake = None
            overtake()
        self.replaced.append(table)
        super().replace(rows, table, where=where)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two plans over one schema and corpus: two models of the user's own, and these and a third."""
    folder = tmp_path_factory.mktemp("shared")
    spark.sql(f"CREATE SCHEMA IF NOT EXISTS shared LOCATION '{folder}/schema'")
    write_json(folder / "training.jsonl", plant(N_DOCUMENTS, seed=3))
    models = [str(save_classifier(folder / f"m{n}", "bert", labels=list(CLUES), seed=n)) for n in range(3)]

    def make(name: str, uris: list[str]) -> dict[str, Any]:
        made = make_plan(folder, name=name, training=None, models={"uris": uris, "corpus": "unseen"}, sink=None)
        changed = {"execution": {"chunk_documents": 30, "device": "cpu"}, "mlflow": {"enabled": False}}
        return made | changed | {"sink": {"schema": "shared"}}

    return make("two", models[:2]), make("three", models)


@pytest.fixture(scope="module")
def raced(spark: SparkSession, plans: tuple[dict[str, Any], dict[str, Any]]) -> tuple[Run, Run, RacingTables]:
    """The job of two models, overtaken by that of three between its query for pending chunks and its first commit."""
    others: list[Run] = []
    with open_run(spark, load_plan(plans[0]), find_method, RecordedProgress()) as run:
        tables = RacingTables(
            run.tables, "explanations", lambda: others.append(run_plan(spark, plans[1], stages=["attribute"]))
        )
        run.tables = tables
        run.attribute()
        run.finish("finished")
    return run, others[0], tables


def read_explanations(run: Run) -> list[Any]:
    rows = run.tables.read("explanations").orderBy("explain_key", "doc_id", "label_rank").collect()
    return [row.asDict(recursive=True) for row in rows]


def test_a_chunk_that_two_jobs_commit_is_there_once(raced: tuple[Run, Run, RacingTables]) -> None:
    run, other, tables = raced
    rows = read_explanations(run)
    pairs = [(row["explain_key"], row["doc_id"]) for row in rows if row["label_rank"] == 0]
    assert len(pairs) == len(set(pairs)) == 3 * N_DOCUMENTS
    assert sum(run.record["documents_by_status"].values()) == 2 * N_DOCUMENTS
    assert sum(other.record["documents_by_status"].values()) == 3 * N_DOCUMENTS
    buckets = run.tables.read("chunks").select("bucket").distinct().count()
    assert buckets > 1
    assert tables.replaced.count("explanations") == 1  # the other chunks were found done


def test_rows_that_were_deleted_or_doubled_are_made_again(
    spark: SparkSession, plans: tuple[dict[str, Any], dict[str, Any]], raced: tuple[Run, Run, RacingTables]
) -> None:
    run = raced[0]
    before, name = read_explanations(run), run.tables.name("explanations")
    first, second = run.models[0].explain_key, run.models[1].explain_key
    spark.sql(f"DELETE FROM {name} WHERE bucket = 0 AND explain_key = '{first}'")
    doubled = spark.sql(f"SELECT * FROM {name} WHERE bucket = 1 AND explain_key = '{second}'").localCheckpoint()
    doubled.write.format("delta").mode("append").saveAsTable(name)
    assert len(read_explanations(run)) != len(before)
    again = run_plan(spark, plans[0], stages=["attribute"])
    assert read_explanations(again) == before


def test_word_sums_of_two_jobs_are_there_once(
    spark: SparkSession, plans: tuple[dict[str, Any], dict[str, Any]], raced: tuple[Run, Run, RacingTables]
) -> None:
    found: list[list[Any]] = []

    def overtake() -> None:
        other = run_plan(spark, plans[1], stages=["aggregate"])
        found.append(sorted(other.tables.read("word_sums").collect(), key=repr))

    with open_run(spark, load_plan(plans[0]), find_method, RecordedProgress()) as run:
        run.tables = RacingTables(run.tables, "word_sums", overtake)
        run.aggregate()
        run.finish("finished")
    assert found[0]
    assert sorted(run.tables.read("word_sums").collect(), key=repr) == found[0]
    assert isinstance(run.tables, RacingTables)
    assert run.tables.replaced.count("word_sums") == 1


# --- refused by Delta in the middle of a commit -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    opened = Tables(spark, Sink(path=str(tmp_path_factory.mktemp("sink"))))
    opened.create()
    return opened


def make_row(tables: Tables, table: str, **values: Any) -> DataFrame:
    columns = {name: values.get(name) for name, _, _ in TABLES[table].columns}
    return tables.spark.createDataFrame([columns], TABLES[table].schema)


def hold_up(rows: DataFrame, table: str, folder: Path) -> DataFrame:
    """Return rows that come when the file `go` is there; each attempt to read them leaves a file."""

    def wait(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            (folder / f"attempt {time.monotonic_ns()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
            yield batch

    return rows.coalesce(1).mapInArrow(wait, TABLES[table].schema)


def overtake(slow: Callable[[], None], fast: Callable[[], None], folder: Path) -> None:
    """Let `fast` commit while the transaction of `slow` is open."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slow)
        deadline = time.monotonic() + 60
        while not list(folder.glob("attempt *")) and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            fast()
        finally:
            (folder / "go").touch()
        waiting.result(timeout=120)


def test_a_replacement_refused_for_another_is_tried_again(tables: Tables, tmp_path: Path) -> None:
    where = "corpus_key = 'raced' AND increment = 0"
    rows = make_row(tables, "chunks", corpus_key="raced", explain_key="m", increment=0, bucket=0, n_documents=7)
    held_up = hold_up(rows, "chunks", tmp_path)
    overtake(
        lambda: tables.replace(held_up, "chunks", where=where),
        lambda: tables.replace(rows, "chunks", where=where),
        tmp_path,
    )
    assert len(list(tmp_path.glob("attempt *"))) >= 2  # the first one was refused
    assert tables.read("chunks").where(where).collect() == rows.collect()


def test_of_two_that_add_an_increment_the_first_wins(tables: Tables, tmp_path: Path) -> None:
    place = {"corpus_key": "raced", "increment": 0, "bucket": 0}
    first = make_row(tables, "staged", **place, doc_id="first", snapshot="a")
    second = make_row(tables, "staged", **place, doc_id="second", snapshot="b")
    held_up = hold_up(second, "staged", tmp_path)
    unless = "present.corpus_key = 'raced' AND present.increment = 0"
    overtake(
        lambda: tables.add_first(held_up, "staged", unless=unless),
        lambda: tables.add_first(first, "staged", unless=unless),
        tmp_path,
    )
    assert [row["doc_id"] for row in tables.read("staged").where("corpus_key = 'raced'").collect()] == ["first"]


def test_commits_carry_the_run(tables: Tables) -> None:
    tables.sign_commits({"run_id": "r1"})
    row = make_row(tables, "staged", corpus_key="signed", increment=0, bucket=0, doc_id="a")
    tables.add_first(row, "staged", unless="present.corpus_key = 'signed'")
    tables.replace(make_row(tables, "models", model_key="k", digest="0" * 64), "models", where="model_key = 'k'")
    for table in ("staged", "models"):
        last = tables.spark.sql(f"DESCRIBE HISTORY {tables.name(table)} LIMIT 1").collect()[0]
        assert last["userMetadata"] == '{"run_id": "r1"}'
