"""The page on spark-submit, its commands run on a standalone cluster of this machine: a master, a worker, a GPU that is made up.

Scheduling, discovery and the way of a GPU's address to a task are Spark's own; only nvidia-smi is ours, as there may be no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from core.models import CLUES, save_trainable
from lexplain.session import fetch_jars
from spark.planted import make_plan, plant, write_json
from standalone import REPOSITORY, Standalone

PAGE = (REPOSITORY / "deploy" / "spark-submit.md").read_text(encoding="utf-8")
NVIDIA_SMI = '#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5f3b)"\n'


def blocks(title: str) -> list[str]:
    """Return the shell blocks of a section of the page."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{title}\n")]
    return re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


class Cluster(Standalone):
    """A standalone master and worker, started as the page says."""

    def __init__(self, folder: Path) -> None:
        fetch_jars()
        (folder / "bin").mkdir()
        nvidia_smi = folder / "bin" / "nvidia-smi"
        nvidia_smi.write_text(NVIDIA_SMI)
        nvidia_smi.chmod(0o755)
        super().__init__(
            folder, PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", SPARK_WORKER_DIR=str(folder / "work"),
            SPARK_WORKER_CORES="2", SPARK_WORKER_MEMORY="3g",
        )  # fmt: skip
        # What the page tells the reader to change.
        self.settings = (
            f"LEXPLAIN={REPOSITORY}\nPYTHON={sys.executable}\nMASTER={self.master}\nPLAN={folder}/plan.yaml\n"
        )
        self.start(
            "worker", ["bash", "-c", self.settings + blocks("Standalone")[1]], "Successfully registered with master"
        )

    def submit_page(self) -> tuple[int, str]:
        """Run the page's command for the plan in the folder; return exit code and output, its lines joined."""
        script = self.settings + blocks("Standalone")[2]
        done = subprocess.run(
            ["bash", "-c", script],
            env=self.environment, capture_output=True, text=True, timeout=1500, check=False, cwd=self.folder,
        )  # fmt: skip
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    def write_plan(self, device: str) -> None:
        plan = make_plan(self.folder, execution={"device": device}, mlflow={"enabled": False})
        (self.folder / "plan.yaml").write_text(yaml.safe_dump(plan))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("standalone")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", plant(240, seed=1))
    cluster = Cluster(folder)
    yield cluster
    cluster.stop()


def test_the_page_names_what_is_to_change() -> None:
    names = re.findall(r"^(\w+)=", blocks("Standalone")[0], flags=re.MULTILINE)
    assert names == ["LEXPLAIN", "PYTHON", "MASTER", "PLAN"]


@pytest.mark.timeout(1600)
def test_a_bad_plan_ends_with_its_exit_code(cluster: Cluster) -> None:
    (cluster.folder / "plan.yaml").write_text("name: nothing else\n")
    code, said = cluster.submit_page()
    assert (code, "corpus=None is required" in said) == (2, True), said


@pytest.mark.timeout(1600)
def test_the_address_of_the_gpu_reaches_the_task(cluster: Cluster) -> None:
    """The made-up GPU is one that torch cannot have: refused by its address, and never the CPU instead."""
    cluster.write_plan("gpu")
    code, said = cluster.submit_page()
    assert (code, "GPU address '0'" in said) == (1, True), said


@pytest.mark.timeout(3200)
def test_a_plan_runs_to_its_keywords_and_again_without_work(cluster: Cluster) -> None:
    cluster.write_plan("cpu")
    code, said = cluster.submit_page()
    assert (code, "3 trained now" in said) == (0, True), said
    assert all(word in said for word in CLUES.values()), said
    code, said = cluster.submit_page()
    assert (code, "0 trained now" in said) == (0, True), said
