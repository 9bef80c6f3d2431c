"""`lexplain serve-sql` and real clients: the beeline of the installed Spark, several at once, while a job writes."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyspark
import pytest
import yaml
from pyspark.sql import SparkSession

from core.models import Shelf
from lexplain.keys import corpus_key
from spark.planted import load_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

SPARK_HOME = Path(pyspark.__file__).parent
BEELINE = [SPARK_HOME / "bin" / "beeline", "--outputformat=csv2", "--silent=true", "-u"]
ENVIRONMENT = os.environ | {"SPARK_HOME": str(SPARK_HOME)}


def make_plan(folder: Path, model: Path, name: str, n_documents: int) -> dict[str, Any]:
    """A plan of one ready model over documents without labels."""
    documents = [{"text": document["text"]} for document in plant(n_documents, seed=n_documents)]
    return {
        "name": name, "corpus": {"path": str(write_json(folder / f"{name}.jsonl", documents))},
        "models": {"uris": [str(model)], "corpus": "unseen"}, "method": {"options": {"rule": "midpoint", "nodes": 4}},
        "text": {"max_tokens": 32, "overlap": 0}, "keywords": {"min_df": 1, "max_classes": None},
        "execution": {"device": "cpu", "chunk_documents": 40}, "sink": {"path": str(folder / "tables")},
        "mlflow": {"enabled": False},
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(spark: SparkSession, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    plan = make_plan(folder, shelf.folder("bert"), "first", 60)
    run_plan(spark, plan, stages=["attribute", "aggregate"])
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Server:
    """`lexplain serve-sql` in a process of its own, up when it has printed its address."""

    def __init__(self, *arguments: str, folder: Path) -> None:
        self.port = port = find_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lexplain", "serve-sql", *arguments, "--port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=folder,
        )  # fmt: skip
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if "Ctrl-C" in line:
                return
        raise AssertionError(f"serve-sql ended with {self.process.wait()}: {self.said}")

    def end(self, how: signal.Signals) -> tuple[int, str]:
        """Send a signal to the process, or as a terminal does with Ctrl-C to all that it has started."""
        if how is signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server("plan.yaml", folder=folder)
    yield server
    if server.process.poll() is None:
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()


def ask(server: Server, query: str) -> list[dict[str, str]]:
    """Ask beeline, which is what the installed pyspark brings."""
    done = subprocess.run(
        [*BEELINE, f"jdbc:hive2://127.0.0.1:{server.port}", "-n", "someone", "-e", query],
        capture_output=True, text=True, check=False, timeout=300, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.sub(r"^(?:(?:0: jdbc:\S+|[. ]+)> )+", "", done.stdout.strip())  # beeline's prompt
    return list(csv.DictReader(io.StringIO(table)))


def test_it_says_how_to_connect(server: Server, folder: Path) -> None:
    assert server.said[0] == f"serving  {folder / 'tables'}"
    assert server.said[1] == f"JDBC     jdbc:hive2://127.0.0.1:{server.port}"
    assert "no password" in server.said[-1]
    command = server.said[2].removeprefix("beeline  ")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| +label +\| +word +\| +rank +\|", done.stdout)
    assert not list(folder.glob("derby.log")) + list(folder.glob("metastore_db"))


def test_it_listens_at_loopback_alone(server: Server) -> None:
    listening = [
        line.split()
        for line in Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    ]
    ours = [row[1].split(":")[0] for row in listening if row[1].endswith(f":{server.port:04X}") and row[3] == "0A"]
    assert ours in (["0100007F"], ["0000000000000000FFFF00000100007F"])


def test_views_tables_and_the_function(server: Server, spark: SparkSession, folder: Path) -> None:
    expected = spark.read.format("delta").load(str(folder / "tables" / "keywords")).where("kept").count()
    assert ask(server, "SELECT name, count(*) AS words FROM keywords_current GROUP BY name") == [
        {"name": "first", "words": str(expected)}
    ]
    assert expected > 0
    (answer,) = ask(
        server, "SELECT a.status, size(a.explanations[0].words) AS words FROM (SELECT explain('The party said') AS a)"
    )
    assert answer == {"status": "explained", "words": "3"}


class Person:
    """A client with a connection of its own, which stays open from one question to the next."""

    def __init__(self, name: str, port: int) -> None:
        self.asked = 0
        self.process = subprocess.Popen(
            [*BEELINE, f"jdbc:hive2://127.0.0.1:{port}", "-n", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
        )  # fmt: skip

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("SELECT concat('seen ', count(*)) AS seen FROM explanations;\n")
        self.process.stdin.flush()
        self.asked += 1

    def leave(self) -> list[int]:
        """Return what every question was answered."""
        said, _ = self.process.communicate("!quit\n", timeout=600)
        counts = [int(count) for count in re.findall(r"^(?:0: jdbc:\S+> )*seen (\d+)$", said, flags=re.MULTILINE)]
        assert len(counts) == self.asked, said
        return counts


def test_two_people_ask_while_a_job_writes(server: Server, spark: SparkSession, shelf: Shelf, folder: Path) -> None:
    plan = make_plan(folder, shelf.folder("bert"), "second", 200)
    before = spark.read.format("delta").load(str(folder / "tables" / "explanations")).count()
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            run_plan(spark, plan, stages=["attribute", "aggregate"])
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    people = [Person(name, server.port) for name in ("one", "other")]
    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not done.wait(1.0):
            for person in people:
                person.ask()
    finally:
        writer.join()
        for person in people:
            person.ask()
        answers = [person.leave() for person in people]
    assert failures == []
    # Each chunk is a commit: what was seen is whole chunks, in their order, and never less than before.
    written = spark.read.format("delta").load(str(folder / "tables" / "explanations"))
    ours = written.where(f"corpus_key = '{corpus_key(load_plan(plan).corpus)}'").groupBy("bucket").count()
    whole = set(accumulate((row["count"] for row in ours.orderBy("bucket").collect()), initial=before))
    for counts in answers:
        assert counts == sorted(counts)
        assert set(counts) <= whole
        assert counts[-1] == max(whole) == before + 200
        assert len(set(counts)) > 1
    assert {row["name"] for row in ask(server, "SELECT DISTINCT name FROM keywords_current")} == {"first", "second"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_told_to(server: Server, folder: Path, how: signal.Signals) -> None:
    """The server of the other tests with SIGTERM, the last of them; another one, of a folder, with Ctrl-C."""
    running = server if how is signal.SIGTERM else Server("--tables", "tables", folder=folder)
    (jvm,) = [
        int(pid) for pid in Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    ]
    assert running.end(how) == (0, "ended\n")
    time.sleep(0.5)
    assert not Path(f"/proc/{jvm}").exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port), timeout=5)


def test_a_port_that_is_taken_is_named_before_spark_starts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "lexplain", "serve-sql", "--tables", str(folder / "tables"), "--port", str(port)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"port={port} of host='127.0.0.1' cannot be listened at (Address already in use)" in done.stdout
    assert "Write another --port" in done.stdout
    (log,) = re.findall(r"^details: (.*)$", done.stdout, flags=re.MULTILINE)
    assert "NativeCodeLoader" not in Path(log).read_text(encoding="utf-8")  # what every start of Spark says


def test_a_spark_without_the_thrift_server_says_so(folder: Path, tmp_path: Path) -> None:
    """The installed pyspark, but for one of its JARs."""
    installed, bare = Path(pyspark.__file__).parent, tmp_path / "pyspark"
    bare.mkdir()
    for part in installed.iterdir():
        if part.name == "bin":
            shutil.copytree(part, bare / "bin")
        elif part.name == "find_spark_home.py":  # it looks beside its own real path for the JARs
            shutil.copy2(part, bare)
        elif part.name != "jars":
            (bare / part.name).symlink_to(part)
    (bare / "jars").mkdir()
    for jar in (installed / "jars").iterdir():
        if not jar.name.startswith("spark-hive-thriftserver"):
            (bare / "jars" / jar.name).symlink_to(jar)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "lexplain", "serve-sql", "--tables", str(folder / "tables"), "--port", str(find_port())],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert "this Spark has no Thrift Server (spark-hive-thriftserver is not among its JARs)" in done.stdout


def test_tables_that_are_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lexplain", "serve-sql", "--tables", str(tmp_path), "--port", str(find_port())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "holds no tables of lexplain" in done.stdout
