"""The keyword tables from DuckDB: the same rules over the same Parquet files, in the form that DuckDB is best at.

Only what the benchmark's plan asks for: words by the rule `unicode`, evidence `predicted`, labels from the models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexplain.keywords import JACKKNIFE_GROUPS, T_QUANTILE

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from lexplain.plan import Plan

# DuckDB rounds a product with a power of ten; Spark takes the decimal number that the double is written as. The text
# of a double is the same in both.
_SCORE = "CAST(CAST({} AS VARCHAR) AS DECIMAL(24,18))"


def connect(scratch: Path, *, threads: int, memory: str) -> DuckDBPyConnection:
    """Return a connection with the machine's share that Spark has, and a folder to spill to."""
    import duckdb

    scratch.mkdir(parents=True, exist_ok=True)
    settings = {
        "threads": threads,
        "memory_limit": memory,
        "temp_directory": str(scratch),
        "preserve_insertion_order": False,
    }
    return duckdb.connect(config=settings)


def select_sums(plan: Plan, explain_keys: Sequence[str]) -> str:
    """Return the rows of `word_sums` but the markers of chunks."""
    rules = plan.keywords
    keys = ", ".join(f"'{key}'" for key in explain_keys)
    return f"""
        WITH evidence AS (
            SELECT explain_key, increment, bucket, split, label, token_norm,
                CAST(CAST('0x' || right(text_digest, 8) AS BIGINT) % {JACKKNIFE_GROUPS} AS INT) AS doc_group,
                list_transform(words[1:{rules.top_n}], lambda w: w.word) AS best,
                list_transform(words[1:{rules.top_n}], lambda w: w.score) AS scores
            FROM explanations
            WHERE status = 'explained' AND probability > {rules.probability} AND explain_key IN ({keys})
        ), found AS (
            SELECT * EXCLUDE (scores, token_norm), unnest(best) AS word, unnest(scores) AS raw, token_norm,
                generate_subscripts(best, 1) AS position
            FROM evidence
        ), occurrences AS (
            SELECT * EXCLUDE (best, raw, position, token_norm), CASE WHEN token_norm = 0 THEN 0 ELSE raw / token_norm END AS score,
                list_position(best, word) = position AS is_first
            FROM found WHERE raw >= 0 AND raw < 'Infinity'::DOUBLE
        )
        SELECT explain_key, increment, bucket, split, label, word, doc_group, count(*) FILTER (is_first) AS n_documents,
            count(*) AS n_occurrences, sum({_SCORE.format("score")}) AS score_sum, sum({_SCORE.format("score * score")}) AS score_square_sum
        FROM occurrences GROUP BY ALL
        UNION ALL
        SELECT explain_key, increment, bucket, split, label, NULL, doc_group, count(*), 0, 0, 0 FROM evidence GROUP BY ALL"""


def select_keywords(plan: Plan, splits: int, min_splits: int) -> str:
    """Return the rows of `keywords`, from `sums` and `explanations`; no split has a test share."""
    rules = plan.keywords
    groups, quantile = JACKKNIFE_GROUPS, T_QUANTILE
    return f"""
        WITH statistics AS MATERIALIZED (
            SELECT split, label, word, sum(n_documents) AS n_documents, sum(n_occurrences) AS n_occurrences,
                sum(score_sum) AS score_sum, sum(score_square_sum) AS score_square_sum,
                CAST(sum(score_sum) AS DOUBLE) / sum(n_occurrences) AS score_mean
            FROM sums WHERE word IS NOT NULL GROUP BY split, label, word
        ), by_split AS MATERIALIZED (
            SELECT label, word, count(*) AS n_selected, sum(n_documents) AS n_documents, sum(n_occurrences) AS n_occurrences,
                sum(score_sum) AS score_sum, CAST(sum(score_square_sum) AS DOUBLE) AS score_square_sum,
                CASE WHEN count(*) >= 3 THEN var_samp(score_mean) END AS split_variance
            FROM statistics GROUP BY label, word
        ), by_group AS (
            SELECT label, word, doc_group, sum(n_occurrences) AS n, sum(score_sum) AS total
            FROM sums WHERE word IS NOT NULL GROUP BY label, word, doc_group
        ), left_out AS (
            SELECT label, word, count(*) AS size, avg(mean) AS centre, var_pop(mean) AS spread, bool_or(mean IS NULL) AS alone
            FROM (SELECT label, word, CAST(score_sum - total AS DOUBLE) / nullif(n_occurrences - n, 0) AS mean
                  FROM by_group JOIN by_split USING (label, word))
            GROUP BY label, word
        ), measures AS (
            SELECT by_split.*, CAST(score_sum AS DOUBLE) / n_occurrences AS score_mean, size, alone, spread, centre AS mean_left_out,
                (size * centre + ({groups} - size) * (CAST(score_sum AS DOUBLE) / n_occurrences)) / {groups} AS centre
            FROM by_split JOIN left_out USING (label, word)
        ), candidates AS MATERIALIZED (
            SELECT DISTINCT word FROM by_split WHERE n_selected >= {min_splits}
        ), documents AS (
            SELECT label, doc_id, list_transform(words, lambda w: w.word) AS words FROM explanations
            WHERE status = 'explained' AND probability > {rules.probability}
        ), classes AS (
            SELECT label, count(DISTINCT doc_id) AS size FROM documents GROUP BY label
        ), frequencies AS (
            SELECT label, word, count(*) AS n FROM (
                SELECT DISTINCT label, doc_id, word FROM (SELECT label, doc_id, unnest(words) AS word FROM documents)
                SEMI JOIN candidates USING (word)
            ) GROUP BY label, word
        ), shares AS (
            SELECT label, word, n, n / size AS share FROM frequencies JOIN classes USING (label)
        ), all_shares AS (
            SELECT word, sum(share) AS total FROM shares GROUP BY word
        ), judged AS (
            SELECT m.*, CASE WHEN c.word IS NOT NULL THEN coalesce(s.n, 0) END AS document_frequency,
                (s.share - (a.total - s.share) / ((SELECT count(*) FROM classes) - 1)) / s.share AS distinctiveness,
                CASE WHEN n_selected < {min_splits} THEN 'selection_frequency'
                    WHEN coalesce(s.n, 0) <= {rules.min_df} THEN 'document_frequency'
                    WHEN NOT regexp_matches(m.word, '\\p{{L}}') THEN 'no_letter' END AS broken
            FROM measures m LEFT JOIN candidates c ON c.word = m.word LEFT JOIN all_shares a ON a.word = m.word
                LEFT JOIN shares s ON s.label = m.label AND s.word = m.word
        ), spread_over AS (
            SELECT * EXCLUDE broken, CASE WHEN broken IS NULL AND n_classes > {rules.max_classes} THEN 'max_classes' ELSE broken END AS broken
            FROM judged LEFT JOIN (SELECT word, count(*) AS n_classes FROM judged WHERE broken IS NULL GROUP BY word) USING (word)
        ), ranked AS (
            SELECT *, CASE WHEN broken IS NULL
                THEN row_number() OVER (PARTITION BY label, broken IS NULL ORDER BY score_mean DESC, word) END AS position
            FROM spread_over
        )
        SELECT label, word, CASE WHEN position <= {rules.top} THEN position END AS rank, score_mean,
            sqrt(greatest(score_square_sum / n_occurrences - score_mean * score_mean, 0)) AS score_deviation,
            sqrt(split_variance) AS score_std,
            CASE WHEN NOT alone THEN {quantile} * sqrt({groups - 1} / {groups} * (
                size * (spread + (mean_left_out - centre) ** 2) + ({groups} - size) * (score_mean - centre) ** 2)) END AS half_width,
            n_selected / {splits} AS selection_frequency, n_documents, n_occurrences, document_frequency, distinctiveness,
            CASE WHEN broken IS NULL AND position > {rules.top} THEN 'beyond_top' ELSE broken END AS drop_reason
        FROM ranked"""


def run_rival(
    connection: DuckDBPyConnection,
    files: Sequence[str],
    out: Path,
    plan: Plan,
    explain_keys: Sequence[str],
    min_splits: int,
) -> dict[str, Any]:
    """Write sums and keywords as Parquet; return what each took, and the plans.

    Args:
        connection: As `connect` made it.
        files: Active files of `explanations`.
        out: Folder for `sums.parquet` and `keywords.parquet`.
        plan: The plan.
        explain_keys: One a split.
        min_splits: Splits that must select a word.
    """
    out.mkdir(parents=True, exist_ok=True)
    listed = ", ".join(f"'{name}'" for name in files)
    connection.execute(f"CREATE OR REPLACE VIEW explanations AS SELECT * FROM read_parquet([{listed}])")
    record: dict[str, Any] = {}
    for name, query in {
        "sums": select_sums(plan, explain_keys),
        "keywords": select_keywords(plan, len(explain_keys), min_splits),
    }.items():
        path = f"'{out / name}.parquet'"
        started = time.perf_counter()
        connection.execute(f"COPY ({query}) TO {path} (FORMAT parquet, COMPRESSION snappy)")
        record[f"{name}_seconds"] = time.perf_counter() - started
        record[f"{name}_plan"] = connection.execute(f"EXPLAIN {query}").fetchall()[0][1]
        connection.execute(f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM read_parquet({path})")
    return record
