"""Files and bytes that people's queries read, before and after OPTIMIZE, with the clustering of schema.py.

Explanations come chunk by chunk in one commit each, from tasks of as many documents as attribution gives them.

    PYTHONPATH=tests .venv/bin/python -m bench.layout --word-rows 10000000
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.events import make_log_settings, read_java, read_queries
from bench.machine import describe_machine
from bench.zipf import Shape, make_plan, make_shape, write_chunks, write_ledger, write_run
from lexplain.keywords import rank_keywords, sum_words
from lexplain.session import open_session, stop_session
from lexplain.tables import Tables

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

TASK_DOCUMENTS = 32
"""Documents a task of attribution."""

OTHER_RUNS = 3
"""Keyword tables of other runs beside the one that is asked for."""

OPTIMISED = ("explanations", "word_sums", "keywords")


def write_tables(tables: Tables, shape: Shape) -> None:
    """Write explanations as attribution commits them, their sums, and keyword tables of several runs."""
    plan = make_plan(str(tables.folder), shape)
    tasks = math.ceil(shape.chunk_documents / TASK_DOCUMENTS)
    for bucket in range(shape.chunks):
        write_chunks(tables, plan, shape, range(bucket, bucket + 1), tasks=tasks)
    corpus = write_ledger(tables, plan, shape)
    write_run(tables, plan, shape, "asked")
    sum_words(tables, plan, corpus, shape.explain_keys)
    for name in ["asked", *(f"other {number}" for number in range(OTHER_RUNS))]:
        rank_keywords(
            tables,
            plan,
            corpus,
            shape.explain_keys,
            keyword_key=name,
            labelled=None,
            test_share_ratio=None,
            signed=True,
        )


def list_queries(spark: SparkSession, label: str) -> dict[str, str]:
    """Return the queries by name; the word whose evidence is asked for is one of the middle of the class's list."""
    ours = f"name = 'scale' AND label = '{label}'"
    words = spark.sql(f"SELECT word FROM keywords_current WHERE {ours} ORDER BY rank").collect()
    word = words[len(words) // 2]["word"]
    return {
        "a class's keywords": f"SELECT rank, word, score_mean FROM keywords_current WHERE {ours} ORDER BY rank",
        "a word's evidence": f"SELECT doc_id, start, `end`, score FROM keyword_evidence WHERE {ours} AND word = '{word}'",
    }


def ask(spark: SparkSession, queries: dict[str, str], phase: str) -> dict[str, dict[str, float]]:
    """Run the queries; return rows and seconds, the second of two turns."""
    found = {}
    for name, query in queries.items():
        for turn in ("first", "second"):
            spark.sparkContext.setJobDescription(f"{phase} OPTIMIZE, {name}, {turn}")
            started = time.perf_counter()
            rows = spark.sql(query).collect()
            found[name] = {"rows": len(rows), "seconds": time.perf_counter() - started}
    return found


def describe_files(tables: Tables) -> dict[str, dict[str, int]]:
    """Return files and bytes of each table, and of the commits in its log."""
    found = {}
    for name in OPTIMISED:
        row = tables.spark.sql(f"DESCRIBE DETAIL {tables.name(name)}").collect()[0]
        assert tables.folder is not None
        commits = list((tables.folder / name / "_delta_log").glob("*.json"))
        log_bytes = sum(path.stat().st_size for path in commits)
        found[name] = {
            "files": row["numFiles"],
            "bytes": row["sizeInBytes"],
            "commits": len(commits),
            "log_bytes": log_bytes,
        }
    return found


def measure(spark: SparkSession, tables: Tables, shape: Shape, label: str) -> dict[str, Any]:
    """Ask, optimise, ask again."""
    write_tables(tables, shape)
    tables.open()
    queries = list_queries(spark, label)
    record: dict[str, Any] = {"queries": queries}
    for phase in ("before", "after"):
        if phase == "after":
            started = time.perf_counter()
            for name in OPTIMISED:
                spark.sql(f"OPTIMIZE {tables.name(name)}")
            record["optimize_seconds"] = time.perf_counter() - started
        record[phase] = {"tables": describe_files(tables), "queries": ask(spark, queries, phase)}
    return record


def add_scans(record: dict[str, Any], log: Path) -> None:
    """Add to each query what its scans read."""
    for query in read_queries(log):
        phase, _, name = query.section.partition(" OPTIMIZE, ")
        name, _, turn = name.rpartition(", ")
        if turn == "second" and query.scans:
            found = record[phase]["queries"][name]
            found["scans"] = {scan.table: {"files": scan.files, "bytes": scan.bytes} for scan in query.scans}
            found["input_bytes"] = query.total("input_bytes")


def print_table(record: dict[str, Any]) -> None:
    """Print a line a query, phase and table."""
    for phase in ("before", "after"):
        for name, found in record[phase]["queries"].items():
            for table, scan in found["scans"].items():
                whole = record[phase]["tables"].get(table)
                of = f" of {whole['files']}, {whole['bytes'] / 1e6:.1f} MB" if whole else ""
                print(f"{phase:6} {name:18} {table:14} files {scan['files']}, {scan['bytes'] / 1e6:.1f} MB{of}")


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--word-rows", type=int, default=10_000_000)
    parser.add_argument("--file-mib", type=int, default=16, help="OPTIMIZE makes files of this size (default: 16)")
    parser.add_argument("--label", default="class 03", help="the class that is asked for")
    parser.add_argument("--folder", type=Path, default=Path("bench-layout"), help="tables; removed first")
    parser.add_argument("--out", type=Path, default=Path("bench-layout.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    log = folder / "events"
    record = describe_machine(arguments, ["pyspark", "delta-spark"])
    file_bytes = str(arguments.file_mib * 2**20)
    spark = open_session("lexplain benchmark of layout", master="local[2]", settings={
        "spark.driver.memory": "4g", "spark.databricks.delta.optimize.maxFileSize": file_bytes,
        "spark.databricks.delta.optimize.minFileSize": file_bytes, **make_log_settings(log),
    })  # fmt: skip
    try:
        tables = Tables(spark, make_plan(str(folder / "tables"), make_shape(1)).sink)
        tables.create()
        record |= measure(spark, tables, make_shape(arguments.word_rows), arguments.label)
    finally:
        stop_session(spark)
    add_scans(record, log)
    record["versions"]["java"] = read_java(log)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print_table(record)


if __name__ == "__main__":
    main()
