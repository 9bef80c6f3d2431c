"""A Spark session with Delta: local by default, the cluster's own where there is one.

The only module that opens a session or touches the JVM. Driver only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from filelock import FileLock

from lexplain.errors import SessionError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DELTA_VERSION = "4.4.0"
DELTA_PACKAGE = f"io.delta:delta-spark_4.2_2.13:{DELTA_VERSION}"
# What Delta needs beyond Spark's own JARs. The rest that a resolver brings are older twins of JARs in pyspark.
DELTA_JARS = (
    f"delta-spark_4.2_2.13-{DELTA_VERSION}.jar",
    f"delta-storage-{DELTA_VERSION}.jar",
    f"delta-kernel-api-{DELTA_VERSION}.jar",
    f"delta-kernel-defaults-{DELTA_VERSION}.jar",
    f"delta-kernel-unitycatalog-{DELTA_VERSION}.jar",
    "unitycatalog-client-0.6.0.jar",
    "unitycatalog-hadoop-0.6.0.jar",
)
_EXCLUDED = (
    "com.google.code.findbugs:*",
    "org.apache.hadoop:*",
    "com.fasterxml.jackson.core:*",
    "com.fasterxml.jackson.datatype:*",
    "com.fasterxml.jackson.module:*",
    "org.apache.parquet:*",
    "org.apache.logging.log4j:*",
    "org.roaringbitmap:*",
    "org.slf4j:*",
)
DELTA_SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
SUPPORTED_JAVA = (17, 21)
_SCRATCH = "lexplain-spark-"
# Local mode gives a task no second try unless it is told to: a worker may have hung, or been killed for memory.
_LOCAL = "local[*,2]"
_PYTHON_WORKER = "spark.sql.execution.pyspark.udf."
_SINGLE_SESSION = "spark.sql.hive.thriftServer.singleSession"


def find_java() -> Path:
    """Return the Java executable that Spark will use.

    Raises:
        SessionError: There is none, or its version is not one that Spark 4.2 supports.
    """
    home = os.environ.get("JAVA_HOME")
    found = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    install = (
        "Install Java 17 or 21: `sudo apt install openjdk-17-jre-headless` on Debian and Ubuntu, "
        "`brew install openjdk@17` on macOS; or point JAVA_HOME at one."
    )
    if found is None or not Path(found).is_file():
        where = f"JAVA_HOME={home!r} holds no bin/java" if home else "java was not found"
        raise SessionError(f"{where}. Spark cannot start without it. {install}")
    try:
        answer = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=60, check=False).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SessionError(
            f"java={found!r} does not run ({error}). Spark cannot start without it. {install}"
        ) from error
    version = re.search(r'version "(\d+)(?:\.(\d+))?', answer)
    major = 0 if version is None else int(version[1])
    if major not in SUPPORTED_JAVA:
        shown = f"version {major}" if version else "no version (is it macOS's placeholder?)"
        raise SessionError(f"java={found!r} has {shown}, not 17 or 21. Spark 4.2 would have failed later. {install}")
    return Path(found)


def find_poms_without_jar() -> list[Path]:
    """Return the POMs in the user's Maven cache that keep Spark's resolver from fetching the Delta JARs.

    Where it finds a module's POM, it looks for the JAR beside it and nowhere else.
    """
    poms = (Path.home() / ".m2" / "repository" / "io").glob("*/*/*/*.pom")
    jars = {pom: pom.with_suffix(".jar") for pom in poms}
    return sorted(pom for pom, jar in jars.items() if jar.name in DELTA_JARS and not jar.is_file())


def jar_folder() -> Path:
    """Return the folder of the Delta JARs: one a Delta version, under the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lexplain" / f"delta-{DELTA_VERSION}"


def find_jars() -> list[Path]:
    """Return the Delta JARs, in order; raises SessionError when they were never fetched."""
    jars = [jar_folder() / name for name in DELTA_JARS]
    missing = [jar.name for jar in jars if not jar.is_file()]
    if missing:
        raise SessionError(
            f"the Delta JARs are not in {jar_folder()} ({missing[0]} is missing). No Delta table could be written. "
            "Run `lexplain fetch-jars` once, with a network."
        )
    return jars


def fetch_jars() -> Path:
    """Fetch the Delta JARs once, by Spark's own resolver; later starts need no network.

    Returns:
        Their folder.

    Raises:
        SessionError: The resolver failed; its last lines are in the message.
    """
    folder = jar_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if all((folder / name).is_file() for name in DELTA_JARS):
            return folder
        find_java()
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            arrived = Path(scratch) / "jars"
            _resolve(Path(scratch) / "ivy", arrived)
            if folder.exists():
                shutil.rmtree(folder)
            arrived.rename(folder)
    return folder


def _resolve(ivy: Path, arrived: Path) -> None:
    import pyspark

    # The resolver runs before any main class; this one prints Hadoop's version and ends.
    command = [
        str(Path(pyspark.__file__).parent / "bin" / "spark-submit"),
        "--master", "local[1]",
        "--packages", DELTA_PACKAGE,
        "--exclude-packages", ",".join(_EXCLUDED),
        "--conf", f"spark.jars.ivy={ivy}",
        "--class", "org.apache.hadoop.util.VersionInfo",
        "spark-internal",
    ]  # fmt: skip
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"}
    environment.pop("SPARK_HOME", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    arrived.mkdir()
    for name in DELTA_JARS:
        found = list((ivy / "jars").glob(f"*_{name}"))
        if not found:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            blocking = find_poms_without_jar()
            hint = (
                f"{blocking[0]} has no JAR beside it: `lexplain doctor` tells what to remove"
                if blocking
                else ("Check the network, then try again")
            )
            raise SessionError(
                f"Spark's resolver did not bring {name}. No Delta table could be written. {hint}.\n{tail}"
            )
        shutil.copy2(found[0], arrived / name)


def open_session(
    name: str,
    *,
    master: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> SparkSession:
    """Return a Spark session that can write Delta tables.

    A session that is already there (a platform's notebook or job) is used as it is; under `spark-submit` the
    submitted settings count; otherwise a local one is started from the JARs that `fetch_jars` brought.

    Args:
        name: Application name.
        master: Spark master of a session that is started here; all cores of this machine when None.
        settings: Further settings of a session that is started here.

    Raises:
        SessionError: Java or the JARs are missing, or the session there is has no Delta.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        _check_delta(active)
        return active
    builder = SparkSession.builder.appName(name)
    if is_given():
        session = builder.getOrCreate()
        _check_delta(session)
        return session
    find_java()
    # Python workers take the PATH's python3 otherwise, which has none of our packages.
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    os.environ.pop("SPARK_HOME", None)
    for key, value in {**_local_settings(), "spark.master": master or _LOCAL, **(settings or {})}.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def has_session() -> bool:
    """Return whether this process has a Spark session already, as a platform's notebook or job does."""
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession() is not None


def is_given() -> bool:
    """Return whether this process is given its session, by `spark-submit` or Spark Connect."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_REMOTE" in os.environ


def _local_settings() -> dict[str, str]:
    jars = ",".join(map(str, find_jars()))
    scratch = tempfile.mkdtemp(prefix=_SCRATCH)
    return {
        **DELTA_SETTINGS,
        "spark.jars": jars,
        "spark.driver.memory": "2g",
        "spark.driver.host": "127.0.0.1",
        "spark.local.dir": scratch,
        "spark.sql.warehouse.dir": f"{scratch}/warehouse",
        # Derby admits one process only; tables are registered by location instead.
        "spark.sql.catalogImplementation": "in-memory",
        # VACUUM lists folders in so many tasks, by default 10 000, however few there are.
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": "8",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "4",
        # A job's statements return with each chunk. Of 100 compiled classes, Spark's default, most were made anew
        # each time: a quarter of the CPU time of a small job.
        "spark.sql.codegen.cache.maxEntries": "2000",
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.databricks.delta.properties.defaults.checkpointInterval": "20",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "512",
        # So that clients of `serve_thrift` see the views and functions of this session; it cannot be set later.
        _SINGLE_SESSION: "true",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.speculation": "false",
    }


def _check_delta(session: SparkSession) -> None:
    extensions = session.conf.get("spark.sql.extensions", "") or ""
    on_databricks = session.conf.get("spark.databricks.clusterUsageTags.sparkVersion", None) is not None
    if "DeltaSparkSessionExtension" in extensions or on_databricks:
        return
    # These settings act when the JVM starts; setting them on a live session would change nothing.
    options = " ".join(f"--conf {key}={value}" for key, value in DELTA_SETTINGS.items())
    raise SessionError(
        "the Spark session has no Delta (spark.sql.extensions does not name it). The first write would have failed. "
        f"Start it with: --packages {DELTA_PACKAGE} {options}"
    )


def is_local(spark: SparkSession) -> bool:
    """Return whether all tasks run in this one machine's process."""
    return (spark.conf.get("spark.master", "") or "").startswith("local[") or spark.conf.get(
        "spark.master", ""
    ) == "local"


def asks_for_gpu(spark: SparkSession, device: Literal["auto", "cpu", "gpu"]) -> bool:
    """Return whether a stage that runs models asks for a GPU a task: executors have some, and a task asks for less than one.

    Local mode gives tasks no GPU. Under dynamic allocation a stage that asks for other things than the session gets
    executors of its own, which wait for those that there are to give their GPUs back.
    """
    dynamic = spark.conf.get("spark.dynamicAllocation.enabled", None) == "true"
    gpus, gpus_a_task = _read_gpus(spark)
    return device != "cpu" and gpus >= 1 and gpus_a_task < 1 and not dynamic and not is_local(spark)


def count_slots(spark: SparkSession, device: Literal["auto", "cpu", "gpu"]) -> int:
    """Return how many tasks that run models do so at once: as many as cores allow, and GPUs where tasks ask for them.

    A thin client cannot see the cores; then a setting of Spark stands for them.

    Args:
        spark: A session of any kind.
        device: What the plan says: tasks that compute on the CPU ask for no GPU beyond the session's settings.
    """
    try:
        cores = float(spark.sparkContext.defaultParallelism)
    except Exception:  # Spark Connect has no context, and says so with an error class of its own
        shuffled = _read_number(spark, "spark.sql.shuffle.partitions", 8)
        cores = _read_number(spark, "spark.default.parallelism", shuffled)
    slots = cores // _read_number(spark, "spark.task.cpus", 1)
    gpus, gpus_a_task = _read_gpus(spark)
    if asks_for_gpu(spark, device):
        gpus_a_task = 1
    if gpus and gpus_a_task:
        executors = max(1, cores // _read_number(spark, "spark.executor.cores", cores))
        slots = min(slots, executors * (gpus // gpus_a_task))
    return max(1, int(slots))


def count_devices(spark: SparkSession, device: Literal["auto", "cpu", "gpu"]) -> int:
    """Return how many tasks that run models do so on a device of their own: all of a local session's share its machine."""
    return 1 if is_local(spark) else count_slots(spark, device)


def _read_gpus(spark: SparkSession) -> tuple[float, float]:
    """Return the GPUs of an executor, and of a task, as the session's settings say."""
    executor, task = (_read_number(spark, f"spark.{place}.resource.gpu.amount", 0) for place in ("executor", "task"))
    return executor, task


def _read_number(spark: SparkSession, key: str, default: float) -> float:
    return float(spark.conf.get(key, None) or default)


@contextmanager
def trace_workers(spark: SparkSession, seconds: int | None) -> Iterator[None]:
    """Let Python workers tell where they are: in the task's error when they crash, and in their log time and again.

    For all of a job, not for one stage: Spark starts other workers where these settings differ, and those would load
    every model again while the first ones still hold theirs in the device's memory.

    Args:
        spark: A session of any kind; it is left as it was.
        seconds: Between two traces in a worker's stderr; None for none, and for nothing at a crash.
    """
    settings = {"faulthandler.enabled": "true", "tracebackDumpIntervalSeconds": str(seconds)}
    with _override(spark, {} if seconds is None else settings):
        yield


@contextmanager
def stop_silent_workers(spark: SparkSession, seconds: int | None) -> Iterator[None]:
    """Let Spark stop Python workers that send nothing for so long; it fails their tasks, and tries them again.

    Args:
        spark: A session of any kind; it is left as it was.
        seconds: Longest silence, of starting and of loading models too; None for any.
    """
    settings = {"idleTimeoutSeconds": str(seconds), "killOnIdleTimeout": "true"}
    with _override(spark, {} if seconds is None else settings):
        yield


def lost_worker(error: BaseException) -> bool:
    """Return whether a Spark job failed because a Python worker was stopped for its silence, crashed, or was killed.

    Spark cannot always tell these apart: of a worker that it has stopped itself, it may see that the connection was reset.
    """
    said = str(error)
    return "terminated due to idle timeout" in said or "Python worker exited unexpectedly" in said


@contextmanager
def _override(spark: SparkSession, settings: Mapping[str, str]) -> Iterator[None]:
    before = {f"{_PYTHON_WORKER}{name}": spark.conf.get(f"{_PYTHON_WORKER}{name}", None) for name in settings}

    def restore() -> None:
        for key, value in before.items():
            if value is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, value)

    for name, value in settings.items():
        spark.conf.set(f"{_PYTHON_WORKER}{name}", value)
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error is the one to report; the session may be gone
            restore()
        raise
    restore()


def find_beeline() -> str:
    """Return the command of Spark's own JDBC client, for a shell in which no environment is activated."""
    import pyspark

    home = Path(pyspark.__file__).parent
    return f"SPARK_HOME={shlex.quote(str(home))} {shlex.quote(str(home / 'bin' / 'beeline'))}"


def check_port(host: str, port: int) -> None:
    """Check that a server can listen there.

    Raises:
        SessionError: Another one does, or the address is none of this machine.
    """
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address, which is said anyhow
        raise SessionError(
            f"port={port} of host={host!r} cannot be listened at ({reason}). Clients would have met another server, or "
            "none. Write another --port, or end what holds it: `ss -ltnp` names it."
        ) from error


@contextmanager
def serve_thrift(spark: SparkSession, host: str, port: int) -> Iterator[None]:
    """Let clients of HiveServer2 (JDBC, ODBC, Python) query this session, its temporary views and functions included.

    All clients share the session, and may do what it may: there is no password.

    Args:
        spark: What they query.
        host: Address to listen at.
        port: Its port.

    Raises:
        SessionError: Spark has no Thrift Server here, or it does not start.
    """
    from py4j.java_gateway import JavaPackage
    from py4j.protocol import Py4JError, Py4JJavaError

    jvm: Any = getattr(getattr(spark, "sparkContext", None), "_jvm", None)
    server = None if jvm is None else jvm.org.apache.spark.sql.hive.thriftserver.HiveThriftServer2
    if server is None or isinstance(server, JavaPackage):
        raise SessionError(
            "this Spark has no Thrift Server (spark-hive-thriftserver is not among its JARs). Nobody could have connected. "
            "Install pyspark as lexplain asks for it: `pip install 'lexplain[local]'`."
        )
    if spark.conf.get(_SINGLE_SESSION, "false") != "true":
        raise SessionError(
            f"{_SINGLE_SESSION} is not true in the session there is. Clients would have seen no view and no function. Submit "
            f"with --conf {_SINGLE_SESSION}=true."
        )
    # Logs would lie where the command was started (derby.log), and in a folder that all users of the machine share.
    jvm.java.lang.System.setProperty("derby.stream.error.field", "java.lang.System.out")
    scratch = spark.conf.get("spark.local.dir", None)
    if scratch is not None:
        spark.conf.set("hive.server2.logging.operation.log.location", f"{scratch}/operation-logs")
    spark.conf.set("hive.server2.thrift.bind.host", host)
    spark.conf.set("hive.server2.thrift.port", str(port))
    try:
        # False: raise instead of ending the JVM.
        running = server.startWithSparkSession(cast(Any, spark)._jsparkSession, False)
    except Py4JJavaError as error:
        raise SessionError(
            f"Spark's Thrift Server does not start at {host}:{port} ({str(error.java_exception).splitlines()[0]}). Nobody could "
            "have connected. Write another --port, or look into the log."
        ) from error
    try:
        yield
    finally:
        with suppress(Py4JError):  # whoever ends this process may have ended the JVM before it
            running.stop()


def wait_for_jvm(spark: SparkSession) -> None:
    """Wait until the process is interrupted.

    Raises:
        SessionError: The JVM has ended before.
    """
    process: Any = getattr(getattr(spark.sparkContext, "_gateway", None), "proc", None)
    if process is None:  # the session is another program's
        threading.Event().wait()
    raise SessionError(
        f"Spark's JVM ended with code {process.wait()}. Clients would have waited for answers. Start the command again; if it "
        "ran out of memory, write a larger spark.driver.memory."
    )


def stop_session(spark: SparkSession) -> None:
    """Stop a local session and the JVM with it, so that the process ends at once; its scratch folder goes too."""
    gateway: Any = getattr(getattr(spark, "sparkContext", None), "_gateway", None)
    process = getattr(gateway, "proc", None)
    try:
        scratch = Path(spark.conf.get("spark.local.dir", None) or "")
        spark.stop()
    except Exception:
        if process is None:
            raise
        process.wait(timeout=30)  # a JVM that was sent the same signal ends by itself
        return
    if process is not None:
        gateway.shutdown()
        process.stdin.close()
        process.wait(timeout=30)
    if scratch.name.startswith(_SCRATCH):  # our own; Spark leaves it
        shutil.rmtree(scratch, ignore_errors=True)
