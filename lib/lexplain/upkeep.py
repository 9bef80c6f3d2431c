"""The sink's upkeep: documents forgotten, runs deleted, tables compacted. Driver only.

Every step can be killed and done again: what tells where something is goes last. Where tables are in a catalogue, nothing
keeps a job from writing beside it: run it when no job does.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexplain.errors import TableError
from lexplain.keys import corpus_key
from lexplain.preparation.folders import prepared_folder
from lexplain.schema import TABLES
from lexplain.tables import RETAIN_HOURS, Tables, quote_list, quote_text
from lexplain.training import model_folder

if TYPE_CHECKING:
    from lexplain.plan import Plan

_KEYWORD_TABLES = ("keywords", "keyphrases", "word_statistics", "phrase_statistics")
_SUMS = ("word_sums", "phrase_sums")


@dataclass(frozen=True)
class Forgotten:
    """What became of documents that were to be forgotten.

    Attributes:
        n_documents: How many of them were staged.
        n_explanations: Their rows in `explanations`.
        runs: Names of runs whose keyword tables rested on their sources, and are gone.
    """

    n_documents: int
    n_explanations: int
    runs: tuple[str, ...]


def forget_documents(tables: Tables, plan: Plan, doc_ids: Sequence[str]) -> Forgotten:
    """Remove documents of a plan's sources from every table, and leave them out of every later reading.

    What was computed from them with others goes too: sums of their chunks, keyword tables of all runs over these sources,
    neighbours and features of fine-tuning. None of it takes a model to make again, but the neighbours.

    Args:
        tables: The sink; the caller holds its lock.
        plan: Names the sources; other samples and filters of them are meant, too.
        doc_ids: As the source has them.

    Note:
        Runs on: Spark. Cost: the files that hold rows of the documents are written anew. Delta keeps the old ones until
        `maintain` deletes them. A model that was fine-tuned on a document, MLflow and reports are not touched.
    """
    sources = {source.origin: source for source in (plan.corpus, plan.training) if source is not None}
    keys = {corpus_key(source) for source in (plan.corpus, plan.training) if source is not None}
    recorded = (
        tables.read("increments").where(f"origin IN ({quote_list(list(sources))})").select("corpus_key").distinct()
    )
    keys |= {row["corpus_key"] for row in recorded.collect()}
    theirs = f"corpus_key IN ({quote_list(sorted(keys))})"
    documents = f"{theirs} AND doc_id IN ({quote_list(sorted(set(doc_ids)))})"
    _remember_forgotten(tables, list(sources), doc_ids)
    places = [
        tables.read(table).where(documents).select("corpus_key", "increment", "bucket") for table in ("staged", "explanations")
    ]  # fmt: skip
    chunks = places[0].union(places[1]).distinct().collect()
    runs = _drop_keyword_tables(tables, keys) if chunks else ()
    for row in chunks:
        chunk = f"corpus_key = {quote_text(row['corpus_key'])} AND increment = {row['increment']} AND bucket = {row['bucket']}"
        for table in _SUMS:
            tables.remove(table, where=chunk)
    # The ledger is written anew from what is staged. Before that is changed: a ledger that owes more is a failed run.
    for key, increment in sorted({(row["corpus_key"], row["increment"]) for row in chunks}):
        tables.remove("chunks", where=f"corpus_key = {quote_text(key)} AND increment = {increment}")
    n_documents = tables.remove("staged", where=documents)
    n_explanations = tables.remove("explanations", where=documents)
    for table in ("deletions", "class_deletions"):
        tables.remove(table, where=documents)
    _count_increments(tables, theirs)
    if chunks:
        _drop_prepared(tables, plan, theirs)
    return Forgotten(n_documents, n_explanations, runs)


def _remember_forgotten(tables: Tables, origins: Sequence[str], doc_ids: Sequence[str]) -> None:
    rows = tables.spark.createDataFrame(
        [(origin, doc_id) for origin in origins for doc_id in sorted(set(doc_ids))], "origin STRING, doc_id STRING"
    ).selectExpr("origin", "sha2(doc_id, 256) AS doc_digest", "current_timestamp() AS forgotten_at")
    tables.add_first(
        rows, "forgotten", unless="present.origin = added.origin AND present.doc_digest = added.doc_digest"
    )


def _drop_keyword_tables(tables: Tables, keys: set[str]) -> tuple[str, ...]:
    """Delete the keyword tables that rest on some sources, or on what no run knows; return the names of their runs."""
    runs = tables.read("runs").where("keyword_key IS NOT NULL").collect()
    resting = [row for row in runs if _name_sources(row.asDict()) & keys]
    others = {row["keyword_key"] for row in runs} - {row["keyword_key"] for row in resting}
    for table in _KEYWORD_TABLES:
        tables.remove(table, where=f"keyword_key NOT IN ({quote_list(sorted(others))})" if others else "TRUE")
    return tuple(sorted({row["name"] for row in resting}))


def _name_sources(run: Mapping[str, Any]) -> set[str]:
    """Return the corpus_keys of a run's inputs; a snapshot is a key and a number of increments."""
    snapshots = (run["corpus_snapshot"], run["training_snapshot"], run["labelled_snapshot"])
    return {run["corpus_key"], *(str(snapshot).partition("/")[0] for snapshot in snapshots if snapshot)} - {None}


def _count_increments(tables: Tables, where: str) -> None:
    """Bring the numbers of documents in `increments` to what is staged."""
    counts = tables.read("staged").where(where).groupBy("corpus_key", "increment").count()
    there = tables.read("increments").where(where)
    wrong = (
        there.join(counts, ["corpus_key", "increment"], "left")
        .where("n_buckets > 0 AND n_documents != coalesce(count, 0)")
        .selectExpr("corpus_key", "increment", "origin", "snapshot", "coalesce(count, 0) AS n_documents", "n_buckets", "staged_at")
    )  # fmt: skip
    for row in wrong.collect():
        fixed = tables.spark.createDataFrame([row.asDict()], TABLES["increments"].schema)
        place = f"corpus_key = {quote_text(row['corpus_key'])} AND snapshot = {quote_text(row['snapshot'])}"
        tables.replace(fixed, "increments", where=place)


def _drop_prepared(tables: Tables, plan: Plan, where: str) -> None:
    """Delete indexes of reference documents, and features that fine-tuning keeps of its documents."""
    files = [row["file"] for row in tables.read("neighbours").where(where).select("file").collect()]
    folder = prepared_folder(tables, plan)
    for file in files if folder is not None else []:
        (folder / file).unlink(missing_ok=True)
    tables.remove("neighbours", where=where)
    if plan.models.base is not None:
        shutil.rmtree(Path(model_folder(plan)) / "features", ignore_errors=True)


def find_run(tables: Tables, named: str) -> dict[str, Any]:
    """Return the row of a run, by run_id or by a name that one run has.

    Raises:
        TableError: There is none, or the name is that of several.
    """
    rows = tables.read("runs").where(f"{quote_text(named)} IN (run_id, name)").collect()
    if len(rows) == 1:
        return dict(rows[0].asDict(recursive=True))
    if rows:
        known = ", ".join(sorted(row["run_id"] for row in rows))
        raise TableError(
            f"run={named!r} is the name of {len(rows)} runs. One of them would have been taken by chance. Write a run_id: {known}."
        )
    raise TableError(
        f"run={named!r} is no run of these tables. Nothing would have been found. `lexplain runs list` shows them."
    )


def delete_run(tables: Tables, run: Mapping[str, Any]) -> dict[str, int]:
    """Delete a run and what it alone has made or staged; its row goes last.

    What another run reads stays: models of the same training documents, explanations with its keys, staged sources, keyword
    tables. A run that never got to explaining may have any keys: while there is one, explanations of its corpus stay.

    Args:
        tables: The sink; the caller holds its lock.
        run: As `find_run` returns it.

    Returns:
        Rows deleted, by table.

    Note:
        Runs on: Spark. Cost: files that hold its rows are written anew; `maintain` frees the space. Folders of models that
        were fine-tuned for it are deleted. What MLflow keeps, and the figures of evaluations, are left.
    """
    others = [row.asDict() for row in tables.read("runs").where(f"run_id != {quote_text(run['run_id'])}").collect()]
    removed: dict[str, int] = {}

    def remove(table: str, where: str) -> None:
        removed[table] = removed.get(table, 0) + tables.remove(table, where=where)

    if run["keyword_key"] is not None and all(run["keyword_key"] != other["keyword_key"] for other in others):
        for table in (*_KEYWORD_TABLES, "class_deletions"):
            remove(table, f"keyword_key = {quote_text(run['keyword_key'])}")
    same_corpus = [other for other in others if other["corpus_key"] == run["corpus_key"]]
    used = {key for other in same_corpus for key in other["explain_keys"] or []}
    free = sorted(set(run["explain_keys"] or []) - used)
    if free and all(other["explain_keys"] is not None for other in same_corpus):
        where = f"corpus_key = {quote_text(run['corpus_key'])} AND explain_key IN ({quote_list(free)})"
        for table in (*_SUMS, "deletions", "class_deletions", "chunks", "explanations"):
            remove(table, where)
    snapshot = run["training_snapshot"]
    if snapshot is not None and all(other["training_snapshot"] != snapshot for other in others):
        trained = f"training_snapshot = {quote_text(snapshot)} AND seed IS NOT NULL"
        for row in tables.read("models").where(trained).select("folder").collect():
            shutil.rmtree(row["folder"], ignore_errors=True)
        remove("models", trained)
    sources = _name_sources(run).difference(*(_name_sources(other) for other in others))
    if sources:
        where = f"corpus_key IN ({quote_list(sorted(sources))})"
        made = (*_SUMS, "deletions", "class_deletions", "chunks", "explanations", "calibrations", "neighbours")
        for table in (*made, "staged", "increments"):
            remove(table, where)
    remove("runs", f"run_id = {quote_text(run['run_id'])}")
    return {table: count for table, count in removed.items() if count}


def drop_orphans(tables: Tables) -> int:
    """Delete keyword tables that no run, sweep or evaluation names: those of earlier increments and thresholds.

    Returns:
        How many keyword tables there were. None are looked for while a run is on: its own has no name yet.
    """
    if tables.folder is None and tables.read("runs").where("status = 'running'").count():
        return 0
    named = {
        row["keyword_key"]
        for table in ("runs", "sweeps", "keyword_quality")
        for row in tables.read(table).where("keyword_key IS NOT NULL").select("keyword_key").distinct().collect()
    }
    where = f"keyword_key NOT IN ({quote_list(sorted(named))})" if named else "TRUE"
    count = tables.read("word_statistics").where(where).select("keyword_key").distinct().count()
    for table in _KEYWORD_TABLES:
        tables.remove(table, where=where)
    return int(count)


def maintain(tables: Tables, table: str, retain_hours: float = RETAIN_HOURS) -> tuple[int, int]:
    """Join a table's small files, and delete those that no version of the last hours needs.

    A job that runs meanwhile tries its commit again; what it read is kept for `retain_hours`.

    Returns:
        Files of the table's latest version, before and after.

    Raises:
        TableError: Other jobs' commits came in between time and again.

    Note:
        Runs on: Spark. Cost: small files are read and written once.
    """

    def count() -> int:
        return int(tables.spark.sql(f"DESCRIBE DETAIL {tables.name(table)}").collect()[0]["numFiles"])

    before = count()
    tables.compact(table, retain_hours)
    return before, count()
