"""What preparations send to executors."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from pyspark import cloudpickle

import lexplain
from lexplain.devices import on_task_device
from lexplain.executor import explain_batches
from lexplain.sampling import path_batches, reference_batches, sample_batches, token_batches, vocabulary_batches

WORK = {
    explain_batches: {},
    sample_batches: {"nodes": 5},
    reference_batches: {"layer": None},
    token_batches: {},
    vocabulary_batches: {},
    path_batches: {},
}


def test_whatever_stages_send_is_here() -> None:
    """Functions of a stage's own module would bring what that imports, which is torch for some."""
    found = []
    for name in ("attribution", "preparation.anchors", "preparation.calibrations", "preparation.neighbours"):
        module = importlib.import_module(f"lexplain.{name}")
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "partial":
                assert isinstance(node.args[0], ast.Name)
                found.append(getattr(module, node.args[0].id))
    assert set(found) == set(WORK)
    assert {work.__module__ for work in found} == {"lexplain.executor", "lexplain.sampling"}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_a_task_is_unpickled_before_torch_is_imported(work: object, tmp_path: Path) -> None:
    """A MIG slice is chosen by the environment, which torch reads when it is imported."""
    made = on_task_device(partial(work, task=None, **WORK[work]), "gpu", False)  # type: ignore[arg-type, index]
    (tmp_path / "task").write_bytes(cloudpickle.dumps(made))
    code = f"""
import pickle, sys
task = pickle.loads(open({str(tmp_path / "task")!r}, "rb").read())
assert callable(task) and "{work.__module__}" in sys.modules
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(Path(lexplain.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    assert callable(pickle.loads((tmp_path / "task").read_bytes()))
