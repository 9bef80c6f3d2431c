"""Tables of an older lexplain: brought to the present schema when a plan runs, or refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from pyspark.sql import DataFrame, SparkSession

from lexplain.corpus import Staged
from lexplain.errors import TableError
from lexplain.keys import corpus_key
from lexplain.keywords import rank_keywords, sum_words
from lexplain.plan import Sink
from lexplain.schema import SCHEMA_VERSION, TABLES
from lexplain.tables import Tables
from spark.test_keywords import LOOSE, explain, make_plan, write, write_corpus

# As schema version 3 created them.
KEYWORDS_3 = """
    keyword_key STRING, label STRING, word STRING, rank INT, score_mean DOUBLE, score_deviation DOUBLE,
    score_std DOUBLE, score_error DOUBLE, ci_low DOUBLE, ci_high DOUBLE, selection_frequency DOUBLE, n_splits INT,
    n_documents BIGINT, n_occurrences BIGINT, document_frequency BIGINT, distinctiveness DOUBLE, kept BOOLEAN,
    drop_reason STRING"""
MODELS_3 = """
    model_key STRING, split INT, seed INT, draw INT, test_share DOUBLE, uri STRING, folder STRING, digest STRING,
    training_key STRING, training_snapshot STRING, labels ARRAY<STRING>, macro_f1 DOUBLE, micro_f1 DOUBLE,
    label_f1 MAP<STRING, DOUBLE>, n_train INT, n_test INT, seconds DOUBLE, mlflow_uri STRING"""
CHECKS_3 = """
    'delta.constraints.kept_or_why' = 'kept = (drop_reason IS NULL)',
    'delta.constraints.rank_of_kept' = 'kept = (rank IS NOT NULL)',
    'delta.constraints.frequency_share' = 'selection_frequency > 0 AND selection_frequency <= 1',"""


def write_old_sink(spark: SparkSession, folder: Path, version: int) -> None:
    """Two tables of an older schema, the one with rows, and the catalogue beside them."""
    at = f"'lexplain.schemaVersion' = '{version}'"
    spark.sql(
        f"CREATE TABLE delta.`{folder}/keywords` ({KEYWORDS_3}) USING delta CLUSTER BY (keyword_key, label)"
        f" TBLPROPERTIES ({CHECKS_3} {at})"
    )
    spark.sql(f"CREATE TABLE delta.`{folder}/models` ({MODELS_3}) USING delta TBLPROPERTIES ({at})")
    spark.sql(
        f"INSERT INTO delta.`{folder}/keywords` (keyword_key, label, word, rank, score_mean, selection_frequency, kept)"
        " VALUES ('old', 'NA', 'bank', 1, 0.5, 1.0, TRUE), ('ours', 'NA', 'bank', 1, 0.5, 1.0, TRUE)"
    )
    (folder / "catalog.sql").write_text(f"-- Tables of lexplain, schema version {version}. Run it first\n")


def test_an_older_sink_is_given_the_columns_it_lacks(spark: SparkSession, tmp_path: Path) -> None:
    write_old_sink(spark, tmp_path, 3)
    tables = Tables(spark, Sink(path=str(tmp_path)))
    with pytest.raises(TableError, match="run its plan again, which adds them"):
        tables.open()
    tables.create()
    for name, table in TABLES.items():
        assert set(tables.read(name).columns) == {column for column, _, _ in table.columns}, name
        properties = spark.sql(f"SHOW TBLPROPERTIES {tables.name(name)}").collect()
        assert {row["key"]: row["value"] for row in properties}["lexplain.schemaVersion"] == str(SCHEMA_VERSION)
    (comment,) = [
        row["comment"] for row in spark.sql(f"DESCRIBE {tables.name('keywords')}").collect() if row[0] == "signed"
    ]
    assert comment.startswith("scores have a sign")
    before = tables.versions()
    tables.create()
    tables.open()
    assert tables.versions() == before
    # An old table says nothing of signs until its plan runs again, which marks its own rows and no other's.
    plan = make_plan("upgraded", **LOOSE)
    write_corpus(tables, plan, [explain(0, "a", "NA", [("bank", 0.25)])])
    staged = Staged(corpus_key(plan.corpus), 1, 1)
    run = {
        "run_id": "r",
        "name": "upgraded",
        "status": "finished",
        "finished_at": datetime.now(UTC),
        "keyword_key": "ours",
    }
    write(tables, "runs", [run])
    read = "SELECT word, score_mean, signed FROM keywords_current WHERE name = 'upgraded'"
    assert [tuple(row) for row in spark.sql(read).collect()] == [("bank", 0.5, None)]
    assert sum_words(tables, plan, staged, ["model0"]) == 1
    rank_keywords(
        tables, plan, staged, ["model0"], keyword_key="ours", labelled=None, test_share_ratio=None, signed=False
    )
    assert [tuple(row) for row in spark.sql(read).collect()] == [("bank", 0.25, False)]
    old = tables.read("keywords").where("keyword_key = 'old'").collect()
    assert [(row["word"], row["signed"]) for row in old] == [("bank", None)]
    with pytest.raises(Exception, match="frequency_share"):
        spark.sql(f"UPDATE {tables.name('keywords')} SET selection_frequency = 7 WHERE keyword_key = 'old'")


class _Overtaken(Tables):
    """A job that another one overtakes between its look at a table and its change of it."""

    def read(self, table: str) -> DataFrame:
        seen = super().read(table)
        if "signed" not in seen.columns:
            Tables(self.spark, self.sink).create()
        return seen


def test_of_two_jobs_that_bring_a_sink_up_to_date_both_go_on(spark: SparkSession, tmp_path: Path) -> None:
    write_old_sink(spark, tmp_path, 3)
    tables = _Overtaken(spark, Sink(path=str(tmp_path)))
    tables.create()
    tables.open()
    for name in ("keywords", "models"):
        assert set(tables.read(name).columns) == {column for column, _, _ in TABLES[name].columns}
        added = spark.sql(f"DESCRIBE HISTORY {tables.name(name)}").where("operation = 'ADD COLUMNS'")
        assert added.count() == 1


def test_a_sink_whose_tables_differ_by_more_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    for version in (2, SCHEMA_VERSION + 1):
        folder = tmp_path / str(version)
        folder.mkdir()
        write_old_sink(spark, folder, version)
        tables = Tables(spark, Sink(path=str(folder)))
        with pytest.raises(TableError, match=f"version {version}, .* run the plan into a new folder"):
            tables.open()
        with pytest.raises(TableError, match=f"schema version {version}, .* Write to a new sink"):
            tables.create()
        assert "signed" not in tables.read("keywords").columns
