"""lexplain.keywords against pandas, and the properties that its numbers promise."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, Row, SparkSession

from lexplain.corpus import Staged
from lexplain.keys import corpus_key, evidence_key
from lexplain.keywords import PHRASES, describe_evidence, rank_keywords, sum_words
from lexplain.plan import Columns, Keywords, Models, Plan, Sink, Source
from lexplain.schema import TABLES
from lexplain.tables import Tables
from pandas_oracle import Rules, make_keyphrases, make_keywords


@pytest.fixture(scope="module")
def tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    opened = Tables(spark, Sink(path=str(tmp_path_factory.mktemp("sink"))))
    opened.create()
    return opened


# --- what the stages before would have written --------------------------------------------------------------------


def make_plan(corpus: str, **rules: Any) -> Plan:
    labelled = rules.get("evidence", "true_positives") == "true_positives"
    columns = Columns(labels="labels" if labelled else None)
    return Plan(
        name="test",
        corpus=Source(path=f"/corpora/{corpus}.jsonl", columns=columns),
        models=Models(uris=("/model",), corpus="unseen"),
        keywords=Keywords(**rules),
        sink=Sink(path="/sink"),
    )


def digest_of(doc_id: str) -> str:
    return hashlib.sha256(doc_id.encode()).hexdigest()


def explain(split: int, doc_id: str, label: str, words: Sequence[tuple[str, float]], **columns: Any) -> dict[str, Any]:
    """Return a row of `explanations`; `words` are (word, score)."""
    ranked = sorted(words, key=lambda word: math.inf if math.isnan(word[1]) else -word[1])
    return {
        "explain_key": f"model{split}",
        "split": split,
        "increment": 0,
        "bucket": 0,
        "doc_id": doc_id,
        "text_digest": digest_of(doc_id),
        "status": "explained",
        "label": label,
        "label_rank": 0,
        "probability": 0.9,
        "is_gold": True,
        "token_norm": 1.0,
        "words": [{"word": word, "start": 0, "end": 1, "score": score} for word, score in ranked],
        **columns,
    }


def write(tables: Tables, table: str, rows: Sequence[dict[str, Any]], partitions: int = 2) -> None:
    names = [name for name, _, _ in TABLES[table].columns]
    values = [tuple(row.get(name) for name in names) for row in rows]
    frame = tables.spark.createDataFrame(values, TABLES[table].schema)
    append(tables, frame.repartition(partitions), table)


def append(tables: Tables, rows: DataFrame, table: str) -> None:
    rows.write.format("delta").mode("append").save(str(tables.folder / table))  # type: ignore[operator]


def stage(plan: Plan, increments: int = 2) -> Staged:
    return Staged(corpus_key(plan.corpus), increments, 0)


def write_corpus(tables: Tables, plan: Plan, explanations: Sequence[dict[str, Any]], *, partitions: int = 2) -> None:
    """Write explanations and the ledger of their chunks."""
    key = corpus_key(plan.corpus)
    write(tables, "explanations", [{**row, "corpus_key": key} for row in explanations], partitions)
    chunks: dict[tuple[str, int, int, int], int] = {}
    for row in explanations:
        chunk = (row["explain_key"], row["increment"], row["bucket"], row["split"])
        chunks[chunk] = chunks.get(chunk, 0) + (row["label_rank"] == 0)
    names = ("explain_key", "increment", "bucket", "split", "n_documents")
    ledger = [{**dict(zip(names, (*chunk, count), strict=True)), "corpus_key": key} for chunk, count in chunks.items()]
    write(tables, "chunks", ledger)


def write_labelled(
    tables: Tables, key: str, texts: Sequence[tuple[bytes, Sequence[str] | None, Sequence[str]]]
) -> None:
    """Write labelled documents: (text, labels, words)."""
    rows = [
        {
            "corpus_key": key,
            "increment": 0,
            "bucket": n % 3,
            "doc_id": str(n),
            "text": bytearray(text),
            "labels": labels,
            "words": words,
        }
        for n, (text, labels, words) in enumerate(texts)
    ]
    write(tables, "staged", rows)


def read_keywords(tables: Tables, keyword_key: str) -> list[Row]:
    found = tables.read("keywords").where(f"keyword_key = '{keyword_key}'").drop("keyword_key")
    return found.orderBy("label", "word").collect()


def kept_words(tables: Tables, keyword_key: str, label: str) -> list[str]:
    rows = [row for row in read_keywords(tables, keyword_key) if row.kept and row.label == label]
    return [row.word for row in sorted(rows, key=lambda row: row.rank)]


# --- against pandas ------------------------------------------------------------------------------------------------

VOCABULARY = ["köpa", "kött", "på", "å", "ö", "aujourd’hui", "l'état", "don't", "dont", "çà", "été", "ภาษา", "ไทย", "น้ำ", "2024", "10\u202f000", "๓", "²", "½", "_", "__", "a_b", "co-op", "e-mail", "email", "x", "i", "the", "und", "中文", "שלום", "straße", "ǆ", "ΟΔΟΣ", "οδος", "٣x", "NA", "null", "nan"]  # fmt: skip
SCORES = [n / 16 for n in range(-4, 20)]  # exact in binary, so that ties are ties however they are added up


@st.composite
def keyword_rules(draw: st.DrawFn) -> Rules:
    return Rules(
        true_positives=draw(st.booleans()),
        probability=draw(st.sampled_from([0.5, 0.7])),
        top_n=draw(st.integers(1, 8)),
        published_words=draw(st.booleans()),
        theta=draw(st.sampled_from(["0.0", "0.4", "0.6", "0.7", "1.0"])),
        min_df=draw(st.integers(0, 3)),
        max_classes=draw(st.sampled_from([None, 1, 3])),
        top=draw(st.sampled_from([None, 2, 5])),
        labels=draw(st.sampled_from([(), ("NA", "sport", "o'clock \\ %")])),
        test_share_ratio=draw(st.sampled_from([None, 0.5])),
    )


def draw_explanations(rng: random.Random, vocabulary: Sequence[str], n_splits: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(120):
        doc_id, bucket = f"doc {number}", rng.randrange(3)
        for split in range(n_splits):
            status = rng.choices(["explained", "no_label", "rejected", "settled"], [20, 1, 1, 1])[0]
            chunk = {"increment": number % 2, "bucket": bucket, "status": status}
            if status != "explained":
                label = "sport" if status == "settled" else None
                reason = "empty_text" if status == "rejected" else None
                rows.append(explain(split, doc_id, "", [], **chunk) | {"label": label, "reason": reason, "words": None})
                continue
            labels = rng.sample(["NA", "sport", "o'clock \\ %", "kultur"], rng.choice([1, 1, 2]))
            for label_rank, label in enumerate(labels):
                # Zipf's law: some words in every split, many in one document only.
                words = [vocabulary[int(len(vocabulary) * rng.random() ** 2)] for _ in range(rng.randrange(12))]
                scores = [rng.choice(SCORES) if rng.random() < 0.7 else rng.gauss(0.2, 0.3) for _ in words]
                if scores and rng.random() < 0.05:
                    scores[0] = math.nan
                rows.append(
                    explain(split, doc_id, label, list(zip(words, scores, strict=True)), **chunk)
                    | {
                        "label_rank": label_rank,
                        "probability": rng.choice([0.5, 0.6, 0.7, 0.8, 0.99]),
                        "is_gold": rng.random() < 0.8,
                        "token_norm": rng.choice([0.0, 0.5, 1.0, 2.0, 3.7]),
                    }
                )
    return rows


def draw_labelled(
    rng: random.Random, vocabulary: Sequence[str]
) -> list[tuple[bytes, Sequence[str] | None, Sequence[str]]]:
    texts = []
    for number in range(40):
        words = rng.sample(list(vocabulary), rng.randrange(len(vocabulary)))
        cased = [word.upper() if rng.random() < 0.3 else word for word in words]
        text = rng.choice([" ", ", ", ". "]).join(cased).encode() + (b"\xff" if number % 13 == 5 else b"")
        labels = rng.sample(["NA", "sport", "o'clock \\ %", "kultur", "unseen"], rng.randrange(3))
        texts.append((text, labels if number % 11 else None, words))
    return texts


def check_against_oracle(found: Sequence[Row], expected: pd.DataFrame) -> None:
    if expected.empty:
        assert not found
        return
    frame = pd.DataFrame([row.asDict() for row in found])
    both = frame.merge(expected, on=["label", "word"], how="outer", suffixes=("", "_expected"), indicator=True)
    lone = both.loc[both._merge != "both", ["label", "word", "_merge"]]
    assert lone.empty, lone.to_dict("records")
    differing = both[both.drop_reason.fillna("") != both.drop_reason_expected.fillna("")]
    assert differing.empty, differing
    for column in ("rank", "n_splits", "n_documents", "n_occurrences", "document_frequency"):
        pd.testing.assert_series_equal(
            both[column].astype(float), both[f"{column}_expected"].astype(float), check_names=False, check_exact=True
        )
    for column in (
        "score_mean",
        "score_std",
        "score_error",
        "ci_low",
        "ci_high",
        "selection_frequency",
        "distinctiveness",
    ):
        ours, theirs = both[column].astype(float), both[f"{column}_expected"].astype(float)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12, err_msg=column)
    # Squares are stored with 18 decimal places, so a variance, not its root, is known to 1e-15.
    np.testing.assert_allclose(both.score_deviation**2, both.score_variance, rtol=1e-12, atol=1e-15)


example = itertools.count()  # the same example, drawn twice, is two corpora
WORD_CHARACTERS = st.text("åéßñœ'’_-·0٣²abc\u0301กิ้中\u202f.", min_size=1, max_size=4)


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(
    rules=keyword_rules(),
    seed=st.integers(0, 2**32),
    words=st.lists(WORD_CHARACTERS, max_size=15, unique=True),
    labelled=st.booleans(),
)
def test_keywords_equal_the_oracles(tables: Tables, rules: Rules, seed: int, words: list[str], labelled: bool) -> None:
    rng, n_splits, key = random.Random(seed), 5, str(next(example))
    vocabulary = sorted({*VOCABULARY, *words}, key=lambda _: rng.random())
    explanations, texts = draw_explanations(rng, vocabulary, n_splits), draw_labelled(rng, vocabulary)
    plan = make_plan(
        f"oracle {key}",
        evidence="true_positives" if rules.true_positives else "predicted",
        word_rule="sacx-2022" if rules.published_words else "unicode",
        theta=float(rules.theta),
        **{name: getattr(rules, name) for name in ("probability", "top_n", "min_df", "max_classes", "top", "labels")},
    )
    write_corpus(tables, plan, explanations)
    write_labelled(tables, key, texts)
    keys = [f"model{split}" for split in range(n_splits)]
    assert sum_words(tables, plan, stage(plan), keys) == 2 * 3 * n_splits
    rank_keywords(
        tables,
        plan,
        stage(plan),
        keys,
        keyword_key=key,
        labelled=Staged(key, 1, len(texts)) if labelled else None,
        test_share_ratio=rules.test_share_ratio,
        signed=True,
    )
    staged = pd.DataFrame(texts, columns=["text", "labels", "words"]) if labelled else None
    check_against_oracle(read_keywords(tables, key), make_keywords(pd.DataFrame(explanations), staged, n_splits, rules))


# --- phrases ----------------------------------------------------------------------------------------------------------


def draw_spans(rng: random.Random, rows: list[dict[str, Any]], phrases: Sequence[Sequence[str]]) -> None:
    """Give the explained rows spans, some none, in the order of the text; ties, phrases twice, scores below 0."""
    for row in rows:
        if row["status"] != "explained" or rng.random() < 0.1:
            continue
        places = sorted(rng.sample(range(100), rng.randrange(1, 8)))
        row["spans"] = [
            {"start": place, "end": place + 1, "words": phrases[int(len(phrases) * rng.random() ** 2)],
             "score": rng.choice(SCORES)}
            for place in places
        ]  # fmt: skip


@pytest.mark.parametrize(
    "rules",
    [
        Rules(true_positives=True, probability=0.5, top_n=3, published_words=False, theta="0.6", min_df=1, max_classes=3,
              top=6, labels=(), test_share_ratio=0.5),
        Rules(true_positives=False, probability=0.7, top_n=8, published_words=True, theta="0.4", min_df=2, max_classes=1,
              top=None, labels=("NA", "sport", "o'clock \\ %"), test_share_ratio=None),
    ],
    ids=["true_positives", "published"],
)  # fmt: skip
def test_keyphrases_equal_the_oracles(tables: Tables, rules: Rules) -> None:
    """The same chunks, summed for words first; labelled documents do not count, and no table of words changes."""
    rng, n_splits, key = random.Random(17), 5, f"phrases {rules.top_n}"
    explanations = draw_explanations(rng, VOCABULARY, n_splits)
    draw_spans(rng, explanations, [rng.sample(VOCABULARY, rng.choice([1, 2, 2, 3])) for _ in range(40)])
    plan = make_plan(
        f"oracle of {key}",
        evidence="true_positives" if rules.true_positives else "predicted",
        word_rule="sacx-2022" if rules.published_words else "unicode",
        theta=float(rules.theta),
        **{name: getattr(rules, name) for name in ("probability", "top_n", "min_df", "max_classes", "top", "labels")},
    )
    write_corpus(tables, plan, explanations)
    keys = [f"model{split}" for split in range(n_splits)]
    assert sum_words(tables, plan, stage(plan), keys) == 2 * 3 * n_splits
    before = tables.versions()
    assert sum_words(tables, plan, stage(plan), keys, PHRASES) == 2 * 3 * n_splits
    assert sum_words(tables, plan, stage(plan), keys, PHRASES) == 0
    rank_keywords(
        tables, plan, stage(plan), keys, keyword_key=key, labelled=Staged("another source", 1, 3),
        test_share_ratio=rules.test_share_ratio, signed=False, unit=PHRASES,
    )  # fmt: skip
    after = tables.versions()
    assert {name for name in after if after[name] != before[name]} == {"phrase_sums", "phrase_statistics", "keyphrases"}
    rows = tables.read("keyphrases").where(f"keyword_key = '{key}'").withColumnRenamed("phrase", "word")
    found = rows.drop("keyword_key").orderBy("label", "word").collect()
    assert sum(row.kept for row in found) > 5
    assert {row.signed for row in found} == {False}
    check_against_oracle(found, make_keyphrases(pd.DataFrame(explanations), n_splits, rules))


# --- independent of order, partitions and increments ------------------------------------------------------------------


def sum_and_rank(tables: Tables, plan: Plan, keyword_key: str, n_splits: int = 3) -> list[Row]:
    keys = [f"model{split}" for split in range(n_splits)]
    sum_words(tables, plan, stage(plan), keys)
    rank_keywords(
        tables, plan, stage(plan), keys, keyword_key=keyword_key, labelled=None, test_share_ratio=0.5, signed=True
    )
    return read_keywords(tables, keyword_key)


LOOSE: dict[str, Any] = {"min_df": 0, "theta": 0.4, "max_classes": None}


@pytest.fixture(scope="module")
def arranged(tables: Tables) -> tuple[list[dict[str, Any]], list[Row]]:
    """Explanations, and their keywords when written in one go."""
    rows = draw_explanations(random.Random(7), VOCABULARY, 3)
    plan = make_plan("arranged", **LOOSE)
    write_corpus(tables, plan, rows)
    keywords = sum_and_rank(tables, plan, "arranged")
    assert sum(row.kept for row in keywords) > 20
    return rows, keywords


@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_shuffled_rows_and_partitions_change_nothing(
    tables: Tables, arranged: tuple[list[dict[str, Any]], list[Row]], partitions: int
) -> None:
    rows, expected = arranged
    plan = make_plan(f"shuffled {partitions}", **LOOSE)
    write_corpus(tables, plan, random.Random(partitions).sample(rows, len(rows)), partitions=partitions)
    before = tables.spark.conf.get("spark.sql.shuffle.partitions")
    tables.spark.conf.set("spark.sql.shuffle.partitions", str(partitions))
    try:
        assert sum_and_rank(tables, plan, f"shuffled {partitions}") == expected
    finally:
        tables.spark.conf.set("spark.sql.shuffle.partitions", before)


def test_sums_added_chunk_by_chunk_equal_the_full_ones(
    tables: Tables, arranged: tuple[list[dict[str, Any]], list[Row]]
) -> None:
    rows, expected = arranged
    plan = make_plan("waves", **LOOSE)
    waves = sorted({(row["bucket"], row["increment"], row["split"]) for row in rows}, key=hash)
    in_wave = [
        [row for row in rows if (row["bucket"], row["increment"], row["split"]) in waves[n::4]] for n in range(4)
    ]
    for number, wave in enumerate(in_wave):
        write_corpus(tables, plan, wave)
        assert sum_words(tables, plan, stage(plan), ["model0", "model1", "model2"]) == len(waves[number::4])
        assert sum_words(tables, plan, stage(plan), ["model0", "model1", "model2"]) == 0
    assert sum_and_rank(tables, plan, "waves") == expected


# --- chunks and their markers -----------------------------------------------------------------------------------------


def read_sums(tables: Tables, plan: Plan) -> list[Row]:
    return tables.read("word_sums").where(f"corpus_key = '{corpus_key(plan.corpus)}'").collect()


def test_chunks_are_summed_when_whole_and_marked(tables: Tables) -> None:
    plan, key = make_plan("chunks"), ["model0"]
    rows = [
        explain(0, "a", "NA", [("x", 0.5), ("x", 0.25), ("y", 0.125)]),
        explain(0, "b", "NA", [("x", -0.5)], is_gold=True),
        explain(0, "c", "NA", [("x", 0.5)], is_gold=False),
    ]
    write_corpus(tables, plan, rows)
    late = {**rows[0], "bucket": 1, "doc_id": "d", "corpus_key": corpus_key(plan.corpus)}
    ledger = [{**late, "n_documents": 1}, {**late, "bucket": 2, "n_documents": 0}]
    write(tables, "chunks", ledger)
    assert (
        sum_words(tables, plan, stage(plan), key) == 2
    )  # the chunk of document d has no rows yet, the empty one needs none
    sums = read_sums(tables, plan)
    words = {
        row.word: (row.n_documents, row.n_occurrences, row.score_sum, row.score_square_sum) for row in sums if row.word
    }
    assert {word: tuple(map(float, row)) for word, row in words.items()} == {
        "x": (1, 2, 0.75, 0.3125),
        "y": (1, 1, 0.125, 0.015625),
    }
    evidence = {row.doc_group: row.n_documents for row in sums if row.word is None and row.label == "NA"}
    expected: dict[int, int] = {}
    for doc_id in "ab":  # c is no true positive; b has no word with a score >= 0, and is evidence all the same
        group = int(digest_of(doc_id)[-8:], 16) % 20
        expected[group] = expected.get(group, 0) + 1
    assert evidence == expected
    assert {(row.bucket, row.doc_group, row.n_documents) for row in sums if row.label is None} == {
        (0, -1, 3),
        (2, -1, 0),
    }
    write(tables, "explanations", [late])
    assert sum_words(tables, plan, stage(plan), key) == 1
    assert sum_words(tables, plan, stage(plan), key) == 0
    assert {row.evidence_key for row in read_sums(tables, plan)} == {evidence_key(plan)}


def test_sums_deleted_on_purpose_are_added_again(tables: Tables) -> None:
    plan, key = make_plan("deleted"), ["model0"]
    write_corpus(tables, plan, [explain(0, "a", "NA", [("x", 0.5)])])
    assert sum_words(tables, plan, stage(plan), key) == 1
    before = read_sums(tables, plan)
    tables.spark.sql(f"DELETE FROM {tables.name('word_sums')} WHERE corpus_key = '{corpus_key(plan.corpus)}'")
    assert sum_words(tables, plan, stage(plan), key) == 1
    assert sorted(map(repr, read_sums(tables, plan))) == sorted(map(repr, before))


# --- rules ------------------------------------------------------------------------------------------------------------


TIED = [(word, 0.125) for word in ("中", "a", "\U00010400", "Z", "ä")]


def test_a_planted_word_survives_and_a_lone_one_does_not(tables: Tables) -> None:
    plan, n_splits = make_plan("planted"), 5
    rows = []
    for split in range(n_splits):
        for number in range(20):
            words = [("planted", 0.3 + split / 100), (f"filler{number % 5}", 0.1), ("1984", 0.2)]
            words += [("three", 0.15)] if split < 3 else []
            words += [("lone", 0.99)] if number == 0 else []
            rows.append(explain(split, f"doc{number}", "NA", words))
            rows.append(explain(split, f"other{number}", "IN", [("common", 0.2), ("planted", -0.2), *TIED]))
    write_corpus(tables, plan, rows)
    found = {(row.label, row.word): row for row in sum_and_rank(tables, plan, "planted", n_splits)}
    assert kept_words(tables, "planted", "NA") == ["planted", "three"]
    assert kept_words(tables, "planted", "IN") == ["common", "Z", "a", "ä", "中", "\U00010400"]
    planted = found["NA", "planted"]
    assert (planted.selection_frequency, planted.n_splits, planted.document_frequency) == (1.0, 5, 20)
    assert planted.score_mean == pytest.approx(0.32)
    assert planted.ci_low <= planted.score_mean <= planted.ci_high
    # All 20 documents of both classes hold "planted": it speaks for one class, and tells none apart.
    assert planted.distinctiveness == 0.0
    assert found["NA", "three"].selection_frequency == 0.6  # 3 of 5 is enough for theta 0.6, exactly
    assert found["NA", "lone"].drop_reason == "document_frequency"
    assert found["NA", "lone"].ci_low is None
    assert found["NA", "1984"].drop_reason == "no_letter"


def test_models_that_other_plans_put_in_one_place_are_two_splits(tables: Tables) -> None:
    """Plans over models [a, b] and then [b, c] explain b and c as number 1 each."""
    plan = make_plan("places", theta=1.0, min_df=0)
    words = [[("both", 0.5), ("first", 0.25)], [("both", 0.75)]]  # exact in binary
    rows = [
        explain(1, f"doc{number}", "NA", words[place], explain_key=f"model{place}")
        for place in range(2)
        for number in range(9)
    ]
    write_corpus(tables, plan, rows)
    found = {row.word: row for row in sum_and_rank(tables, plan, "places", 2)}
    assert kept_words(tables, "places", "NA") == ["both"]
    assert (found["both"].selection_frequency, found["first"].selection_frequency) == (1.0, 0.5)
    assert found["first"].drop_reason == "selection_frequency"
    statistics = tables.read("word_statistics").where("keyword_key = 'places'")
    means = {(row["split"], row["word"]): row["score_mean"] for row in statistics.collect()}
    assert means == {(0, "both"): 0.5, (0, "first"): 0.25, (1, "both"): 0.75}


def test_an_existing_keyword_table_is_left_alone(
    tables: Tables, arranged: tuple[list[dict[str, Any]], list[Row]]
) -> None:
    before = tables.versions()
    assert sum_and_rank(tables, make_plan("arranged", **LOOSE), "arranged") == arranged[1]
    assert tables.versions() == before


def test_a_table_without_a_keyword_is_not_written_again_and_again(tables: Tables) -> None:
    plan = make_plan("nothing", **LOOSE)
    write_corpus(tables, plan, [explain(0, "a", "NA", [("bank", 0.5)], is_gold=False)])
    assert sum_words(tables, plan, stage(plan), ["model0"]) == 1
    before = tables.commits, tables.versions()
    rank_keywords(
        tables, plan, stage(plan), ["model0"], keyword_key="nothing", labelled=None, test_share_ratio=None, signed=True
    )
    assert read_keywords(tables, "nothing") == []
    assert (tables.commits, tables.versions()) == before


@pytest.mark.parametrize("word_rule", ["unicode", "sacx-2022"])
def test_the_view_of_evidence_accounts_for_each_score(tables: Tables, word_rule: str) -> None:
    key, keys = f"evidence {word_rule}", ["model0", "model1", "model2"]
    plan = make_plan(key, word_rule=word_rule, top_n=3, **LOOSE)
    rows = draw_explanations(random.Random(11), VOCABULARY, 3)
    write_corpus(tables, plan, rows)
    kept = {(row.label, row.word): row for row in sum_and_rank(tables, plan, key) if row.kept}
    run = {"run_id": key, "name": key, "status": "finished", "finished_at": datetime.now(UTC), "explain_keys": keys,
           "corpus_key": corpus_key(plan.corpus), "keyword_key": key,
           "evidence": describe_evidence(plan) | {"increments": 2}}  # fmt: skip
    write(tables, "runs", [run])
    write_corpus(tables, plan, [{**row, "increment": 2} for row in rows])  # staged later, by another run
    shown = tables.spark.sql(
        "SELECT label, word, count(*) AS n, avg(score_normalised) AS mean, min(is_gold) AS gold"
        f" FROM keyword_evidence WHERE name = '{key}' GROUP BY label, word"
    ).collect()
    assert len(kept) > 10
    assert {(row.label, row.word): row.n for row in shown} == {word: row.n_occurrences for word, row in kept.items()}
    means = {word: row.score_mean for word, row in kept.items()}
    assert {(row.label, row.word): row.mean for row in shown} == pytest.approx(means, abs=1e-12)
    assert all(row.gold for row in shown)


# --- the interval -----------------------------------------------------------------------------------------------------


def test_the_jackknife_interval_covers_the_mean(tables: Tables) -> None:
    """Scores of one document resemble each other: an interval that took occurrences for independent would miss."""
    rng, n_words, n_documents, n_occurrences, true_mean = np.random.default_rng(3), 2000, 200, 4, 0.4
    plan = make_plan("coverage", theta=0.0)
    of_document = rng.normal(0.0, 0.05, (n_words, n_documents, 1))
    scores = true_mean + of_document + rng.normal(0.0, 0.05, (n_words, n_documents, n_occurrences))
    groups = rng.integers(0, 20, (n_words, n_documents))
    sums = []
    for word in range(n_words):
        for group in range(20):
            values = scores[word][groups[word] == group]
            if values.size:
                sums.append((f"w{word:04}", group, values.size, float(values.sum()), float((values**2).sum())))
    frame = tables.spark.createDataFrame(sums, "word STRING, doc_group INT, n BIGINT, total DOUBLE, squares DOUBLE")
    append(
        tables,
        frame.selectExpr(
            f"'{evidence_key(plan)}' AS evidence_key", "'model0' AS explain_key", f"'{corpus_key(plan.corpus)}' AS corpus_key",
            "0 AS increment", "0 AS bucket", "0 AS split", "'NA' AS label", "word", "doc_group", f"n div {n_occurrences} AS n_documents",
            "n AS n_occurrences", "CAST(total AS DECIMAL(38,18)) AS score_sum", "CAST(squares AS DECIMAL(38,18)) AS score_square_sum",
        ),
        "word_sums",
    )  # fmt: skip
    found = pd.DataFrame(row.asDict() for row in sum_and_rank(tables, plan, "coverage", 1))
    assert len(found) == n_words
    assert found.score_std.isna().all()  # one split
    covered = ((found.ci_low <= true_mean) & (true_mean <= found.ci_high)).mean()
    # Four standard deviations of a binomial share of 0.95 among 2000 words.
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / n_words))
    naive = 1.96 * found.score_deviation / np.sqrt(found.n_occurrences)
    assert ((found.score_mean - true_mean).abs() <= naive).mean() < 0.85
