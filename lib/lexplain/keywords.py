"""Explanations to keywords: sums a chunk, statistics over splits, rules that keep or drop.

Words and the phrases that a mask's spans are go the same way, each with tables of their own (`Unit`).

Everything is Spark SQL over the tables; no row passes through Python and none comes to the driver, except
the heads of lists that are compared. Word scores are added up as DECIMAL, and what is computed from them runs over
sorted arrays: a result is the same to the last digit whatever the order of rows, partitions and increments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from lexplain.evidence import NORMALISED_SCORE, PHRASES_BY_SCORE, is_evidence, select_best_words, strip_word
from lexplain.keys import evidence_key
from lexplain.schema import SCORE, SCORE_SUM
from lexplain.tables import quote_identifier, quote_list, quote_text

if TYPE_CHECKING:
    from pyspark.sql import Row

    from lexplain.corpus import Staged
    from lexplain.plan import Plan
    from lexplain.tables import Tables


@dataclass(frozen=True)
class Unit:
    """What is counted and ranked. In queries it is called `word` whatever it is.

    Attributes:
        column: Its name in the tables.
        sums: Table of its sums a chunk.
        statistics: Table of its sums a split.
        keywords: Table of what is kept and dropped.
        ranked: SQL over `explanations`: the array of an explanation's (word, start, end, score), by falling score.
    """

    column: str
    sums: str
    statistics: str
    keywords: str
    ranked: str


WORDS = Unit("word", "word_sums", "word_statistics", "keywords", "words")
PHRASES = Unit("phrase", "phrase_sums", "phrase_statistics", "keyphrases", PHRASES_BY_SCORE)

JACKKNIFE_GROUPS = 20

T_QUANTILE = 2.093
"""97.5 % quantile of Student's t with JACKKNIFE_GROUPS - 1 degrees of freedom."""

# Documents whose best words one task adds up. The sums of so many, a million or so, fit into a task's memory.
_TASK_DOCUMENTS = 50_000

# Below three splits a standard deviation between them says next to nothing.
_MIN_SPLITS = 3

# The last 8 of the digest's hexadecimal digits; the first ones already decide about splits and buckets.
DOC_GROUP = f"CAST(conv(right(text_digest, 8), 16, 10) AS BIGINT) % {JACKKNIFE_GROUPS}"

# scikit-learn's default `\b\w\w+\b`, a maximal run of two or more word characters.
_VECTORIZER_WORD = r"[\p{L}\p{N}_]{2,}"

LETTER = r"\p{L}"

# One digit less than the sums have: a difference of DECIMAL(38,18) would lose its last decimal place.
_DIFFERENCE = "DECIMAL(37,18)"


def sum_words(tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], unit: Unit = WORDS) -> int:
    """Add up the words of finished chunks that have no sums for the plan's evidence yet, in one commit.

    A chunk is finished when the rows of its documents are all there. With its sums it gets rows without a
    word: one a label and document group, which counts the evidence documents, and one without a label,
    which counts all documents, and as its occurrences the explained rows, and marks the chunk as added up.

    Args:
        tables: Reads `chunks` and `explanations`, adds to the unit's sums.
        plan: Names the evidence.
        corpus: The staged corpus; increments beyond it are left alone.
        explain_keys: Models whose chunks are added up.
        unit: Words, or phrases.

    Returns:
        Number of chunks added, 0 or more. Chunks that are not finished are left for the next call.

    Note:
        Evidence is an explained row above `keywords.probability` (strictly) whose label is gold, or any with
        evidence `predicted`. Of its words with a score >= 0, divided by the L2 norm over tokens (a norm of 0
        counts as a score of 0), the `top_n` best occurrences count. With word_rule `sacx-2022`, words lose
        everything but letters, numbers, `_` and white space first; words left empty and scores above 1 do
        not take up one of the `top_n` places, numbers do.
        Runs on: Spark, in one pass over the explanations of unsummed chunks; of each its best words are shuffled, once.
        Source: Rönnqvist et al. 2022 and its code, from the top-N cut on.
    """
    # Both queries below must see the same chunks, or a marker could be written without its sums.
    versions = tables.versions((unit.sums, "chunks", "explanations"))
    finished = _select_finished_chunks(tables, plan, corpus, explain_keys, versions, unit)
    chunks = tables.spark.sql(
        "SELECT explain_key, increment, sort_array(collect_list(bucket)) AS buckets, sum(n_documents) AS n_documents"
        f" FROM ({finished}) GROUP BY explain_key, increment"
    ).collect()
    if not chunks:
        return 0
    tasks = math.ceil(sum(row["n_documents"] for row in chunks) / _TASK_DOCUMENTS)
    # As a condition on columns: files without any of these chunks are not opened, and nothing is shuffled to join.
    place = f"corpus_key = {quote_text(corpus.key)} AND ({_where_chunks(chunks)})"
    query = _select_word_sums(tables, plan, corpus, place, finished, versions, tasks, unit)
    sums = tables.spark.sql(query).withColumnRenamed("word", unit.column)
    # In the place of sums that another job has written since: they are of the same chunks, so the same.
    tables.replace(sums, unit.sums, where=f"evidence_key = {quote_text(evidence_key(plan))} AND {place}")
    return sum(len(row["buckets"]) for row in chunks)


def rank_keywords(
    tables: Tables,
    plan: Plan,
    corpus: Staged,
    explain_keys: Sequence[str],
    *,
    keyword_key: str,
    labelled: Staged | None,
    test_share_ratio: float | None,
    signed: bool,
    unit: Unit = WORDS,
) -> None:
    """Write the statistics and keywords of one keyword table, each in one commit; nothing if they exist, or are none.

    Args:
        tables: Reads the unit's sums and `staged` or `explanations`, writes its statistics and keywords.
        plan: Names the evidence and the rules.
        corpus: The staged corpus.
        explain_keys: One a split, in their order.
        keyword_key: Names the keyword table.
        labelled: The staged documents whose labels count for document frequencies; None: a document of the
            corpus counts for each label that a model predicts above `keywords.probability`.
        test_share_ratio: Test documents / training documents of a split; None leaves `score_error` null.
        signed: Scores tell evidence for a class from evidence against it; every row is marked so.
        unit: Words, or phrases. Phrases come from models alone, whatever the labels: the documents of a class are its
            evidence documents, and those that hold a phrase have it among all of their spans.

    Note:
        A word is kept if it breaks none of these rules; `drop_reason` is the first that it breaks.
        `selection_frequency`: at least theta of all splits selected it (theta taken as the decimal number that
        was written, so 0.6 of 5 splits is exactly 3). `document_frequency`: more than min_df documents of the
        class hold it. `no_letter`: it has a letter. `max_classes`: at most so many classes keep it so far.
        `beyond_top`: its rank by mean, ties by the word's bytes, is at most `top`.

        `document_frequency` and `distinctiveness` are counted for words that enough splits selected for any
        class, and null for all others. `score_std` and `score_error` need 3 splits with the word; R in the
        correction 1/R + test_share_ratio is the number of those splits. The interval is a delete-a-group
        jackknife; it is null where all occurrences are in one group of documents.

        Runs on: Spark. Cost: one pass over the sums, and one over the documents for their frequencies.
        Source: rules, Rönnqvist et al. 2022; correction, Nadeau & Bengio 2003; jackknife,
        Kott 2001; distinctiveness, the code of Rönnqvist et al. 2022.
    """
    ours = f"keyword_key = {quote_text(keyword_key)}"
    written = f"{tables.name(unit.keywords)} WHERE {ours}"
    # rows of an older lexplain are not marked as signed or not: they are made again
    if not _is_empty(tables, f"{written} AND signed IS NOT NULL"):
        return
    statistics = tables.spark.sql(_select_statistics(tables, plan, corpus, explain_keys, keyword_key, unit))
    # A table without a keyword would be made at every run, by commits that change nothing.
    sums = select_sums(tables, plan, corpus, explain_keys, unit)
    if all(_is_empty(tables, rows) for rows in (sums, _from_statistics(tables, keyword_key, unit), written)):
        return
    tables.replace(statistics.withColumnRenamed("word", unit.column), unit.statistics, where=ours)
    # An exact threshold: 0.55 * 100 is 55.00000000000001 in floating point.
    n_splits = len(set(explain_keys))
    min_splits = math.ceil(Decimal(str(plan.keywords.theta)) * n_splits)
    # Spark knows the size of what is cached: where the list is small it goes to the documents, whose words are then not
    # shuffled to be compared with it.
    candidates = tables.spark.sql(_select_candidates(tables, keyword_key, min_splits, unit)).persist()
    view = f"candidates {unit.column} {keyword_key}"
    candidates.createOrReplaceTempView(quote_identifier(view))
    try:
        candidates.count()
        classes, words = _select_documents(tables, plan, corpus, explain_keys, labelled, unit)
        query = f"""
            WITH measures AS ({_select_measures(tables, plan, corpus, explain_keys, keyword_key, test_share_ratio, unit)}),
            candidates AS (SELECT word FROM {quote_identifier(view)}),
            classes AS ({_select_classes(classes, plan)}),
            frequencies AS ({_select_frequencies(words, plan)})
            {_select_keywords(plan, keyword_key, n_splits, min_splits, signed)}"""
        tables.replace(tables.spark.sql(query).withColumnRenamed("word", unit.column), unit.keywords, where=ours)
    finally:
        tables.spark.catalog.dropTempView(view)
        candidates.unpersist()


def read_lists(tables: Tables, keyword_key: str, depth: int) -> dict[str, list[str]]:
    """Return the kept words of a keyword table to that rank, best first, by label."""
    rows = tables.read("keywords").where(f"keyword_key = {quote_text(keyword_key)} AND kept AND rank <= {depth:d}")
    return group_words(rows.select("label", "word").orderBy("label", "rank").collect())


def group_words(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Return the words of rows (label, word) by label, in their order."""
    lists: dict[str, list[str]] = {}
    for row in rows:
        lists.setdefault(row["label"], []).append(row["word"])
    return lists


# --- word sums ------------------------------------------------------------------------------------------------


def _where_chunks(chunks: Sequence[Row]) -> str:
    """Return the condition that selects chunks given as rows (explain_key, increment, sorted buckets)."""
    same: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for row in chunks:
        same.setdefault((row["increment"], tuple(row["buckets"])), []).append(row["explain_key"])
    conditions = []
    for (increment, buckets), keys in sorted(same.items()):
        # Runs of buckets, since most often all of an increment's are summed at once.
        known = set(buckets)
        starts = [bucket for bucket in buckets if bucket - 1 not in known]
        ends = [bucket for bucket in buckets if bucket + 1 not in known]
        runs = " OR ".join(f"bucket BETWEEN {a} AND {b}" for a, b in zip(starts, ends, strict=True))
        conditions.append(f"increment = {increment} AND explain_key IN ({quote_list(sorted(keys))}) AND ({runs})")
    return " OR ".join(f"({condition})" for condition in conditions)


def _select_finished_chunks(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], versions: dict[str, int], unit: Unit
) -> str:
    """Return the chunks (explain_key, increment, bucket, split, n_documents, n_explained) that are complete but not summed.

    A chunk whose rows have changed since, as a document was explained after all or forgotten, is not summed either: its
    marker tells of other numbers.
    """
    scope = corpus.where_explained(explain_keys)
    sums, chunks, explanations = (
        f"{tables.name(name)} VERSION AS OF {versions[name]:d}" for name in (unit.sums, "chunks", "explanations")
    )
    return f"""
        SELECT explain_key, increment, bucket, split, n_documents, n_explained
        FROM (
            SELECT explain_key, increment, bucket, split, n_documents, coalesce(n_explained, 0) AS n_explained
            FROM (SELECT * FROM {chunks} WHERE {scope})
            LEFT JOIN (
                SELECT explain_key, increment, bucket, count_if(label_rank = 0) AS n_present,
                    count_if(status = 'explained') AS n_explained
                FROM {explanations} WHERE {scope} GROUP BY explain_key, increment, bucket
            ) USING (explain_key, increment, bucket)
            WHERE coalesce(n_present, 0) = n_documents
        ) LEFT ANTI JOIN (
            SELECT explain_key, increment, bucket, n_documents, n_occurrences AS n_explained FROM {sums}
            WHERE evidence_key = {quote_text(evidence_key(plan))} AND {scope} AND label IS NULL
        ) USING (explain_key, increment, bucket, n_documents, n_explained)"""


def describe_evidence(plan: Plan) -> dict[str, object]:
    """Return the plan's evidence policy by name, as `runs` keeps it."""
    rules = plan.keywords
    return {
        "policy": plan.evidence,
        "probability": rules.probability,
        "top_n": rules.top_n,
        "word_rule": rules.word_rule,
    }


def where_evidence(plan: Plan) -> str:
    """Return the condition on explained rows of `explanations` that count as evidence."""
    return is_evidence(_policy_literal(plan))


def _policy_literal(plan: Plan) -> str:
    rules = plan.keywords
    return (
        f"named_struct('policy', {quote_text(plan.evidence)}, 'probability', {rules.probability!r}D,"
        f" 'top_n', {rules.top_n:d}, 'word_rule', {quote_text(rules.word_rule)})"
    )


def _select_word_sums(
    tables: Tables,
    plan: Plan,
    corpus: Staged,
    place: str,
    finished: str,
    versions: dict[str, int],
    tasks: int,
    unit: Unit,
) -> str:
    """Return the rows of the sums for the chunks that the condition `place` selects, those without a word included.

    `finished` is the same chunks as a query, with the numbers that mark them.
    """
    keys = f"{quote_text(evidence_key(plan))} AS evidence_key, {quote_text(corpus.key)} AS corpus_key"
    policy = _policy_literal(plan)
    chunk = "explain_key, increment, bucket"
    # What is added up meets in one task first, words still in arrays: partial sums, most of them of one document's
    # word, would take many times the room. By chunk and group, no stop word makes a task longer than others.
    # Position 0 holds no word: it counts the row itself as an evidence document. NaN is the largest double in
    # Spark; without the upper bound it would pass for a score >= 0.
    return f"""
        WITH evidence AS (
            SELECT /*+ REPARTITION({max(1, tasks):d}, {chunk}, doc_group) */
                {chunk}, split, label, doc_group, token_norm, best.word AS best_words, best.score AS best_scores
            FROM (
                SELECT {chunk}, split, label, CAST({DOC_GROUP} AS INT) AS doc_group, token_norm,
                    {select_best_words(policy, unit.ranked)} AS best
                FROM {tables.name("explanations")} VERSION AS OF {versions["explanations"]:d}
                WHERE {place} AND {is_evidence(policy)}
            )
        ), occurrences AS (
            SELECT {chunk}, split, label, doc_group, word, {NORMALISED_SCORE.format("found_score")} AS score,
                position = 0 OR array_position(best_words, word) = position AS is_first
            FROM (
                SELECT *, if(position = 0, 0D, get(best_scores, position - 1)) AS found_score
                FROM evidence LATERAL VIEW posexplode(concat(array(CAST(NULL AS STRING)), best_words)) AS position, word
            ) WHERE found_score >= 0 AND found_score < double('Infinity')
        )
        SELECT {keys}, {chunk}, split, label, word, doc_group,
            count_if(is_first) AS n_documents, count(word) AS n_occurrences,
            CAST(sum(CAST(score AS {SCORE})) AS {SCORE_SUM}) AS score_sum,
            CAST(sum(CAST(score * score AS {SCORE})) AS {SCORE_SUM}) AS score_square_sum
        FROM occurrences GROUP BY {chunk}, split, label, doc_group, word
        UNION ALL
        SELECT {keys}, {chunk}, split, NULL, NULL, -1, n_documents, n_explained, 0, 0 FROM ({finished})"""


# --- statistics and rules -------------------------------------------------------------------------------------


def _is_empty(tables: Tables, rows: str) -> bool:
    """Tell whether there are no rows; `rows` is what follows FROM."""
    return tables.spark.sql(f"SELECT 1 FROM {rows} LIMIT 1").first() is None


def _only_labels(plan: Plan) -> str:
    return f"label IN ({quote_list(plan.keywords.labels)})" if plan.keywords.labels else "true"


def _read_as_words(tables: Tables, table: str, unit: Unit, where: str) -> str:
    """Return rows of one of the unit's tables, the unit called `word`, as something to select from."""
    return f"(SELECT * EXCEPT ({unit.column}), {unit.column} AS word FROM {tables.name(table)} WHERE {where})"


def select_sums(tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], unit: Unit) -> str:
    """Return the word sums of a plan's evidence, the unit called `word`, split by place of the model, to select from."""
    place = f"evidence_key = {quote_text(evidence_key(plan))} AND {corpus.where_explained(explain_keys)}"
    where = f"{place} AND {unit.column} IS NOT NULL AND {_only_labels(plan)}"
    # The sums' own split is a model's place among those of the plan that explained it first: two models of another plan
    # may have had the same one.
    split = f"CAST(array_position(array({quote_list(explain_keys)}), explain_key) - 1 AS INT) AS split"
    return f"(SELECT * EXCEPT (split), {split} FROM {_read_as_words(tables, unit.sums, unit, where)})"


def _from_statistics(tables: Tables, keyword_key: str, unit: Unit) -> str:
    return _read_as_words(tables, unit.statistics, unit, f"keyword_key = {quote_text(keyword_key)}")


def _select_statistics(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], keyword_key: str, unit: Unit
) -> str:
    return f"""
        SELECT {quote_text(keyword_key)} AS keyword_key, split, label, word, sum(n_documents) AS n_documents,
            sum(n_occurrences) AS n_occurrences, sum(score_sum) AS score_sum,
            sum(score_square_sum) AS score_square_sum,
            CAST(sum(score_sum) AS DOUBLE) / sum(n_occurrences) AS score_mean
        FROM {select_sums(tables, plan, corpus, explain_keys, unit)} GROUP BY split, label, word"""


def _sum(array: str, term: str) -> str:
    """Return the sum of `term`, an expression of x, over an array in its order."""
    return f"aggregate({array}, 0D, (total, x) -> total + {term})"


def _select_measures(
    tables: Tables,
    plan: Plan,
    corpus: Staged,
    explain_keys: Sequence[str],
    keyword_key: str,
    test_share_ratio: float | None,
    unit: Unit,
) -> str:
    """Return a row a class and word with the numbers that need no document but the evidence."""
    ratio = "CAST(NULL AS DOUBLE)" if test_share_ratio is None else f"{float(test_share_ratio)!r}D"
    return f"""
        WITH by_split AS (
            SELECT label, word, CAST(count(*) AS INT) AS n_selected, sum(n_documents) AS n_documents,
                sum(n_occurrences) AS n_occurrences, CAST(sum(score_sum) AS {_DIFFERENCE}) AS score_sum,
                CAST(sum(score_square_sum) AS DOUBLE) AS score_square_sum,
                sort_array(collect_list(struct(split, score_mean))).score_mean AS split_means
            FROM {_from_statistics(tables, keyword_key, unit)} GROUP BY label, word
        ), by_group AS (
            SELECT label, word, sort_array(collect_list(struct(doc_group, n, total))) AS doc_groups
            FROM (
                SELECT label, word, doc_group, sum(n_occurrences) AS n, CAST(sum(score_sum) AS {_DIFFERENCE}) AS total
                FROM {select_sums(tables, plan, corpus, explain_keys, unit)} GROUP BY label, word, doc_group
            ) GROUP BY label, word
        ), means AS (
            SELECT *, CAST(score_sum AS DOUBLE) / n_occurrences AS score_mean,
                {_sum("split_means", "x")} / n_selected AS mean_of_splits,
                -- null where nothing is left without a group, and with it all that follows
                transform(doc_groups, x -> try_divide(CAST(score_sum - x.total AS DOUBLE), n_occurrences - x.n)) AS left_out
            FROM by_split JOIN by_group USING (label, word)
        ), centres AS (
            SELECT *, {JACKKNIFE_GROUPS} - size(left_out) AS n_without,
                CASE WHEN n_selected >= {_MIN_SPLITS} THEN
                    {_sum("split_means", "power(x - mean_of_splits, 2)")} / (n_selected - 1) END AS split_variance,
                ({_sum("left_out", "x")} + ({JACKKNIFE_GROUPS} - size(left_out)) * score_mean) / {JACKKNIFE_GROUPS} AS centre
            FROM means
        )
        SELECT label, word, n_selected, n_documents, n_occurrences, score_mean,
            sqrt(greatest(score_square_sum / n_occurrences - score_mean * score_mean, 0D)) AS score_deviation,
            sqrt(split_variance) AS score_std, sqrt((1D / n_selected + {ratio}) * split_variance) AS score_error,
            {T_QUANTILE}D * sqrt({JACKKNIFE_GROUPS - 1}D / {JACKKNIFE_GROUPS}
                * ({_sum("left_out", "power(x - centre, 2)")} + n_without * power(score_mean - centre, 2))) AS half_width
        FROM centres"""


def _select_candidates(tables: Tables, keyword_key: str, min_splits: int, unit: Unit) -> str:
    """Return the words whose documents are counted: those that enough splits selected for any class."""
    return f"""
        SELECT DISTINCT word FROM (
            SELECT label, word FROM {_from_statistics(tables, keyword_key, unit)}
            GROUP BY label, word HAVING count(*) >= {min_splits:d})"""


def _select_documents(
    tables: Tables, plan: Plan, corpus: Staged, explain_keys: Sequence[str], labelled: Staged | None, unit: Unit
) -> tuple[str, str]:
    """Return two queries: of a class once for each of its documents, and of (class, candidate) once for each that holds it."""
    published = plan.keywords.word_rule == "sacx-2022"
    if labelled is None or unit is PHRASES:
        words = f"({unit.ranked}).word"
        if published:
            words = f"transform({words}, word -> {strip_word('word')})"
        counts = f"status = 'explained' AND probability > {plan.keywords.probability!r}D"
        if unit is PHRASES:
            counts = where_evidence(plan)
        explained = f"FROM {tables.name('explanations')} WHERE {corpus.where_explained(explain_keys)} AND {counts}"
        # A document has a row for each split, and the splits' models may have read different parts of it. Their rows
        # are in one file: most of what is there twice is gone before it is shuffled.
        return (
            f"SELECT DISTINCT doc_id, label {explained}",
            f"""
            SELECT DISTINCT doc_id, label, word
            FROM (SELECT doc_id, label, explode({words}) AS word {explained}) LEFT SEMI JOIN candidates USING (word)""",
        )
    known, words = "words", "array_distinct(words)"
    if published:
        known = "try_validate_utf8(CAST(text AS STRING))"
        words = f"array_distinct(regexp_extract_all(lower({known}), {quote_text(_VECTORIZER_WORD)}, 0))"
    documents = f"FROM {tables.name('staged')} WHERE {labelled.where} AND {known} IS NOT NULL"
    return (
        f"SELECT explode(array_distinct(labels)) AS label {documents}",
        f"""
        SELECT label, word FROM (
            SELECT array_distinct(labels) AS labels, explode({words}) AS word {documents}
        ) LEFT SEMI JOIN candidates USING (word) LATERAL VIEW explode(labels) AS label""",
    )


def _select_classes(classes: str, plan: Plan) -> str:
    """Return (label, n_documents)."""
    return f"SELECT label, count(*) AS n_documents FROM ({classes}) WHERE {_only_labels(plan)} GROUP BY label"


def _select_frequencies(words: str, plan: Plan) -> str:
    """Return (word, counts): for each candidate the classes that hold it (label, n, share), by label."""
    return f"""
        WITH counted AS (
            SELECT label, word, count(*) AS n FROM ({words}) WHERE {_only_labels(plan)} GROUP BY label, word
        ), shares AS (
            SELECT word, struct(label, n, n / n_documents AS share) AS class FROM counted JOIN classes USING (label)
        )
        SELECT word, sort_array(collect_list(class)) AS counts FROM candidates LEFT JOIN shares USING (word)
        GROUP BY word"""


def _select_keywords(plan: Plan, keyword_key: str, n_splits: int, min_splits: int, signed: bool) -> str:
    """Return the rows of `keywords` from measures, frequencies and classes: every word judged by the rules."""
    rules = plan.keywords
    max_classes = "false" if rules.max_classes is None else f"n_classes > {rules.max_classes:d}"
    beyond_top = "false" if rules.top is None else f"position > {rules.top:d}"
    others = _sum("filter(counts, x -> x.label <> label)", "x.share")
    return f"""
        , described AS (
            SELECT *, get(filter(counts, x -> x.label = label), 0) AS class,
                {others} / nullif((SELECT count(*) FROM classes) - 1, 0) AS share_of_others
            FROM measures LEFT JOIN frequencies USING (word)
        ), judged AS (
            SELECT *, CASE WHEN counts IS NOT NULL THEN coalesce(class.n, 0) END AS document_frequency,
                (class.share - share_of_others) / class.share AS distinctiveness,
                CASE WHEN n_selected < {min_splits:d} THEN 'selection_frequency'
                    WHEN coalesce(class.n, 0) <= {rules.min_df:d} THEN 'document_frequency'
                    WHEN NOT word RLIKE {quote_text(LETTER)} THEN 'no_letter' END AS broken
            FROM described
        ), spread AS (
            SELECT *, CASE WHEN broken IS NULL AND {max_classes} THEN 'max_classes' ELSE broken END AS broken_rule
            FROM (SELECT *, count_if(broken IS NULL) OVER (PARTITION BY word) AS n_classes FROM judged)
        ), ranked AS (
            -- what is dropped already has no place, and most words are: each stands alone, in whichever task
            SELECT *, row_number() OVER (PARTITION BY label, if(broken_rule IS NULL, NULL, word) ORDER BY score_mean DESC, word)
                AS position
            FROM spread
        ), decided AS (
            SELECT *, CASE WHEN broken_rule IS NULL AND {beyond_top} THEN 'beyond_top' ELSE broken_rule END AS drop_reason
            FROM ranked
        )
        SELECT {quote_text(keyword_key)} AS keyword_key, label, word,
            CASE WHEN drop_reason IS NULL THEN position END AS rank, score_mean, score_deviation, score_std, score_error,
            score_mean - half_width AS ci_low, score_mean + half_width AS ci_high,
            CAST(n_selected AS DOUBLE) / {n_splits:d} AS selection_frequency, {n_splits:d} AS n_splits,
            n_documents, n_occurrences, document_frequency, distinctiveness, drop_reason IS NULL AS kept, drop_reason,
            {str(signed).lower()} AS signed
        FROM decided"""
