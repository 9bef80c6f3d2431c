"""Every method on executors: documents of several windows and labels, in two tasks, as the kernel explains them here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from core.models import BATCH_TOLERANCE, LINES, Shelf
from core.test_conformance import OURS, SMALL, TOLERANCES, open_explainer
from core.test_executor import make_task, stage
from lexplain.devices import map_on_devices
from lexplain.executor import ExplainTask, ModelTask, explain_batches
from lexplain.methods import find_method
from lexplain.model_store import digest_folder
from lexplain.neighbours import ReferenceIndex
from lexplain.schema import TABLES

TEXTS = tuple(" ".join((LINES * 2)[number % 3 : 3 + number % 5]) for number in range(9))


@pytest.fixture(scope="module")
def index(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference documents of the multi-label model, in a file as a job makes it."""
    explainer = open_explainer(several(shelf), "lafa")
    references = explainer.sample_references(explainer.read_texts(LINES), 1)
    return ReferenceIndex.build(references, 1).save(tmp_path_factory.mktemp("prepared"))


def several(shelf: Shelf) -> Any:
    return shelf.classifier("bert", labels=tuple("abcd"), problem_type="multi_label_classification", seed=1)


def task_of(shelf: Shelf, name: str, prepared: str | None) -> ExplainTask:
    method = find_method(name)
    if method.models == ("textcnn",):
        folder = shelf.folder("textcnn", labels=tuple("abcd"), problem_type="multi_label_classification", seed=1)
    else:
        folder = shelf.folder("bert", labels=tuple("abcd"), problem_type="multi_label_classification", seed=1)
    options = method.complete_options(SMALL.get(name, {}))
    model = ModelTask(0, "key", str(folder), digest_folder(folder), prepared)
    return make_task(model, method=method.id, options=options, max_tokens=24, overlap=6, budget_tokens=600)


@pytest.mark.parametrize("name", OURS)
def test_executors_explain_long_texts_of_several_labels(
    spark: SparkSession, shelf: Shelf, index: Path, name: str
) -> None:
    task = task_of(shelf, name, str(index) if name == "lafa" else None)
    batch = stage(TEXTS)
    here = [row for part in explain_batches(iter([batch]), task, "cpu") for row in part.to_pylist()]
    documents = (
        spark.createDataFrame(pa.Table.from_batches([batch])).repartition(2, "doc_id").sortWithinPartitions("doc_id")
    )
    work = partial(explain_batches, task=task)
    there = map_on_devices(documents, work, TABLES["explanations"].schema, "cpu").toArrow().to_pylist()

    def by_label(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(row["doc_id"], row["label"]): row for row in rows if row["status"] == "explained"}

    found, expected = by_label(there), by_label(here)
    assert found.keys() == expected.keys()
    assert len(there) == len(here)
    assert len({label for _, label in found}) > 1
    assert len(found) > len({document for document, _ in found}), "no document has two labels"
    assert max(row["n_windows"] for row in found.values()) > 1
    for place, row in found.items():
        other = expected[place]
        assert [(word["start"], word["end"]) for word in sorted(row["words"], key=lambda word: word["start"])] == [
            (word["start"], word["end"]) for word in sorted(other["words"], key=lambda word: word["start"])
        ]
        scores, right = (
            np.array([word["score"] for word in sorted(each["words"], key=lambda word: word["start"])])
            for each in (row, other)
        )
        tolerance = TOLERANCES.get(name, BATCH_TOLERANCE) * max(1.0, float(np.abs(right).max()))
        np.testing.assert_allclose(scores, right, rtol=0, atol=tolerance)
        assert (row["n_windows"], row["evaluations"]) == (other["n_windows"], other["evaluations"])
        assert (row["spans"] is None) or find_method(name).mask
