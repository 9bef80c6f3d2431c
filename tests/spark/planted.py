"""A corpus in which one planted word decides each class, a tiny model that can learn it, and plans over both."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pyspark.sql import SparkSession
from rich.console import Console

from core.models import CLUES, FILLER
from lexplain.errors import LimitError
from lexplain.methods import find_method
from lexplain.pipeline import Run, open_run
from lexplain.plan import Plan
from lexplain.terminal import StageProgress

WORDS = [*FILLER, "final", "cup"]


def plant(n: int, *, seed: int, labels_per_text: Sequence[int] = (1,)) -> list[dict[str, Any]]:
    """Return n documents as doc_id, text and labels."""
    draw = random.Random(seed)
    documents = []
    for number in range(n):
        names = draw.sample(list(CLUES), labels_per_text[number % len(labels_per_text)])
        words = draw.choices(WORDS, k=draw.randint(6, 14)) + [CLUES[name] for name in names] * 2
        draw.shuffle(words)
        documents.append({"doc_id": f"{seed}-{number}", "text": " ".join(words) + ".", "labels": names})
    return documents


def write_json(path: Path, documents: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def make_plan(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a plan over `folder`: training.jsonl, the corpus the same file, base model, three splits."""
    source = {"path": str(folder / "training.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    plan: dict[str, Any] = {
        "name": "planted",
        "corpus": source,
        "training": source,
        "models": {"base": str(folder / "base"), "splits": 3, "epochs": 12, "patience": 12, "learning_rate": 3e-3,
                   "batch_size": 8},
        "method": {"options": {"rule": "midpoint", "nodes": 8}},
        "text": {"max_tokens": 32, "overlap": 0, "max_windows": 1},
        "keywords": {"min_df": 2},
        "execution": {"chunk_documents": 80, "device": "cpu"},
        "sink": {"path": str(folder / "tables")},
    }  # fmt: skip
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(plan.get(key), dict) and key != "models"
        plan[key] = {**plan[key], **value} if merge else value
    return {key: value for key, value in plan.items() if value is not None}


def load_plan(plan: Mapping[str, Any], *, check_files: bool = True) -> Plan:
    return Plan.parse(yaml.safe_dump(dict(plan)), find_method, check_files=check_files)


def stop_plan(spark: SparkSession, plan: Mapping[str, Any], stages: Callable[[Run], object]) -> Run:
    """Start a run and stop it after some stages."""
    with suppress(LimitError), open_run(spark, load_plan(plan), find_method, RecordedProgress()) as run:
        stages(run)
        raise LimitError("stopped by the test")
    return run


def run_plan(
    spark: SparkSession,
    plan: Mapping[str, Any],
    *,
    stages: Sequence[str] = ("fine_tune", "attribute", "aggregate"),
    check_files: bool = True,
) -> Run:
    """Run stages of a plan as the command line does; what was printed is in `run.progress.text`."""
    progress = RecordedProgress()
    with open_run(spark, load_plan(plan, check_files=check_files), find_method, progress) as run:
        for stage in stages:
            getattr(run, stage)()
        run.finish("finished")
    return run


class RecordedProgress(StageProgress):
    """The real progress, printing into a string."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        super().__init__(Console(file=self.stream, width=200))

    @property
    def text(self) -> str:
        return self.stream.getvalue()
