"""The attribution stage: staged chunks in, explanations out, each chunk one commit.

Driver only, apart from the closures that it sends to the executors; those carry plain values, never a session,
a DataFrame or a model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol

from lexplain.corpus import Staged
from lexplain.devices import map_on_devices
from lexplain.errors import AccountingError, ExplainError, LimitError, ModelError, WorkerError
from lexplain.executor import (
    ExplainTask,
    ModelTask,
    describe_device,
    explain_batches,
    open_explainer,
)
from lexplain.plan import FindMethod, Plan
from lexplain.schema import TABLES
from lexplain.session import count_devices, count_slots, is_local, lost_worker, stop_silent_workers
from lexplain.splits import Split
from lexplain.tables import Tables, quote_list, quote_text

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# Documents a task: decides what shares a batch, so it must depend on the chunk alone, never on the cluster's size.
_TASK_DOCUMENTS = 32

STATUSES = ("explained", "no_label", "settled", "rejected")


# What a text is rejected for by itself is so on any machine. A defect of its row is one of these, too.
_BY_TEXT = ("null_text", "empty_text", "no_words", "too_long", "malformed_row", "invalid_utf8", "lone_surrogate")
_RETRIED = f"(status = 'rejected' AND reason NOT IN ({quote_list(_BY_TEXT)}))"


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
        labels: What it tells apart.
        problem: What `lexplain.model_store.read_outputs` tells of its head; None in rows of an older lexplain.
        drawn: The split it was fine-tuned on; None for a model the user brought.
        prepared: What `lexplain.preparation` made for it; None where there is nothing.
    """

    split: int
    explain_key: str
    folder: str
    digest: str
    labels: tuple[str, ...]
    problem: str | None
    drawn: Split | None
    prepared: str | None = None

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
    slots = count_slots(spark, plan.execution.device)
    cores = (os.cpu_count() or 1) if is_local(spark) else slots
    return ExplainTask(
        models=tuple(models),
        method=method.id,
        options=dict(method.complete_options(plan.method.asked)),
        precision=plan.method.precision,
        top_k=plan.method.top_k,
        gold=plan.method.gold,
        against=plan.method.against,
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
        compile=plan.execution.compile,
    )


@dataclass(frozen=True)
class Explained:
    """What a call of `Attribution.explain` did.

    Attributes:
        device: What the models ran on; None where nothing was left to do.
        n_pairs: (model, document) pairs that it explained.
        seconds: How long that took, without the preparation, which belongs to no document and is made once.
    """

    device: str | None
    n_pairs: int
    seconds: float


@dataclass(frozen=True)
class Attribution:
    """The stage over one run's models and corpus.

    Attributes:
        tables: The sink.
        plan: The plan.
        find_method: Registry lookup.
        models: Models to explain, one a split.
        corpus: The staged corpus.
        training: The staged training documents; None where the models were brought.
        prepare: Returns models with what the method needs to know of them; called once they are known to load.
    """

    tables: Tables
    plan: Plan
    find_method: FindMethod
    models: Sequence[ExplainedModel]
    corpus: Staged
    training: Staged | None
    prepare: Callable[[Sequence[ExplainedModel]], Sequence[ExplainedModel]]

    def explain(self, progress: Progress) -> Explained:
        """Explain every document with every model that has not trained on it; finished chunks are left alone.

        `limits.device_hours` counts the preparation too.

        Raises:
            ModelError: Executors cannot load a model; before the first task.
            AccountingError: A chunk's rows are not those that the ledger owes; they are not committed.
            TableError: Other jobs' commits came in between time and again.
            LimitError: A limit of the plan was passed; what was committed stays.
            WorkerError: A worker hung or was lost each time that its task was tried.
        """
        self._write_ledger()
        pending = self._find_pending()
        planned, counts = self._count_planned(), self.count_statuses()
        missing = sum(row["n_documents"] for row in pending)
        progress.start("attribute", planned, "pairs", planned - missing)
        self._check_rejected(counts, planned)
        work = _Work(self)
        for wave, chunk, owed in work.walk(
            pending, lambda: progress.start("attribute", planned, "pairs", planned - missing)
        ):
            made = self._explain_chunk(wave, *chunk)
            counts = {status: counts[status] + made[status] for status in STATUSES}
            work.explained += made["explained"]
            progress.advance(owed)
            self._check_rejected(counts, planned)
        progress.finish(f"{planned} (model, document) pairs, {missing} made now")
        return Explained(work.device, work.explained, work.seconds)

    def count_documents(self) -> dict[str, int]:
        """Return (model, document) pairs by status, checked against the ledger.

        Raises:
            AccountingError: They do not add up to the documents planned, or a pair has rows of two commits.
        """
        # Without it, documents or models that no attribution has met yet would not be missed.
        self._write_ledger()
        doubled = self.tables.spark.sql(
            f"SELECT count(*) AS n FROM (SELECT 1 FROM {self.tables.name('explanations')} WHERE {self._where}"
            " GROUP BY explain_key, doc_id, label_rank HAVING count(*) > 1)"
        ).collect()[0]["n"]
        if doubled:
            raise AccountingError(
                f"{doubled} (model, document, label) rows are there twice. Their words would count double. "
                "Write to a new sink, and report what happened before."
            )
        counts, planned = self.count_statuses(), self._count_planned()
        if sum(counts.values()) != planned:
            raise AccountingError(
                f"explained + no_label + settled + rejected = {sum(counts.values())}, but {planned} documents were "
                "planned. Keywords would rest on a part of the corpus. Run `lexplain attribute PLAN`: it makes up what "
                "is missing."
            )
        return counts

    @property
    def _where(self) -> str:
        return self.corpus.where_explained([model.explain_key for model in self.models])

    def _count_planned(self) -> int:
        rows = self.tables.read("chunks").where(self._where).selectExpr("coalesce(sum(n_documents), 0) AS n").collect()
        return int(rows[0]["n"])

    def _count(self, where: str) -> dict[str, int]:
        rows = self.tables.spark.sql(
            f"SELECT status, count_if(label_rank = 0) AS documents FROM {self.tables.name('explanations')}"
            f" WHERE {where} GROUP BY status"
        ).collect()
        return dict.fromkeys(STATUSES, 0) | {row["status"]: int(row["documents"]) for row in rows}

    def _read(self, models: Sequence[ExplainedModel], where: str) -> DataFrame:
        return select_owed(self.tables, self.plan, models, self.corpus, self.training, where)

    def _write_ledger(self) -> None:
        """Write, before the first task, how many documents each model owes each chunk."""
        rows = self.tables.read("chunks").where(self._where).select("explain_key", "increment").distinct().collect()
        written = {(row["explain_key"], row["increment"]) for row in rows}
        for increment in range(self.corpus.increments):
            missing = [model for model in self.models if (model.explain_key, increment) not in written]
            staged = f"corpus_key = {quote_text(self.corpus.key)} AND increment = {increment}"
            # Of an increment that was forgotten whole there will never be a row.
            if not missing or self.tables.read("staged").where(staged).first() is None:
                continue
            splits = ", ".join(str(model.split) for model in missing)
            keys = ", ".join(f"{model.split}, {quote_text(model.explain_key)}" for model in missing)
            # A chunk that a model owes nothing is in the ledger too, with 0 documents: it is finished from the start.
            ledger = (
                self._read(missing, f"increment = {increment}")
                .selectExpr("increment", "bucket", "splits", f"explode(array({splits})) AS split")
                .selectExpr("increment", "bucket", "split", "CAST(array_contains(splits, split) AS BIGINT) AS owed")
                .groupBy("increment", "bucket", "split").sum("owed")
                .selectExpr(f"element_at(map({keys}), split) AS explain_key", f"{quote_text(self.corpus.key)} AS corpus_key",
                            "increment", "bucket", "split", "`sum(owed)` AS n_documents")
            )  # fmt: skip
            missing_keys = quote_list([model.explain_key for model in missing])
            self.tables.replace(ledger, "chunks", where=f"{staged} AND explain_key IN ({missing_keys})")

    def _find_pending(self, place: str = "TRUE") -> list[dict[str, Any]]:
        """Return the ledger's rows whose documents are not all committed once, from the committed tables alone."""
        where = f"{self._where} AND {place}"
        rows = self.tables.spark.sql(
            "SELECT c.explain_key, c.increment, c.bucket, c.split, c.n_documents"
            f" FROM (SELECT * FROM {self.tables.name('chunks')} WHERE {where}) c LEFT JOIN"
            " (SELECT explain_key, increment, bucket, count_if(label_rank = 0) AS done"
            f" FROM {self.tables.name('explanations')} WHERE {where} GROUP BY explain_key, increment, bucket) e"
            " ON c.explain_key = e.explain_key AND c.increment = e.increment AND c.bucket = e.bucket"
            " WHERE c.n_documents != coalesce(e.done, 0) ORDER BY c.increment, c.bucket, c.split"
        ).collect()
        return [row.asDict() for row in rows]

    def _explain_chunk(self, wave: Sequence[ExplainedModel], increment: int, bucket: int) -> dict[str, int]:
        """Commit what a chunk lacks, in the place of any rows of the same models; return the pairs made by status."""
        place = f"increment = {increment} AND bucket = {bucket}"
        # Another job may have made them since: it is cheaper to look again than to explain again.
        owed = {row["explain_key"]: int(row["n_documents"]) for row in self._find_pending(place)}
        models = [model for model in wave if model.explain_key in owed]
        if not models:
            return dict.fromkeys(STATUSES, 0)
        owed = {model.explain_key: owed[model.explain_key] for model in models}
        documents = self._read(models, place).where("size(splits) > 0")
        return self._commit_chunk(models, (increment, bucket), documents, owed)

    def retry_rejected(self, progress: Progress) -> None:
        """Explain rejected documents again, in the place of their rejections; a chunk is one commit, as before.

        Those whose text is the reason stay as they are.

        Raises:
            ModelError: Executors cannot load a model; before the first task.
            AccountingError: A chunk's rows are not those that the ledger owes; they are not committed.
            TableError: Other jobs' commits came in between time and again.
            LimitError: A limit of the plan was passed; what was committed stays.
            WorkerError: A worker hung each time that its task was tried.
        """
        where = f"{self._where} AND {_RETRIED}"
        rejected = [
            row.asDict()
            for row in self.tables.spark.sql(
                "SELECT explain_key, increment, bucket, count(*) AS n_documents"
                f" FROM {self.tables.name('explanations')} WHERE {where} GROUP BY explain_key, increment, bucket"
            ).collect()
        ]
        total = sum(row["n_documents"] for row in rejected)
        progress.start("retry", total, "pairs")
        for wave, chunk, count in _Work(self).walk(rejected, lambda: progress.start("retry", total, "pairs")):
            self._retry_chunk(wave, *chunk)
            progress.advance(count)
        still = self.tables.read("explanations").where(where).count()
        progress.finish(f"{total} rejected (model, document) pairs tried again, {still} are still rejected")

    def _retry_chunk(self, wave: Sequence[ExplainedModel], increment: int, bucket: int) -> None:
        place = f"increment = {increment} AND bucket = {bucket}"
        made = self.tables.read("explanations").where(f"{self._where} AND {place}")
        keys = {row["explain_key"] for row in made.where(_RETRIED).select("explain_key").distinct().collect()}
        models = [model for model in wave if model.explain_key in keys]
        if not models:  # another job has been here
            return
        made = made.where(f"explain_key IN ({quote_list([model.explain_key for model in models])})")
        numbers = ", ".join(f"{quote_text(model.explain_key)}, {model.split}" for model in models)
        again = made.where(_RETRIED).groupBy("doc_id").agg({"explain_key": "collect_set"})
        again = again.selectExpr("doc_id", f"transform(`collect_set(explain_key)`, x -> map({numbers})[x]) AS splits")
        documents = self._read(models, place).drop("splits").join(again, "doc_id")
        ledger = self.tables.read("chunks").where(f"{self._where} AND {place}").select("explain_key", "n_documents")
        owed = {row["explain_key"]: int(row["n_documents"]) for row in ledger.collect()}
        owed = {model.explain_key: owed[model.explain_key] for model in models}
        self._commit_chunk(models, (increment, bucket), documents, owed, kept=made.where(f"NOT ({_RETRIED})"))

    def _commit_chunk(
        self, models: Sequence[ExplainedModel], chunk: tuple[int, int], documents: DataFrame, owed: Mapping[str, int],
        kept: DataFrame | None = None,
    ) -> dict[str, int]:  # fmt: skip
        """Explain documents of a chunk and commit them in the place of the models' rows; return pairs by status.

        Args:
            models: Who explains.
            chunk: Increment and bucket.
            documents: With `splits`, the numbers of the models that explain each.
            owed: Documents of the whole chunk, by explain_key.
            kept: Rows of the chunk that stay.
        """
        from pyspark import StorageLevel

        spark, plan = self.tables.spark, self.plan
        task = make_task(spark, plan, self.find_method, as_tasks(models))
        tasks = max(1, ceil(documents.count() / _TASK_DOCUMENTS))
        ordered = documents.repartition(tasks, "text_digest").sortWithinPartitions("text_digest", "doc_id")
        explaining = partial(explain_batches, task=task)
        explained = map_on_devices(ordered, explaining, TABLES["explanations"].schema, plan.execution.device)
        if kept is not None:
            explained = explained.unionByName(kept)
        # Kept until they are committed: Delta refuses a commit while another job makes one, and the second attempt
        # must not explain again.
        explained = explained.persist(StorageLevel.DISK_ONLY)
        increment, bucket = chunk
        try:
            made = _check_chunk(explained, f"{increment}/{bucket}", owed)
            place = f"corpus_key = {quote_text(self.corpus.key)} AND increment = {increment} AND bucket = {bucket}"
            where = f"{place} AND explain_key IN ({quote_list(list(owed))})"
            self.tables.replace(explained, "explanations", where=where)
        except Exception as error:
            if lost_worker(error):
                raise WorkerError(
                    f"chunk {increment}/{bucket}: a worker was lost each time that Spark tried its task. It was stopped because no "
                    f"model moved for execution.idle_timeout_seconds={plan.execution.idle_timeout_seconds}, or it crashed, or was "
                    "killed for memory: the executors' stderr (of a local run: the log) says which, and where. The chunk would have "
                    "been missing. Run the same command again, which goes on with this chunk; write a larger number where "
                    "one pass of the model takes so long, or give the workers more memory."
                ) from error
            raise
        finally:
            explained.unpersist()
        return made

    def count_statuses(self) -> dict[str, int]:
        """Return committed (model, document) pairs by status, whether they are all there or not."""
        return self._count(self._where)

    def check_hours(self, hours: float) -> None:
        """Raise LimitError when `limits.device_hours` has passed."""
        limits = self.plan.limits
        hours *= count_devices(self.tables.spark, self.plan.execution.device)
        if limits.device_hours is not None and hours > limits.device_hours:
            raise LimitError(
                f"limits.device_hours={limits.device_hours} was passed after {hours:.2f} hours. What was committed stays; "
                "run the same plan with a larger limit to go on."
            )

    def _check_rejected(self, counts: Mapping[str, int], planned: int) -> None:
        # Of all that is planned: equal texts share a chunk, so that the first chunks may hold all the empty ones.
        share = self.plan.limits.rejected_share
        if share is None or counts["rejected"] <= share * planned:
            return
        reasons = self.tables.spark.sql(
            f"SELECT reason, count(*) AS n FROM {self.tables.name('explanations')} WHERE {self._where}"
            " AND status = 'rejected' GROUP BY reason ORDER BY n DESC"
        ).collect()
        shown = ", ".join(f"{row['reason']} {row['n']}" for row in reasons)
        raise LimitError(
            f"limits.rejected_share={share} was passed: {counts['rejected']} of {planned} (model, document) pairs were "
            f"rejected ({shown}). What was committed stays. Write a larger share to go on, or mend the corpus and write "
            "to a new sink."
        )


@dataclass
class _Work:
    """Chunks being explained, and what that took."""

    attribution: Attribution
    device: str | None = None
    explained: int = 0
    seconds: float = 0.0

    def walk(
        self, rows: Sequence[Mapping[str, Any]], begin: Callable[[], None]
    ) -> Iterator[tuple[Sequence[ExplainedModel], tuple[int, int], int]]:
        """Yield (models, (increment, bucket), documents) of the chunks that `rows` name; nothing is loaded where there are none.

        Args:
            rows: With explain_key, increment, bucket and n_documents.
            begin: Called when models are loaded and prepared.
        """
        if not rows:
            return
        of, started = self.attribution, time.monotonic()
        self.device = _check_models(of.tables.spark, of.plan, of.find_method, of.models)
        models = of.prepare(of.models)
        prepared, begun = time.monotonic(), False
        begin()
        # Not for the preparation, and for no stage before or after: only this one's tasks give signs of life.
        with stop_silent_workers(of.tables.spark, of.plan.execution.idle_timeout_seconds):
            for wave in split_waves(models, of.plan):
                for increment, bucket, documents in _group_chunks(rows, wave):
                    if begun:  # a start makes at least one chunk, or it would never get on
                        of.check_hours((time.monotonic() - started) / 3600)
                    yield wave, (increment, bucket), documents
                    begun = True
                    self.seconds = time.monotonic() - prepared


def select_owed(
    tables: Tables, plan: Plan, models: Sequence[ExplainedModel], corpus: Staged, training: Staged | None, where: str
) -> DataFrame:
    """Return staged documents with `splits`, the numbers of the models that must explain each.

    Args:
        tables: The sink.
        plan: Says what models that were brought have seen.
        models: Who explains.
        corpus: What is explained.
        training: What the models were trained on; None where they were brought.
        where: SQL condition on (increment, bucket).
    """
    staged = tables.read("staged").where(f"corpus_key = {quote_text(corpus.key)} AND {where}")
    if training is None:
        staged = staged.selectExpr("*", "FALSE AS trainable")
    else:  # by text, also within one source: a copy without a label was trained on as well
        trained = tables.read("staged").where(f"{training.where} AND size(labels) > 0").select("text_digest")
        if plan.training is not None:  # a copy of what was trained on and is forgotten
            forgotten = tables.read("forgotten").where(
                f"origin = {quote_text(plan.training.origin)} AND text_digest IS NOT NULL"
            )
            trained = trained.union(forgotten.select("text_digest"))
        trained = trained.selectExpr("text_digest", "TRUE AS in_training").distinct()
        staged = staged.join(trained, "text_digest", "left")
        staged = staged.selectExpr("*", "coalesce(in_training, FALSE) AS trainable")
    # More bytes than the characters that are allowed can have: a batch of such texts would fill a worker's memory.
    too_long = f"octet_length(text) > {4 * plan.text.max_characters:d}"
    owed = ", ".join(f"CASE WHEN {model.held_out(plan)} THEN {model.split} END" for model in models)
    return staged.selectExpr(
        "corpus_key", "increment", "bucket", "doc_id", f"CASE WHEN NOT {too_long} THEN text END AS text", "text_digest", "labels",
        f"CASE WHEN defect IS NULL AND {too_long} THEN 'too_long' ELSE defect END AS defect",
        f"array_compact(array({owed})) AS splits",
    )  # fmt: skip


def split_waves(models: Sequence[ExplainedModel], plan: Plan) -> Iterator[Sequence[ExplainedModel]]:
    """Yield as many models at a time as a worker holds, by split."""
    ordered = sorted(models, key=lambda model: model.split)
    size = plan.execution.models_in_memory
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _group_chunks(pending: Sequence[Mapping[str, Any]], wave: Sequence[ExplainedModel]) -> list[tuple[int, int, int]]:
    """Return (increment, bucket, documents pending) of the chunks that lack something of a wave, in order."""
    keys = {model.explain_key for model in wave}
    chunks: dict[tuple[int, int], int] = {}
    for row in pending:
        if row["explain_key"] in keys:
            chunk = (row["increment"], row["bucket"])
            chunks[chunk] = chunks.get(chunk, 0) + int(row["n_documents"])
    return sorted((*chunk, documents) for chunk, documents in chunks.items())


def _check_chunk(explained: DataFrame, chunk: str, owed: Mapping[str, int]) -> dict[str, int]:
    """Return (model, document) pairs by status; raise AccountingError when a model's are not what it owes."""
    first = explained.where("label_rank = 0").groupBy("explain_key", "status").count()
    rows = first.withColumnRenamed("count", "documents").collect()
    made = dict.fromkeys(owed, 0)
    counts = dict.fromkeys(STATUSES, 0)
    for row in rows:
        made[row["explain_key"]] += row["documents"]
        counts[row["status"]] += row["documents"]
    if made != dict(owed):
        raise AccountingError(
            f"chunk {chunk} was to give {sum(owed.values())} (model, document) pairs, {sum(made.values())} were made. "
            "Keywords would have rested on a part of the corpus, or counted documents twice. Nothing of the chunk was "
            "committed: run the same command again; if it says the same, write to a new sink."
        )
    return counts


def as_tasks(models: Sequence[ExplainedModel]) -> list[ModelTask]:
    """Return what a worker is told of models."""
    return [ModelTask(model.split, model.explain_key, model.folder, model.digest, model.prepared) for model in models]


def _check_models(spark: SparkSession, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel]) -> str:
    """Let executors load every model once; a bad or unreachable one stops the job before the first task.

    Returns:
        The devices they ran on.

    Raises:
        ModelError: With the executor's own words.
    """
    task = make_task(spark, plan, find_method, as_tasks(models))

    def check(batches: Iterator[pa.RecordBatch], /, *, device: str) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        for _ in batches:
            pass
        said: list[str | None] = []
        for model in task.models:
            try:
                open_explainer(task, model, device)
            except ExplainError as error:
                said.append(str(error))
        rows = [{"device": describe_device(device), "said": one} for one in said or [None]]
        yield pa.RecordBatch.from_pylist(rows, schema=pa.schema([("device", pa.string()), ("said", pa.string())]))

    places = count_devices(spark, plan.execution.device)
    asked = spark.range(places, numPartitions=places)
    checked = map_on_devices(asked, check, "device STRING, said STRING", plan.execution.device)
    rows = checked.distinct().orderBy("device", "said").collect()
    said = sorted({row["said"] for row in rows if row["said"] is not None})
    if said:
        raise ModelError("\n".join(said))
    return ", ".join(sorted({row["device"] for row in rows}))
