"""Two workers with a GPU each, both made up: every task is told its own worker's address, and takes no other device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lexplain.session import fetch_jars
from standalone import Standalone

ADDRESSES = ("5", "7")  # more than a machine without GPUs has, and not what counting would give
CORES = 2  # of a worker
SETTINGS = {
    "spark.executor.cores": str(CORES),
    "spark.executor.resource.gpu.amount": "1",
    "spark.cores.max": str(CORES * len(ADDRESSES)),
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.scheduler.maxRegisteredResourcesWaitingTime": "120s",
}
# What a task of any stage asks for. None: so every core has a task, and none has an address.
SHARES = {"whole": "1", "half": "0.5", "none": None}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    fetch_jars()
    cluster = Standalone(tmp_path_factory.mktemp("gpus"))
    try:
        for address in ADDRESSES:
            cluster.start_worker(f"worker-{address}", cores=CORES, gpu=address)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module", params=SHARES)
def told(cluster: Standalone, request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    share = SHARES[request.param]
    settings = SETTINGS if share is None else {**SETTINGS, "spark.task.resource.gpu.amount": share}
    log, told = cluster.folder / f"{request.param}.log", cluster.folder / f"{request.param}.json"
    driver = cluster.submit(log, Path(__file__).with_name("tell_addresses.py"), str(told), settings=settings)
    assert driver.wait(timeout=300) == 0, log.read_text()
    return request.param, json.loads(told.read_text())


def count_together(rows: list[dict[str, Any]]) -> int:
    """Return how many tasks ran at once on a worker, at most."""
    return max(
        sum(other["begun"] <= row["begun"] < other["ended"] for other in rows if other["worker"] == row["worker"])
        for row in rows
    )


def test_each_task_is_told_its_own_address(told: tuple[str, dict[str, Any]]) -> None:
    rows = told[1]["gpu"]
    assert len(rows) == 8
    assert {row["worker"] for row in rows} == set(ADDRESSES)
    for row in rows:
        assert f"the task's GPU address {row['worker']!r} is none of the" in row["said"], row


def test_tasks_that_run_models_share_no_gpu_and_others_take_every_core(told: tuple[str, dict[str, Any]]) -> None:
    share, rows = told
    assert count_together(rows["gpu"]) == 1
    assert rows["slots"]["gpu"] == len(ADDRESSES)
    assert count_together(rows["cpu"]) == (1 if share == "whole" else CORES)
    assert rows["slots"]["cpu"] == len(ADDRESSES) * (1 if share == "whole" else CORES)


def test_stages_that_run_models_ask_for_a_gpu(told: tuple[str, dict[str, Any]]) -> None:
    refused = told[1]["refused"]
    assert any(f"the task's GPU address {address!r} is none of the" in refused for address in ADDRESSES), refused
