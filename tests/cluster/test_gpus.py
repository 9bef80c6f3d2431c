"""Two workers with a GPU each, both made up: every task is told its own worker's address, and takes no other device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lexplain.session import fetch_jars
from standalone import Standalone

ADDRESSES = ("5", "7")  # more than a machine without GPUs has, and not what counting would give
SETTINGS = {
    "spark.executor.resource.gpu.amount": "1",
    "spark.task.resource.gpu.amount": "1",
    "spark.cores.max": "2",
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.scheduler.maxRegisteredResourcesWaitingTime": "120s",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    fetch_jars()
    cluster = Standalone(tmp_path_factory.mktemp("gpus"))
    try:
        for address in ADDRESSES:
            cluster.start_worker(f"worker-{address}", gpu=address)
        yield cluster
    finally:
        cluster.stop()


def test_each_task_is_told_its_own_address(cluster: Standalone) -> None:
    log, told = cluster.folder / "driver.log", cluster.folder / "told.json"
    driver = cluster.submit(log, Path(__file__).with_name("tell_addresses.py"), str(told), settings=SETTINGS)
    assert driver.wait(timeout=300) == 0, log.read_text()
    rows = json.loads(told.read_text())
    assert len(rows) == 8
    assert {row["worker"] for row in rows} == set(ADDRESSES)
    for row in rows:
        assert f"the task's GPU address {row['worker']!r} is none of the" in row["said"], row
