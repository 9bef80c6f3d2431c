"""What runs in a Python worker for an evaluation: explanations with their texts in, traces of deletions out.

Like `lexplain.executor` it knows neither Spark nor MLflow. Importing it must not import torch: Spark imports it to
unpickle a task, and only then is the task's device chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lexplain.executor import ExplainTask, ModelTask, choose_budget, decode_document, open_model
from lexplain.words import Word

if TYPE_CHECKING:
    from lexplain.faithfulness import ScoredText, Trace

DELETIONS = pa.schema(
    [
        ("explain_key", pa.string()), ("corpus_key", pa.string()), ("increment", pa.int32()), ("bucket", pa.int32()),
        ("doc_id", pa.string()), ("text_digest", pa.string()), ("label", pa.string()), ("protocol", pa.string()),
        ("sizes", pa.list_(pa.int32())), ("whole", pa.float64()), ("without", pa.list_(pa.float64())),
        ("alone", pa.list_(pa.float64())), ("predicted", pa.list_(pa.string())), ("reason", pa.string()),
    ]
)  # fmt: skip
"""One row an explanation and protocol."""

# Texts whose readings are made together: some thousands of short lists of token ids.
_TEXTS_TOGETHER = 16

_PLACE = ("explain_key", "corpus_key", "increment", "bucket", "doc_id", "text_digest", "label")


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
    for batch in batches:
        rows = batch.to_pylist()
        for model in task.models:
            mine = [row for row in rows if row["explain_key"] == model.explain_key]
            for start in range(0, len(mine), _TEXTS_TOGETHER):
                yield _trace(mine[start : start + _TEXTS_TOGETHER], task, model, protocols, device)


def _trace(
    rows: Sequence[Mapping[str, Any]], task: ExplainTask, model: ModelTask, protocols: tuple[str, ...], device: str
) -> pa.RecordBatch:
    from lexplain.faithfulness import PROTOCOLS, DeletionTracer

    classifier = open_model(task, model, device)
    tracer = DeletionTracer(
        classifier, max_tokens=task.max_tokens, overlap=task.overlap, max_windows=task.max_windows,
        budget_tokens=task.budget_tokens or choose_budget(device),
    )  # fmt: skip
    texts = [_read(row, task) for row in rows]
    found = tracer.trace(texts, [PROTOCOLS[name] for name in protocols])
    made = [
        {name: row[name] for name in _PLACE} | {"protocol": protocol} | _tell(traces, number, classifier.labels)
        for row, traces in zip(rows, found, strict=True)
        for number, protocol in enumerate(protocols)
    ]
    return pa.RecordBatch.from_pylist(made, schema=DELETIONS)


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
