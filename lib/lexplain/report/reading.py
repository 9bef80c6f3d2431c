"""A report's contents, read from a run's tables with Spark SQL. Driver only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lexplain.comparison import tell_better
from lexplain.corpus import where_increments
from lexplain.errors import TableError
from lexplain.plan import FindMethod, Plan
from lexplain.report.contents import Bounds, ClassSummary, Cut, Evaluation, Figure, Keyword, Model, Report
from lexplain.report.contestants import find_models, list_contestants, read_plan
from lexplain.report.documents import read_documents
from lexplain.tables import quote_list, quote_text

if TYPE_CHECKING:
    from lexplain.tables import Tables


def read_report(tables: Tables, name: str, find_method: FindMethod, bounds: Bounds | None = None) -> Report:
    """Read the latest finished run of a plan's name, and its latest evaluation.

    Args:
        tables: Opened.
        name: The plan's.
        find_method: Registry lookup.
        bounds: How much is taken; the defaults of `Bounds`, where None.

    Raises:
        TableError: There is no finished run with a keyword table.

    Note:
        Runs on: driver, with Spark SQL. Cost: about twenty queries, two of which read the run's explanations. What comes
        to the driver is bounded: 100 keywords for each of 50 classes, 500 documents of 4000 characters, 500 000 word
        scores; the report says of what there is more.
    """
    bounds = bounds or Bounds()
    run = _read_run(tables, name)
    plan = read_plan(run, find_method)
    models = find_models(tables, run, plan, find_method)
    classes, cuts = _read_classes(tables, run, models, bounds)
    labels = [one.label for one in classes]
    keywords, phrases = (_read_keywords(tables, run, unit, labels, bounds) for unit in ("word", "phrase"))
    shown = Counter(keyword.label for keyword in keywords)
    cuts += [
        Cut(f"keywords of {one.label}", shown[one.label], one.n_keywords)
        for one in classes
        if shown[one.label] < one.n_keywords
    ]
    contestants = list_contestants(tables, plan, models, find_method)
    read = read_documents(tables, run, contestants, keywords, labels, bounds)
    return Report(
        name=name,
        signed=contestants[0].method.signed,
        accuracy=plan.method.accuracy,
        n_splits=len(run["explain_keys"]),
        facts=_list_facts(tables, run, plan, models),
        rows_by_status=run["documents_by_status"] or {},
        plan=run["plan"],
        versions=run["versions"] or {},
        mlflow_run_id=run["mlflow_run_id"] or None,
        models=[_make_model(row) for row in models],
        classes=classes,
        keywords=keywords,
        phrases=phrases,
        documents=read.documents,
        methods=read.methods,
        evidence=read.evidence,
        evaluation=_read_evaluation(tables, name, contestants[0].explain_keys),
        cuts=[*cuts, *read.cuts],
    )


def _read_run(tables: Tables, name: str) -> dict[str, Any]:
    rows = tables.spark.sql(f"SELECT * FROM {tables.name('runs_current')} WHERE name = {quote_text(name)}").collect()
    if not rows:
        raise TableError(
            f"name={name!r} has no finished run with keywords in {str(tables.sink.path or tables.sink.schema)!r}. The report "
            "would have been empty. Run the plan first: lexplain run PLAN.yaml (a regression has no class keywords to report)."
        )
    return rows[0].asDict(recursive=True)


# --- classes and keywords -------------------------------------------------------------------------------------------


def _read_classes(
    tables: Tables, run: Mapping[str, Any], models: Sequence[Mapping[str, Any]], bounds: Bounds
) -> tuple[list[ClassSummary], list[Cut]]:
    """Return the classes of the models, or as many as the report takes: those with most keywords."""
    f1: dict[str, list[float]] = {}
    for model in models:
        for label, value in (model["label_f1"] or {}).items():
            f1.setdefault(label, []).append(value)
    rows = tables.spark.sql(
        f"SELECT label, drop_reason, count(*) AS n FROM {tables.name('keywords')}"
        f" WHERE keyword_key = {quote_text(run['keyword_key'])} GROUP BY label, drop_reason ORDER BY n DESC, drop_reason"
    ).collect()
    kept = {row["label"]: row["n"] for row in rows if row["drop_reason"] is None}
    dropped: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["drop_reason"] is not None:
            dropped.setdefault(row["label"], {})[row["drop_reason"]] = row["n"]
    names = {label for model in models for label in model["labels"]} | kept.keys() | dropped.keys()
    labels = sorted(names, key=lambda label: (-kept.get(label, 0), label))
    shown = sorted(labels[: bounds.classes])
    cuts = [Cut("classes", len(shown), len(labels))] if len(shown) < len(labels) else []
    classes = [
        ClassSummary(
            label, kept.get(label, 0), dropped.get(label, {}), sum(f1[label]) / len(f1[label]) if label in f1 else None
        )
        for label in shown
    ]
    return classes, cuts


def _read_keywords(
    tables: Tables, run: Mapping[str, Any], unit: str, labels: Sequence[str], bounds: Bounds
) -> list[Keyword]:
    """Return the first keywords, or keyphrases, of each class, by class and rank."""
    table = {"word": "keywords", "phrase": "keyphrases"}[unit]
    rows = (
        tables.read(table)
        .where(
            f"keyword_key = {quote_text(run['keyword_key'])} AND kept AND rank <= {bounds.keywords}"
            f" AND label IN ({quote_list(labels)})"
        )
        .orderBy("label", "rank")
        .collect()
    )
    return [
        Keyword(
            row["label"], row[unit], row["rank"], row["score_mean"], row["ci_low"], row["ci_high"], row["selection_frequency"],
            row["n_documents"], row["document_frequency"], row["distinctiveness"],
        )
        for row in rows
    ]  # fmt: skip


# --- evaluation -----------------------------------------------------------------------------------------------------


def _read_evaluation(tables: Tables, name: str, own_keys: Sequence[str]) -> Evaluation | None:
    """Return the figures that `lexplain evaluate` wrote last for the plan's name."""
    rows = {
        view: [
            row.asDict()
            for row in tables.spark.sql(f"SELECT * FROM {tables.name(view)} WHERE name = {quote_text(name)}").collect()
        ]
        for view in ("faithfulness_current", "keyword_quality_current")
    }
    faithfulness, quality = (
        sorted(each, key=lambda row: (row["method"], row["metric"], row["label"] or "")) for each in rows.values()
    )
    if not faithfulness:
        return None
    return Evaluation(
        measured_at=f"{faithfulness[0]['measured_at']:%Y-%m-%d %H:%M}",
        own=next((row["method"] for row in faithfulness if set(row["explain_keys"]) == set(own_keys)), None),
        faithfulness=[
            _make_figure(
                row,
                row["protocol"],
                None
                if row["over_random_low"] is None
                else tell_better(row["metric"], row["over_random_low"], row["over_random_high"]),
            )
            for row in faithfulness
        ],
        quality=[_make_figure(row, row["subset"], None) for row in quality],
    )


def _make_figure(row: Mapping[str, Any], of: str | None, beats_random: bool | None) -> Figure:
    return Figure(
        row["method"], (row["metric"], of), row["label"], row["value"], row["ci_low"], row["ci_high"], row["n_documents"],
        beats_random,
    )  # fmt: skip


# --- facts ----------------------------------------------------------------------------------------------------------


def _make_model(row: Mapping[str, Any]) -> Model:
    return Model(
        row["split"], row["mlflow_uri"] or row["uri"], row["digest"], row["macro_f1"], row["micro_f1"], row["n_train"],
        row["n_test"], row["seconds"],
    )  # fmt: skip


def _list_facts(
    tables: Tables, run: Mapping[str, Any], plan: Plan, models: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Return what is said of the run beside its tables: inputs, rules, cost, accuracy, identity."""
    where = (
        f"{where_increments(run['corpus_key'], run['evidence']['increments'])}"
        f" AND explain_key IN ({quote_list(run['explain_keys'])}) AND status = 'explained'"
    )
    made = tables.read("explanations").where(where).selectExpr(
        "count(*) AS n", "count(DISTINCT doc_id) AS documents", "avg(evaluations) AS evaluations",
        "sum(evaluations) AS total", "avg(CAST(converged AS INT)) AS converged",
        "percentile(completeness_gap_relative, 0.5) AS gap", "percentile(completeness_gap_relative, 0.99) AS gap99",
    ).collect()[0]  # fmt: skip
    rules, evidence, corpus = plan.keywords, run["evidence"], plan.corpus
    policy = "predicted and gold" if evidence["policy"] == "true_positives" else "predicted"
    seconds = [row["seconds"] for row in models if row["seconds"] is not None]
    facts = {
        "Corpus": str(corpus.path or corpus.table),
        "Documents explained": f"{made['documents']:,}, in {made['n']:,} explanations",
        "Evidence": f"labels that are {policy}, with probability above {evidence['probability']:g}; of each the"
        f" {evidence['top_n']} words with the highest scores",
        "A word is kept": f"if {rules.theta:.0%} of the models selected it and more than {rules.min_df} documents of the"
        " class hold it",
        "Accuracy": f"{plan.method.accuracy}; {_format(made['converged'], '.1%')} of the explanations met the method's own rule",
        "Completeness gap": f"{_format(made['gap'], '.2%')} of the score difference at the median,"
        f" {_format(made['gap99'], '.2%')} at the 99th percentile",
        "Cost": f"{_format(made['evaluations'], '.1f')} gradient evaluations an explanation, {made['total'] or 0:,} in all",
        "Rate": f"{_format(run['documents_per_second'], '.2f')} (model, document) pairs a second, {run['device'] or 'device not recorded'}",
        "Fine-tuning": f"{sum(seconds) / 60:,.1f} minutes for {len(seconds)} models" if seconds else "",
        "Started": f"{run['started_at']:%Y-%m-%d %H:%M}",
        "Finished": f"{run['finished_at']:%Y-%m-%d %H:%M}",
        "Run": run["run_id"],
        "Keyword table": run["keyword_key"],
        "MLflow run": run["mlflow_run_id"] or "",
    }
    return [(title, value) for title, value in facts.items() if value]


def _format(value: float | None, form: str) -> str:
    return "not recorded" if value is None else format(value, form)
