"""Hostile documents through the whole pipeline: each ends as one row a model with a reason, and none leaves its box."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyspark.sql import SparkSession

from core.models import save_classifier
from core.test_executor import plant_nan
from core.test_report import Parsed, read_data
from lexplain.cli import main
from lexplain.errors import CorpusError, ModelError
from lexplain.pipeline import Run
from lexplain.tables import quote_list
from lexplain.words import word_key
from spark.hostile import CANARY, INJECTIONS, KINDS, LABELS, NAN_WORD, Document, make_corpus, make_lines
from spark.planted import make_plan, run_plan

pytestmark = pytest.mark.slow

N_MODELS = 2
SINK = "it's; `one` -- {x} %41 é"
"""A folder that SQL, SQLite and URIs must all take as it is."""


class Made(NamedTuple):
    folder: Path
    documents: list[Document]
    lines: list[tuple[Document, bytes]]
    plans: dict[str, dict[str, Any]]
    runs: dict[str, Run]


def write_parquet(path: Path, documents: list[Document]) -> Path:
    columns = {
        "doc_id": pa.array([one.doc_id for one in documents], pa.string()),
        "text": pa.array([one.text for one in documents], pa.binary()),
        "labels": pa.array([one.labels for one in documents], pa.list_(pa.string())),
    }
    pq.write_table(pa.table(columns), path)
    return path


def hostile_plan(folder: Path, name: str, corpus: dict[str, Any]) -> dict[str, Any]:
    return make_plan(
        folder, name=name, corpus=None, training=None, models={"uris": [str(folder / f"model {n}") for n in range(N_MODELS)], "corpus": "unseen"},
        method={"id": "gradient_x_input", "options": {}}, text={"max_tokens": 48, "overlap": 4, "max_windows": 2},
        keywords={"min_df": 0, "theta": 0.5, "probability": 0.1, "max_classes": None, "top": 30}, limits={"rejected_share": None},
        execution={"chunk_documents": 700, "device": "cpu"}, sink={"path": str(folder / SINK)},
    ) | {"corpus": corpus}  # fmt: skip


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("hostile")
    for number in range(N_MODELS):
        sound = save_classifier(folder / f"sound {number}", "bert", labels=LABELS, seed=number)
        plant_nan(sound, NAN_WORD, folder / f"model {number}")
    documents, lines = make_corpus(), make_lines()
    write_parquet(folder / "documents.parquet", documents)
    (folder / "lines.jsonl").write_bytes(b"".join(line + b"\n" for _, line in lines))
    columns = {"doc_id": "doc_id", "labels": "labels"}
    plans = {
        "documents": hostile_plan(folder, "documents", {"path": str(folder / "documents.parquet"), "columns": columns}),
        "lines": hostile_plan(folder, "lines", {"path": str(folder / "lines.jsonl"), "columns": {"doc_id": "doc_id"}}),
    }
    return Made(folder, documents, lines, plans, {name: run_plan(spark, plan) for name, plan in plans.items()})


def read_rows(run: Run) -> list[dict[str, Any]]:
    rows = run.tables.read("explanations").where(run.corpus.where)
    staged = run.tables.read("staged").where(run.corpus.where).select("doc_id", "text", "labels")
    return [row.asDict(recursive=True) for row in rows.join(staged, "doc_id").collect()]


def count_planned(run: Run) -> int:
    """Return what the ledger says that the run's models owe."""
    keys = quote_list(run.record["explain_keys"])
    ledger = run.tables.read("chunks").where(f"{run.corpus.where} AND explain_key IN ({keys})")
    return int(ledger.selectExpr("sum(n_documents)").collect()[0][0])


# --- every one accounted for ------------------------------------------------------------------------------------


def test_there_are_enough_of_them(made: Made) -> None:
    kinds = {one.kind for one in made.documents} | {one.kind for one, _ in made.lines}
    assert len(made.documents) + len(made.lines) >= 2000
    assert len(kinds) >= 30


def test_every_document_is_one_row_a_model_with_its_reason(made: Made) -> None:
    rows = read_rows(made.runs["documents"])
    first = [row for row in rows if row["label_rank"] == 0]
    assert Counter((row["doc_id"], row["split"]) for row in first) == Counter(
        (one.doc_id, split) for one in made.documents for split in range(N_MODELS)
    )
    known = {one.doc_id: one for one in made.documents}
    assert len(known) == len(made.documents)
    wrong = [
        (known[row["doc_id"]].kind, row["status"], row["reason"])
        for row in first
        if row["reason"] not in known[row["doc_id"]].reasons
        or (row["status"] == "rejected") != (row["reason"] is not None)
    ]
    assert Counter(wrong) == Counter()
    assert all(bytes(row["text"]) == known[row["doc_id"]].text for row in first if row["text"] is not None)


def test_every_line_is_one_row_a_model_with_its_reason(made: Made) -> None:
    """Broken lines have no id of their own: they are known by the line, which is kept."""
    first = [row for row in read_rows(made.runs["lines"]) if row["label_rank"] == 0]
    found = Counter((None if row["text"] is None else bytes(row["text"]), row["reason"], row["split"]) for row in first)
    expected = Counter((one.text, *one.reasons, split) for one, _ in made.lines for split in range(N_MODELS))
    assert found == expected


@pytest.mark.parametrize("name", ["documents", "lines"])
def test_the_statuses_add_up(made: Made, name: str) -> None:
    run = made.runs[name]
    planned = N_MODELS * len(made.documents if name == "documents" else made.lines)
    counts = run.record["documents_by_status"]
    assert set(counts) == {"explained", "no_label", "settled", "rejected"}
    assert sum(counts.values()) == planned
    assert run.record["status"] == "finished"
    assert count_planned(run) == planned


def test_a_second_run_makes_nothing(spark: SparkSession, made: Made) -> None:
    again = run_plan(spark, made.plans["documents"])
    assert again.record["keyword_key"] == made.runs["documents"].record["keyword_key"]
    assert ", 0 made now" in again.progress.text  # type: ignore[attr-defined]


# --- nothing leaves its box -------------------------------------------------------------------------------------


def test_texts_ids_and_labels_are_what_they_were(made: Made) -> None:
    """No variable was put in, nothing ran, and words are those of the texts."""
    run = made.runs["documents"]
    rows = read_rows(run)
    assert {row["label"] for row in rows if row["status"] == "explained"} <= set(LABELS)
    assert len({row["label"] for row in rows if row["status"] == "explained"}) > 1
    known = {one.doc_id: one for one in made.documents}
    for row in rows:
        labels = {label.strip(" ") for label in known[row["doc_id"]].labels} - {""}
        assert set(row["labels"]) == labels
        if row["status"] == "explained":
            text = row["text"].decode()
            assert row["words"]
            assert all(word_key(text[word["start"] : word["end"]]) == word["word"] for word in row["words"])
            assert row["is_gold"] == (row["label"] in labels)
    assert not Path(CANARY).exists()


def test_keywords_lead_to_their_places(made: Made) -> None:
    run = made.runs["documents"]
    texts = {one.doc_id: one.text for one in made.documents}
    evidence = run.tables.spark.sql("SELECT * FROM keyword_evidence WHERE name = 'documents'").collect()
    assert len(evidence) > 100
    for row in evidence:
        text = texts[row["doc_id"]]
        assert text is not None
        assert word_key(text.decode()[row["start"] : row["end"]]) == row["word"]
    kept = run.tables.spark.sql("SELECT DISTINCT label FROM keywords_current WHERE name = 'documents'").collect()
    assert {row["label"] for row in kept} == {row["label"] for row in evidence} <= set(LABELS)


def test_the_catalogue_is_sql_in_any_session(spark: SparkSession, made: Made) -> None:
    catalog = (made.folder / SINK / "catalog.sql").read_text(encoding="utf-8")
    session = spark.newSession()
    for statement in catalog.split(";\n"):
        if statement.strip():
            session.sql(statement)
    counts = session.sql("SELECT name, count(*) AS n FROM keywords_current GROUP BY name ORDER BY name").collect()
    assert {"documents", "lines"} <= {row["name"] for row in counts}
    keys = quote_list([key for run in made.runs.values() for key in run.record["explain_keys"]])
    found = session.sql(f"SELECT count(*) AS n FROM explanations WHERE label_rank = 0 AND explain_key IN ({keys})")
    assert found.collect()[0]["n"] >= N_MODELS * (len(made.documents) + len(made.lines))


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command; returns its exit code, and what a pipe gets of it."""

    def run(*words: str) -> tuple[int, str]:
        capfd.readouterr()
        code = 0
        try:
            main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, "".join(capfd.readouterr())

    return run


def test_the_sql_command_prints_a_line_a_row(made: Made, shown: Callable[..., tuple[int, str]]) -> None:
    query = "SELECT doc_id, labels, status, reason, slice(explanations.words, 1, 3) FROM explanations JOIN staged USING (corpus_key, doc_id) WHERE label_rank = 0"
    code, out = shown("sql", query, "--tables", str(made.folder / SINK))
    assert code == 0, out
    lines = out.removesuffix("\n").split("\n")
    assert len(lines) == 1 + N_MODELS * (len(made.documents) + len(made.lines))
    assert {line.count("\t") for line in lines} == {4}
    assert not {
        character for line in lines for character in line if ord(character) < 32 or character in "\x7f\x9b\u202e\u2028"
    } - {"\t"}


HARD = [
    next(one.text for one in make_corpus() if one.kind == kind)
    for kind in KINDS
    if kind not in ("null", "ten megabytes in one line")
]


def test_the_explain_command_takes_or_refuses_each(made: Made, shown: Callable[..., tuple[int, str]]) -> None:
    model = str(made.folder / "model 0")
    for text in HARD:
        assert text is not None
        code, out = shown(
            "explain", "--model", model, "--methods", "gradient_x_input", "--", text.decode("utf-8", "surrogateescape")
        )
        assert code in (0, 2), (text[:80], out[-500:])
        assert "Traceback" not in out
        assert not set(out) & set("\x00\x07\x1b\x7f\x9b\u202e\u2028"), text[:80]
    assert not Path(CANARY).exists()


@pytest.mark.parametrize("name", ["documents", "lines"])
def test_the_report_holds_them_as_text(
    made: Made, shown: Callable[..., tuple[int, str]], name: str, tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "report.html"
    plan.write_text(yaml.safe_dump(made.plans[name]))
    code, said = shown("report", str(plan), "--out", str(out))
    assert code == 0, said
    html = out.read_text(encoding="utf-8")
    assert len(html) < 12_000_000
    data, page = read_data(html), Parsed(html)
    assert len(data["documents"]) > 50
    texts = {one.doc_id: one.text for one in made.documents} | {one.doc_id: one.text for one, _ in made.lines}
    for document in data["documents"]:
        whole = texts[document["id"]]
        assert whole is not None
        assert whole.decode().startswith(document["text"])
    for payload in INJECTIONS["HTML"]:
        assert "<" not in payload or payload not in html
    assert {attributes.get("type") for attributes in page.named("script")} <= {None, "application/json"}
    assert [
        attributes for name in ("img", "svg", "base", "iframe", "object", "link") for attributes in page.named(name)
    ] == []
    assert not [attributes for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert os.environ["PATH"] not in html


# --- refused as a whole -----------------------------------------------------------------------------------------


def test_ids_that_occur_twice_stop_the_job_before_a_model_is_loaded(
    spark: SparkSession, made: Made, tmp_path: Path
) -> None:
    """The models could not be loaded, which nobody has noticed by then."""
    twice = [one._replace(doc_id=f"{'<b>' * 40}{number // 2}") for number, one in enumerate(made.documents[:400])]
    plan = made.plans["documents"] | {
        "name": "twice",
        "corpus": {"path": str(write_parquet(tmp_path / "twice.parquet", twice)), "columns": {"doc_id": "doc_id"}},
    }  # fmt: skip
    for number in range(N_MODELS):
        broken = tmp_path / f"model {number}"
        broken.mkdir()
        for file in (made.folder / f"model {number}").iterdir():
            (broken / file.name).write_bytes(
                file.read_bytes()[:-100] if file.suffix == ".safetensors" else file.read_bytes()
            )
    plan["models"] = plan["models"] | {"uris": [str(tmp_path / f"model {number}") for number in range(N_MODELS)]}
    with pytest.raises(CorpusError, match=r"is not unique: 200 ids occur more than once"):
        run_plan(spark, plan, stages=["attribute"])
    once = plan | {"corpus": made.plans["lines"]["corpus"], "name": "once"}
    with pytest.raises(ModelError, match="cannot be loaded"):
        run_plan(spark, once, stages=["attribute"])


# --- fine-tuning ------------------------------------------------------------------------------------------------


def test_models_are_fine_tuned_on_what_can_be_read_of_them(spark: SparkSession, made: Made, tmp_path: Path) -> None:
    """Their labels go through MLflow, whose names hold 250 characters and few signs."""
    save_classifier(tmp_path / "base", "bert", labels=("one", "two"))
    labels = ("l" * 300, "l" * 299 + "m", "it's\n`<b>`", "${env:PATH}")
    chosen = [
        one
        for one in made.documents
        if one.kind not in ("ten megabytes in one line", "a word of a megabyte", "marks on one letter")
    ]
    documents = [one._replace(labels=[labels[number % 4]]) for number, one in enumerate(chosen[::6])]
    source = {
        "path": str(write_parquet(tmp_path / "training.parquet", documents)),
        "columns": {"doc_id": "doc_id", "labels": "labels"},
    }
    plan = hostile_plan(made.folder, "tuned", source) | {
        "training": source, "models": {"base": str(tmp_path / "base"), "splits": 1, "epochs": 1}, "keywords": {"probability": 0.1, "min_df": 0},
    }  # fmt: skip
    run = run_plan(spark, plan)
    (row,) = run.tables.read("models").where("seed IS NOT NULL").collect()
    assert set(row["labels"]) == set(labels) == set(row["label_f1"])
    counts = run.record["documents_by_status"]
    assert sum(counts.values()) == count_planned(run)
    assert counts["explained"] > 50
    assert counts["rejected"] > 20
    assert json.loads((Path(row["folder"]) / "config.json").read_text())["id2label"] == {
        str(n): name for n, name in enumerate(sorted(labels))
    }
    assert re.fullmatch(r"models:/lexplain-tuned/1", row["mlflow_uri"])
