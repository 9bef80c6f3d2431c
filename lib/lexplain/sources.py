"""Reading a user's source: columns mapped to documents, filtered and sampled; what is broken is marked, never altered.

Driver only; the reading itself is Spark's. Texts travel as bytes: one invalid UTF-8 value in a string column
would fail a whole Arrow batch.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from typing import TYPE_CHECKING

from lexplain.errors import CorpusError
from lexplain.plan import Source
from lexplain.tables import quote_identifier, quote_text
from lexplain.text_files import BROKEN, read_text_file, refuse_rows

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_TEXT_KINDS = ("csv", "tsv", "json")
_MOST_COLUMNS = 20  # shown in a message


# How a watermark is written down, and read as a literal that files can be skipped by.
_WATERMARKS = {
    "date": ("unix_date({})", "date_from_unix_date({})"),
    "timestamp": ("unix_micros({})", "timestamp_micros({})"),
    **dict.fromkeys(("tinyint", "smallint", "int", "bigint"), ("{}", "{}")),
}


def read_watermark(spark: SparkSession, source: Source, name: str, version: int | None) -> str:
    """Return what a source's watermark has reached: column and type, largest value and number of rows up to it.

    Raises:
        CorpusError: There is no such column, it is of another type, or null in some rows; or the source cannot be read.
    """
    frame, kind, column = _read_marked(spark, source, name, version)
    written = _WATERMARKS.get(kind, ("{}", ""))[0].format(f"max({column})")
    try:
        row = frame.selectExpr(
            f"CAST({written} AS STRING) AS latest", f"count_if({column} IS NULL) AS nulls", "count(*) AS n"
        ).collect()[0]  # fmt: skip
    except Exception as error:
        raise _refuse_reading(source, name, frame.columns, error) from error
    if row["nulls"]:
        raise CorpusError(
            f"{name}.watermark={source.watermark!r} is null in {row['nulls']} rows. Such rows would have been missed whenever "
            "they came after the first reading. Name a column that every row has, or leave it out."
        )
    return f"{source.watermark}:{kind}@{row['latest'] or ''}@{row['n']}"


def read_above(spark: SparkSession, source: Source, name: str, reached: str, version: int | None) -> DataFrame | None:
    """Return the rows of a source, its own columns, above what `read_watermark` returned.

    Returns:
        None where there are not as many rows up to there as there were: some came late, or were deleted.
    """
    frame, kind, column = _read_marked(spark, source, name, version)
    value, _, count = reached.removeprefix(f"{source.watermark}:{kind}@").rpartition("@")
    if not reached.startswith(f"{source.watermark}:{kind}@") or int(count) == 0:
        return None
    literal = quote_text(value) if kind == "string" else _WATERMARKS[kind][1].format(int(value))
    try:
        there = frame.where(f"{column} <= {literal}").count()
    except Exception as error:
        raise _refuse_reading(source, name, frame.columns, error) from error
    if there != int(count):
        return None
    return read_source(spark, source, version).where(f"{column} > {literal}")


def _read_marked(spark: SparkSession, source: Source, name: str, version: int | None) -> tuple[DataFrame, str, str]:
    """Return the rows that count, and the watermark's type and quoted name."""
    frame = read_source(spark, source, version)
    kind = dict(frame.dtypes).get(str(source.watermark))
    if kind is None or (kind != "string" and kind not in _WATERMARKS):
        what = "is no column" if kind is None else f"is of type {kind}"
        raise CorpusError(
            f"{name}.watermark={source.watermark!r} {what} of {source.origin!r}. New rows could not have been told from old ones. "
            f"Name a column of whole numbers, dates, timestamps or text: {_show_columns(frame.columns)}."
        )
    if source.where is not None:
        try:
            frame = frame.where(source.where)
        except Exception as error:
            raise _refuse_where(source, name, frame.columns, error) from error
    return frame, kind, quote_identifier(str(source.watermark))


def read_appended(spark: SparkSession, source: Source, since: int, version: int) -> DataFrame | None:
    """Return the rows of a Delta table that the commits from `since` to `version` added, its own columns.

    Returns:
        None where the table's change feed does not reach back so far, or the commits did anything else.
    """
    reader = (
        spark.read.option("readChangeFeed", "true").option("startingVersion", since).option("endingVersion", version)
    )
    try:
        if source.table is not None:
            changes = reader.table(name_table(source))
        else:
            changes = reader.format("delta").load(str(source.path))
        if changes.where("_change_type != 'insert'").limit(1).count():
            return None
    except Exception:  # of several kinds: a feed that was switched on later, files that were vacuumed
        logging.getLogger(__name__).info(
            "%r: its change feed cannot be read, the whole table is", source.origin, exc_info=True
        )
        return None
    return changes.drop("_change_type", "_commit_version", "_commit_timestamp")


def read_documents(
    spark: SparkSession, source: Source, name: str, *, version: int | None = None, rows: DataFrame | None = None
) -> DataFrame:
    """Return a source as (doc_id, text BINARY, text_digest, labels, seen_by, defect), filtered and sampled.

    Sampling goes by the text's digest: the same documents each time, whatever the order of the source.
    With `version`, that version of a Delta table is read; with `rows`, these of the source's own rows are all.

    A row that is no document has a `defect`, its record as text, no labels, and an id made from the record where its own
    cannot be read: `malformed_row` (a number of fields other than the header's, a quote left open, a line that is no
    JSON object), `invalid_utf8` (an id or label with broken bytes, a line of JSON with any) or `lone_surrogate` (a line of
    JSON with half of a surrogate pair). Such rows pass every filter. A text with broken bytes is no defect here: it arrives as it is.

    Raises:
        CorpusError: The source cannot be read, a mapped column is missing, the filter fails, most rows are malformed, or
            see `read_text_file`.

    Note:
        Cost: one reading to check the rows, of columnar sources only ids, labels and the filter's columns.
    """
    frame = read_source(spark, source, version) if rows is None else rows
    _check_columns(spark, frame, source, name)
    documents = _map_columns(frame, source, name)
    defects = _count_defects(documents, frame.columns, source, name)
    # Equal texts are told apart by a number, in an order that does not depend on the source's.
    numbered = (
        "concat(substring(text_digest, 1, 32), '-', row_number() OVER (PARTITION BY text_digest ORDER BY"
        " to_json(named_struct('l', labels, 's', seen_by, 'd', defect)))) AS doc_id",
        "text", "text_digest", "labels", "seen_by", "defect",
    )  # fmt: skip
    if source.columns.doc_id is None:
        documents = documents.selectExpr(*numbered)
    elif defects:
        nameless = "defect IS NOT NULL AND doc_id IS NULL"
        documents = documents.where(f"NOT ({nameless})").unionByName(documents.where(nameless).selectExpr(*numbered))
    if source.sample is not None and source.sample < 1:
        threshold = f"{int(source.sample * 16**12):012x}"
        documents = documents.where(f"substring(text_digest, 1, 12) < {quote_text(threshold)}")
    if source.limit is not None:
        documents = documents.orderBy("text_digest", "doc_id").limit(source.limit)
    return documents


def read_source(spark: SparkSession, source: Source, version: int | None = None) -> DataFrame:
    """Return a source's own columns, all of its rows; of text files also `BROKEN`.

    Raises:
        CorpusError: It cannot be read.
    """
    try:
        reader = spark.read if version is None else spark.read.option("versionAsOf", version)
        if source.table is not None:
            return reader.table(name_table(source))
        path = literal_path(source)
        if source.kind in _TEXT_KINDS:
            return read_text_file(spark, source, path)
        return reader.format(str(source.kind)).load(path)
    except CorpusError:
        raise
    except Exception as error:
        raise refuse_source(source, error) from error


def name_table(source: Source) -> str:
    """Return a table's name, or the path of a Delta table, quoted for SQL."""
    if source.table is None:
        return f"delta.{quote_identifier(str(source.path))}"
    return ".".join(map(quote_identifier, source.table.split(".")))


def literal_path(source: Source) -> str:
    """Return a source's path as Spark's readers of files take it: the name of a file that is there is no pattern."""
    path = str(source.path)
    if source.kind == "delta" or not os.path.exists(path):
        return path
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def refuse_source(source: Source, error: Exception) -> CorpusError:
    """Return the error to raise where Spark could not read a source."""
    return CorpusError(
        f"{source.origin!r} cannot be read as {source.kind} ({_first_words(error)}). "
        "No document would have been explained. Check path, format, filter and permissions."
    )


def _first_words(error: Exception) -> str:
    """Return what Spark says, without the query's plan and the stack; of a failed task, what made it fail."""
    said = str(error).strip() or type(error).__name__
    causes = re.findall(r"^Caused by: [\w.$]+: (.+(?:\n (?!.*\bat ).+)*)", said, flags=re.MULTILINE)
    return " ".join(causes[-1].split()) if causes else said.splitlines()[0].rstrip(".")


def _check_columns(spark: SparkSession, frame: DataFrame, source: Source, name: str) -> None:
    columns = source.columns
    mapped = {"text": columns.text, "doc_id": columns.doc_id, "labels": columns.labels, "split": columns.split}
    there = [column for column in frame.columns if column != BROKEN]
    missing = {key: column for key, column in mapped.items() if column is not None and column not in there}
    if not missing:
        return
    shown = ", ".join(f"{name}.columns.{key}={column!r}" for key, column in missing.items())
    hints = []
    for column in missing.values():
        plain = {one.strip().casefold(): one for one in there}
        close = difflib.get_close_matches(column.strip().casefold(), plain, n=1)
        hints += [f"Write {plain[close[0]]!r} for {column!r}"] if close else []
    if (
        source.kind in ("csv", "tsv")
        and any(re.fullmatch(r"_c\d+", column) for column in missing.values())
        and source.header
    ):
        hints.append("With header: true the first line names the columns: write header: false for a file without names")
    elif source.kind in ("csv", "tsv"):
        hints.append(
            "If the first line is a document, write header: false and map _c0, _c1 and so on" if source.header
            else "With header: false the columns are _c0, _c1 and so on: write header: true if the first line names them"
        )  # fmt: skip
    raise CorpusError(
        f"{shown}: no such column in {source.origin!r}. Every document would have been empty. "
        f"Columns there: {_show_columns(there)}. {'. '.join(hints)}".rstrip(". ")
        + "."
    )


def _show_columns(columns: list[str]) -> str:
    shown = [column if len(column) <= 40 else f"{column[:39]}…" for column in columns[:_MOST_COLUMNS]]
    return ", ".join(map(repr, shown)) + (f" and {len(columns) - len(shown)} more" if len(columns) > len(shown) else "")


def _map_columns(frame: DataFrame, source: Source, name: str) -> DataFrame:
    columns, types = source.columns, dict(frame.dtypes)
    if BROKEN not in frame.columns:
        frame = frame.selectExpr("*", f"CAST(NULL AS STRUCT<reason: STRING, record: BINARY>) AS {BROKEN}")
    try:
        if source.where is not None:
            frame.drop(BROKEN).where(source.where)  # its message names the user's columns only
            frame = frame.where(f"{BROKEN} IS NOT NULL OR ({source.where}\n)")
    except Exception as error:
        raise _refuse_where(source, name, frame.columns, error) from error
    doc_id = "CAST(NULL AS STRING)" if columns.doc_id is None else f"CAST({quote_identifier(columns.doc_id)} AS STRING)"
    text = quote_identifier(columns.text)
    text = text if types[columns.text] in ("string", "binary") else f"CAST({text} AS STRING)"
    try:
        frame = frame.selectExpr(
            f"{doc_id} AS doc_id", f"CAST({text} AS BINARY) AS text",
            f"{_labels(columns.labels, types, source.label_separator)} AS labels",
            f"{_seen_by(columns.split, types)} AS seen_by", BROKEN,
            # Of the labels as they are: splitting them would put U+FFFD for a broken byte.
            f"{_is_valid(columns.labels, types)} AND coalesce(is_valid_utf8({doc_id}), TRUE) AS is_valid",
        )  # fmt: skip
    except Exception as error:
        raise refuse_source(source, error) from error
    return frame.selectExpr(
        "doc_id", f"coalesce({BROKEN}.record, text) AS text", "labels", "seen_by",
        f"CASE WHEN {BROKEN} IS NOT NULL THEN {BROKEN}.reason WHEN NOT is_valid"
        " THEN 'invalid_utf8' END AS defect",
    ).selectExpr(
        # Spark's parser of JSON has put these two characters for what it could not read.
        "CASE WHEN defect = 'malformed_row' OR defect IS NOT NULL AND (NOT is_valid_utf8(doc_id) OR doc_id RLIKE '[?\\uFFFD]')"
        " THEN NULL ELSE doc_id END AS doc_id",
        "text", "sha2(coalesce(text, X''), 256) AS text_digest",
        "CASE WHEN defect IS NULL OR labels IS NULL THEN labels ELSE array() END AS labels",
        "CASE WHEN defect IS NULL OR seen_by IS NULL THEN seen_by ELSE array() END AS seen_by", "defect",
    )  # fmt: skip


def _refuse_where(source: Source, name: str, columns: list[str], error: Exception) -> CorpusError:
    there = [column for column in columns if column != BROKEN]
    return CorpusError(
        f"{name}.where={source.where!r} is no condition on the rows of {source.origin!r} ({_first_words(error)}). No "
        f"document would have been explained. Write a SQL condition on its columns: {_show_columns(there)}."
    )


def _refuse_reading(source: Source, name: str, columns: list[str], error: Exception) -> CorpusError:
    """Return the error to raise where the rows that count could not be read: for their files, or for the condition."""
    if source.where is not None and "FAILED_READ_FILE" not in str(error):
        return _refuse_where(source, name, columns, error)
    return refuse_source(source, error)


def _count_defects(documents: DataFrame, columns: list[str], source: Source, name: str) -> int:
    """Return how many rows are no documents; raise CorpusError when most are malformed."""
    try:
        totals = documents.selectExpr(
            "count(*) AS rows", "count_if(defect = 'malformed_row') AS malformed", "count_if(defect IS NOT NULL) AS defects",
            "min(substring(CASE WHEN defect IS NOT NULL THEN text END, 1, 400)) AS example",
            "min(substring(CASE WHEN defect = 'malformed_row' THEN text END, 1, 400)) AS malformed_example",
        ).collect()[0]  # fmt: skip
    except Exception as error:
        raise _refuse_reading(source, name, columns, error) from error
    if totals["malformed"] * 2 > totals["rows"]:
        raise refuse_rows(source, totals["malformed"], totals["rows"], bytes(totals["malformed_example"]))
    if totals["defects"]:
        logging.getLogger(__name__).warning(
            "%s=%r: %d of %d rows are no documents and are rejected, %d of them malformed; one is %r", name, source.origin,
            totals["defects"], totals["rows"], totals["malformed"], bytes(totals["example"])[:80],
        )  # fmt: skip
    return int(totals["defects"])


def _labels(column: str | None, types: dict[str, str], separator: str | None) -> str:
    if column is None:
        return "CAST(NULL AS ARRAY<STRING>)"
    if types[column].startswith("array"):
        parts = f"transform({quote_identifier(column)}, x -> CAST(x AS STRING))"
    elif separator is not None:
        parts = f"split(CAST({quote_identifier(column)} AS STRING), concat('\\\\Q', {quote_text(separator)}, '\\\\E'))"
    else:
        parts = f"array(CAST({quote_identifier(column)} AS STRING))"
    # A document without a label in a labelled source has an empty list, never null.
    return f"array_sort(array_distinct(filter(transform(coalesce({parts}, array()), x -> trim(x)), x -> x != '')))"


def _is_valid(column: str | None, types: dict[str, str]) -> str:
    if column is None:
        return "TRUE"
    if types[column].startswith("array"):
        return (
            f"coalesce(forall({quote_identifier(column)}, x -> coalesce(is_valid_utf8(CAST(x AS STRING)), TRUE)), TRUE)"
        )
    return f"coalesce(is_valid_utf8(CAST({quote_identifier(column)} AS STRING)), TRUE)"


def _seen_by(column: str | None, types: dict[str, str]) -> str:
    if column is None:
        return "CAST(NULL AS ARRAY<INT>)"
    if types[column].startswith("array"):
        return f"coalesce(transform({quote_identifier(column)}, x -> try_cast(x AS INT)), array())"
    parts = f"split(trim(CAST({quote_identifier(column)} AS STRING)), '[ ,;]+')"
    return f"coalesce(transform(filter({parts}, x -> x != ''), x -> try_cast(x AS INT)), array())"
