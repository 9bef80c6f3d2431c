"""Two keyword tables side by side: two models, two crawls, two settings; class by class, and word by word. Driver only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lexplain.corpus import Staged
from lexplain.errors import TableError
from lexplain.keys import evidence_key
from lexplain.keywords import JACKKNIFE_GROUPS, read_lists
from lexplain.overlap import jaccard, rank_biased_overlap
from lexplain.plan import Plan
from lexplain.tables import quote_rows, quote_text

if TYPE_CHECKING:
    from lexplain.plan import FindMethod
    from lexplain.tables import Tables


class ListOverlap(NamedTuple):
    """How much two keyword lists of a class agree.

    Attributes:
        label: The class.
        rank_biased_overlap: 1 for equal lists, 0 for lists that share no word or of which one is empty.
        jaccard: Shared words over all words; the same at both ends.
        n_a: Words of the first list that were compared.
        n_b: Of the second.
    """

    label: str
    rank_biased_overlap: float
    jaccard: float
    n_a: int
    n_b: int


def compare_lists(
    tables: Tables, keyword_key_a: str, keyword_key_b: str, *, p: float = 0.9, depth: int = 50
) -> list[ListOverlap]:
    """Return how much two keyword tables agree, by label; labels with a keyword in either.

    Args:
        tables: Reads `keywords`.
        keyword_key_a: One keyword table.
        keyword_key_b: The other.
        p: Weight of the next rank relative to the one before, above 0 and below 1.
        depth: Keywords of each list that are compared, from rank 1.

    Raises:
        ValueError: `p` or `depth` is out of range.

    Note:
        Runs on: driver; the lists' heads come to it.
    """
    if not 0.0 < p < 1.0:
        raise ValueError(
            f"p={p!r} must be above 0 and below 1. The overlap would be that of the first rank alone, or of no "
            "rank at all. Write p=0.9, which gives the first 10 ranks 86 % of the weight."
        )
    if depth < 1:
        raise ValueError(
            f"depth={depth!r} must be >= 1. No keyword would be compared, and no class reported. Write depth=50."
        )
    a, b = (read_lists(tables, key, depth) for key in (keyword_key_a, keyword_key_b))
    return [
        ListOverlap(label, rank_biased_overlap(one, other, p), jaccard(one, other), len(one), len(other))
        for label in sorted(a.keys() | b.keys())
        for one, other in ((a.get(label, []), b.get(label, [])),)
    ]


class WordChange(NamedTuple):
    """A word of a class in two keyword tables.

    Attributes:
        label: The class.
        word: Kept in one of the tables, or in both.
        rank_a: Rank in the first; None where it is not kept.
        rank_b: Rank in the second.
        score_a: What an evidence document of the class has of the word, on average: its scores, 0 where it is not selected.
        score_b: The same in the second.
        change: The second less the first.
        p_value: Of a jackknife over groups of documents, two-sided; None where all evidence is in one group.
        q_value: The same for all words together (Benjamini and Hochberg 1995): of the words up to it, this share at most is
            expected to have changed by chance.
    """

    label: str
    word: str
    rank_a: int | None
    rank_b: int | None
    score_a: float
    score_b: float
    change: float
    p_value: float | None
    q_value: float | None


@dataclass(frozen=True)
class KeywordTable:
    """A keyword table with what it was made of.

    Attributes:
        keyword_key: Names it.
        plan: The run's.
        corpus: The documents it was made from.
        explain_keys: One a split.
    """

    keyword_key: str
    plan: Plan
    corpus: Staged
    explain_keys: tuple[str, ...]


def find_table(tables: Tables, name: str, find_method: FindMethod) -> KeywordTable:
    """Return the keyword table of a plan's latest run, or with a keyword_key that some run has.

    Raises:
        TableError: There is none.
    """
    rows = (
        tables.read("runs").where(f"keyword_key IS NOT NULL AND {quote_text(name)} IN (name, keyword_key)")
        .orderBy("finished_at", ascending=False).head(1)
    )  # fmt: skip
    if not rows:
        raise TableError(
            f"{name!r} names no run with a keyword table. Nothing could be compared. Write a plan's name, or the keyword_key "
            "of a run: SELECT name, keyword_key FROM runs."
        )
    row = rows[0]
    corpus = Staged(row["corpus_key"], row["evidence"]["increments"], 0)
    plan = Plan.parse(row["plan"], find_method, check_files=False)
    return KeywordTable(row["keyword_key"], plan, corpus, tuple(row["explain_keys"]))


def compare_words(tables: Tables, first: KeywordTable, second: KeywordTable) -> list[WordChange]:
    """Return the words that either table keeps, those that changed most surely first.

    The documents of one text are in one group in both tables, so what two runs over the same documents have in common falls
    out of the difference.

    Note:
        Runs on: Spark; of each kept word 20 sums a table come to the driver. Cost: one pass over the sums of each.
        Source: delete-a-group jackknife, Kott 2001, with 19 degrees of freedom.
    """
    from scipy.stats import false_discovery_control, t

    ranks_a, ranks_b = (_read_ranks(tables, table) for table in (first, second))
    kept = sorted({*ranks_a, *ranks_b})
    one, other = (_read_scores(tables, table, kept) for table in (first, second))
    found: list[WordChange] = []
    for pair in kept:
        score_a, without_a = one.average(pair)
        score_b, without_b = other.average(pair)
        change, p_value = score_b - score_a, None
        if np.count_nonzero(one.of(pair) + other.of(pair)) > 1:
            without = without_b - without_a
            spread = np.sqrt((JACKKNIFE_GROUPS - 1) / JACKKNIFE_GROUPS * np.square(without - without.mean()).sum())
            p_value = float(2 * t.sf(abs(change) / spread, JACKKNIFE_GROUPS - 1)) if spread else float(change == 0)
        found.append(WordChange(*pair, ranks_a.get(pair), ranks_b.get(pair), score_a, score_b, change, p_value, None))
    tested = [each for each in found if each.p_value is not None]
    q_values = false_discovery_control([each.p_value for each in tested]) if tested else []
    sure = [each._replace(q_value=float(q)) for each, q in zip(tested, q_values, strict=True)]
    sure.sort(key=lambda each: (each.p_value, -abs(each.change), each.label, each.word))
    return [*sure, *(each for each in found if each.p_value is None)]


@dataclass(frozen=True)
class _Scores:
    """Scores of the words of one table, and its evidence documents, by group of documents, (20,) each."""

    sums: dict[tuple[str, str], NDArray[np.float64]]
    documents: dict[str, NDArray[np.float64]]

    def of(self, pair: tuple[str, str]) -> NDArray[np.float64]:
        return self.sums.get(pair, np.zeros(JACKKNIFE_GROUPS))

    def average(self, pair: tuple[str, str]) -> tuple[float, NDArray[np.float64]]:
        """Return a word's mean over documents of its class, and those without each group; 0 over no documents."""
        sums, documents = self.of(pair), self.documents.get(pair[0], np.zeros(JACKKNIFE_GROUPS))
        left = documents.sum() - documents
        without = np.divide(sums.sum() - sums, left, out=np.zeros_like(sums), where=left > 0)
        return float(sums.sum() / documents.sum()) if documents.any() else 0.0, without


def _read_ranks(tables: Tables, table: KeywordTable) -> dict[tuple[str, str], int]:
    rows = tables.read("keywords").where(f"keyword_key = {quote_text(table.keyword_key)} AND kept")
    return {(row["label"], row["word"]): row["rank"] for row in rows.select("label", "word", "rank").collect()}


def _read_scores(tables: Tables, table: KeywordTable, kept: Sequence[tuple[str, str]]) -> _Scores:
    pairs = quote_rows(kept or [("", "")])
    rows = tables.spark.sql(f"""
        SELECT label, word, doc_group, CAST(sum(score_sum) AS DOUBLE) AS score, sum(n_documents) AS documents
        FROM {tables.name("word_sums")} s
        WHERE (word IS NULL OR EXISTS (SELECT 1 FROM VALUES {pairs} AS p(label, word) WHERE p.label = s.label AND p.word = s.word))
        AND evidence_key = {quote_text(evidence_key(table.plan))} AND {table.corpus.where_explained(table.explain_keys)}
        AND label IS NOT NULL GROUP BY label, word, doc_group""").collect()
    found = _Scores({}, {})
    for row in rows:
        if row["word"] is None:
            found.documents.setdefault(row["label"], np.zeros(JACKKNIFE_GROUPS))[row["doc_group"]] = row["documents"]
        else:
            pair = row["label"], row["word"]
            found.sums.setdefault(pair, np.zeros(JACKKNIFE_GROUPS))[row["doc_group"]] = row["score"]
    return found
