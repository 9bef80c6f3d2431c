"""What came of a run, for the person at the terminal: its keywords, labels without any, where the tables are. Driver only."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING

from rich.markup import escape

from lexplain.tables import quote_text
from lexplain.terminal import format_cell, print_keywords, print_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from lexplain.comparison import Difference, Figure
    from lexplain.keyword_quality import QualityFigure
    from lexplain.pipeline import Run
    from lexplain.sweep import Setting

_RANKED_BY = ("marc-2023", "comprehensiveness")


def show_keywords(console: Console, run: Run, key: str) -> None:
    """Print a keyword table, and of the labels that have no keyword why."""
    rows = run.tables.read("keywords").where(f"keyword_key = {quote_text(key)} AND kept").collect()
    rows.sort(key=lambda row: (row["label"], row["rank"]))  # Spark would sample and shuffle them
    splits = rows[0]["n_splits"] if rows else 0
    counts = run.record["documents_by_status"] or {}
    console.print()
    console.print(
        ", ".join(f"{count} {status}" for status, count in counts.items() if count) + " (model, document) pairs"
    )
    console.print()
    print_keywords(console, [row.asDict() for row in rows], n_splits=splits)
    if rows and not run.signed:
        console.print(f"{escape(_describe_unsigned(run))}\n")
    if run.find_method(run.plan.method.id).mask:
        _show_phrases(console, run, key)
    bare = sorted(set(run.plan.keywords.labels or run.labels) - {row["label"] for row in rows})
    if not bare:
        return
    dropped = run.tables.spark.sql(
        f"SELECT label, drop_reason, count(*) AS n FROM {run.tables.name('keywords')}"
        f" WHERE keyword_key = {quote_text(key)} AND NOT kept GROUP BY label, drop_reason ORDER BY label, n DESC"
    ).collect()
    if rows:
        for label in bare:
            why = ", ".join(f"{row['n']} by {row['drop_reason']}" for row in dropped if row["label"] == label)
            said = f"words were dropped, {why}; see keywords_dropped" if why else "no document counts as evidence"
            console.print(f"{escape(label)}  (no keyword: {said})")
        console.print()
    elif dropped:
        reasons = Counter[str]()
        for row in dropped:
            reasons[row["drop_reason"]] += row["n"]
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        console.print(
            f"No word was kept ({escape(why)}). Lower keywords.theta or keywords.min_df, or explain more documents."
        )
    else:
        advice = "Look at the models' F1 in the table models: train longer, or lower the probability."
        if run.plan.models.base is None:
            advice = "Look at the column probability of the table explanations, and lower keywords.probability."
        console.print(
            f"No keyword: no prediction above keywords.probability={run.plan.keywords.probability} counted as evidence "
            f"({run.plan.evidence}). {advice}"
        )


def _show_phrases(console: Console, run: Run, key: str, *, top: int = 5) -> None:
    """Print the first phrases of each label on a line, or why none was kept."""
    found = run.tables.read("keyphrases").where(f"keyword_key = {quote_text(key)}")
    kept = found.where(f"kept AND rank <= {top}").orderBy("label", "rank").collect()
    for label in dict.fromkeys(row["label"] for row in kept):
        phrases = ", ".join(f"{row['phrase']} ({row['score_mean']:.2f})" for row in kept if row["label"] == label)
        console.print(f"keyphrases of {escape(label)}: {escape(format_cell(phrases))}", soft_wrap=True)
    if not kept:
        reasons = found.groupBy("drop_reason").count().orderBy("count", ascending=False).collect()
        why = ", ".join(f"{row['drop_reason']} {row['count']}" for row in reasons) or "no span"
        console.print(
            f"No keyphrase was kept ({escape(why)}): phrases are equal only word for word; see keyphrases_dropped."
        )
    console.print()


def _describe_unsigned(run: Run) -> str:
    method = run.find_method(run.plan.method.id)
    remedy = "Write a method whose scores have a sign, such as integrated_gradients."
    if "sign" in method.complete_options({}):
        remedy = "Write method.options.sign: gradient_x_input."
    return f"unsigned: scores of {method.id} have no sign, so words that speak against a class stand beside those for it. {remedy}"


def show_leaderboard(console: Console, figures: Sequence[Figure], differences: Sequence[Difference]) -> None:
    """Print a method a line: each metric over all labels, with its 95 % interval, the best first; then who is ahead of whom.

    A figure that is not better than random scores on the same documents, beyond chance, is in brackets.
    """
    overall = [figure for figure in figures if figure.label is None]
    kinds = list(dict.fromkeys((figure.protocol, figure.metric) for figure in overall))
    by_method: dict[str, dict[tuple[str, str], Figure]] = {}
    for figure in overall:
        by_method.setdefault(figure.method, {})[figure.protocol, figure.metric] = figure
    first = _RANKED_BY if _RANKED_BY in kinds else kinds[0]
    measured = [found[first] for found in by_method.values() if first in found]
    ranked = [
        each.method for each in sorted(measured, key=lambda each: each.value if each.low_is_good else -each.value)
    ]
    rows = []
    for method in ranked:
        found = by_method[method]
        rows.append((method, *(_format_figure(found[kind]) if kind in found else "" for kind in kinds)))
    print_rows(console, ["method", *(f"{metric} {protocol}" for protocol, metric in kinds)], rows)
    count = by_method[ranked[0]][first].n_documents
    console.print(
        f"{count} documents; mean and 95 % interval. Good when low: {', '.join(sorted({each.metric for each in overall if each.low_is_good}))}; "
        "else when high. In brackets: no better than random scores on the same documents.", soft_wrap=True,
    )  # fmt: skip
    behind: dict[str, list[str]] = {}
    for each in differences:
        if (each.protocol, each.metric) == first and each.ahead is not None:
            behind.setdefault(each.ahead, []).append(each.other if each.ahead == each.method else each.method)
    for method in ranked:
        if method in behind:
            others = ", ".join(sorted(behind[method], key=ranked.index))
            console.print(f"{escape(method)} is ahead of {escape(others)}", soft_wrap=True)
    console.print(
        f"By {first[1]} {first[0]}: paired permutation tests on the same documents, all pairs together (Holm), 5 %; every "
        "pair and metric is in faithfulness_differences.", soft_wrap=True,
    )  # fmt: skip


def _format_figure(figure: Figure) -> str:
    shown = _format_interval(figure)
    return f"[{shown}]" if figure.beats_random is False else shown


_LIST_METRICS = (
    "keyword_distinctiveness", "coverage", "cross_coverage", "coverage_distinctiveness", "halves_of_documents",
    "halves_of_splits", "deletion", "deletion_of_random", "deletion_elsewhere",
)  # fmt: skip


def show_quality(console: Console, quality: Mapping[str, Sequence[QualityFigure]]) -> None:
    """Print what the keyword lists of each method are worth, means over classes, a method a line."""
    subsets = {figure.subset for figures in quality.values() for figure in figures}
    subset = "TP" if "TP" in subsets else "P"
    rows = []
    for method, figures in quality.items():
        means = {each.metric: each for each in figures if each.label is None and each.subset in (None, subset)}
        if means:
            rows.append(
                (method, *(_format_interval(means[metric]) if metric in means else "" for metric in _LIST_METRICS))
            )
        else:
            console.print(f"{escape(method)}: no keyword was kept, so nothing is told of its lists", soft_wrap=True)
    if not rows:
        return
    print_rows(console, ["method", *(metric.replace("_", " ") for metric in _LIST_METRICS)], rows)
    of = "predicted and gold" if subset == "TP" else "predicted"
    console.print(
        f"Keyword lists, means over classes; documents stand for labels that are {of}. Low cross coverage is good, else high "
        "is; halves: rank-biased overlap, smallest and largest of five halvings. Deletion: what the class's probability loses "
        "without its keywords of other documents, without as frequent random words; elsewhere: what other classes lose."
    )


def show_sweep(console: Console, settings: Sequence[Setting]) -> None:
    """Print a setting a line, the best first."""
    metrics = list(dict.fromkeys(metric for setting in settings for metric in setting.metrics))
    rows = [
        (
            str(setting.rank), str(setting.top_n), f"{setting.theta:g}", f"{setting.probability:g}", str(setting.n_classes),
            f"{setting.score:.4f}",
            *(f"{setting.metrics[metric]:.3f}" if metric in setting.metrics else "" for metric in metrics),
        )
        for setting in settings
    ]  # fmt: skip
    head = ["rank", "top_n", "theta", "probability", "classes", "macro x micro"]
    print_rows(console, [*head, *(metric.replace("_", " ") for metric in metrics)], rows)
    console.print(
        "Ranked by the product of macro and micro coverage, as the published settings were. Long lists cover more: read it "
        "beside distinctiveness and halves. The lists of each setting are in keywords, by the keyword_key in sweeps.",
        soft_wrap=True,
    )


def _format_interval(figure: Figure | QualityFigure) -> str:
    interval = "" if figure.ci_low is None else f" {figure.ci_low:.3f}..{figure.ci_high:.3f}"
    return f"{figure.value:.3f}{interval}"


def show_place(console: Console, run: Run) -> None:
    """Print where a run's tables are, and a query of them."""
    sink = run.plan.sink
    place = sink.path or sink.schema
    console.print(f"[bold]tables[/bold]   {escape(str(place))}", soft_wrap=True)
    if sink.path is not None:
        command = "lexplain" if shutil.which("lexplain") else sys.argv[0]  # as in an environment that is not activated
        console.print(
            f'[bold]query[/bold]    {escape(command)} sql --tables {escape(str(place))} "SELECT label, word, rank FROM keywords_current'
            ' ORDER BY label, rank"', soft_wrap=True,
        )  # fmt: skip
    if run.record["mlflow_run_id"] is not None:
        console.print(f"[bold]MLflow[/bold]   run {run.record['mlflow_run_id']}", soft_wrap=True)
