"""The row of a run in the table `runs`, and what tells that nothing has changed since it finished. Driver only."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lexplain.corpus import Snapshot, take_snapshot
from lexplain.errors import CorpusError
from lexplain.keys import corpus_key, digest
from lexplain.schema import TABLES
from lexplain.tables import Tables, quote_text

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from lexplain.plan import Plan

_LIBRARIES = ("lexplain", "torch", "transformers", "tokenizers", "icu4py", "numpy", "pyspark", "delta-spark", "captum")


def read_record(tables: Tables, run_id: str) -> dict[str, Any] | None:
    """Return the row of a run; None if there is none."""
    rows = tables.read("runs").where(f"run_id = {quote_text(run_id)}").collect()
    return rows[0].asDict(recursive=True) if rows else None


def open_record(
    tables: Tables, plan: Plan, run_id: str, before: Mapping[str, Any] | None, mlflow_run_id: str | None
) -> dict[str, Any]:
    """Write the row of a run that starts, over that of an earlier start, and return it."""
    record: dict[str, Any] = {name: None for name, _, _ in TABLES["runs"].columns} | dict(before or {})
    # A finished run looks for new documents; an unfinished one goes on with what it has pinned since.
    kept: list[str] = []
    if before is not None and before["status"] != "finished":
        kept = ["corpus", "training"] if before["pinned"] is None else before["pinned"]  # None: an older lexplain's
    record |= {
        "run_id": run_id, "name": plan.name, "status": "running", "plan": plan.to_yaml(), "corpus_key": corpus_key(plan.corpus),
        "started_at": record["started_at"] or datetime.now(UTC), "detail": None, "mlflow_run_id": mlflow_run_id,
        "versions": _list_libraries(), "fingerprint": None, "pinned": kept,
    }  # fmt: skip
    write_record(tables, record)
    return record


def write_record(tables: Tables, record: Mapping[str, Any]) -> None:
    """Put a row in the place of the run's row."""
    values = {name: record[name] for name, _, _ in TABLES["runs"].columns}
    rows = tables.spark.createDataFrame([values], TABLES["runs"].schema)
    tables.replace(rows, "runs", where=f"run_id = {quote_text(str(record['run_id']))}")


def read_finished(tables: Tables, name: str, run_id: str) -> dict[str, Any] | None:
    """Return the row of a finished run; None if another one of its name finished later, whose keywords the views show."""
    rows = tables.read("runs").where(f"name = {quote_text(name)} AND finished_at IS NOT NULL").collect()
    last = max(rows, key=lambda row: row["finished_at"], default=None)
    if last is None or (last["run_id"], last["status"]) != (run_id, "finished"):
        return None
    return last.asDict(recursive=True)


def take_snapshots(spark: SparkSession, plan: Plan) -> dict[str, Snapshot]:
    """Return what pins the sources now, by corpus_key; none if one cannot be read, of which its stage will tell."""
    found: dict[str, Snapshot] = {}
    try:
        for name, source in (("corpus", plan.corpus), ("training", plan.training)):
            if source is not None and corpus_key(source) not in found:
                found[corpus_key(source)] = take_snapshot(spark, source, name)
    except CorpusError:
        return {}
    return found


def digest_state(plan: Plan, snapshots: Mapping[str, str | None], versions: Mapping[str, int]) -> str:
    """Return a digest of all that a finished run rests on: while it stays, running the plan again changes no row.

    Args:
        plan: The plan, all of it: thresholds decide what is made of the same explanations.
        snapshots: Names of the sources' snapshots, by corpus_key.
        versions: As `read_versions` returns them.
    """
    return digest("state", plan.to_yaml(), _list_libraries(), snapshots, versions)


def read_versions(tables: Tables) -> dict[str, int]:
    """Return the Delta versions of the tables, but of `runs`: each start writes to it, if only that it began."""
    return {name: version for name, version in tables.versions().items() if name != "runs"}


def _list_libraries() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
