"""The notebooks, executed from the first cell to the last on a demo of smaller size."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lexplain.demo import write_demo

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SMALLER = {"limit: 450 ": "limit: 150 ", "limit: 960 ": "limit: 360 ", "nodes: 16": "nodes: 8", "max_tokens: 128": "max_tokens: 64",
           "min_df: 5": "min_df: 3", "epochs: 1": "epochs: 20\n  train: head", "learning_rate: 2.0e-4": "learning_rate: 3.0e-3"}  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's tables, made in a minute: frozen encoder, fewer and shorter documents."""
    folder = tmp_path_factory.mktemp("demo")
    plan = write_demo(folder)
    text = plan.read_text(encoding="utf-8")
    for before, after in SMALLER.items():
        assert before in text
        text = text.replace(before, after)
    plan.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lexplain", "run", str(plan)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tables"


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> list[dict[str, Any]]:
    """Execute a notebook with other parameters; return the outputs of all cells."""
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for key, value in parameters.items():
        assert re.search(rf"^{key} = ", cell.source, flags=re.MULTILINE), key
        cell.source += f"\n{key} = {value!r}"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def read_text(outputs: list[dict[str, Any]]) -> str:
    """All text of outputs: printed, as plain text, as HTML."""
    parts = [output.get("text", "") for output in outputs]
    parts += [
        data.get(kind, "")
        for output in outputs
        for data in [output.get("data", {})]
        for kind in ("text/plain", "text/html")
    ]
    return "\n".join(parts)


def count_pictures(outputs: list[dict[str, Any]]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["keywords", "methods", "own-corpus"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_they_are_committed_without_output_and_define_no_functions(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(nbformat.from_dict(notebook))
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        code = "".join(line for line in cell["source"] if not line.startswith("!"))
        assert not [
            node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef)
        ]


def test_keywords(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute("keywords", tmp_path, monkeypatch, TABLES=str(tables))
    assert count_pictures(outputs) == 4
    text = read_text(outputs)
    assert "bbc-topics" in text
    assert len(re.findall(r"<li><code>\w+/\d+</code>.*<mark>", text)) >= 3
    assert re.search(r"<b>sports</b> 0\.\d\d<p>.*<span style='background: rgba\(200, 0, 0", text)


def test_methods(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = execute("methods", tmp_path, monkeypatch, TABLES=str(tables))
    assert count_pictures(outputs) == 2
    text = read_text(outputs)
    assert re.search(r"^\w+, probability 0\.\d{3}$", text, flags=re.MULTILINE)
    assert "integrated_gradients" in text


def test_own_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = "train: head, epochs: 20, learning_rate: 3.0e-3"
    outputs = execute("own-corpus", tmp_path, monkeypatch, DOCUMENTS=240, TRAINING=training)
    text = read_text(outputs)
    assert "my-corpus: no problem found" in text
    assert "all is well" in text
    assert (tmp_path / "my-corpus" / "report.html").stat().st_size > 100_000
    assert "selection_frequency" in text  # why words were dropped
