"""Methods compared on a planted corpus: from the command line to the tables, and a second time without work."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from pyspark.sql import SparkSession
from typer.testing import CliRunner

from core.models import CLUES, save_trainable
from lexplain.cli import app
from lexplain.methods import find_method
from lexplain.pipeline import open_tables
from lexplain.plan import Sink
from lexplain.schema import TABLES
from lexplain.tables import Tables
from lexplain.views import VIEWS
from spark.planted import make_plan, plant, write_json

pytestmark = pytest.mark.slow

METHODS = "integrated_gradients, lrp:attnlrp-2024"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", plant(150, seed=8))
    path = folder / "plan.yaml"
    models = make_plan(folder)["models"] | {"splits": 2}
    path.write_text(yaml.safe_dump(make_plan(folder, models=models, mlflow={"enabled": False})))
    return path


def evaluate(plan: Path, *words: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capfd.readouterr()
    done = CliRunner().invoke(app, ["evaluate", str(plan), *words])
    printed = capfd.readouterr()
    return done.exit_code, printed.out + printed.err + done.output


@pytest.fixture(scope="module")
def first(spark: SparkSession, plan: Path) -> Tables:
    done = CliRunner().invoke(app, ["evaluate", str(plan), "--methods", METHODS, "--documents", "40"])
    assert done.exit_code == 0
    return open_tables(spark, Sink(path=str(plan.parent / "tables")), find_method)


def numbers(printed: str, what: str) -> list[int]:
    return [int(number) for number in re.findall(rf"(\d+) {what}", printed)]


def read(tables: Tables, name: str) -> pd.DataFrame:
    return tables.read(name).toArrow().to_pandas()


def test_every_explanation_is_measured_by_every_protocol(first: Tables) -> None:
    explained = read(first, "explanations").query("status == 'explained'")
    deletions = read(first, "deletions")
    assert len(deletions) == 4 * len(explained) > 0
    assert not deletions.duplicated(["explain_key", "doc_id", "label", "protocol"]).any()
    assert explained.method.nunique() == 4
    assert deletions.reason.isna().all()
    # all methods have the same documents
    assert len({frozenset(group.doc_id) for _, group in explained.groupby("method")}) == 1


def test_what_is_told_follows_from_the_traces(first: Tables) -> None:
    """In pandas: means over documents of the area between the whole text's probability and what is left."""
    deletions, figures = read(first, "deletions"), read(first, "faithfulness")
    for row in figures[figures.label.isna()].itertuples():
        mine = deletions[deletions.explain_key.isin(row.explain_keys) & (deletions.protocol == row.protocol)]
        if row.metric == "comprehensiveness":
            values = mine.whole - mine.without.map(np.mean)
        elif row.metric == "log_odds":
            values = mine.without.map(lambda each: np.log(each).mean()) - np.log(mine.whole)
        else:
            values = pd.Series([
                np.mean([w - a if size else 0.0 for size, a in zip(sizes, alone, strict=True)])
                for w, sizes, alone in zip(mine.whole, mine.sizes, mine.alone, strict=True)
            ], index=mine.index)  # fmt: skip
        by_document = values.groupby(mine.text_digest).mean()
        assert row.value == pytest.approx(by_document.mean())
        assert row.n_documents == len(by_document)
        assert row.ci_low < row.value < row.ci_high


def test_each_pair_of_methods_is_tested_on_the_documents_that_both_have(first: Tables) -> None:
    found = first.spark.sql("SELECT * FROM faithfulness_differences_current").toArrow().to_pandas()
    figures = read(first, "faithfulness").query("label.isna()").set_index(["method", "protocol", "metric"])
    assert len(found) == 6 * 7
    for row in found.itertuples():
        one, other = (figures.loc[(name, row.protocol, row.metric)] for name in (row.method, row.other))
        assert row.difference == pytest.approx(one["value"] - other["value"])  # all have the same documents
        assert row.n_documents == one["n_documents"]
        assert row.ci_low <= row.difference <= row.ci_high
    sure = found.query("method == 'integrated_gradients' and other == 'random' and metric == 'comprehensiveness'")
    assert len(sure) == 3
    assert (sure.p_adjusted < 0.05).all()


def test_words_that_decide_are_found_by_signed_methods(first: Tables) -> None:
    rows = first.spark.sql(
        "SELECT * FROM faithfulness_current WHERE label IS NULL AND metric = 'comprehensiveness'"
    ).collect()
    found = {(row["method"], row["protocol"]): row for row in rows}
    for method in ("integrated_gradients", "lrp:attnlrp-2024"):
        for protocol in ("dig-2021", "eraser-2020", "marc-2023"):
            assert found[method, protocol]["over_random_low"] > 0, (method, protocol)
    assert found["random", "marc-2023"]["over_random"] is None


def test_lists_of_each_method_are_told_and_shown_to_nobody_else(first: Tables) -> None:
    """Figures are of the tables that they name; what people query by plan names shows no list of an evaluation."""
    figures = first.spark.sql("SELECT * FROM keyword_quality_current").toArrow().to_pandas()
    words = {"election", "striker", "bank"}
    for method, mine in figures[figures.method != "tf-idf"].groupby("method"):
        keywords = read(first, "keywords")
        kept = keywords[(keywords.keyword_key == mine.keyword_key.iloc[0]) & keywords.kept]
        assert set(mine[mine.metric == "keyword_distinctiveness"].label.dropna()) == set(kept.label)
        if method == "integrated_gradients":
            assert words <= set(kept[kept["rank"] == 1].word)
    assert {"integrated_gradients", "lrp:attnlrp-2024"} <= set(figures.method)
    assert {"coverage", "cross_coverage", "halves_of_documents", "halves_of_splits"} <= set(figures.metric)
    assert first.spark.sql("SELECT * FROM keywords_current").count() == 0


def test_without_its_keywords_a_class_is_no_longer_predicted(first: Tables) -> None:
    """The planted word decides: without it other classes win; without as frequent other words nothing happens."""
    figures = first.spark.sql(
        "SELECT * FROM keyword_quality_current WHERE method = 'integrated_gradients' AND metric LIKE 'deletion%'"
    ).toArrow().to_pandas().set_index(["metric", "label"])  # fmt: skip
    labels = set(figures.loc["deletion"].index.dropna())
    assert len(labels) > 1
    assert labels <= set(CLUES)
    for label in labels:
        assert figures.loc[("deletion", label), "value"] > 0.3
        assert figures.loc[("deletion_over_random", label), "ci_low"] > 0.1
        assert abs(figures.loc[("deletion_of_random", label), "value"]) < 0.05
        assert abs(figures.loc[("deletion_elsewhere", label), "value"]) < 0.05
    # a text without evidence goes to some class, which is the one that may not flip
    assert figures.loc["deletion_flips"].loc[list(labels), "value"].max() > 0.9
    rows = read(first, "class_deletions")
    explained = read(first, "explanations").query("status == 'explained' and is_gold and probability > 0.5")
    assert not rows.duplicated(["keyword_key", "explain_key", "doc_id", "label"]).any()
    assert len(rows) == len(explained)
    # lists were made of the other half of the documents: in pandas, the first of a class by its mean score
    groups = rows.text_digest.map(lambda digest: int(digest[-8:], 16) % 20 % 2)
    assert set(groups) == {0, 1}


def test_the_queries_of_the_documentation_run(first: Tables) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    queries = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    assert len(queries) == 2
    for query in queries:
        assert first.spark.sql(query).count() > 0
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", text)) & {*TABLES, *VIEWS}
    assert named == {"keyword_quality_current", "sweeps_current"}
    metrics = {row["metric"] for row in first.read("keyword_quality").select("metric").distinct().collect()}
    told = set(re.findall(r"`([a-z_]+)`", text.split("| metric | is |")[1].split("For the")[0])) - {"_jaccard"}
    assert told == {metric for metric in metrics if not metric.endswith("_jaccard")}


def test_a_sweep_ranks_settings_without_a_model(first: Tables, plan: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the evaluation's own plan, explained first; its rows are those of the tables that they name."""
    capfd.readouterr()
    words = ["sweep", str(plan), "--top-n", "1,5", "--theta", "0.5,1"]
    refused = CliRunner().invoke(app, words)  # the plan itself was not run yet
    assert refused.exit_code == 1
    printed = capfd.readouterr()
    assert "documents were planned" in printed.out + printed.err + refused.output
    assert CliRunner().invoke(app, ["run", str(plan)]).exit_code == 0
    explained = first.read("explanations").count()
    before = first.spark.sql("SELECT * FROM keywords_current").count()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert first.read("explanations").count() == explained
    assert first.spark.sql("SELECT * FROM keywords_current").count() == before > 0
    rows = read(first, "sweeps")
    assert sorted(zip(rows.top_n, rows.theta, strict=True)) == [(1, 0.5), (1, 1.0), (5, 0.5), (5, 1.0)]
    assert sorted(rows["rank"]) == [1, 2, 3, 4]
    keywords = read(first, "keywords").query("kept")
    scores = []
    for row in rows.sort_values("rank").itertuples():
        mine, metrics = keywords[keywords.keyword_key == row.keyword_key], dict(row.metrics)
        assert row.n_classes == mine.label.nunique()
        assert (mine.selection_frequency >= row.theta).all()
        scores.append(metrics["coverage"] * metrics["coverage_micro"])
    assert scores == sorted(scores, reverse=True)
    # the planted word is every class's first, so one word a document covers most
    assert rows[rows["rank"] == 1].top_n.item() == 1


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--theta", "2", "keywords.theta=2"), ("--top-n", "1.5", "whole numbers"), ("--probability", "x", "must be numbers"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_before_spark(
    plan: Path, option: str, value: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    done = CliRunner().invoke(app, ["sweep", str(plan), option, value])
    printed = capfd.readouterr()
    assert done.exit_code == 2
    assert message in printed.err + done.output + done.stderr


def test_the_same_command_makes_nothing_anew(first: Tables, plan: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = first.versions()
    code, printed = evaluate(plan, "--methods", METHODS, "--documents", "40", capfd=capfd)
    assert code == 0, printed
    assert numbers(printed, "explanations measured now") == [0] * 8
    assert numbers(printed, "made now") == [0, 0, 0, 0]
    after = first.versions()
    written = {"runs", "faithfulness", "faithfulness_differences", "keyword_quality"}
    assert {name for name in before if after[name] != before[name]} <= written
    assert "is ahead of random" in printed
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    board, lists = lines[:5], lines[5:]
    assert board[0][:2] == ["method", "comprehensiveness dig-2021"]
    names = {"integrated_gradients", "lrp:attnlrp-2024", "random", "gradient_x_input"}
    assert {line[0] for line in board[1:]} == names
    assert lists[0][:3] == ["method", "keyword distinctiveness", "coverage"]
    assert (
        {line[0] for line in lists[1:]}
        == {row["method"] for row in first.read("keyword_quality").collect()}
        <= {*names, "tf-idf"}
    )
    for table in ("faithfulness", "faithfulness_differences", "keyword_quality"):
        assert first.read(table).select("evaluation_key").distinct().count() == 1


def test_what_is_lost_is_measured_again(first: Tables, plan: Path, capfd: pytest.CaptureFixture[str]) -> None:
    count = first.read("deletions").count()
    some = first.read("deletions").select("explain_key", "doc_id").head()
    assert some is not None
    first.spark.sql(
        f"DELETE FROM {first.name('deletions')} WHERE explain_key = '{some['explain_key']}' AND doc_id = '{some['doc_id']}'"
    )
    assert first.read("deletions").count() < count
    code, printed = evaluate(plan, "--methods", METHODS, "--documents", "40", capfd=capfd)
    assert code == 0, printed
    # the chunk that lacks some is measured whole
    assert sorted(numbers(printed, "explanations measured now"))[:7] == [0] * 7
    assert sum(numbers(printed, "explanations measured now")) > 0
    assert first.read("deletions").count() == count


def test_another_protocol_is_measured_beside_those_that_are_there(
    first: Tables, plan: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Arras et al.: gold labels are explained too; what words' removal does to the share of right predictions."""
    code, printed = evaluate(
        plan, "--methods", "gradient_x_input", "--documents", "40", "--protocols", "arras-2016", capfd=capfd
    )
    assert code == 0, printed
    rows = first.spark.sql(
        f"SELECT * FROM faithfulness_current WHERE name = '{yaml.safe_load(plan.read_text())['name']}'"
    )
    found = {row["metric"] for row in rows.where("label IS NULL").collect()}
    assert "accuracy_of_correct" in found
    deletions = read(first, "deletions")
    explained = read(first, "explanations").query("status == 'explained'")
    with_gold = explained.groupby(["explain_key", "doc_id"]).is_gold.any().groupby("explain_key").mean()
    keys = set(deletions[deletions.protocol == "arras-2016"].explain_key)
    assert len(keys) == 4
    assert (with_gold[list(keys)] == 1.0).all()
    # in pandas: of predictions that are right, the share that stays so, over all sizes
    gold = read(first, "staged").drop_duplicates("doc_id").set_index("doc_id").labels
    (figure,) = rows.where("label IS NULL AND metric = 'accuracy_of_correct' AND method = 'random'").collect()
    mine = deletions[deletions.explain_key.isin(figure["explain_keys"]) & (deletions.protocol == "arras-2016")]
    mine = mine.merge(explained[["explain_key", "doc_id", "label", "label_rank", "is_gold"]])
    mine = mine[(mine.label_rank == 0) & mine.is_gold]
    right = [np.mean([label in set(gold[doc]) for label in predicted])
             for doc, predicted in zip(mine.doc_id, mine.predicted, strict=True)]  # fmt: skip
    by_document = pd.Series(right, index=mine.index).groupby(mine.text_digest).mean()
    assert figure["value"] == pytest.approx(by_document.mean())
    assert figure["n_documents"] == len(by_document)


@pytest.mark.parametrize(
    ("methods", "message"),
    [("nosuch", "nosuch"), ("lrp:nosuch", "is no preset of lrp.v1"), ("lrp:arras-2016", "must be attnlrp or cp_lrp")],
)
def test_unfit_methods_are_refused_before_spark(
    plan: Path, methods: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, printed = evaluate(plan, "--methods", f"saliency,{methods}", capfd=capfd)
    assert code == 2
    assert message in printed


def test_a_protocol_that_there_is_not_is_refused_before_spark(plan: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, printed = evaluate(plan, "--methods", "saliency", "--protocols", "eraser", capfd=capfd)
    assert code == 2
    assert "protocols='eraser'" in printed
    assert "eraser-2020" in printed
