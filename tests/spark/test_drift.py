"""Two keyword tables side by side: overlaps by their definition, changes of words by pandas and by what was planted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from scipy.stats import t

from lexplain.drift import KeywordTable, compare_lists, compare_words, find_table
from lexplain.errors import TableError
from lexplain.keywords import rank_keywords, sum_words
from lexplain.methods import find_method
from lexplain.plan import Sink
from lexplain.tables import Tables
from pandas_oracle import overlap_rank_biased
from spark.test_keywords import digest_of, explain, make_plan, stage, write, write_corpus

pytestmark = pytest.mark.slow

LOOSE = {"min_df": 0, "theta": 0.5, "max_classes": None, "top": None, "top_n": 2, "evidence": "predicted"}


@pytest.fixture(scope="module")
def tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    opened = Tables(spark, Sink(path=str(tmp_path_factory.mktemp("sink"))))
    opened.create()
    return opened


def write_lists(tables: Tables, keyword_key: str, lists: dict[str, Sequence[str]]) -> None:
    rows = [
        {
            "keyword_key": keyword_key,
            "label": label,
            "word": word,
            "rank": rank,
            "kept": True,
            "selection_frequency": 1.0,
        }
        for label, words in lists.items()
        for rank, word in enumerate(words, 1)
    ]
    dropped = {
        "keyword_key": keyword_key,
        "label": "NA",
        "word": "dropped",
        "kept": False,
        "drop_reason": "max_classes",
    }
    write(tables, "keywords", [*rows, {**dropped, "selection_frequency": 1.0}])


def test_overlaps_equal_the_definition(tables: Tables) -> None:
    rng = random.Random(5)
    a: dict[str, Sequence[str]] = {"same": "abc", "disjoint": "abc", "swapped": "abc", "only a": "abc"}
    b: dict[str, Sequence[str]] = {"same": "abc", "disjoint": "def", "swapped": "acb", "only b": "abc"}
    for number in range(30):
        a[f"random {number}"] = rng.sample(range(40), rng.randrange(1, 30))
        b[f"random {number}"] = rng.sample(range(40), rng.randrange(1, 30))
    for name, lists in (("a", a), ("b", b)):
        write_lists(tables, f"list {name}", {label: [str(word) for word in words] for label, words in lists.items()})
    for p, depth in ((0.9, 50), (0.5, 7)):
        found = {row.label: row for row in compare_lists(tables, "list a", "list b", p=p, depth=depth)}
        assert found.keys() == a.keys() | b.keys()
        for label, row in found.items():
            cut_a, cut_b = a.get(label, [])[:depth], b.get(label, [])[:depth]
            assert row.rank_biased_overlap == pytest.approx(overlap_rank_biased(cut_a, cut_b, p), abs=1e-12)
            assert row.jaccard == pytest.approx(len({*cut_a} & {*cut_b}) / len({*cut_a} | {*cut_b}), abs=1e-12)
            assert (row.n_a, row.n_b) == (len(cut_a), len(cut_b))
        assert (found["same"].rank_biased_overlap, found["same"].jaccard) == (pytest.approx(1.0), 1.0)
        assert (found["disjoint"].rank_biased_overlap, found["disjoint"].jaccard) == (0.0, 0.0)
        assert (found["only a"].rank_biased_overlap, found["only b"].jaccard) == (0.0, 0.0)
    swapped = {row.label: row for row in compare_lists(tables, "list a", "list b")}["swapped"]
    # By hand: 1/9 x (0.9 + 0.81 / 2 + 0.729) + 0.729
    assert swapped.rank_biased_overlap == pytest.approx(0.955)


@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 1.0}, {"depth": 0}])
def test_overlaps_refuse_meaningless_options(tables: Tables, options: dict[str, Any]) -> None:
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        compare_lists(tables, "list a", "list b", **options)


def make_table(tables: Tables, name: str, rows: list[dict[str, Any]]) -> KeywordTable:
    """Write explanations and make the keyword table of them."""
    plan = make_plan(name, **LOOSE)
    write_corpus(tables, plan, rows)
    keys = sorted({row["explain_key"] for row in rows})
    sum_words(tables, plan, stage(plan), keys)
    rank_keywords(
        tables, plan, stage(plan), keys, keyword_key=name, labelled=None, test_share_ratio=None, signed=True
    )  # fmt: skip
    return KeywordTable(name, plan, stage(plan), tuple(keys))


def draw_rows(name: str, seed: int, shift: float) -> list[dict[str, Any]]:
    """400 documents of two classes: `bank` scores by `shift` more, `vote` the same, `noise` comes and goes, all else 0."""
    draw, rows = np.random.default_rng(seed), []
    for number in range(400):
        label = "ab"[number % 2]
        words = [("bank", 0.4 + shift + draw.normal(0, 0.05)), ("vote", 0.5 + draw.normal(0, 0.05)),
                 (f"rare{number % 7}", float(draw.uniform(0.1, 0.45)))]  # fmt: skip
        rows.append(explain(0, f"doc {number}", label, words, explain_key=f"{name} model"))
    return rows


def test_changes_of_words_are_those_of_pandas(tables: Tables) -> None:
    first = make_table(tables, "june", draw_rows("june", 1, 0.0))
    second = make_table(tables, "july", draw_rows("july", 2, 0.2))
    found = compare_words(tables, first, second)
    assert {each.word for each in found} >= {"bank", "vote", "rare0"}

    def read(rows: list[dict[str, Any]]) -> pd.DataFrame:
        return pd.DataFrame([
            {"label": row["label"], "group": int(row["text_digest"][-8:], 16) % 20, "word": word["word"], "score": word["score"]}
            for row in rows for word in row["words"][:2]
        ])  # fmt: skip

    documents = pd.DataFrame(
        [{"label": "ab"[n % 2], "group": int(digest_of(f"doc {n}")[-8:], 16) % 20} for n in range(400)]
    )
    sides = [read(draw_rows("june", 1, 0.0)), read(draw_rows("july", 2, 0.2))]
    for each in found:
        counts = documents[documents.label == each.label].groupby("group").size().reindex(range(20), fill_value=0)
        per_group = [
            side[(side.label == each.label) & (side.word == each.word)]
            .groupby("group")
            .score.sum()
            .reindex(range(20), fill_value=0.0)
            for side in sides
        ]
        means = [scores.sum() / counts.sum() for scores in per_group]
        assert (each.score_a, each.score_b) == pytest.approx(tuple(means))
        left_out = np.array([
            (per_group[1].drop(group).sum() - per_group[0].drop(group).sum()) / counts.drop(group).sum() for group in range(20)
        ])  # fmt: skip
        spread = np.sqrt(19 / 20 * np.square(left_out - left_out.mean()).sum())
        assert each.change == pytest.approx(means[1] - means[0])
        assert each.p_value == pytest.approx(2 * t.sf(abs(each.change) / spread, 19), rel=1e-6)
    p_values = [each.p_value for each in found]
    assert p_values == sorted(p_values)
    for place, each in enumerate(found, 1):
        steps = [min(1.0, p * len(found) / rank) for rank, p in enumerate(p_values, 1)]
        assert each.q_value == pytest.approx(min(steps[place - 1 :]))
    changed = {(each.label, each.word) for each in found if each.q_value < 0.01}
    assert {("a", "bank"), ("b", "bank")} <= changed
    # the words that were chosen no more because of it changed too; that which scores as before did not
    assert not changed & {("a", "vote"), ("b", "vote")}


def test_equal_runs_differ_in_nothing(tables: Tables) -> None:
    rows = draw_rows("same", 3, 0.0)
    first = make_table(tables, "one", rows)
    second = make_table(tables, "other", [row | {"explain_key": "another model"} for row in rows])
    for each in compare_words(tables, first, second):
        assert each.change == 0.0
        assert each.p_value in (1.0, None)
        assert each.rank_a == each.rank_b


def test_a_word_that_only_one_run_has_is_no_gap(tables: Tables) -> None:
    first = make_table(
        tables, "before", [explain(0, f"d{n}", "a", [("old", 0.5)], explain_key="m1") for n in range(60)]
    )
    second = make_table(
        tables, "after", [explain(0, f"d{n}", "a", [("new", 0.5)], explain_key="m2") for n in range(60)]
    )
    found = {each.word: each for each in compare_words(tables, first, second)}
    assert (found["old"].score_a, found["old"].score_b, found["old"].rank_b) == (pytest.approx(0.5), 0.0, None)
    assert (found["new"].score_a, found["new"].score_b, found["new"].rank_a) == (0.0, pytest.approx(0.5), None)
    lonely = make_table(tables, "lonely", [explain(0, "d1", "a", [("once", 0.5)], explain_key="m3")])
    (once,) = [each for each in compare_words(tables, lonely, lonely) if each.word == "once"]
    assert once.p_value in (None, 1.0)


def test_a_name_without_a_table_is_refused(tables: Tables) -> None:
    with pytest.raises(TableError, match="'nobody' names no run with a keyword table"):
        find_table(tables, "nobody", find_method)
