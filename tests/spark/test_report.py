"""A report read from real tables: a planted corpus, fine-tuned models, an evaluation, and the command that writes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import yaml
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from core.models import save_trainable
from lexplain.cli import app
from lexplain.errors import TableError
from lexplain.methods import find_method
from lexplain.plan import Sink
from lexplain.report.contents import Bounds, Report
from lexplain.report.reading import read_report
from lexplain.tables import Tables
from spark.planted import make_plan, plant, write_json

pytestmark = pytest.mark.slow


class Made(NamedTuple):
    plan: Path
    tables: Tables
    before: Report
    after: Report


def run(*words: str) -> None:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def made(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run, what a report says of it, an evaluation of it, and what a report says then."""
    folder = tmp_path_factory.mktemp("report")
    save_trainable(folder / "base")
    write_json(
        folder / "training.jsonl",
        [*plant(120, seed=8), {"doc_id": "tag", "text": "<b>bank</b> & bank 🎉 bank", "labels": ["NA"]}],
    )
    plan = folder / "plan.yaml"
    models = make_plan(folder)["models"] | {"splits": 2}
    plan.write_text(yaml.safe_dump(make_plan(folder, models=models)))
    run("run", str(plan))
    tables = Tables(spark, Sink(path=str(folder / "tables")))
    tables.open()
    before = read_report(tables, "planted", find_method)
    run("evaluate", str(plan), "--methods", "integrated_gradients,saliency", "--documents", "20")
    return Made(plan, tables, before, read_report(tables, "planted", find_method))


def read(tables: Tables, query: str) -> pd.DataFrame:
    return tables.spark.sql(query).toArrow().to_pandas()


def test_keywords_are_those_of_the_view(made: Made) -> None:
    rows = read(made.tables, "SELECT * FROM keywords_current ORDER BY label, rank")
    found = [(one.label, one.word, one.rank, one.score, one.n_evidence, one.frequency) for one in made.before.keywords]
    assert found == list(
        zip(
            rows.label,
            rows.word,
            rows["rank"],
            rows.score_mean,
            rows.n_documents,
            rows.selection_frequency,
            strict=True,
        )
    )
    assert {one.word for one in made.before.keywords if one.rank == 1} == {"election", "striker", "bank"}
    assert made.before.signed is True
    assert made.before.n_splits == len(made.before.models) == 2
    counts = {one.label: one.n_keywords for one in made.before.classes}
    assert counts == rows.groupby("label").size().to_dict()
    assert made.before.cuts == []
    dropped = read(made.tables, "SELECT label, drop_reason, count(*) AS n FROM keywords_dropped GROUP BY ALL")
    assert {(one.label, reason, n) for one in made.before.classes for reason, n in one.dropped.items()} == set(
        dropped.itertuples(index=False, name=None)
    )


def test_every_explained_document_is_there_once(made: Made) -> None:
    """Few enough for the bounds, so that nothing is left out."""
    explained = read(made.tables, "SELECT DISTINCT doc_id FROM explanations WHERE status = 'explained'")
    ids = [one.doc_id for one in made.before.documents]
    assert len(ids) == len(set(ids))
    assert set(ids) == set(explained.doc_id)
    tagged = [one for one in made.before.documents if one.doc_id == "tag"]
    assert [(one.text, one.gold) for one in tagged] in ([], [("<b>bank</b> & bank 🎉 bank", ["NA"])])


def test_scores_are_those_of_the_explanations(made: Made) -> None:
    rows = read(made.tables, "SELECT doc_id, split, label, method, words FROM explanations WHERE status = 'explained'")
    rows["title"] = rows.method.str.rpartition(".v")[0]
    known = {
        (row.doc_id, row.split, row.label, row.title): {
            (word["start"], word["end"]): word["score"] for word in row.words
        }
        for row in rows.itertuples()
    }
    checked = set[str]()
    for one in made.after.documents:
        for each in one.explained:
            title = made.after.methods[each.method].title
            scores = known[one.doc_id, one.split, each.label, title]
            assert dict(zip(one.spans, each.scores, strict=True)) == pytest.approx(scores)
            checked.add(title)
    assert checked == {"integrated_gradients", "saliency", "random", "gradient_x_input"}


def test_the_switch_offers_what_an_evaluation_explained(made: Made) -> None:
    assert [(one.title, one.signed, one.own) for one in made.before.methods] == [("integrated_gradients", True, True)]
    assert made.after.methods[0] == made.before.methods[0]
    assert {one.title: one.signed for one in made.after.methods[1:]} == {
        "saliency": False, "random": False, "gradient_x_input": True
    }  # fmt: skip
    several = [one for one in made.after.documents if len({each.method for each in one.explained}) == 4]
    sampled = read(made.tables, "SELECT DISTINCT doc_id FROM explanations WHERE method = 'saliency.v1'")
    assert {one.doc_id for one in several} == set(sampled.doc_id)


def test_evidence_is_that_of_the_view(made: Made) -> None:
    rows = read(made.tables, "SELECT label, word, doc_id, split, start, score_normalised FROM keyword_evidence")
    known = {tuple(row[:5]): row[5] for row in rows.itertuples(index=False, name=None)}
    assert len(made.before.evidence) > 20
    for one in made.before.evidence:
        document = made.before.documents[one.document]
        assert document.text[one.start : one.start + len(one.word)].lower() == one.word
        assert known[one.label, one.word, document.doc_id, document.split, one.start] == pytest.approx(one.score)
    shown = {(one.label, one.word) for one in made.before.evidence}
    assert shown == {(one.label, one.word) for one in made.before.keywords}  # a greedy choice misses none here


def test_an_evaluation_is_told_as_it_was_written(made: Made) -> None:
    assert made.before.evaluation is None
    evaluation = made.after.evaluation
    assert evaluation is not None
    assert evaluation.own == "integrated_gradients"
    for view, figures, of in (
        ("faithfulness_current", evaluation.faithfulness, "protocol"), ("keyword_quality_current", evaluation.quality, "subset")
    ):  # fmt: skip
        rows = read(made.tables, f"SELECT * FROM {view}")
        rows = rows.astype(object).where(rows.notna(), None)
        assert sorted((one.method, *map(str, one.kind), str(one.label), one.value) for one in figures) == sorted(
            (row["method"], row["metric"], str(row[of]), str(row["label"]), row["value"]) for _, row in rows.iterrows()
        )
    best = [
        one
        for one in evaluation.faithfulness
        if one.method == "integrated_gradients" and one.kind == ("comprehensiveness", "marc-2023")
    ]
    assert best[0].beats_random
    assert all(one.beats_random is None for one in evaluation.faithfulness if one.method == "random")


def test_bounds_cut_and_say_so(made: Made) -> None:
    bounds = Bounds(classes=2, keywords=1, documents=4, evidence=1, characters=20)
    report = read_report(made.tables, "planted", find_method, bounds)
    assert len(report.classes) == 2
    assert [one.rank for one in report.keywords] == [1, 1]
    assert 2 <= len(report.documents) <= 4
    assert all(len(one.text) <= 20 < one.n_characters for one in report.documents)
    assert all(end <= 20 for one in report.documents for _, end in one.spans)
    cuts = {cut.what: cut for cut in report.cuts}
    assert (cuts["classes"].shown, cuts["classes"].there) == (2, 3)
    assert cuts["documents"].there == len(made.before.documents)
    label = report.classes[0].label
    assert cuts[f"keywords of {label}"].there == sum(one.label == label for one in made.before.keywords)
    few = read_report(made.tables, "planted", find_method, Bounds(scores=30))
    assert 0 < len(few.documents) < len(made.before.documents)


def test_a_name_without_a_run_is_refused(made: Made) -> None:
    with pytest.raises(TableError, match="name='nobody' has no finished run"):
        read_report(made.tables, "nobody", find_method)


def test_the_command_writes_one_file_and_logs_it(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    run("report", str(made.plan), "--out", str(out))
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', out.read_text(encoding="utf-8"))
    data: dict[str, Any] = json.loads(island)
    assert data["methods"][0]["title"] == "integrated_gradients"
    assert len(data["keywords"]) == len(made.after.keywords)
    assert data["planFile"] == str(made.plan)
    logged = list((made.plan.parent / "tables" / "mlflow-artifacts").rglob("report/report.html"))
    assert [path.read_bytes() for path in logged] == [out.read_bytes()]


def test_a_place_that_cannot_be_written_is_refused_before_spark(made: Made, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(made.plan), "--out", str(tmp_path)])
    assert done.exit_code == 1
