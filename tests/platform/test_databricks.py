"""The bundle against the types of Databricks' own package for bundles."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from databricks.bundles.jobs import Job

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "databricks"
TEXT = (FOLDER / "databricks.yml").read_text(encoding="utf-8")
BUNDLE = yaml.safe_load(TEXT)
JOB = BUNDLE["resources"]["jobs"]["lexplain"]
STAGES = ["fine_tune", "attribute", "aggregate", "evaluate", "report"]


def check(job: Any) -> None:
    """Raise ValueError, TypeError or KeyError unless the package's types take every field, and names inside it are declared."""
    Job.from_dict(copy.deepcopy(job))
    clusters = {cluster["job_cluster_key"] for cluster in job["job_clusters"]}
    tasks = {task["task_key"] for task in job["tasks"]}
    parameters = {parameter["name"] for parameter in job["parameters"]}
    for task in job["tasks"]:
        if task["job_cluster_key"] not in clusters:
            raise ValueError(f"no cluster {task['job_cluster_key']}")
        if not {one["task_key"] for one in task.get("depends_on", [])} <= tasks:
            raise ValueError(f"{task['task_key']} depends on no task")
        used = re.findall(r"{{job\.parameters\.(\w+)}}", str(task))
        if not set(used) <= parameters:
            raise ValueError(f"{task['task_key']} uses a parameter that is not declared")


def test_the_job_is_one() -> None:
    check(JOB)


BROKEN: dict[str, Callable[[Any], Any]] = {
    "misspelt field": lambda job: job["tasks"][0].update(max_retrys=2),
    "misspelt field of a cluster": lambda job: job["job_clusters"][0]["new_cluster"].update(workers=2),
    "unknown access mode": lambda job: job["job_clusters"][0]["new_cluster"].update(data_security_mode="SINGLE"),
    "number that is none": lambda job: job["tasks"][0].update(max_retries="twice"),
    "task of no cluster": lambda job: job["tasks"][0].update(job_cluster_key="gpus"),
    "task after no task": lambda job: job["tasks"][1].update(depends_on=[{"task_key": "train"}]),
    "parameter not declared": lambda job: job["parameters"].clear(),
    "wheel without an entry point": lambda job: job["tasks"][0]["python_wheel_task"].pop("entry_point"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_job_is_refused(name: str) -> None:
    broken = copy.deepcopy(JOB)
    BROKEN[name](broken)
    with pytest.raises((ValueError, TypeError, KeyError)):
        check(broken)


def test_five_tasks_follow_each_other() -> None:
    assert [task["task_key"] for task in JOB["tasks"]] == STAGES
    before = [[one["task_key"] for one in task.get("depends_on", [])] for task in JOB["tasks"]]
    assert before == [[], *([one] for one in STAGES[:-1])]


def test_tasks_call_commands_that_are_there() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for task in JOB["tasks"]:
        wheel = task["python_wheel_task"]
        assert wheel["package_name"] == project["name"]
        assert wheel["entry_point"] in project["scripts"]
        assert wheel["parameters"][:2] == [task["task_key"].replace("_", "-"), "{{job.parameters.plan}}"]
        assert (REPOSITORY / "jobs" / f"{task['task_key']}.py").is_file()
        assert task["libraries"] == [{"whl": "../../dist/*.whl"}]


def test_gpus_are_where_models_run() -> None:
    clusters = {task["task_key"]: task["job_cluster_key"] for task in JOB["tasks"]}
    assert clusters == {"fine_tune": "gpu", "attribute": "gpu", "aggregate": "cpu", "evaluate": "gpu", "report": "cpu"}


def test_variables_are_declared_used_and_explained() -> None:
    used = set(re.findall(r"\${var\.(\w+)}", TEXT))
    assert used == set(BUNDLE["variables"])
    assert all(set(one) == {"description", "default"} for one in BUNDLE["variables"].values())
    others = set(re.findall(r"\${((?!var\.)[\w.]+)}", TEXT))
    assert others <= {"workspace.file_path", "bundle.name", "bundle.target"}
    assert set(BUNDLE) == {"bundle", "variables", "targets", "artifacts", "resources"}


def test_the_artifact_is_a_wheel_of_this_project(tmp_path: Path) -> None:
    artifact = BUNDLE["artifacts"]["wheel"]
    assert (FOLDER / artifact["path"]).resolve() == REPOSITORY
    assert artifact["build"].startswith("pip ")
    build = f"{sys.executable} -m {artifact['build']}".replace("--wheel-dir dist", f"--wheel-dir {tmp_path}")
    subprocess.run(build.split(), cwd=FOLDER / artifact["path"], check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("lexplain-")
