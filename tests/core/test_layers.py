"""Who may import whom, and what an import loads."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lexplain

PACKAGE = Path(lexplain.__file__).parent
PARTS = ("cli", "methods", "preparation")  # folders whose modules form one part

# Bottom up: a module imports from layers below its own, and within its own where that makes no circle.
KERNEL: tuple[tuple[str, ...], ...] = (
    ("errors",),
    (
        "settings",
        "words",
        "splits",
        "model_store",
        "prepared_files",
        "plausibility",
        "overlap",
        "extrapolation",
        "resampling",
    ),
    ("explanation", "local_files", "presets"),
    ("plan", "settling"),
    ("keys", "template"),
    ("classifier", "textcnn", "calibration", "anchors", "neighbours"),
    ("methods", "frozen_encoder"),
    ("finetune",),
    ("passes",),
    ("engine", "faithfulness"),
    ("executor",),
    ("sampling", "deletions", "comparison"),
)
LAYERS = (
    *KERNEL,
    ("evidence",),
    ("schema", "views"),
    ("session", "tables", "tracking"),
    ("text_files",),
    ("sources",),
    ("corpus", "devices"),
    ("attribution", "keywords"),
    ("training", "preparation", "keyword_quality", "sql_function"),
    ("run_record",),
    ("pipeline",),
    ("tracing",),
    ("class_deletion",),
    ("evaluation", "sweep", "drift", "upkeep", "diagnosis"),
    ("terminal", "demo"),
    ("outcome",),
    ("report.contents",),
    ("report.rendering", "report.contestants"),
    ("report.documents",),
    ("report.reading",),
    ("report", "cli"),
    ("__main__",),
)

# Where less is allowed than the layer says.
NARROW: dict[str, set[str]] = {
    "calibration": {"errors", "overlap"},
    "overlap": set(),
    "resampling": set(),
    "extrapolation": set(),
    "settling": {"extrapolation", "overlap"},
    "comparison": {"faithfulness", "resampling"},
    "prepared_files": {"errors"},
    "anchors": {"prepared_files"},
    "neighbours": {"errors", "prepared_files"},
    "methods": {
        "errors",
        "textcnn",
        "calibration",
        "anchors",
        "neighbours",
    },  # a method sees tensors, never text, tokenizers or tables
    "plan": {"errors", "settings", "local_files", "presets"},
    "local_files": {"errors", "model_store"},
    "words": {"errors"},
    "explanation": {"words"},
    "splits": {"errors"},
    "session": {"errors"},
    "evidence": set(),
    "schema": set(),
    "views": {"evidence"},
    "tables": {"errors", "schema", "views"},
    "tracking": {"errors", "finetune", "model_store", "plan"},
    "terminal": {"errors"},
    "outcome": {"tables", "terminal"},
    "report": set(),
    "report.contents": set(),
    "report.rendering": {"errors", "report.contents"},  # tested where there is no Spark
}

# Libraries that only these modules may import, at whatever depth.
OWNERS: dict[str, set[str]] = {
    "torch": {
        "calibration",
        "diagnosis",
        "anchors",
        "classifier",
        "neighbours",
        "textcnn",
        "methods",
        "frozen_encoder",
        "finetune",
        "passes",
        "engine",
        "faithfulness",
        "executor",
        "training",
    },
    "transformers": {"classifier", "textcnn", "frozen_encoder", "finetune", "executor", "tracking"},
    "pyspark": {
        "session",
        "tables",
        "text_files",
        "sources",
        "corpus",
        "training",
        "attribution",
        "devices",
        "sql_function",
        "preparation",
        "keywords",
        "keyword_quality",
        "pipeline",
        "tracing",
        "class_deletion",
        "evaluation",
        "report.documents",
        "report.reading",
    },
    "tokenizers": {"textcnn", "model_store"},
    "delta": {"session", "tables"},
    "mlflow": {"tracking"},
    "py4j": {"session"},
    "pandas": {"sql_function"},
    "captum": {"methods.captum"},
    "icu4py": {"words"},
    "scipy": {"calibration", "resampling", "extrapolation", "drift"},
    "rich": {"terminal", "outcome", "cli"},
    "typer": {"cli"},
    "yaml": {"settings", "template"},
    "jinja2": {"report.rendering"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `lexplain`, without `__init__` itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def part_of(module: str) -> str:
    return module.split(".")[0] if module.split(".")[0] in PARTS else module


class _Imports(ast.NodeVisitor):
    """Collects (module, names) of the imports that run; those for the type checker do not."""

    def __init__(self) -> None:
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def visit_If(self, node: ast.If) -> None:
        for child in node.orelse if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else [node]:
            self.generic_visit(child) if child is node else self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, ()) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports hide what a module needs"
        names = tuple(alias.name for alias in node.names)
        if node.module == "lexplain":
            self.found += [(f"lexplain.{name}", ()) for name in names]
        else:
            self.found.append((node.module or "", names))


def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    visitor = _Imports()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor.found


def own_imports() -> Iterator[tuple[str, str]]:
    """(importing, imported) parts of the package."""
    for module, path in modules().items():
        for name, _ in imports(path):
            if name == "lexplain" or name.startswith("lexplain."):
                imported = part_of(name.removeprefix("lexplain").removeprefix("."))
                if imported != part_of(module):
                    yield part_of(module), imported


def test_parser_sees_lazy_imports_and_not_those_of_the_type_checker(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text("""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import pyspark
    from pandas import DataFrame
else:
    import yaml
if True:
    import numpy.linalg
def f():
    from torch import nn, cuda
    class A:
        from lexplain import plan
""")
    assert imports(path) == [
        ("typing", ("TYPE_CHECKING",)), ("yaml", ()), ("numpy.linalg", ()), ("torch", ("nn", "cuda")), ("lexplain.plan", ()),
    ]  # fmt: skip


def test_every_module_has_one_layer():
    named = [name for layer in LAYERS for name in layer]
    assert len(named) == len(set(named))
    assert {part_of(module) for module in modules()} <= set(named)
    assert set(NARROW) <= set(named)


def test_imports_go_down():
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    up = [f"{one} imports {other}" for one, other in own_imports() if height.get(other, len(LAYERS)) > height[one]]
    assert not up
    too_much = [f"{one} imports {other}" for one, other in own_imports() if one in NARROW and other not in NARROW[one]]
    assert not too_much


def test_imports_make_no_circle():
    needs: dict[str, set[str]] = {}
    for one, other in own_imports():
        needs.setdefault(one, set()).add(other)
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_libraries_have_owners():
    astray = [
        f"{module} imports {name}"
        for module, path in modules().items()
        for name, _ in imports(path)
        if not {module, part_of(module)} & OWNERS.get(name.split(".")[0], {module})
    ]
    assert not astray


def test_kernel_is_free_of_spark():
    kernel = {name for layer in KERNEL for name in layer}
    for library in ("pyspark", "delta", "mlflow", "pandas", "captum"):
        assert not OWNERS[library] & kernel
    loose = {
        name.split(".")[0]
        for module, path in modules().items()
        if part_of(module) in kernel
        for name, _ in imports(path)
    }
    assert not loose & {"py4j", "pyspark", "delta", "mlflow", "pandas", "polars", "datasets", "sklearn"}


def test_only_the_session_looks_for_a_jvm():
    """Of Spark Connect there is a thin client here: no context, no JVM, no RDD; who asks for one must be ready for that."""
    names = {"sparkContext", "_jvm", "_gateway", "_jsparkSession", "_jdf", "rdd"}
    askers = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in names
    }
    assert askers == {"session"}


def test_private_names_stay_at_home():
    taken = [
        f"{module} imports {name}.{private}"
        for module, path in modules().items()
        for name, names in imports(path)
        for private in names
        if name.startswith("lexplain") and private.startswith("_")
    ]
    assert not taken


def test_nobody_imports_jobs_or_tests():
    names = {name.split(".")[0] for path in modules().values() for name, _ in imports(path)}
    assert not names & {"jobs", "tests", "core", "pytest", "hypothesis"}


# --- what is loaded -------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after some code."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "pyspark", "py4j", "delta", "mlflow", "pandas", "pyarrow", "numpy", "icu4py"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import lexplain", set()),
        ("import lexplain; dir(lexplain); lexplain.PlanError", set()),
        ("import lexplain; lexplain.Plan; import lexplain.settings, lexplain.methods", set()),
        ("import lexplain.sampling", {"pyarrow", "numpy", "icu4py"}),
        ("import lexplain.engine, lexplain.executor, lexplain.finetune; lexplain.find_method('integrated_gradients')",
         HEAVY - {"pyspark", "py4j", "delta", "mlflow"}),
        ("import lexplain.cli, lexplain.terminal", set()),
        ("import lexplain; [getattr(lexplain, name) for name in lexplain.__all__]", HEAVY - {"mlflow"}),
    ],
)  # fmt: skip
def test_imports_load_only_what_they_need(code: str, allowed: set[str]):
    assert loaded_by(code) & HEAVY <= allowed


def test_public_names_resolve_to_what_the_type_checker_sees():
    assert lexplain.__all__ == sorted(lexplain.__all__)
    assert set(lexplain.__all__) <= set(dir(lexplain))
    for name in lexplain.__all__:
        assert getattr(lexplain, name).__name__ == name
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(homes) == set(lexplain.__all__)
    for name, module in homes.items():
        assert getattr(importlib.import_module(str(module)), name) is getattr(lexplain, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        lexplain.no_such_name  # noqa: B018
