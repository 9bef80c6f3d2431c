"""A Delta table's history as its log and files tell it, read without Spark and without lexplain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as parquet

CHUNK = ("explain_key", "increment", "bucket")


class History:
    """The commits of one table; `read` takes in those that came since."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = -1
        self._added_by: dict[str, int] = {}
        self._live: dict[str, dict[str, str]] = {}  # with the values of partition columns, which are not in the file
        self.removals: list[tuple[int, str]] = []
        """(version, file) of rows that a commit took away."""

    @property
    def version(self) -> int:
        """The latest commit that was read; -1 before the table is there."""
        return self._version

    def read(self) -> History:
        while (log := self._folder / "_delta_log" / f"{self._version + 1:020}.json").is_file():
            self._version += 1
            for line in log.read_text(encoding="utf-8").splitlines():
                action = json.loads(line)
                if added := action.get("add"):
                    assert not added.get("deletionVector"), (
                        "rows are taken out of files: a file is no longer a commit's"
                    )
                    path = unquote(added["path"])
                    self._added_by[path] = self._version
                    self._live[path] = added["partitionValues"]
                if removed := action.get("remove"):
                    path = unquote(removed["path"])
                    self._live.pop(path, None)
                    self.removals.append((self._version, path))
        return self

    def rows(self) -> pa.Table:
        """Return the rows of the table as it is now."""
        tables = []
        for path, values in self._live.items():
            table = parquet.read_table(self._folder / path)
            for name, value in values.items():
                table = table.append_column(name, pa.array([value] * len(table), pa.string()))
            tables.append(table)
        return pa.concat_tables(tables)

    def commits_by_chunk(self) -> dict[tuple[Any, ...], set[int]]:
        """Return for each chunk of explanations the commits that ever added rows of it, removed ones too."""
        commits: dict[tuple[Any, ...], set[int]] = {}
        for path, version in self._added_by.items():
            for chunk in set(zip(*_read_columns(self._folder / path, CHUNK), strict=True)):
                commits.setdefault(chunk, set()).add(version)
        return commits


def _read_columns(file: Path, columns: Sequence[str]) -> Iterator[list[Any]]:
    table = parquet.read_table(file, columns=list(columns))
    return (table[column].to_pylist() for column in columns)


def digest(rows: pa.Table, *, without: Collection[str]) -> str:
    """Return a digest of rows in an order of their own, floats to the last bit, without some columns."""
    kept = rows.drop_columns([name for name in rows.column_names if name in without])
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in kept.to_pylist())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
