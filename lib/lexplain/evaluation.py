"""Evaluation of attribution methods: what a prediction loses without their words, what keyword lists come of them. Driver only.

Every method explains the same documents with the same models, in runs of its own; what was explained or measured before is
not done again. Beside each stand random scores and gradient x input, and beside the lists those of TF-IDF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lexplain.attribution import ExplainedModel, Progress, as_tasks, make_task, on_task_device, split_waves
from lexplain.corpus import Staged
from lexplain.deletions import deletion_batches
from lexplain.errors import AccountingError, MethodError, ModelError, PlanError, Problem
from lexplain.faithfulness import Trace
from lexplain.keys import digest
from lexplain.keyword_quality import QualityFigure, measure_quality, measure_tfidf
from lexplain.pipeline import open_run
from lexplain.plan import FindMethod, MethodChoice, Plan
from lexplain.schema import TABLES
from lexplain.session import is_local
from lexplain.tables import Tables, quote_list, quote_text

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CONTROLS = ("random", "gradient_x_input")
"""Methods that are always among those compared."""

METRICS: dict[str, tuple[str, ...]] = {
    "dig-2021": ("comprehensiveness", "sufficiency"),
    "dig-2021-log-odds": ("log_odds",),
    "eraser-2020": ("comprehensiveness", "sufficiency"),
    "marc-2023": ("comprehensiveness", "sufficiency"),
}
"""What is told of the traces of each protocol, see `lexplain.faithfulness.Trace`."""

_RESAMPLES = 2000
_TASK_DOCUMENTS = 32


@dataclass(frozen=True)
class Figure:
    """A metric of one method, over documents.

    Attributes:
        method: Id, or name and preset, as it was asked for.
        protocol: Which words are taken away, and how.
        metric: One of `METRICS`.
        label: Of the explanations; None for all labels.
        value: Mean over documents; a document has the mean of its explanations.
        ci_low: 95 % interval, from 2000 bootstrap samples of documents.
        ci_high: Its upper end.
        n_documents: Documents it is the mean of.
        over_random: Mean difference from random scores on the same documents; None for these themselves.
        over_random_low: Its 95 % interval.
        over_random_high: Its upper end.
    """

    method: str
    protocol: str
    metric: str
    label: str | None
    value: float
    ci_low: float
    ci_high: float
    n_documents: int
    over_random: float | None = None
    over_random_low: float | None = None
    over_random_high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What an evaluation comes to.

    Attributes:
        faithfulness: Figures over documents, as they stand in `faithfulness`.
        quality: Figures of the keyword lists, by method and for `tf-idf`, as they stand in `keyword_quality`; empty for
            a method whose rules leave no class a keyword.
    """

    faithfulness: list[Figure]
    quality: dict[str, list[QualityFigure]]


TFIDF = "tf-idf"
"""What lists made without a model are called."""


def list_contestants(plan: Plan, asked: Sequence[str], documents: int, find_method: FindMethod) -> dict[str, Plan]:
    """Return a plan for each method, by what it was asked for as; the controls come last.

    Args:
        plan: Names models, corpus and sink.
        asked: `NAME` or `NAME:PRESET`. The plan's own method keeps the plan's options.
        documents: Of the corpus, at most so many are explained, the same for all; drawn by their texts' digests.
        find_method: Registry lookup.

    Raises:
        PlanError: Methods or presets that there are not, or that do not fit; all of them at once.
    """
    contestants, problems, models = {}, [], plan.models
    if models.base is not None:  # what is trained here is the plan's, not the method's
        models = replace(models, register_as=models.register_as or f"lexplain-{plan.name}")
    own = find_method(plan.method.id).id
    for title in dict.fromkeys([*asked, *CONTROLS]):
        name, _, preset = title.partition(":")
        try:
            method = find_method(name)
        except MethodError as error:
            problems.append(Problem("methods", title, str(error), "It would have been left out", "Write another one"))
            continue
        limit = min(documents, plan.corpus.limit or documents)
        mine = replace(
            plan, name=f"{plan.name}-evaluation-{name}{'.' if preset else ''}{preset}"[:100], corpus=replace(plan.corpus, limit=limit),
            models=models,
            method=plan.method if method.id == own and not preset else MethodChoice(id=method.id, preset=preset or None),
        )  # fmt: skip
        try:
            contestants[title] = Plan.parse(mine.to_yaml(), find_method)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError("evaluation", list(dict.fromkeys(problems)))
    return contestants


def evaluate(
    spark: SparkSession, plan: Plan, contestants: Mapping[str, Plan], find_method: FindMethod, progress: Progress
) -> Comparison:
    """Explain and measure what is lacking, and write the figures.

    Args:
        spark: The session.
        plan: What is evaluated, by name.
        contestants: As `list_contestants` returns them.
        find_method: Registry lookup.
        progress: Told of each stage of each method.

    Returns:
        The figures, as they are written.

    Raises:
        ModelError: The models are regressions.
        AccountingError: A chunk's traces are not one an explanation and protocol; they are not committed.

    Note:
        Cost: that of each method over the documents, then a forward pass for each reading of a text, about 50 an
        explanation. The driver holds a hundred numbers an explanation.
    """
    keys: dict[str, list[str]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    keyword_keys: dict[str, str] = {}
    quality: dict[str, list[QualityFigure]] = {}
    for title, mine in contestants.items():
        with open_run(spark, mine, find_method, progress) as run:
            run.read_sources()
            run.fine_tune()
            if run.models[0].problem == "regression":
                raise ModelError(
                    f"plan={plan.name!r} explains regressions, which have no probability that words could lower. Numbers would "
                    "have been read as logits of a class. Evaluate models with classes."
                )
            run.attribute()
            keys[title] = [model.explain_key for model in run.models]
            _measure(run.tables, mine, find_method, run.models, run.corpus, progress)
            rows[title] = _collect(run.tables, run.corpus, keys[title])
            keyword_keys[title] = run.rank_words()
            quality[title] = measure_quality(run.tables, mine, run.corpus, keys[title], keyword_keys[title])
            run.finish("finished")
            tables, corpus = run.tables, run.corpus
    # of the models' predictions, which all methods share
    quality[TFIDF] = measure_tfidf(tables, mine, corpus, keys[title])
    found = Comparison(compute_figures(rows), quality)
    key = digest("evaluation", plan.name, sorted(keys.items()), corpus.key, corpus.version, sorted(METRICS))
    with tables.lock():
        _write(tables, plan.name, key, keys, keyword_keys, found)
    return found


def _measure(
    tables: Tables,
    plan: Plan,
    find_method: FindMethod,
    models: Sequence[ExplainedModel],
    corpus: Staged,
    progress: Progress,
) -> None:
    """Commit the traces that explanations lack, chunk by chunk."""
    protocols = tuple(METRICS)
    keys = quote_list([model.explain_key for model in models])
    where = f"{corpus.where} AND explain_key IN ({keys})"
    owed = (
        tables.read("explanations").where(f"{where} AND status = 'explained'")
        .groupBy("explain_key", "increment", "bucket").count()
    )  # fmt: skip
    done = (
        tables.read("deletions").where(f"{where} AND protocol IN ({quote_list(protocols)})")
        .groupBy("explain_key", "increment", "bucket").count().withColumnRenamed("count", "done")
    )  # fmt: skip
    pending = (
        owed.join(done, ["explain_key", "increment", "bucket"], "left")
        .where(f"count * {len(protocols)} != coalesce(done, 0)").orderBy("increment", "bucket", "explain_key").collect()
    )  # fmt: skip
    progress.start("delete words", sum(row["count"] for row in pending), "explanations")
    chunks = sorted({(row["increment"], row["bucket"]) for row in pending})
    for increment, bucket in chunks:
        mine = {
            row["explain_key"]: row["count"]
            for row in pending
            if (row["increment"], row["bucket"]) == (increment, bucket)
        }
        for wave in split_waves([model for model in models if model.explain_key in mine], plan):
            count = sum(mine[model.explain_key] for model in wave)
            _measure_chunk(tables, plan, find_method, wave, corpus, (increment, bucket), protocols, count)
            progress.advance(count)
    progress.finish(f"{sum(row['count'] for row in pending)} explanations measured now")


def _measure_chunk(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel], corpus: Staged,
    place: tuple[int, int], protocols: tuple[str, ...], count: int,
) -> None:  # fmt: skip
    from pyspark import StorageLevel

    keys = quote_list([model.explain_key for model in models])
    chunk = f"corpus_key = {quote_text(corpus.key)} AND increment = {place[0]} AND bucket = {place[1]}"
    texts = tables.read("staged").where(chunk).select("doc_id", "text")
    explained = tables.read("explanations").where(f"{chunk} AND explain_key IN ({keys}) AND status = 'explained'").select(
        "explain_key", "corpus_key", "increment", "bucket", "doc_id", "text_digest", "label", "words"
    )  # fmt: skip
    documents = explained.join(texts, "doc_id").repartition(max(1, ceil(count / _TASK_DOCUMENTS)), "text_digest")
    task = make_task(tables.spark, plan, find_method, as_tasks(models))
    work = partial(deletion_batches, task=task, protocols=protocols)
    measuring = on_task_device(work, plan.execution.device, is_local(tables.spark))
    ordered = documents.sortWithinPartitions("explain_key", "text_digest", "doc_id")
    traces = ordered.mapInArrow(measuring, TABLES["deletions"].schema).persist(StorageLevel.DISK_ONLY)
    try:
        made = traces.count()
        if made != count * len(protocols):
            raise AccountingError(
                f"chunk {place[0]}/{place[1]} was to give {count * len(protocols)} traces, {made} were made. Methods would "
                "have been compared on different documents. Run the same command again."
            )
        tables.replace(
            traces, "deletions", where=f"{chunk} AND explain_key IN ({keys}) AND protocol IN ({quote_list(protocols)})"
        )
    finally:
        traces.unpersist()


def _collect(tables: Tables, corpus: Staged, keys: Sequence[str]) -> list[dict[str, Any]]:
    where = f"{corpus.where} AND explain_key IN ({quote_list(keys)}) AND protocol IN ({quote_list(list(METRICS))}) AND reason IS NULL"
    columns = ("text_digest", "label", "protocol", "sizes", "whole", "without", "alone")
    return tables.read("deletions").where(where).select(*columns).toArrow().to_pylist()  # type: ignore[no-any-return]  # a list of rows


def compute_figures(rows: Mapping[str, Sequence[Mapping[str, Any]]], resamples: int = _RESAMPLES) -> list[Figure]:
    """Return the figures of each method, protocol, metric and label.

    Args:
        rows: By method, rows of `deletions`; `random` among them.
        resamples: Bootstrap samples.
    """
    values = {
        (method, protocol, metric): by_label
        for method, of_method in rows.items()
        for (protocol, metric), by_label in _mean_by_document(of_method).items()
    }
    figures = []
    for (method, protocol, metric), by_label in values.items():
        controls = values["random", protocol, metric]
        for label, by_document in by_label.items():
            figure = Figure(
                method, protocol, metric, label, *_bootstrap(list(by_document.values()), resamples), len(by_document)
            )
            if method != "random":
                control = controls.get(label, {})
                both = sorted(by_document.keys() & control.keys())
                if both:
                    mean, low, high = _bootstrap([by_document[each] - control[each] for each in both], resamples)
                    figure = replace(figure, over_random=mean, over_random_low=low, over_random_high=high)
            figures.append(figure)
    return figures


def _read_trace(row: Mapping[str, Any]) -> Trace:
    alone = None if row["alone"] is None else np.array(row["alone"])
    return Trace(np.array(row["sizes"]), row["whole"], np.array(row["without"]), alone)


def _mean_by_document(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], dict[str | None, dict[str, float]]]:
    """Return, by protocol and metric, by label and for all labels together, the mean of each document's explanations."""
    found: dict[tuple[str, str], dict[str | None, dict[str, list[float]]]] = {
        (protocol, metric): {} for protocol, metrics in METRICS.items() for metric in metrics
    }
    for row in rows:
        trace = _read_trace(row)
        for metric in METRICS[row["protocol"]]:
            value, by_label = getattr(trace, metric), found[row["protocol"], metric]
            for label in (None, row["label"]):
                by_label.setdefault(label, {}).setdefault(row["text_digest"], []).append(value)
    return {
        kind: {
            label: {digest: float(np.mean(each)) for digest, each in sorted(by_document.items())}
            for label, by_document in by_label.items()
        }
        for kind, by_label in found.items()
    }


def _bootstrap(values: Sequence[float], resamples: int) -> tuple[float, float, float]:
    """Return mean, and the 2.5 and 97.5 % quantiles of the means of samples of the same size; always the same samples."""
    known: NDArray[np.float64] = np.array(values)
    draws = np.random.default_rng(0).integers(len(known), size=(resamples, len(known)))
    low, high = np.quantile(known[draws].mean(1), (0.025, 0.975))
    return float(known.mean()), float(low), float(high)


def _write(
    tables: Tables, name: str, key: str, explain_keys: Mapping[str, Sequence[str]], keyword_keys: Mapping[str, str],
    found: Comparison,
) -> None:  # fmt: skip
    same = {"evaluation_key": key, "name": name, "measured_at": datetime.now(UTC)}
    rows = {
        "faithfulness": [
            same | {"explain_keys": list(explain_keys[figure.method])} | vars(figure) for figure in found.faithfulness
        ],
        "keyword_quality": [
            same | {"keyword_key": keyword_keys.get(method), "method": method} | vars(figure)
            for method, figures in found.quality.items()
            for figure in figures
        ],
    }
    for table, values in rows.items():
        frame = tables.spark.createDataFrame(values, TABLES[table].schema)
        tables.replace(frame, table, where=f"evaluation_key = {quote_text(key)}")
