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
from lexplain.schema import TABLES
from lexplain.sources import (
    literal_path,
    name_table,
    read_above,
    read_appended,
    read_documents,
    read_source,
    read_watermark,
    refuse_source,
)
from lexplain.tables import Tables, quote_list, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

_SHOWN = 3  # examples in a message
_READINGS = 3  # of a source that changes while it is read


@dataclass(frozen=True)
class Staged:
    """A source as staged: all of its increments.

    Attributes:
        key: The source's `corpus_key`.
        increments: How many increments there are.
        n_documents: Documents in all of them.
        snapshot: Name of the snapshot that was found when it was staged; None where a run goes on with earlier input.
    """

    key: str
    increments: int
    n_documents: int
    snapshot: str | None = None

    @property
    def version(self) -> str:
        """What decides the staged content; a rewritten source with the same documents leaves it as it is."""
        return f"{self.key}/{self.increments}"

    @property
    def where(self) -> str:
        """The SQL condition on (corpus_key, increment) that selects it, in `staged` and all tables made from it.

        Increments that were staged later, by another run, are none of its own.
        """
        return where_increments(self.key, self.increments)

    def where_explained(self, explain_keys: Sequence[str]) -> str:
        """Return the SQL condition that selects, in all tables made from explanations, what these models made of it."""
        return f"{self.where} AND explain_key IN ({quote_list(explain_keys)})"


def where_increments(key: str, count: int) -> str:
    """Return the SQL condition that selects the first increments of a source."""
    return f"corpus_key = {quote_text(key)} AND increment < {count}"


@dataclass(frozen=True)
class Snapshot:
    """What pins a source's content.

    Attributes:
        name: A Delta table's id and version, or a digest of files or content; of a source with a watermark its largest.
        version: The Delta version to read; None: only a second snapshot tells whether a reading was of the first.
        has_change_feed: Of a Delta table: it says which rows a commit changed.
    """

    name: str
    version: int | None = None
    has_change_feed: bool = False


_WATERMARK = "watermark@"


def take_snapshot(spark: SparkSession, source: Source, name: str) -> Snapshot:
    """Return what pins a source's content now.

    For a Delta table its id and version; for files, and tables over files, a digest of their listing; for a view a digest
    of the documents, which costs a reading; with a watermark, what it has reached.

    Raises:
        CorpusError: The source is not there, or its watermark cannot be read.
    """
    detail = _describe(spark, source)
    if detail is not None and detail["format"] == "delta":
        version = int(spark.sql(f"DESCRIBE HISTORY {name_table(source)} LIMIT 1").collect()[0]["version"])
        feed = detail["properties"].get("delta.enableChangeDataFeed") == "true"
        snapshot = Snapshot(f"{detail['id']}@{version}", version, feed)
    else:
        snapshot = Snapshot("", None)
    if source.watermark is not None:
        return Snapshot(_WATERMARK + read_watermark(spark, source, name, snapshot.version), snapshot.version)
    if snapshot.version is not None:
        return snapshot
    if source.kind == "table" and detail is None:
        return _digest_documents(spark, source, name)
    return _list_files(spark, source)


def _describe(spark: SparkSession, source: Source) -> Row | None:
    """Return what a table is; None for a view, and for a path that is no Delta table."""
    if source.kind not in ("table", "delta"):
        return None
    table = name_table(source)
    try:
        return spark.sql(f"DESCRIBE DETAIL {table}").collect()[0]
    except Exception as error:
        if source.kind == "delta" or not spark.catalog.tableExists(table):
            raise refuse_source(source, error) from error
        return None


def _digest_documents(spark: SparkSession, source: Source, name: str) -> Snapshot:
    # A sum: the order of the documents does not count, and equal ones do not cancel out.
    row = read_documents(spark, source, name).selectExpr(
        "count(*) AS n", "sum(CAST(xxhash64(doc_id, text_digest, labels, seen_by) AS DECIMAL(38,0))) AS digest"
    ).collect()[0]  # fmt: skip
    return Snapshot(f"documents@{row['n']}/{row['digest']}")


def _list_files(spark: SparkSession, source: Source) -> Snapshot:
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
    return Snapshot("files@" + hashlib.sha256(listing.encode()).hexdigest()[:20])


def stage(tables: Tables, source: Source, *, name: str, chunk_documents: int, taken: Snapshot | None = None) -> Staged:
    """Bring a source's documents into `staged`; what is there already is left alone.

    The source is read once. A first reading is increment 0; documents appended later become further
    increments with chunks of their own. Of jobs that stage one source at once the first one's increment stays,
    and the others go on from it.

    Args:
        tables: The sink.
        source: What to read.
        name: The plan's section, for messages: `corpus` or `training`.
        chunk_documents: Documents a chunk; decides the number of buckets of a new increment.
        taken: A snapshot that was taken when the run was opened; None: one is taken here.

    Raises:
        CorpusError: The source cannot be read as mapped, holds no document, has ids that are null or occur
            twice, changed time and again while it was read, or documents staged before were changed or deleted.
    """
    _refuse_half_forgotten(tables, source, name)
    readings = _record_staged(tables, source)
    # Of another reading only the snapshot that comes after it can tell what is new, and what was there before.
    snapshot = taken if taken is not None and _are_of(readings, taken.name) else None
    for _ in range(_READINGS):
        snapshot = snapshot or take_snapshot(tables.spark, source, name)
        if not _are_of(readings, snapshot.name):
            _stage_increment(tables, source, snapshot, _count(readings), name, chunk_documents)
            readings = _record_staged(tables, source)
        if _are_of(readings, snapshot.name):
            return _select(source, readings, _count(readings), snapshot.name)
        snapshot = None
    raise CorpusError(
        f"{name}={source.origin!r} changed each of {_READINGS} times while it was read. The documents would have been "
        "those of no one version. Run again when nothing writes to it, or read a Delta table: its versions stay."
    )


def _refuse_half_forgotten(tables: Tables, source: Source, name: str) -> None:
    """Refuse to go on from a `forget` that was killed: what it began would look like documents deleted from the source."""
    forgotten = tables.read("forgotten").where(f"origin = {quote_text(source.origin)}").select("doc_digest")
    if forgotten.first() is None:
        return
    staged = tables.read("staged").where(f"corpus_key = {quote_text(corpus_key(source))}")
    left = staged.selectExpr("doc_id", "sha2(doc_id, 256) AS doc_digest").join(
        forgotten.hint("broadcast"), "doc_digest", "left_semi"
    )
    ids = [row["doc_id"] for row in left.select("doc_id").distinct().orderBy("doc_id").limit(_SHOWN).collect()]
    if ids:
        raise CorpusError(
            f"{name}={source.origin!r}: documents are to be forgotten and are in the tables yet, as {', '.join(map(repr, ids))}: "
            "`lexplain forget` did not end. Keywords would have rested on them. Run it again with these ids."
        )


def find_staged(tables: Tables, source: Source, increments: int, name: str) -> Staged:
    """Return the first increments of a source, which an earlier start of a run has staged.

    Raises:
        CorpusError: A `lexplain forget` of its documents did not end.
    """
    _refuse_half_forgotten(tables, source, name)
    return _select(source, _record_staged(tables, source), increments, None)


@dataclass(frozen=True)
class _Reading:
    """A recorded reading of a source, which found new documents or none.

    Attributes:
        increments: How many increments there were after it.
        is_increment: It found documents. They may all have been forgotten since.
    """

    snapshot: str
    increments: int
    n_documents: int
    is_increment: bool


def _count(readings: Sequence[_Reading]) -> int:
    return sum(reading.is_increment for reading in readings)


def _are_of(readings: Sequence[_Reading], snapshot: str) -> bool:
    """Return whether the increments there are, all of them, are those of a snapshot.

    A source that went back to what it was has an old snapshot: what came in between was deleted.
    """
    return any(reading.snapshot == snapshot and reading.increments == _count(readings) for reading in readings)


def _select(source: Source, readings: Sequence[_Reading], increments: int, snapshot: str | None) -> Staged:
    counts = [reading.n_documents for reading in readings if reading.is_increment and reading.increments <= increments]
    return Staged(corpus_key(source), increments, sum(counts), snapshot)


def _record_staged(tables: Tables, source: Source) -> list[_Reading]:
    """Return the source's recorded readings.

    Staged increments without a record get theirs first: of a job that was killed in between, or of one that is
    about to write the same.
    """
    ours = f"corpus_key = {quote_text(corpus_key(source))}"
    readings = [_read_reading(row) for row in tables.read("increments").where(ours).collect()]
    staged = tables.spark.sql(
        "SELECT increment, snapshot, count(*) AS n_documents, CAST(count(DISTINCT bucket) AS INT) AS n_buckets"
        f" FROM {tables.name('staged')} WHERE {ours} AND increment >= {_count(readings)}"
        " GROUP BY increment, snapshot ORDER BY increment"
    ).collect()
    for row in staged:
        _record(tables, source, **row.asDict())
    return readings + [_read_reading(row) for row in staged]


def _read_reading(row: Row) -> _Reading:
    found = row["n_buckets"] > 0
    return _Reading(row["snapshot"], row["increment"] + found, row["n_documents"], found)


def _record(tables: Tables, source: Source, *, increment: int, snapshot: str, n_documents: int, n_buckets: int) -> None:
    key = corpus_key(source)
    row = tables.spark.createDataFrame(
        [(key, increment, source.origin, snapshot, n_documents, n_buckets)],
        "corpus_key STRING, increment INT, origin STRING, snapshot STRING, n_documents BIGINT, n_buckets INT",
    ).selectExpr("*", "current_timestamp() AS staged_at")
    # Both kinds may have one snapshot: a source goes back to it when documents that came later are forgotten.
    which = (
        f"increment = {increment} AND n_buckets > 0"
        if n_buckets
        else f"snapshot = {quote_text(snapshot)} AND n_buckets = 0"
    )
    tables.replace(row, "increments", where=f"corpus_key = {quote_text(key)} AND {which}")


def _stage_increment(
    tables: Tables, source: Source, snapshot: Snapshot, increment: int, name: str, chunk_documents: int
) -> None:
    """Stage what is new in a snapshot, or note that nothing is; do neither if the source has moved on since."""
    spark = tables.spark
    rows = _read_new(tables, source, snapshot, name) if increment else None
    try:
        read = read_documents(spark, source, name, version=snapshot.version, rows=rows)
    except CorpusError:
        if rows is None or source.watermark is not None:
            raise
        # A feed names files that were joined and vacuumed since; the table itself has their rows.
        rows, read = None, read_documents(spark, source, name, version=snapshot.version)
    read = _leave_forgotten(tables, source, read).persist()
    try:
        if rows is not None:
            documents = read
            _refuse_known(tables, source, read, name)
        else:
            documents = _find_appended(tables, source, read, increment, name) if increment else read
        count = _check_ids(documents, source, name)
        if snapshot.version is None and take_snapshot(spark, source, name) != snapshot:
            return
        if count == 0 and increment == 0:
            raise CorpusError(
                f"{name}={source.origin!r} holds no document"
                + (f" where {source.where}" if source.where else "")
                + ". There would be nothing to explain. Check the path, the filter and the sample."
            )
        if count:
            _write(tables, documents, source, snapshot, increment, ceil(count / chunk_documents))
        else:  # a rewritten source without a new document
            _record(tables, source, increment=increment, snapshot=snapshot.name, n_documents=0, n_buckets=0)
    finally:
        read.unpersist()


def _read_new(tables: Tables, source: Source, snapshot: Snapshot, name: str) -> DataFrame | None:
    """Return the source's rows that came since it was last read; None where only all of its documents can tell.

    They are told by the watermark, if no row came late, or by a Delta table's change feed, if its commits only added rows.
    The watermark promises that old rows stay as they are.
    """
    where = f"corpus_key = {quote_text(corpus_key(source))}"
    names = [row["snapshot"] for row in tables.read("increments").where(where).orderBy("staged_at").collect()]
    if not names:  # staged, but not recorded: of a job that was killed
        return None
    if source.watermark is not None:
        if not names[-1].startswith(_WATERMARK):
            return None
        return read_above(tables.spark, source, name, names[-1].removeprefix(_WATERMARK), snapshot.version)
    # An id made from the text may be another one beside a copy, and a limit lets new documents push others out.
    table, _, version = snapshot.name.rpartition("@")
    if not snapshot.has_change_feed or source.limit is not None or source.columns.doc_id is None:
        return None
    if names[-1].rpartition("@")[0] != table:
        return None
    # The furthest: of two jobs the one that has read less may have recorded it later.
    since = 1 + max(int(one.rpartition("@")[2]) for one in names if one.rpartition("@")[0] == table)
    return read_appended(tables.spark, source, since, int(version))


def _refuse_known(tables: Tables, source: Source, documents: DataFrame, name: str) -> None:
    """Refuse new rows with ids that were staged before: two documents would have one id, or one has changed."""
    staged = tables.read("staged").where(f"corpus_key = {quote_text(corpus_key(source))}").select("doc_id")
    again = documents.join(staged, "doc_id", "left_semi").select("doc_id").orderBy("doc_id").limit(_SHOWN).collect()
    if again:
        shown = ", ".join(repr(row["doc_id"]) for row in again)
        raise CorpusError(
            f"{name}={source.origin!r} has new rows with ids of documents that were read before, as {shown}. Keywords would have "
            "mixed old and new texts. Only appended documents are followed: give them ids of their own, or write to a new sink."
        )


def _leave_forgotten(tables: Tables, source: Source, documents: DataFrame) -> DataFrame:
    forgotten = tables.read("forgotten").where(f"origin = {quote_text(source.origin)}").select("doc_digest")
    named = documents.selectExpr("*", "sha2(doc_id, 256) AS doc_digest")
    return named.join(forgotten.hint("broadcast"), "doc_digest", "left_anti").select(documents.columns)


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


def _find_appended(tables: Tables, source: Source, documents: DataFrame, increment: int, name: str) -> DataFrame:
    """Return the documents not staged before; refuse a source whose staged documents changed or vanished."""
    before = f"corpus_key = {quote_text(corpus_key(source))} AND increment < {increment}"
    staged = tables.read("staged").where(before).selectExpr(
        "doc_id", "text_digest AS staged_digest", "labels AS staged_labels", "seen_by AS staged_seen"
    )  # fmt: skip
    joined = documents.join(staged, "doc_id", "full_outer")
    totals = joined.selectExpr(
        "count_if(text_digest IS NULL) AS deleted",
        "count_if(text_digest != staged_digest OR NOT (labels <=> staged_labels AND seen_by <=> staged_seen) AND staged_digest IS NOT NULL"
        " AND text_digest IS NOT NULL) AS changed",
    ).collect()[0]
    if totals["deleted"] or totals["changed"]:
        hint = (
            " With `limit` new documents push others out: leave it away to follow a growing source."
            if source.limit
            else ""
        )
        if source.columns.doc_id is None:
            hint += " Without columns.doc_id a copy of a text may rename the first: map an id."
        raise CorpusError(
            f"{name}={source.origin!r} has {totals['changed']} changed and {totals['deleted']} deleted documents since "
            "it was first read. Keywords would have mixed old and new texts. Only appended documents are followed: "
            f"restore them, or write to a new sink.{hint}"
        )
    return documents.join(staged, "doc_id", "left_anti")


def _write(
    tables: Tables, documents: DataFrame, source: Source, snapshot: Snapshot, increment: int, buckets: int
) -> None:
    key = quote_text(corpus_key(source))
    staged = documents.selectExpr(
        f"{key} AS corpus_key",
        f"{increment} AS increment",
        f"{quote_text(snapshot.name)} AS snapshot",
        # A salted hash of the digest, so that buckets and the digest's own order are independent.
        f"CAST(pmod(xxhash64('bucket', text_digest), {buckets}) AS INT) AS bucket",
        "*",
        "CAST(NULL AS ARRAY<STRING>) AS words",
    ).select(*[name for name, _, _ in TABLES["staged"].columns])
    if source.columns.labels is not None:
        staged = staged.mapInArrow(add_word_keys, TABLES["staged"].schema)
    # One file a bucket: Delta shuffles by the partition columns before it writes. All or nothing, and never beside
    # an increment that another job has staged in the meantime.
    tables.add_first(staged, "staged", unless=f"present.corpus_key = {key} AND present.increment = {increment}")


def is_trainable(max_characters: int) -> str:
    """Return the SQL condition that a staged row is a document with a label, and can be read: it has words."""
    # Where there are words the bytes are UTF-8.
    return f"size(labels) > 0 AND size(words) > 0 AND length(CAST(text AS STRING)) <= {max_characters:d}"


def list_labelled(tables: Tables, staged: Staged, max_characters: int) -> list[tuple[str, Sequence[str]]]:
    """Return (text digest, labels) of every document to train on, ordered by digest: what splits are drawn from."""
    rows = (
        tables.read("staged").where(f"{staged.where} AND {is_trainable(max_characters)}")
        .select("text_digest", "labels").orderBy("text_digest", "doc_id").collect()
    )  # fmt: skip
    return [(row["text_digest"], list(row["labels"])) for row in rows]


def list_labels(tables: Tables, staged: Staged) -> list[str]:
    """Return the distinct gold labels of a staged source."""
    labels = tables.read("staged").where(staged.where).selectExpr("explode(labels) AS label")
    return sorted(row["label"] for row in labels.distinct().collect())


def check_seen(tables: Tables, staged: Staged, source: Source, n_models: int) -> None:
    """Refuse a split column that names models there are not: documents would be explained by who has seen them.

    Raises:
        CorpusError: A value is no number, or not from 0 to n_models - 1.
    """
    wrong = f"exists(seen_by, x -> x IS NULL OR x < 0 OR x >= {n_models})"
    rows = tables.read("staged").where(f"{staged.where} AND {wrong}")
    count = rows.count()
    if count:
        example = rows.select("doc_id", "seen_by").first()
        raise CorpusError(
            f"corpus.columns.split={source.columns.split!r} must hold numbers from 0 to {n_models - 1}, the places in "
            f"models.uris; {count} documents hold others, as {example['doc_id'] if example else None!r}. They would have "
            "been explained by models that have seen them. Number the models from 0."
        )
