"""Python workers that hang: Spark's own settings, on while chunks are made and as they were before and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from core.models import save_trainable
from lexplain.devices import map_on_devices
from lexplain.errors import LimitError
from lexplain.methods import find_method
from lexplain.pipeline import open_run
from lexplain.session import lost_worker, stop_silent_workers, trace_workers
from spark.planted import RecordedProgress, load_plan, make_plan, plant, write_json

pytestmark = pytest.mark.slow

NAMES = ("idleTimeoutSeconds", "killOnIdleTimeout", "tracebackDumpIntervalSeconds", "faulthandler.enabled")
IDLE, TRACED = {"idleTimeoutSeconds": "100", "killOnIdleTimeout": "true"}, {
    "tracebackDumpIntervalSeconds": "50", "faulthandler.enabled": "true",
}  # fmt: skip


def read_settings(spark: SparkSession) -> dict[str, str]:
    found = {name: spark.conf.get(f"spark.sql.execution.pyspark.udf.{name}", None) for name in NAMES}
    return {name: value for name, value in found.items() if value is not None}


class Watching(RecordedProgress):
    """Notes the settings each time that a stage gets on."""

    def __init__(self, spark: SparkSession) -> None:
        super().__init__()
        self._spark = spark
        self._stage = ""
        self.seen: dict[str, list[dict[str, str]]] = {}

    def start(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self._stage = stage
        super().start(stage, total, unit, done)

    def advance(self, units: int) -> None:
        self.seen.setdefault(self._stage, []).append(read_settings(self._spark))
        super().advance(units)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", plant(60, seed=1))
    return folder


def plan(folder: Path, sink: str, **execution: Any) -> dict[str, Any]:
    models = {"base": str(folder / "base"), "splits": 2, "epochs": 1}
    made = make_plan(folder, models=models, mlflow={"enabled": False}, sink={"path": str(folder / sink)})
    return made | {"execution": {"device": "cpu", "chunk_documents": 30, **execution}}


def watch(spark: SparkSession, plan: dict[str, Any]) -> Watching:
    progress = Watching(spark)
    with open_run(spark, load_plan(plan), find_method, progress) as run:
        run.fine_tune()
        run.attribute()
        run.finish("finished")
    return progress


@pytest.fixture
def own_setting(spark: SparkSession) -> Iterator[dict[str, str]]:
    """What a platform's session has set itself."""
    key = "spark.sql.execution.pyspark.udf.idleTimeoutSeconds"
    spark.conf.set(key, "7000")
    yield {"idleTimeoutSeconds": "7000"}
    spark.conf.unset(key)


def test_only_the_tasks_that_give_signs_of_life_are_stopped(
    spark: SparkSession, folder: Path, own_setting: dict[str, str]
) -> None:
    progress = watch(spark, plan(folder, "watched", idle_timeout_seconds=100))
    assert len(progress.seen["attribute"]) > 1
    assert all(seen == TRACED | IDLE for seen in progress.seen["attribute"])
    assert progress.seen["fine-tune"]
    assert all(seen == TRACED | own_setting for seen in progress.seen["fine-tune"])
    assert read_settings(spark) == own_setting


def test_without_a_timeout_the_session_is_left_alone(spark: SparkSession, folder: Path) -> None:
    progress = watch(spark, plan(folder, "alone", idle_timeout_seconds=None))
    assert all(seen == {} for stage in progress.seen.values() for seen in stage)


def test_a_stage_that_fails_leaves_the_session_as_it_was(
    spark: SparkSession, folder: Path, own_setting: dict[str, str]
) -> None:
    stopped = plan(folder, "failing", idle_timeout_seconds=100) | {"limits": {"device_hours": 1e-9}}
    with pytest.raises(LimitError):
        watch(spark, stopped)
    assert read_settings(spark) == own_setting


def run_task(spark: SparkSession, seconds: float, sign_every: float | None) -> int:
    """Run a task that takes so long and yields one row; with empty batches meanwhile, or without."""
    schema = pa.schema([("id", pa.int64())])

    def work(batches: Iterator[pa.RecordBatch], *, device: str) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(sign_every or seconds)
            if sign_every:
                yield pa.RecordBatch.from_pylist([], schema=schema)
        yield pa.RecordBatch.from_pylist([{"id": 1}], schema=schema)

    return len(map_on_devices(spark.range(1, numPartitions=1), work, "id BIGINT", "cpu").collect())


def test_a_silent_worker_is_stopped_and_one_that_gives_signs_is_not(spark: SparkSession) -> None:
    """Empty batches once stayed in the worker's buffer, where they are no sign to anybody."""
    with stop_silent_workers(spark, 3):
        begun = time.monotonic()
        with pytest.raises(Exception, match=r"idle timeout|exited unexpectedly") as raised:
            run_task(spark, 600, None)
        assert time.monotonic() - begun < 300
        assert lost_worker(raised.value)
        assert run_task(spark, 9, 0.5) == 1
    assert run_task(spark, 6, None) == 1


def test_a_crash_tells_where(spark: SparkSession) -> None:
    def crash(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import faulthandler

        faulthandler._sigsegv()  # type: ignore[attr-defined]
        yield from batches

    with trace_workers(spark, 100), pytest.raises(Exception, match="Segmentation fault") as raised:
        spark.range(1).mapInArrow(crash, "id BIGINT").collect()
    assert "in crash" in str(raised.value)
    assert lost_worker(raised.value)
