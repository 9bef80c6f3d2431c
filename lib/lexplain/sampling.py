"""What runs in a Python worker before a method explains: documents sampled, tokens listed, word paths searched.

Like `lexplain.executor` it knows neither Spark nor MLflow. Importing it must not import torch: Spark imports it to
unpickle a task, and only then is the task's device chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from lexplain.executor import ExplainTask, open_model, read_batches

SAMPLES = pa.schema(
    [
        ("split", pa.int32()),
        ("label", pa.string()),
        ("words", pa.list_(pa.string())),
        ("derivatives", pa.list_(pa.float32())),
    ]
)
"""One row a (model, sampled document): a `SampledPath`, its derivatives row after row."""

SAMPLES_DDL = "split INT, label STRING, words ARRAY<STRING>, derivatives ARRAY<FLOAT>"
"""The same, as `mapInArrow` takes it."""

REFERENCES = pa.schema(
    [
        ("text", pa.int64()),
        ("label", pa.int64()),
        ("foremost", pa.bool_()),
        ("vectors", pa.list_(pa.list_(pa.float32()))),
        ("ids", pa.list_(pa.int64())),
        ("words", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
    ]
)
"""One row a `Reference`."""

REFERENCES_DDL = (
    "text BIGINT, label BIGINT, foremost BOOLEAN, vectors ARRAY<ARRAY<FLOAT>>, ids ARRAY<BIGINT>, words ARRAY<BIGINT>, "
    "scores ARRAY<FLOAT>"
)
"""The same, as `mapInArrow` takes it."""

TOKENS = pa.schema([("token_id", pa.int32())])
"""One row a token that some text holds."""

TOKENS_DDL = "token_id INT"
"""The same, as `mapInArrow` takes it."""

VOCABULARIES = pa.schema([("split", pa.int32()), ("baseline_id", pa.int32()), ("embeddings", pa.string())])
"""One row a model: its baseline token, and the digest of its word embeddings."""

VOCABULARIES_DDL = "split INT, baseline_id INT, embeddings STRING"
"""The same, as `mapInArrow` takes it."""

PATHS = pa.schema([("token_id", pa.int32()), ("anchors", pa.list_(pa.int32()))])
"""One row a token: the tokens on its path, from its own side to the baseline's."""

PATHS_DDL = "token_id INT, anchors ARRAY<INT>"
"""The same, as `mapInArrow` takes it."""


def sample_batches(
    batches: Iterator[pa.RecordBatch], *, task: ExplainTask, nodes: int, device: str
) -> Iterator[pa.RecordBatch]:
    """Evaluate sampled documents along their paths: what calibrations are fitted to.

    Args:
        batches: As `explain_batches` takes them.
        task: Models and method.
        nodes: Equally spaced points of each path.
        device: As `choose_device` returns it.

    Yields:
        Batches of `SAMPLES`; a document that cannot be explained gives no row.
    """
    for model, explainer, documents in read_batches(batches, task, device):
        rows = [
            {"split": model.split, "label": path.label, "words": path.words, "derivatives": path.derivatives.ravel()}
            for path in explainer.sample_paths(documents, nodes)
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=SAMPLES)


def reference_batches(
    batches: Iterator[pa.RecordBatch], *, task: ExplainTask, layer: int | None, device: str
) -> Iterator[pa.RecordBatch]:
    """Measure reference documents: what neighbours are found by, and what their words score.

    Args:
        batches: As `explain_batches` takes them.
        task: One model, and the method.
        layer: As in `Explainer.sample_references`.
        device: As `choose_device` returns it.

    Yields:
        Batches of `REFERENCES`; a document that cannot be explained, or has no label, gives no row.
    """
    for _, explainer, documents in read_batches(batches, task, device):
        rows = [
            {name: getattr(one, name) for name in REFERENCES.names} | {"vectors": list(one.vectors)}
            for one in explainer.sample_references(documents, layer)
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=REFERENCES)


def token_batches(batches: Iterator[pa.RecordBatch], *, task: ExplainTask, device: str) -> Iterator[pa.RecordBatch]:
    """List the content tokens of documents, as their explanation will see them.

    Args:
        batches: As `explain_batches` takes them.
        task: Models and windows.
        device: As `choose_device` returns it.

    Yields:
        Batches of `TOKENS`, distinct within each.
    """
    for _, explainer, documents in read_batches(batches, task, device):
        yield pa.RecordBatch.from_pydict({"token_id": explainer.list_tokens(documents)}, schema=TOKENS)


def vocabulary_batches(
    batches: Iterator[pa.RecordBatch], *, task: ExplainTask, device: str
) -> Iterator[pa.RecordBatch]:
    """Tell what the word paths of models depend on.

    Args:
        batches: Column `id`: numbers of models in the task.
        task: Models, and a method with a baseline token.
        device: As `choose_device` returns it.

    Yields:
        Batches of `VOCABULARIES`.
    """
    from lexplain.anchors import digest_vocabulary

    for number in [number for batch in batches for number in batch["id"].to_pylist()]:
        model = task.models[number]
        classifier = open_model(task, model, device)
        row = {
            "split": model.split,
            "baseline_id": classifier.find_token(str(task.options["baseline"])),
            "embeddings": digest_vocabulary(classifier.model),
        }
        yield pa.RecordBatch.from_pylist([row], schema=VOCABULARIES)


def path_batches(batches: Iterator[pa.RecordBatch], *, task: ExplainTask, device: str) -> Iterator[pa.RecordBatch]:
    """Search the paths of tokens through the vocabulary of the task's first model.

    Args:
        batches: Batches of `TOKENS`.
        task: The model, and the method.
        device: As `choose_device` returns it.

    Yields:
        Batches of `PATHS`. Cost: see `lexplain.anchors.AnchorFinder.find`.
    """
    from lexplain.anchors import open_finder, read_vocabulary
    from lexplain.methods.discretized import make_rule

    classifier = open_model(task, task.models[0], device)
    rule = make_rule(task.method, task.options, classifier.find_token(str(task.options["baseline"])))
    finder = open_finder(classifier.model, rule)
    for batch in batches:
        found = finder.find(batch["token_id"].to_numpy().astype(np.int64), lambda: read_vocabulary(classifier.model))
        anchors = pa.array(list(found), pa.list_(pa.int32()))
        yield pa.RecordBatch.from_arrays([batch["token_id"], anchors], schema=PATHS)
