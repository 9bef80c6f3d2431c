"""The evaluation's task, and the figures that are made of what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from core.models import LINES, Shelf, save_trainable
from core.test_executor import make_task, model_task, stage
from core.test_faithfulness import TOLERANCE, make_tracer
from lexplain.deletions import DELETIONS, deletion_batches
from lexplain.evaluation import METRICS, compute_figures, list_contestants
from lexplain.executor import explain_batches
from lexplain.faithfulness import PROTOCOLS, ScoredText
from lexplain.methods import find_method
from lexplain.plan import Plan
from lexplain.schema import TABLES
from lexplain.words import Word

TEXTS = tuple(" ".join(LINES[number % 4 : number % 4 + 2]) + f" {number}" for number in range(20))
NAMES = tuple(METRICS)


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


def test_the_columns_are_those_of_the_table() -> None:
    assert [field.name for field in DELETIONS] == [name for name, _, _ in TABLES["deletions"].columns]


def row(
    digest: str, label: str, protocol: str, whole: float, without: list[float], alone: list[float] | None
) -> dict[str, Any]:
    return {
        "text_digest": digest,
        "label": label,
        "protocol": protocol,
        "sizes": [1, 2],
        "whole": whole,
        "without": without,
        "alone": alone,
    }


def test_figures_are_means_over_documents_and_pairs_with_random() -> None:
    """A document with two explanations counts once; differences are of the documents that both methods have."""
    draw = np.random.default_rng(4)
    rows: dict[str, list[dict[str, Any]]] = {"random": [], "good": []}
    truth: dict[str, dict[str, list[float]]] = {"random": {}, "good": {}}
    for number in range(30):
        for method in rows:
            if method == "random" and number == 0:
                continue
            for label in ("a", "b")[: 1 + number % 2]:
                whole, loss = 0.9, float(draw.uniform(0.3, 0.6) if method == "good" else draw.uniform(0, 0.2))
                truth[method].setdefault(f"d{number}", []).append(loss)
                for protocol in METRICS:
                    alone = None if protocol.endswith("log-odds") else [whole - 0.1, whole - 0.3]
                    rows[method].append(row(f"d{number}", label, protocol, whole, [whole - loss, whole - loss], alone))
    figures = {(f.method, f.protocol, f.metric, f.label): f for f in compute_figures(rows)}
    mine = {name: float(np.mean(values)) for name, values in truth["good"].items()}
    other = {name: float(np.mean(values)) for name, values in truth["random"].items()}
    found = figures["good", "marc-2023", "comprehensiveness", None]
    assert found.value == pytest.approx(np.mean(list(mine.values())))
    assert found.n_documents == 30
    differences = np.array([mine[name] - other[name] for name in other])
    assert found.over_random == pytest.approx(differences.mean())
    # the interval of a mean of 29: a normal one is close
    error = differences.std(ddof=1) / np.sqrt(29)
    assert found.over_random_low == pytest.approx(differences.mean() - 1.96 * error, abs=0.3 * error)
    assert found.over_random_high == pytest.approx(differences.mean() + 1.96 * error, abs=0.3 * error)
    assert figures["good", "eraser-2020", "sufficiency", None].value == pytest.approx(0.2)
    assert figures["good", "dig-2021-log-odds", "log_odds", None].value < 0
    assert figures["good", "marc-2023", "comprehensiveness", "b"].n_documents == 15
    assert figures["random", "marc-2023", "comprehensiveness", None].over_random is None
    assert len(figures) == 2 * 7 * 3


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
