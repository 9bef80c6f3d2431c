"""A method of another package as a Spark job: sent to the executors, or missing there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from core.models import save_classifier
from core.test_plugins import install_example
from lexplain import methods
from lexplain.errors import ModelError
from lexplain.methods import Attribution, Evaluate, Inputs, find_method, method
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugins")
    save_classifier(folder / "model", "bert", labels=("politics", "sport", "NA"))
    write_json(folder / "corpus.jsonl", plant(40, seed=5))
    return folder


@pytest.fixture
def forgotten(spark: SparkSession) -> Iterator[None]:
    """Forget what a test registers or sends."""
    registered, plugins, path = dict(methods.METHODS), dict(methods._plugins), list(sys.path)
    sent = list(spark.sparkContext._python_includes)
    yield
    methods._registered.clear()
    methods._registered.update(registered)
    methods._plugins.clear()
    methods._plugins.update(plugins)
    sys.path[:] = path
    spark.sparkContext._python_includes[:] = sent
    sys.modules.pop("leave_one_in", None)


def plan(folder: Path, name: str, identity: str) -> dict[str, object]:
    source = {"path": str(folder / "corpus.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    models = {"uris": [str(folder / "model")], "corpus": "unseen"}
    made = make_plan(
        folder, name=name, training=None, models=models, method=None, mlflow={"enabled": False},
        sink={"path": str(folder / name)},
    )  # fmt: skip
    return made | {"corpus": source, "method": {"id": identity}}


@pytest.mark.usefixtures("forgotten")
def test_the_example_runs_on_executors_that_are_sent_it(spark: SparkSession, folder: Path) -> None:
    site = install_example(folder / "leave-one-in", folder / "site")
    spark.sparkContext.addPyFile(shutil.make_archive(str(folder / "plugin"), "zip", site))
    assert find_method("leave_one_in").package == "leave-one-in 0.1.0"
    run = run_plan(spark, plan(folder, "sent", "leave_one_in"))
    rows = run.tables.read("explanations").collect()
    assert len(rows) == 40
    assert {(row["status"], row["method"], row["evaluations"]) for row in rows} == {("explained", "leave_one_in.v1", 0)}
    assert all(any(word["score"] for word in row["words"]) for row in rows)


@pytest.mark.usefixtures("forgotten")
def test_a_method_that_executors_lack_stops_the_job_before_the_first_task(spark: SparkSession, folder: Path) -> None:
    """It is registered in the driver's process only."""

    @method(version=1, cite="none")
    def driver_only(evaluate: Evaluate, inputs: Inputs) -> Attribution:
        raise NotImplementedError

    with pytest.raises(ModelError, match=r"method='driver_only\.v1' is no known method"):
        run_plan(spark, plan(folder, "lacking", "driver_only"))
