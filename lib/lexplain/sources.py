"""Reading a user's source: columns mapped to doc_id, text, labels and seen_by, filtered and sampled.

Driver only; the reading itself is Spark's. Texts travel as bytes: one invalid UTF-8 value in a string column
would fail a whole Arrow batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lexplain.errors import CorpusError
from lexplain.plan import Source
from lexplain.tables import quote_identifier, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


def read_documents(spark: SparkSession, source: Source, name: str) -> DataFrame:
    """Return a source as (doc_id, text BINARY, text_digest, labels, seen_by), filtered and sampled.

    Sampling goes by the text's digest: the same documents each time, whatever the order of the source.

    Raises:
        CorpusError: The source cannot be read, a mapped column is missing, or the filter does not parse.
    """
    frame = read_source(spark, source)
    columns = source.columns
    mapped = {"text": columns.text, "doc_id": columns.doc_id, "labels": columns.labels, "split": columns.split}
    missing = {key: column for key, column in mapped.items() if column is not None and column not in frame.columns}
    if missing:
        shown = ", ".join(f"{name}.columns.{key}={column!r}" for key, column in missing.items())
        raise CorpusError(
            f"{shown}: no such column in {source.origin!r}. Every document would have been empty. "
            f"Columns there: {', '.join(frame.columns)}."
        )
    types = dict(frame.dtypes)
    try:
        if source.where is not None:
            frame = frame.where(source.where)
        digest_of = "sha2(coalesce(text, X''), 256)"
        frame = frame.selectExpr(
            "CAST(NULL AS STRING) AS doc_id" if columns.doc_id is None else f"CAST({quote_identifier(columns.doc_id)} AS STRING) AS doc_id",
            f"CAST({quote_identifier(columns.text)} AS BINARY) AS text" if types[columns.text] in ("string", "binary")
            else f"CAST(CAST({quote_identifier(columns.text)} AS STRING) AS BINARY) AS text",
            f"{_labels(columns.labels, types, source.label_separator)} AS labels",
            f"{_seen_by(columns.split, types)} AS seen_by",
        ).selectExpr("doc_id", "text", f"{digest_of} AS text_digest", "labels", "seen_by")  # fmt: skip
    except Exception as error:
        raise refuse_source(source, error) from error
    if columns.doc_id is None:
        # Equal texts are told apart by a number, in an order that does not depend on the source's.
        frame = frame.selectExpr(
            "concat(substring(text_digest, 1, 32), '-', row_number() OVER (PARTITION BY text_digest ORDER BY"
            " to_json(named_struct('l', labels, 's', seen_by)))) AS doc_id",
            "text", "text_digest", "labels", "seen_by",
        )  # fmt: skip
    if source.sample is not None and source.sample < 1:
        threshold = f"{int(source.sample * 16**12):012x}"
        frame = frame.where(f"substring(text_digest, 1, 12) < {quote_text(threshold)}")
    if source.limit is not None:
        frame = frame.orderBy("text_digest", "doc_id").limit(source.limit)
    return frame


def read_source(spark: SparkSession, source: Source) -> DataFrame:
    """Return a source's own columns, all of its rows.

    Raises:
        CorpusError: It cannot be read.
    """
    try:
        if source.table is not None:
            return spark.table(".".join(map(quote_identifier, source.table.split("."))))
        reader = spark.read
        if source.kind == "csv":
            # RFC 4180: a quote inside quotes is doubled, and a quoted field may hold line breaks.
            reader = reader.options(header=source.header, multiLine=True, quote='"', escape='"')
        elif source.kind == "tsv":
            # One document a line, quotes are text: what corpora are shipped as.
            reader = reader.options(header=source.header, sep="\t", quote="")
        kind = "csv" if source.kind == "tsv" else str(source.kind)
        return reader.format(kind).load(str(source.path))
    except Exception as error:
        raise refuse_source(source, error) from error


def refuse_source(source: Source, error: Exception) -> CorpusError:
    """Return the error to raise where Spark could not read a source."""
    said = str(error).strip().splitlines()
    return CorpusError(
        f"{source.origin!r} cannot be read as {source.kind} ({said[0] if said else type(error).__name__}). "
        "No document would have been explained. Check path, format, filter and permissions."
    )


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


def _seen_by(column: str | None, types: dict[str, str]) -> str:
    if column is None:
        return "CAST(NULL AS ARRAY<INT>)"
    if types[column].startswith("array"):
        return f"coalesce(transform({quote_identifier(column)}, x -> try_cast(x AS INT)), array())"
    parts = f"split(trim(CAST({quote_identifier(column)} AS STRING)), '[ ,;]+')"
    return f"coalesce(transform(filter({parts}, x -> x != ''), x -> try_cast(x AS INT)), array())"
