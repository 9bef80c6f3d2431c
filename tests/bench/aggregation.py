"""From explanations to keywords on Spark beside DuckDB: seconds by size, plans, spilling, and equal results.

`make bench-scale` runs it. Both read the same Parquet files of a Delta table, with the same cores and the same memory, one
after the other. Spark's part is what a job runs, `sum_words` and `rank_keywords`, its Delta commits included. Sums are
compared to the last digit.

    PYTHONPATH=tests .venv/bin/python -m bench.aggregation --word-rows 1000000 10000000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from bench.duckdb_rival import connect, run_rival
from bench.events import make_log_settings, read_heap_peak, read_java, read_queries, summarise
from bench.machine import describe_machine, read_cpu_seconds, read_load
from bench.zipf import Shape, make_plan, make_shape, write_explanations
from lexplain.corpus import Staged
from lexplain.keys import corpus_key
from lexplain.keywords import rank_keywords, sum_words
from lexplain.session import open_session, stop_session
from lexplain.tables import Tables

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from pyspark.sql import SparkSession

KEYWORD_KEY = "scale"
STAGES = ("sums", "keywords")


def open_tables(spark: SparkSession, folder: Path, shape: Shape) -> tuple[Tables, Staged]:
    """Return the tables of a folder, their explanations written if they were not."""
    plan = make_plan(str(folder), shape)
    tables = Tables(spark, plan.sink)
    done = folder / "written.json"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
    tables.create()
    if done.is_file():
        return tables, Staged(corpus_key(plan.corpus), 1, shape.documents)
    started = time.perf_counter()
    corpus = write_explanations(tables, plan, shape)
    counts = tables.read("explanations").selectExpr("count(*) AS rows", "sum(size(words)) AS word_rows").first()
    assert counts is not None
    files = list_files(tables, "explanations")
    done.write_text(json.dumps({
        **counts.asDict(), "documents": shape.documents, "files": len(files),
        "bytes": sum(os.path.getsize(name) for name in files), "seconds": time.perf_counter() - started,
    }))  # fmt: skip
    return tables, corpus


def list_files(tables: Tables, table: str) -> list[str]:
    """Return the table's active files, as its log says."""
    return [unquote(urlparse(name).path) for name in tables.read(table).inputFiles()]


def run_spark(spark: SparkSession, tables: Tables, corpus: Staged, shape: Shape) -> dict[str, float]:
    """Make the keyword tables anew as a job does; return the seconds of each stage, and what the JVM had of the cores."""
    for name in ("word_sums", "word_statistics", "keywords"):
        spark.sql(f"DELETE FROM {tables.name(name)}")
    plan, keys = make_plan(str(tables.folder), shape), shape.explain_keys

    def rank() -> None:
        rank_keywords(
            tables, plan, corpus, keys, keyword_key=KEYWORD_KEY, labelled=None, test_share_ratio=None, signed=True
        )

    jvm: int = spark.sparkContext._gateway.proc.pid
    seconds = {}
    used = read_cpu_seconds(jvm)
    for name, work in {"sums": lambda: sum_words(tables, plan, corpus, keys), "keywords": rank}.items():
        spark.sparkContext.setJobDescription(f"{name} {shape.documents}")
        started = time.perf_counter()
        work()
        seconds[f"{name}_seconds"] = time.perf_counter() - started
    spark.sparkContext.setJobDescription("")
    return seconds | {"cpu_seconds": read_cpu_seconds(jvm) - used}


def compare(connection: DuckDBPyConnection, tables: Tables, out: Path) -> dict[str, Any]:
    """Return how many rows there are, and how many differ: sums to the last digit, doubles by more than 1e-12."""

    def read(table: str) -> str:
        files = ", ".join(repr(name) for name in list_files(tables, table))
        return f"read_parquet([{files}], hive_partitioning = true)"

    def count(query: str) -> int:
        return int(connection.execute(query).fetchall()[0][0])

    sums = "explain_key, increment, bucket, split, label, word, doc_group, n_documents, n_occurrences, score_sum, score_square_sum"
    exact = "label, word, rank, selection_frequency, n_documents, n_occurrences, document_frequency, drop_reason"
    ours = {
        "sums": f"SELECT {sums} FROM {read('word_sums')} WHERE label IS NOT NULL",
        "keywords": f"SELECT *, ci_high - score_mean AS half_width FROM {read('keywords')}",
    }
    theirs = {name: f"SELECT * FROM read_parquet('{out / name}.parquet')" for name in STAGES}
    record: dict[str, Any] = {}
    for name, columns in (("sums", sums), ("keywords", exact)):
        mine, other = (f"SELECT {columns} FROM ({side[name]})" for side in (ours, theirs))
        record[f"{name}_rows"] = count(f"SELECT count(*) FROM ({ours[name]})")
        record[f"{name}_differing"] = count(
            f"SELECT count(*) FROM ((({mine}) EXCEPT ALL ({other})) UNION ALL (({other}) EXCEPT ALL ({mine})))"
        )
    doubles = ("score_mean", "score_deviation", "score_std", "half_width", "distinctiveness")
    # A deviation is the root of a difference of squares: where it is 0 its square is known to 1e-15.
    off = " OR ".join(
        f"(a.{name} IS NULL) != (b.{name} IS NULL) OR abs(a.{name} - b.{name}) > {'1e-7' if name == 'score_deviation' else '1e-12'}"
        for name in doubles
    )
    record["keywords_doubles_differing"] = count(
        f"SELECT count(*) FROM ({ours['keywords']}) a JOIN ({theirs['keywords']}) b USING (label, word) WHERE {off}"
    )
    record["kept"] = count(f"SELECT count(*) FROM ({ours['keywords']}) WHERE kept")
    return record


def measure(spark: SparkSession, shape: Shape, folder: Path, connection: DuckDBPyConnection) -> dict[str, Any]:
    """Run both on one size, compare what they made, and return the figures."""
    tables, corpus = open_tables(spark, folder, shape)
    record: dict[str, Any] = {"written": json.loads((folder / "written.json").read_text()), "load_before": read_load()}
    record["spark"] = run_spark(spark, tables, corpus, shape)
    record["load_between"] = read_load()
    plan = make_plan(str(folder), shape)
    min_splits = math.ceil(Decimal(str(plan.keywords.theta)) * shape.splits)
    out = folder / "duckdb"
    used = read_cpu_seconds(os.getpid())  # it runs in this process
    record["duckdb"] = run_rival(
        connection, list_files(tables, "explanations"), out, plan, shape.explain_keys, min_splits
    )
    record["duckdb"]["cpu_seconds"] = read_cpu_seconds(os.getpid()) - used
    record["load_after"] = read_load()
    record["results"] = compare(connection, tables, out)
    for side in ("spark", "duckdb"):
        record[side]["seconds"] = sum(record[side][f"{name}_seconds"] for name in STAGES)
    record["times_duckdb"] = record["spark"]["seconds"] / record["duckdb"]["seconds"]
    record["times_duckdb_cpu"] = record["spark"]["cpu_seconds"] / record["duckdb"]["cpu_seconds"]
    return record


def add_events(record: dict[str, Any], log: Path) -> None:
    """Add what the event log says of each size and stage: figures, and the plans of queries over the tables."""
    queries = read_queries(log)
    for size in record["sizes"]:
        for name in STAGES:
            mine = [query for query in queries if query.section == f"{name} {size['written']['documents']}"]
            size["spark"][name] = summarise(mine)
            size["spark"][f"{name}_plans"] = [query.plan for query in mine if query.scans]
    record["heap_peak_bytes"] = read_heap_peak(log)
    record["versions"]["java"] = read_java(log)


def write_plans(record: dict[str, Any], folder: Path) -> None:
    """Move the plans out of the figures into text files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in record["sizes"]:
        rows = size["written"]["word_rows"]
        for side in ("spark", "duckdb"):
            for name in STAGES:
                plans = size[side].pop(f"{name}_plans", None) or [size[side].pop(f"{name}_plan")]
                (folder / f"{rows}-{side}-{name}.txt").write_text("\n\n".join(plans))


def count_differing(size: dict[str, Any]) -> int:
    """Return how many rows of Spark's are not DuckDB's, or the other way round."""
    return sum(count for name, count in size["results"].items() if name.endswith("_differing"))


def print_table(sizes: Sequence[dict[str, Any]]) -> None:
    """Print a line a size; seconds are of sums + keywords, then of the cores."""
    print(
        "   word rows   Spark s                     DuckDB s                    times DuckDB  of the cores  differing rows"
    )
    for size in sizes:
        cells = [
            f"{size[side]['seconds']:7.1f} ({size[side]['sums_seconds']:.1f} + {size[side]['keywords_seconds']:.1f};"
            f" {size[side]['cpu_seconds']:.1f})" for side in ("spark", "duckdb")
        ]  # fmt: skip
        print(
            f"{size['written']['word_rows']:12,}  {cells[0]:27} {cells[1]:27} {size['times_duckdb']:12.2f}"
            f"  {size['times_duckdb_cpu']:12.2f}  {count_differing(size):14}"
        )


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--word-rows",
        type=int,
        nargs="+",
        default=[1_000_000, 10_000_000, 100_000_000],
        help="sizes, one after the other",
    )
    parser.add_argument("--threads", type=int, default=2, help="cores of both (default: 2)")
    parser.add_argument("--memory-gib", type=int, default=4, help="Spark's heap, and DuckDB's memory (default: 4)")
    parser.add_argument(
        "--folder", type=Path, default=Path("bench-scale"), help="tables; explanations that are there are used"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-aggregation.json"), help="the figures, as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file and the plans, print the table."""
    arguments = read_arguments(words)
    folder = arguments.folder.resolve()
    log = folder / "events" / str(time.time_ns())
    record = describe_machine(arguments, ["pyspark", "delta-spark", "duckdb"])
    record["sizes"] = []
    memory = f"{arguments.memory_gib}g"
    spark = open_session(
        "lexplain benchmark of aggregation", master=f"local[{arguments.threads}]",
        # The generator's files are as they should be.
        settings={"spark.driver.memory": memory, "spark.databricks.delta.optimizeWrite.enabled": "false", **make_log_settings(log)},
    )  # fmt: skip
    try:
        with connect(folder / "duckdb", threads=arguments.threads, memory=f"{arguments.memory_gib}GiB") as connection:
            for word_rows in arguments.word_rows:
                record["sizes"].append(measure(spark, make_shape(word_rows), folder / str(word_rows), connection))
                print_table(record["sizes"][-1:])
    finally:
        stop_session(spark)
    add_events(record, log)
    write_plans(record, arguments.out.with_suffix(".plans"))
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print_table(record["sizes"])
    if any(map(count_differing, record["sizes"])):
        raise SystemExit("Spark and DuckDB do not agree")


if __name__ == "__main__":
    main()
