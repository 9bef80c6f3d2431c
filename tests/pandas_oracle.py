"""Keyword statistics a second time: pandas, numpy and scikit-learn, in memory, from the definitions.

The published procedure (Rönnqvist et al. 2022, from the top-N cut on) and lexplain's own default with its
statistics. Slow and literal on purpose: it shares no line, no query and no formula with lexplain.keywords.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer

T_975_DF_19 = 2.093


@dataclass(frozen=True)
class Rules:
    """Thresholds of one keyword table."""

    true_positives: bool
    probability: float
    top_n: int
    published_words: bool
    theta: str
    min_df: int
    max_classes: int | None
    top: int | None
    labels: tuple[str, ...]
    test_share_ratio: float | None


def take_occurrences(explanations: pd.DataFrame, rules: Rules) -> pd.DataFrame:
    """Return one row an occurrence that counts: split, label, doc_id, doc_group, word, score."""
    rows = explanations[(explanations.status == "explained") & (explanations.probability > rules.probability)]
    if rules.true_positives:
        rows = rows[rows.is_gold.eq(True)]
    if rules.labels:
        rows = rows[rows.label.isin(rules.labels)]
    flat = rows.explode("words").dropna(subset="words")
    flat["word"] = flat.words.str["word"].astype(object)
    flat["score"] = flat.words.str["score"].astype(float)
    flat = flat[np.isfinite(flat.score) & (flat.score >= 0)]
    flat["score"] = (flat.score / flat.token_norm).where(flat.token_norm != 0, 0.0)
    if rules.published_words:
        flat["word"] = flat.word.str.replace(r"[^\w\s]", "", regex=True)
        flat = flat[(flat.word != "") & ~(flat.score > 1)]
    best = (
        flat.sort_values("score", ascending=False, kind="stable")
        .groupby(["split", "doc_id", "label"])
        .head(rules.top_n)
    )
    return best.assign(doc_group=best.text_digest.map(lambda digest: int(digest[-8:], 16) % 20))


def count_documents(
    occurrences: pd.DataFrame, explanations: pd.DataFrame, staged: pd.DataFrame | None, rules: Rules
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Return document frequencies by (label, word), and the documents of each label."""
    if staged is None:
        documents = _predicted_documents(explanations, rules)
    elif rules.published_words:
        documents = _vectorized_documents(staged)
    else:
        documents = [(set(row.labels), set(row.words)) for row in staged.itertuples() if row.labels is not None]
    frequencies: dict[tuple[str, str], int] = {}
    sizes: dict[str, int] = {}
    wanted = set(occurrences.word)
    for labels, words in documents:
        for label in labels:
            if rules.labels and label not in rules.labels:
                continue
            sizes[label] = sizes.get(label, 0) + 1
            for word in words & wanted:
                frequencies[label, word] = frequencies.get((label, word), 0) + 1
    return frequencies, sizes


def _predicted_documents(explanations: pd.DataFrame, rules: Rules) -> list[tuple[set[str], set[str]]]:
    rows = explanations[(explanations.status == "explained") & (explanations.probability > rules.probability)]
    documents = []
    for (label, _), group in rows.groupby(["label", "doc_id"]):
        words = pd.Series([word["word"] for words in group.words for word in words], dtype=object)
        if rules.published_words:
            words = words.str.replace(r"[^\w\s]", "", regex=True)
        documents.append(({label}, set(words)))
    return documents


def _vectorized_documents(staged: pd.DataFrame) -> list[tuple[set[str], set[str]]]:
    rows = []
    for row in staged.itertuples():
        try:
            rows.append((set(row.labels or ()), row.text.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    vectorizer = CountVectorizer()
    try:
        counts = vectorizer.fit_transform([text for _, text in rows])
    except ValueError:  # scikit-learn's answer to texts without a single word
        return [(labels, set()) for labels, _ in rows]
    names = vectorizer.get_feature_names_out()
    return [(labels, set(names[counts[number].indices])) for number, (labels, _) in enumerate(rows)]


def make_keywords(explanations: pd.DataFrame, staged: pd.DataFrame | None, n_splits: int, rules: Rules) -> pd.DataFrame:
    """Return the keyword table, a row a (label, word), with the columns of lexplain's `keywords`."""
    occurrences = take_occurrences(explanations, rules)
    rows = [
        {"label": label, "word": word, **_measure(group, rules.test_share_ratio)}
        for (label, word), group in occurrences.groupby(["label", "word"])
    ]
    frequencies, sizes = count_documents(occurrences, explanations, staged, rules)
    needed = Fraction(rules.theta) * n_splits
    stable = {row["word"] for row in rows if row["n_selected"] >= needed}
    for row in rows:
        row["n_splits"], row["selection_frequency"] = n_splits, row["n_selected"] / n_splits
        row["document_frequency"] = row["distinctiveness"] = np.nan
        if row["word"] in stable:
            row["document_frequency"] = frequencies.get((row["label"], row["word"]), 0)
            row["distinctiveness"] = _distinctiveness(row["label"], row["word"], frequencies, sizes)
        row["drop_reason"] = _first_broken(row, needed, rules.min_df)
    _rank(rows, rules)
    return pd.DataFrame(rows)


def make_keyphrases(explanations: pd.DataFrame, n_splits: int, rules: Rules) -> pd.DataFrame:
    """Return the table of phrases, called words here: those of the spans of evidence documents, which are counted too."""
    rows = explanations[explanations.status == "explained"]
    if rules.true_positives:
        rows = rows[rows.is_gold.eq(True)]
    phrases = []
    for spans in rows.spans:
        listed = [
            {"word": " ".join(span["words"]), "score": span["score"]}
            for span in (spans if isinstance(spans, list) else ())
        ]
        phrases.append(sorted(listed, key=lambda phrase: -phrase["score"]))  # stable: ties stay in the text's order
    return make_keywords(rows.assign(words=phrases), None, n_splits, rules)


def _measure(group: pd.DataFrame, test_share_ratio: float | None) -> Mapping[str, float]:
    means = group.groupby("split").score.mean()
    spread = means.std(ddof=1) if len(means) >= 3 else np.nan
    ratio = np.nan if test_share_ratio is None else test_share_ratio
    low, high = _jackknife(group.score.to_numpy(), group.doc_group.to_numpy())
    return {
        "n_selected": group.split.nunique(),
        "n_documents": len(group[["split", "doc_id"]].drop_duplicates()),
        "n_occurrences": len(group),
        "score_mean": group.score.mean(),
        "score_variance": group.score.std(ddof=0) ** 2,
        "score_std": spread,
        "score_error": np.sqrt(1 / len(means) + ratio) * spread,
        "ci_low": low,
        "ci_high": high,
    }


def _jackknife(scores: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    left_out = []
    for group in range(20):
        rest = scores[groups != group]
        if len(rest) == 0:
            return np.nan, np.nan
        left_out.append(rest.mean())
    half = T_975_DF_19 * np.sqrt(19 / 20 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    return scores.mean() - half, scores.mean() + half


def _distinctiveness(
    label: str, word: str, frequencies: Mapping[tuple[str, str], int], sizes: Mapping[str, int]
) -> float:
    shares = {other: frequencies.get((other, word), 0) / size for other, size in sizes.items()}
    own = shares.pop(label, 0.0)
    return (own - float(np.mean(list(shares.values())))) / own if own and shares else np.nan


def _first_broken(row: Mapping[str, object], needed: Fraction, min_df: int) -> str | None:
    if row["n_selected"] < needed:
        return "selection_frequency"
    if row["document_frequency"] <= min_df:
        return "document_frequency"
    return None if any(character.isalpha() for character in row["word"]) else "no_letter"


def _rank(rows: Sequence[dict[str, object]], rules: Rules) -> None:
    kept = [row for row in rows if row["drop_reason"] is None]
    for row in kept:
        row["n_classes"] = sum(other["word"] == row["word"] for other in kept)
    for row in kept:
        if rules.max_classes is not None and row["n_classes"] > rules.max_classes:
            row["drop_reason"] = "max_classes"
    for row in rows:
        row["rank"] = np.nan
    for label in {row["label"] for row in rows}:
        left = [row for row in kept if row["label"] == label and row["drop_reason"] is None]
        left.sort(key=lambda row: (-row["score_mean"], row["word"].encode()))
        for rank, row in enumerate(left, 1):
            if rules.top is not None and rank > rules.top:
                row["drop_reason"] = "beyond_top"
            else:
                row["rank"] = rank


def overlap_rank_biased(a: Sequence[str], b: Sequence[str], p: float) -> float:
    """Return RBO_ext of two lists: the weighted sum over depths without end, as Webber et al. 2010 go on past the lists.

    Past the shorter list it is taken to go on agreeing as it did at its end; past both the agreement stays.
    """
    short, long = sorted((list(a), list(b)), key=len)
    if not short:
        return 0.0
    total, at_end = 0.0, 0.0
    for depth in range(1, 4000):
        if depth <= len(long):
            met = len(set(short[:depth]) & set(long[:depth]))
            if depth > len(short):
                met += (depth - len(short)) * len(set(short) & set(long[: len(short)])) / len(short)
            at_end = met / depth
        total += (1 - p) * p ** (depth - 1) * at_end
    return total
