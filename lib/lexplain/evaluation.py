"""Evaluation of attribution methods: what a prediction loses without their words, what keyword lists come of them. Driver only.

Every method explains the same documents with the same models, in runs of its own; what was explained or measured before is
not done again. Beside each stand random scores and gradient x input, and beside the lists those of TF-IDF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from lexplain.attribution import Progress
from lexplain.class_deletion import measure_class_deletion
from lexplain.comparison import (
    CONTROL,
    NEEDS_GOLD,
    PRESETS,
    Difference,
    Figure,
    compare_methods,
    compute_figures,
    gather_values,
)
from lexplain.deletions import deletion_batches
from lexplain.errors import MethodError, PlanError, Problem
from lexplain.keys import digest, evaluation_prefix
from lexplain.keyword_quality import QualityFigure, measure_quality, measure_tfidf
from lexplain.pipeline import Run, open_run
from lexplain.plan import FindMethod, MethodChoice, Plan
from lexplain.schema import TABLES
from lexplain.tables import Tables, quote_list, quote_text
from lexplain.tracing import Measurement, measure

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from lexplain.tracking import RunTracker

CONTROLS = (CONTROL, "gradient_x_input")
"""Methods that are always among those compared."""


@dataclass(frozen=True)
class Comparison:
    """What an evaluation comes to.

    Attributes:
        faithfulness: Figures over documents, as they stand in `faithfulness`.
        differences: Each pair of methods, as they stand in `faithfulness_differences`.
        quality: Figures of the keyword lists, by method and for `tf-idf`, as they stand in `keyword_quality`; empty for
            a method whose rules leave no class a keyword.
    """

    faithfulness: list[Figure]
    differences: list[Difference]
    quality: dict[str, list[QualityFigure]]


TFIDF = "tf-idf"
"""What lists made without a model are called."""


DEFAULT_PRESETS = ("dig-2021", "eraser-2020", "marc-2023")
"""How methods are measured where nobody says."""


def list_contestants(
    plan: Plan, asked: Sequence[str], documents: int, find_method: FindMethod, presets: Sequence[str] = DEFAULT_PRESETS
) -> dict[str, Plan]:
    """Return a plan for each method, by what it was asked for as; the controls come last.

    Args:
        plan: Names models, corpus and sink.
        asked: `NAME` or `NAME:PRESET`. The plan's own method keeps the plan's options.
        documents: Of the corpus, at most so many are explained, the same for all; drawn by their texts' digests.
        find_method: Registry lookup.
        presets: How they are measured, see `lexplain.comparison.PRESETS`.

    Raises:
        PlanError: Methods or presets that there are not, or that do not fit; all of them at once.
    """
    contestants, models = {}, plan.models
    problems = [
        Problem("protocols", name, "is none", "It would have been left out", f"Write some of: {', '.join(PRESETS)}")
        for name in presets
        if name not in PRESETS
    ]
    with_gold = any(name in NEEDS_GOLD for name in presets)
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
        chosen = plan.method if method.id == own and not preset else MethodChoice(id=method.id, preset=preset or None)
        mine = replace(
            plan, name=f"{evaluation_prefix(plan.name)}{name}{'.' if preset else ''}{preset}"[:100],
            corpus=replace(plan.corpus, limit=limit), models=models,
            method=replace(chosen, gold=chosen.gold or with_gold),
        )  # fmt: skip
        try:
            contestants[title] = Plan.parse(mine.to_yaml(), find_method)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError("evaluation", list(dict.fromkeys(problems)))
    return contestants


def evaluate(
    spark: SparkSession, plan: Plan, contestants: Mapping[str, Plan], find_method: FindMethod, progress: Progress,
    presets: Sequence[str] = DEFAULT_PRESETS,
) -> Comparison:  # fmt: skip
    """Explain and measure what is lacking, and write the figures.

    Args:
        spark: The session.
        plan: What is evaluated, by name.
        contestants: As `list_contestants` returns them.
        find_method: Registry lookup.
        progress: Told of each stage of each method.
        presets: As `list_contestants` was given them.

    Returns:
        The figures, as they are written.

    Raises:
        ModelError: The models are regressions.
        AccountingError: A chunk's traces are not one an explanation and protocol; they are not committed.

    Note:
        Cost: that of each method over the documents, then a forward pass for each reading of a text: with the default
        presets about 50 an explanation, with `arras-2016` 100 more, and one for each class. The driver holds as many numbers
        an explanation.
    """
    protocols = sorted({metric.protocol for name in presets for metric in PRESETS[name]})
    traces = Measurement(
        table="deletions", kind="protocol", kinds=protocols, columns=["words"],
        make_work=lambda task, kinds: partial(deletion_batches, task=task, protocols=kinds),
    )  # fmt: skip
    keys: dict[str, list[str]] = {}
    trackers: dict[str, RunTracker | None] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    keyword_keys: dict[str, str] = {}
    quality: dict[str, list[QualityFigure]] = {}
    for title, mine in contestants.items():
        with open_run(spark, mine, find_method, progress) as run:
            run.read_sources()
            run.fine_tune()
            run.check_classes()
            run.attribute()
            keys[title] = run.explain_keys
            measure(run, traces)
            rows[title] = _collect(run, protocols)
            keyword_keys[title] = run.rank_words()
            quality[title] = [
                *measure_quality(run.tables, mine, run.corpus, keys[title], keyword_keys[title]),
                *measure_class_deletion(run, keyword_keys[title]),
            ]
            run.finish("finished")
            trackers[title], tables, corpus = run.tracker, run.tables, run.corpus
    # of the models' predictions, which all methods share
    quality[TFIDF] = measure_tfidf(tables, mine, corpus, keys[title])
    values = gather_values(rows, presets)
    found = Comparison(compute_figures(values), compare_methods(values), quality)
    key = digest("evaluation", plan.name, sorted(keys.items()), corpus.key, corpus.version, sorted(presets))
    with tables.lock():
        _write(tables, plan.name, key, keys, keyword_keys, found)
    _log(trackers, found)
    return found


def _collect(run: Run, protocols: Sequence[str]) -> list[dict[str, Any]]:
    """Return the traces of a run's explanations, with what is known of these and of the documents' labels."""
    where = run.where_explained
    rows = run.tables.spark.sql(f"""
        SELECT explain_key, text_digest, label, protocol, sizes, whole, without, alone, predicted, is_gold, label_rank, gold
        FROM (SELECT * FROM {run.tables.name("deletions")}
            WHERE {where} AND protocol IN ({quote_list(protocols)}) AND reason IS NULL)
        JOIN (SELECT explain_key, doc_id, label, is_gold, label_rank FROM {run.tables.name("explanations")} WHERE {where})
        USING (explain_key, doc_id, label)
        JOIN (SELECT doc_id, labels AS gold FROM {run.tables.name("staged")} WHERE {run.corpus.where}) USING (doc_id)""")
    return list(rows.toArrow().to_pylist())


def _write(
    tables: Tables, name: str, key: str, explain_keys: Mapping[str, Sequence[str]], keyword_keys: Mapping[str, str],
    found: Comparison,
) -> None:  # fmt: skip
    same = {"evaluation_key": key, "name": name, "measured_at": datetime.now(UTC)}
    rows = {
        "faithfulness": [
            same | {"explain_keys": list(explain_keys[figure.method])} | vars(figure) for figure in found.faithfulness
        ],
        "faithfulness_differences": [same | vars(difference) for difference in found.differences],
        "keyword_quality": [
            same | {"keyword_key": keyword_keys.get(method), "method": method} | vars(figure)
            for method, figures in found.quality.items()
            for figure in figures
        ],
    }
    for table, values in rows.items():
        frame = tables.spark.createDataFrame(values, TABLES[table].schema)
        tables.replace(frame, table, where=f"evaluation_key = {quote_text(key)}")


def _log(trackers: Mapping[str, RunTracker | None], found: Comparison) -> None:
    """Give each method's run in MLflow its figures over all labels, so that MLflow shows the runs side by side."""
    for method, tracker in trackers.items():
        if tracker is None:
            continue
        figures: list[tuple[str, Figure | QualityFigure]] = [
            (f"faithfulness/{each.protocol}/{each.metric}", each)
            for each in found.faithfulness
            if each.method == method
        ]
        figures += [
            ("/".join(filter(None, ("quality", each.subset, each.metric))), each) for each in found.quality[method]
        ]
        tracker.log_metrics({name: each.value for name, each in figures if each.label is None})
