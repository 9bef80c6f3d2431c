"""Sources that change: what is staged is what the recorded snapshot names, and a run keeps the input of its start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession

from core.models import save_trainable
from lexplain import corpus
from lexplain.corpus import Snapshot, list_labelled, list_labels, stage
from lexplain.errors import CorpusError, LimitError
from lexplain.methods import find_method
from lexplain.pipeline import open_run
from lexplain.plan import Columns, Sink, Source
from lexplain.tables import Tables
from spark.planted import RecordedProgress, load_plan, make_plan, plant, stop_plan, write_json

COLUMNS = Columns(doc_id="doc_id", labels="labels")


@pytest.fixture(scope="module")
def tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    opened = Tables(spark, Sink(path=str(tmp_path_factory.mktemp("sink"))))
    opened.create()
    return opened


def make_documents(spark: SparkSession, first: int, last: int) -> DataFrame:
    rows = [(str(n), f"text {n}", ["even" if n % 2 == 0 else "odd"]) for n in range(first, last)]
    return spark.createDataFrame(rows, "doc_id STRING, text STRING, labels ARRAY<STRING>")


def after_snapshots(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], object]) -> None:
    """Let `change(n)` happen right after the n-th snapshot is taken, from 0: between it and the reading."""
    take, taken = corpus.take_snapshot, [0]

    def take_and_change(spark: SparkSession, source: Source, name: str) -> Snapshot:
        snapshot = take(spark, source, name)
        taken[0] += 1
        change(taken[0] - 1)
        return snapshot

    monkeypatch.setattr(corpus, "take_snapshot", take_and_change)


def read_ids(tables: Tables, key: str) -> dict[int, list[int]]:
    """Return the document ids of each increment."""
    ids: dict[int, list[int]] = {}
    for row in tables.read("staged").where(f"corpus_key = '{key}'").collect():
        ids.setdefault(row["increment"], []).append(int(row["doc_id"]))
    return {increment: sorted(found) for increment, found in sorted(ids.items())}


def read_increments(tables: Tables, key: str) -> list[tuple[int, int]]:
    rows = tables.read("increments").where(f"corpus_key = '{key}'").orderBy("increment").collect()
    return [(row["increment"], row["n_documents"]) for row in rows]


def stage_all(tables: Tables, source: Source) -> corpus.Staged:
    return stage(tables, source, name="corpus", chunk_documents=4)


@pytest.mark.parametrize("kind", ["table", "delta"])
def test_a_delta_table_is_read_at_the_version_that_is_recorded(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spark, path = tables.spark, str(tmp_path / "table")
    make_documents(spark, 0, 10).write.format("delta").save(path)
    source = Source(path=path, format="delta", columns=COLUMNS)
    if kind == "table":
        spark.sql(f"CREATE TABLE default.moving USING delta LOCATION '{path}'")
        source = Source(table="default.moving", columns=COLUMNS)

    def append(n: int) -> None:
        if n == 0:
            make_documents(spark, 10, 12).write.format("delta").mode("append").save(path)

    after_snapshots(monkeypatch, append)
    first = stage_all(tables, source)
    assert (first.increments, first.n_documents) == (1, 10)
    second = stage_all(tables, source)
    assert (second.increments, second.n_documents) == (2, 12)
    assert read_ids(tables, first.key) == {0: list(range(10)), 1: [10, 11]}
    snapshots = tables.read("increments").where(f"corpus_key = '{first.key}'").orderBy("increment").collect()
    assert [row["snapshot"].rsplit("@")[1] for row in snapshots] == ["0", "1"]
    staged = tables.read("staged").where(f"corpus_key = '{first.key}'").select("increment", "snapshot").distinct()
    assert {row["increment"]: row["snapshot"] for row in staged.collect()} == {
        row["increment"]: row["snapshot"] for row in snapshots
    }


def test_files_that_change_while_they_are_read_are_read_again(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "files")
    make_documents(tables.spark, 0, 10).write.parquet(path)
    source = Source(path=path, format="parquet", columns=COLUMNS)

    def append(n: int) -> None:
        if n == 0:
            make_documents(tables.spark, 10, 12).write.mode("append").parquet(path)

    after_snapshots(monkeypatch, append)
    staged = stage_all(tables, source)
    assert (staged.increments, staged.n_documents) == (1, 12)
    assert read_ids(tables, staged.key) == {0: list(range(12))}
    assert read_increments(tables, staged.key) == [(0, 12)]


def test_files_that_never_rest_are_refused(tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "files")
    make_documents(tables.spark, 0, 4).write.parquet(path)
    source = Source(path=path, format="parquet", columns=COLUMNS)
    after_snapshots(
        monkeypatch,
        lambda n: make_documents(tables.spark, 4 + n, 5 + n).write.mode("append").parquet(path),
    )
    with pytest.raises(CorpusError, match="changed each of 3 times"):
        stage_all(tables, source)
    assert read_ids(tables, corpus.corpus_key(source)) == {}


@pytest.mark.parametrize("kind", ["temporary", "catalog"])
def test_a_view_is_followed_by_its_documents(tables: Tables, tmp_path: Path, kind: str) -> None:
    spark, path = tables.spark, str(tmp_path / "parquet")
    make_documents(spark, 0, 10).write.parquet(path)
    spark.sql(f"CREATE TABLE default.{kind}_files USING parquet LOCATION '{path}'")
    view = "default.seen" if kind == "catalog" else "seen_temporarily"
    spark.sql(
        f"CREATE {'TEMPORARY' if kind == 'temporary' else ''} VIEW {view} AS"
        f" SELECT * FROM default.{kind}_files WHERE doc_id != '3'"
    )
    source = Source(table=view, columns=COLUMNS)
    first = stage_all(tables, source)
    assert (first.increments, first.n_documents) == (1, 9)
    commits = tables.commits
    assert stage_all(tables, source) == first
    assert tables.commits == commits
    spark.sql(f"INSERT INTO default.{kind}_files SELECT '10', 'text 10', array('even')")
    assert stage_all(tables, source).n_documents == 10
    assert read_ids(tables, first.key)[1] == [10]


def test_a_table_that_is_not_there_is_named(tables: Tables) -> None:
    with pytest.raises(CorpusError, match="nowhere"):
        stage_all(tables, Source(table="default.nowhere", columns=COLUMNS))


class OvertakenTables(Tables):
    """Tables of a job that another one overtakes before its first commit to `staged`."""

    overtake: Callable[[], object] | None = None

    def add_first(self, rows: DataFrame, table: str, *, unless: str) -> None:
        overtake, self.overtake = self.overtake, None
        if overtake is not None:
            overtake()
        super().add_first(rows, table, unless=unless)


def test_two_jobs_that_stage_one_source_share_its_increments(tables: Tables, tmp_path: Path) -> None:
    """The other job reads a newer version, and records it first: ours finds it done, and goes on from it."""
    spark, path = tables.spark, str(tmp_path / "table")
    make_documents(spark, 0, 10).write.format("delta").save(path)
    source = Source(path=path, format="delta", columns=COLUMNS)
    others: list[corpus.Staged] = []

    def overtake() -> None:
        make_documents(spark, 10, 12).write.format("delta").mode("append").save(path)
        others.append(stage_all(tables, source))

    ours = OvertakenTables(spark, tables.sink)
    ours.overtake = overtake
    assert stage_all(ours, source) == others[0]
    assert others[0].n_documents == 12
    assert read_ids(tables, others[0].key) == {0: list(range(12))}
    assert read_increments(tables, others[0].key) == [(0, 12)]


def test_files_that_are_withdrawn_are_deleted_documents(tables: Tables, tmp_path: Path) -> None:
    """The listing is again what it was at the first reading, but more was read since."""
    write_json(
        tmp_path / "a.jsonl", documents := [{"doc_id": str(n), "text": f"text {n}", "labels": []} for n in range(8)]
    )
    source = Source(path=str(tmp_path), format="json", columns=COLUMNS)
    key = stage_all(tables, source).key
    faulty = write_json(tmp_path / "b.jsonl", [{**one, "doc_id": f"1{one['doc_id']}"} for one in documents[:2]])
    assert stage_all(tables, source).increments == 2
    withdrawn = faulty.rename(tmp_path.parent / "withdrawn.jsonl")
    for _ in range(2):
        with pytest.raises(CorpusError, match="0 changed and 2 deleted documents"):
            stage_all(tables, source)
    withdrawn.rename(faulty)
    assert stage_all(tables, source).n_documents == 10
    assert read_increments(tables, key) == [(0, 8), (1, 2)]


def test_a_snapshot_that_another_job_has_overtaken_is_taken_again(tables: Tables, tmp_path: Path) -> None:
    spark, path = tables.spark, str(tmp_path / "table")
    make_documents(spark, 0, 5).write.format("delta").save(path)
    source = Source(path=path, format="delta", columns=COLUMNS)
    first, taken = stage_all(tables, source), corpus.take_snapshot(spark, source, "corpus")
    for last in (7, 9):
        make_documents(spark, last - 2, last).write.format("delta").mode("append").save(path)
        theirs = stage_all(tables, source)
        ours = stage(tables, source, name="corpus", chunk_documents=1000, taken=taken)
        assert (ours, ours.n_documents) == (theirs, last)
        taken = corpus.take_snapshot(spark, source, "corpus")
    assert read_increments(tables, first.key) == [(0, 5), (1, 2), (2, 2)]


def test_an_increment_that_was_staged_and_not_recorded_is_taken_over(tables: Tables, tmp_path: Path) -> None:
    """As a job leaves it that is killed in between; its source has changed since."""
    path = tmp_path / "documents.jsonl"
    documents = [{"doc_id": str(n), "text": f"text {n}", "labels": ["a"]} for n in range(10)]
    source = Source(path=str(write_json(path, documents[:8])), columns=COLUMNS)
    staged = stage_all(tables, source)
    recorded = tables.read("increments").where(f"corpus_key = '{staged.key}'").drop("staged_at").collect()
    tables.spark.sql(f"DELETE FROM {tables.name('increments')} WHERE corpus_key = '{staged.key}'")
    write_json(path, documents)
    assert stage_all(tables, source).n_documents == 10
    again = tables.read("increments").where(f"corpus_key = '{staged.key}'").drop("staged_at").orderBy("increment")
    assert again.collect()[0] == recorded[0]
    assert read_ids(tables, staged.key) == {0: list(range(8)), 1: [8, 9]}


@pytest.mark.slow
def test_an_unfinished_run_keeps_both_inputs(spark: SparkSession, tmp_path: Path) -> None:
    save_trainable(tmp_path / "base")
    labelled, unlabelled = plant(30, seed=1), plant(20, seed=2)
    plan: dict[str, Any] = make_plan(tmp_path, mlflow={"enabled": False})
    plan["models"] |= {"splits": 1, "epochs": 1}
    plan["keywords"]["evidence"] = "predicted"
    plan["corpus"] = {"path": str(tmp_path / "corpus.jsonl"), "columns": {"doc_id": "doc_id"}}

    def write(n: int) -> None:
        write_json(tmp_path / "training.jsonl", labelled[: 20 + n])
        write_json(
            tmp_path / "corpus.jsonl", [{"doc_id": d["doc_id"], "text": d["text"]} for d in unlabelled[: 10 + n]]
        )

    def open_and(end: str, **changes: Any) -> tuple[int, int, int]:
        with open_run(spark, load_plan(plan | changes), find_method, RecordedProgress()) as run:
            assert run.training is not None
            counts = (
                run.training.n_documents,
                run.corpus.n_documents,
                len(list_labelled(run.tables, run.training, 1000)),
            )
            if end == "stopped":
                raise LimitError("stopped by the test")
            run.fine_tune()
            (model,) = run.models
            row = run.tables.read("models").where(f"digest = '{model.digest}'").collect()[0]
            assert row["n_train"] + row["n_test"] == counts[0]
            run.finish("finished")
        return counts

    write(0)
    with pytest.raises(LimitError):
        open_and("stopped")
    row = Tables(spark, Sink(path=plan["sink"]["path"])).read("runs").collect()[0]
    assert row["status"] == "stopped"
    assert (row["training_snapshot"][-2:], row["corpus_snapshot"][-2:]) == ("/1", "/1")
    write(5)
    assert open_and("finished", name="other") == (25, 15, 25)
    assert open_and("finished") == (20, 10, 20)
    assert open_and("finished") == (25, 15, 25)
    # Started again with more documents, and killed before it has read any, or only some of them.
    write(7)
    stop_plan(spark, plan, lambda run: None)
    assert open_and("finished") == (27, 17, 27)
    write(8)
    stop_plan(spark, plan, lambda run: run.training)
    write(9)
    assert open_and("finished") == (28, 19, 28)


def test_what_was_staged_later_is_not_listed(tables: Tables, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    lines = [{"doc_id": str(n), "text": f"text {n}", "labels": ["late" if n == 8 else "early"]} for n in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:8]), encoding="utf-8")
    source = Source(path=str(path), columns=COLUMNS)
    first = stage_all(tables, source)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    second = stage_all(tables, source)
    assert list_labels(tables, first) == ["early"]
    assert list_labels(tables, second) == ["early", "late"]
    assert (len(list_labelled(tables, first, 1000)), len(list_labelled(tables, second, 1000))) == (8, 9)


def test_splits_are_drawn_from_texts_that_can_be_read(tables: Tables, tmp_path: Path) -> None:
    texts = ["the bank", "", " \n", "!!! ...", "the bank " * 20, None, "été"]
    path = tmp_path / "documents.jsonl"
    lines = [{"doc_id": str(n), "text": text, "labels": ["a"]} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    staged = stage_all(tables, Source(path=str(path), columns=COLUMNS))
    drawn = {digest for digest, _ in list_labelled(tables, staged, 100)}
    assert drawn == {hashlib.sha256(text.encode()).hexdigest() for text in ("the bank", "été")}


def append_to(spark: SparkSession, path: str, first: int, last: int) -> None:
    make_documents(spark, first, last).write.format("delta").mode("append").save(path)


def count_reads(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what kind of reading each increment was: `all` documents, or only `new` ones."""
    kinds: list[str] = []
    read = corpus.read_documents

    def read_and_note(*given: Any, rows: DataFrame | None = None, **named: Any) -> DataFrame:
        kinds.append("all" if rows is None else "new")
        return read(*given, rows=rows, **named)

    monkeypatch.setattr(corpus, "read_documents", read_and_note)
    return kinds


@pytest.mark.slow
def test_a_change_feed_tells_what_was_appended_without_reading_the_rest(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark, path = tables.spark, str(tmp_path / "fed")
    spark.conf.set("spark.databricks.delta.properties.defaults.enableChangeDataFeed", "true")
    try:
        make_documents(spark, 0, 10).write.format("delta").save(path)
    finally:
        spark.conf.unset("spark.databricks.delta.properties.defaults.enableChangeDataFeed")
    source = Source(path=path, format="delta", columns=COLUMNS)
    kinds = count_reads(spark, monkeypatch)
    stage_all(tables, source)
    append_to(spark, path, 10, 12)
    append_to(spark, path, 12, 13)
    spark.sql(f"OPTIMIZE delta.`{path}`")  # changes no row
    second = stage_all(tables, source)
    assert kinds == ["all", "new"]
    assert read_ids(tables, second.key) == {0: list(range(10)), 1: [10, 11, 12]}
    append_to(spark, path, 3, 4)
    with pytest.raises(CorpusError, match="ids of documents that were read before, as '3'"):
        stage_all(tables, source)
    spark.sql(f"RESTORE TABLE delta.`{path}` TO VERSION AS OF 3")
    append_to(spark, path, 13, 14)
    third = stage_all(tables, source)  # a commit that took rows away: all documents are compared
    assert kinds[-1] == "all"
    assert read_ids(tables, third.key)[2] == [13]
    spark.sql(f"DELETE FROM delta.`{path}` WHERE doc_id = '5'")
    with pytest.raises(CorpusError, match="0 changed and 1 deleted"):
        stage_all(tables, source)


@pytest.mark.slow
@pytest.mark.parametrize(
    "grows",
    [
        "CAST(doc_id AS INT)", "CAST(doc_id AS BIGINT) + 10000000000", "date_add(DATE'2026-01-01', CAST(doc_id AS INT))",
        "timestamp_micros(1700000000000000 + CAST(doc_id AS INT))", "lpad(doc_id, 6, \"0'\")",
    ],
)  # fmt: skip
def test_a_watermark_tells_what_is_new(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grows: str
) -> None:
    spark, path = tables.spark, str(tmp_path / "rows")

    def add(first: int, last: int) -> None:
        make_documents(spark, first, last).selectExpr("*", f"{grows} AS seen").write.mode("append").parquet(path)

    kinds = count_reads(spark, monkeypatch)
    source = Source(path=path, format="parquet", columns=COLUMNS, watermark="seen")
    add(0, 10)
    stage_all(tables, source)
    assert stage_all(tables, source).increments == 1
    add(10, 13)
    second = stage_all(tables, source)
    assert kinds == ["all", "new"]
    assert read_ids(tables, second.key) == {0: list(range(10)), 1: [10, 11, 12]}
    assert (
        stage_all(tables, Source(path=path, format="parquet", columns=COLUMNS)).n_documents == 13
    )  # the same documents


def test_a_watermark_that_cannot_tell_is_refused(tables: Tables, tmp_path: Path) -> None:
    spark, path = tables.spark, str(tmp_path / "rows")
    make_documents(spark, 0, 4).selectExpr(
        "*", "CASE WHEN doc_id < 3 THEN 1 END AS holes", "CAST(doc_id AS DOUBLE) AS real", "CAST(doc_id AS INT) AS seen"
    ).write.parquet(path)

    def source(watermark: str) -> Source:
        return Source(path=path, format="parquet", columns=COLUMNS, watermark=watermark)

    for name, says in {"holes": "is null in 1 rows", "real": "is of type double", "no_such": "is no column"}.items():
        with pytest.raises(CorpusError, match=f"corpus.watermark='{name}' {says}"):
            stage_all(tables, source(name))
    stage_all(tables, source("seen"))
    make_documents(spark, 2, 3).selectExpr("*", "9 AS seen").write.mode("append").parquet(path)
    with pytest.raises(CorpusError, match="ids of documents that were read before, as '2'"):
        stage_all(tables, source("seen"))


def test_optimize_on_the_source_changes_nothing(tables: Tables, tmp_path: Path) -> None:
    spark, path = tables.spark, str(tmp_path / "small")
    for first in range(0, 12, 4):
        append_to(spark, path, first, first + 4)
    source = Source(path=path, format="delta", columns=COLUMNS)
    first = stage_all(tables, source)
    spark.sql(f"OPTIMIZE delta.`{path}`")
    again = stage_all(tables, source)
    assert again.snapshot != first.snapshot
    assert replace(again, snapshot=first.snapshot) == first
    assert read_increments(tables, first.key) == [(0, 12), (1, 0)]


@pytest.mark.slow
def test_rows_that_come_late_or_tie_with_the_watermark_are_found(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spark, path = tables.spark, str(tmp_path / "days")

    def add(first: int, last: int, day: int, column: str = "day") -> None:
        rows = make_documents(spark, first, last).selectExpr(
            "*", f"date_from_unix_date({day}) AS day", f"{100 + first} AS number"
        )
        rows.write.mode("append").parquet(path)

    kinds = count_reads(spark, monkeypatch)
    by_day = Source(path=path, format="parquet", columns=COLUMNS, watermark="day")
    add(0, 4, 10)
    stage_all(tables, by_day)
    add(4, 6, 10)  # the same day, later
    stage_all(tables, by_day)
    add(6, 8, 9)  # an older day
    add(8, 9, 11)
    stage_all(tables, by_day)
    add(9, 10, 12)
    staged = stage_all(tables, by_day)
    assert kinds == ["all", "all", "all", "new"]
    assert read_ids(tables, staged.key) == {0: [0, 1, 2, 3], 1: [4, 5], 2: [6, 7, 8], 3: [9]}
    add(10, 11, 13)
    # another column: its values say nothing of what was read by the first
    by_number = Source(path=path, format="parquet", columns=COLUMNS, watermark="number")
    assert read_ids(tables, stage_all(tables, by_number).key)[4] == [10]
    assert kinds[-1] == "all"


@pytest.mark.slow
def test_a_feed_whose_files_are_gone_gives_way_to_the_table(tables: Tables, tmp_path: Path) -> None:
    spark, path = tables.spark, str(tmp_path / "vacuumed")
    spark.conf.set("spark.databricks.delta.properties.defaults.enableChangeDataFeed", "true")
    spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    try:
        make_documents(spark, 0, 4).write.format("delta").save(path)
        source = Source(path=path, format="delta", columns=COLUMNS)
        stage_all(tables, source)
        append_to(spark, path, 4, 6)
        spark.sql(f"OPTIMIZE delta.`{path}`")
        spark.sql(f"VACUUM delta.`{path}` RETAIN 0 HOURS")
    finally:
        spark.conf.unset("spark.databricks.delta.properties.defaults.enableChangeDataFeed")
        spark.conf.unset("spark.databricks.delta.retentionDurationCheck.enabled")
    assert read_ids(tables, stage_all(tables, source).key) == {0: [0, 1, 2, 3], 1: [4, 5]}
