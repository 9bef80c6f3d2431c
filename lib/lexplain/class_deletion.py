"""Keyword lists put to the test: what a class's prediction loses without the words of its list. Driver only.

Lists are made of one half of the documents and taken away from the other half, which they know nothing of. Beside them
are taken away the lists of the other classes, and words drawn at random that as many documents of the class hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lexplain.deletions import WordList, removal_batches
from lexplain.keyword_quality import QualityFigure, select_half_lists
from lexplain.keywords import DOC_GROUP, JACKKNIFE_GROUPS, LETTER, where_evidence
from lexplain.resampling import bootstrap_means, find_interval
from lexplain.tables import quote_rows, quote_text
from lexplain.tracing import Measurement, measure

if TYPE_CHECKING:
    from pyspark.sql import Row

    from lexplain.pipeline import Run

TOP = 20
"""Words of a list that are taken away."""

DRAWS = 3
"""Lists of random words beside each list."""

_SIDES = [group % 2 for group in range(JACKKNIFE_GROUPS)]
# Documents frequencies of a keyword and the word drawn in its place differ by this factor at most.
_FREQUENCY_STEP = 1.25


def measure_class_deletion(run: Run, keyword_key: str) -> list[QualityFigure]:
    """Take the keywords of classes away from documents, and tell what their predictions lose.

    Args:
        run: Its explanations and the keyword table are made.
        keyword_key: Names the keyword table.

    Returns:
        By class and over classes: `deletion`, what the class's probability loses in its documents without its list;
        `deletion_of_random`, without as frequent random words; `deletion_over_random`, the difference;
        `deletion_elsewhere`, what documents of other classes lose of theirs without the list; `deletion_flips`, the share of
        the class's documents that are predicted otherwise without the list. None if no class has a list in either half.

    Raises:
        AccountingError: A chunk did not give a row an explanation.

    Note:
        Runs on: Spark and executors. Cost: a forward pass of each document's windows for every class and random list, and
        one for the whole text. Documents are those that count as evidence.
        Source: ours; random words as in the controls of Arras et al. 2016.
    """
    lists = _read_lists(run, keyword_key)
    if not lists:
        return []
    measure(run, Measurement(
        table="class_deletions", kind="keyword_key", kinds=[keyword_key],
        make_work=lambda task, kinds: partial(removal_batches, task=task, keyword_key=kinds[0], lists=lists),
        columns=[f"CAST({DOC_GROUP} AS INT) % 2 AS side"], where=where_evidence(run.plan), unit="delete keywords",
    ))  # fmt: skip
    rows = run.tables.read("class_deletions").where(
        f"{run.where_explained} AND keyword_key = {quote_text(keyword_key)} AND reason IS NULL"
    )  # fmt: skip
    return compute_figures(rows.select("text_digest", "label", "whole", "removed").toArrow().to_pylist())


def _read_lists(run: Run, keyword_key: str) -> tuple[WordList, ...]:
    """Return each half's lists, and those of random words beside them."""
    halves = select_half_lists(run.tables, run.plan, run.corpus, run.explain_keys, keyword_key, "doc_group", [_SIDES])
    listed = run.tables.spark.sql(f"SELECT side, label, word FROM ({halves}) WHERE rank <= {TOP}").collect()
    if not listed:
        return ()
    words: dict[tuple[str, int, int | None], set[str]] = {}
    for row in listed:
        words.setdefault((row["label"], row["side"], None), set()).add(row["word"])
    for row in run.tables.spark.sql(_select_random(run, listed)).collect():
        words.setdefault((row["label"], row["side"], row["draw"]), set()).add(row["word"])
    ordered = sorted(words, key=lambda key: (key[0], key[1], -1 if key[2] is None else key[2]))
    return tuple(WordList(*key, frozenset(words[key])) for key in ordered)


def _select_random(run: Run, listed: Sequence[Row]) -> str:
    """Return words (side, label, draw, word) that no list of a half holds, about as frequent as those of its lists."""
    pairs = quote_rows((row["side"], row["label"], row["word"]) for row in listed)
    return f"""
        WITH listed AS (SELECT * FROM VALUES {pairs} AS pairs(side, label, word)
        ), frequencies AS (
            SELECT label, word, floor(ln(count(DISTINCT text_digest)) / ln({_FREQUENCY_STEP}D)) AS step
            FROM (SELECT label, text_digest, explode(array_distinct(words.word)) AS word
                FROM {run.tables.name("explanations")}
                WHERE {run.where_explained} AND status = 'explained' AND {where_evidence(run.plan)})
            WHERE word RLIKE {quote_text(LETTER)} GROUP BY label, word
        ), drawn AS (
            SELECT k.side, k.label, f.word, row_number() OVER (
                PARTITION BY k.side, k.label, k.word ORDER BY xxhash64(k.side, k.word, f.word), f.word) - 1 AS draw
            FROM (SELECT * FROM listed JOIN frequencies USING (label, word)) k JOIN frequencies f
            ON f.label = k.label AND f.step = k.step
            LEFT ANTI JOIN listed l ON l.side = k.side AND l.word = f.word
        )
        SELECT DISTINCT side, label, CAST(draw AS INT) AS draw, word FROM drawn WHERE draw < {DRAWS}"""


def compute_figures(rows: Sequence[Mapping[str, Any]]) -> list[QualityFigure]:
    """Return the figures of `measure_class_deletion` from rows of `class_deletions`."""
    by_class: dict[str, dict[str, dict[str, list[float]]]] = {}  # metric, class, document: values

    def add(metric: str, label: str, digest: str, value: float) -> None:
        by_class.setdefault(metric, {}).setdefault(label, {}).setdefault(digest, []).append(value)

    for row in rows:
        label, digest = row["label"], row["text_digest"]
        losses = {(each["list"], each["draw"]): row["whole"] - each["probability"] for each in row["removed"]}
        predicted = {(each["list"], each["draw"]): each["predicted"] for each in row["removed"]}
        for other, draw in losses:
            if draw is None and other != label:
                add("deletion_elsewhere", other, digest, losses[other, None])
        if (label, None) not in losses:
            continue
        add("deletion", label, digest, losses[label, None])
        add("deletion_flips", label, digest, float(predicted[label, None] != label))
        random = [loss for (_, draw), loss in losses.items() if draw is not None]
        if random:
            add("deletion_of_random", label, digest, float(np.mean(random)))
            add("deletion_over_random", label, digest, losses[label, None] - float(np.mean(random)))
    return [figure for metric, classes in sorted(by_class.items()) for figure in _summarise(metric, classes)]


def _summarise(metric: str, classes: Mapping[str, Mapping[str, Sequence[float]]]) -> list[QualityFigure]:
    """Return a metric by class and its mean over classes, with intervals over documents."""
    figures: list[QualityFigure] = []
    means: list[NDArray[np.float64]] = []
    for number, (label, by_document) in enumerate(sorted(classes.items())):
        values = [float(np.mean(by_document[digest])) for digest in sorted(by_document)]
        sampled = bootstrap_means(values, seed=number)
        figures.append(_tell(metric, label, float(np.mean(values)), sampled, len(values)))
        means.append(sampled)
    over_classes = float(np.mean([figure.value for figure in figures]))
    documents = len({digest for by_document in classes.values() for digest in by_document})
    return [*figures, _tell(metric, None, over_classes, np.mean(means, axis=0), documents)]


def _tell(metric: str, label: str | None, value: float, sampled: NDArray[np.float64], documents: int) -> QualityFigure:
    return QualityFigure(metric, None, label, value, *find_interval(sampled), documents)
