"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LIBRARY = sorted((REPOSITORY / "lib").rglob("*.py"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))

MOST_LINES = 600
MOST_JOB_LINES = 40


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    return {normalise(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normalise(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_constraints_are_pins_and_nothing_else():
    """Not an address, not an option, not an editable install: the file must serve any machine."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][\w.-]*==[\w.!+]+", line)] == []
    assert not [line for line in lines if "://" in line]
    assert len(pinned()) == len(lines)
    assert normalise(PROJECT["project"]["name"]) not in pinned()


def test_every_requirement_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"].values()
    names = required(PROJECT["project"]["dependencies"]).union(*map(required, extras))
    assert names - set(pinned()) == set()


def test_package_is_not_ignored():
    """The stock Python .gitignore has a line `lib/`, which would hide the package."""
    lines = [line.strip() for line in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()]
    assert not {"lib", "lib/", "/lib", "/lib/", "lib/*", "**/lib/"} & set(lines)


def test_plain_install_brings_neither_spark_nor_mlflow():
    plain = required(PROJECT["project"]["dependencies"])
    assert not plain & {"pyspark", "delta-spark", "mlflow", "mlflow-skinny", "pandas", "captum", "databricks-sdk"}
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"pyspark", "delta-spark"} <= required(extras["local"])
    assert "mlflow" in required(extras["mlflow"])


def test_wheel_holds_the_package_at_its_root():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert (wheel["packages"], wheel["sources"]) == (["lib/lexplain"], ["lib"])


@pytest.mark.parametrize("path", LIBRARY, ids=[path.stem for path in LIBRARY])
def test_files_can_be_read_at_once(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_jobs_only_start_the_library():
    jobs = sorted((REPOSITORY / "jobs").glob("*.py"))
    assert jobs
    for path in jobs:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_JOB_LINES, path.name
        assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef | ast.For | ast.While)]


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public classes, functions and methods; what is inside a function is nobody else's."""
    for node in body:
        if isinstance(node, ast.If):
            yield from public(node.body + node.orelse, inside)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield f"{inside}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{inside}{node.name}.")


@pytest.mark.parametrize("path", LIBRARY, ids=[path.stem for path in LIBRARY])
def test_public_names_have_docstrings(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert [name for name, node in public(tree.body) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", LIBRARY, ids=[path.stem for path in LIBRARY])
def test_e17_no_tokenizer_is_known_by_its_marks(path: Path):
    """Words of BERT, GPT-2 and SentencePiece tokens were guessed by "##", "Ġ" and "▁": each fails for the others."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    marks = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        and any(mark in node.value for mark in ("##", "Ġ", "▁"))
    ]  # fmt: skip
    assert marks == []


def test_no_machine_is_named():
    """Paths of somebody's machine, and addresses of registries, do not belong into a project's files."""
    files = [*LIBRARY, *(REPOSITORY / "jobs").glob("*"), *(REPOSITORY / "deploy").rglob("*"), REPOSITORY / "pyproject.toml",
             REPOSITORY / "constraints.txt", REPOSITORY / "Makefile", REPOSITORY / "README.md"]  # fmt: skip
    found = [
        f"{path.name}: {match}"
        for path in files
        if path.is_file()
        for match in re.findall(
            r"/home/\w+|/Users/\w+|/root/|/work/|--(?:extra-)?index-url|--find-links", path.read_text("utf-8")
        )
    ]
    assert found == []
