"""The kernel on a GPU beside the CPU: the same scores, real lack of memory, several processes, the device that Spark names."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from core.models import LINES, Shelf
from core.test_executor import make_task, model_task, stage
from lexplain import executor
from lexplain.errors import DeviceError
from lexplain.executor import ExplainTask, ModelCache, choose_device, explain_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

TEXTS = tuple(" ".join(LINES[: 1 + number % 4]) + f" {number}" for number in range(24))
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("integrated_gradients", {}), ("integrated_gradients", {"rule": "midpoint", "nodes": 9}), ("saliency", {}), ("lrp", {}),
    ("smoothgrad", {"samples": 4}), ("occlusion", {}), ("random", {}), ("marc", {"steps": 20}),
    ("discretized_integrated_gradients", {"steps": 5, "neighbours": 6}), ("sequential_integrated_gradients", {"nodes": 4}),
    ("uniform_discretized_integrated_gradients", {"steps": 5, "neighbours": 6}),
    ("captum.layer_integrated_gradients", {}), ("captum.gradient_shap", {}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelCache]:
    cache = ModelCache()
    monkeypatch.setattr(executor, "MODELS", cache)
    yield cache
    del cache
    gc.collect()
    torch.cuda.empty_cache()


def task_of(folder: Path, name: str, options: dict[str, Any], **changes: Any) -> ExplainTask:
    from lexplain.methods import find_method

    method = find_method(name)
    return make_task(model_task(folder), method=method.id, options=method.complete_options(options), **changes)


def explain(task: ExplainTask, device: str, texts: tuple[str, ...] = TEXTS) -> list[dict[str, Any]]:
    return [row for batch in explain_batches(iter([stage(texts)]), task, device) for row in batch.to_pylist()]


def in_order(row: dict[str, Any]) -> np.ndarray:
    return np.array([word["score"] for word in sorted(row["words"], key=lambda word: word["start"])])


def differences(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> np.ndarray:
    """L2 of the difference of each document's scores, as a share of the first's."""
    assert [(row["doc_id"], row["label"], row["status"]) for row in first] == [
        (row["doc_id"], row["label"], row["status"]) for row in second
    ]
    assert all(row["status"] == "explained" for row in first)
    return np.array([
        np.linalg.norm(in_order(one) - in_order(other)) / np.linalg.norm(in_order(one))
        for one, other in zip(first, second, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "textcnn"])
def test_a_gpu_gives_the_scores_of_the_cpu(shelf: Shelf, family: str, name: str, options: dict[str, Any]) -> None:
    task = task_of(shelf.folder(family), name, options)
    found = differences(explain(task, "cpu"), explain(task, "cuda:0"))
    assert found.max() < (0.02 if name == "marc" else 1e-3)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_short_body_stays_near(shelf: Shelf, family: str) -> None:
    options = {"rule": "midpoint", "nodes": 16}
    long = explain(task_of(shelf.folder(family), "integrated_gradients", options), "cpu")
    short = explain(task_of(shelf.folder(family), "integrated_gradients", options, precision="bfloat16"), "cuda:0")
    same = [(one, other) for one, other in zip(long, short, strict=True) if one["label"] == other["label"]]
    assert len(same) > len(long) / 2
    assert np.median(differences(*map(list, zip(*same, strict=True)))) < 0.15


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose passes need real memory: a BERT of 12 layers, drawn."""
    folder = Shelf(tmp_path_factory.mktemp("wide")).folder("bert")
    config = transformers.AutoConfig.from_pretrained(
        folder, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_real_lack_of_memory_halves_the_budget(wide: Path, models: ModelCache) -> None:
    """What did not fit at first is explained with smaller passes, and the next batch starts with those."""
    texts = tuple(" ".join(LINES[:3] * 2) + f" {number}" for number in range(200))
    options = {"rule": "midpoint", "nodes": 24}
    roomy = explain(task_of(wide, "integrated_gradients", options, budget_tokens=2048), "cuda:0", texts)
    models.budgets.clear()
    torch.cuda.empty_cache()
    free = torch.cuda.memory_allocated() + 2 * 2**30
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.get_device_properties(0).total_memory)
    try:
        task = task_of(wide, "integrated_gradients", options, budget_tokens=2**20)
        tight = explain(task, "cuda:0", texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (budget,) = models.budgets.values()
    assert 64 < budget < 2**20
    assert differences(roomy, tight).max() < 1e-3


def _explain_there(task: ExplainTask, queue: Any) -> None:
    queue.put(explain(task, "cuda:0"))


def test_two_processes_share_a_card(shelf: Shelf) -> None:
    task = task_of(shelf.folder("bert"), "integrated_gradients", {})
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_explain_there, args=(task, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    expected = explain(task, "cpu")
    for each in found:
        assert differences(expected, each).max() < 1e-3


def test_the_device_is_the_one_that_spark_names() -> None:
    last = torch.cuda.device_count() - 1
    assert choose_device("auto", [str(last)], local_partition=None) == f"cuda:{last}"
    assert choose_device("gpu", [], local_partition=last + 2) == f"cuda:{(last + 2) % (last + 1)}"
    assert choose_device("cpu", ["0"], local_partition=None) == "cpu"
    with pytest.raises(DeviceError, match="is none of the"):
        choose_device("auto", [str(last + 1)], local_partition=None)
