"""A Spark standalone cluster on this machine, of the installed pyspark's own processes. Tests start it, and may kill parts of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyspark

REPOSITORY = Path(__file__).parents[1]
SPARK_HOME = Path(pyspark.__file__).parent
HOST = "127.0.0.1"
_START_SECONDS = 600
# These JVMs live for minutes: the optimising compiler would take most of their time.
_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind((HOST, 0))
        return int(bound.getsockname()[1])


class Standalone:
    """A master, and what else is started beside it: each a process group with a log in the folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        python_path = os.pathsep.join([str(REPOSITORY / "lib"), str(REPOSITORY / "tests")])
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": python_path,
            "SPARK_HOME": str(SPARK_HOME),
            "SPARK_LOCAL_IP": HOST,
            "SPARK_CONF_DIR": str(folder),
            "SPARK_DAEMON_JAVA_OPTS": _JAVA_OPTIONS,
            **environment,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        port = free_port()
        self.master = f"spark://{HOST}:{port}"
        master = [str(SPARK_HOME / "bin" / "spark-class"), "org.apache.spark.deploy.master.Master"]
        master += ["--host", HOST, "--port", str(port), "--webui-port", "0"]
        self.start("master", master, "I have been elected leader")

    def start(self, name: str, command: list[str], ready: str, **environment: str) -> None:
        """Start a process and wait until its log says that it is ready."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env={**self.environment, **environment}, stdout=out, stderr=out, start_new_session=True,
                cwd=self.folder,
            )  # fmt: skip
        self.processes[name] = process
        deadline = time.monotonic() + _START_SECONDS
        while ready not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.2)

    def start_worker(self, name: str, *, cores: int = 1, gpu: str | None = None) -> None:
        """Start a worker; `gpu` is the address of a GPU that it says it has."""
        command = [str(SPARK_HOME / "bin" / "spark-class"), "org.apache.spark.deploy.worker.Worker"]
        command += ["--host", HOST, "--webui-port", "0", "--cores", str(cores), "--memory", "1500m"]
        command += ["--work-dir", str(self.folder / name), self.master]
        environment = {}
        if gpu is not None:
            script = self.folder / "discover"
            script.write_text('#!/bin/sh\nprintf \'{"name": "gpu", "addresses": ["%s"]}\' "$GPU_ADDRESS"\n')
            script.chmod(0o755)
            options = f"-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript={script}"
            environment = {"GPU_ADDRESS": gpu, "SPARK_WORKER_OPTS": options}
        self.start(name, command, "Successfully registered with master", **environment)

    def submit(self, log: Path, script: Path, *arguments: str, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a driver: spark-submit, with Delta, in a process group of its own."""
        from lexplain.session import DELTA_SETTINGS, find_jars

        given = {
            **DELTA_SETTINGS,
            "spark.jars": ",".join(map(str, find_jars())),
            "spark.pyspark.python": sys.executable,
            "spark.driver.host": HOST,
            "spark.driver.memory": "1g",
            "spark.driver.extraJavaOptions": _JAVA_OPTIONS,
            "spark.executor.memory": "1g",
            "spark.executor.extraJavaOptions": _JAVA_OPTIONS,
            "spark.ui.enabled": "false",
            "spark.sql.catalogImplementation": "in-memory",
            "spark.sql.warehouse.dir": str(self.folder / "warehouse"),
            "spark.sql.shuffle.partitions": "2",
            "spark.sql.codegen.factoryMode": "NO_CODEGEN",
            "spark.databricks.delta.snapshotPartitions": "2",
            **settings,
        }
        command = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", self.master]
        command += [part for key, value in given.items() for part in ("--conf", f"{key}={value}")]
        with log.open("wb") as out:
            return subprocess.Popen(
                [*command, str(script), *arguments], env=self.environment, stdout=out, stderr=out,
                start_new_session=True, cwd=self.folder,
            )  # fmt: skip

    def stop(self) -> None:
        """End everything that was started here, and what of it outlives its parent."""
        begun = descend([process.pid for process in self.processes.values()])
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(timeout=60)
        deadline = time.monotonic() + 20
        while left := begun & set(list_processes()):
            if time.monotonic() > deadline:
                for pid in left:
                    kill(pid)
                return
            time.sleep(0.5)


@dataclass(frozen=True)
class Process:
    """A line of `ps`."""

    pid: int
    parent: int
    group: int
    command: str


def list_processes() -> dict[int, Process]:
    """Return the machine's processes by pid, without those that have ended and were not collected."""
    listed = subprocess.run(
        ["ps", "-axwwo", "pid=,ppid=,pgid=,args="], capture_output=True, text=True, check=True, errors="replace"
    ).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    processes = [Process(int(row[0]), int(row[1]), int(row[2]), row[3]) for row in rows if len(row) == 4]
    return {process.pid: process for process in processes if "<defunct>" not in process.command}


def descend(pids: Collection[int]) -> set[int]:
    """Return the processes and their children's children."""
    processes = list_processes()
    found, added = set(pids) & set(processes), set(pids)
    while added:
        added = {process.pid for process in processes.values() if process.parent in added} - found
        found |= added
    return found


def kill(pid: int) -> None:
    """Kill a process with -9, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
