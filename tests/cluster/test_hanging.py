"""Calls of a model that hang, and such that only take long, on a cluster: the first are stopped and tried again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import transformers
import yaml

from cluster.history import History
from core.models import CLUES, save_classifier
from core.test_plugins import lay_package
from lexplain.session import fetch_jars
from spark.planted import make_plan, plant, write_json
from standalone import REPOSITORY, Standalone

# Of a package of its own, as a user's method is. What it was asked to do it reads from its options.
RELUCTANT = '''
import time
from pathlib import Path

import torch

from lexplain.methods import Attribution, Evaluate, Inputs, method


@method(version=1, cite="none")
def reluctant(
    evaluate: Evaluate, inputs: Inputs, *, marked: int = 0, folder: str = "", hangs: int = 0, pauses: int = 0
) -> Attribution:
    """Return the gradient along the line; at a text with a marked token hang so many times, or make slow passes."""
    rows = torch.arange(len(inputs.x))
    ends = torch.ones(len(rows), dtype=torch.float64)
    if (inputs.ids == marked).any():
        for number in range(hangs):
            try:
                (Path(folder) / f"hang {number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            time.sleep(1_000_000)
        for _ in range(pauses):
            time.sleep(4)
            evaluate.logits(rows, ends)
    _, scores = evaluate.directional(rows, ends)
    return Attribution.from_scores(scores, evaluate, inputs, evaluations=1)
'''
MARK = "coach"  # a token of its own, which no other document has
N_DOCUMENTS = 60
IDLE_SECONDS = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    fetch_jars()
    folder = tmp_path_factory.mktemp("hanging")
    save_classifier(folder / "model", "bert", labels=list(CLUES))
    documents = plant(N_DOCUMENTS - 1, seed=6)
    documents.append({"doc_id": "marked", "text": f"the {MARK} said the bank was new", "labels": ["NA"]})
    write_json(folder / "corpus.jsonl", documents)
    lay_package(folder / "site", "reluctant", RELUCTANT)
    path = [str(folder / "site"), str(REPOSITORY / "lib")]
    cluster = Standalone(folder, PYTHONPATH=os.pathsep.join(path))
    try:
        cluster.start_worker("worker")
        yield cluster
    finally:
        cluster.stop()


def run(cluster: Standalone, name: str, **options: Any) -> tuple[int, str, History]:
    """Run a plan whose method does as the options say; return exit code, what was said, and the explanations."""
    folder = cluster.folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    marked = tokenizer.convert_tokens_to_ids(MARK)
    assert marked != tokenizer.unk_token_id
    source = {"path": str(folder / "corpus.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    plan = make_plan(
        folder, name=name, training=None, models={"uris": [str(folder / "model")], "corpus": "unseen"}, method=None,
        mlflow={"enabled": False}, sink={"path": str(folder / name)},
        execution={"device": "cpu", "threads": 1, "chunk_documents": 20, "idle_timeout_seconds": IDLE_SECONDS},
    )  # fmt: skip
    marks = folder / f"{name} marks"
    marks.mkdir(exist_ok=True)
    plan |= {
        "corpus": source,
        "method": {"id": "reluctant", "options": {"marked": marked, "folder": str(marks), **options}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(plan))
    log = folder / f"{name}.log"
    job = REPOSITORY / "jobs" / "attribute.py"
    process = cluster.submit(log, job, str(path), settings={"spark.task.maxFailures": "2"})
    code = process.wait(timeout=900)
    return code, log.read_text(errors="replace"), History(folder / name / "explanations").read()


def test_a_call_that_hangs_once_is_stopped_and_its_chunk_made_by_another_worker(cluster: Standalone) -> None:
    code, said, history = run(cluster, "once", hangs=1)
    assert code == 0, said
    assert "Lost task" in said
    assert {row["status"] for row in history.rows().to_pylist()} == {"explained"}
    assert len(history.rows()) == N_DOCUMENTS
    assert all(len(commits) == 1 for commits in history.commits_by_chunk().values())
    # where it hung stands in the executor's log
    logs = "".join(path.read_text(errors="replace") for path in (cluster.folder / "worker").rglob("stderr"))
    assert "reluctant.py" in logs
    assert "Timeout (0:00:15)!" in logs
    assert f"Terminating Python worker process due to idle timeout (timeout: {IDLE_SECONDS} seconds)" in logs


def test_a_call_that_hangs_each_time_ends_the_job_and_the_same_command_goes_on(cluster: Standalone) -> None:
    code, said, history = run(cluster, "twice", hangs=2)
    assert code == 1, said
    assert f"execution.idle_timeout_seconds={IDLE_SECONDS}, or it crashed" in " ".join(said.split()), said
    before = history.commits_by_chunk()
    code, said, history = run(cluster, "twice", hangs=2)
    assert code == 0, said
    after = history.commits_by_chunk()
    assert {chunk: after[chunk] for chunk in before} == before
    assert all(len(commits) == 1 for commits in after.values())
    assert len(history.rows()) == N_DOCUMENTS


def test_a_long_document_whose_model_gets_on_is_left_alone(cluster: Standalone) -> None:
    code, said, history = run(cluster, "slow", pauses=2 * IDLE_SECONDS // 4)
    assert code == 0, said
    assert "Lost task" not in said
    assert len(history.rows()) == N_DOCUMENTS
