"""The attribution stage: staged chunks in, explanations out, each chunk one commit.

Driver only, apart from the closures that it sends to the executors; those carry plain values, never a session,
a DataFrame or a model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from lexplain.corpus import Staged
from lexplain.errors import AccountingError, ExplainError, LimitError, ModelError
from lexplain.executor import (
    ExplainTask,
    ModelTask,
    choose_device,
    explain_batches,
    explain_texts,
    open_explainer,
    word_rows,
)
from lexplain.keys import digest
from lexplain.plan import FindMethod, Plan
from lexplain.session import count_slots, is_local
from lexplain.splits import Split
from lexplain.tables import TABLES, Tables, quote_list, quote_text

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# Documents a task: decides what shares a batch, so it must depend on the chunk alone, never on the cluster's size.
_TASK_DOCUMENTS = 64

STATUSES = ("explained", "no_label", "settled", "rejected")

EXPLAIN_TYPE = (
    "STRUCT<status: STRING, reason: STRING, explanations: ARRAY<STRUCT<label: STRING, probability: DOUBLE, "
    "target_score: DOUBLE, baseline_score: DOUBLE, completeness_gap: DOUBLE, "
    "words: ARRAY<STRUCT<word: STRING, start: INT, end: INT, score: DOUBLE>>>>>"
)


class Progress(Protocol):
    """Where a stage reports how far it is."""

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        """A stage begins; `done` of `total` units are there already."""

    def advance(self, units: int) -> None:
        """So many more units are done."""

    def finish(self, summary: str) -> None:
        """The stage is over."""


@dataclass(frozen=True)
class ExplainedModel:
    """A model of the run.

    Attributes:
        split: Number of its split.
        explain_key: Key of its explanations.
        folder: Where executors read it.
        digest: What `digest_folder` gave for it.
        drawn: The split it was fine-tuned on; None for a model the user brought.
    """

    split: int
    explain_key: str
    folder: str
    digest: str
    drawn: Split | None

    def held_out(self, plan: Plan) -> str:
        """Return the SQL condition on (text_digest, trainable, seen_by): the model has not trained on the document."""
        if self.drawn is not None:
            return f"NOT (trainable AND {self.drawn.sql('text_digest')})"
        if plan.models.corpus == "unseen":
            return "TRUE"
        return f"NOT coalesce(array_contains(seen_by, {self.split}), FALSE)"


def make_task(spark: SparkSession, plan: Plan, find_method: FindMethod, models: Sequence[ModelTask]) -> ExplainTask:
    """Return what a worker is told: everything of the plan that bears on explaining, as plain values."""
    method = find_method(plan.method.id)
    slots = count_slots(spark)
    cores = (os.cpu_count() or 1) if is_local(spark) else slots
    return ExplainTask(
        models=tuple(models),
        method=method.id,
        options=dict(method.complete_options(plan.method.options)),
        max_tokens=plan.text.max_tokens,
        overlap=plan.text.overlap,
        max_windows=plan.text.max_windows,
        max_characters=plan.text.max_characters,
        merge=plan.text.merge,
        budget_tokens=plan.execution.budget_tokens,
        # torch threads x tasks <= cores, or the tasks crawl
        threads=plan.execution.threads or max(1, cores // slots),
        models_in_memory=plan.execution.models_in_memory,
        allow_pickle=plan.execution.allow_pickle,
    )


def attribute(
    tables: Tables,
    plan: Plan,
    find_method: FindMethod,
    models: Sequence[ExplainedModel],
    corpus: Staged,
    training: Staged | None,
    progress: Progress,
) -> float:
    """Explain every staged document with every model that has not trained on it; finished chunks are left alone.

    Returns:
        Seconds of attribution spent in this call.

    Raises:
        ModelError: Executors cannot read a model; before the first task.
        LimitError: A limit of the plan was passed; what was committed stays.
    """
    _write_ledger(tables, plan, models, corpus, training)
    pending = _find_pending(tables, models, corpus)
    owed = _count(tables, models, corpus)
    started = time.monotonic()
    progress.start("attribute", owed["planned"], "documents", owed["planned"] - sum(row["n_documents"] for row in pending))
    if pending:
        _check_models(tables.spark, plan, find_method, models)
    for wave in _waves(models, plan.execution.models_in_memory):
        for (increment, bucket), rows in _chunks(pending, wave):
            keys = {row["explain_key"] for row in rows}
            chunk = _read_chunk(tables, plan, [m for m in wave if m.explain_key in keys], corpus, training, increment, bucket)
            _explain_chunk(tables, plan, find_method, chunk)
            progress.advance(sum(row["n_documents"] for row in rows))
            _check_limits(tables, plan, models, corpus, (time.monotonic() - started) / 3600)
    seconds = time.monotonic() - started
    progress.finish(f"{owed['planned']} explanations owed, {sum(row['n_documents'] for row in pending)} made now")
    return seconds


def count_documents(tables: Tables, models: Sequence[ExplainedModel], corpus: Staged) -> dict[str, int]:
    """Return (model, document) pairs by status, checked against the ledger.

    Raises:
        AccountingError: They do not add up to the documents planned, or a pair has rows of two commits.
    """
    counted = _count(tables, models, corpus)
    if counted["doubled"]:
        raise AccountingError(
            f"{counted['doubled']} (model, document, label) rows are there twice. Their words would count double. "
            "Delete the run with `lexplain runs delete` and run it again; please report what happened before."
        )
    total = sum(counted[status] for status in STATUSES)
    if total != counted["planned"]:
        raise AccountingError(
            f"explained + no_label + settled + rejected = {total}, but {counted['planned']} documents were planned. "
            "Keywords would rest on a part of the corpus. Run the same command again: it makes up what is missing."
        )
    return {status: counted[status] for status in STATUSES}


def _key_condition(models: Sequence[ExplainedModel], corpus: Staged) -> str:
    keys = quote_list([model.explain_key for model in models])
    return f"corpus_key = {quote_text(corpus.key)} AND explain_key IN ({keys})"


def _count(tables: Tables, models: Sequence[ExplainedModel], corpus: Staged) -> dict[str, int]:
    where = _key_condition(models, corpus)
    planned = tables.read("chunks").where(where).selectExpr("coalesce(sum(n_documents), 0) AS n").collect()[0]["n"]
    rows = tables.spark.sql(
        f"SELECT status, count_if(label_rank = 0) AS documents FROM {tables.name('explanations')}"
        f" WHERE {where} GROUP BY status"
    ).collect()
    doubled = tables.spark.sql(
        f"SELECT count(*) AS n FROM (SELECT 1 FROM {tables.name('explanations')} WHERE {where}"
        " GROUP BY explain_key, doc_id, label_rank HAVING count(*) > 1)"
    ).collect()[0]["n"]
    counted = dict.fromkeys(STATUSES, 0) | {row["status"]: int(row["documents"]) for row in rows}
    return counted | {"planned": int(planned), "doubled": int(doubled)}


def _documents(
    tables: Tables, models: Sequence[ExplainedModel], plan: Plan, corpus: Staged, training: Staged | None, where: str
) -> DataFrame:
    """Return staged documents with `splits`, the numbers of the models that must explain each."""
    staged = tables.read("staged").where(f"corpus_key = {quote_text(corpus.key)} AND {where}")
    if training is None or all(model.drawn is None for model in models):
        staged = staged.selectExpr("*", "FALSE AS trainable")
    elif training.key == corpus.key:
        staged = staged.selectExpr("*", "TRUE AS trainable")
    else:
        trained = (
            tables.read("staged").where(f"corpus_key = {quote_text(training.key)} AND size(labels) > 0")
            .selectExpr("text_digest", "TRUE AS in_training").distinct()
        )  # fmt: skip
        staged = staged.join(trained, "text_digest", "left").selectExpr("*", "coalesce(in_training, FALSE) AS trainable")
    owed = ", ".join(f"CASE WHEN {model.held_out(plan)} THEN {model.split} END" for model in models)
    return staged.selectExpr(
        "corpus_key", "increment", "bucket", "doc_id", "text", "text_digest", "labels",
        f"array_compact(array({owed})) AS splits",
    )  # fmt: skip


def _write_ledger(
    tables: Tables, plan: Plan, models: Sequence[ExplainedModel], corpus: Staged, training: Staged | None
) -> None:
    """Write, before the first task, how many documents each model owes each chunk."""
    written = {
        (row["explain_key"], row["increment"])
        for row in tables.read("chunks").where(_key_condition(models, corpus))
        .select("explain_key", "increment").distinct().collect()
    }  # fmt: skip
    for increment in range(corpus.increments):
        missing = [model for model in models if (model.explain_key, increment) not in written]
        if not missing:
            continue
        documents = _documents(tables, missing, plan, corpus, training, f"increment = {increment}")
        keys = ", ".join(f"{model.split}, {quote_text(model.explain_key)}" for model in missing)
        splits = ", ".join(str(model.split) for model in missing)
        # A chunk that a model owes nothing is in the ledger too, with 0 documents: it is finished from the start.
        counted = (
            documents.selectExpr("increment", "bucket", "splits", f"explode(array({splits})) AS split")
            .selectExpr("increment", "bucket", "split", "CAST(array_contains(splits, split) AS BIGINT) AS owed")
            .groupBy("increment", "bucket", "split").sum("owed")
        )  # fmt: skip
        ledger = counted.selectExpr(
            f"element_at(map({keys}), split) AS explain_key", f"{quote_text(corpus.key)} AS corpus_key",
            "increment", "bucket", "split", "`sum(owed)` AS n_documents",
        )  # fmt: skip
        app_id = digest("ledger", sorted(model.explain_key for model in missing), corpus.key, increment)
        tables.append(ledger, "chunks", app_id=f"ledger/{app_id}")


def _find_pending(tables: Tables, models: Sequence[ExplainedModel], corpus: Staged) -> list[dict[str, Any]]:
    """Return the ledger's rows whose documents are not all committed, from the committed tables alone."""
    where = _key_condition(models, corpus)
    rows = tables.spark.sql(
        f"SELECT c.explain_key, c.increment, c.bucket, c.split, c.n_documents"
        f" FROM (SELECT * FROM {tables.name('chunks')} WHERE {where}) c LEFT JOIN"
        f" (SELECT explain_key, increment, bucket, count_if(label_rank = 0) AS done FROM {tables.name('explanations')}"
        f" WHERE {where} GROUP BY explain_key, increment, bucket) e"
        " ON c.explain_key = e.explain_key AND c.increment = e.increment AND c.bucket = e.bucket"
        " WHERE c.n_documents > coalesce(e.done, 0)"
        " ORDER BY c.increment, c.bucket, c.split"
    ).collect()
    return [row.asDict() for row in rows]


def _waves(models: Sequence[ExplainedModel], size: int) -> Iterator[Sequence[ExplainedModel]]:
    ordered = sorted(models, key=lambda model: model.split)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _chunks(
    pending: Sequence[Mapping[str, Any]], wave: Sequence[ExplainedModel]
) -> list[tuple[tuple[int, int], list[Mapping[str, Any]]]]:
    keys = {model.explain_key for model in wave}
    chunks: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in pending:
        if row["explain_key"] in keys:
            chunks.setdefault((row["increment"], row["bucket"]), []).append(row)
    return sorted(chunks.items())


@dataclass(frozen=True)
class _Chunk:
    models: Sequence[ExplainedModel]
    documents: DataFrame
    n_documents: int
    app_id: str


def _read_chunk(
    tables: Tables, plan: Plan, models: Sequence[ExplainedModel], corpus: Staged, training: Staged | None,
    increment: int, bucket: int,
) -> _Chunk:  # fmt: skip
    documents = _documents(tables, models, plan, corpus, training, f"increment = {increment} AND bucket = {bucket}")
    count = tables.spark.sql(
        f"SELECT max(n_documents) AS n FROM {tables.name('chunks')} WHERE {_key_condition(models, corpus)}"
        f" AND increment = {increment} AND bucket = {bucket}"
    ).collect()[0]["n"]
    app_id = f"{digest('explanations', sorted(model.explain_key for model in models))}/{corpus.key}/{increment}/{bucket}"
    return _Chunk(models, documents.where("size(splits) > 0"), int(count), app_id)


def _explain_chunk(tables: Tables, plan: Plan, find_method: FindMethod, chunk: _Chunk) -> None:
    task = make_task(tables.spark, plan, find_method, _as_tasks(chunk.models))
    parts = max(1, ceil(chunk.n_documents / _TASK_DOCUMENTS))
    ordered = chunk.documents.repartition(parts, "text_digest").sortWithinPartitions("text_digest", "doc_id")
    explaining = _explaining(task, plan.execution.device, is_local(tables.spark))
    tables.append(ordered.mapInArrow(explaining, TABLES["explanations"].schema), "explanations", app_id=chunk.app_id)


def _as_tasks(models: Sequence[ExplainedModel]) -> list[ModelTask]:
    return [ModelTask(model.split, model.explain_key, model.folder, model.digest) for model in models]


def _explaining(
    task: ExplainTask, device: Literal["auto", "cpu", "gpu"], local: bool
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return the function that executors run; it closes over plain values only."""

    def explain(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return explain_batches(batches, task, task_device(device, local))

    return explain


def task_device(requested: Literal["auto", "cpu", "gpu"], local: bool) -> str:
    """Return the device of the Spark task that calls. Runs on an executor."""
    from pyspark import TaskContext

    context = TaskContext.get()
    resources = {} if context is None else context.resources()
    addresses = resources["gpu"].addresses if "gpu" in resources else []
    partition = context.partitionId() if context is not None and local else None
    return choose_device(requested, addresses, local_partition=partition)


def _check_models(spark: SparkSession, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel]) -> None:
    """Let executors load every model once; a bad or unreachable one stops the job before the first task.

    Raises:
        ModelError: With the executor's own words.
    """
    local = is_local(spark)
    task = make_task(spark, plan, find_method, _as_tasks(models))
    requested = plan.execution.device

    def check(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for _ in batches:
            pass
        device = task_device(requested, local)
        said = []
        for model in task.models:
            try:
                open_explainer(task, model, device)
            except ExplainError as error:
                said.append(str(error))
        yield pa.RecordBatch.from_pydict({"said": pa.array(said, pa.string())})

    places = 1 if local else count_slots(spark)
    said = spark.range(places, numPartitions=places).mapInArrow(check, "said STRING").distinct().orderBy("said").collect()
    if said:
        raise ModelError("\n".join(row["said"] for row in said))


def _check_limits(
    tables: Tables, plan: Plan, models: Sequence[ExplainedModel], corpus: Staged, hours: float
) -> None:
    limits = plan.limits
    if limits.device_hours is not None and hours > limits.device_hours:
        raise LimitError(
            f"limits.device_hours={limits.device_hours} was passed after {hours:.2f} hours. What was committed stays; "
            "run the same plan with a larger limit to go on."
        )
    if limits.rejected_share is None:
        return
    counted = _count(tables, models, corpus)
    done = sum(counted[status] for status in STATUSES)
    if done and counted["rejected"] / done > limits.rejected_share:
        reasons = tables.spark.sql(
            f"SELECT reason, count(*) AS n FROM {tables.name('explanations')} WHERE {_key_condition(models, corpus)}"
            " AND status = 'rejected' GROUP BY reason ORDER BY n DESC"
        ).collect()
        shown = ", ".join(f"{row['reason']} {row['n']}" for row in reasons)
        raise LimitError(
            f"limits.rejected_share={limits.rejected_share} was passed: {counted['rejected']} of {done} documents were "
            f"rejected ({shown}). What was committed stays; mend the corpus, or write a larger share to go on."
        )


def register_explain(
    spark: SparkSession, plan: Plan, find_method: FindMethod, model: ModelTask, *, name: str = "explain"
) -> None:
    """Register the SQL function `explain(text)`: the attribution stage's kernel as an iterator pandas UDF.

    It takes a string or binary column and returns `EXPLAIN_TYPE`: status, reason, and for each predicted label the
    words with their scores. Device, model cache, batching and rejection rules are the stage's own.

    Args:
        spark: The session to register in.
        plan: Method, options, windows and words.
        find_method: Registry lookup.
        model: Which model explains.
        name: Name of the function.
    """
    import pandas as pd
    from pyspark.sql.pandas.functions import pandas_udf

    local = is_local(spark)
    task = make_task(spark, plan, find_method, [model])
    requested = plan.execution.device

    def explain(batches: Iterator[pd.Series[Any]]) -> Iterator[pd.DataFrame]:
        device = task_device(requested, local)
        for texts in batches:
            outcomes = explain_texts(list(texts), task, model, device)
            yield pd.DataFrame([_outcome_row(outcome) for outcome in outcomes])

    # Spark tells the kind of UDF by its type hints, and cannot read postponed ones.
    explain.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.DataFrame]}
    spark.udf.register(name, cast(Any, pandas_udf)(explain, EXPLAIN_TYPE))


def _outcome_row(outcome: Any) -> dict[str, Any]:
    if not isinstance(outcome, list):
        return {"status": "rejected", "reason": outcome.reason, "explanations": None}
    names = ("label", "probability", "target_score", "baseline_score", "completeness_gap")
    explanations = [
        {name: getattr(explanation, name) for name in names} | {"words": word_rows(explanation)} for explanation in outcome
    ]
    return {"status": "explained" if outcome else "no_label", "reason": None, "explanations": explanations}
