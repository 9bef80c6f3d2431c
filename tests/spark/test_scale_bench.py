"""The benchmarks of the Spark side at a small size: what is timed is right, and goes the way that it must."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    """What the benchmark of 40,000 word rows wrote: figures, and plans by file name."""
    folder = tmp_path_factory.mktemp("scale")
    words = ["--word-rows", "40000", "--folder", str(folder / "tables"), "--out", str(folder / "found.json")]
    paths = [str(TESTS), str(TESTS.parent / "lib"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "bench.aggregation", *words], check=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    plans = {path.name.partition("-")[2]: path.read_text() for path in (folder / "found.plans").iterdir()}
    return json.loads((folder / "found.json").read_text()), plans


def test_spark_and_duckdb_make_the_same_tables(figures: tuple[dict[str, Any], dict[str, str]]) -> None:
    (size,) = figures[0]["sizes"]
    assert size["written"]["word_rows"] == pytest.approx(40_000, rel=0.2)
    found = size["results"]
    assert found["sums_rows"] > 5_000
    assert found["keywords_rows"] > 2_000
    assert found["kept"] > 20
    assert (found["sums_differing"], found["keywords_differing"], found["keywords_doubles_differing"]) == (0, 0, 0)


def test_words_are_cut_before_they_are_shuffled_and_no_row_passes_through_python(
    figures: tuple[dict[str, Any], dict[str, str]],
) -> None:
    record, plans = figures
    for name in ("sums", "keywords"):
        plan = plans[f"spark-{name}.txt"]
        assert "Parquet" in plan or "Scan parquet" in plan
        assert not re.search("Python|MapIn|Pandas", plan)
        shuffled = re.findall(r"\) Exchange\s*\nInput \[\d+\]: \[(.*?)\]\n", plan)
        assert shuffled
        assert not [columns for columns in shuffled if re.search(r"\b(words|spans|text)#", columns)]
    assert any(
        "best_words#" in columns for columns in re.findall(r"\) Exchange\s*\nInput (.*)", plans["spark-sums.txt"])
    )
    (size,) = record["sizes"]
    # A row an explanation, and a few a chunk: its best words are in arrays.
    assert 0 < size["spark"]["sums"]["shuffle_write_rows"] <= size["written"]["rows"] + 100
