"""The sink's upkeep: documents forgotten, runs deleted, tables compacted. Driver only.

Every step can be killed and done again: what tells where something is goes last. Where tables are in a catalogue, nothing
keeps a job from writing beside it: run it when no job does.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexplain.errors import TableError
from lexplain.keys import corpus_key, evaluation_prefix
from lexplain.preparation.folders import PREPARED
from lexplain.schema import TABLES
from lexplain.settings import read_mapping
from lexplain.tables import Tables, quote_list, quote_text
from lexplain.training import model_folder

if TYPE_CHECKING:
    from lexplain.plan import Plan

_KEYWORD_TABLES = ("keywords", "keyphrases", "word_statistics", "phrase_statistics", "class_deletions")
_SUMS = ("word_sums", "phrase_sums")
_EXPLAINED = (*_SUMS, "deletions", "class_deletions", "chunks", "explanations")


@dataclass(frozen=True)
class Forgotten:
    """What became of documents that were to be forgotten.

    Attributes:
        n_documents: How many of them were staged, once for each source and sample that has them.
        n_explanations: Their rows in `explanations`.
        runs: Names of runs that have no keyword table now, for it rested on their sources: they make it when they run again.
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
        plan: Names the sources, as it calls them; other samples and filters of them are meant, too.
        doc_ids: As the source has them.

    Note:
        Runs on: Spark. Cost: the files that hold rows of the documents are written anew. Delta keeps the old ones until
        `maintain` deletes them. A model that was fine-tuned on a document, MLflow and reports are not touched.
    """
    sources = [source for source in (plan.corpus, plan.training) if source is not None]
    origins = sorted({source.origin for source in sources})
    recorded = tables.read("increments").where(f"origin IN ({quote_list(origins)})").select("corpus_key", "origin")
    named = {row["corpus_key"]: row["origin"] for row in recorded.distinct().collect()}
    named |= {corpus_key(source): source.origin for source in sources}
    keys = set(named)
    theirs = f"corpus_key IN ({quote_list(sorted(keys))})"
    # By digest: a table's history keeps conditions for longer than rows.
    digests = quote_list(sorted({hashlib.sha256(one.encode()).hexdigest() for one in doc_ids}))
    documents = f"{theirs} AND sha2(doc_id, 256) IN ({digests})"
    _remember_forgotten(tables, named, doc_ids, documents)
    places = [
        tables.read(table).where(documents).select("corpus_key", "increment", "bucket") for table in ("staged", "explanations")
    ]  # fmt: skip
    chunks = places[0].union(places[1]).distinct().collect()
    runs: tuple[str, ...] = ()
    n_documents = n_explanations = 0
    if chunks:
        # What tells where a document was goes last: killed before that, the same command finds it again.
        runs = _drop_keyword_tables(tables, keys, plan.name)
        _drop_prepared(tables, plan, theirs)
        where = " OR ".join(
            f"(corpus_key = {quote_text(row['corpus_key'])} AND increment = {row['increment']} AND bucket = {row['bucket']})"
            for row in chunks
        )
        for table in _SUMS:
            tables.remove(table, where=where)
        # The ledger is written anew from what is staged. Before that is changed: a ledger that owes more is a failed run.
        increments = sorted({(row["corpus_key"], row["increment"]) for row in chunks})
        tables.remove(
            "chunks",
            where=" OR ".join(
                f"(corpus_key = {quote_text(key)} AND increment = {number})" for key, number in increments
            ),
        )
        n_documents = tables.remove("staged", where=documents)
        for table in ("deletions", "class_deletions"):
            tables.remove(table, where=documents)
        n_explanations = tables.remove("explanations", where=documents)
    _count_increments(tables, theirs)
    return Forgotten(n_documents, n_explanations, runs)


def _remember_forgotten(tables: Tables, named: Mapping[str, str], doc_ids: Sequence[str], documents: str) -> None:
    """Note digests: of the ids for every source, of texts with labels, which models of any plan were trained on, maybe."""
    trained = tables.read("staged").where(f"{documents} AND size(labels) > 0")
    known = {
        (named[row["corpus_key"]], row["doc_id"]): row["text_digest"]
        for row in trained.select("corpus_key", "doc_id", "text_digest").collect()
    }
    rows = [
        (origin, doc_id, known.get((origin, doc_id)))
        for origin in sorted(set(named.values()))
        for doc_id in sorted(set(doc_ids))
    ]
    frame = tables.spark.createDataFrame(rows, "origin STRING, doc_id STRING, text_digest STRING").selectExpr(
        "origin", "sha2(doc_id, 256) AS doc_digest", "text_digest", "current_timestamp() AS forgotten_at"
    )
    tables.add_first(
        frame, "forgotten", unless="present.origin = added.origin AND present.doc_digest = added.doc_digest"
    )


def _drop_keyword_tables(tables: Tables, keys: set[str], name: str) -> tuple[str, ...]:
    """Delete the keyword tables that rest on some sources, or on what nobody knows; return the names of their runs."""
    runs = tables.read("runs").collect()
    resting = [row for row in runs if _name_sources(row.asDict()) & keys]
    kept = {row["keyword_key"] for row in runs} - {row["keyword_key"] for row in resting}
    for table in ("sweeps", "keyword_quality"):
        for row in tables.read(table).select("name", "keyword_key").distinct().collect():
            # Each method of an evaluation is a run, the plan itself need not be one.
            prefix = evaluation_prefix(row["name"])
            theirs = [run for run in runs if run["name"] == row["name"] or run["name"].startswith(prefix)]
            if theirs and row["name"] != name and not any(run in resting for run in theirs):
                kept.add(row["keyword_key"])
    for table in _KEYWORD_TABLES:
        tables.remove(table, where=_where_not(sorted(kept - {None})))
    for row in resting:
        if row["keyword_key"] is not None:
            changed = tables.read("runs").where(f"run_id = {quote_text(row['run_id'])}").drop("keyword_key")
            changed = changed.selectExpr("*", "CAST(NULL AS STRING) AS keyword_key").localCheckpoint()
            tables.replace(changed, "runs", where=f"run_id = {quote_text(row['run_id'])}")
    return tuple(sorted({row["name"] for row in resting}))


def _where_not(keyword_keys: Sequence[str]) -> str:
    return f"keyword_key NOT IN ({quote_list(keyword_keys)})" if keyword_keys else "TRUE"


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
    _drop_neighbours(tables, where, plan.models.folder)
    if plan.models.base is not None:
        shutil.rmtree(Path(model_folder(plan)) / "features", ignore_errors=True)


def _drop_neighbours(tables: Tables, where: str, models: str | None) -> int:
    """Delete indexes of reference documents; return how many there were."""
    folders = [folder for folder in (models, tables.folder) if folder is not None]
    for row in tables.read("neighbours").where(where).select("file").collect():
        for folder in folders:
            (Path(folder) / PREPARED / row["file"]).unlink(missing_ok=True)
    return tables.remove("neighbours", where=where)


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
        were fine-tuned for it are deleted where they lie in the sink. What MLflow keeps, and the figures of evaluations,
        are left.
    """
    others = [row.asDict() for row in tables.read("runs").where(f"run_id != {quote_text(run['run_id'])}").collect()]
    removed: dict[str, int] = {}

    def remove(table: str, where: str) -> None:
        removed[table] = removed.get(table, 0) + tables.remove(table, where=where)

    if run["keyword_key"] is not None and all(run["keyword_key"] != other["keyword_key"] for other in others):
        for table in _KEYWORD_TABLES:
            remove(table, f"keyword_key = {quote_text(run['keyword_key'])}")
    same_corpus = [other for other in others if other["corpus_key"] == run["corpus_key"]]
    used = {key for other in same_corpus for key in _list_keys(other)}
    free = sorted(set(_list_keys(run)) - used)
    if free and all(map(_list_keys, same_corpus)):
        where = f"corpus_key = {quote_text(run['corpus_key'])} AND explain_key IN ({quote_list(free)})"
        for table in _EXPLAINED:
            remove(table, where)
    sources = _name_sources(run).difference(*(_name_sources(other) for other in others))
    _delete_models(tables, run, others, sources, remove)
    if sources:
        where = f"corpus_key IN ({quote_list(sorted(sources))})"
        folder = (read_mapping(run["plan"], "plan").get("models") or {}).get("folder")
        removed["neighbours"] = _drop_neighbours(tables, where, folder)
        for table in (*_EXPLAINED, "calibrations", "staged", "increments"):
            remove(table, where)
    remove("runs", f"run_id = {quote_text(run['run_id'])}")
    return {table: count for table, count in removed.items() if count}


def _list_keys(run: Mapping[str, Any]) -> Sequence[str]:
    """Return the keys of all explanations that a run has made or used; none of one that never got there."""
    return run["explain_keys_ever"] or run["explain_keys"] or []  # an older lexplain knew the last ones only


def _delete_models(
    tables: Tables, run: Mapping[str, Any], others: Sequence[Mapping[str, Any]], sources: set[str],
    remove: Callable[[str, str], None],
) -> None:  # fmt: skip
    """Delete models that were fine-tuned on training documents which no other run has, and their folders."""
    snapshot = run["training_snapshot"]
    free = [f"training_key IN ({quote_list(sorted(sources))})"]
    if snapshot is not None and all(other["training_snapshot"] != snapshot for other in others):
        free.append(f"training_snapshot = {quote_text(snapshot)}")
    trained = f"seed IS NOT NULL AND ({' OR '.join(free)})"
    # A plan may have brought a model by the name of the folder that another one fine-tuned.
    kept = {row["folder"] for row in tables.read("models").where("seed IS NULL").select("folder").collect()}
    for row in tables.read("models").where(trained).select("folder").collect():
        # Only under the sink: a folder of the plan's own may be shared with other sinks, which have the same models.
        if row["folder"] not in kept and tables.folder is not None and tables.folder in Path(row["folder"]).parents:
            shutil.rmtree(row["folder"], ignore_errors=True)
    remove("models", trained)


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
    where = _where_not(sorted(named))
    count = tables.read("word_statistics").where(where).select("keyword_key").distinct().count()
    for table in _KEYWORD_TABLES:
        tables.remove(table, where=where)
    return int(count)
