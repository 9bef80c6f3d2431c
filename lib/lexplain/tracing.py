"""Measurements of explanations on executors: what lacks one is measured chunk by chunk, each chunk one commit. Driver only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from lexplain.attribution import ExplainedModel, as_tasks, make_task, split_waves
from lexplain.deletions import PLACE
from lexplain.devices import DeviceWork, map_on_devices
from lexplain.errors import AccountingError
from lexplain.executor import ExplainTask
from lexplain.pipeline import Run
from lexplain.schema import TABLES
from lexplain.tables import quote_list, quote_text

# Documents a task: decides what shares a batch, so it must not depend on the cluster's size.
_TASK_DOCUMENTS = 32


@dataclass(frozen=True)
class Measurement:
    """What is measured of each explanation.

    Attributes:
        table: Where it goes: one row an explanation and kind.
        kind: The table's column that tells kinds apart.
        kinds: Its values.
        make_work: From a task and some of the kinds, what executors do with batches of explanations and their texts.
        columns: SQL over `explanations`, what they are given besides place, label and text.
        where: SQL condition on `explanations`: which are measured, of those that are explained.
        unit: What it does, for progress.
    """

    table: str
    kind: str
    kinds: Sequence[str]
    make_work: Callable[[ExplainTask, tuple[str, ...]], DeviceWork]
    columns: Sequence[str]
    where: str = "TRUE"
    unit: str = "delete words"


def measure(run: Run, measurement: Measurement) -> None:
    """Commit what a run's explanations lack; those that have it are left alone.

    Args:
        run: Open, its explanations made.
        measurement: What is measured.

    Raises:
        AccountingError: A chunk did not give a row an explanation and kind; it is not committed.

    Note:
        Runs on: executors. Cost: what `make_work` takes, and for each chunk one pass over its staged texts.
    """
    pending = run.tables.spark.sql(_select_pending(run, measurement)).collect()
    total = sum(row["count"] for row in pending)
    run.progress.start(measurement.unit, total, "explanations")
    owed_by_chunk: dict[tuple[int, int, tuple[str, ...]], dict[str, int]] = {}
    for row in pending:
        chunk = row["increment"], row["bucket"], tuple(row["kinds"])
        owed_by_chunk.setdefault(chunk, {})[row["explain_key"]] = row["count"]
    for (increment, bucket, lacking), owed in sorted(owed_by_chunk.items()):
        for wave in split_waves([model for model in run.models if model.explain_key in owed], run.plan):
            count = sum(owed[model.explain_key] for model in wave)
            _measure_chunk(run, measurement, wave, (increment, bucket), lacking, count)
            run.progress.advance(count)
    run.progress.finish(f"{total} explanations measured now")


def _select_pending(run: Run, measurement: Measurement) -> str:
    """Return the chunks of each model (explain_key, increment, bucket, count, kinds) that lack rows, and of which kinds."""
    where = run.where_explained
    chunk, kind = "explain_key, increment, bucket", measurement.kind
    return f"""
        WITH owed AS (
            SELECT {chunk}, count(*) AS count FROM {run.tables.name("explanations")}
            WHERE {where} AND status = 'explained' AND {measurement.where} GROUP BY {chunk}
        ), done AS (
            SELECT {chunk}, {kind}, count(*) AS done FROM {run.tables.name(measurement.table)}
            WHERE {where} GROUP BY {chunk}, {kind}
        )
        SELECT {chunk}, first(count) AS count, sort_array(collect_list({kind})) AS kinds
        FROM (SELECT *, explode(array({quote_list(measurement.kinds)})) AS {kind} FROM owed)
        LEFT JOIN done USING ({chunk}, {kind})
        WHERE count != coalesce(done, 0) GROUP BY {chunk}"""


def _measure_chunk(
    run: Run, measurement: Measurement, models: Sequence[ExplainedModel], place: tuple[int, int],
    kinds: tuple[str, ...], count: int,
) -> None:  # fmt: skip
    from pyspark import StorageLevel

    tables, keys = run.tables, quote_list([model.explain_key for model in models])
    chunk = f"corpus_key = {quote_text(run.corpus.key)} AND increment = {place[0]} AND bucket = {place[1]}"
    texts = tables.read("staged").where(chunk).select("doc_id", "text")
    measured = f"{chunk} AND explain_key IN ({keys}) AND status = 'explained' AND {measurement.where}"
    explained = tables.read("explanations").where(measured).selectExpr(*PLACE, *measurement.columns)
    documents = explained.join(texts, "doc_id").repartition(max(1, ceil(count / _TASK_DOCUMENTS)), "text_digest")
    work = measurement.make_work(make_task(tables.spark, run.plan, run.find_method, as_tasks(models)), kinds)
    ordered = documents.sortWithinPartitions("explain_key", "text_digest", "doc_id")
    rows = map_on_devices(ordered, work, TABLES[measurement.table].schema, run.plan.execution.device)
    rows = rows.persist(StorageLevel.DISK_ONLY)
    try:
        made = rows.count()
        if made != count * len(kinds):
            raise AccountingError(
                f"chunk {place[0]}/{place[1]} was to give {count * len(kinds)} rows of {measurement.table}, {made} were made. "
                "Methods would have been compared on different documents. Run the same command again."
            )
        tables.replace(
            rows, measurement.table,
            where=f"{chunk} AND explain_key IN ({keys}) AND {measurement.kind} IN ({quote_list(kinds)})",
        )  # fmt: skip
    finally:
        rows.unpersist()
