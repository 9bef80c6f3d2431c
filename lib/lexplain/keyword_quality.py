"""Quality of keyword lists: how distinct they are, how much of their classes they cover, how they hold up in halves.

Everything over documents is Spark SQL; sums a class, list and group of documents come to the driver, a few thousand
numbers, and the figures are made of them. Beside a method's lists stand those of TF-IDF, which knows no model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lexplain.evidence import strip_word
from lexplain.keywords import (
    DOC_GROUP,
    JACKKNIFE_GROUPS,
    LETTER,
    T_QUANTILE,
    WORDS,
    group_words,
    read_lists,
    select_sums,
)
from lexplain.overlap import jaccard, rank_biased_overlap
from lexplain.tables import quote_list, quote_rows, quote_text

if TYPE_CHECKING:
    from pyspark.sql import Row

    from lexplain.corpus import Staged
    from lexplain.plan import Plan
    from lexplain.tables import Tables

DEPTH = 100
"""Words of a list that are looked at."""

FREQUENT_SHARE = 0.3
"""A label counts as predicted for a document if so large a share of all splits' models predict it."""

SUBSETS = {
    "TP": "array_intersect(gold, predicted)",
    "TL": "gold",
    "P": "predicted",
}
"""Which labels a document stands for: predicted and gold; gold; predicted."""

_HALVINGS = 5
# As the published TF-IDF lists: document frequency, and the share of all documents above which a word says nothing.
_TFIDF_MIN_DF = 10
_TFIDF_MAX_SHARE = 0.5


@dataclass(frozen=True)
class QualityFigure:
    """One figure of a set of keyword lists.

    Attributes:
        metric: `deletion` and what begins so: see `lexplain.class_deletion`. `keyword_distinctiveness`: share of a list's words that stand in no other list. `coverage`: share of a list
            that a document of the class holds. `coverage_micro`: the same over all labels of a document. `cross_coverage`:
            share of a list that a document of another class holds. `coverage_distinctiveness`: (coverage - cross
            coverage) / coverage. `halves_of_documents`, `halves_of_splits`: rank-biased overlap of the lists that two
            halves give; with `_jaccard` the Jaccard index.
        subset: Which documents stand for a class, see `SUBSETS`; None where none do.
        label: The class; None: mean over classes.
        value: The figure.
        ci_low: 95 % interval over documents, jackknife over 20 groups; of halves the smallest of five.
        ci_high: Its upper end; of halves the largest.
        n_documents: Documents it is the mean of; None where it is of lists alone.
    """

    metric: str
    subset: str | None
    label: str | None
    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    n_documents: int | None = None


def measure_quality(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], keyword_key: str
) -> list[QualityFigure]:
    """Return the figures of one keyword table.

    Args:
        tables: Reads `keywords`, `word_sums`, `explanations` and `staged`.
        plan: Names the evidence and the rules.
        corpus: The documents that were explained.
        explain_keys: One a split, in their order.
        keyword_key: Names the keyword table.

    Returns:
        Figures by metric; none if no class has a keyword. Documents without gold labels leave only the subset `P`.

    Note:
        Runs on: Spark. Cost: one pass over the explanations and the staged words, two over the sums.
        Source: Rönnqvist et al. 2022 and its code; halves are ours.
    """
    lists = read_lists(tables, keyword_key, DEPTH)
    if not lists:
        return []
    sums = _collect_coverage(tables, plan, corpus, explain_keys, lists)
    halves = _measure_halves(tables, plan, corpus, explain_keys, keyword_key)
    return [*_measure_distinctiveness(lists), *_measure_coverage(lists, sums), *halves]


def measure_tfidf(tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str]) -> list[QualityFigure]:
    """Return the figures of the lists that TF-IDF gives for the gold labels of the same documents; none without such."""
    lists = group_words(tables.spark.sql(_select_tfidf(tables, corpus)).collect())
    if not lists:
        return []
    sums = _collect_coverage(tables, plan, corpus, explain_keys, lists)
    return [*_measure_distinctiveness(lists), *_measure_coverage(lists, sums)]


# --- lists alone ------------------------------------------------------------------------------------------------


def _measure_distinctiveness(lists: Mapping[str, Sequence[str]]) -> list[QualityFigure]:
    counts = Counter(word for words in lists.values() for word in words)
    shares = {label: sum(counts[word] == 1 for word in words) / len(words) for label, words in lists.items()}
    figures = [QualityFigure("keyword_distinctiveness", None, label, share) for label, share in sorted(shares.items())]
    return [*figures, QualityFigure("keyword_distinctiveness", None, None, sum(shares.values()) / len(shares))]


# --- coverage ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Sums over the documents of one subset, by group of documents; C lists, in the order of the labels.

    Attributes:
        own: (groups, C) coverage of each list by documents of its class.
        own_count: (groups, C) these documents.
        cross: (groups, C) coverage of each list by documents of other classes, once for each label that they have.
        cross_count: (groups, C) so many.
        micro: (groups,) coverage of all lists of a document's labels together.
        micro_count: (groups,) documents.
    """

    own: NDArray[np.float64]
    own_count: NDArray[np.float64]
    cross: NDArray[np.float64]
    cross_count: NDArray[np.float64]
    micro: NDArray[np.float64]
    micro_count: NDArray[np.float64]

    @classmethod
    def zero(cls, lists: int) -> _Sums:
        """Return sums over no documents."""
        own, own_count, cross, cross_count = np.zeros((4, JACKKNIFE_GROUPS, lists))
        micro, micro_count = np.zeros((2, JACKKNIFE_GROUPS))
        return cls(own, own_count, cross, cross_count, micro, micro_count)


def _collect_coverage(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], lists: Mapping[str, Sequence[str]]
) -> dict[str, _Sums]:
    labels = sorted(lists)
    place = {label: number for number, label in enumerate(labels)}
    found: dict[str, _Sums] = {}
    rows = tables.spark.sql(_select_coverage(tables, plan, corpus, explain_keys, lists)).collect()
    for row in rows:
        if row["subset"] not in found:
            found[row["subset"]] = _Sums.zero(len(labels))
        sums, group = found[row["subset"]], row["doc_group"]
        if row["list"] is None:
            sums.micro[group], sums.micro_count[group] = row["own"], row["own_count"]
        else:
            at = group, place[row["list"]]
            sums.own[at], sums.own_count[at] = row["own"], row["own_count"]
            sums.cross[at], sums.cross_count[at] = row["cross"], row["cross_count"]
    return found


def _select_coverage(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], lists: Mapping[str, Sequence[str]]
) -> str:
    """Return the sums (subset, doc_group, list, own, own_count, cross, cross_count); list null for those over all lists."""
    where, names = corpus.where_explained(explain_keys), f"array({quote_list(sorted(lists))})"
    pairs = quote_rows((label, word) for label, words in lists.items() for word in words)
    needed = math.ceil(Decimal(str(FREQUENT_SHARE)) * len(explain_keys))
    word = strip_word("word") if plan.keywords.word_rule == "sacx-2022" else "word"
    subsets = ", ".join(
        f"struct('{name}' AS subset, array_intersect({chosen}, {names}) AS labels)" for name, chosen in SUBSETS.items()
    )
    return f"""
        WITH lists AS (SELECT * FROM VALUES {pairs} AS pairs(list, word)
        ), sizes AS (SELECT map_from_entries(collect_list(struct(list, n))) AS size_of
            FROM (SELECT list, count(*) AS n FROM lists GROUP BY list)
        ), explained AS (
            SELECT doc_id, text_digest, label, count(DISTINCT explain_key) >= {needed} AS frequent,
                array_distinct(flatten(collect_list(words.word))) AS read
            FROM {tables.name("explanations")}
            WHERE {where} AND status = 'explained' AND probability > {plan.keywords.probability!r}D
            GROUP BY doc_id, text_digest, label
        ), documents AS (
            SELECT doc_id, CAST({DOC_GROUP} AS INT) AS doc_group, collect_set(label) FILTER (WHERE frequent) AS predicted,
                array_distinct(flatten(collect_list(read))) AS read
            FROM explained GROUP BY doc_id, text_digest
        ), described AS (
            SELECT d.doc_id, doc_group, predicted, coalesce(s.labels, array()) AS gold, coalesce(s.words, read) AS words
            FROM documents d JOIN (SELECT doc_id, labels, words FROM {tables.name("staged")} WHERE {corpus.where}) s
            ON d.doc_id = s.doc_id
        ), hits AS (
            SELECT doc_id, map_from_entries(collect_list(struct(list, n))) AS hits
            FROM (SELECT doc_id, list, count(DISTINCT word) AS n
                FROM (SELECT doc_id, {word} AS word FROM described LATERAL VIEW explode(words) AS word)
                JOIN lists USING (word) GROUP BY doc_id, list) GROUP BY doc_id
        ), standing AS (
            SELECT doc_group, subset, labels, coalesce(hits, map()) AS hits
            FROM described LEFT JOIN hits USING (doc_id) LATERAL VIEW inline(array({subsets})) AS subset, labels
            WHERE size(labels) > 0
        ), by_list AS (
            SELECT subset, doc_group, list, array_contains(labels, list) AS of_class, size(labels) AS weight,
                coalesce(hits[list], 0) / size_of[list] AS covered
            FROM standing CROSS JOIN sizes LATERAL VIEW explode({names}) AS list
        )
        SELECT subset, doc_group, list, coalesce(sum(covered) FILTER (WHERE of_class), 0D) AS own,
            count_if(of_class) AS own_count, coalesce(sum(covered * weight) FILTER (WHERE NOT of_class), 0D) AS cross,
            coalesce(sum(weight) FILTER (WHERE NOT of_class), 0) AS cross_count
        FROM by_list GROUP BY subset, doc_group, list
        UNION ALL
        SELECT subset, doc_group, NULL, sum(aggregate(labels, 0, (n, x) -> n + coalesce(CAST(hits[x] AS INT), 0))
                / aggregate(labels, 0, (n, x) -> n + CAST(size_of[x] AS INT))), count(*), 0D, 0
        FROM standing CROSS JOIN sizes GROUP BY subset, doc_group"""


def _measure_coverage(lists: Mapping[str, Sequence[str]], found: Mapping[str, _Sums]) -> list[QualityFigure]:
    labels, figures = sorted(lists), []
    for subset, sums in sorted(found.items()):
        kept = [_compute_coverage(sums, np.arange(JACKKNIFE_GROUPS) != group) for group in range(JACKKNIFE_GROUPS)]
        whole, counts = _compute_coverage(sums, np.ones(JACKKNIFE_GROUPS, dtype=bool)), sums.own_count.sum(0)
        for metric, values in whole.items():
            spread = _jackknife(np.array([each[metric] for each in kept]))
            for number, label in enumerate([*labels, None] if len(values) > 1 else [None]):
                if np.isnan(values[number]):
                    continue
                of_class = label is not None and metric != "cross_coverage"
                documents = counts[number] if of_class else sums.micro_count.sum()
                value, width = float(values[number]), float(spread[number])
                low, high = (value - width, value + width) if math.isfinite(width) else (None, None)
                figures.append(QualityFigure(metric, subset, label, value, low, high, int(documents)))
    return figures


def _compute_coverage(sums: _Sums, groups: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Return each metric by class, and last over classes; NaN for a class without documents."""

    def divide(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(one, other, out=np.full_like(one, np.nan), where=other > 0)

    def with_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        known = values[~np.isnan(values)]
        return np.append(values, known.mean() if len(known) else np.nan)

    coverage = with_mean(divide(sums.own[groups].sum(0), sums.own_count[groups].sum(0)))
    crossed = with_mean(divide(sums.cross[groups].sum(0), sums.cross_count[groups].sum(0)))
    micro = divide(np.array([sums.micro[groups].sum()]), np.array([sums.micro_count[groups].sum()]))
    return {
        "coverage": coverage, "cross_coverage": crossed, "coverage_distinctiveness": divide(coverage - crossed, coverage),
        "coverage_micro": micro,
    }  # fmt: skip


def _jackknife(left_out: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the half width of the 95 % interval, of values (groups, N) each computed without one group."""
    groups = len(left_out)
    return np.asarray(T_QUANTILE * np.sqrt((groups - 1) / groups * ((left_out - left_out.mean(0)) ** 2).sum(0)))


# --- halves -----------------------------------------------------------------------------------------------------


def _measure_halves(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], keyword_key: str
) -> list[QualityFigure]:
    """Return how much the lists of two halves agree, over five random halvings of the documents, and of the splits."""
    figures = []
    for metric, column, count in (
        ("halves_of_documents", "doc_group", JACKKNIFE_GROUPS),
        ("halves_of_splits", "split", len(explain_keys)),
    ):
        if count < 2:
            continue
        sides = _draw_halvings(count)
        rows = tables.spark.sql(
            select_half_lists(tables, plan, corpus, explain_keys, keyword_key, column, sides)
        ).collect()
        figures += _compare_halves(metric, rows, len(sides))
    return figures


def _draw_halvings(count: int) -> list[list[int]]:
    """Return up to five different ways to put so many things on two sides, 0 and 1, as evenly as can be."""
    draw = np.random.default_rng(count)
    found: list[list[int]] = []
    for _ in range(20 * _HALVINGS):
        sides = draw.permutation(np.arange(count) % 2).tolist()
        sides = sides if sides[0] == 0 else [1 - side for side in sides]  # its mirror image is the same halving
        if sides not in found:
            found.append(sides)
    return found[:_HALVINGS]


def select_half_lists(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], keyword_key: str, column: str,
    halvings: Sequence[Sequence[int]],
) -> str:  # fmt: skip
    """Return the lists of the halves (halving, side, label, word, rank) to rank 100.

    Args:
        tables: Reads `word_sums` and `keywords`.
        plan: Names the evidence and the rules.
        corpus: The documents that were explained.
        explain_keys: One a split, in their order.
        keyword_key: Names the keyword table.
        column: `doc_group` or `split`: what is halved.
        halvings: For each halving the side, 0 or 1, of each group or split.

    Rules that need documents, and the most classes that may share a word, are those of the whole table.
    """
    theta = Decimal(str(plan.keywords.theta))
    splits = len(explain_keys)
    needed = [
        [math.ceil(theta * (sides.count(side) if column == "split" else splits)) for side in (0, 1)]
        for sides in map(list, halvings)
    ]
    listed = "array(" + ", ".join(f"array({', '.join(map(str, sides))})" for sides in halvings) + ")"
    least = "array(" + ", ".join(f"array({one}, {other})" for one, other in needed) + ")"
    return f"""
        WITH halved AS (
            SELECT *, sides[{column}] AS side FROM {select_sums(tables, plan, corpus, explain_keys, WORDS)}
            LATERAL VIEW posexplode({listed}) AS halving, sides
        ), means AS (
            SELECT halving, side, label, word, CAST(sum(score_sum) AS DOUBLE) / sum(n_occurrences) AS score_mean
            FROM halved GROUP BY halving, side, label, word
            HAVING count(DISTINCT split) >= {least}[halving][side]
        ), allowed AS (
            SELECT label, word FROM {tables.name("keywords")} WHERE keyword_key = {quote_text(keyword_key)}
            AND word RLIKE {quote_text(LETTER)} AND coalesce(drop_reason, '') NOT IN ('document_frequency', 'max_classes')
        )
        SELECT * FROM (
            SELECT halving, side, label, word,
                row_number() OVER (PARTITION BY halving, side, label ORDER BY score_mean DESC, word) AS rank
            FROM means JOIN allowed USING (label, word)) WHERE rank <= {DEPTH}"""


def _compare_halves(metric: str, rows: Sequence[Row], halvings: int) -> list[QualityFigure]:
    lists: dict[tuple[int, int, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        lists.setdefault((row["halving"], row["side"], row["label"]), []).append(row["word"])
    labels = sorted({label for _, _, label in lists})
    figures = []
    for name, compare in ((metric, rank_biased_overlap), (f"{metric}_jaccard", jaccard)):
        found = np.array([
            [compare(lists.get((halving, 0, label), []), lists.get((halving, 1, label), [])) for label in labels]
            for halving in range(halvings)
        ])  # fmt: skip
        for label, values in [*zip(labels, found.T, strict=True), *([(None, found.mean(1))] if labels else [])]:
            figures.append(
                QualityFigure(name, None, label, float(values.mean()), float(values.min()), float(values.max()))
            )
    return figures


# --- TF-IDF -----------------------------------------------------------------------------------------------------


def _select_tfidf(tables: Tables, corpus: Staged) -> str:
    """Return the words (label, word) of each gold class with the highest mean TF-IDF, best first.

    A word counts once a document. Source: the published lists' rules (document frequency of 10 at least, at most half of
    the largest class's share, a letter), with smoothed inverse document frequencies and vectors of norm 1.
    """
    return f"""
        WITH documents AS (
            SELECT doc_id, labels, words FROM {tables.name("staged")} WHERE {corpus.where} AND size(labels) > 0 AND size(words) > 0
        ), classes AS (
            SELECT label, count(*) AS n FROM (SELECT explode(labels) AS label FROM documents) GROUP BY label
        ), occurrences AS (SELECT doc_id, labels, explode(words) AS word FROM documents
        ), weights AS (
            SELECT word, ln((1 + (SELECT count(*) FROM documents)) / (1 + count(*))) + 1 AS idf
            FROM occurrences GROUP BY word
            HAVING count(*) >= {_TFIDF_MIN_DF} AND word RLIKE {quote_text(LETTER)}
                AND count(*) <= {_TFIDF_MAX_SHARE}D * (SELECT max(n) FROM classes)
        ), weighed AS (
            SELECT explode(labels) AS label, word, idf / sqrt(sum(idf * idf) OVER (PARTITION BY doc_id)) AS weight
            FROM occurrences JOIN weights USING (word)
        ), scores AS (
            SELECT label, word, sum(weight) / first(n) AS score FROM weighed JOIN classes USING (label) GROUP BY label, word
        )
        SELECT label, word FROM (
            SELECT *, row_number() OVER (PARTITION BY label ORDER BY score DESC, word) AS rank FROM scores)
        WHERE rank <= {DEPTH} ORDER BY label, rank"""
