"""Stages whose tasks run models: how they get a device each, and how the functions that executors run are told which.

The driver makes these functions; what they close over is plain values, never a session, a DataFrame or a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, Protocol

from lexplain.executor import choose_device
from lexplain.session import asks_for_gpu, is_local

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.resource import ResourceProfile
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import StructType


class DeviceWork(Protocol):
    """What executors do with Arrow batches, once they know their device."""

    def __call__(self, batches: Iterator[pa.RecordBatch], /, *, device: str) -> Iterator[pa.RecordBatch]:
        """Yield what is made of the batches."""


def map_on_devices(
    rows: DataFrame, work: DeviceWork, schema: StructType | str, device: Literal["auto", "cpu", "gpu"]
) -> DataFrame:
    """Return what executors make of rows: a `mapInArrow` whose tasks have a device each. Runs on the driver.

    Where a task of the session asks for less than a GPU, so that other stages use all cores, these tasks ask for a whole
    one: two on a GPU would hold two copies of each model in its memory.

    Args:
        rows: In the partitions that tasks are to have.
        work: With everything but batches and device bound, see `on_task_device`.
        schema: Of what `work` yields.
        device: What the plan says.
    """
    spark = rows.sparkSession
    return rows.mapInArrow(on_task_device(work, device, is_local(spark)), schema, profile=request_gpu(spark, device))


def request_gpu(spark: SparkSession, device: Literal["auto", "cpu", "gpu"]) -> ResourceProfile | None:
    """Return what a stage asks for whose tasks each take a whole GPU; None where the session's settings are enough.

    Stage-level scheduling, without executors of its own. Runs on the driver.
    """
    if not asks_for_gpu(spark, device):
        return None
    from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

    # The cores stay as they are: a task's CPUs are the session's setting, and threads are counted by it.
    cpus = int(spark.conf.get("spark.task.cpus", None) or 1)
    return ResourceProfileBuilder().require(TaskResourceRequests().cpus(cpus).resource("gpu", 1)).build


def on_task_device(
    work: DeviceWork, device: Literal["auto", "cpu", "gpu"], local: bool
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return the function that executors run: `work`, told the device of its Spark task.

    It closes over plain values only. Unpickling it must not import torch, or a GPU that has no number (MIG) could no
    longer be chosen: `work` is a function of `lexplain.executor` or `lexplain.sampling`.

    Args:
        work: With everything but batches and device bound.
        device: What the plan says.
        local: The session runs in local mode.
    """

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _send_signs(work(batches, device=task_device(device, local)))

    return run


def _send_signs(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Repeat each empty batch, a sign of life, until it leaves the buffer in which a Python worker keeps what it sends."""
    for batch in batches:
        yield batch
        if batch.num_rows == 0:
            import pyarrow as pa

            buffer_bytes = int(os.environ.get("SPARK_BUFFER_SIZE", 65_536))  # Spark tells its workers
            for _ in range(buffer_bytes // pa.ipc.get_record_batch_size(batch)):
                yield batch


def task_device(requested: Literal["auto", "cpu", "gpu"], local: bool) -> str:
    """Return the device of the Spark task that calls. Runs on an executor."""
    from pyspark import TaskContext

    context = TaskContext.get()
    resources = {} if context is None else context.resources()
    addresses = resources["gpu"].addresses if "gpu" in resources else []
    partition = context.partitionId() if context is not None and local else None
    return choose_device(requested, addresses, local_partition=partition)
