"""Every query of docs/queries.md on the tables of two planted runs, against what the rows of the tables say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession

from core.models import CLUES, save_trainable
from lexplain.methods import find_method
from lexplain.pipeline import Run, open_tables
from spark.planted import make_plan, plant, run_plan, write_json

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "queries.md").read_text(encoding="utf-8")
QUERIES = dict(re.findall(r"^##+ ([^\n]+)\n(?:(?!^#).)*?^```sql\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def runs(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two runs that share their explanations: rules under which words are shared, unstable, and moved."""
    folder = tmp_path_factory.mktemp("queries")
    save_trainable(folder / "base")
    write_json(folder / "training.jsonl", [*plant(120, seed=1), {"doc_id": "empty", "text": " ", "labels": ["NA"]}])
    loose = {"theta": 0.4, "min_df": 1, "max_classes": 3, "top_n": 6}
    quiet = {"enabled": False}
    first = make_plan(folder, name="my-classes", keywords=loose, mlflow=quiet)
    second = make_plan(folder, name="june", keywords=loose | {"top_n": 3, "max_classes": 1}, mlflow=quiet)
    found = {str(plan["name"]): run_plan(spark, plan) for plan in (first, second)}
    open_tables(spark, found["my-classes"].plan.sink, find_method)
    return found


@pytest.fixture
def ask(runs: dict[str, Run], spark: SparkSession) -> Callable[..., list[Row]]:
    """Runs the query below a heading as it stands on the page, but for names that stand for the reader's own."""

    def run(heading: str, **names: str) -> list[Row]:
        query = QUERIES[heading]
        for shown, name in names.items():
            assert f"'{shown}'" in query
            query = query.replace(f"'{shown}'", f"'{name}'")
        return spark.sql(query).collect()

    return run


@pytest.fixture
def kept(runs: dict[str, Run]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """By plan and by (label, word) what the table keywords says of each kept word."""
    found = {}
    for name, run in runs.items():
        rows = run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}' AND kept").collect()
        found[name] = {(row["label"], row["word"]): row.asDict() for row in rows}
    return found


Kept = dict[str, dict[tuple[str, str], dict[str, Any]]]
Ask = Callable[..., list[Row]]


def test_no_query_of_the_page_is_left_out() -> None:
    assert len(QUERIES) == len(re.findall(r"^```sql", PAGE, flags=re.MULTILINE)) == 13
    tested = set(re.findall(r'ask\("([^"]+)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == set(QUERIES)


def test_keywords(ask: Ask, kept: Kept) -> None:
    words = kept["my-classes"]
    first = ask("The first words of each class")
    expected = sorted((label, one["rank"], word) for (label, word), one in words.items() if one["rank"] <= 10)
    assert [(row["label"], row["rank"], row["word"]) for row in first] == expected
    assert {row["label"]: row["word"] for row in first if row["rank"] == 1} == CLUES

    labels: dict[str, set[str]] = {}
    for label, word in words:
        labels.setdefault(word, set()).add(label)
    alone = {(row["label"], row["word"]) for row in ask("Words of one class alone")}
    assert alone == {(min(its), word) for word, its in labels.items() if len(its) == 1}
    assert alone >= set(CLUES.items())
    shared = ask("Words that two classes share")
    pairs = {(word, one, two) for word, its in labels.items() for one in its for two in its if one < two}
    assert {(row["word"], row["label"], row["other_label"]) for row in shared} == pairs != set()
    assert all(words[row["other_label"], row["word"]]["rank"] == row["other_rank"] for row in shared)


def test_dropped_words(ask: Ask, runs: dict[str, Run]) -> None:
    run = runs["my-classes"]
    dropped = run.tables.read("keywords").where(f"keyword_key = '{run.record['keyword_key']}' AND NOT kept").collect()
    rows = ask("Words that were dropped, and why")
    assert sum(row["words"] for row in rows) == len(dropped) > 0
    strongest = {(row["label"], row["drop_reason"]): row["strongest"] for row in rows}
    for pair, word in strongest.items():
        mine = [row for row in dropped if (row["label"], row["drop_reason"]) == pair]
        assert max(mine, key=lambda row: row["score_mean"])["score_mean"] == next(
            row["score_mean"] for row in mine if row["word"] == word
        )


def test_evidence(ask: Ask, runs: dict[str, Run]) -> None:
    rows = ask("Where a word's score comes from")
    texts = {document["doc_id"]: document["text"] for document in plant(120, seed=1)}
    assert len(rows) == 10
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for row in rows:
        assert "striker" in row["place"]
        assert row["place"] in texts[row["doc_id"]]
        assert len(row["place"]) <= len("striker") + 80
    explanations = runs["my-classes"].tables.read("explanations").where("status = 'explained'").collect()
    doc_id = min(row["doc_id"] for row in explanations)
    document = ask("What speaks for and against a label in one document", **{"doc-17": doc_id})
    expected = [
        (row["split"], row["label"], word["word"])
        for row in explanations if row["doc_id"] == doc_id for word in row["words"]
    ]  # fmt: skip
    assert sorted((row["split"], row["label"], row["word"]) for row in document) == sorted(expected) != []
    (without,) = ask("Documents that have no explanation")
    assert (without["status"], without["reason"], without["example"]) == ("rejected", "empty_text", "empty")


def test_how_sure(ask: Ask, kept: Kept, runs: dict[str, Run]) -> None:
    words = kept["my-classes"]
    unstable = {
        pair
        for pair, one in words.items()
        if one["ci_low"] is None or one["ci_low"] <= 0 or one["selection_frequency"] < 1
    }
    assert {(row["label"], row["word"]) for row in ask("Unstable words")} == unstable
    assert 0 < len(unstable) < len(words)
    splits = ask("Scores by split")
    assert {(row["label"], row["word"]) for row in splits} == {pair for pair, one in words.items() if one["rank"] <= 5}
    striker = [row["split"] for row in splits if row["word"] == CLUES["sport"] and row["label"] == "sport"]
    assert striker == [0, 1, 2]
    models = ask("How good the models are")
    assert [row["split"] for row in models] == [0, 1, 2]
    assert [row["folder"] for row in models] == [model.folder for model in runs["my-classes"].models]


def test_two_runs(ask: Ask, kept: Kept) -> None:
    one, other = kept["my-classes"], kept["june"]
    drift = {(row["label"], row["word"]): (row["rank"], row["other_rank"]) for row in ask("Drift")}
    ranks = {
        pair: tuple(found[pair]["rank"] if pair in found else None for found in (one, other)) for pair in {*one, *other}
    }
    assert drift == {pair: both for pair, both in ranks.items() if None in both or abs(both[0] - both[1]) >= 10}
    assert drift
    assert {row["name"]: row["status"] for row in ask("All runs")} == {"my-classes": "finished", "june": "finished"}


def test_a_text_is_explained(ask: Ask) -> None:
    rows = ask("Explain a text")
    assert rows
    for row in rows:
        assert row["label"] in CLUES
        assert CLUES[row["label"]] in [word["word"] for word in row["words"]]
