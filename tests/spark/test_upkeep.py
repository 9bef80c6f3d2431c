"""Documents explained after all, forgotten, runs deleted, tables compacted: nothing else is lost, and nothing stays behind."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession
from pyspark.sql.functions import lit

from core.models import CLUES, save_classifier, save_trainable
from lexplain.errors import CorpusError, LimitError, TableError
from lexplain.methods import find_method
from lexplain.pipeline import Run, open_run
from lexplain.plan import Sink
from lexplain.schema import TABLES
from lexplain.tables import Tables
from lexplain.upkeep import delete_run, drop_orphans, find_run, forget_documents
from spark.planted import RecordedProgress, load_plan, make_plan, plant, run_plan, stop_plan, write_json

pytestmark = pytest.mark.slow

N_DOCUMENTS = 60
FIGURES = [name for name, _, _ in TABLES["keywords"].columns if name != "keyword_key"]


def given_plan(folder: Path, **changes: Any) -> dict[str, Any]:
    """A plan of two models that need no training, over a corpus of its own."""
    if not (folder / "training.jsonl").exists():
        write_json(folder / "training.jsonl", plant(N_DOCUMENTS, seed=5))
    models = [str(folder / f"m{number}") for number in range(2)]
    for number, model in enumerate(models):
        if not Path(model).exists():
            save_classifier(Path(model), "bert", labels=list(CLUES), seed=number)
    made = make_plan(
        folder, name="given", training=None, models={"uris": models, "corpus": "unseen"},
        keywords={"min_df": 0, "evidence": "predicted", "probability": 0.0, "theta": 0.5},
        execution={"chunk_documents": 20}, mlflow={"enabled": False},
    )  # fmt: skip
    return made | changes


def read_keywords(run: Run) -> list[dict[str, Any]]:
    rows = run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}'").select(*FIGURES)
    return [row.asDict() for row in rows.orderBy("label", "word").collect()]


def rows_of(tables: Tables, table: str, where: str = "TRUE") -> list[Any]:
    return sorted(tables.read(table).where(where).collect(), key=str)


def test_incremental_sums_equal_full_ones_to_the_last_digit(spark: SparkSession, tmp_path: Path) -> None:
    documents = plant(N_DOCUMENTS, seed=5)
    write_json(tmp_path / "training.jsonl", documents[:35])
    plan = given_plan(tmp_path)
    run_plan(spark, plan)
    write_json(tmp_path / "training.jsonl", documents)
    grown = run_plan(spark, plan)
    assert grown.corpus.increments == 2
    kept = read_keywords(grown)
    assert kept
    sums = rows_of(grown.tables, "word_sums")
    for table in ("word_sums", "word_statistics", "keywords"):
        grown.tables.remove(table, where="TRUE")
    again = run_plan(spark, plan, stages=["aggregate"])
    assert rows_of(again.tables, "word_sums") == sums
    assert read_keywords(again) == kept


@pytest.fixture(scope="module")
def rejecting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose corpus holds two texts that need more memory than a small budget has."""
    folder = tmp_path_factory.mktemp("rejecting")
    documents = plant(N_DOCUMENTS, seed=5)
    write_json(folder / "training.jsonl", documents)
    return folder


def test_rejected_documents_are_explained_when_there_is_room(spark: SparkSession, rejecting: Path) -> None:
    """Rows are marked as rejected in the table itself: memory that runs out cannot be had to order."""
    whole = run_plan(spark, given_plan(rejecting, name="whole"))
    expected = read_keywords(whole)
    tables = whole.tables
    made = rows_of(tables, "explanations")
    doomed = sorted({row["doc_id"] for row in made})[:3]
    keep = [name for name, _, _ in TABLES["explanations"].columns[:7]]
    ids = ", ".join(f"'{one}'" for one in doomed)
    columns = [
        name if name in keep else f"'{value}' AS {name}" if value else f"CAST(NULL AS {kind}) AS `{name}`"
        for name, kind, _ in TABLES["explanations"].columns
        for value in [{"status": "rejected", "reason": "out_of_memory"}.get(name)]
    ]
    columns = ["0 AS label_rank" if column.endswith("AS `label_rank`") else column for column in columns]
    rejections = tables.read("explanations").where(f"doc_id IN ({ids}) AND label_rank = 0").selectExpr(*columns)
    tables.replace(rejections.localCheckpoint(), "explanations", where=f"doc_id IN ({ids})")
    for table in ("word_sums", "word_statistics", "keywords"):
        tables.remove(table, where="TRUE")
    poorer = run_plan(spark, given_plan(rejecting, name="whole"))
    assert poorer.record["documents_by_status"]["rejected"] == 2 * len(doomed)
    assert read_keywords(poorer) != expected
    plan = load_plan(given_plan(rejecting, name="whole", limits={"rejected_share": 0.01}))
    with pytest.raises(LimitError, match=r"rejected_share=0\.01 was passed"):
        run_plan(spark, given_plan(rejecting, name="whole", limits={"rejected_share": 0.01}))
    before = tables.versions()["explanations"]
    with open_run(spark, plan, find_method, RecordedProgress(), pinned=True) as run:
        run.retry_rejected()  # as the command does: the limit is passed only before
        run.attribute()
        run.aggregate()
        run.finish("finished")
    assert run.record["documents_by_status"]["rejected"] == 0
    # beside other texts in a batch a model's last bits are others
    for found, one in zip(read_keywords(run), expected, strict=True):
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    text = run.progress.text  # type: ignore[attr-defined]
    assert "6 rejected (model, document) pairs tried again, 0 are still rejected" in text
    chunks = {row["bucket"] for row in made if row["doc_id"] in doomed}
    assert tables.versions()["explanations"] == before + len(chunks)
    after = rows_of(tables, "explanations")
    untouched = [row for row in made if row["doc_id"] not in doomed]
    assert [row for row in after if row["doc_id"] not in doomed] == untouched
    scores = {(row["doc_id"], row["split"], row["label"]): row["target_score"] for row in made}
    assert {(row["doc_id"], row["split"], row["label"]): row["target_score"] for row in after} == pytest.approx(
        scores, abs=1e-5
    )


def test_a_retry_of_what_never_ran_is_refused(spark: SparkSession, rejecting: Path) -> None:
    plan = load_plan(given_plan(rejecting, name="stranger"))
    with (
        pytest.raises(TableError, match="name='stranger' with these keys is no run"),
        open_run(spark, plan, find_method, RecordedProgress(), pinned=True),
    ):
        pass


def test_a_forgotten_document_is_in_no_table_and_never_comes_back(spark: SparkSession, tmp_path: Path) -> None:
    documents = plant(N_DOCUMENTS, seed=9)
    rare = {f"unmistakable{letter}" for letter in "abcdefgh"}  # some of them speak for a label
    documents[7]["text"] = " ".join(sorted(rare))
    write_json(tmp_path / "training.jsonl", documents)
    plan = given_plan(tmp_path)
    first = run_plan(spark, plan)
    tables, loaded = first.tables, load_plan(plan)
    gone = documents[7]["doc_id"]
    words = {row["word"] for row in tables.read("word_sums").select("word").collect()}
    assert words & rare
    found = forget_documents(tables, loaded, [gone])
    assert (found.n_documents, found.n_explanations, found.runs) == (1, 2, ("given",))
    assert forget_documents(tables, loaded, [gone]).n_documents == 0  # a second time changes nothing
    assert not rows_of(tables, "runs_current")
    again = run_plan(spark, plan)
    assert "0 made now" in again.progress.text  # type: ignore[attr-defined]
    (forgotten,) = tables.read("forgotten").collect()
    # This plan trains nothing; one that does counts copies of the text as seen.
    assert forgotten["text_digest"] == hashlib.sha256(documents[7]["text"].encode()).hexdigest()
    for table in TABLES:
        text = " ".join(map(str, tables.read(table).collect()))
        assert gone not in text, table
        logs = "".join(path.read_text() for path in (tmp_path / "tables" / table / "_delta_log").glob("*.json"))
        assert f"'{gone}'" not in logs, table  # no condition names it
        assert "unmistakable" not in text, table
    assert sum(again.record["documents_by_status"].values()) == 2 * (N_DOCUMENTS - 1)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    write_json(fresh / "training.jsonl", [one for one in documents if one["doc_id"] != gone])
    for number in range(2):
        (fresh / f"m{number}").symlink_to(tmp_path / f"m{number}")
    without = run_plan(spark, given_plan(fresh))
    assert [row["word"] for row in read_keywords(again) if row["kept"]] == [
        row["word"] for row in read_keywords(without) if row["kept"]
    ]
    # the source still has it, and grows
    write_json(tmp_path / "training.jsonl", [*documents, *plant(5, seed=11)])
    grown = run_plan(spark, plan)
    assert grown.corpus.increments == 2
    assert sum(grown.record["documents_by_status"].values()) == 2 * (N_DOCUMENTS - 1 + 5)
    assert not tables.read("staged").where(f"doc_id = '{gone}'").count()


def test_all_documents_of_an_increment_can_be_forgotten(spark: SparkSession, tmp_path: Path) -> None:
    documents, folder = plant(22, seed=13), tmp_path / "corpus"
    folder.mkdir()
    write_json(folder / "a.jsonl", documents[:20])
    plan = given_plan(tmp_path)
    plan["corpus"] |= {"path": str(folder), "format": "json"}
    run_plan(spark, plan)
    write_json(folder / "b.jsonl", documents[20:])
    grown = run_plan(spark, plan)
    forget_documents(grown.tables, load_plan(plan), [one["doc_id"] for one in documents[20:]])
    # Gone from the source, too, which is as it was; then it grows.
    (folder / "b.jsonl").unlink()
    less = run_plan(spark, plan)
    assert (less.corpus.increments, sum(less.record["documents_by_status"].values())) == (2, 2 * 20)
    commits = less.tables.versions()["chunks"]
    assert run_plan(spark, plan).tables.versions()["chunks"] == commits
    write_json(folder / "c.jsonl", plant(3, seed=15))
    last = run_plan(spark, plan)
    assert last.corpus.increments == 3
    assert sum(last.record["documents_by_status"].values()) == 2 * 23


def test_a_run_does_not_go_on_from_half_a_forget(spark: SparkSession, tmp_path: Path) -> None:
    plan = given_plan(tmp_path)
    gone = plant(N_DOCUMENTS, seed=5)[3]["doc_id"]
    run = stop_plan(spark, plan, Run.attribute)
    with pytest.raises(KilledError):
        forget_documents(KilledTables(run.tables, 1), load_plan(plan), [gone])
    with pytest.raises(CorpusError, match=f"as '{gone}': `lexplain forget` did not end"):
        run_plan(spark, plan)
    forget_documents(run.tables, load_plan(plan), [gone])
    assert sum(run_plan(spark, plan).record["documents_by_status"].values()) == 2 * (N_DOCUMENTS - 1)


def test_what_an_evaluation_names_is_forgotten_with_its_source(spark: SparkSession, tmp_path: Path) -> None:
    """An evaluated plan need not be a run: the runs of its methods tell which source its keyword tables rest on."""
    plan = given_plan(tmp_path)
    tables = run_plan(spark, plan).tables
    run, keyword = tables.read("runs").collect()[0], tables.read("keywords").limit(1)
    for name, source in {"ours": run["corpus_key"], "other": "another source"}.items():
        made = {"run_id": name, "name": f"{name}-evaluation-random", "corpus_key": source, "corpus_snapshot": f"{source}/1",
                "keyword_key": None}  # fmt: skip
        tables.replace(
            spark.createDataFrame([run.asDict() | made], TABLES["runs"].schema), "runs", where=f"run_id = '{name}'"
        )
        tables.replace(keyword.withColumn("keyword_key", lit(name)), "keywords", where=f"keyword_key = '{name}'")
        quality = dict.fromkeys(column for column, _, _ in TABLES["keyword_quality"].columns) | {
            "name": name, "keyword_key": name, "evaluation_key": name,
        }  # fmt: skip
        tables.replace(
            spark.createDataFrame([quality], TABLES["keyword_quality"].schema),
            "keyword_quality",
            where=f"name = '{name}'",
        )
    forget_documents(tables, load_plan(plan), [plant(N_DOCUMENTS, seed=5)[3]["doc_id"]])
    assert {row["keyword_key"] for row in tables.read("keywords").collect()} == {"other"}


def test_new_models_leave_the_keywords_that_there_are_their_evidence(spark: SparkSession, tmp_path: Path) -> None:
    save_trainable(tmp_path / "base")
    documents = plant(N_DOCUMENTS, seed=5)
    write_json(tmp_path / "training.jsonl", documents[:40])
    plan = make_plan(tmp_path, mlflow={"enabled": False})
    first = run_plan(spark, plan)
    evidence = "SELECT * FROM keyword_evidence ORDER BY ALL"
    before = spark.sql(evidence).collect()
    assert before
    write_json(tmp_path / "training.jsonl", documents)

    def explain(run: Run) -> None:
        run.fine_tune()
        run.attribute()

    run = stop_plan(spark, plan, explain)
    assert spark.sql(evidence).collect() == before
    assert run.record["explain_keys"] == first.record["explain_keys"]
    last = run_plan(spark, plan)
    assert not set(last.record["explain_keys"]) & set(first.record["explain_keys"])
    assert spark.sql(evidence).collect() != before
    # Another run over the same corpus: only explanations that it does not use are deleted, those of the first models, too.
    run_plan(spark, given_plan(tmp_path))
    delete_run(last.tables, find_run(last.tables, last.run_id))
    left = {row["explain_key"] for row in last.tables.read("explanations").select("explain_key").distinct().collect()}
    assert not left & set(last.record["explain_keys_ever"])
    assert len(left) == 2


def test_a_run_is_deleted_with_what_it_alone_has_made(spark: SparkSession, tmp_path: Path) -> None:
    plan = given_plan(tmp_path)
    run = run_plan(spark, plan)
    tables = run.tables
    alone = {table: rows_of(tables, table) for table in TABLES}
    # the same explanations, other thresholds; and another method over the same corpus
    sharing = run_plan(spark, plan | {"name": "sharing", "keywords": plan["keywords"] | {"min_df": 3}})
    other = run_plan(spark, plan | {"name": "other", "method": {"id": "gradient_x_input"}})
    with pytest.raises(TableError, match="run='nobody' is no run"):
        find_run(tables, "nobody")
    removed = delete_run(tables, find_run(tables, "other"))
    assert removed["explanations"] == 2 * N_DOCUMENTS
    assert "staged" not in removed
    removed = delete_run(tables, find_run(tables, sharing.run_id))
    assert removed.keys() == {"keywords", "word_statistics", "runs"}
    kept = ("explanations", "chunks", "staged", "word_sums", "word_statistics", "keywords", "increments")
    assert {table: rows_of(tables, table) for table in kept} == {table: alone[table] for table in kept}
    assert other.run_id not in {row["run_id"] for row in rows_of(tables, "runs")}
    assert "0 made now" in run_plan(spark, plan).progress.text  # type: ignore[attr-defined]
    delete_run(tables, find_run(tables, "given"))
    left = {table for table in TABLES if rows_of(tables, table)}
    assert left <= {"models"}  # rows that name models the user brought


def test_the_models_of_a_deleted_run_go_unless_another_run_reads_them(spark: SparkSession, tmp_path: Path) -> None:
    from core.models import save_trainable

    write_json(tmp_path / "training.jsonl", plant(60, seed=3))
    save_trainable(tmp_path / "base")
    plan = make_plan(tmp_path, mlflow={"enabled": False})
    plan["models"] |= {"splits": 1, "epochs": 1}
    first = run_plan(spark, plan)
    second = run_plan(spark, plan | {"name": "second"})
    (folder,) = {Path(row["folder"]) for row in rows_of(first.tables, "models")}
    delete_run(first.tables, find_run(first.tables, first.run_id))
    assert folder.is_dir()
    assert "1 models, 0 trained now" in run_plan(spark, plan | {"name": "second"}).progress.text  # type: ignore[attr-defined]
    brought = make_plan(
        tmp_path,
        name="brought",
        training=None,
        models={"uris": [str(folder)], "corpus": "unseen"},
        mlflow={"enabled": False},
    )
    third = run_plan(spark, brought, stages=["attribute"])
    delete_run(first.tables, find_run(first.tables, second.run_id))
    assert folder.is_dir()  # another run has it under its own name
    delete_run(first.tables, find_run(first.tables, third.run_id))
    first.tables.remove("models", where="TRUE")
    run_plan(spark, plan)
    delete_run(first.tables, find_run(first.tables, first.run_id))
    assert not folder.exists()
    assert not rows_of(first.tables, "models")


def test_maintenance_changes_no_row_and_lets_an_unfinished_run_go_on(spark: SparkSession, tmp_path: Path) -> None:
    plan = given_plan(tmp_path)
    done = run_plan(spark, plan)
    keywords, tables = read_keywords(done), done.tables
    chunks = rows_of(tables, "chunks")
    bucket = chunks[0]["bucket"]
    tables.remove("explanations", where=f"bucket = {bucket}")  # as a killed run leaves it
    tables.remove("runs", where="TRUE")
    before = {table: rows_of(tables, table) for table in TABLES}
    spark.conf.set("spark.databricks.delta.retentionDurationCheck.enabled", "false")
    try:
        sizes = {table: tables.compact(table, retain_hours=0) for table in TABLES}  # as if all of it were old
    finally:
        spark.conf.unset("spark.databricks.delta.retentionDurationCheck.enabled")
    assert {table: rows_of(tables, table) for table in TABLES} == before
    assert sizes["explanations"][1] < sizes["explanations"][0]
    again = run_plan(spark, plan)
    owed = sum(row["n_documents"] for row in chunks if row["bucket"] == bucket)
    assert f"{2 * N_DOCUMENTS} (model, document) pairs, {owed} made now" in again.progress.text  # type: ignore[attr-defined]
    assert [row["word"] for row in read_keywords(again)] == [row["word"] for row in keywords]


def test_chunks_of_an_increment_take_the_time_that_the_plan_says(spark: SparkSession, tmp_path: Path) -> None:
    write_json(tmp_path / "training.jsonl", plant(20, seed=1))
    plan = given_plan(tmp_path)
    plan["execution"] = {"device": "cpu", "chunk_minutes": 0.5}
    run = run_plan(spark, plan)
    assert [row["n_buckets"] for row in rows_of(run.tables, "increments")] == [1]  # nothing is known of the rate
    row = (
        run.tables.read("runs")
        .drop("documents_per_second")
        .selectExpr("*", "20D AS documents_per_second")
        .localCheckpoint()
    )
    run.tables.replace(row, "runs", where="TRUE")
    write_json(tmp_path / "training.jsonl", [*plant(20, seed=1), *plant(640, seed=2)])
    progress = RecordedProgress()
    with open_run(spark, load_plan(plan), find_method, progress) as grown:
        grown.read_sources()
        grown.finish("stopped")
    # two models: 10 documents a second, 300 in half a minute
    buckets = {row["increment"]: row["n_buckets"] for row in rows_of(run.tables, "increments")}
    assert buckets == {0: 1, 1: 3}


def test_keyword_tables_that_nothing_names_are_dropped(spark: SparkSession, tmp_path: Path) -> None:
    plan = given_plan(tmp_path)
    run = run_plan(spark, plan)
    for table in ("word_statistics", "keywords"):
        rows = run.tables.read(table).drop("keyword_key").selectExpr("'an earlier one' AS keyword_key", "*")
        run.tables.replace(rows.localCheckpoint(), table, where="keyword_key = 'an earlier one'")
    keywords = read_keywords(run)
    assert drop_orphans(run.tables) == 1
    assert drop_orphans(run.tables) == 0
    assert read_keywords(run) == keywords
    assert {row["keyword_key"] for row in rows_of(run.tables, "keywords")} == {run.record["keyword_key"]}


class KilledError(RuntimeError):
    """What the tests kill a job with."""


class KilledTables(Tables):
    """Tables of a job that is killed right after so many commits."""

    def __init__(self, tables: Tables, left: int) -> None:
        super().__init__(tables.spark, tables.sink)
        self.left = left

    def _commit(self, write: Callable[[], object], table: str) -> None:
        super()._commit(write, table)
        self.left -= 1
        if not self.left:
            raise KilledError


def read_all(tables: Tables) -> dict[str, list[Any]]:
    """Every row of every table, without what tells when it was written."""
    clocks = {"forgotten": ["forgotten_at"], "runs": ["started_at", "finished_at"]}
    return {
        table: sorted(tables.read(table).drop(*clocks.get(table, [])).collect(), key=str) for table in TABLES
    }  # fmt: skip


@pytest.mark.parametrize("what", ["forget", "delete"])
def test_killed_after_any_commit_the_same_command_ends_as_if_it_had_not_been(
    spark: SparkSession, tmp_path: Path, what: str
) -> None:
    plan = given_plan(tmp_path)
    run_plan(spark, plan)
    loaded, gone = load_plan(plan), plant(N_DOCUMENTS, seed=5)[3]["doc_id"]

    def do(tables: Tables) -> None:
        if what == "forget":
            forget_documents(tables, loaded, [gone])
        else:
            delete_run(tables, find_run(tables, "given"))

    def copy(name: str) -> Tables:
        shutil.copytree(tmp_path / "tables", tmp_path / name)
        return Tables(spark, Sink(path=str(tmp_path / name)))

    undisturbed = copy("undisturbed")
    do(undisturbed)
    expected = read_all(undisturbed)
    killed = 0
    while True:
        tables = copy(f"killed-{killed}")
        try:
            do(KilledTables(tables, killed + 1))
        except KilledError:
            killed += 1
        else:
            break
        if what == "delete" and tables.read("runs").isEmpty():  # its row goes last: nothing is left to delete
            with pytest.raises(TableError, match="is no run of these tables"):
                do(tables)
        else:
            do(tables)
        assert read_all(tables) == expected, f"killed after commit {killed}"
    assert killed >= 5


def write_plan(path: Path, plan: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(plan)), encoding="utf-8")
    return path


def test_the_commands_of_the_page_on_operations(tmp_path: Path, spark: SparkSession) -> None:
    """Each command line of docs/operations.md, in its order, with names of this sink for those that it has."""
    plan = given_plan(tmp_path)
    run = run_plan(spark, plan)
    write_plan(tmp_path / "plan.yaml", plan)
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) for line in block.splitlines()
    ]
    names = {
        "DOC_ID": plant(N_DOCUMENTS, seed=5)[3]["doc_id"],
        "my-classes": "given",
        "lexplain-tables": plan["sink"]["path"],
    }
    said = {}
    for line in lines:
        words = [names.get(word, word) for word in line.split()]
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False, input="y\n"
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        said[" ".join(line.split()[1:3])] = done.stdout
    assert "1 documents and 2 rows of explanations removed" in said["forget plan.yaml"]
    assert "Without a keyword table until `lexplain run` makes it again: given" in said["forget plan.yaml"]
    assert "0 rejected (model, document) pairs tried again" in said["retry plan.yaml"]
    assert "keyword table ready" in said["retry plan.yaml"]
    assert "explanations\t" in said["maintain --tables"]
    assert run.run_id in said["runs list"]
    assert "name: given" in said["runs show"]
    assert f"explanations\t{2 * (N_DOCUMENTS - 1)}" in said["runs delete"]


def test_what_the_commands_refuse(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.yaml", given_plan(tmp_path))
    for words, (code, said) in {
        ("retry", "plan.yaml"): (2, "say what to try again: lexplain retry PLAN.yaml --rejected"),
        ("runs", "list", "--tables", "no/tables"): (1, "no/tables"),
        ("maintain", "--retain-hours", "1"): (2, "retain-hours"),
    }.items():  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "lexplain", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, words
        printed = " ".join((done.stdout + done.stderr).replace("│", "").split())
        assert said in printed, words
        assert "Traceback" not in printed, words
