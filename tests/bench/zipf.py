"""Explanations as a corpus of any size would have them, written as Delta: words by Zipf's law, few large classes.

Documents have the words of a language and of their topic. Several models explain each document, so that it has the same
words in every split and other scores; stop words are in every class and in nearly every document.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import cloudpickle

from lexplain.corpus import Staged
from lexplain.executor import EXPLANATIONS
from lexplain.keys import corpus_key
from lexplain.plan import Keywords, Models, Plan, Sink, Source
from lexplain.schema import TABLES
from lexplain.tables import Tables, quote_list, quote_text

# Workers need not find this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

_TOPIC_WORDS = 20_000
_TOPIC_SHARE, _SECOND_LABEL_SHARE = 0.15, 0.1
_NO_LABEL_SHARE, _REJECTED_SHARE = 0.02, 0.01
# The spread of the logarithm of a document's length.
_LENGTH_SPREAD = 0.6


@dataclass(frozen=True)
class Shape:
    """How large the corpus is, and how it is cut.

    Attributes:
        documents: Distinct ones.
        splits: Models that explain each.
        labels: Classes; the n-th has 1/n of the first one's documents.
        document_words: Words a document on average.
        vocabulary: Distinct words of the language; each class has 20,000 of its own besides.
        chunk_documents: Documents a chunk.
    """

    documents: int
    splits: int = 5
    labels: int = 10
    document_words: int = 100
    vocabulary: int = 500_000
    chunk_documents: int = 2_000

    @property
    def chunks(self) -> int:
        """How many there are."""
        return math.ceil(self.documents / self.chunk_documents)

    @property
    def explain_keys(self) -> list[str]:
        """One a split."""
        return [hashlib.sha256(b"%d" % split).hexdigest()[:20] for split in range(self.splits)]

    @property
    def label_names(self) -> list[str]:
        """The classes, the largest first."""
        return [f"class {number:02d}" for number in range(self.labels)]


def make_shape(word_rows: int, **sizes: int) -> Shape:
    """Return the shape of a corpus with about so many words in its explanations."""
    shape = Shape(documents=0, **sizes)
    explained = (1 + _SECOND_LABEL_SHARE) * (1 - _NO_LABEL_SHARE - _REJECTED_SHARE)
    return Shape(max(1, round(word_rows / (shape.splits * shape.document_words * explained))), **sizes)


def make_plan(folder: str, shape: Shape) -> Plan:
    """Return the plan whose explanations these are: a corpus without labels, ready models, all defaults."""
    return Plan(
        name="scale", corpus=Source(path=f"{folder}/corpus.jsonl"), keywords=Keywords(), sink=Sink(path=folder),
        models=Models(uris=tuple(f"/models/{split}" for split in range(shape.splits)), corpus="unseen"),
    )  # fmt: skip


def write_explanations(tables: Tables, plan: Plan, shape: Shape) -> Staged:
    """Write `explanations` in one commit, and `chunks` as the ledger would say."""
    write_chunks(tables, plan, shape, range(shape.chunks))
    return write_ledger(tables, plan, shape)


def write_chunks(tables: Tables, plan: Plan, shape: Shape, buckets: range, tasks: int | None = None) -> None:
    """Write the explanations of some chunks in one commit.

    Args:
        tables: Of the plan's sink.
        plan: As `make_plan` made it.
        shape: What is drawn.
        buckets: Which chunks.
        tasks: Tasks that write them, by text digest; None: one a chunk.
    """
    key = corpus_key(plan.corpus)
    make = functools.partial(_make_batches, shape=shape, key=key, schema=EXPLANATIONS)
    rows = tables.spark.range(buckets.start, buckets.stop, 1, len(buckets)).mapInArrow(
        make, TABLES["explanations"].schema
    )
    if tasks is not None:
        rows = rows.repartition(tasks, "text_digest")
    place = (
        f"corpus_key = {quote_text(key)} AND increment = 0 AND bucket BETWEEN {buckets.start} AND {buckets.stop - 1}"
    )
    tables.replace(rows, "explanations", where=place)


def write_ledger(tables: Tables, plan: Plan, shape: Shape) -> Staged:
    """Write `chunks`, from the explanations; return the corpus that they are of."""
    key = corpus_key(plan.corpus)
    ours = f"corpus_key = {quote_text(key)}"
    ledger = tables.spark.sql(
        "SELECT explain_key, corpus_key, increment, bucket, split, count_if(label_rank = 0) AS n_documents"
        f" FROM {tables.name('explanations')} WHERE {ours} GROUP BY explain_key, corpus_key, increment, bucket, split"
    )
    tables.replace(ledger, "chunks", where=ours)
    return Staged(key, 1, shape.documents)


def write_run(tables: Tables, plan: Plan, shape: Shape, keyword_key: str) -> None:
    """Write the row of `runs` that makes a keyword table the plan's current one."""
    known = {
        "run_id": "'scale'", "name": quote_text(plan.name), "status": "'finished'", "started_at": "now()", "finished_at": "now()",
        "corpus_key": quote_text(corpus_key(plan.corpus)), "keyword_key": quote_text(keyword_key),
        "explain_keys": f"array({quote_list(shape.explain_keys)})",
        "evidence": f"named_struct('policy', 'predicted', 'probability', {plan.keywords.probability!r}D,"
        f" 'top_n', {plan.keywords.top_n}, 'word_rule', 'unicode', 'increments', 1)",
    }  # fmt: skip
    columns = [f"{known.get(name, f'CAST(NULL AS {kind})')} AS {name}" for name, kind, _ in TABLES["runs"].columns]
    tables.replace(tables.spark.range(1).selectExpr(*columns), "runs", where="run_id = 'scale'")


# --- on executors ---------------------------------------------------------------------------------------------


@functools.cache
def _list_vocabulary(size: int) -> pa.Array:
    """Return distinct words, the shortest first, as the most frequent ones are; every 97th is a number."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    return pa.array([str(n) if n % 97 == 96 else "".join(letters[_digits(n, len(letters))]) for n in range(size)])


def _digits(number: int, base: int) -> list[int]:
    found = [number % base]
    while number >= base:
        number = number // base - 1
        found.append(number % base)
    return found


def _draw_ranks(rng: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """Draw from the log-uniform law: the share of rank r is log((r + 2) / (r + 1)), 1/r but for the first ranks."""
    return np.minimum(np.exp(rng.random(count) * math.log(size + 1)).astype(np.int64) - 1, size - 1)


def _make_batches(
    batches: Iterator[pa.RecordBatch], shape: Shape, key: str, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Yield a chunk's explanations as one batch; a chunk is drawn the same wherever it is made."""
    for batch in batches:
        for bucket in batch.column(0).to_pylist():
            yield _make_batch(bucket, shape, key, schema)


def _make_batch(bucket: int, shape: Shape, key: str, schema: pa.Schema) -> pa.RecordBatch:
    rng = np.random.default_rng([7, bucket])
    n = min(shape.chunk_documents, shape.documents - bucket * shape.chunk_documents)
    mean = math.log(shape.document_words) - _LENGTH_SPREAD**2 / 2
    lengths = np.clip(rng.lognormal(mean, _LENGTH_SPREAD, n), 3, 20 * shape.document_words).astype(np.int64)
    shares = 1 / np.arange(1, shape.labels + 1)
    topics = rng.choice(shape.labels, n, p=shares / shares.sum())
    total = int(lengths.sum())
    words, of_topic = _draw_ranks(rng, total, shape.vocabulary), rng.random(total) < _TOPIC_SHARE
    topical = shape.vocabulary + np.repeat(topics, lengths) * _TOPIC_WORDS + _draw_ranks(rng, total, _TOPIC_WORDS)
    words[of_topic] = topical[of_topic]
    rows = _draw_rows(rng, shape, topics)
    found = _rank_words(rng, shape, rows, lengths, words)
    return pa.RecordBatch.from_arrays(
        [_make_column(field, bucket, shape, key, rows, found, rng) for field in schema], schema=schema
    )


def _draw_rows(rng: np.random.Generator, shape: Shape, topics: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return what a row says but its words: a row a document and split, some with a second label."""
    n = len(topics)
    document, split = np.tile(np.arange(n), shape.splits), np.repeat(np.arange(shape.splits), n)
    label = np.where(rng.random(len(document)) < 0.9, topics[document], rng.integers(0, shape.labels, len(document)))
    fate = rng.random(len(document))
    explained = fate >= _NO_LABEL_SHARE + _REJECTED_SHARE
    second = np.flatnonzero(explained & (rng.random(len(document)) < _SECOND_LABEL_SHARE))
    rank = np.zeros(len(document) + len(second), np.int32)
    rank[len(document) :] = 1
    return {
        "document": np.concatenate([document, document[second]]), "split": np.concatenate([split, split[second]]),
        "label": np.concatenate([label, (label[second] + 1) % shape.labels]), "label_rank": rank,
        "explained": np.concatenate([explained, explained[second]]),
        "rejected": np.concatenate([fate < _REJECTED_SHARE, np.zeros(len(second), bool)]),
        "probability": 1 - 0.6 * rng.random(len(rank)) ** 2,
    }  # fmt: skip


def _rank_words(
    rng: np.random.Generator, shape: Shape, rows: dict[str, NDArray[Any]], lengths: NDArray[np.int64], words: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Give the words of each row scores, and sort them by these; words of a label's own topic speak for it."""
    sizes = np.where(rows["explained"], lengths[rows["document"]], 0)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    row = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(offsets[-1]) - offsets[row]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    word = words[position + starts[rows["document"]][row]]
    speaks_for = (word - shape.vocabulary) // _TOPIC_WORDS == rows["label"][row]
    strength = np.where(speaks_for, 0.5 + 0.5 * np.sin(word), 0.05 * np.sin(word + 7 * rows["label"][row]))
    noise = rng.standard_normal((2, len(word)), np.float32)
    score = (strength * (1 + 0.3 * noise[0]) + 0.1 * noise[1]).astype(np.float32).astype(np.float64)
    order = np.lexsort((position, -score, row))
    norm = np.sqrt(np.bincount(row, score**2, len(sizes)))
    return {"offsets": offsets, "norm": norm, "word": word[order], "start": 8 * position[order], "score": score[order]}


def _make_column(
    field: pa.Field, bucket: int, shape: Shape, key: str, rows: dict[str, NDArray[Any]], found: dict[str, NDArray[Any]],
    rng: np.random.Generator,
) -> pa.Array:  # fmt: skip
    """Return one column of `explanations`."""
    count, explained = len(rows["split"]), rows["explained"]
    number = bucket * shape.chunk_documents + rows["document"]
    status = np.where(explained, "explained", np.where(rows["rejected"], "rejected", "no_label"))

    def choose(names: list[str], places: NDArray[np.int64], where: NDArray[np.bool_]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(places, mask=~where), names).cast(pa.string())

    every = np.ones(count, bool)
    made: dict[str, Any] = {
        "explain_key": lambda: choose(shape.explain_keys, rows["split"], every),
        "label": lambda: choose(shape.label_names, rows["label"], explained),
        "corpus_key": lambda: pa.array([key] * count),
        "increment": lambda: pa.array(np.zeros(count), pa.int32()),
        "bucket": lambda: pa.array(np.full(count, bucket), pa.int32()),
        "split": lambda: pa.array(rows["split"], pa.int32()),
        "doc_id": lambda: pa.array([f"document {n}" for n in number]),
        "text_digest": lambda: pa.array([hashlib.sha256(b"%d" % n).hexdigest() for n in number]),
        "status": lambda: pa.array(status),
        "reason": lambda: pa.array(np.full(count, "empty_text"), mask=~rows["rejected"]),
        "label_rank": lambda: pa.array(rows["label_rank"]),
        "probability": lambda: pa.array(rows["probability"], mask=~explained),
        "token_norm": lambda: pa.array(found["norm"], mask=~explained),
        "words": lambda: pa.ListArray.from_arrays(
            pa.array(found["offsets"], pa.int32()), _make_words(shape, found, field)
        ),
    }
    if field.name in made:
        return made[field.name]().cast(field.type)
    constant = {"method": "integrated_gradients.v1", "target": "logit", "accuracy": "document"}.get(field.name)
    if constant is not None:
        return pa.array(np.full(count, constant), mask=~explained)
    if field.type == pa.float64():
        return pa.array(rng.random(count), mask=~explained)
    if field.type == pa.int32():
        return pa.array(rng.integers(20, 200, count), pa.int32(), mask=~explained)
    return pa.nulls(count, field.type)


def _make_words(shape: Shape, found: dict[str, NDArray[Any]], field: pa.Field) -> pa.Array:
    names = _list_vocabulary(shape.vocabulary + shape.labels * _TOPIC_WORDS)
    words = names.take(pa.array(found["word"]))
    ends = found["start"] + pa.compute.utf8_length(words).to_numpy()
    kinds = field.type.value_type
    return pa.StructArray.from_arrays(
        [words, pa.array(found["start"], pa.int32()), pa.array(ends, pa.int32()), pa.array(found["score"])],
        fields=list(kinds),
    )
