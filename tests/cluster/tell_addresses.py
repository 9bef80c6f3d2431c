"""A driver of its own: each task tells which GPU its worker has, when it ran, and what lexplain makes of its address.

What is told is of two stages: one that runs models, and one that does not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession

from lexplain.devices import map_on_devices, request_gpu, task_device
from lexplain.errors import DeviceError
from lexplain.session import count_slots

SCHEMA = "worker STRING, begun DOUBLE, ended DOUBLE, said STRING"
TASKS = 8


def tell(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for _ in batches:
        begun = time.time()
        time.sleep(1.0)  # so that no worker takes all tasks
        try:
            said = task_device("gpu", local=False)
        except DeviceError as error:
            said = str(error)
        row = {"worker": os.environ["GPU_ADDRESS"], "begun": begun, "ended": time.time(), "said": said}
        yield pa.RecordBatch.from_pylist([row])


def never(batches: Iterator[pa.RecordBatch], /, *, device: str) -> Iterator[pa.RecordBatch]:
    raise AssertionError(f"there is no such device as {device}")


if __name__ == "__main__":
    spark = SparkSession.builder.getOrCreate()
    rows = spark.range(TASKS, numPartitions=TASKS)
    told = {"slots": {device: count_slots(spark, device) for device in ("cpu", "gpu")}}
    for device in ("cpu", "gpu"):
        stage = rows.mapInArrow(tell, SCHEMA, profile=request_gpu(spark, device))
        told[device] = [row.asDict() for row in stage.collect()]
    try:
        map_on_devices(rows, never, SCHEMA, "gpu").collect()
    except Exception as error:
        told["refused"] = str(error)
    Path(sys.argv[1]).write_text(json.dumps(told), encoding="utf-8")
