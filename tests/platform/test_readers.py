"""The recipes of docs/readers.md and docs/serve-sql.md as they stand there, in an environment without Spark.

Polars and DuckDB read what a run wrote; a Python client asks `lexplain serve-sql`.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.models import save_classifier
from spark.planted import plant, write_json

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".venv-platform" / "readers" / "bin" / "python"
PAGE = (REPOSITORY / "docs" / "readers.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)

# DuckDB would fetch it; here it comes from a package, at the place where DuckDB looks first.
INSTALL_DELTA = """
import shutil
from pathlib import Path
import duckdb, duckdb_extension_delta
(source,) = Path(duckdb_extension_delta.__file__).parent.rglob("*.duckdb_extension")
place = Path.home() / ".duckdb" / "extensions" / source.parent.name / duckdb.sql("PRAGMA platform").fetchone()[0]
place.mkdir(parents=True)
shutil.copy(source, place)
"""
# Each recipe ends with the table `keywords`.
PRINT = "\nfor row in keywords.rows() if hasattr(keywords, 'rows') else keywords.fetchall():\n    print('row', *row, sep='\\t')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables of two runs under one name, the second with other rules: only its keywords are the latest."""
    folder = tmp_path_factory.mktemp("readers")
    documents = [{"text": document["text"]} for document in plant(40, seed=1)]
    plan = {
        "name": "my-classes", "corpus": {"path": str(write_json(folder / "corpus.jsonl", documents))},
        "models": {"uris": [str(save_classifier(folder / "model", "bert"))], "corpus": "unseen"},
        "method": {"options": {"rule": "midpoint", "nodes": 2}}, "text": {"max_tokens": 32, "overlap": 0},
        "sink": {"path": "lexplain-tables"}, "mlflow": {"enabled": False}, "execution": {"device": "cpu"},
    }  # fmt: skip
    for min_df in (0, 6):
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan | {"keywords": {"min_df": min_df}}), encoding="utf-8")
        lexplain("run", "plan.yaml", folder=folder)
    return folder


def lexplain(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lexplain", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[str]]:
    query = "SELECT label, rank, word, score_mean, selection_frequency FROM keywords_current ORDER BY label, rank"
    rows = [
        line.split("\t")
        for line in lexplain("sql", "--tables", "lexplain-tables", query, folder=folder).splitlines()[1:]
    ]
    every = "SELECT count(*) FROM keywords WHERE kept"
    assert 3 < len(rows) < int(lexplain("sql", "--tables", "lexplain-tables", every, folder=folder).split()[-1])
    return rows


def test_the_page_has_three_recipes() -> None:
    assert [re.findall(r"^(?:import|from) (\w+)", recipe, flags=re.MULTILINE) for recipe in RECIPES] == [
        ["polars"], ["duckdb"], ["duckdb", "deltalake"],
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(3), ids=["polars", "duckdb", "duckdb-deltalake"])
def test_a_recipe_reads_the_keywords_of_the_latest_run(
    number: int, folder: Path, expected: list[list[str]], tmp_path: Path
) -> None:
    script = (INSTALL_DELTA if number == 1 else "") + RECIPES[number] + PRINT
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [PYTHON, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("row\t")]
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert [float(value) for value in row[3:]] == [float(value) for value in other[3:]]


def test_the_python_client_of_serve_sql(folder: Path, expected: list[list[str]]) -> None:
    """The lines of docs/serve-sql.md, with a free port for the one they name."""
    page = (REPOSITORY / "docs" / "serve-sql.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    server = subprocess.Popen(
        [sys.executable, "-m", "lexplain", "serve-sql", "plan.yaml", "--port", port], cwd=folder, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert any("Ctrl-C" in line for line in server.stdout)
        done = subprocess.run(
            [PYTHON, "-c", recipe.replace("10000", port)], capture_output=True, text=True, check=False, timeout=300
        )
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0
    assert done.returncode == 0, done.stderr
    *rows, answer = done.stdout.splitlines()
    assert rows == [f"{label} {rank} {word}" for label, rank, word, *_ in expected if int(rank) <= 3]
    assert re.fullmatch(r"\[\('(business|politics|NA)',\)\]", answer)
