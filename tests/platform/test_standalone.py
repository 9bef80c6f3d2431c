"""The page on spark-submit, its commands run on a standalone cluster of this machine: a master, a worker, a GPU that is made up.

Scheduling, discovery and the way of a GPU's address to a task are Spark's own; only nvidia-smi is ours, as there may be no GPU.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyspark
import pytest
import yaml

from core.models import CLUES, save_trainable
from lexplain.session import fetch_jars
from spark.planted import make_plan, plant, write_json

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "deploy" / "spark-submit.md").read_text(encoding="utf-8")
NVIDIA_SMI = '#!/bin/sh\necho "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5f3b)"\n'


def blocks(title: str) -> list[str]:
    """Return the shell blocks of a section of the page."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"{title}\n")]
    return re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class Cluster:
    """A standalone master and worker, started as the page says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fetch_jars()
        (folder / "bin").mkdir()
        nvidia_smi = folder / "bin" / "nvidia-smi"
        nvidia_smi.write_text(NVIDIA_SMI)
        nvidia_smi.chmod(0o755)
        python_path = os.pathsep.join([str(REPOSITORY / "lib"), str(REPOSITORY / "tests")])
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": python_path,
            "SPARK_HOME": str(Path(pyspark.__file__).parent),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_WORKER_DIR": str(folder / "work"),
            "SPARK_WORKER_CORES": "2",
            "SPARK_WORKER_MEMORY": "3g",
            "SPARK_CONF_DIR": str(folder),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        # What the page tells the reader to change.
        self.settings = f"LEXPLAIN={REPOSITORY}\nPYTHON={sys.executable}\nMASTER=spark://127.0.0.1:{port}\nPLAN={folder}/plan.yaml\n"
        master = '"$SPARK_HOME/bin/spark-class" org.apache.spark.deploy.master.Master --host 127.0.0.1 --webui-port 0'
        self.start(f"{master} --port {port}", "master", "I have been elected leader")
        self.start(blocks("Standalone")[1], "worker", "Successfully registered with master")

    def start(self, script: str, name: str, ready: str) -> None:
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            command = ["bash", "-c", self.settings + script]
            process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True, cwd=self.folder
            )
        self.processes.append(process)
        deadline = time.monotonic() + 180
        while ready not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)

    def submit(self) -> tuple[int, str]:
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

    def stop(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


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
    code, said = cluster.submit()
    assert (code, "corpus=None is required" in said) == (2, True), said


@pytest.mark.timeout(1600)
def test_the_address_of_the_gpu_reaches_the_task(cluster: Cluster) -> None:
    """The made-up GPU is one that torch cannot have: refused by its address, and never the CPU instead."""
    cluster.write_plan("gpu")
    code, said = cluster.submit()
    assert (code, "GPU address '0'" in said) == (1, True), said


@pytest.mark.timeout(3200)
def test_a_plan_runs_to_its_keywords_and_again_without_work(cluster: Cluster) -> None:
    cluster.write_plan("cpu")
    code, said = cluster.submit()
    assert (code, "3 trained now" in said) == (0, True), said
    assert all(word in said for word in CLUES.values()), said
    code, said = cluster.submit()
    assert (code, "0 trained now" in said) == (0, True), said
