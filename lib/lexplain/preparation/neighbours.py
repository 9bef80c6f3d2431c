"""Reference documents of the models, indexed in files beside the tables and listed in the table `neighbours`.

Driver only, apart from the closures that it sends to the executors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lexplain.attribution import ExplainedModel, Progress, as_tasks, make_task
from lexplain.corpus import Staged
from lexplain.devices import map_on_devices
from lexplain.errors import MethodError
from lexplain.executor import ExplainTask
from lexplain.keys import neighbours_key
from lexplain.neighbours import Reference, ReferenceIndex, choose_layer
from lexplain.plan import FindMethod, Plan
from lexplain.preparation.folders import prepared_folder
from lexplain.sampling import REFERENCES_DDL, reference_batches
from lexplain.schema import TABLES
from lexplain.tables import Tables, quote_list, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

MOST_DOCUMENTS = 5_000
"""Documents of an index at most: enough for near ones, and a bound on what a run costs before it starts."""

LAYER_DOCUMENTS = 500
"""Documents that a layer is chosen by at most."""

# Of these, what one task measures.
_TASK_DOCUMENTS = 32


def find_neighbours(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel]
) -> list[ExplainedModel]:
    """Return the models with the paths of their indexes, as far as there are any; a file that is lost is told."""
    files = _list_files(tables, plan, find_method, models)
    for path in files.values():
        if not path.is_file():
            logging.getLogger(__name__).warning(
                "neighbours=%r is not there. Until it is, explain(text) fails. Put the file back, or explain new "
                "documents: a run that has documents to explain makes it again",
                str(path),
            )
    there = {digest: str(path) for digest, path in files.items() if path.is_file()}
    return [replace(model, prepared=there.get(model.digest)) for model in models]


def _list_files(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel]
) -> dict[str, Path]:
    """Return the files of the table by model digest, whether they are there or not."""
    folder = prepared_folder(tables, plan)
    assert folder is not None  # the plan's check saw to it
    keys = {neighbours_key(plan, find_method, model.digest): model.digest for model in models}
    rows = tables.read("neighbours").where(f"neighbours_key IN ({quote_list(list(keys))})")
    found = rows.select("neighbours_key", "file").collect()
    return {keys[row["neighbours_key"]]: folder / row["file"] for row in found}


def index_neighbours(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel], corpus: Staged,
    training: Staged | None, progress: Progress,
) -> list[ExplainedModel]:  # fmt: skip
    """Return the models with the paths of their indexes; those that are missing are made and committed.

    The references of a model that was fine-tuned here are its own training half; of one that was brought, the corpus.
    An index is made once and stays: texts explained later are compared with the same documents. Only one whose file is
    lost is made again.

    Args:
        tables: The sink.
        plan: Method, windows and device.
        find_method: Registry lookup.
        models: Models to explain.
        corpus: What they explain.
        training: What they were trained on; None where the models were brought.
        progress: Told of the models.

    Raises:
        MethodError: A model gives no document a label.

    Note:
        Cost: at most 5000 documents a model, explained by the base method; with `layer: auto` a forward pass more of
        500. The driver holds the references of one model, about 6 KB a document.
    """
    files = _list_files(tables, plan, find_method, models)
    missing = [model for model in models if model.digest not in files or not files[model.digest].is_file()]
    if missing:
        progress.start("index neighbours", len(missing), "models")
        for model in missing:
            # models that were brought may come with `training` too, for its labels
            source = corpus if training is None or model.drawn is None else training
            _index(tables, plan, find_method, model, source, lost=model.digest in files)
            progress.advance(1)
        progress.finish(f"{len(missing)} models")
    return find_neighbours(tables, plan, find_method, models)


def _index(
    tables: Tables, plan: Plan, find_method: FindMethod, model: ExplainedModel, source: Staged, *, lost: bool
) -> None:
    """Make a model's index; of jobs that do so at once the first one's row decides which file is read.

    Where the file of a row is lost, the new row takes its place.
    """
    key = neighbours_key(plan, find_method, model.digest)
    # Labels are those predicted, whatever the plan explains.
    # An index that is lost is none to open.
    task = replace(make_task(tables.spark, plan, find_method, as_tasks([replace(model, prepared=None)])), top_k=None)
    layer, precisions = task.options["layer"], None
    if layer == "auto":
        sample = _measure(tables, plan, task, _draw(tables, model, source, LAYER_DOCUMENTS), None)
        if sample:
            layer, precisions = choose_layer(
                np.stack([each.vectors for each in sample]), np.array([each.label for each in sample])
            )
        else:
            layer = 0  # there will be no reference either
    assert isinstance(layer, int)  # the plan's check saw to it
    references = _measure(tables, plan, task, _draw(tables, model, source, MOST_DOCUMENTS), layer)
    try:
        index = ReferenceIndex.build(references, layer)
    except MethodError as error:
        raise MethodError(f"model {model.folder!r}: {error}") from error
    folder = prepared_folder(tables, plan)
    assert folder is not None  # the plan's check saw to it
    values = {
        "neighbours_key": key, "model_digest": model.digest, "corpus_key": source.key, "n_references": len(references),
        "layer": layer, "layer_precision": precisions, "file": index.save(folder).name,
    }  # fmt: skip
    rows = tables.spark.createDataFrame([values], TABLES["neighbours"].schema)
    if lost:
        tables.replace(rows, "neighbours", where=f"neighbours_key = {quote_text(key)}")
    else:
        tables.add_first(rows, "neighbours", unless=f"present.neighbours_key = {quote_text(key)}")


def _draw(tables: Tables, model: ExplainedModel, source: Staged, most: int) -> DataFrame:
    """Return the first documents by text digest, which is at random, as `reference_batches` takes them."""
    known = "defect IS NULL"
    if model.drawn is not None:
        known += f" AND size(labels) > 0 AND {model.drawn.sql('text_digest')}"
    staged = tables.read("staged").where(f"{source.where} AND {known}")
    # Digests are sorted and copies dropped before the texts come along: there may be millions.
    digests = staged.select("text_digest").distinct().orderBy("text_digest").limit(most)
    drawn = staged.join(digests.hint("broadcast"), "text_digest", "left_semi").dropDuplicates(["text_digest"])
    return drawn.selectExpr("text", "text_digest", "defect", f"array({model.split}) AS splits")


def _measure(tables: Tables, plan: Plan, task: ExplainTask, documents: DataFrame, layer: int | None) -> list[Reference]:
    """Return what executors make of documents, in an order that does not depend on them."""
    tasks = max(1, -(-documents.count() // _TASK_DOCUMENTS))
    ordered = documents.repartition(tasks, "text_digest").sortWithinPartitions("text_digest")
    work = partial(reference_batches, task=task, layer=layer)
    rows = map_on_devices(ordered, work, REFERENCES_DDL, plan.execution.device).toArrow()
    references = []
    for text, label, foremost, vectors, *tokens in zip(*rows.columns, strict=True):
        ids, words, scores = (each.values.to_numpy() for each in tokens)
        states = vectors.values.flatten().to_numpy().reshape(len(vectors.values), -1)
        references.append(Reference(text.as_py(), label.as_py(), foremost.as_py(), states, ids, words, scores))
    return sorted(references, key=lambda each: (each.text, not each.foremost, each.label))
