"""One Spark session with Delta for all Spark tests: in this process, or of a Spark Connect server (`--connect`)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyspark
import pytest
from pyspark.sql import SparkSession

from lexplain.session import DELTA_SETTINGS, fetch_jars, find_jars, open_session, stop_session

# For the sessions of this process and for the command lines and clients that tests start.
os.environ["SPARK_CONF_DIR"] = str(Path(__file__).parent / "conf")

START_SECONDS = 120.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--connect", action="store_true", help="have only a thin client here, of a server started for it")


@pytest.fixture(scope="session")
def spark(pytestconfig: pytest.Config) -> Iterator[SparkSession]:
    """Two cores, few shuffle partitions; started once, since a JVM takes seconds."""
    fetch_jars()
    if pytestconfig.getoption("--connect"):
        with serve_connect() as url, pytest.MonkeyPatch.context() as patch:
            # The command lines that tests start find the server too, each with a session of its own.
            patch.setenv("SPARK_REMOTE", url)
            yield open_session("lexplain tests")
        return
    session = open_session("lexplain tests", master="local[2]", settings={"spark.sql.shuffle.partitions": "2"})
    yield session
    stop_session(session)


@contextmanager
def serve_connect() -> Iterator[str]:
    """Start a Spark Connect server from the installed pyspark, as a platform has one; yield its URL."""
    home = Path(pyspark.__file__).parent
    with tempfile.TemporaryDirectory(prefix="lexplain-connect-") as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        settings = {
            **DELTA_SETTINGS,
            "spark.jars": ",".join(map(str, find_jars())),
            "spark.connect.grpc.binding.address": "127.0.0.1",
            "spark.connect.grpc.binding.port": str(port),
            "spark.driver.memory": "2g",
            "spark.local.dir": scratch,
            "spark.sql.warehouse.dir": f"{scratch}/warehouse",
            "spark.sql.catalogImplementation": "in-memory",
            "spark.sql.shuffle.partitions": "2",
            "spark.databricks.delta.snapshotPartitions": "2",
            "spark.ui.enabled": "false",
        }
        command = [str(home / "bin" / "spark-submit"), "--master", "local[2]"]
        command += [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
        command += ["--class", "org.apache.spark.sql.connect.service.SparkConnectServer", "spark-internal"]
        environment = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
        log = Path(scratch) / "server.log"
        with log.open("w", encoding="utf-8") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            wait_for(port, server, log)
            yield f"sc://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=60)


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the Connect server did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")
