"""The Delta tables of one sink: created, registered, read, and the two ways to write.

Both are safe for jobs that write at once: `replace` puts rows in the place of those that they supersede, so that
rows written twice are there once, and `add_first` lets the first of several writers win.

Tables live in a schema of a catalog (a platform), or under one folder with no metastore at all; then each
session registers them by location, and `catalog.sql` beside them does the same for any other client.
Driver only.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lexplain.errors import TableError
from lexplain.schema import OLDEST_VERSION, SCHEMA_VERSION, TABLES, Table
from lexplain.views import EVIDENCE_SQL, VIEWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyspark.sql import DataFrame, SparkSession

    from lexplain.plan import Sink

_LOCK, _HOLDER, _CATALOG = ".writer.lock", ".writer", "catalog.sql"
RETAIN_HOURS = 168.0
"""How long files of older versions are kept at least: a query or job that started before may still read them."""

_HEADER = "-- Tables of lexplain, schema version "

# Another job's commit to the same table makes Delta refuse ours, whichever rows it is about.
_COMMIT_ATTEMPTS = 10


class Tables:
    """The tables of one sink, opened in one session.

    Attributes:
        commits: Commits made through this object.
    """

    def __init__(self, spark: SparkSession, sink: Sink) -> None:
        self.spark = spark
        self.sink = sink
        self._metadata: dict[str, str] = {}
        self.commits = 0

    @property
    def folder(self) -> Path | None:
        """The sink's folder; None for a schema of a catalog."""
        return None if self.sink.path is None else Path(self.sink.path)

    def name(self, table: str) -> str:
        """Return the quoted name of a table or view, to be written into SQL.

        A folder's tables are named by their path: two sinks of one session never share a table, and no table of
        the session's own that happens to be called `runs` is touched.
        """
        if self.folder is not None:
            return f"delta.{quote_identifier(str(self.folder / table))}" if table in TABLES else quote_identifier(table)
        return ".".join(quote_identifier(part) for part in [*str(self.sink.schema).split("."), table])

    def create(self) -> None:
        """Create what is missing of tables, columns and views, register them in the session, write `catalog.sql`.

        Raises:
            TableError: A table has a schema version that cannot be brought to this one, or the folder cannot be
                written.
        """
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TableError(
                    f"sink.path={str(self.folder)!r} cannot be made ({error.strerror}). No table could be written. "
                    "Write a folder that you may write to."
                ) from error
        current = self.are_current()
        if not current:
            for table in TABLES.values():
                self._create_table(table)
        for statement in self._registrations():
            self.spark.sql(statement)
        if self.folder is not None and not current:
            part = self.folder / "catalog.part"
            part.write_text(self._catalog(), encoding="utf-8")
            part.rename(self.folder / _CATALOG)  # other processes may be reading it

    def are_current(self) -> bool:
        """Return whether all tables are there and of this schema version, without opening each."""
        if self.folder is not None:
            # Written last: a folder with this very catalogue has all tables.
            written = self.folder / _CATALOG
            return written.is_file() and written.read_text(encoding="utf-8") == self._catalog()
        if not self.spark.catalog.databaseExists(str(self.sink.schema)):
            return False
        shown = self.spark.sql(f"SHOW TABLES IN {self._schema()}").collect()
        *_, last = TABLES.values()  # they are made, and given what an older version lacks, in this order
        # The session's temporary views are shown among them.
        there = {row["tableName"] for row in shown if not row["isTemporary"]}
        return there >= set(TABLES) and self._read_version(last) == str(SCHEMA_VERSION)

    def _catalog(self) -> str:
        statements = "".join(f"{statement};\n" for statement in self._registrations())
        return f"{_HEADER}{SCHEMA_VERSION}. Run it first: spark-sql -i {_CATALOG}\n{statements}"

    def open(self) -> None:
        """Register a folder's tables and views in the session by their plain names; creates no table.

        Raises:
            TableError: There are no tables of lexplain here.
        """
        if self.folder is None:
            if not self._exists(TABLES["runs"]):
                raise TableError(
                    f"sink.schema={self.sink.schema!r} holds no tables of lexplain. Every query would have failed. "
                    "Write the schema of a plan's sink, or run the plan first."
                )
            return
        check_version(self.folder)
        for statement in self._registrations():
            self.spark.sql(statement)

    def _create_table(self, table: Table) -> None:
        if self._exists(table):
            self._update_table(table)
            return
        columns = ", ".join(_define_column(*column) for column in table.columns)
        layout = f" CLUSTER BY ({', '.join(table.cluster)})" if table.cluster else ""
        layout += f" PARTITIONED BY ({', '.join(table.partition)})" if table.partition else ""
        # As properties the constraints come with the table's first commit; ALTER TABLE would make one for each.
        properties = {f"delta.constraints.{name}": condition for name, condition in table.checks.items()}
        properties |= {**table.properties, "lexplain.schemaVersion": str(SCHEMA_VERSION)}
        # A deleted row leaves its file, which VACUUM can delete then; a platform may have them on by default.
        properties["delta.enableDeletionVectors"] = "false"
        self.spark.sql(
            f"CREATE TABLE IF NOT EXISTS {self.name(table.name)} ({columns}) USING delta{layout}"
            f" COMMENT {quote_text(table.comment)}"
            f" TBLPROPERTIES ({', '.join(f'{quote_text(key)} = {quote_text(value)}' for key, value in properties.items())})"
        )

    def _exists(self, table: Table) -> bool:
        if self.folder is not None:
            return (self.folder / table.name / "_delta_log").is_dir()
        return bool(self.spark.catalog.tableExists(self.name(table.name)))

    def _update_table(self, table: Table) -> None:
        """Add the columns that a table of an older schema version lacks.

        Raises:
            TableError: It has a version whose tables differ by more than columns.
        """
        version = self._read_version(table)
        if version == str(SCHEMA_VERSION):
            return
        if not _is_older(version):
            raise TableError(
                f"table {table.name} has schema version {version}, this lexplain writes {SCHEMA_VERSION}. "
                "Rows of two layouts would have been mixed. Write to a new sink."
            )
        from pyspark.errors import AnalysisException

        name = self.name(table.name)

        def add_columns() -> None:
            # looked up for each attempt: another job may have added them
            present = set(self.read(table.name).columns)
            missing = [_define_column(*column) for column in table.columns if column[0] not in present]
            try:
                if missing:
                    self.spark.sql(f"ALTER TABLE {name} ADD COLUMNS ({', '.join(missing)})")
            except AnalysisException:  # that there is such a column, where another job has added them since
                if not {column for column, _, _ in table.columns} <= set(self.read(table.name).columns):
                    raise
            # last: a table that says so has all columns
            self.spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('lexplain.schemaVersion' = '{SCHEMA_VERSION}')")

        self._commit(add_columns, table.name)

    def _read_version(self, table: Table) -> str | None:
        rows = self.spark.sql(f"SHOW TBLPROPERTIES {self.name(table.name)}").collect()
        return {row["key"]: row["value"] for row in rows}.get("lexplain.schemaVersion")

    def _schema(self) -> str:
        return ".".join(map(quote_identifier, str(self.sink.schema).split(".")))

    def _registrations(self) -> list[str]:
        """Return the statements that let people write plain names: views, temporary ones over a folder's tables."""
        kind = "VIEW" if self.folder is None else "TEMPORARY VIEW"
        names = {name: self.name(name) for name in [*TABLES, *VIEWS]}
        queries = {name: query.format(**names, **EVIDENCE_SQL) for name, (_, query) in VIEWS.items()}
        if self.folder is not None:
            queries = {name: f"SELECT * FROM {self.name(name)}" for name in TABLES} | queries
        place = "" if self.folder is not None else f"{self._schema()}."
        return [
            f"CREATE OR REPLACE {kind} {place}{quote_identifier(name)} AS {query}" for name, query in queries.items()
        ]

    def sign_commits(self, metadata: Mapping[str, str]) -> None:
        """Set what every following commit carries as `userMetadata`: run_id and MLflow run id."""
        self._metadata = dict(metadata)

    def read(self, table: str) -> DataFrame:
        """Return a table as a DataFrame."""
        return self.spark.table(self.name(table))

    def replace(self, rows: DataFrame, table: str, *, where: str) -> None:
        """Put `rows` in the place of the rows that the SQL condition `where` selects, in one commit.

        Written a second time, by a retry or by another job, the same rows are there once. `rows` is computed anew
        for each attempt: persist what is dear. Files whose statistics rule `where` out are not opened.

        Raises:
            TableError: Other jobs' commits came in between time and again.
        """
        writer = rows.select(*self._columns(table)).write.format("delta").mode("overwrite")
        writer = writer.option("replaceWhere", where).option("userMetadata", json.dumps(self._metadata))
        if self.folder is not None:
            path = str(self.folder / table)
            self._commit(lambda: writer.save(path), table)
        else:
            self._commit(lambda: writer.saveAsTable(self.name(table)), table)

    def add_first(self, rows: DataFrame, table: str, *, unless: str) -> None:
        """Add `rows` in one commit, but those that the table has: the SQL condition `unless` tells `present` and `added`.

        Of several jobs that do so at once, the first one's rows stay; read them to see whose they are. Delta keeps
        the rows on the executors until they are committed.

        Raises:
            TableError: Other jobs' commits came in between time and again.
        """
        target, condition = (text.replace("{", "{{").replace("}", "}}") for text in (self.name(table), unless))
        merge = f"MERGE INTO {target} AS present USING {{rows}} AS added ON {condition} WHEN NOT MATCHED THEN INSERT *"
        with self._signed():
            self._commit(lambda: self.spark.sql(merge, rows=rows.select(*self._columns(table))), table)

    def remove(self, table: str, *, where: str) -> int:
        """Delete the rows that the SQL condition `where` selects, in one commit; none if there are none.

        Returns:
            How many there were.

        Raises:
            TableError: Other jobs' commits came in between time and again.
        """
        count = self.read(table).where(where).count()
        if count:
            with self._signed():
                self._commit(lambda: self.spark.sql(f"DELETE FROM {self.name(table)} WHERE {where}"), table)
        return count

    def compact(self, table: str, retain_hours: float = RETAIN_HOURS) -> tuple[int, int]:
        """Join the small files of a table, and delete files that no version of the last hours needs.

        A job that runs meanwhile tries its commit again; what it read is kept for `retain_hours`.

        Returns:
            Files of the table's latest version, before and after.

        Raises:
            TableError: Other jobs' commits came in between time and again.
        """

        def count() -> int:
            return int(self.spark.sql(f"DESCRIBE DETAIL {self.name(table)}").collect()[0]["numFiles"])

        before = count()
        with self._signed():
            self._commit(lambda: self.spark.sql(f"OPTIMIZE {self.name(table)}"), table)
        self.spark.sql(f"VACUUM {self.name(table)} RETAIN {retain_hours:g} HOURS")
        return before, count()

    @contextmanager
    def _signed(self) -> Iterator[None]:
        """Sign statements, which take no option of a writer."""
        signature = "spark.databricks.delta.commitInfo.userMetadata"
        users = self.spark.conf.get(signature, None)
        self.spark.conf.set(signature, json.dumps(self._metadata))
        try:
            yield
        finally:
            if users is None:
                self.spark.conf.unset(signature)
            else:
                self.spark.conf.set(signature, users)

    def _columns(self, table: str) -> list[str]:
        return [quote_identifier(name) for name, _, _ in TABLES[table].columns]

    def _commit(self, write: Callable[[], object], table: str) -> None:
        # Imported before the call: it is the import that makes PySpark raise these classes. In Python they have no
        # ancestor in common, unlike in Java.
        from delta import exceptions
        from pyspark.sql.utils import is_remote

        if is_remote():
            import delta.connect.exceptions  # noqa: F401

        refusals = tuple(getattr(exceptions, name) for name in exceptions.__all__)
        for attempt in range(1, _COMMIT_ATTEMPTS + 1):
            try:
                write()
            except refusals as error:
                if attempt == _COMMIT_ATTEMPTS:
                    raise TableError(
                        f"table {table}: other jobs' commits came in between {attempt} times. Its rows would have "
                        "mixed with theirs. Run the same command again when fewer jobs write to this sink."
                    ) from error
                # At random: jobs that met once must not meet again in step.
                time.sleep(random.SystemRandom().uniform(0.0, 0.5 * attempt))
            else:
                self.commits += 1
                return

    def versions(self, names: Sequence[str] = tuple(TABLES)) -> dict[str, int]:
        """Return the current Delta version of tables, of all unless told otherwise; of one whose log is gone -1."""
        if self.folder is not None:
            # From the log's file names: a query for each table takes seconds. The latest commit's file is always there.
            logs = {name: self.folder / name / "_delta_log" for name in names}
            return {
                name: max((int(file.stem) for file in log.glob("[0-9]*.json")), default=-1)
                for name, log in logs.items()
            }
        history = {name: self.spark.sql(f"DESCRIBE HISTORY {self.name(name)} LIMIT 1").collect() for name in names}
        return {name: int(rows[0]["version"]) for name, rows in history.items()}

    def lock(self) -> AbstractContextManager[None]:
        """Hold a local folder for one writer; a schema of a catalog needs none, Delta serialises there.

        Raises:
            TableError: Another writer holds the folder; names it.
        """
        return _hold(self.folder)


def check_version(folder: Path) -> None:
    """Check, without Spark, that a folder has tables that this lexplain can read.

    Raises:
        TableError: It has none, or of another schema version.
    """
    catalog = folder / _CATALOG
    if not catalog.is_file():
        raise TableError(
            f"sink.path={str(folder)!r} holds no tables of lexplain. Every query would have failed. "
            "Write the folder of a plan's sink, or run the plan first."
        )
    version = catalog.read_text(encoding="utf-8").removeprefix(_HEADER).partition(".")[0]
    if version != str(SCHEMA_VERSION):
        remedy = "run its plan again, which adds them" if _is_older(version) else "run the plan into a new folder"
        raise TableError(
            f"sink.path={str(folder)!r} has tables of schema version {version[:10]}, this lexplain reads "
            f"{SCHEMA_VERSION}. Columns would have been missing. Read it with the lexplain that wrote it, or {remedy}."
        )


def find_writer(folder: Path) -> str | None:
    """Return who is writing to a folder of tables; None where nobody is."""
    lock = FileLock(folder / _LOCK)
    if not (folder / _LOCK).is_file():
        return None
    try:
        lock.acquire(timeout=0.0)
    except Timeout:
        return _read_holder(folder)
    lock.release()
    return None


def _read_holder(folder: Path) -> str:
    holder = folder / _HOLDER
    return holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"


def _is_older(version: str | None) -> bool:
    """Tell whether tables of a schema version become those of ours when columns are added."""
    return version is not None and version in map(str, range(OLDEST_VERSION, SCHEMA_VERSION))


def _define_column(name: str, kind: str, comment: str) -> str:
    return f"{quote_identifier(name)} {kind} COMMENT {quote_text(comment)}"


@contextmanager
def _hold(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    import os
    import socket

    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0.0)
    except Timeout as error:
        raise TableError(
            f"sink.path={str(folder)!r} is being written by another job ({_read_holder(folder)}). Two writers on one folder would "
            "lose commits. Wait for it to end, or write to another folder."
        ) from error
    try:
        holder.write_text(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')}",
            encoding="utf-8",
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


# Spark replaces ${name} in SQL before it parses it, in quotes too: by a setting, or a variable of the environment.
_VARIABLE = "${"


def quote_identifier(name: str) -> str:
    """Return a SQL identifier in back-ticks.

    Raises:
        TableError: Spark would put a variable's value into it, and identifiers have no escape.
    """
    if _VARIABLE in name:
        raise TableError(
            f"name={name!r} must not hold {_VARIABLE!r}. Spark would have put the value of a setting or of an environment "
            "variable there, and another table or column been meant. Rename the column or folder."
        )
    return "`" + name.replace("`", "``") + "`"


def quote_text(text: str) -> str:
    """Return a SQL string literal; nothing in it can end the literal, or be read as an escape or a variable."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace(_VARIABLE, "$\\{") + "'"


def quote_rows(rows: Iterable[tuple[str | int, ...]]) -> str:
    """Return rows of texts and whole numbers for SQL's VALUES."""
    return ", ".join(
        f"({', '.join(quote_text(cell) if isinstance(cell, str) else str(cell) for cell in row)})" for row in rows
    )


def quote_list(texts: Sequence[str]) -> str:
    """Return SQL string literals, comma-separated, for an IN list; an impossible one when empty."""
    return ", ".join(map(quote_text, texts)) if texts else "NULL"
