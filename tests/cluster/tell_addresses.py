"""A driver of its own: each task tells which GPU its worker has, and what lexplain makes of the address that Spark gave it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyspark.sql import SparkSession

from lexplain.devices import task_device
from lexplain.errors import DeviceError


def tell(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for _ in batches:
        time.sleep(1.0)  # so that no worker takes all tasks
        try:
            said = task_device("gpu", local=False)
        except DeviceError as error:
            said = str(error)
        yield pa.RecordBatch.from_pylist([{"worker": os.environ["GPU_ADDRESS"], "said": said}])


if __name__ == "__main__":
    spark = SparkSession.builder.getOrCreate()
    told = spark.range(8, numPartitions=8).mapInArrow(tell, "worker STRING, said STRING").collect()
    Path(sys.argv[1]).write_text(json.dumps([row.asDict() for row in told]), encoding="utf-8")
