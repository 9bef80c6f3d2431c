"""What people query: views over the tables, by plan name. Plain text, no Spark."""

from __future__ import annotations

from lexplain.evidence import NORMALISED_SCORE, is_evidence, select_best_words


def _select_latest(table: str, key: str = "evaluation_key") -> str:
    return (
        "SELECT * EXCEPT (recency) FROM (SELECT *, dense_rank() OVER (PARTITION BY name ORDER BY measured_at DESC, "
        f"{key})"
        f" AS recency FROM {{{table}}}) WHERE recency = 1"
    )


EVIDENCE_SQL = {
    "is_evidence": is_evidence("evidence"),
    "best_words": select_best_words("evidence"),
    "score_normalised": NORMALISED_SCORE.format("e.score"),
}
# {name} stands for a table's own, quoted name, or for an entry of EVIDENCE_SQL.
VIEWS: dict[str, tuple[str, str]] = {
    "runs_current": (
        "the latest finished run of each plan name",
        "SELECT * FROM (SELECT *, row_number() OVER (PARTITION BY name ORDER BY finished_at DESC, run_id) AS recency"
        " FROM {runs} WHERE keyword_key IS NOT NULL AND finished_at IS NOT NULL) WHERE recency = 1",
    ),
    "keywords_current": (
        "kept words of each plan name's latest run",
        "SELECT r.name, k.* EXCEPT (kept, drop_reason) FROM {keywords} k"
        " JOIN {runs_current} r ON k.keyword_key = r.keyword_key WHERE k.kept",
    ),
    "keywords_dropped": (
        "dropped words of each plan name's latest run, and why",
        "SELECT r.name, k.* EXCEPT (kept, rank) FROM {keywords} k"
        " JOIN {runs_current} r ON k.keyword_key = r.keyword_key WHERE NOT k.kept",
    ),
    "keyphrases_current": (
        "kept phrases of each plan name's latest run; none where its method makes no masks",
        "SELECT r.name, k.* EXCEPT (kept, drop_reason) FROM {keyphrases} k"
        " JOIN {runs_current} r ON k.keyword_key = r.keyword_key WHERE k.kept",
    ),
    "keyphrases_dropped": (
        "dropped phrases of each plan name's latest run, and why",
        "SELECT r.name, k.* EXCEPT (kept, rank) FROM {keyphrases} k"
        " JOIN {runs_current} r ON k.keyword_key = r.keyword_key WHERE NOT k.kept",
    ),
    "faithfulness_current": (
        "figures of each plan name's latest evaluation",
        _select_latest("faithfulness"),
    ),
    "faithfulness_differences_current": (
        "pairs of methods of each plan name's latest evaluation",
        _select_latest("faithfulness_differences"),
    ),
    "keyword_quality_current": (
        "keyword lists of each plan name's latest evaluation",
        _select_latest("keyword_quality"),
    ),
    "sweeps_current": (
        "settings of each plan name's latest sweep",
        _select_latest("sweeps", "sweep_key"),
    ),
    "keyword_evidence": (
        "for each keyword the occurrences that its score is the mean of: documents and character spans",
        "SELECT e.name, e.label, e.word, e.split, e.doc_id, e.start, e.`end`, e.score,"
        " {score_normalised} AS score_normalised, e.probability, e.is_gold, e.text_digest, e.accuracy,"
        " k.signed"
        " FROM (SELECT * EXCEPT (words), inline({best_words}) AS (word, start, `end`, score)"
        " FROM {explanations} x"
        " JOIN (SELECT name, keyword_key, explain_keys, corpus_key AS run_corpus_key, evidence FROM {runs_current}) r"
        " ON array_contains(explain_keys, explain_key) AND corpus_key = run_corpus_key"
        " AND increment < evidence.increments WHERE {is_evidence}) e"
        " JOIN {keywords} k ON k.keyword_key = e.keyword_key AND k.label = e.label AND k.word = e.word AND k.kept"
        " WHERE e.score >= 0 AND e.score < double('Infinity')",
    ),
}
