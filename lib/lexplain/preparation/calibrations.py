"""Calibrations of the models, fitted to a sample of the corpus and kept in the table `calibrations`.

Driver only, apart from the closures that it sends to the executors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lexplain.attribution import ExplainedModel, Progress, as_tasks, make_task, select_owed
from lexplain.calibration import (
    MOST_REFERENCE_ERROR,
    SAMPLE_DOCUMENTS,
    SAMPLE_NODES,
    Calibration,
    SampledPath,
    fit_calibration,
)
from lexplain.corpus import Staged
from lexplain.devices import map_on_devices
from lexplain.errors import MethodError
from lexplain.keys import calibration_key
from lexplain.plan import FindMethod, Plan
from lexplain.sampling import SAMPLES_DDL, sample_batches
from lexplain.schema import TABLES
from lexplain.tables import Tables, quote_list, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Of a sample's documents, what one task evaluates.
_TASK_DOCUMENTS = 12


def _read_calibrations(tables: Tables, keys: Sequence[str]) -> dict[str, str]:
    rows = tables.read("calibrations").where(f"calibration_key IN ({quote_list(keys)})")
    return {
        row["calibration_key"]: row["calibration"] for row in rows.select("calibration_key", "calibration").collect()
    }


def calibrate_models(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel], corpus: Staged,
    training: Staged | None, progress: Progress,
) -> list[ExplainedModel]:  # fmt: skip
    """Return the models with their calibrations; those that are missing are made and committed.

    A calibration is made once for a model, corpus, baseline and window size, on documents of the corpus's first chunks,
    and stays: explanations made later, of more documents, are made like the first.

    Args:
        tables: The sink.
        plan: Method, windows and device.
        find_method: Registry lookup.
        models: Models to explain.
        corpus: What they explain.
        training: What they were trained on; None where the models were brought.
        progress: Told of the sample's documents.

    Raises:
        MethodError: The sample is too small, or the model's gradient too sharp, to calibrate.

    Note:
        Cost: at most 48 documents a model, 33 gradient evaluations each, up to 129 where the gradient is sharp, on
        executors; seconds a model on the driver.
    """
    keys = {model.digest: calibration_key(plan, find_method, model.digest) for model in models}
    there = _read_calibrations(tables, list(keys.values()))
    missing = [model for model in models if keys[model.digest] not in there]
    if missing:
        progress.start("calibrate", len(missing), "models")
        owed = _count_owed(tables, corpus, missing)
        for model in missing:
            count = owed[model.explain_key]
            calibration = _calibrate(tables, plan, find_method, model, corpus, training, count)
            _commit(tables, keys[model.digest], model, corpus, count, calibration)
            progress.advance(1)
        progress.finish(f"{len(missing)} models")
        there = _read_calibrations(tables, list(keys.values()))
    return [replace(model, prepared=there[keys[model.digest]]) for model in models]


def _count_owed(tables: Tables, corpus: Staged, models: Sequence[ExplainedModel]) -> dict[str, int]:
    rows = tables.spark.sql(
        f"SELECT explain_key, sum(n_documents) AS n FROM {tables.name('chunks')}"
        f" WHERE {corpus.where_explained([model.explain_key for model in models])} GROUP BY explain_key"
    ).collect()
    return dict.fromkeys((model.explain_key for model in models), 0) | {
        row["explain_key"]: int(row["n"]) for row in rows
    }


def _calibrate(
    tables: Tables, plan: Plan, find_method: FindMethod, model: ExplainedModel, corpus: Staged,
    training: Staged | None, n_documents: int,
) -> Calibration:  # fmt: skip
    documents = _draw_sample(tables, plan, model, corpus, training)
    task = make_task(tables.spark, plan, find_method, as_tasks([model]))
    for nodes in SAMPLE_NODES:
        work = partial(sample_batches, task=task, nodes=nodes)
        rows = map_on_devices(documents, work, SAMPLES_DDL, plan.execution.device).toArrow().to_pylist()
        sample = [
            SampledPath(
                row["label"], tuple(row["words"]), np.array(row["derivatives"], dtype=np.float64).reshape(nodes, -1)
            )
            for row in rows
        ]
        # In an order of its own: tasks finish as they like.
        sample.sort(key=lambda path: (path.label, tuple(map(str, path.words))))
        try:
            calibration = fit_calibration(_interleave(sample), n_documents=n_documents)
        except MethodError as error:
            raise MethodError(f"model {model.folder!r}: {error}") from error
        if calibration.reference_error <= MOST_REFERENCE_ERROR:
            return calibration
    raise MethodError(
        f"model {model.folder!r}: reference_error={calibration.reference_error:.3f} must be at most "
        f"{MOST_REFERENCE_ERROR} with {nodes} points. The rules would have been fitted to a reference that is off itself. "
        "Write accuracy: document."
    )


def _interleave(sample: Sequence[SampledPath]) -> list[SampledPath]:
    """Deal the labels out evenly: rules are fitted to the first documents, and measured on the last."""
    by_label: dict[str, int] = {}
    places = []
    for path in sample:
        by_label[path.label] = by_label.get(path.label, 0) + 1
        places.append(by_label[path.label])
    counts = [by_label[path.label] for path in sample]
    order = sorted(range(len(sample)), key=lambda number: (places[number] / counts[number], number))
    return [sample[number] for number in order]


def _draw_sample(
    tables: Tables, plan: Plan, model: ExplainedModel, corpus: Staged, training: Staged | None
) -> DataFrame:
    """Return the sampled documents, of as few chunks as hold enough: chunks are random samples themselves."""
    chunks = tables.read("chunks").where(f"{corpus.where} AND explain_key = {quote_text(model.explain_key)}")
    places, found = [], 0
    for row in chunks.where("n_documents > 0").orderBy("increment", "bucket").limit(2 * SAMPLE_DOCUMENTS).collect():
        places.append(f"(increment = {row['increment']} AND bucket = {row['bucket']})")
        found += int(row["n_documents"])
        if found >= 2 * SAMPLE_DOCUMENTS:  # some are no documents, or have no label
            break
    documents = select_owed(tables, plan, [model], corpus, training, f"({' OR '.join(places) or 'FALSE'})")
    drawn = documents.where("size(splits) > 0 AND defect IS NULL").dropDuplicates(["text_digest"])
    drawn = drawn.orderBy("text_digest").limit(SAMPLE_DOCUMENTS)
    tasks = -(-SAMPLE_DOCUMENTS // _TASK_DOCUMENTS)
    return drawn.repartition(tasks, "text_digest").sortWithinPartitions("text_digest")


def _commit(
    tables: Tables, key: str, model: ExplainedModel, corpus: Staged, n_documents: int, calibration: Calibration
) -> None:
    keywords = calibration.keywords
    rule = calibration.rule(keywords.nodes)
    values = {
        "calibration_key": key, "model_digest": model.digest, "corpus_key": corpus.key, "n_documents": n_documents,
        "n_sampled": calibration.n_documents, "reference_error": calibration.reference_error,
        "keyword_nodes": keywords.nodes, "keyword_error_median": rule.error_median,
        "keyword_error_p90": rule.error_p90, "quadrature_share": keywords.quadrature_share,
        "list_overlap": keywords.list_overlap, "sampling_overlap": keywords.sampling_overlap,
        "calibration": calibration.to_json(),
    }  # fmt: skip
    rows = tables.spark.createDataFrame([values], TABLES["calibrations"].schema)
    tables.add_first(rows, "calibrations", unless=f"present.calibration_key = {quote_text(key)}")
