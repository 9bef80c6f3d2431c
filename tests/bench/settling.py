"""When keyword lists are settled: does the predicted overlap with the whole corpus's list cover the achieved one?

A corpus is explained once, by linear models (a word's score is its coefficient times its value), and then read again and
again in random orders of its chunks, as the attribution stage would. After a chunk each class's list is compared with
the prediction of `lexplain.settling`, and with the list of the whole corpus, which the prediction does not know. All classes
are read to the end, and where each would have stopped is told for several thresholds; some runs are made again with
settled classes read no further, which changes the others by the rule that a word may be kept by few classes only.

Two corpora: 20 Newsgroups, labelled, each model explaining what it was not trained on; and one that is generated,
unlabelled, of words by Zipf's law and classes of which each is half as frequent as the one before.

    PYTHONPATH=tests .venv/bin/python -m bench.settling
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from bench.attribution import add_cache
from bench.newsgroups import fetch_newsgroups
from lexplain.extrapolation import Evidence, ListRules
from lexplain.overlap import rank_biased_overlap
from lexplain.settling import P, Prediction, is_due, is_settled, predict_overlaps, rank_words

K = 20
TOP_N = 20
SPLITS = 5
THRESHOLDS = (0.8, 0.9, 0.95)
STOPPED_AT = 0.9
CHUNKS = {"newsgroups": 20, "generated": 40}
GROUPS = 20
SHARE_HELD_OUT = 0.33
SCALE = 10.0  # of the normalised counts: an early stop would leave smaller ones without a confident prediction
CONTEXT = 0.7
TRAINING_SEED = 1000


@dataclass(frozen=True)
class Explained:
    """A corpus that was explained by all splits: sums of its R pairs of class and word by cell, a group of a chunk.

    Attributes:
        rules: Of the keyword lists.
        labels: Names of the classes.
        n_documents: Evidence documents of each class, for any split.
        words: (R,) and classes: (R,), sorted by word, then class.
        selected: (R * splits, cells) documents in which each split selected each word.
        sums: (R * 4, cells) documents that a split selected it in, occurrences, scores, documents of the class that hold it.
        whole: Document frequencies over the labelled corpus; None where they are counted as it is read.
        n_chunks: Chunks; a chunk has `GROUPS` cells.
    """

    rules: ListRules
    labels: Sequence[str]
    n_documents: Sequence[int]
    words: NDArray[np.int64]
    classes: NDArray[np.int64]
    selected: sparse.csc_matrix
    sums: sparse.csc_matrix
    squares: sparse.csc_matrix
    whole: NDArray[np.int64] | None
    n_chunks: int


@dataclass(frozen=True)
class Scores:
    """Which words count: one entry a document, class, split and word, at most `TOP_N` of them for the first three."""

    document: NDArray[np.int64]
    label: NDArray[np.int64]
    split: NDArray[np.int64]
    word: NDArray[np.int64]
    score: NDArray[np.float64]


# --- corpora --------------------------------------------------------------------------------------------------


def score_documents(
    counts: sparse.csr_matrix, model: LogisticRegression, split: int, explained: NDArray[np.bool_], context: float = 0.0
) -> Scores:
    """Return the best words of the documents that a model explains, for the label it predicts above one half.

    With `context` a word's score varies from text to text, as a transformer's does: by a factor whose logarithm is normal
    with that deviation, the same for all splits.
    """
    chance = model.predict_proba(SCALE * normalize(counts))
    label = chance.argmax(1)
    explained = explained & (chance.max(1) > 0.5)
    document = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    word = counts.indices.astype(np.int64)
    score = model.coef_[label[document], word] * counts.data
    score = score * np.exp(context * np.random.default_rng(4).standard_normal(len(score)))
    norm = np.sqrt(np.bincount(document, score**2, counts.shape[0]))
    score = score / np.maximum(norm[document], 1e-300)
    usable = explained[document]
    document, word, score = document[usable], word[usable], score[usable]
    order = np.lexsort((-score, document))
    document, word, score = document[order], word[order], score[order]
    place = np.arange(len(document)) - np.searchsorted(document, document)
    best = (place < TOP_N) & (score >= 0)
    document, word, score = document[best], word[best], score[best]
    return Scores(document, label[document], np.full(len(document), split), word, score)


def collect(
    scores: Scores, counts: sparse.csr_matrix, rules: ListRules, labels: Sequence[str], n_chunks: int, seed: int,
    gold: NDArray[np.int64] | None,
) -> Explained:  # fmt: skip
    """Return the sums by cell of the words that count."""
    n_documents, cells = counts.shape[0], n_chunks * GROUPS
    cell = np.random.default_rng(seed).permutation(np.arange(n_documents) % cells)
    pairs, row = np.unique(scores.word * len(labels) + scores.label, return_inverse=True)
    size = len(pairs)
    place = cell[scores.document]
    selected = _sum_by(row * rules.n_splits + scores.split, place, np.ones(len(row)), size * rules.n_splits, cells)
    by_split = selected.tocoo()
    union = _reduce_splits(by_split, rules.n_splits, size, cells)
    occurrences = _sum_by(row, place, np.ones(len(row)), size, cells)
    totals = _sum_by(row, place, scores.score, size, cells)
    standing = np.unique(scores.document * len(labels) + scores.label)
    document, label = np.divmod(standing, len(labels))
    frequencies, whole = None, None
    if gold is None:
        held = counts[document]
        of = np.repeat(np.arange(len(document)), np.diff(held.indptr))
        key = held.indices.astype(np.int64) * len(labels) + label[of]
        at = np.minimum(np.searchsorted(pairs, key), size - 1)
        known = pairs[at] == key
        frequencies = _sum_by(at[known], cell[document[of[known]]], np.ones(int(known.sum())), size, cells)
    else:
        member = sparse.csr_matrix((np.ones(n_documents), (gold, np.arange(n_documents))), (len(labels), n_documents))
        table = (member @ (counts > 0).astype(float)).tocsr()
        word, of = np.divmod(pairs, len(labels))
        whole = np.asarray(table[of, word]).ravel().astype(np.int64)
    both = [union, occurrences, totals] + ([frequencies] if frequencies is not None else [])
    present = (occurrences > 0).astype(float)
    squares = [present, totals.multiply(totals), occurrences.multiply(occurrences), occurrences.multiply(totals)]
    return Explained(
        rules, labels, np.bincount(label, minlength=len(labels)).tolist(), pairs // len(labels), pairs % len(labels),
        selected, sparse.vstack(both).tocsc(), sparse.vstack(squares).tocsc(), whole, n_chunks,
    )  # fmt: skip


def _sum_by(
    row: NDArray[Any], column: NDArray[Any], values: NDArray[Any], rows: int, columns: int
) -> sparse.csc_matrix:
    return sparse.coo_matrix((values, (row, column)), (rows, columns)).tocsc()


def _reduce_splits(by_split: sparse.coo_matrix, splits: int, rows: int, cells: int) -> sparse.csc_matrix:
    """Return the most documents of a split, for each row and cell: how many some split selected, but for few."""
    key = (by_split.row // splits).astype(np.int64) * cells + by_split.col
    order = np.lexsort((-by_split.data, key))
    key, most = key[order], by_split.data[order]
    first = np.append(True, key[1:] != key[:-1])
    return _sum_by(key[first] // cells, key[first] % cells, most[first], rows, cells)


def fit_model(counts: sparse.csr_matrix, labels: NDArray[np.int64]) -> LogisticRegression:
    """Return a model that is stopped early, which regularises it as a penalty would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1.0, max_iter=15).fit(SCALE * normalize(counts.astype(np.float32)), labels)


def explain_newsgroups(cache: Path, n_chunks: int) -> Explained:
    """Return 20 Newsgroups, each split's model explaining the documents it was not trained on, gold labels predicted."""
    documents = [each for part in fetch_newsgroups(cache).values() for each in part]
    names = sorted({each["label"] for each in documents})
    gold = np.array([names.index(each["label"]) for each in documents])
    counts = CountVectorizer(token_pattern=r"\S+").fit_transform(each["text"] for each in documents).tocsr()
    found = []
    for split in range(SPLITS):
        held_out = np.random.default_rng([7, split]).random(len(documents)) < SHARE_HELD_OUT
        model = fit_model(counts[~held_out], gold[~held_out])
        scores = score_documents(counts, model, split, held_out)
        right = scores.label == gold[scores.document]
        found.append([column[right] for column in vars(scores).values()])
    rules = ListRules(
        k=K, n_splits=SPLITS, min_splits=math.ceil(0.6 * SPLITS), min_df=5, max_classes=2, known_frequencies=True
    )
    scores = Scores(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
    return collect(scores, counts, rules, names, n_chunks, 0, gold)


def generate_documents(n_documents: int, n_labels: int, seed: int) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Return word counts and labels of documents: words by Zipf's law, each class half as frequent as the one before.

    In each class one word of sixteen is more or less frequent than elsewhere, by a factor whose logarithm is normal.
    """
    world, random = np.random.default_rng(1), np.random.default_rng([2, seed])
    words = 60_000
    zipf = 1 / np.arange(1, words + 1) ** 1.05
    lift = np.exp(world.normal(0, 1.5, (n_labels, words)) * (world.random((n_labels, words)) < 1 / 16))
    shares = 0.5 ** np.arange(n_labels)
    label = random.choice(n_labels, n_documents, p=shares / shares.sum())
    label[:n_labels] = np.arange(n_labels)
    length = np.clip(np.exp(random.normal(3.6, 0.6, n_documents)), 5, 300).astype(int)
    parts = []
    for number in range(n_labels):
        own = np.flatnonzero(label == number)
        document = np.repeat(own, length[own])
        chance = np.cumsum(zipf * lift[number])
        word = np.searchsorted(chance, random.random(len(document)) * chance[-1])
        parts.append(sparse.coo_matrix((np.ones(len(word)), (document, word)), (n_documents, words)).tocsr())
    return sum(parts[1:], parts[0]).tocsr(), label


def explain_generated(n_documents: int, n_chunks: int, seed: int) -> Explained:
    """Return a generated corpus, which is explained for the labels that models predict of it; other documents trained them."""
    n_labels = 8
    training, gold = generate_documents(20_000, n_labels, TRAINING_SEED)
    counts, _ = generate_documents(n_documents, n_labels, seed)
    everything = np.ones(n_documents, dtype=bool)
    found = []
    for split in range(SPLITS):
        chosen = np.random.default_rng([3, split]).random(len(gold)) > SHARE_HELD_OUT
        chosen[:n_labels] = True
        model = fit_model(training[chosen], gold[chosen])
        found.append(list(vars(score_documents(counts, model, split, everything, CONTEXT)).values()))
    rules = ListRules(
        k=K, n_splits=SPLITS, min_splits=math.ceil(0.6 * SPLITS), min_df=5, max_classes=2, known_frequencies=False
    )
    scores = Scores(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
    return collect(scores, counts, rules, [f"class {number}" for number in range(n_labels)], n_chunks, seed, None)


# --- reading --------------------------------------------------------------------------------------------------


class Reading:
    """What was read of a corpus so far, class by class."""

    def __init__(self, corpus: Explained) -> None:
        self.corpus = corpus
        self.selected = np.zeros(corpus.selected.shape[0])
        self.sums = np.zeros(corpus.sums.shape[0])
        self.squares = np.zeros(corpus.squares.shape[0])
        self.shares = np.zeros(len(corpus.labels))

    def add(self, cells: NDArray[np.int64], active: NDArray[np.bool_]) -> None:
        """Read some cells for the classes that are still active."""
        corpus = self.corpus
        on = active[corpus.classes]
        self.selected += _add_cells(corpus.selected, cells) * np.repeat(on, corpus.rules.n_splits)
        self.sums += _add_cells(corpus.sums, cells) * np.tile(on, len(self.sums) // len(on))
        self.squares += _add_cells(corpus.squares, cells) * np.tile(on, 4)
        self.shares += active * len(cells) / (corpus.n_chunks * GROUPS)

    def look(self) -> Evidence:
        """Return what the statistics are told."""
        corpus, size = self.corpus, len(self.corpus.words)
        by_split = self.selected.reshape(size, corpus.rules.n_splits)
        documents, occurrences, totals = self.sums[: 3 * size].reshape(3, size)
        frequencies = self.sums[3 * size :] if corpus.whole is None else corpus.whole
        cells, score_squares, occurrence_squares, products = self.squares.reshape(4, size)
        met = occurrences > 0.5

        def whole(values: NDArray[Any]) -> NDArray[np.int64]:
            return np.rint(values[met]).astype(np.int64)

        return Evidence(
            label=corpus.classes[met], word=corpus.words[met], n_selected=(by_split[met] > 0.5).sum(1),
            n_documents=whole(documents), n_split_documents=whole(by_split.sum(1)), document_frequency=whole(frequencies),
            n_occurrences=whole(occurrences), score_sum=totals[met], n_cells=whole(cells), score_squares=score_squares[met],
            occurrence_squares=occurrence_squares[met], products=products[met], shares=np.minimum(self.shares, 1.0),
        )  # fmt: skip


def _add_cells(sums: sparse.csc_matrix, cells: NDArray[np.int64]) -> NDArray[np.float64]:
    part = sums[:, cells]
    return np.bincount(part.indices, part.data, sums.shape[0])


def read_whole(corpus: Explained, cells: NDArray[np.int64] | None = None) -> list[list[int]]:
    """Return the lists of all cells, or of some."""
    reading = Reading(corpus)
    everything = np.arange(corpus.n_chunks * GROUPS)
    reading.add(everything if cells is None else cells, np.ones(len(corpus.labels), dtype=bool))
    return rank_words(reading.look(), corpus.rules)


def split_halves(corpus: Explained, halvings: int = 10) -> list[float]:
    """Return the overlap of the lists of two halves of the corpus, by class, a mean over random halvings."""
    found = []
    for seed in range(halvings):
        order = np.random.default_rng(seed).permutation(corpus.n_chunks * GROUPS)
        one, other = (read_whole(corpus, half) for half in np.array_split(order, 2))
        found.append([rank_biased_overlap(a, b, P) for a, b in zip(one, other, strict=True)])
    return np.mean(found, axis=0).tolist()


@dataclass(frozen=True)
class Look:
    """A prediction, and what came of it."""

    run: int
    prediction: Prediction
    achieved: float

    @property
    def covers(self) -> bool:
        return self.prediction.low - 1e-9 <= self.achieved <= self.prediction.high + 1e-9


def read_randomly(corpus: Explained, whole: list[list[int]], run: int, threshold: float | None) -> Iterator[Look]:
    """Yield each look at each class; with a threshold a settled class is read no further, and looked at no more."""
    order = np.random.default_rng([11, run]).permutation(corpus.n_chunks * GROUPS)
    reading, active = Reading(corpus), np.array([len(listed) > 0 for listed in whole])
    looks: list[list[Prediction]] = [[] for _ in corpus.labels]
    last = 0.0
    for chunk, cells in enumerate(np.array_split(order, corpus.n_chunks)[:-1]):
        reading.add(cells, active)
        share = (chunk + 1) / corpus.n_chunks
        if not is_due(share, last):
            continue
        last = share
        evidence = reading.look()
        lists = rank_words(evidence, corpus.rules)
        for prediction in predict_overlaps(evidence, corpus.rules, seed=run * 1000 + chunk):
            label = prediction.label
            if not active[label]:
                continue
            looks[label].append(prediction)
            yield Look(run, prediction, rank_biased_overlap(lists[label], whole[label], P))
            active[label] = threshold is None or not is_settled(looks[label], threshold, K)
        if not active.any():
            return


# --- figures --------------------------------------------------------------------------------------------------

_read: dict[str, tuple[Explained, list[list[int]]]] = {}


def _simulate(job: tuple[str, int, float | None]) -> list[Look]:
    name, run, threshold = job
    corpus, whole = _read[name]
    return list(read_randomly(corpus, whole, run, threshold))


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def find_stops(found: Sequence[Look], threshold: float) -> list[Look]:
    """Return the look at which each class of each run is first settled; none where it never is."""
    runs: dict[tuple[int, int], list[Look]] = {}
    for look in found:
        runs.setdefault((look.run, look.prediction.label), []).append(look)
    stops = []
    for looks in runs.values():
        predictions = [look.prediction for look in looks]
        ends = (end for end in range(len(looks)) if is_settled(predictions[: end + 1], threshold, K))
        stops += [looks[end] for end in [next(ends, None)] if end is not None]
    return stops


def describe_stops(
    corpus: Explained, whole: list[list[int]], stops: Sequence[Look], threshold: float, runs: int
) -> dict[str, Any]:
    """Return what stopping at a threshold came to: over all classes that have a list, and class by class."""
    described = {}
    for label in [None, *(number for number, listed in enumerate(whole) if listed)]:
        some = [look for look in stops if label in (None, look.prediction.label)]
        chances = runs * (1 if label is not None else sum(1 for listed in whole if listed))
        read = sum(look.prediction.share for look in some) + chances - len(some)
        described["all" if label is None else corpus.labels[label]] = {
            "stopped": len(some) / chances,
            "share_saved": 1 - read / chances,
            "covered": mean([look.covers for look in some]),
            "predicted": mean([look.prediction.overlap for look in some]),
            "low": mean([look.prediction.low for look in some]),
            "achieved": mean([look.achieved for look in some]),
            "at_least_threshold": mean([look.achieved >= threshold for look in some]),
        }
    return described


def describe_looks(found: Sequence[Look]) -> list[dict[str, Any]]:
    """Return the coverage at each look, all classes together."""
    shares = sorted({round(look.prediction.share, 6) for look in found})
    rows = []
    for share in shares:
        some = [look for look in found if round(look.prediction.share, 6) == share]
        rows.append({
            "share": share, "predictions": len(some), "covered": mean([look.covers for look in some]),
            "predicted": mean([look.prediction.overlap for look in some]), "achieved": mean([look.achieved for look in some]),
            "width": mean([look.prediction.high - look.prediction.low for look in some]),
            "below": mean([look.achieved < look.prediction.low - 1e-9 for look in some]),
            "above": mean([look.achieved > look.prediction.high + 1e-9 for look in some]),
        })  # fmt: skip
    return rows


def measure(name: str, corpus: Explained, runs: int, stopped_runs: int, processes: int) -> dict[str, Any]:
    """Return the figures of one corpus."""
    started = time.perf_counter()
    whole = read_whole(corpus)
    _read[name] = corpus, whole
    halves = split_halves(corpus)
    record: dict[str, Any] = {
        "runs": runs, "chunks": corpus.n_chunks, "splits": corpus.rules.n_splits, "words": len(corpus.words),
        "classes": {
            label: {"documents": documents, "list": len(listed), "halves": half}
            for label, documents, listed, half in zip(corpus.labels, corpus.n_documents, whole, halves, strict=True)
        },
    }  # fmt: skip
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for threshold, count in ((None, runs), (STOPPED_AT, stopped_runs)):
            found = [
                each for some in pool.imap(_simulate, [(name, run, threshold) for run in range(count)]) for each in some
            ]
            if threshold is None:
                record["covered"] = mean([look.covers for look in found])
                record["looks"] = describe_looks(found)
                stops = {each: find_stops(found, each) for each in THRESHOLDS}
                record["stops"] = {
                    str(each): describe_stops(corpus, whole, some, each, runs) for each, some in stops.items()
                }
            else:
                some = find_stops(found, threshold)
                record["read_no_further"] = {
                    "runs": count,
                    "threshold": threshold,
                    **describe_stops(corpus, whole, some, threshold, count)["all"],
                }
            print(f"{name}, {count} runs: {time.perf_counter() - started:.0f} s", flush=True)
    return record


def write_tables(record: dict[str, Any]) -> str:
    """Return Markdown: a corpus's looks, then its stops."""
    lines = []
    for name, found in record["corpora"].items():
        lines += [
            f"\n{name}: {found['runs']} runs, {found['chunks']} chunks; {100 * found['covered']:.1f} % of all looks covered\n",
            "| read | predicted | achieved | width | covered | below | above |", "|---:|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for row in found["looks"]:
            cells = [f"{row[key]:.3f}" for key in ("predicted", "achieved", "width", "covered", "below", "above")]
            lines.append(f"| {100 * row['share']:.0f} % | " + " | ".join(cells) + " |")
        lines += [
            "\n| class | documents | halves | threshold | stopped | saved | covered | predicted | achieved |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for threshold, classes in found["stops"].items():
            for label, row in classes.items():
                of = found["classes"].get(label, {})
                half = of.get("halves", mean([each["halves"] for each in found["classes"].values() if each["list"]]))
                cells = [
                    "" if row[key] is None else f"{row[key]:.3f}"
                    for key in ("stopped", "share_saved", "covered", "predicted", "achieved")
                ]
                lines.append(
                    f"| {label} | {of.get('documents', '')} | {half:.3f} | {threshold} | " + " | ".join(cells) + " |"
                )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Simulate, write the JSON file after each corpus, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="random orders of each corpus's chunks (default: 200)")
    parser.add_argument(
        "--stopped-runs", type=int, default=40, help="of these, read again with settled classes left alone"
    )
    parser.add_argument("--documents", type=int, default=200_000, help="of the generated corpus (default: 200000)")
    parser.add_argument("--on", nargs="+", choices=["newsgroups", "generated"], default=["newsgroups", "generated"])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default: 1)")
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-settling.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    record: dict[str, Any] = {"k": K, "p": P, "corpora": {}}
    for name in arguments.on:
        if name == "newsgroups":
            corpus = explain_newsgroups(arguments.cache, CHUNKS[name])
        else:
            corpus = explain_generated(arguments.documents, CHUNKS[name], 0)
        record["corpora"][name] = measure(name, corpus, arguments.runs, arguments.stopped_runs, arguments.processes)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(write_tables(record))


if __name__ == "__main__":
    main()
