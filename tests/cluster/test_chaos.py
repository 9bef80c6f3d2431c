"""A run over many chunks on two workers, parts of which are killed with -9 at random: nothing is lost, doubled or made again.

The driver's command is the same each time. What happened is read from Delta's log and files, and compared with a run that
nobody disturbed, on one machine. LEXPLAIN_CHAOS_SEED repeats a run's kinds and delays, as far as a machine repeats itself.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.history import History, digest
from core.models import save_trainable
from lexplain.session import fetch_jars
from spark.planted import make_plan, plant, write_json
from standalone import REPOSITORY, Process, Standalone, descend, kill, list_processes

# How often each part is killed.
KILLS = {
    "executor": 7,
    "python worker": 6,
    "python daemon": 4,
    "driver": 3,
    "driver's JVM": 1,
    "driver's Python": 2,
    "worker": 4,
}
N_SPLITS = 2
N_DOCUMENTS = 1440
CHUNK_DOCUMENTS = 36
# No explanation, for a reason each; a copy of a text is explained like any other document.
ODD_TEXTS = (None, "", " \t\n", "!!! ...", "the striker said", "the striker said")
WORKERS = ("worker-1", "worker-2")
# Of what ends much earlier on a machine that does nothing else.
LONGEST_SECONDS = 6000
STUCK_SECONDS = 600
# A kill waits so long for a commit at most: there are none while models are trained.
QUIET_SECONDS = 90
LONGEST_DELAY_SECONDS = 8

NAMES_OF_RUNS = {"run_id", "mlflow_run_id"}


def make_chaos_plan(folder: Path, sink: str) -> Path:
    """Write a plan whose numbers do not depend on who computes: as many threads on a cluster as on one machine."""
    models = {
        "base": str(folder / "base"),
        "splits": N_SPLITS,
        "epochs": 8,
        "patience": 8,
        "learning_rate": 3e-3,
        "batch_size": 8,
    }
    corpus = {"path": str(folder / "corpus.jsonl"), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    plan = make_plan(
        folder, name="chaos", corpus=corpus, models=models, mlflow={"enabled": False}, sink={"path": str(folder / sink)},
        execution={"device": "cpu", "threads": 1, "chunk_documents": CHUNK_DOCUMENTS},
    )  # fmt: skip
    path = folder / f"{sink}.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


@dataclass
class Job:
    """The plan's command, started again and again until it is done."""

    cluster: Standalone
    plan: Path
    starts: int = 0
    failed_alone: int = 0
    process: subprocess.Popen[bytes] | None = None
    done: bool = False

    @property
    def log(self) -> Path:
        return self.cluster.folder / f"driver-{self.starts}.log"

    def keep_running(self) -> None:
        """Start the command unless it runs or is done; what is left of an earlier start has to end by itself."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return
            self.wait_for_end()
            self.done = code == 0
            if self.done:
                return
        self.starts += 1
        job = REPOSITORY / "jobs" / "run.py"
        self.process = self.cluster.submit(self.log, job, str(self.plan), settings={"spark.executor.cores": "1"})

    def group(self) -> list[Process]:
        """Return the driver's processes: its JVM, and its Python."""
        assert self.process is not None
        return [process for process in list_processes().values() if process.group == self.process.pid]

    def wait_for_end(self) -> None:
        deadline = time.monotonic() + STUCK_SECONDS
        while left := self.group():
            assert time.monotonic() < deadline, f"outlives the rest of its driver: {left}"
            time.sleep(0.5)


@dataclass
class Chaos:
    """Kills parts of a cluster while a job runs on it.

    Attributes:
        killed: (kind, seconds since the start, commits of explanations that were there).
        before: At each kill, the commit of every chunk that had one.
    """

    cluster: Standalone
    job: Job
    history: History
    seed: int
    killed: list[tuple[str, float, int]] = field(default_factory=list)
    before: list[dict[tuple[Any, ...], set[int]]] = field(default_factory=list)

    def run(self) -> None:
        """Kill every part as often as planned, then let the job end."""
        draw = random.Random(self.seed)
        kinds = [kind for kind, times in KILLS.items() for _ in range(times)]
        draw.shuffle(kinds)
        begun = time.monotonic()
        for kind in kinds:
            time.sleep(self.await_commit() * draw.random())
            victims = self.await_victims(kind)
            if self.job.done:
                break
            self.before.append(self.history.read().commits_by_chunk())
            self.killed.append((kind, time.monotonic() - begun, self.history.version))
            say(f"{self.killed[-1][1]:6.0f} s  {kind:<15} of {len(victims)}  version {self.history.version}")
            self.strike(kind, draw.choice(victims), draw)
        while not self.job.done and time.monotonic() < begun + LONGEST_SECONDS:
            self.job.keep_running()
            time.sleep(0.5)

    def await_commit(self) -> float:
        """Wait for a further commit of explanations, but not for ever: there are none while models are trained.

        Returns:
            Seconds that a chunk takes about, at most: so that a kill comes anywhere in one, and few chunks are made between.
        """
        seen, begun = self.history.read().version, time.monotonic()
        while self.history.read().version == seen and time.monotonic() < begun + QUIET_SECONDS and not self.job.done:
            self.job.keep_running()
            time.sleep(0.2)
        return min(LONGEST_DELAY_SECONDS, time.monotonic() - begun)

    def await_victims(self, kind: str) -> list[int]:
        deadline = time.monotonic() + STUCK_SECONDS
        while not self.job.done:
            if victims := self.find(kind):
                return victims
            assert time.monotonic() < deadline, f"there is no {kind} to kill; {self.job.log.read_text()[-3000:]}"
            self.job.keep_running()
            time.sleep(0.2)
        return []

    def find(self, kind: str) -> list[int]:
        """Return the processes of a kind; of a driver and a worker the one that began the others."""
        if kind == "worker":
            return [self.cluster.processes[name].pid for name in WORKERS]
        if kind.startswith("driver"):
            group = self.job.group()
            python = [process.pid for process in group if process.command.split()[0].endswith("python")]
            jvm = [process.pid for process in group if "org.apache.spark.deploy.SparkSubmit" in process.command]
            return python if kind.endswith("Python") else jvm if python else []
        processes = list_processes()
        ours = [
            processes[pid]
            for pid in descend([self.cluster.processes[name].pid for name in WORKERS])
            if pid in processes
        ]
        executors = {process.pid for process in ours if "CoarseGrainedExecutorBackend" in process.command}
        daemons = {
            process.pid for process in ours if "pyspark.daemon" in process.command and process.parent in executors
        }
        workers = {process.pid for process in ours if "pyspark.daemon" in process.command and process.parent in daemons}
        return sorted({"executor": executors, "python daemon": daemons, "python worker": workers}[kind])

    def strike(self, kind: str, victim: int, draw: random.Random) -> None:
        if kind == "driver":
            os.killpg(os.getpgid(victim), signal.SIGKILL)
        elif kind == "worker":
            for pid in descend([victim]):
                kill(pid)
            (name,) = [name for name in WORKERS if self.cluster.processes[name].pid == victim]
            self.cluster.processes[name].wait()
            time.sleep(draw.uniform(0.0, 4.0))
            self.cluster.start_worker(name)
        else:
            kill(victim)


def say(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetch_jars()
    folder = tmp_path_factory.mktemp("chaos")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", plant(160, seed=1))
    odd = [{"doc_id": f"odd-{n}", "text": text, "labels": ["NA"]} for n, text in enumerate(ODD_TEXTS)]
    write_json(folder / "corpus.jsonl", [*plant(N_DOCUMENTS, seed=2), *odd])
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The same plan's run into another sink, in one process."""
    plan = make_chaos_plan(folder, "undisturbed")
    python_path = os.pathsep.join([str(REPOSITORY / "lib"), str(REPOSITORY / "tests")])
    conf = REPOSITORY / "tests" / "spark" / "conf"
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lexplain", "run", str(plan)], capture_output=True, text=True, check=False,
        timeout=LONGEST_SECONDS, env={**os.environ, "PYTHONPATH": python_path, "SPARK_CONF_DIR": str(conf)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    say(f"undisturbed: {time.monotonic() - begun:.0f} s")
    return folder / "undisturbed"


@pytest.fixture(scope="module")
def chaos(folder: Path) -> Iterator[Chaos]:
    """The plan on a cluster that is not left alone."""
    seed = int(os.environ.get("LEXPLAIN_CHAOS_SEED") or random.SystemRandom().randrange(2**32))
    say(f"LEXPLAIN_CHAOS_SEED={seed}")
    cluster = Standalone(folder)
    job = Job(cluster, make_chaos_plan(folder, "disturbed"))
    try:
        for name in WORKERS:
            cluster.start_worker(name)
        chaos = Chaos(cluster, job, History(folder / "disturbed" / "explanations"), seed)
        begun = time.monotonic()
        chaos.run()
        kinds = Counter(kind for kind, _, _ in chaos.killed)
        say(f"disturbed: {time.monotonic() - begun:.0f} s, {job.starts} starts, kills {dict(kinds)}")
        yield chaos
    finally:
        if job.process is not None and job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        cluster.stop()


@pytest.mark.timeout(2 * LONGEST_SECONDS)
def test_the_job_ends_after_25_kills_and_more(chaos: Chaos) -> None:
    assert chaos.job.done, chaos.job.log.read_text()[-5000:]
    assert len(chaos.killed) == sum(KILLS.values()) >= 25


def test_every_finished_chunk_is_of_one_commit_that_never_changed(chaos: Chaos) -> None:
    history = chaos.history.read()
    after = history.commits_by_chunk()
    again = {chunk: commits for chunk, commits in after.items() if len(commits) != 1}
    assert again == {}
    assert history.removals == []
    for before in chaos.before:
        assert {chunk: after.get(chunk) for chunk in before} == before
    # the kills came while chunks were being made
    assert len({len(before) for before in chaos.before}) > 10


def test_every_document_of_the_ledger_is_there_once(chaos: Chaos, folder: Path) -> None:
    ledger = History(folder / "disturbed" / "chunks").read().rows().to_pylist()
    planned = {(row["explain_key"], row["increment"], row["bucket"]): row["n_documents"] for row in ledger}
    assert len(planned) == len(ledger)
    rows = (
        chaos.history.read().rows().select(["explain_key", "increment", "bucket", "doc_id", "label_rank"]).to_pylist()
    )
    keys = Counter((row["explain_key"], row["doc_id"], row["label_rank"]) for row in rows)
    assert set(keys.values()) == {1}
    made = Counter((row["explain_key"], row["increment"], row["bucket"]) for row in rows if row["label_rank"] == 0)
    assert {chunk: made[chunk] for chunk in planned} == planned
    assert sum(planned.values()) == N_SPLITS * (N_DOCUMENTS + len(ODD_TEXTS))


@pytest.mark.parametrize(
    "table", ["models", "staged", "chunks", "explanations", "word_sums", "word_statistics", "keywords"]
)
def test_the_tables_are_those_of_an_undisturbed_run(chaos: Chaos, undisturbed: Path, folder: Path, table: str) -> None:
    # a model's folder is in its sink, and how long it took to train is a time
    without = NAMES_OF_RUNS | ({"uri", "folder", "seconds"} if table == "models" else set())
    found = [
        digest(History(folder / sink / table).read().rows(), without=without) for sink in ("undisturbed", "disturbed")
    ]
    say(f"{table:<16} {found[0][:16]} {found[1][:16]}")
    assert found[0] == found[1]
