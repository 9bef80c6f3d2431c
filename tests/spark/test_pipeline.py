"""From a plan to keyword tables with a real Spark, Delta, MLflow and a small fine-tuned transformer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from pyspark.sql import SparkSession

from core.models import CLUES, save_trainable
from lexplain.attribution import ExplainedModel, as_tasks, make_task
from lexplain.drift import compare_lists
from lexplain.errors import AccountingError, CorpusError, LimitError, ModelError, TableError
from lexplain.executor import MODELS, ModelTask
from lexplain.keys import corpus_key
from lexplain.methods import find_method
from lexplain.pipeline import Run
from lexplain.schema import TABLES
from lexplain.sql_function import register_explain
from spark.planted import load_plan, make_plan, plant, run_plan, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", plant(240, seed=1))
    write_json(folder / "unseen.jsonl", [{"doc_id": d["doc_id"], "text": d["text"]} for d in plant(400, seed=2)])
    return folder


@pytest.fixture(scope="module")
def labelled(spark: SparkSession, folder: Path) -> Run:
    """A run over the training corpus's own held-out documents."""
    return run_plan(spark, make_plan(folder))


@pytest.fixture(scope="module")
def unlabelled(spark: SparkSession, folder: Path, labelled: Run) -> Run:
    """A run over a larger corpus without labels that no model has seen; the models are those of `labelled`."""
    corpus = {"path": str(folder / "unseen.jsonl"), "columns": {"doc_id": "doc_id"}}
    plan = make_plan(folder, name="unseen") | {"corpus": corpus}
    return run_plan(spark, plan)


def versions(run: Run) -> dict[str, int]:
    return {name: version for name, version in run.tables.versions().items() if name != "runs"}


def kept(run: Run) -> dict[str, list[str]]:
    rows = run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}' AND kept")
    words: dict[str, list[str]] = {}
    for row in rows.orderBy("label", "rank").collect():
        words.setdefault(row["label"], []).append(row["word"])
    return words


def test_the_planted_words_lead_their_classes(labelled: Run) -> None:
    words = kept(labelled)
    assert {label: words[label][0] for label in CLUES} == CLUES
    rows = labelled.tables.read("keywords").where("kept AND rank = 1").collect()
    assert {row["selection_frequency"] for row in rows} == {1.0}
    assert all(row["ci_low"] < row["score_mean"] < row["ci_high"] for row in rows)


def test_every_held_out_document_is_accounted_for_and_no_other(labelled: Run) -> None:
    models = {model.explain_key: model for model in labelled.models}
    rows = labelled.tables.read("explanations").where("label_rank = 0").select("explain_key", "text_digest").collect()
    assert not any(models[row["explain_key"]].drawn.trains_on(row["text_digest"]) for row in rows)  # type: ignore[union-attr]
    staged = {row["text_digest"] for row in labelled.tables.read("staged").select("text_digest").collect()}
    owed = sum(not model.drawn.trains_on(digest) for model in models.values() for digest in staged)  # type: ignore[union-attr]
    assert len({(row["explain_key"], row["text_digest"]) for row in rows}) == owed
    assert sum(labelled.record["documents_by_status"].values()) == len(rows)


def test_rows_carry_what_the_design_promises(labelled: Run) -> None:
    row = labelled.tables.read("explanations").where("status = 'explained'").orderBy("doc_id").first()
    assert row is not None
    scores = [word["score"] for word in row["words"]]
    assert scores == sorted(scores, reverse=True)
    explained = row["target_score"] - row["baseline_score"] - row["completeness_gap"]
    assert sum(scores) + row["other_score"] == pytest.approx(explained, abs=1e-4)
    assert row["method"] == "integrated_gradients.v1"
    text = bytes(labelled.tables.read("staged").where(f"doc_id = '{row['doc_id']}'").first()["text"]).decode()  # type: ignore[index]
    assert all(text[word["start"] : word["end"]].lower() == word["word"] for word in row["words"])


def test_a_second_run_has_nothing_to_do(spark: SparkSession, folder: Path, labelled: Run) -> None:
    before = versions(labelled)
    again = run_plan(spark, make_plan(folder))
    assert versions(again) == before
    assert again.run_id == labelled.run_id
    assert "0 trained now" in again.progress.text  # type: ignore[attr-defined]


def test_a_changed_threshold_reuses_every_explanation(spark: SparkSession, folder: Path, labelled: Run) -> None:
    before = versions(labelled)
    run = run_plan(spark, make_plan(folder, name="stricter", keywords={"theta": 1.0, "min_df": 2}))
    after = versions(run)
    assert run.record["keyword_key"] != labelled.record["keyword_key"]
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"keywords", "word_statistics"}


def test_unlabelled_corpus_gives_the_same_classes(unlabelled: Run, labelled: Run) -> None:
    words = kept(unlabelled)
    assert {label: words[label][0] for label in CLUES} == CLUES
    assert unlabelled.record["documents_by_status"]["explained"] == 3 * 400
    explained = unlabelled.tables.read("explanations").where(f"corpus_key = '{unlabelled.corpus.key}'")
    assert explained.where("is_gold IS NOT NULL").count() == 0
    rows = compare_lists(unlabelled.tables, labelled.record["keyword_key"], unlabelled.record["keyword_key"])
    overlap = {row.label: row.rank_biased_overlap for row in rows}
    assert set(overlap) == set(CLUES)
    assert all(value >= 0.1 for value in overlap.values())  # at least the first word is shared: 1 - p = .1


def test_the_sql_function_gives_the_rows_of_the_job(spark: SparkSession, labelled: Run) -> None:
    model: ExplainedModel = labelled.models[0]
    register_explain(spark, labelled.plan, find_method, ModelTask(0, None, model.folder, model.digest))
    documents = labelled.tables.read("staged").selectExpr("doc_id", "CAST(text AS STRING) AS text")
    path = labelled.tables.folder / "copy"  # type: ignore[operator]
    documents.repartition(5).write.format("delta").mode("overwrite").save(str(path))
    answers = spark.read.format("delta").load(str(path)).selectExpr("doc_id", "explain(text) AS answer").collect()
    answered = {row["doc_id"]: row["answer"] for row in answers}
    rows = labelled.tables.read("explanations").where(f"explain_key = '{model.explain_key}' AND status = 'explained'")
    compared = 0
    for row in rows.collect():
        one = answered[row["doc_id"]]["explanations"][row["label_rank"]]
        assert one["label"] == row["label"]
        assert one["probability"] == pytest.approx(row["probability"], abs=1e-5)
        assert next(word["word"] for word in one["words"]) == row["words"][0]["word"]
        expected = {word["start"]: word["score"] for word in row["words"]}
        assert {word["start"]: word["score"] for word in one["words"]} == pytest.approx(expected, abs=1e-4)
        compared += 1
    assert compared > 50
    empty = spark.sql("SELECT explain(text) AS answer FROM VALUES (CAST(NULL AS STRING)), ('  '), ('...') AS t(text)")
    assert [row["answer"]["reason"] for row in empty.collect()] == ["null_text", "empty_text", "no_words"]


def test_a_worker_loads_each_model_once(spark: SparkSession, labelled: Run) -> None:
    """Many tasks over few workers: loads per worker never exceed the number of models it has met (S5)."""
    task = make_task(spark, labelled.plan, find_method, as_tasks(labelled.models))
    models = task.models
    in_driver = MODELS.loads  # other tests explain in this process

    def count(batches: Any) -> Any:
        import pyarrow as pa

        from lexplain.executor import MODELS

        for _ in batches:
            before = MODELS.loads
            for model in models:
                MODELS.load(model, task, "cpu")
                MODELS.load(model, task, "cpu")
            yield pa.RecordBatch.from_pydict(
                {"pid": pa.array([os.getpid()], pa.int32()), "loaded": pa.array([MODELS.loads - before], pa.int32())}
            )

    rows = spark.range(16, numPartitions=16).mapInArrow(count, "pid INT, loaded INT").collect()
    loads: dict[int, int] = {}
    for row in rows:
        loads[row["pid"]] = loads.get(row["pid"], 0) + row["loaded"]
    assert len(rows) == 16
    assert all(number <= len(models) for number in loads.values())
    assert MODELS.loads == in_driver


def test_bad_documents_become_rows_with_reasons(
    spark: SparkSession, folder: Path, labelled: Run, tmp_path: Path
) -> None:
    texts: list[tuple[str, bytes | None]] = [
        ("null", None), ("empty", b""), ("white", b" \n\t "), ("control", b"\x00\x01\x02"), ("symbols", b"... !!! ---"),
        ("utf8", b"caf\xe9 \xff bank"), ("long", b"bank " * 300_000), ("emoji", "😀😀".encode()), ("good", b"the bank said"),
    ]  # fmt: skip
    source = tmp_path / "bad.parquet"
    spark.createDataFrame(texts, "doc_id STRING, text BINARY").write.parquet(str(source))
    corpus = {"path": str(source), "format": "parquet", "columns": {"doc_id": "doc_id"}}
    plan = make_plan(folder, name="bad", limits={"rejected_share": 1.0}) | {"corpus": corpus}
    run = run_plan(spark, plan)
    rows = run.tables.read("explanations").where(f"corpus_key = '{run.corpus.key}' AND split = 0").collect()
    reasons = {row["doc_id"]: row["reason"] for row in rows}
    assert reasons == {
        "null": "null_text", "empty": "empty_text", "white": "empty_text", "control": "no_words", "symbols": "no_words",
        "utf8": "invalid_utf8", "long": "too_long", "emoji": "no_words", "good": None,
    }  # fmt: skip
    assert run.record["documents_by_status"] == {"explained": 3, "no_label": 0, "settled": 0, "rejected": 24}


@pytest.mark.slow
def test_past_a_limit_the_run_stops_and_goes_on_later(
    spark: SparkSession, folder: Path, labelled: Run, tmp_path: Path
) -> None:
    path = write_json(tmp_path / "limited.jsonl", plant(160, seed=9))
    corpus = {"path": str(path), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    plan = make_plan(folder, name="limited") | {"corpus": corpus}
    with pytest.raises(LimitError, match="device_hours"):
        run_plan(spark, plan | {"limits": {"device_hours": 1e-9}})
    ours = f"corpus_key = '{corpus_key(load_plan(plan).corpus)}'"
    done = labelled.tables.read("explanations").where(f"{ours} AND label_rank = 0").count()
    (stopped,) = labelled.tables.read("runs").where("name = 'limited'").collect()
    assert stopped["status"] == "stopped"
    with pytest.raises(AccountingError, match="planned"):
        run_plan(spark, plan, stages=["aggregate"])
    run = run_plan(spark, plan)
    assert run.run_id == stopped["run_id"]
    assert 0 < done < sum(run.record["documents_by_status"].values()) == 3 * 160
    assert kept(run)["sport"][0] == "striker"
    assert run.record["status"] == "finished"


@pytest.mark.slow
def test_models_the_user_brought(spark: SparkSession, folder: Path, labelled: Run, tmp_path: Path) -> None:
    found = labelled.models
    uris = [model.folder for model in found[:2]] + [
        labelled.tables.read("models").where("split = 2").first()["mlflow_uri"]
    ]  # type: ignore[index]
    assert uris[2].startswith("models:/")
    staged = labelled.tables.read("staged").where(labelled.corpus.where).select("doc_id", "text_digest").collect()
    digests = {row["doc_id"]: row["text_digest"] for row in staged}
    documents = [
        document | {"seen": " ".join(str(m.split) for m in found if m.drawn.trains_on(digests[document["doc_id"]]))}  # type: ignore[union-attr]
        for document in plant(240, seed=1)[:60]
    ]
    documents[0]["labels"] = ["weather"]
    write_json(tmp_path / "seen.jsonl", documents)
    corpus = {
        "path": str(tmp_path / "seen.jsonl"),
        "columns": {"doc_id": "doc_id", "labels": "labels", "split": "seen"},
    }
    given = make_plan(folder, name="given", training=None, models={"uris": uris}) | {"corpus": corpus}
    run = run_plan(spark, given)
    rows = run.tables.read("explanations").where(f"corpus_key = '{run.corpus.key}'").select("doc_id", "split").collect()
    seen = {document["doc_id"]: {int(part) for part in document["seen"].split()} for document in documents}
    assert {(row["doc_id"], row["split"]) for row in rows} == {
        (doc_id, split) for doc_id, splits in seen.items() for split in range(3) if split not in splits
    }
    assert "no model has 1 of the corpus's 4 labels: weather;" in run.progress.text  # type: ignore[attr-defined]
    unseen = {"path": corpus["path"], "columns": {"doc_id": "doc_id", "labels": "labels"}}
    twice = given | {"name": "twice", "corpus": unseen, "models": {"uris": [uris[0], uris[0]], "corpus": "unseen"}}
    with pytest.raises(ModelError, match="different models"):
        run_plan(spark, twice)
    with pytest.raises(CorpusError, match="from 0 to 1"):
        run_plan(spark, given | {"name": "fewer", "models": {"uris": uris[:2]}})
    strangers = unseen | {"columns": {"doc_id": "doc_id", "labels": "doc_id"}}
    with pytest.raises(ModelError, match="have none in common"):
        run_plan(
            spark, given | {"name": "strangers", "corpus": strangers, "models": {"uris": uris, "corpus": "unseen"}}
        )


@pytest.mark.slow
def test_appended_documents_are_an_increment(spark: SparkSession, folder: Path, labelled: Run, tmp_path: Path) -> None:
    documents = plant(90, seed=7)
    path = write_json(tmp_path / "growing.jsonl", documents[:60])
    corpus = {"path": str(path), "columns": {"doc_id": "doc_id", "labels": "labels"}}
    plan = make_plan(folder, name="growing") | {"corpus": corpus}
    first = run_plan(spark, plan)
    write_json(path, documents)
    second = run_plan(spark, plan)
    assert second.run_id == first.run_id
    assert second.corpus.increments == 2
    rows = second.tables.read("explanations").where(f"corpus_key = '{second.corpus.key}'")
    assert rows.where("label_rank = 0").count() == 3 * 90
    full = write_json(tmp_path / "full.jsonl", documents)
    whole = run_plan(spark, plan | {"name": "whole", "corpus": corpus | {"path": str(full)}})
    columns = [name for name, _, _ in TABLES["keywords"].columns if name not in ("keyword_key", "score_mean", "score_deviation", "score_std", "score_error", "ci_low", "ci_high")]  # fmt: skip
    tables = [
        [row.asDict() for row in run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}' AND kept").select(columns).orderBy("label", "word").collect()]
        for run in (second, whole)
    ]  # fmt: skip
    assert [row["word"] for row in tables[0]] == [row["word"] for row in tables[1]]
    write_json(path, [documents[0] | {"text": "changed"}, *documents[1:]])
    for _ in range(2):  # a start that was refused is none to go on from
        with pytest.raises(CorpusError, match="1 changed and 0 deleted"):
            run_plan(spark, plan)
    (record,) = second.tables.read("runs").where(f"run_id = '{second.run_id}'").collect()
    assert (record["status"], record["keyword_key"]) == ("finished", second.record["keyword_key"])
    write_json(path, documents)
    assert "90 documents staged" in run_plan(spark, plan).progress.text  # type: ignore[attr-defined]


def test_mlflow_and_delta_point_at_each_other(labelled: Run, folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder}/tables/mlflow.db")
    parent = client.get_run(labelled.record["mlflow_run_id"])
    assert parent.data.tags["lexplain.run_id"] == labelled.run_id
    assert parent.data.metrics["documents/explained"] == labelled.record["documents_by_status"]["explained"]
    assert parent.data.metrics["share_converged"] == 1.0
    assert int(parent.data.tags["delta.keywords"]) >= 1
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], query)
    assert len(children) == 3
    assert all(child.data.metrics["macro_f1"] > 0.9 for child in children)
    artefact = mlflow.artifacts.download_artifacts(
        run_id=parent.info.run_id,
        artifact_path="tables/keywords.csv",
        tracking_uri=f"sqlite:///{folder}/tables/mlflow.db",
    )
    assert "striker" in Path(artefact).read_text(encoding="utf-8")
    history = labelled.tables.spark.sql(f"DESCRIBE HISTORY {labelled.tables.name('explanations')}").collect()
    signed = [json.loads(row["userMetadata"]) for row in history if row["userMetadata"]]
    assert {"run_id": labelled.run_id, "mlflow_run_id": parent.info.run_id} in signed


def test_a_second_writer_is_told_who_holds_the_folder(spark: SparkSession, folder: Path, labelled: Run) -> None:
    holder = (
        "import sys, time\nfrom lexplain.plan import Sink\nfrom lexplain.tables import Tables\n"
        f"with Tables(None, Sink(path={str(folder / 'tables')!r})).lock():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(TableError, match=f"process {process.pid}"):
            run_plan(spark, make_plan(folder))
    finally:
        process.communicate("")
    run_plan(spark, make_plan(folder), stages=[])


def test_the_readmes_spark_sql_reads_the_tables_beside_a_running_session(labelled: Run, folder: Path) -> None:
    """The README's own lines, in a shell, with this run's folder for the one they name."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```\n([^`]*?spark-sql --jars.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert ". .venv/bin/activate" in lines
    script = lines.replace(". .venv/bin/activate", f"export PATH={Path(sys.executable).parent}:$PATH")
    script = script.replace("lexplain-tables", str(folder / "tables"))
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"}
    environment.pop("SPARK_REMOTE", None)  # spark-sql is no client of Spark Connect
    done = subprocess.run(
        ["bash", "-ec", script], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    expected = labelled.tables.spark.sql(
        "SELECT label, word, rank FROM keywords_current ORDER BY label, rank"
    ).collect()
    assert [line.split("\t") for line in done.stdout.splitlines() if "\t" in line] == [
        [row["label"], row["word"], str(row["rank"])] for row in expected
    ], done.stderr[-3000:]
    assert {(row["label"], row["word"]) for row in expected} >= set(CLUES.items())
    assert not (folder / "metastore_db").exists()


def check_evidence(run: Run) -> int:
    """Check that each keyword's score is the mean over what the view shows of it; return the number of keywords."""
    name = run.plan.name
    shown = run.tables.spark.sql(
        "SELECT label, word, count(*) AS n_occurrences, avg(score_normalised) AS score_mean"
        f" FROM keyword_evidence WHERE name = '{name}' GROUP BY label, word"
    ).collect()
    kept = run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}' AND kept").collect()
    means = {(row["label"], row["word"]): row["score_mean"] for row in kept}
    counts = {(row["label"], row["word"]): row["n_occurrences"] for row in kept}
    assert {(row["label"], row["word"]): row["n_occurrences"] for row in shown} == counts
    assert {(row["label"], row["word"]): row["score_mean"] for row in shown} == pytest.approx(means, abs=1e-12)
    return len(kept)


def test_views_lead_from_keywords_to_documents(labelled: Run, unlabelled: Run) -> None:
    assert check_evidence(labelled) >= 3
    assert check_evidence(unlabelled) >= 3
    spark = labelled.tables.spark
    rows = spark.sql("SELECT * FROM keyword_evidence WHERE name = 'planted' AND word = 'striker' LIMIT 5").collect()
    assert len(rows) == 5
    where = f"corpus_key = '{labelled.corpus.key}'"
    staged = {
        row["doc_id"]: bytes(row["text"]).decode() for row in labelled.tables.read("staged").where(where).collect()
    }
    assert all(staged[row["doc_id"]][row["start"] : row["end"]] == "striker" for row in rows)
    dropped = spark.sql("SELECT DISTINCT drop_reason FROM keywords_dropped WHERE name = 'planted'").collect()
    assert dropped
    assert all(row["drop_reason"] for row in dropped)


@pytest.mark.slow
def test_the_sacx_preset_runs_from_the_same_models(spark: SparkSession, folder: Path, labelled: Run) -> None:
    plan = make_plan(folder, name="sacx", preset="sacx-2022", method={"options": {}}, keywords={"min_df": 2})
    plan["method"]["options"] = {"baseline": "the"}  # the tiny vocabulary has no "-"
    run = run_plan(spark, plan)
    assert load_plan(plan).text.merge == "absmax"
    rows = run.tables.read("explanations").where(
        f"explain_key IN ({', '.join(repr(m.explain_key) for m in run.models)})"
    )
    assert {
        row["evaluations"] for row in rows.where("status = 'explained'").select("evaluations").distinct().collect()
    } == {30}
    assert kept(run)["sport"][0] == "striker"
    assert check_evidence(run) >= 3


@pytest.mark.slow
def test_a_schema_of_the_catalog_as_sink(spark: SparkSession, folder: Path, tmp_path: Path) -> None:
    spark.sql(f"CREATE SCHEMA IF NOT EXISTS words LOCATION '{tmp_path}/words'")
    models = make_plan(folder)["models"] | {"folder": str(tmp_path / "models"), "splits": 2}
    plan = make_plan(folder, sink=None, models=models, mlflow={"enabled": False}) | {"sink": {"schema": "words"}}
    first = run_plan(spark, plan)
    again = run_plan(spark, plan)
    assert kept(first)["sport"][0] == "striker"
    assert versions(again) == versions(first)
    rows = spark.sql("SELECT label, word FROM words.keywords_current WHERE rank = 1").collect()
    assert {row["label"]: row["word"] for row in rows} == CLUES
    described = {row["col_name"]: row["comment"] for row in spark.sql("DESCRIBE TABLE words.keywords").collect()}
    assert described["rank"].startswith("1 is the strongest")
    with pytest.raises(Exception, match="frequency_share"):
        spark.sql(
            "INSERT INTO words.keywords (keyword_key, kept, drop_reason, selection_frequency) VALUES ('x', FALSE, 'y', 7)"
        )
