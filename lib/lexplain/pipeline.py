"""One run of a plan: its stages in order, what each needs of the others, and the run's own record. Driver only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lexplain.attribution import Attribution, ExplainedModel, Progress
from lexplain.corpus import Snapshot, Staged, check_seen, find_staged, list_labels, stage
from lexplain.errors import CorpusError, LimitError, ModelError, PlanError, TableError, redact
from lexplain.executor import ModelTask
from lexplain.keys import corpus_key, keyword_key, run_id
from lexplain.keywords import PHRASES, WORDS, Unit, describe_evidence, rank_keywords, sum_words
from lexplain.plan import FindMethod, Plan, Sink, Source
from lexplain.preparation import find_prepared, prepare_models
from lexplain.run_record import (
    digest_state,
    open_record,
    read_finished,
    read_record,
    read_versions,
    take_snapshots,
    write_record,
)
from lexplain.session import trace_workers
from lexplain.sql_function import register_explain
from lexplain.tables import Tables, quote_list, quote_text
from lexplain.training import find_models, fine_tune_splits, read_model, take_models

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from lexplain.tracking import ModelLocation, RunTracker

_SHOWN_LABELS = 10  # in a message
_CHUNK_DOCUMENTS = 2000  # where nothing is known of the rate
_FEWEST_CHUNK_DOCUMENTS, _MOST_CHUNK_DOCUMENTS = 200, 100_000  # each chunk is a commit of all its rows
_RATED_SECONDS = 60.0


def tracking_uri(plan: Plan) -> str | None:
    """Return where MLflow keeps runs; None when the plan has MLflow off."""
    if not plan.mlflow.enabled:
        return None
    folder = str(plan.sink.path)
    for sign in "%?#":  # in a URI they are no part of a path
        folder = folder.replace(sign, f"%{ord(sign):02X}")
    return plan.mlflow.tracking_uri or f"sqlite:///{folder}/mlflow.db"


@dataclass
class Run:
    """A run that is open: its tables are there, its inputs staged, its record written.

    Attributes:
        run_id: Digest of the plan's name and what its keys are made of.
        unchanged: The run is finished, and nothing that it rests on has changed: `record` tells what came of it.
    """

    plan: Plan
    find_method: FindMethod
    tables: Tables
    progress: Progress
    run_id: str
    locations: list[ModelLocation]
    tracker: RunTracker | None
    record: dict[str, Any]
    unchanged: bool = False
    _opened_at: int = 0
    _before: Mapping[str, Any] | None = None  # the record of an earlier start
    _versions_before: Mapping[str, int] | None = None  # of the tables; None where the run was not finished
    _snapshots: dict[str, Snapshot] = field(default_factory=dict)  # taken when it was opened
    _staged: dict[str, Staged] = field(default_factory=dict)
    _models: list[ExplainedModel] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _aggregated: bool = False

    @property
    def corpus(self) -> Staged:
        """The corpus as staged; read and staged when first asked for."""
        return self._stage(self.plan.corpus, "corpus")

    @property
    def training(self) -> Staged | None:
        """The training documents as staged; None where the plan has none."""
        return None if self.plan.training is None else self._stage(self.plan.training, "training")

    def read_sources(self) -> None:
        """Stage both inputs, so that a defect of either is known before anything is trained.

        Raises:
            CorpusError: An input cannot be read as mapped, or has ids that are null or occur twice.
        """
        _ = self.training, self.corpus

    def fine_tune(self) -> None:
        """Fine-tune the splits that are not fine-tuned yet; nothing for models that the user brought."""
        if self.plan.models.base is not None:
            assert self.training is not None  # the plan's check saw to it
            fine_tune_splits(self.tables, self.plan, self.locations[0], self.training, self.tracker, self.progress)

    @property
    def models(self) -> list[ExplainedModel]:
        """The models to explain, by split.

        Raises:
            ModelError: They are not fine-tuned yet, or do not fit each other or the corpus.
        """
        if not self._models:
            models = self._find_models()
            self._check_labels(models)
            self._take(find_prepared(self.tables, self.plan, self.find_method, models))
        return self._models

    def _take(self, models: list[ExplainedModel]) -> None:
        """Take the models of this run, and register `explain(text)` with the first."""
        self._models = models
        first = ModelTask(0, None, models[0].folder, models[0].digest, models[0].prepared)
        register_explain(self.tables.spark, self.plan, self.find_method, first)

    def _prepare(self, models: Sequence[ExplainedModel]) -> Sequence[ExplainedModel]:
        """Make what the method needs to know of the models, where it is not made yet."""
        prepared = prepare_models(
            self.tables, self.plan, self.find_method, models, self.corpus, self.training, self.progress
        )
        if prepared != self._models:
            self._take(prepared)
        return prepared

    def _find_models(self) -> list[ExplainedModel]:
        if self.plan.models.base is not None:
            assert self.training is not None
            return find_models(self.tables, self.plan, self.find_method, self.locations[0], self.training)
        if self.plan.corpus.columns.split is not None:
            check_seen(self.tables, self.corpus, self.plan.corpus, len(self.locations))
        return take_models(self.tables, self.plan, self.find_method, self.locations)

    @property
    def explain_keys(self) -> list[str]:
        """The keys of the models' explanations, by split."""
        return [model.explain_key for model in self.models]

    @property
    def where_explained(self) -> str:
        """The SQL condition that selects what the run's models made of its corpus."""
        return self.corpus.where_explained(self.explain_keys)

    def check_classes(self) -> None:
        """Refuse regressions, for what asks about classes.

        Raises:
            ModelError: The models are regressions.
        """
        if _are_regressions(self.models):
            raise ModelError(
                f"plan={self.plan.name!r} explains regressions, which have no classes. Their numbers would have been read as "
                "logits of a class. Write a plan whose models have classes."
            )

    @property
    def labels(self) -> list[str]:
        """The labels of the models, by name."""
        if self.unchanged:  # no model is to be looked for, fetched or checked again
            return list(self.record["labels"])
        return sorted({label for model in self.models for label in model.labels})

    def _check_labels(self, models: Sequence[ExplainedModel]) -> None:
        """Refuse models whose labels meet neither the corpus's nor the plan's: every table would be empty."""
        known = {label for model in models for label in model.labels}
        against = self.plan.method.against
        if against is not None and any(against not in model.labels for model in models):
            raise ModelError(
                f"method.against={against!r} is no label of every model. There would have been nothing to compare with. Write "
                f"one of: {', '.join(sorted(known))}."
            )
        unknown = sorted(set(self.plan.keywords.labels) - known)
        if unknown:
            raise ModelError(
                f"keywords.labels={unknown!r} are no labels of the models. Their tables would have been empty. "
                f"Write labels out of: {', '.join(sorted(known))}."
            )
        if self.plan.evidence == "predicted" or _are_regressions(models):
            return
        gold = set(list_labels(self.tables, self.corpus))
        if not gold & known:
            raise ModelError(
                f"the models' labels {sorted(known)[:_SHOWN_LABELS]} and the corpus's {sorted(gold)[:_SHOWN_LABELS]} have none in common. No "
                "prediction would have counted as a true positive. Set id2label in the models' config.json, or write "
                "keywords.evidence: predicted."
            )
        unmet = sorted(gold - known)
        if unmet:
            shown = ", ".join(unmet[:_SHOWN_LABELS]) + (", ..." if len(unmet) > _SHOWN_LABELS else "")
            self.progress.start("compare labels", 0, "labels")
            self.progress.finish(
                f"no model has {len(unmet)} of the corpus's {len(gold)} labels: {shown}; what a model predicts for a "
                "document with no other label counts as wrong"
            )

    def attribute(self) -> None:
        """Explain what is not explained yet, and check that every document is accounted for."""
        self._record_keys()
        done = self._attribution.explain(self.progress)
        self._counts = self._attribution.count_documents()
        if done.n_pairs:
            self.record["device"] = done.device
            # A few documents take as long as it takes to start: that is no rate to plan chunks by.
            if self.record["documents_per_second"] is None or done.seconds >= _RATED_SECONDS:
                self.record["documents_per_second"] = done.n_pairs / done.seconds

    def _record_keys(self) -> None:
        """Record whose explanations there will be, before the first: whoever deletes runs must know what each goes on with."""
        every = sorted({*(self.record["explain_keys_ever"] or self.record["explain_keys"] or []), *self.explain_keys})
        # What the keyword table rests on stays with it, until there is a new one.
        current = self.explain_keys if self.record["keyword_key"] is None else self.record["explain_keys"]
        found = {"explain_keys_ever": every, "explain_keys": current}
        if any(self.record[column] != keys for column, keys in found.items()):
            self.record |= found
            write_record(self.tables, self.record)

    def retry_rejected(self) -> None:
        """Explain the rejected documents again, for what may have changed since: memory, budget, device."""
        self._attribution.retry_rejected(self.progress)
        self._counts = {}

    @property
    def _attribution(self) -> Attribution:
        return Attribution(
            self.tables, self.plan, self.find_method, self.models, self.corpus, self.training, self._prepare
        )

    @property
    def signed(self) -> bool:
        """Whether scores tell evidence for a class from evidence against it."""
        return self.find_method(self.plan.method.id).is_signed(self.plan.method.asked)

    def aggregate(self) -> str | None:
        """Add up what is not added up yet and write the keyword table; of a method with spans that of phrases too.

        Returns:
            Their keyword_key; None for a regression, which has no classes to make keywords for.

        Raises:
            AccountingError: Attribution is not finished.
        """
        self._aggregated = True
        if _are_regressions(self.models):
            self.check_attributed()
            self.record["explain_keys"] = self.explain_keys
            self.progress.start("aggregate", 0, "table")
            self.progress.finish(
                "no class keywords: the models are regressions, whose output is a number and no class; what moves it is in "
                "the table explanations"
            )
            return None
        key, labelled = self.rank_words(), self._labelled()
        self.record |= {
            "keyword_key": key,
            "explain_keys": self.explain_keys,
            "labels": self.labels,
            "labelled_snapshot": None if labelled is None else labelled.version,
            "evidence": describe_evidence(self.plan) | {"increments": self.corpus.increments},
        }
        return key

    def check_attributed(self) -> None:
        """Count the documents, unless that was done.

        Raises:
            AccountingError: Attribution is not finished.
        """
        self._counts = self._counts or self._attribution.count_documents()

    def rank_words(self) -> str:
        """Make the keyword tables without making them the run's: the views go on showing what they showed.

        Returns:
            Their keyword_key.

        Raises:
            AccountingError: Attribution is not finished.
        """
        self.check_attributed()
        keys, labelled = self.explain_keys, self._labelled()
        snapshot = None if labelled is None else labelled.version
        key = keyword_key(self.plan, keys, self.corpus.version, snapshot, self._counts)
        units = self._list_units()
        self.progress.start("aggregate", len(units), "tables")
        share = self.plan.models.test_share
        for unit in units:
            sum_words(self.tables, self.plan, self.corpus, keys, unit)
            rank_keywords(
                self.tables, self.plan, self.corpus, keys, keyword_key=key, labelled=labelled,
                test_share_ratio=share / (1 - share) if self.plan.models.base is not None else None,
                signed=self.signed, unit=unit,
            )  # fmt: skip
            self.progress.advance(1)
        self.progress.finish("keyword table ready" if len(units) == 1 else "keyword and keyphrase tables ready")
        return key

    def _list_units(self) -> list[Unit]:
        """Return what keyword tables there are: of words, and where the method makes spans of phrases."""
        return [WORDS, PHRASES] if self.find_method(self.plan.method.id).mask else [WORDS]

    def _labelled(self) -> Staged | None:
        source = self.plan.labelled
        if source is None:
            return None
        return self.training if self.plan.training is not None else self.corpus

    def _stage(self, source: Source, name: str) -> Staged:
        key = corpus_key(source)
        if key in self._staged:
            return self._staged[key]
        self.progress.start(f"read {name}", 1, "source")
        version = self.record[f"{name}_snapshot"] if name in self.record["pinned"] else None
        if version is None:
            staged = stage(
                self.tables, source, name=name, chunk_documents=self._choose_chunk_documents(),
                taken=self._snapshots.pop(key, None),
            )  # fmt: skip
            said = "staged"
        else:
            staged = find_staged(self.tables, source, int(version.rpartition("/")[2]), name)
            said = "as the run found them; what has come since is for the next one"
        self.progress.advance(1)
        self.progress.finish(f"{staged.n_documents} documents {said}")
        self._pin(staged)
        self._staged[key] = staged
        return staged

    def _choose_chunk_documents(self) -> int:
        """Return how many documents a chunk of a new increment has: as many as the plan's time for one takes."""
        execution = self.plan.execution
        if execution.chunk_documents is not None:
            return execution.chunk_documents
        runs = self.tables.read("runs").where(
            f"name = {quote_text(self.plan.name)} AND documents_per_second > 0 AND explain_keys IS NOT NULL"
        ).orderBy("finished_at", "started_at", ascending=False).head(1)  # fmt: skip
        if not runs:
            return _CHUNK_DOCUMENTS
        # Of models that are fine-tuned here, not all owe a document an explanation.
        where = f"corpus_key = {quote_text(runs[0]['corpus_key'])} AND explain_key IN ({quote_list(runs[0]['explain_keys'])})"
        owed = self.tables.read("chunks").where(where).groupBy("increment").agg({"n_documents": "sum"})
        documents = self.tables.read("increments").where(
            f"corpus_key = {quote_text(runs[0]['corpus_key'])} AND n_buckets > 0"
        )
        totals = owed.join(documents, "increment").selectExpr(
            "sum(`sum(n_documents)`) AS pairs", "sum(n_documents) AS documents"
        ).collect()[0]  # fmt: skip
        if not totals["pairs"]:
            return _CHUNK_DOCUMENTS
        rate = runs[0]["documents_per_second"] * totals["documents"] / totals["pairs"]
        return int(min(_MOST_CHUNK_DOCUMENTS, max(_FEWEST_CHUNK_DOCUMENTS, rate * 60 * execution.chunk_minutes)))

    def _pin(self, staged: Staged) -> None:
        """Record an input before anything is made of it: a retry must find the input of this start."""
        sources = {"corpus": self.plan.corpus, "training": self.plan.training}
        names = [name for name, source in sources.items() if source is not None and corpus_key(source) == staged.key]
        if not {*names} <= {*self.record["pinned"]}:
            self.record |= {f"{name}_snapshot": staged.version for name in names}
            self.record["pinned"] = sorted({*self.record["pinned"], *names})
            write_record(self.tables, self.record)

    def finish(self, status: Literal["finished", "stopped", "failed"], detail: str | None = None) -> None:
        """Write the run's last state to `runs` and to MLflow; nothing of an unchanged run."""
        if self.unchanged:
            return
        if not self._counts and self._models and self.record["corpus_key"] in self._staged:
            self._counts = self._attribution.count_statuses()
        self.record |= {"status": status, "detail": None if detail is None else redact(detail)}
        self.record["documents_by_status"] = self._counts or self.record["documents_by_status"]
        if status == "finished":
            self.record["pinned"] = []
        if status == "finished" and self._aggregated:  # the views show the keywords that were made last
            self.record["finished_at"] = datetime.now(UTC)
        self.record["fingerprint"] = self._take_fingerprint() if status == "finished" and self._aggregated else None
        changed = self.tables.commits > self._opened_at
        write_record(self.tables, self.record)
        if self.tracker is None:
            return
        if changed or status != "finished":
            self._log_results(self.tracker, status)
        self.tracker.finish("FINISHED" if status == "finished" else "FAILED")

    def _take_fingerprint(self) -> str | None:
        """Return the digest of what the run rests on; None where that is not known, or another job may have changed it."""
        snapshots = {key: staged.snapshot for key, staged in self._staged.items()}
        versions = read_versions(self.tables)
        # No lock keeps others out of a schema.
        if None in snapshots.values() or (self.tables.folder is None and versions != self._versions_before):
            return None
        return digest_state(self.plan, snapshots, versions)

    def refuse(self, detail: str) -> None:
        """Leave the run as it was before this start, whose input was refused: the next start looks at it again."""
        if self._before is None:
            self.record |= {"corpus_snapshot": None, "training_snapshot": None, "pinned": []}
            self.finish("failed", detail)
            return
        # What was made before is what the keyword tables show; a failed run would go on with its pinned input, too.
        write_record(self.tables, self._before)
        if self.tracker is not None:
            self.tracker.finish("FINISHED" if self._before["status"] == "finished" else "FAILED")

    def _log_results(self, tracker: RunTracker, status: str) -> None:
        counts = self.record["documents_by_status"] or {}
        metrics = {f"documents/{name}": float(count) for name, count in counts.items()}
        if self.record["documents_per_second"]:
            metrics["documents_per_second"] = self.record["documents_per_second"]
        metrics |= self._quality()
        tracker.log_metrics(metrics)
        tracker.set_tags({f"delta.{name}": version for name, version in self.tables.versions().items()})
        tracker.set_tags({f"version.{name}": version for name, version in self.record["versions"].items()})
        tracker.set_tags({"lexplain.status": status, "lexplain.keyword_key": self.record["keyword_key"] or ""})
        if self.record["keyword_key"] is not None:
            for unit in self._list_units():
                kept = self.tables.read(unit.keywords).where(
                    f"keyword_key = {quote_text(self.record['keyword_key'])} AND kept"
                )
                tracker.log_table(unit.keywords, kept.orderBy("label", "rank").toArrow())

    def _quality(self) -> dict[str, float]:
        keys, corpus = self.record["explain_keys"] or [], self._staged.get(self.record["corpus_key"])
        if not keys or corpus is None:
            return {}
        row = self.tables.read("explanations").where(
            f"status = 'explained' AND {corpus.where_explained(keys)}"
        ).selectExpr(
            "avg(CAST(converged AS INT)) AS share_converged",
            "percentile(completeness_gap_relative, 0.5) AS gap_relative_median",
            "percentile(completeness_gap_relative, 0.99) AS gap_relative_p99",
        ).collect()[0]  # fmt: skip
        return {name: float(value) for name, value in row.asDict().items() if value is not None}


@contextmanager
def open_run(
    spark: SparkSession, plan: Plan, find_method: FindMethod, progress: Progress, *, pinned: bool = False,
    skip_unchanged: bool = False,
) -> Iterator[Run]:  # fmt: skip
    """Open a plan's run: tables, lock, models' digests, MLflow's parent run, the row in `runs`.

    The run is recorded as failed when the block raises, as stopped when a limit was passed; otherwise the
    caller says `finish`.

    Args:
        spark: The session.
        plan: What to run.
        find_method: Registry lookup.
        progress: Told of each stage.
        pinned: The run was started before, and goes on with the documents that it had then, finished or not.
        skip_unchanged: Look first whether anything has changed since the run finished: plan, versions of the libraries,
            sources, tables. If not, it comes back as it was recorded, `unchanged`: neither `runs` nor MLflow is written
            to, and no view is registered. Costs a snapshot of each source, which is taken in any case.

    Raises:
        TableError: Another writer holds the sink, or a run that must be there is not.
        ModelError: A model is not there.
    """
    from lexplain.tracking import RunTracker, locate_model

    tables = Tables(spark, plan.sink)
    # Half of the time after which a silent worker is stopped: then there is a trace of where it hung.
    idle = plan.execution.idle_timeout_seconds
    with tables.lock(), trace_workers(spark, None if idle is None else idle // 2):
        uri = tracking_uri(plan)
        names = plan.models.uris or (str(plan.models.base),)
        locations = [locate_model(name, uri) for name in names]
        identity = run_id(plan, find_method, [location.digest for location in locations])
        versions_before, snapshots = None, {}
        if skip_unchanged and tables.are_current() and (finished := read_finished(tables, plan.name, identity)):
            progress.start("compare", 0, "run")
            versions_before, snapshots = read_versions(tables), take_snapshots(spark, plan)
            found = digest_state(plan, {key: each.name for key, each in snapshots.items()}, versions_before)
            if finished["fingerprint"] == found:
                progress.finish("nothing has changed since the run finished: nothing is left to do")
                yield Run(plan, find_method, tables, progress, identity, locations, None, finished, unchanged=True)
                return
            progress.finish("plan, libraries, sources or tables may have changed since the run finished")
        progress.start("open tables", 1, "sink")
        tables.create()
        progress.finish(plan.sink.path or str(plan.sink.schema))
        before = read_record(tables, identity)
        if pinned and before is None:
            raise TableError(
                f"name={plan.name!r} with these keys is no run in {plan.sink.path or plan.sink.schema!r}. There would have been "
                "nothing to change. Run the plan first: lexplain run PLAN.yaml."
            )
        tracker = None
        if uri is not None:
            tracker = RunTracker.open(
                tracking_uri=uri, experiment=plan.mlflow.experiment, run_id=identity, name=plan.name,
                artifact_root=None if plan.sink.path is None else str(Path(plan.sink.path) / "mlflow-artifacts"),
            )  # fmt: skip
            tracker.log_plan(plan.to_yaml())
        tables.sign_commits({"run_id": identity, "mlflow_run_id": "" if tracker is None else tracker.mlflow_run_id})
        record = open_record(tables, plan, identity, before, None if tracker is None else tracker.mlflow_run_id)
        if pinned:
            record["pinned"] = ["corpus", "training"]
        run = Run(
            plan, find_method, tables, progress, identity, locations, tracker, record, _opened_at=tables.commits,
            _before=before, _versions_before=versions_before, _snapshots=snapshots,
        )  # fmt: skip
        try:
            yield run
        except LimitError as error:
            run.finish("stopped", str(error))
            raise
        except CorpusError as error:
            run.refuse(f"{type(error).__name__}: {error}"[:2000])
            raise
        except BaseException as error:
            try:
                run.finish("failed", f"{type(error).__name__}: {error}"[:2000])
            except Exception:  # the first error is the one to report; the session may be gone
                logging.getLogger(__name__).exception("the failed run could not be recorded")
            raise


def open_tables(spark: SparkSession, sink: Sink, find_method: FindMethod) -> Tables:
    """Open a sink for reading: its tables and views by name, and `explain(text)` with the latest run's first model.

    Raises:
        TableError: There are no tables of lexplain.
    """
    tables = Tables(spark, sink)
    tables.open()
    runs = tables.read("runs").where("explain_keys IS NOT NULL").orderBy("finished_at", ascending=False).head(1)
    if not runs:
        return tables
    try:
        plan = Plan.parse(runs[0]["plan"], find_method, check_files=False)
    except PlanError:  # of an older lexplain, say: its tables can be read all the same
        logging.getLogger(__name__).exception("explain(text) is not registered: the latest run's plan cannot be read")
        return tables
    for row in tables.read("models").where("split = 0").collect():
        model = read_model(plan, find_method, row.asDict())
        if model.explain_key == runs[0]["explain_keys"][0]:
            (model,) = find_prepared(tables, plan, find_method, [model])
            task = ModelTask(0, None, model.folder, model.digest, model.prepared)
            register_explain(spark, plan, find_method, task)
    return tables


def _are_regressions(models: Sequence[ExplainedModel]) -> bool:
    return models[0].problem == "regression"  # one is as the others, or they are refused
