"""The evaluation's task, and the figures that are made of what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from core.models import LINES, Shelf, save_trainable
from core.test_executor import make_task, model_task, stage
from core.test_faithfulness import TOLERANCE, make_tracer
from lexplain.class_deletion import compute_figures
from lexplain.deletions import CLASS_DELETIONS, DELETIONS, WordList, deletion_batches, removal_batches
from lexplain.evaluation import list_contestants
from lexplain.executor import explain_batches
from lexplain.faithfulness import PROTOCOLS, ScoredText
from lexplain.methods import find_method
from lexplain.plan import Plan
from lexplain.schema import TABLES
from lexplain.words import Word

TEXTS = tuple(" ".join(LINES[number % 4 : number % 4 + 2]) + f" {number}" for number in range(20))
NAMES = ("dig-2021", "dig-2021-log-odds", "eraser-2020", "marc-2023")


def explain(task: Any) -> list[dict[str, Any]]:
    texts = {f"doc {number}": text.encode() for number, text in enumerate(TEXTS)}
    rows = [
        row for batch in explain_batches(iter([stage(TEXTS, splits=(0, 1))]), task, "cpu") for row in batch.to_pylist()
    ]
    return [row | {"text": texts[row["doc_id"]]} for row in rows if row["status"] == "explained"]


def test_a_task_traces_each_model_s_explanations(shelf: Shelf) -> None:
    folders = [shelf.folder("bert"), shelf.folder("bert", seed=3)]
    task = make_task(*(model_task(folder, split) for split, folder in enumerate(folders)), max_tokens=64)
    explained = explain(task)
    given = pa.RecordBatch.from_pylist(explained)
    made = [
        row
        for batch in deletion_batches(iter([given]), task=task, protocols=NAMES, device="cpu")
        for row in batch.to_pylist()
    ]
    assert len(made) == len(explained) * len(NAMES) == 40 * len(NAMES)
    found = {(row["explain_key"], row["doc_id"], row["protocol"]): row for row in made}
    for row in explained[::7]:
        classifier = shelf.classifier("bert") if row["split"] == 0 else shelf.classifier("bert", seed=3)
        words = [(Word(word["word"], word["start"], word["end"]), word["score"]) for word in row["words"]]
        text = ScoredText(row["text"].decode(), row["label"], sorted(words, key=lambda pair: pair[0].start))
        (expected,) = make_tracer(classifier).trace([text], [PROTOCOLS[name] for name in NAMES])
        assert expected is not None
        for name, trace in zip(NAMES, expected, strict=True):
            other = found[row["explain_key"], row["doc_id"], name]
            assert other["sizes"] == trace.sizes.tolist()
            np.testing.assert_allclose(other["without"], trace.without, rtol=0, atol=TOLERANCE)
            assert (other["alone"] is None) == (trace.alone is None)
            assert other["whole"] == pytest.approx(trace.whole, abs=TOLERANCE)
            assert other["reason"] is None
            assert set(other["predicted"]) <= set(classifier.labels)


@pytest.mark.parametrize(("schema", "table"), [(DELETIONS, "deletions"), (CLASS_DELETIONS, "class_deletions")])
def test_the_columns_are_those_of_the_table(schema: pa.Schema, table: str) -> None:
    assert [field.name for field in schema] == [name for name, _, _ in TABLES[table].columns]


def test_a_text_loses_the_lists_of_the_other_half(shelf: Shelf) -> None:
    """Every class's, and of random words its own class's; probabilities are those that the tracer gives."""
    classifier = shelf.classifier("bert")
    task = make_task(model_task(shelf.folder("bert")), max_tokens=64, top_k=2)
    rows = [row | {"side": number % 2} for number, row in enumerate(explain(task))]
    words = [frozenset(word["word"] for row in rows[part::5] for word in row["words"][:2]) for part in range(5)]
    named = [(label, side, draw) for label in classifier.labels for side in (0, 1) for draw in (None, 0, 1)]
    lists = [WordList(*name, words[number % 5]) for number, name in enumerate(named)]
    batch = pa.RecordBatch.from_pylist(rows)
    made = [
        row for each in removal_batches(iter([batch]), task=task, keyword_key="k", lists=lists, device="cpu")
        for row in each.to_pylist()
    ]  # fmt: skip
    assert [row["doc_id"] for row in made] == [row["doc_id"] for row in rows]
    assert len({row["label"] for row in rows}) > 1
    for given, found in zip(rows, made, strict=True):
        mine = [
            each
            for each in lists
            if each.side == 1 - given["side"] and each.draw in (None, *([0, 1] if each.label == given["label"] else []))
        ]
        assert [(each["list"], each["draw"]) for each in found["removed"]] == [(each.label, each.draw) for each in mine]
        (expected,) = make_tracer(classifier).remove([given["text"].decode()], [[each.words for each in mine]])
        assert expected is not None
        label = classifier.labels.index(given["label"])
        assert found["whole"] == pytest.approx(expected.whole[label], abs=TOLERANCE)
        assert [each["n_words"] for each in found["removed"]] == expected.n_words
        probabilities = [each["probability"] for each in found["removed"]]
        np.testing.assert_allclose(probabilities, expected.without[:, label], rtol=0, atol=TOLERANCE)
        assert found["keyword_key"] == "k"
        assert found["reason"] is None


def test_figures_of_class_deletion_are_means_over_documents() -> None:
    """In pandas, from rows of three classes, two models a document."""
    draw = np.random.default_rng(5)
    rows, labels = [], ["a", "b", "c"]
    for number in range(60):
        for _ in range(2):
            label = labels[number % 3]
            removed = [
                {"list": each, "draw": None, "n_words": 1, "predicted": str(draw.choice(labels)),
                 "probability": float(draw.uniform(0, 0.5) if each == label else draw.uniform(0.4, 0.9))}
                for each in labels[: 2 + number % 2]
            ]  # fmt: skip
            removed += [
                {
                    "list": label,
                    "draw": each,
                    "n_words": 1,
                    "predicted": label,
                    "probability": float(draw.uniform(0.5, 0.9)),
                }
                for each in range(number % 3 if label in labels[: 2 + number % 2] else 0)
            ]
            rows.append({"text_digest": f"d{number}", "label": label, "whole": 0.9, "removed": removed})
    table = pd.DataFrame([row | each for row in rows for each in row["removed"]])
    table["loss"] = table.whole - table.probability
    own = table[(table.list == table.label) & table.draw.isna()]
    random = table[table.draw.notna()]
    expected = {
        "deletion": own.groupby(["label", "text_digest"]).loss.mean().groupby("label").mean(),
        "deletion_of_random": random.groupby(["label", "text_digest"]).loss.mean().groupby("label").mean(),
        "deletion_flips": (own.predicted != own.label).groupby([own.label, own.text_digest]).mean().groupby("label").mean(),
        "deletion_elsewhere": table[(table.list != table.label) & table.draw.isna()]
        .groupby(["list", "text_digest"]).loss.mean().groupby("list").mean(),
    }  # fmt: skip
    figures = {(figure.metric, figure.label): figure for figure in compute_figures(rows)}
    for metric, values in expected.items():
        for label, value in values.items():
            assert figures[metric, label].value == pytest.approx(value), (metric, label)
        mean = figures[metric, None]
        assert mean.value == pytest.approx(values.mean())
        assert mean.ci_low < mean.value < mean.ci_high
    # classes are sampled each for itself, so their mean is told more exactly than they
    widths = [figures["deletion", label].ci_high - figures["deletion", label].ci_low for label in ("a", "b", "c")]
    whole = figures["deletion", None]
    assert whole.ci_high - whole.ci_low == pytest.approx(np.sqrt(np.square(widths).sum()) / 3, rel=0.2)
    assert figures["deletion_over_random", "b"].value > 0.2


def test_the_plan_s_own_method_keeps_its_options(shelf: Shelf, tmp_path: Path) -> None:
    """And all methods have the plan's models, under the plan's name, and the same documents."""
    (tmp_path / "corpus.jsonl").write_text("{}\n", encoding="utf-8")
    source = {"path": str(tmp_path / "corpus.jsonl"), "columns": {"labels": "label"}, "limit": 30}
    plan = Plan.parse(
        yaml.safe_dump({
            "name": "own", "corpus": source, "training": source, "sink": {"path": str(tmp_path / "tables")},
            "models": {"base": str(save_trainable(tmp_path / "base")), "splits": 2}, "text": {"max_tokens": 32, "overlap": 4},
            "method": {"id": "smoothgrad", "options": {"samples": 3}},
        }), find_method,
    )  # fmt: skip
    found = list_contestants(plan, ["smoothgrad", "lrp:cp-lrp-2022"], 50, find_method)
    assert list(found) == ["smoothgrad", "lrp:cp-lrp-2022", "random", "gradient_x_input"]
    assert found["smoothgrad"].method.options == {"samples": 3}
    assert found["lrp:cp-lrp-2022"].method.preset == "cp-lrp-2022"
    assert {mine.models.register_as for mine in found.values()} == {"lexplain-own"}
    assert {mine.corpus.limit for mine in found.values()} == {30}
    assert len({mine.name for mine in found.values()}) == 4
