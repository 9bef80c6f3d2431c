"""Which words, or phrases, of which explanations a keyword's score is made of, as SQL over `explanations`.

The word sums and the view that shows people the evidence use the same text, so that one is the other's account.
A policy is an SQL expression of a struct (policy, probability, top_n, word_rule): a literal or a column.
"""

from __future__ import annotations

# A document whose tokens all score 0 has a norm of 0.
NORMALISED_SCORE = "coalesce(try_divide({}, token_norm), 0D)"

# Python's `[\w\s]` for Java: there \w and \s know ASCII only, so "köpa" would become "kpa". Back-slashes as in SQL.
_WORD_OR_SPACE = r"\\p{L}\\p{N}_\\s\\x1c-\\x1f\\x85\\p{Z}"


# The spans of an explanation in the form and order of its words: by falling score, ties in the order of the text.
PHRASES_BY_SCORE = """array_sort(
    transform(coalesce(spans, array()), s -> named_struct('word', array_join(s.words, ' '), 'start', s.start,
        'end', s.`end`, 'score', s.score)),
    (a, b) -> CASE WHEN a.score > b.score THEN -1 WHEN a.score < b.score THEN 1 ELSE a.start - b.start END)"""


def is_evidence(policy: str) -> str:
    """Return the condition that an explanation counts: its label gold, or any with policy `predicted`."""
    probable = f"status = 'explained' AND probability > {policy}.probability"
    return f"{probable} AND ({policy}.policy = 'predicted' OR is_gold)"


def strip_word(word: str) -> str:
    """Return the published token rule: nothing is left but letters, numbers, `_` and white space."""
    return f"regexp_replace({word}, '[^{_WORD_OR_SPACE}]', '')"


def select_best_words(policy: str, ranked: str = "words") -> str:
    """Return the array of the words (word, start, end, score) among the top N, best first, scores as stored.

    `ranked` is the array that they are cut from: the explanation's words, or `PHRASES_BY_SCORE`. Words with scores below 0 or not finite are still in it; leave them out after the cut.
    """
    # They come by descending score: the cut is a slice.
    counts = f"{NORMALISED_SCORE.format('w.score')} BETWEEN 0 AND 1 AND w.word RLIKE '[{_WORD_OR_SPACE}]'"
    stripped = f"named_struct('word', {strip_word('w.word')}, 'start', w.start, 'end', w.`end`, 'score', w.score)"
    return f"""CASE WHEN {policy}.word_rule = 'unicode' THEN slice({ranked}, 1, {policy}.top_n)
        ELSE transform(slice(filter({ranked}, w -> {counts}), 1, {policy}.top_n), w -> {stripped}) END"""
