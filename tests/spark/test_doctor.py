"""`lexplain doctor` and the runs of a plan, which Spark reads: finished, stopped, failed, killed; and all well, end to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

from core.models import Shelf
from lexplain.diagnosis import check_runs
from lexplain.errors import CorpusError, LimitError
from lexplain.tables import Tables
from spark.planted import load_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

COMMAND = "lexplain run plan.yaml"


@pytest.fixture
def plan(tmp_path: Path, shelf: Shelf) -> dict[str, Any]:
    """One ready model and twenty documents without labels, one of them without a word."""
    documents = [{"text": document["text"]} for document in plant(19, seed=5)]
    path = write_json(tmp_path / "corpus.jsonl", [*documents, {"text": "..."}])
    return {
        "name": "tiny", "corpus": {"path": str(path)}, "models": {"uris": [str(shelf.folder("bert"))], "corpus": "unseen"},
        "method": {"options": {"rule": "midpoint", "nodes": 2}}, "text": {"max_tokens": 32, "overlap": 0},
        "keywords": {"min_df": 0}, "execution": {"device": "cpu"}, "sink": {"path": str(tmp_path / "tables")},
        "mlflow": {"enabled": False},
    }  # fmt: skip


def test_how_the_latest_run_ended(spark: SparkSession, plan: dict[str, Any]) -> None:
    loaded = load_plan(plan)
    Tables(spark, loaded.sink).create()
    assert check_runs(spark, loaded, COMMAND).said == "none of tiny yet"

    with pytest.raises(LimitError):
        run_plan(spark, plan | {"limits": {"rejected_share": 0.0}}, stages=["attribute"])
    found = check_runs(spark, loaded, COMMAND)
    assert "of tiny was stopped (limits.rejected_share=0.0 was passed" in found.said
    assert str(found.remedy) == f"{COMMAND}, which goes on where it was"

    run_plan(spark, plan, stages=["attribute", "aggregate"])
    assert check_runs(spark, loaded, COMMAND).is_fit

    other = plan | {"corpus": plan["corpus"] | {"where": "no_such_column = 1"}}
    with pytest.raises(CorpusError):
        run_plan(spark, other, stages=["attribute"])
    assert " of tiny failed (CorpusError: corpus.where='no_such_column = 1'" in check_runs(spark, loaded, COMMAND).said
    assert check_runs(spark, load_plan(plan | {"name": "another"}), COMMAND).is_fit


def test_a_schema_without_tables(spark: SparkSession, plan: dict[str, Any], tmp_path: Path) -> None:
    spark.sql(f"CREATE SCHEMA IF NOT EXISTS doctored LOCATION '{tmp_path}/doctored'")
    loaded = load_plan(plan | {"sink": {"schema": "doctored"}})
    assert check_runs(spark, loaded, COMMAND).said == "no tables yet in doctored"


def test_the_command_from_well_to_killed(plan: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")

    def doctor() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-m", "lexplain", "doctor", str(path)], capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    code, lines = doctor()
    assert (code, lines[-1]) == (0, "all is well"), lines
    assert all(line.startswith("✓ ") for line in lines[:-1])

    # A run that is killed while its record says that it is running, by a signal that nothing can catch.
    killed = (
        "import os, signal, sys, yaml\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from lexplain import Plan, find_method, open_run, open_session\nfrom lexplain.terminal import StageProgress\n"
        f"plan = Plan.load({str(path)!r}, find_method)\n"
        "with open_run(open_session('killed'), plan, find_method, StageProgress(Console())) as run:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    code, lines = doctor()
    assert code == 1, lines
    (place,) = (number for number, line in enumerate(lines) if line.startswith("✗ "))
    assert " of tiny was begun and never ended" in lines[place]
    assert lines[place + 1].strip() == f"lexplain run {path}, which goes on where it was"
