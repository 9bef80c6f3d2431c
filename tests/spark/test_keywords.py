"""lexplain.keywords against pandas, and the properties that its numbers promise."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas_oracle import Rules, make_keywords, overlap_rank_biased
from pyspark.sql import Row, SparkSession

from lexplain.keywords import compare_lists, rank_keywords, sum_words
from lexplain.plan import Columns, Keywords, Models, Plan, Sink, Source, corpus_key, evidence_key
from lexplain.tables import TABLES, Tables

IVY_JARS = Path("/tmp/inst/ivy/jars")


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    jars = [str(jar) for name in ("io.delta_*", "io.unitycatalog_*") for jar in IVY_JARS.glob(name)]
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.jars", ",".join(jars))
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.sql.catalogImplementation", "in-memory")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.databricks.delta.snapshotPartitions", "2")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    yield session
    session.stop()


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
    ranked = sorted(words, key=lambda word: -math.inf if math.isnan(word[1]) else -word[1])
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


def write(tables: Tables, table: str, rows: Sequence[dict[str, Any]], app_id: str, partitions: int = 2) -> None:
    names = [name for name, _, _ in TABLES[table].columns]
    values = [tuple(row.get(name) for name in names) for row in rows]
    frame = tables.spark.createDataFrame(values, TABLES[table].schema)
    tables.append(frame.repartition(partitions), table, app_id=f"{table}/{app_id}")


def write_corpus(
    tables: Tables, plan: Plan, explanations: Sequence[dict[str, Any]], *, wave: int = 0, partitions: int = 2
) -> None:
    """Write explanations and the ledger of their chunks."""
    key = corpus_key(plan.corpus)
    write(tables, "explanations", [{**row, "corpus_key": key} for row in explanations], f"{key}/{wave}", partitions)
    chunks: dict[tuple[str, int, int, int], int] = {}
    for row in explanations:
        chunk = (row["explain_key"], row["increment"], row["bucket"], row["split"])
        chunks[chunk] = chunks.get(chunk, 0) + (row["label_rank"] == 0)
    names = ("explain_key", "increment", "bucket", "split", "n_documents")
    ledger = [{**dict(zip(names, (*chunk, count), strict=True)), "corpus_key": key} for chunk, count in chunks.items()]
    write(tables, "chunks", ledger, f"{key}/{wave}")


def write_labelled(tables: Tables, key: str, texts: Sequence[tuple[bytes, Sequence[str] | None, Sequence[str]]]) -> None:
    """Write labelled documents: (text, labels, words)."""
    rows = [
        {"corpus_key": key, "increment": 0, "bucket": n % 3, "doc_id": str(n), "text": bytearray(text), "labels": labels, "words": words}
        for n, (text, labels, words) in enumerate(texts)
    ]
    write(tables, "staged", rows, key)


def read_keywords(tables: Tables, keyword_key: str) -> list[Row]:
    found = tables.read("keywords").where(f"keyword_key = '{keyword_key}'").drop("keyword_key")
    return found.orderBy("label", "word").collect()


def kept_words(tables: Tables, keyword_key: str, label: str) -> list[str]:
    rows = [row for row in read_keywords(tables, keyword_key) if row.kept and row.label == label]
    return [row.word for row in sorted(rows, key=lambda row: row.rank)]


# --- against pandas ------------------------------------------------------------------------------------------------

VOCABULARY = (
    "köpa kött på å ö aujourd’hui l'état don't dont çà été ภาษา ไทย น้ำ 2024 10\u202f000 ๓ ² ½ _ __ a_b co-op e-mail email "
    "x i the und 中文 שלום straße ǆ ΟΔΟΣ οδος ٣x NA null nan"
).split(" ")  # fmt: skip
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
    assert both._merge.eq("both").all(), both[both._merge != "both"]
    differing = both[both.drop_reason.fillna("") != both.drop_reason_expected.fillna("")]
    assert differing.empty, differing
    for column in ("rank", "n_splits", "n_documents", "n_occurrences", "document_frequency"):
        pd.testing.assert_series_equal(
            both[column].astype(float), both[f"{column}_expected"].astype(float), check_names=False, check_exact=True
        )
    for column in ("score_mean", "score_std", "score_error", "ci_low", "ci_high", "selection_frequency", "distinctiveness"):
        ours, theirs = both[column].astype(float), both[f"{column}_expected"].astype(float)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12, err_msg=column)
    # Squares are stored with 18 decimal places, so a variance, not its root, is known to 1e-15.
    np.testing.assert_allclose(both.score_deviation**2, both.score_variance, rtol=1e-12, atol=1e-15)


WORD_CHARACTERS = st.text("åéßñœ'’_-·0٣²abc\u0301กิ้中\u202f.", min_size=1, max_size=4)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rules=keyword_rules(),
    seed=st.integers(0, 2**32),
    words=st.lists(WORD_CHARACTERS, max_size=15, unique=True),
    labelled=st.booleans(),
)
def test_keywords_equal_the_oracles(tables: Tables, rules: Rules, seed: int, words: list[str], labelled: bool) -> None:
    rng, n_splits = random.Random(seed), 5
    vocabulary = sorted({*VOCABULARY, *words}, key=lambda _: rng.random())
    explanations, texts = draw_explanations(rng, vocabulary, n_splits), draw_labelled(rng, vocabulary)
    plan = make_plan(
        f"oracle {rng.random()}",
        evidence="true_positives" if rules.true_positives else "predicted",
        word_rule="sacx-2022" if rules.published_words else "unicode",
        theta=float(rules.theta),
        **{name: getattr(rules, name) for name in ("probability", "top_n", "min_df", "max_classes", "top", "labels")},
    )
    key = str(rng.random())
    write_corpus(tables, plan, explanations)
    write_labelled(tables, key, texts)
    keys = [f"model{split}" for split in range(n_splits)]
    assert sum_words(tables, plan, keys) == 2 * 3 * n_splits
    rank_keywords(
        tables, plan, keys, keyword_key=key, labelled_key=key if labelled else None, test_share_ratio=rules.test_share_ratio
    )
    staged = pd.DataFrame(texts, columns=["text", "labels", "words"]) if labelled else None
    check_against_oracle(read_keywords(tables, key), make_keywords(pd.DataFrame(explanations), staged, n_splits, rules))
