"""What runs in a Python worker for an evaluation: explanations with their texts in, traces of deletions out.

Like `lexplain.executor` it knows neither Spark nor MLflow. Importing it must not import torch: Spark imports it to
unpickle a task, and only then is the task's device chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lexplain.executor import ExplainTask, ModelTask, choose_budget, decode_document, open_model
from lexplain.words import Word

if TYPE_CHECKING:
    from lexplain.faithfulness import DeletionTracer, ScoredText, Trace

DELETIONS = pa.schema(
    [
        ("explain_key", pa.string()), ("corpus_key", pa.string()), ("increment", pa.int32()), ("bucket", pa.int32()),
        ("doc_id", pa.string()), ("text_digest", pa.string()), ("label", pa.string()), ("protocol", pa.string()),
        ("sizes", pa.list_(pa.int32())), ("whole", pa.float64()), ("without", pa.list_(pa.float64())),
        ("alone", pa.list_(pa.float64())), ("predicted", pa.list_(pa.string())), ("reason", pa.string()),
    ]
)  # fmt: skip
"""One row an explanation and protocol."""

REMOVED = pa.struct(
    [
        ("list", pa.string()), ("draw", pa.int32()), ("n_words", pa.int32()), ("probability", pa.float64()),
        ("predicted", pa.string()),
    ]
)  # fmt: skip
CLASS_DELETIONS = pa.schema(
    [
        ("keyword_key", pa.string()), ("explain_key", pa.string()), ("corpus_key", pa.string()), ("increment", pa.int32()),
        ("bucket", pa.int32()), ("doc_id", pa.string()), ("text_digest", pa.string()), ("label", pa.string()),
        ("whole", pa.float64()), ("removed", pa.list_(REMOVED)), ("reason", pa.string()),
    ]
)  # fmt: skip
"""One row an explanation."""


@dataclass(frozen=True)
class WordList:
    """Words that are taken away together.

    Attributes:
        label: Whose keywords they are, or stand in for.
        side: Half of the documents, 0 or 1, that they come of.
        draw: Number of the random draw; None for the keywords themselves.
        words: Word keys.
    """

    label: str
    side: int
    draw: int | None
    words: frozenset[str]


# Texts whose readings are made together: some thousands of short lists of token ids.
_TEXTS_TOGETHER = 16

PLACE = ("explain_key", "corpus_key", "increment", "bucket", "doc_id", "text_digest", "label")
"""Columns that tell an explanation from any other."""


def deletion_batches(
    batches: Iterator[pa.RecordBatch], *, task: ExplainTask, protocols: tuple[str, ...], device: str
) -> Iterator[pa.RecordBatch]:
    """Take words away from explained texts, by what explanations say of them.

    Args:
        batches: Explanations: explain_key, corpus_key, increment, bucket, doc_id, text_digest, label, words, and their text.
        task: The models that were explained, and the windows.
        protocols: Names out of `lexplain.faithfulness.PROTOCOLS`.
        device: As `choose_device` returns it.

    Yields:
        Batches of `DELETIONS`; a text that fits no memory, or whose logits are not finite, has rows with a reason.
    """
    from lexplain.faithfulness import PROTOCOLS

    def trace(rows: Sequence[Mapping[str, Any]], tracer: DeletionTracer) -> Iterator[dict[str, Any]]:
        found = tracer.trace([_read(row, task) for row in rows], [PROTOCOLS[name] for name in protocols])
        for row, traces in zip(rows, found, strict=True):
            for number, protocol in enumerate(protocols):
                yield _place(row) | {"protocol": protocol} | _tell(traces, number, tracer.labels)

    yield from _map_rows(batches, task, device, trace, DELETIONS)


def removal_batches(
    batches: Iterator[pa.RecordBatch], *, task: ExplainTask, keyword_key: str, lists: Sequence[WordList], device: str
) -> Iterator[pa.RecordBatch]:
    """Take lists of words away from explained texts: those of the half of documents that a text is not of.

    Args:
        batches: Explanations: explain_key, corpus_key, increment, bucket, doc_id, text_digest, label, `side`, and their text.
        task: The models that were explained, and the windows.
        keyword_key: Names the keyword table that the lists are of.
        lists: All of them; of random words a text meets those of its own label.
        device: As `choose_device` returns it.

    Yields:
        Batches of `CLASS_DELETIONS`; a text that fits no memory, or whose logits are not finite, has a row with a reason.
    """

    def remove(rows: Sequence[Mapping[str, Any]], tracer: DeletionTracer) -> Iterator[dict[str, Any]]:
        chosen = [
            [each for each in lists if each.side != row["side"] and (each.draw is None or each.label == row["label"])]
            for row in rows
        ]
        texts = [decode_document(row["text"], task.max_characters) for row in rows]
        found = tracer.remove(texts, [[each.words for each in mine] for mine in chosen])
        for row, mine, removal in zip(rows, chosen, found, strict=True):
            known: dict[str, Any] = {"reason": "no_logits"}
            if removal is not None:
                label = tracer.labels.index(row["label"])
                known = {"whole": float(removal.whole[label]), "removed": [
                    {"list": each.label, "draw": each.draw, "n_words": count, "probability": float(without[label]),
                     "predicted": tracer.labels[int(without.argmax())]}
                    for each, count, without in zip(mine, removal.n_words, removal.without, strict=True)
                ]}  # fmt: skip
            yield _place(row) | {"keyword_key": keyword_key} | known

    yield from _map_rows(batches, task, device, remove, CLASS_DELETIONS)


def _map_rows(
    batches: Iterator[pa.RecordBatch], task: ExplainTask, device: str,
    work: Callable[[Sequence[Mapping[str, Any]], DeletionTracer], Iterator[dict[str, Any]]], schema: pa.Schema,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Yield what is made of the rows, those of one model some at a time."""
    for batch in batches:
        rows = batch.to_pylist()
        for model in task.models:
            mine = [row for row in rows if row["explain_key"] == model.explain_key]
            if not mine:
                continue
            tracer = _open_tracer(task, model, device)
            for start in range(0, len(mine), _TEXTS_TOGETHER):
                made = list(work(mine[start : start + _TEXTS_TOGETHER], tracer))
                yield pa.RecordBatch.from_pylist(made, schema=schema)


def _open_tracer(task: ExplainTask, model: ModelTask, device: str) -> DeletionTracer:
    from lexplain.faithfulness import DeletionTracer

    return DeletionTracer(
        open_model(task, model, device), max_tokens=task.max_tokens, overlap=task.overlap, max_windows=task.max_windows,
        budget_tokens=task.budget_tokens or choose_budget(device),
    )  # fmt: skip


def _place(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in PLACE}


def _read(row: Mapping[str, Any], task: ExplainTask) -> ScoredText:
    from lexplain.faithfulness import ScoredText

    words = [(Word(word["word"], word["start"], word["end"]), word["score"]) for word in row["words"]]
    words.sort(key=lambda pair: pair[0].start)
    return ScoredText(decode_document(row["text"], task.max_characters), row["label"], words)


def _tell(traces: Sequence[Trace] | None, number: int, labels: Sequence[str]) -> dict[str, Any]:
    if traces is None:
        return {"reason": "no_logits"}
    trace = traces[number]
    return {
        "sizes": trace.sizes.tolist(), "whole": trace.whole, "without": trace.without.tolist(),
        "alone": None if trace.alone is None else trace.alone.tolist(),
        "predicted": [labels[label] for label in ([] if trace.predicted is None else trace.predicted)],
    }  # fmt: skip
