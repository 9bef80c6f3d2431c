"""From a user's source to staged chunks: snapshot, one reading, one shuffle, ids checked.

Driver only; the reading itself is Spark's. Texts travel as bytes: one invalid UTF-8 value in a string column
would fail a whole Arrow batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from lexplain.errors import CorpusError
from lexplain.executor import add_word_keys
from lexplain.keys import corpus_key
from lexplain.plan import Source
from lexplain.sources import literal_path, read_documents, read_source, refuse_source
from lexplain.tables import TABLES, Tables, quote_identifier, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Staged:
    """A source as staged: all of its increments.

    Attributes:
        key: The source's `corpus_key`.
        increments: How many increments there are.
        n_documents: Documents in all of them.
    """

    key: str
    increments: int
    n_documents: int

    @property
    def version(self) -> str:
        """What decides the staged content; a rewritten source with the same documents leaves it as it is."""
        return f"{self.key}/{self.increments}"


def take_snapshot(spark: SparkSession, source: Source) -> str:
    """Return what pins a source's content: a Delta table's id and version, else a digest of its files.

    Raises:
        CorpusError: The source is not there.
    """
    if source.kind in ("table", "delta"):
        name = f"delta.{quote_identifier(str(source.path))}"
        if source.table is not None:
            name = ".".join(map(quote_identifier, source.table.split(".")))
        try:
            detail = spark.sql(f"DESCRIBE DETAIL {name}").collect()[0]
            version = spark.sql(f"DESCRIBE HISTORY {name} LIMIT 1").collect()[0]["version"]
        except Exception as error:
            if source.kind == "delta" or not spark.catalog.tableExists(name):
                raise refuse_source(source, error) from error
            return _list_files(spark, source)  # a table of another format
        return f"{detail['id']}@{version}"
    return _list_files(spark, source)


def _list_files(spark: SparkSession, source: Source) -> str:
    """Digest of (path, length, modification time) of every file that a reading would touch."""
    try:
        files = (
            read_source(spark, source).selectExpr("_metadata.file_path AS path", "_metadata.file_size AS size",
                             "unix_micros(_metadata.file_modification_time) AS time")
            .distinct().orderBy("path").collect()
        ) if source.kind == "table" else (
            spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(literal_path(source))
            .selectExpr("path", "length AS size", "unix_micros(modificationTime) AS time").orderBy("path").collect()
        )  # fmt: skip
    except Exception as error:
        raise refuse_source(source, error) from error
    listing = "\n".join(f"{row['path']} {row['size']} {row['time']}" for row in files)
    return "files@" + hashlib.sha256(listing.encode()).hexdigest()[:20]


def stage(tables: Tables, source: Source, *, name: str, chunk_documents: int) -> Staged:
    """Bring a source's documents into `staged`; what is there already is left alone.

    The source is read once. A first reading is increment 0; documents appended later become further
    increments with chunks of their own.

    Args:
        tables: The sink.
        source: What to read.
        name: The plan's section, for messages: `corpus` or `training`.
        chunk_documents: Documents a chunk; decides the number of buckets of a new increment.

    Raises:
        CorpusError: The source cannot be read as mapped, holds no document, has ids that are null or occur
            twice, or documents staged before were changed or deleted since.
    """
    spark, key = tables.spark, corpus_key(source)
    done = tables.read("increments").where(f"corpus_key = {quote_text(key)}").collect()
    snapshot = take_snapshot(spark, source)
    increment = sum(row["n_documents"] > 0 for row in done)
    if any(row["snapshot"] == snapshot for row in done):
        return Staged(key, increment, sum(row["n_documents"] for row in done))
    read = read_documents(spark, source, name).persist()
    try:
        documents = _find_appended(tables, source, read, name) if increment else read
        count = _check_ids(documents, source, name)
        if count == 0 and increment == 0:
            raise CorpusError(
                f"{name}={source.origin!r} holds no document"
                + (f" where {source.where}" if source.where else "")
                + ". There would be nothing to explain. Check the path, the filter and the sample."
            )
        buckets = ceil(count / chunk_documents)
        if count:
            _write(tables, documents, key, increment, buckets, with_words=source.columns.labels is not None)
        row = spark.createDataFrame(
            [(key, increment, source.origin, snapshot, count, buckets)],
            "corpus_key STRING, increment INT, origin STRING, snapshot STRING, n_documents BIGINT, n_buckets INT",
        ).selectExpr("*", "current_timestamp() AS staged_at")
        tables.append(row, "increments", app_id=f"increment/{key}/{increment}/{snapshot}")
    finally:
        read.unpersist()
    # A rewritten source without a new document is noted as read, and makes no increment.
    return Staged(key, increment + (count > 0), count + sum(row["n_documents"] for row in done))


def _check_ids(documents: DataFrame, source: Source, name: str) -> int:
    """Return the number of documents; raise CorpusError when ids are null or occur twice."""
    ids = documents.groupBy("doc_id").count()
    totals = ids.selectExpr(
        "coalesce(sum(count), 0) AS documents",
        "coalesce(sum(CASE WHEN doc_id IS NULL THEN count END), 0) AS nulls",
        "count_if(doc_id IS NOT NULL AND count > 1) AS twice",
    ).collect()[0]
    column = f"{name}.columns.doc_id={source.columns.doc_id!r}"
    if totals["nulls"]:
        raise CorpusError(
            f"{column} is null in {totals['nulls']} of {totals['documents']} documents. Their explanations could "
            "not have been told apart. Give each document an id, filter them out with `where`, or leave doc_id out."
        )
    if totals["twice"]:
        examples = ids.where("count > 1").orderBy("doc_id").limit(_SHOWN).collect()
        shown = ", ".join(f"{row['doc_id']!r} ({row['count']} times)" for row in examples)
        raise CorpusError(
            f"{column} is not unique: {totals['twice']} ids occur more than once, as {shown}. Their explanations "
            "would have overwritten each other. Map a unique column, or leave doc_id out."
        )
    return int(totals["documents"])


def _find_appended(tables: Tables, source: Source, documents: DataFrame, name: str) -> DataFrame:
    """Return the documents not staged before; refuse a source whose staged documents changed or vanished."""
    staged = tables.read("staged").where(f"corpus_key = {quote_text(corpus_key(source))}").selectExpr(
        "doc_id", "text_digest AS staged_digest", "labels AS staged_labels", "seen_by AS staged_seen"
    )  # fmt: skip
    joined = documents.join(staged, "doc_id", "full_outer")
    totals = joined.selectExpr(
        "count_if(text_digest IS NULL) AS deleted",
        "count_if(text_digest != staged_digest OR NOT (labels <=> staged_labels AND seen_by <=> staged_seen) AND staged_digest IS NOT NULL"
        " AND text_digest IS NOT NULL) AS changed",
    ).collect()[0]
    if totals["deleted"] or totals["changed"]:
        raise CorpusError(
            f"{name}={source.origin!r} has {totals['changed']} changed and {totals['deleted']} deleted documents since "
            "it was first read. Keywords would have mixed old and new texts. Only appended documents are followed: "
            "restore them, or write to a new sink."
        )
    return documents.join(staged, "doc_id", "left_anti")


def _write(tables: Tables, documents: DataFrame, key: str, increment: int, buckets: int, *, with_words: bool) -> None:
    staged = documents.selectExpr(
        f"{quote_text(key)} AS corpus_key",
        f"{increment} AS increment",
        # A salted hash of the digest, so that buckets and the digest's own order are independent.
        f"CAST(pmod(xxhash64('bucket', text_digest), {buckets}) AS INT) AS bucket",
        "*",
        "CAST(NULL AS ARRAY<STRING>) AS words",
    ).select(*[name for name, _, _ in TABLES["staged"].columns])
    if with_words:
        staged = staged.mapInArrow(add_word_keys, TABLES["staged"].schema)
    shuffled = staged.repartition(min(buckets, 200), "bucket").sortWithinPartitions("bucket", "text_digest", "doc_id")
    # Not an append: rows of a reading that was killed before its increment was recorded must not stay beside these.
    tables.replace(shuffled, "staged", where={"corpus_key": key, "increment": str(increment)})


def list_labelled(tables: Tables, staged: Staged) -> list[tuple[str, Sequence[str]]]:
    """Return (text digest, labels) of every labelled document, ordered by digest: what splits are drawn from."""
    rows = (
        tables.read("staged").where(f"corpus_key = {quote_text(staged.key)} AND size(labels) > 0")
        .select("text_digest", "labels").orderBy("text_digest", "doc_id").collect()
    )  # fmt: skip
    return [(row["text_digest"], list(row["labels"])) for row in rows]


def list_labels(tables: Tables, staged: Staged) -> list[str]:
    """Return the distinct gold labels of a staged source."""
    labels = (
        tables.read("staged").where(f"corpus_key = {quote_text(staged.key)}").selectExpr("explode(labels) AS label")
    )
    return sorted(row["label"] for row in labels.distinct().collect())


def check_seen(tables: Tables, staged: Staged, source: Source, n_models: int) -> None:
    """Refuse a split column that names models there are not: documents would be explained by who has seen them.

    Raises:
        CorpusError: A value is no number, or not from 0 to n_models - 1.
    """
    wrong = f"exists(seen_by, x -> x IS NULL OR x < 0 OR x >= {n_models})"
    rows = tables.read("staged").where(f"corpus_key = {quote_text(staged.key)} AND {wrong}")
    count = rows.count()
    if count:
        example = rows.select("doc_id", "seen_by").first()
        raise CorpusError(
            f"corpus.columns.split={source.columns.split!r} must hold numbers from 0 to {n_models - 1}, the places in "
            f"models.uris; {count} documents hold others, as {example['doc_id'] if example else None!r}. They would have "
            "been explained by models that have seen them. Number the models from 0."
        )
