"""What a Spark session did, from its event log: queries, their final plans, stages and files read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_STAGE = {
    "run_seconds": ("internal.metrics.executorRunTime", 1e-3),
    "cpu_seconds": ("internal.metrics.executorCpuTime", 1e-9),
    "gc_seconds": ("internal.metrics.jvmGCTime", 1e-3),
    "input_bytes": ("internal.metrics.input.bytesRead", 1),
    "shuffle_write_bytes": ("internal.metrics.shuffle.write.bytesWritten", 1),
    "shuffle_write_rows": ("internal.metrics.shuffle.write.recordsWritten", 1),
    "spilled_bytes": ("internal.metrics.diskBytesSpilled", 1),
    "peak_execution_bytes": ("internal.metrics.peakExecutionMemory", 1),
}


@dataclass
class Scan:
    """One table that a query read: what the scan's own metrics say."""

    table: str
    files: int = 0
    bytes: int = 0


@dataclass
class Query:
    """One SQL execution.

    Attributes:
        section: The job description that it ran under.
        plan: Spark's text of the plan as it was in the end, after adaptive changes.
        seconds: From start to end.
        stages: Figures of each stage, in the order of their ends.
        scans: Tables read.
    """

    section: str
    plan: str
    seconds: float = 0.0
    stages: list[dict[str, float]] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)

    def total(self, figure: str) -> float:
        """Return the sum of a figure over the stages."""
        return sum(stage.get(figure, 0) for stage in self.stages)


def make_log_settings(folder: Path) -> dict[str, str]:
    """Return the settings of a session that writes its event log there."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "spark.eventLog.enabled": "true", "spark.eventLog.dir": folder.as_uri(), "spark.eventLog.compress": "false",
        "spark.eventLog.logStageExecutorMetrics": "true", "spark.executor.metrics.pollingInterval": "500",
        "spark.sql.maxPlanStringLength": "1000000", "spark.sql.debug.maxToStringFields": "1000",
    }  # fmt: skip


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of the logs in a folder, whether rolled or not, finished or not."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "appstatus" not in path.name):
        if path.suffix == ".crc":
            continue
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))


def read_heap_peak(folder: Path) -> int:
    """Return the most bytes that the JVM's heap held, as polled."""
    peaks = [
        event["Executor Metrics"]["JVMHeapMemory"]
        for event in read_events(folder)
        if event["Event"] == "SparkListenerStageExecutorMetrics"
    ]
    return max(peaks, default=0)


def read_java(folder: Path) -> str:
    """Return the session's Java version."""
    started = next(event for event in read_events(folder) if event["Event"] == "SparkListenerEnvironmentUpdate")
    return str(started["JVM Information"]["Java Version"])


def read_queries(folder: Path) -> list[Query]:
    """Return the session's SQL executions, in their order."""
    queries: dict[int, Query] = {}
    starts: dict[int, int] = {}
    metrics: dict[int, tuple[int, str, str]] = {}  # accumulator: execution, table, name of the metric
    values: dict[int, int] = {}
    stages: dict[int, int] = {}
    for event in read_events(folder):
        kind = event["Event"].rpartition(".")[2]
        if kind == "SparkListenerSQLExecutionStart":
            number = event["executionId"]
            queries[number] = Query(event["description"], event["physicalPlanDescription"])
            starts[number] = event["time"]
            _list_scans(number, event["sparkPlanInfo"], metrics)
        elif kind == "SparkListenerSQLAdaptiveExecutionUpdate":
            queries[event["executionId"]].plan = event["physicalPlanDescription"]
            _list_scans(event["executionId"], event["sparkPlanInfo"], metrics)
        elif kind == "SparkListenerSQLExecutionEnd":
            number = event["executionId"]
            queries[number].seconds = (event["time"] - starts[number]) / 1e3
        elif kind == "SparkListenerDriverAccumUpdates":
            values |= dict(event["accumUpdates"])
        elif kind == "SparkListenerStageSubmitted":
            execution = event.get("Properties", {}).get("spark.sql.execution.id")
            if execution is not None:
                stages[event["Stage Info"]["Stage ID"]] = int(execution)
        elif kind == "SparkListenerStageCompleted" and event["Stage Info"]["Stage ID"] in stages:
            queries[stages[event["Stage Info"]["Stage ID"]]].stages.append(_measure_stage(event["Stage Info"]))
    _add_scans(queries, metrics, values)
    return list(queries.values())


def _measure_stage(stage: dict[str, Any]) -> dict[str, float]:
    found = {
        each["Name"]: float(each["Value"]) for each in stage["Accumulables"] if each["Name"].startswith("internal.")
    }
    figures = {name: found.get(metric, 0.0) * unit for name, (metric, unit) in _STAGE.items()}
    seconds = (stage["Completion Time"] - stage["Submission Time"]) / 1e3
    return {"stage": stage["Stage ID"], "tasks": stage["Number of Tasks"], "seconds": seconds} | figures


def _list_scans(number: int, plan: dict[str, Any], metrics: dict[int, tuple[int, str, str]]) -> None:
    if "Scan" in plan["nodeName"]:
        # as PreparedDeltaFileIndex(1 paths)[file:/sink/keywords]
        table = plan.get("metadata", {}).get("Location", plan["nodeName"]).rstrip("]").rpartition("/")[2]
        for metric in plan["metrics"]:
            if metric["name"] in ("number of files read", "size of files read"):
                metrics[metric["accumulatorId"]] = (number, table, metric["name"])
    for child in plan["children"]:
        _list_scans(number, child, metrics)


def _add_scans(queries: dict[int, Query], metrics: dict[int, tuple[int, str, str]], values: dict[int, int]) -> None:
    # A scan's two accumulators are made one after the other, but for others between them.
    found: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for accumulator, (number, table, name) in sorted(metrics.items()):
        if accumulator in values:
            found.setdefault((number, table), []).append((values[accumulator], name))
    for (number, table), read in found.items():
        files = sum(value for value, name in read if name == "number of files read")
        size = sum(value for value, name in read if name == "size of files read")
        queries[number].scans.append(Scan(table, files, size))


def summarise(queries: list[Query]) -> dict[str, Any]:
    """Return the figures of some queries as JSON: seconds, totals, and each stage that took a second or more."""
    totals = {name: sum(query.total(name) for query in queries) for name in _STAGE if name != "peak_execution_bytes"}
    return {
        "queries": len(queries), "query_seconds": sum(query.seconds for query in queries), **totals,
        "peak_execution_bytes": max((s["peak_execution_bytes"] for q in queries for s in q.stages), default=0),
        "stages": [stage for query in queries for stage in query.stages if stage["seconds"] >= 1],
        "scans": [asdict(scan) for query in queries for scan in query.scans],
    }  # fmt: skip
