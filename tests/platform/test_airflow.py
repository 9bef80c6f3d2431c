"""The DAG in a real Airflow, which parses, serialises and runs it; only the spark-submit that it calls is ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
STAGES = ["fine_tune", "attribute", "aggregate", "evaluate", "report"]

# Writes down what it was called with, and ends with the codes of `codes.json`, one a call of a stage.
SPARK_SUBMIT = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
stage = next(pathlib.Path(part).stem for part in sys.argv if part.endswith(".py"))
calls = folder / "calls.jsonl"
calls.open("a").write(json.dumps([stage, sys.argv[1:]]) + "\\n")
codes = json.loads((folder / "codes.json").read_text())
made = sum(json.loads(line)[0] == stage for line in calls.read_text().splitlines())
sys.exit(codes.get(stage, [])[made - 1] if made <= len(codes.get(stage, [])) else 0)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An Airflow of its own, its database and the DAG folder. Airflow reads these settings when it is imported."""
    home = tmp_path_factory.mktemp("airflow")
    (home / "bin").mkdir()
    submit = home / "bin" / "spark-submit"
    submit.write_text(SPARK_SUBMIT.format(python=sys.executable, folder=str(home)))
    submit.chmod(0o755)
    settings = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "deploy" / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_SPARK_DEFAULT": json.dumps({"conn_type": "spark", "host": "spark://master", "port": 7077}),
        "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        airflow = [sys.executable, "-m", "airflow", "db", "migrate"]
        subprocess.run(airflow, check=True, capture_output=True, timeout=300)
        yield home


@pytest.fixture
def load(home: Path) -> Callable[[], Any]:
    def load() -> Any:
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(str(REPOSITORY / "deploy" / "airflow"))
        assert bag.import_errors == {}
        assert list(bag.dags) == ["lexplain"]
        return bag.dags["lexplain"]

    return load


@pytest.fixture
def run(home: Path, load: Callable[[], Any]) -> Callable[[dict[str, list[int]]], tuple[str, list[Any]]]:
    """Runs the DAG with spark-submit ending as told; returns the run's state and the calls of spark-submit."""

    def run(codes: dict[str, list[int]]) -> tuple[str, list[Any]]:
        (home / "codes.json").write_text(json.dumps(codes))
        (home / "calls.jsonl").unlink(missing_ok=True)
        dag = load()
        for task in dag.tasks:
            task.retry_delay = timedelta(0)
        ended = dag.test()
        return str(ended.state), [json.loads(line) for line in (home / "calls.jsonl").read_text().splitlines()]

    return run


def test_it_parses_and_its_stages_follow_each_other(load: Callable[[], Any]) -> None:
    dag = load()
    assert [task.task_id for task in dag.topological_sort()] == STAGES
    assert [sorted(task.downstream_task_ids) for task in dag.topological_sort()] == [[one] for one in STAGES[1:]] + [[]]
    assert all(task.retries == 3 for task in dag.tasks)
    assert (dag.catchup, dag.max_active_runs) == (False, 1)


def test_every_task_names_a_job_that_is_there(load: Callable[[], Any]) -> None:
    jobs = {path.name for path in (REPOSITORY / "jobs").glob("*.py")}
    assert {Path(task.application).name for task in load().tasks} <= jobs


def test_a_retry_submits_the_same_command(run: Callable[[dict[str, list[int]]], tuple[str, list[Any]]]) -> None:
    """So that it resumes the same run: nothing of the try or of the date may be in the command."""
    state, calls = run({"attribute": [1, 1]})
    assert state == "success"
    assert [stage for stage, _ in calls] == ["fine_tune", "attribute", "attribute", "attribute", *STAGES[2:]]
    tries = [arguments for stage, arguments in calls if stage == "attribute"]
    assert tries[0] == tries[1] == tries[2]
    assert tries[0][-2:] == ["/opt/lexplain/jobs/attribute.py", "/mnt/lexplain/plan.yaml"]
    on_gpus = {stage for stage, arguments in calls if "spark.task.resource.gpu.amount=1" in arguments}
    assert on_gpus == {"fine_tune", "attribute", "evaluate"}


@pytest.mark.parametrize("code", [2, 3])
def test_a_bad_plan_and_a_passed_limit_are_not_tried_again(
    run: Callable[[dict[str, list[int]]], tuple[str, list[Any]]], code: int
) -> None:
    state, calls = run({"attribute": [code]})
    assert state == "failed"
    assert [stage for stage, _ in calls] == ["fine_tune", "attribute"]
