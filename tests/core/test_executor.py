"""The kernel of the attribution stage: Arrow batches in, Arrow batches out, with real tiny models."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

import lexplain
from core.models import BATCH_TOLERANCE, Shelf
from core.test_neighbours import index as build_index
from lexplain import executor
from lexplain.classifier import Classifier
from lexplain.errors import DeviceError, DocumentError, ModelError
from lexplain.executor import (
    EXPLANATIONS,
    LOOK_AHEAD_DOCUMENTS,
    ExplainTask,
    ModelCache,
    ModelTask,
    add_word_keys,
    choose_device,
    decode_document,
    explain_batches,
    explain_texts,
)
from lexplain.methods import METHODS
from lexplain.model_store import digest_folder
from lexplain.schema import TABLES

STAGED = pa.schema(
    [
        ("corpus_key", pa.string()), ("increment", pa.int32()), ("bucket", pa.int32()), ("doc_id", pa.string()),
        ("text", pa.binary()), ("text_digest", pa.string()), ("labels", pa.list_(pa.string())),
        ("defect", pa.string()), ("splits", pa.list_(pa.int32())),
    ]
)  # fmt: skip

TEXTS = (
    "The party said the bank warned of a new tax.",
    "A better team scored twice",
    "Köttbullar & räksmörgås: the user said 今日は晴れです!",
    "Shares fell on Monday - the bank warned of a weak quarter and rising costs. " * 6,
)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModelCache:
    """An empty cache in place of the process's own."""
    cache = ModelCache()
    monkeypatch.setattr(executor, "MODELS", cache)
    return cache


def model_task(folder: Path, split: int = 0) -> ModelTask:
    return ModelTask(split, f"explain key {split}", str(folder), digest_folder(folder))


def make_task(*models: ModelTask, **changes: Any) -> ExplainTask:
    settings: dict[str, Any] = {
        "method": "integrated_gradients.v1", "options": {"rule": "midpoint", "nodes": 5, "baseline": "mask"},
        "max_tokens": 40, "overlap": 6, "max_windows": None, "max_characters": 1000, "merge": "sum",
        "budget_tokens": 2000, "threads": 1, "models_in_memory": 4, "allow_pickle": False,
        "precision": "float32", "top_k": None, "gold": False, "against": None, "compile": False,
    }  # fmt: skip
    return ExplainTask(models=models, **settings | changes)


def stage(texts: Sequence[str | bytes | None], *, labels: Any = None, splits: Sequence[int] = (0,)) -> pa.RecordBatch:
    """A batch of staged documents `doc 0`, `doc 1`, ..."""
    rows = []
    for number, text in enumerate(texts):
        data = text.encode() if isinstance(text, str) else text
        digest = hashlib.sha256(data or b"").hexdigest()
        rows.append(
            {"corpus_key": "corpus", "increment": 2, "bucket": 3, "doc_id": f"doc {number}", "text": data,
             "text_digest": digest, "labels": labels, "splits": list(splits)}
        )  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=STAGED)


def explain(batches: Sequence[pa.RecordBatch], task: ExplainTask) -> list[dict[str, Any]]:
    found = list(explain_batches(iter(batches), task, "cpu"))
    assert all(batch.schema == EXPLANATIONS for batch in found)
    return [row for batch in found for row in batch.to_pylist()]


def assert_same(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> None:
    """Rows are equal, scores up to what batch mates may change."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            if name == "completeness_gap_relative":
                continue  # the gap by a difference that may be next to nothing
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, abs=BATCH_TOLERANCE, rel=1e-4), name
            elif name == "words" and value is not None:
                by_place = [
                    {(word["start"], word["end"], word["word"]): word["score"] for word in words}
                    for words in (value, other[name])
                ]
                assert by_place[0] == pytest.approx(by_place[1], abs=BATCH_TOLERANCE)
            else:
                assert value == other[name], name


# --- signs of life ------------------------------------------------------------------------------------------------


def test_a_task_whose_model_gets_on_gives_signs_of_life(
    shelf: Shelf, models: ModelCache, monkeypatch: pytest.MonkeyPatch
):
    task = make_task(model_task(shelf.folder("bert")), budget_tokens=16)
    expected = explain([stage(TEXTS)], task)
    monkeypatch.setattr(executor, "SIGN_SECONDS", 0.001)
    batches = list(explain_batches(iter([stage(TEXTS)]), task, "cpu"))
    signs = [batch for batch in batches if batch.num_rows == 0]
    assert signs
    assert all(sign.schema == EXPLANATIONS for sign in signs)
    assert [row for batch in batches for row in batch.to_pylist()] == expected


def test_a_task_whose_model_hangs_gives_none(shelf: Shelf, models: ModelCache, monkeypatch: pytest.MonkeyPatch):
    task, forward = make_task(model_task(shelf.folder("bert")), budget_tokens=16), Classifier._forward
    executor.open_explainer(task, task.models[0], "cpu")  # loading makes passes too
    hung, released, found = threading.Event(), threading.Event(), queue.SimpleQueue[pa.RecordBatch]()

    def hang(classifier: Classifier, inputs: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread() and classifier.n_passes > loaded + 3:
            hung.set()
            released.wait(60)
        return forward(classifier, inputs)

    def run() -> None:
        for batch in explain_batches(iter([stage(TEXTS)]), task, "cpu"):
            found.put(batch)

    loaded = models.load(task.models[0], task, "cpu").n_passes
    monkeypatch.setattr(Classifier, "_forward", hang)
    monkeypatch.setattr(executor, "SIGN_SECONDS", 0.01)
    running = threading.Thread(target=run)
    running.start()
    assert hung.wait(60)
    time.sleep(0.2)  # a last sign, of the passes before
    told = found.qsize()
    time.sleep(0.5)
    assert found.qsize() == told
    released.set()
    running.join(60)
    assert found.qsize() > told


# --- rows -----------------------------------------------------------------------------------------------------


def arrow_type(ddl: str) -> pa.DataType:
    """The Arrow type that Spark makes of a type in DDL."""
    simple = {"STRING": pa.string(), "INT": pa.int32(), "DOUBLE": pa.float64(), "BOOLEAN": pa.bool_()}
    if ddl in simple:
        return simple[ddl]
    kind, _, inner = ddl.removesuffix(">").partition("<")
    if kind == "ARRAY":
        return pa.list_(arrow_type(inner))
    assert kind == "STRUCT"
    fields = [field.split(": ") for field in inner.split(", ")]
    return pa.struct([(name, arrow_type(part)) for name, part in fields])


def test_schema_is_that_of_the_table():
    columns = [(name, arrow_type(kind)) for name, kind, _ in TABLES["explanations"].columns]
    assert columns == [(field.name, field.type) for field in EXPLANATIONS]


def test_explained_row_is_complete(shelf: Shelf, models: ModelCache):
    model = model_task(shelf.folder("bert"))
    (row,) = explain([stage(TEXTS[:1])], make_task(model))
    assert {name for name, value in row.items() if value is None} == {"reason", "is_gold", "spans"}
    assert (row["explain_key"], row["corpus_key"], row["increment"], row["bucket"]) == ("explain key 0", "corpus", 2, 3)
    assert (row["status"], row["method"], row["target"], row["label_rank"]) == (
        "explained",
        "integrated_gradients.v1",
        "logit",
        0,
    )
    assert row["text_digest"] == hashlib.sha256(TEXTS[0].encode()).hexdigest()
    scores = [word["score"] for word in row["words"]]
    assert scores == sorted(scores, reverse=True)
    in_text = sorted(row["words"], key=lambda word: word["start"])
    assert [TEXTS[0][word["start"] : word["end"]] for word in in_text] == TEXTS[0].rstrip(".").split()
    assert [word["word"] for word in in_text] == TEXTS[0].lower().rstrip(".").split()
    total = sum(scores) + row["other_score"] + row["completeness_gap"]
    assert total == pytest.approx(row["target_score"] - row["baseline_score"], abs=1e-6)


def test_offsets_are_code_points_of_the_original(shelf: Shelf, models: ModelCache):
    text = "😀 Köttbullar 👩‍👩‍👧 räksmörgås"
    (row,) = explain([stage([text])], make_task(model_task(shelf.folder("bert"))))
    assert {text[word["start"] : word["end"]] for word in row["words"]} == {"Köttbullar", "räksmörgås"}


def test_gold_labels_decide_is_gold(shelf: Shelf, models: ModelCache):
    task = make_task(model_task(shelf.folder("bert")))
    (row,) = explain([stage(TEXTS[:1])], task)
    for labels, is_gold in ((None, None), ([], False), (["no such"], False), ([row["label"], "no such"], True)):
        (again,) = explain([stage(TEXTS[:1], labels=labels)], task)
        assert again["is_gold"] is is_gold


def test_a_regression_is_a_row_without_a_class(shelf: Shelf, models: ModelCache):
    """Gold numbers are no labels: they say nothing about the name of the output."""
    task = make_task(model_task(shelf.folder("bert", labels=("stars",), problem_type="regression")))
    rows = explain([stage(TEXTS, labels=["stars"])], task)
    assert [(row["status"], row["label"], row["label_rank"], row["target"]) for row in rows] == [
        ("explained", "stars", 0, "output")
    ] * len(TEXTS)
    assert {(row["probability"], row["is_gold"], row["reason"]) for row in rows} == {(None, None, None)}
    assert len({row["target_score"] for row in rows}) == len(TEXTS)


def plant_nan(folder: Path, word: str, target: Path) -> Path:
    """A copy of a model whose embedding of one word is NaN, as a training that overflowed leaves it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    return target


def test_every_bad_document_is_one_row_with_a_reason(shelf: Shelf, models: ModelCache, tmp_path: Path):
    broken = plant_nan(shelf.folder("bert"), "bank", tmp_path / "broken")
    bad = {
        "null_text": [None],
        "invalid_utf8": [b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80", b"good until here \xf0\x9f"],
        "empty_text": ["", " ", "\n\t\u3000\u2028"],
        "too_long": ["a " * 501],
        "no_words": ["\x00\x01\x02", "!?... ---", "😀👍🏽", "\u200b\u00ad", "_ _"],
        "not_finite": ["The bank"],
    }
    texts = [(reason, text) for reason, some in bad.items() for text in some]
    good = "A better team scored twice"
    documents = [good, *[text for _, text in texts], good]
    rows = explain([stage(documents)], make_task(model_task(broken)))
    assert [row["doc_id"] for row in rows] == [f"doc {number}" for number in range(len(documents))]
    first, *rejected, last = rows
    assert [(row["status"], row["reason"]) for row in rejected] == [("rejected", reason) for reason, _ in texts]
    assert first["status"] == "explained"
    assert first["words"] == last["words"]
    kept = {"explain_key", "corpus_key", "increment", "bucket", "split", "doc_id", "text_digest", "status", "reason",
            "method", "label_rank"}  # fmt: skip
    for row in rejected:
        assert {name for name, value in row.items() if value is not None} == kept
        assert row["label_rank"] == 0


QUICK: dict[str, dict[str, Any]] = {
    "captum.lime.v1": {"n_samples": 20},
    "captum.shapley_value_sampling.v1": {"n_samples": 2},
    "discretized_integrated_gradients.v1": {"neighbours": 5, "steps": 4},
    "lafa.v1": {"base": "saliency", "quantile": 1.0, "same_class": False},
    "marc.v1": {"steps": 20},
    "sequential_integrated_gradients.v1": {"nodes": 3},
    "uniform_discretized_integrated_gradients.v1": {"neighbours": 5, "steps": 4},
}


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.package is None))
def test_nan_on_the_way_is_a_row_with_a_reason(shelf: Shelf, models: ModelCache, tmp_path: Path, name: str):
    """The text's own logits are finite, those of its baseline are not."""
    method = METHODS[name]
    family = next(family for family in ("bert", "textcnn") if family in (method.models or ("bert",)))
    broken = plant_nan(shelf.folder(family), "bank", tmp_path / "broken")
    model = model_task(broken)
    if method.prepares(method.complete_options({})) == "neighbours":
        model = dataclasses.replace(
            model, prepared=str(build_index(Classifier.load(broken), base="saliency").save(tmp_path))
        )
    has_baseline = "baseline" in method.options
    options = QUICK.get(name, {}) | ({"baseline": "bank"} if has_baseline else {})
    task = make_task(model, method=name, options=method.complete_options(options))
    rows = explain([stage(["A better team scored twice", "The bank"])], task)
    expected = ("rejected", "not_finite")
    assert [(row["status"], row["reason"]) for row in rows] == [
        expected if has_baseline else ("explained", None),
        expected,
    ]


def test_longest_text_that_is_allowed(shelf: Shelf, models: ModelCache):
    task = make_task(model_task(shelf.folder("bert")), max_characters=10)
    assert [row["status"] for row in explain([stage(["ab de ghij", "ab de ghijk"])], task)] == ["explained", "rejected"]


def test_text_with_strange_characters_is_explained_as_it_is(shelf: Shelf, models: ModelCache):
    text = "\x00new\x1b[31m tax\u202e\r\nteam\ufeff"
    (row,) = explain([stage([text])], make_task(model_task(shelf.folder("bert"))))
    assert row["status"] == "explained"
    assert {text[word["start"] : word["end"]] for word in row["words"]} >= {"tax", "team"}


def test_a_defect_of_the_source_is_a_rejected_row_beside_explained_ones(shelf: Shelf, models: ModelCache):
    batch = stage(TEXTS[:3], labels=[])
    place = batch.schema.get_field_index("defect")
    batch = batch.set_column(place, "defect", pa.array([None, "malformed_row", None], pa.string()))
    rows = explain([batch], make_task(model_task(shelf.folder("bert"))))
    assert {row["doc_id"]: row["reason"] for row in rows} == {"doc 0": None, "doc 1": "malformed_row", "doc 2": None}
    alone = explain([stage(TEXTS[2:3])], make_task(model_task(shelf.folder("bert"))))
    assert [row["words"] for row in rows if row["doc_id"] == "doc 2"] == [row["words"] for row in alone]


def test_strings_are_read_as_bytes_are(shelf: Shelf, models: ModelCache):
    model = model_task(shelf.folder("bert"))
    texts = [*TEXTS, "", None]
    as_text, as_bytes = (
        explain_texts(some, make_task(model), model, "cpu")
        for some in (texts, [None if text is None else text.encode() for text in texts])
    )
    assert as_text == as_bytes
    (lone,) = explain_texts(["half \ud800 of a pair"], make_task(model), model, "cpu")
    assert lone.reason == "lone_surrogate"


def test_decoding_says_where_the_text_breaks():
    with pytest.raises(DocumentError, match=r"^invalid_utf8: byte 3 of 4 "):
        decode_document(b"caf\xe9", 10)


# --- splits, labels ---------------------------------------------------------------------------------------------


def test_documents_of_other_splits_are_skipped(shelf: Shelf, models: ModelCache):
    tasks = [model_task(shelf.folder("bert", seed=seed), split) for split, seed in ((0, 0), (4, 1))]
    batch = pa.concat_batches([stage(TEXTS[:1], splits=splits) for splits in ([0], [4], [0, 4], [], [1])])
    rows = explain([batch], make_task(*tasks))
    assert [(row["split"], row["explain_key"]) for row in rows] == [(0, "explain key 0")] * 2 + [
        (4, "explain key 4")
    ] * 2
    assert rows[0]["target_score"] == pytest.approx(rows[1]["target_score"], abs=BATCH_TOLERANCE)
    assert rows[0]["target_score"] != pytest.approx(rows[2]["target_score"], abs=1e-3)
    assert models.loads == 2


def test_model_without_documents_is_not_loaded(shelf: Shelf, models: ModelCache, tmp_path: Path):
    absent = ModelTask(1, "key", str(tmp_path / "absent"), "0" * 64)
    assert len(explain([stage(TEXTS[:1])], make_task(model_task(shelf.folder("bert")), absent))) == 1


def test_equal_texts_give_equal_rows(shelf: Shelf, models: ModelCache):
    rows = explain([stage([TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]])], make_task(model_task(shelf.folder("bert"))))
    first, _, *others = ({name: value for name, value in row.items() if name != "doc_id"} for row in rows)
    assert others == [first, first]


def test_label_ranks_of_a_multi_label_model(shelf: Shelf, models: ModelCache):
    folder = shelf.folder("bert", problem_type="multi_label_classification", seed=1)
    words = " ".join(TEXTS[:3]).replace("& ", "").split()
    texts = [" ".join(words[start : start + length]) for length in (1, 2, 3) for start in range(len(words) - length)]
    rows = explain(
        [stage(texts, labels=["politics"])], make_task(model_task(folder), options={"rule": "midpoint", "nodes": 2})
    )
    by_document: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_document.setdefault(row["doc_id"], []).append(row)
    assert list(by_document) == [f"doc {number}" for number in range(len(texts))]
    assert {len(mine) for mine in by_document.values() if mine[0]["status"] == "explained"} == {1, 2, 3}
    assert any(mine[0]["status"] == "no_label" for mine in by_document.values())
    for mine in by_document.values():
        assert [row["label_rank"] for row in mine] == list(range(len(mine)))
        if mine[0]["status"] == "no_label":
            assert mine[0]["label"] is mine[0]["words"] is mine[0]["probability"] is mine[0]["is_gold"] is None
            continue
        probabilities = [row["probability"] for row in mine]
        assert probabilities == sorted(probabilities, reverse=True)
        assert min(probabilities) > 0.5
        assert all(row["is_gold"] == (row["label"] == "politics") for row in mine)


# --- batches ----------------------------------------------------------------------------------------------------


def test_no_documents_give_no_rows(shelf: Shelf, models: ModelCache):
    task = make_task(model_task(shelf.folder("bert")))
    assert explain([], task) == explain([stage([])], task) == explain([stage([]), stage([])], task) == []
    assert models.loads == 0


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_so_many_labels_as_asked_are_explained(shelf: Shelf, models: ModelCache, top_k: int):
    rows = explain([stage(TEXTS[:2])], make_task(model_task(shelf.folder("bert")), top_k=top_k))
    assert [row["label_rank"] for row in rows] == [*range(top_k)] * 2
    probabilities = [row["probability"] for row in rows[:top_k]]
    assert probabilities == sorted(probabilities, reverse=True)


def test_gold_labels_are_explained_beside_the_predicted_one(shelf: Shelf, models: ModelCache):
    """Whatever the model predicts, each label once, most probable first; names that the model does not know are no rows."""
    every = make_task(model_task(shelf.folder("bert")), top_k=3)
    expected = {(row["doc_id"], row["label"]): row for row in explain([stage(TEXTS[:2])], every)}
    predicted = {doc: label for (doc, label), row in expected.items() if row["label_rank"] == 0}
    unlikely = next(label for (_, label), row in expected.items() if row["label_rank"] == 2)
    task = make_task(model_task(shelf.folder("bert")), gold=True)
    rows = explain([stage(TEXTS[:2], labels=[unlikely, "unknown"])], task)
    for doc, label in predicted.items():
        mine = [row for row in rows if row["doc_id"] == doc]
        assert [row["label"] for row in mine] == sorted(
            {label, unlikely}, key=lambda name: expected[doc, name]["label_rank"]
        )
        for rank, row in enumerate(mine):
            assert row["label_rank"] == rank
            assert row["is_gold"] == (row["label"] == unlikely)
            assert row["target_score"] == pytest.approx(expected[doc, row["label"]]["target_score"], abs=1e-5)
            found = {(word["word"], word["start"]): word["score"] for word in row["words"]}
            right = {(word["word"], word["start"]): word["score"] for word in expected[doc, row["label"]]["words"]}
            assert found == pytest.approx(right, abs=1e-4)
    without = explain([stage(TEXTS[:2])], task)
    assert [row["label"] for row in without] == list(predicted.values())


def test_a_text_with_different_gold_labels_is_explained_for_each(shelf: Shelf, models: ModelCache):
    task = make_task(model_task(shelf.folder("bert")), gold=True)
    labels = shelf.classifier("bert").labels
    rows = explain([stage(TEXTS[:1], labels=[label]) for label in labels], task)
    assert [row["label"] for row in rows if row["is_gold"]] == list(labels)
    # of three labels one is predicted, the others come beside it
    assert len(rows) == 1 + 2 + 2


def test_a_compiled_model_gives_the_rows_of_an_eager_one(shelf: Shelf, models: ModelCache, monkeypatch):
    """Two targets of one forward part too. The backend without code generation: the test must not need a compiler."""
    eager = explain([stage(TEXTS[:2])], make_task(model_task(shelf.folder("bert")), top_k=2))
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: compile_model(module, backend="aot_eager", **how)
    )
    monkeypatch.setattr(executor, "MODELS", ModelCache())
    compiled = explain([stage(TEXTS[:2])], make_task(model_task(shelf.folder("bert")), top_k=2, compile=True))
    assert_same(compiled, eager)


def test_bfloat16_is_another_model_in_the_cache(shelf: Shelf, models: ModelCache):
    exact, short = (
        explain([stage(TEXTS[:2])], make_task(model_task(shelf.folder("bert")), precision=precision, top_k=1))
        for precision in ("float32", "bfloat16")
    )
    assert models.loads == 2
    for row, other in zip(exact, short, strict=True):
        assert row["target_score"] != other["target_score"]
        assert row["target_score"] == pytest.approx(other["target_score"], abs=0.05)


def test_a_tokenizer_that_fails_costs_one_row(shelf: Shelf, models: ModelCache, monkeypatch: pytest.MonkeyPatch):
    """The texts are read in another thread: what goes wrong there reaches the row it belongs to."""
    encode = Classifier.encode

    def fail(classifier: Classifier, text: str, **shape: Any) -> Any:
        if "final" in text:
            raise RuntimeError("no such piece")
        return encode(classifier, text, **shape)

    monkeypatch.setattr(Classifier, "encode", fail)
    rows = explain([stage(["the cup", "the final", "a tax"])], make_task(model_task(shelf.folder("bert"))))
    assert [row["status"] for row in rows] == ["explained", "rejected", "explained"]
    assert rows[1]["reason"] == "not_tokenized"


def test_copies_of_a_text_stay_together(shelf: Shelf, models: ModelCache):
    """They are explained once, also across the end of a look-ahead."""
    copies = stage(["the cup"] * (LOOK_AHEAD_DOCUMENTS + 20))
    found = list(explain_batches(iter([copies]), make_task(model_task(shelf.folder("bert"))), "cpu"))
    assert [batch.num_rows for batch in found] == [LOOK_AHEAD_DOCUMENTS + 20]


def test_masks_have_spans(shelf: Shelf, models: ModelCache):
    options = {"steps": 5, "forced": 0.0}
    task = make_task(model_task(shelf.folder("bert")), method="marc.v1", options=options)
    (row,) = explain([stage(TEXTS[:1])], task)
    by_place = {word["start"]: word for word in row["words"]}
    assert row["spans"]
    for span in row["spans"]:
        inside = [by_place[start] for start in sorted(by_place) if span["start"] <= start < span["end"]]
        assert [word["word"] for word in inside] == span["words"]
        assert np.mean([word["score"] for word in inside]) == pytest.approx(span["score"])
        assert min(word["score"] for word in inside) >= 0.5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_batches_do_not_matter(shelf: Shelf, models: ModelCache, family: str):
    """More documents than one look ahead, so that a window ends inside a batch."""
    words = " ".join(TEXTS).split()
    count = LOOK_AHEAD_DOCUMENTS + 20
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, size=generator.integers(1, 8))) for _ in range(count)]
    whole = stage(texts)
    task = make_task(model_task(shelf.folder(family)), options={"rule": "midpoint", "nodes": 2})
    one = explain([whole], task)
    assert len(one) == count
    for size in (1, 7, 100, LOOK_AHEAD_DOCUMENTS):
        sliced = [whole.slice(start, size) for start in range(0, count, size)]
        assert explain([stage([]), *sliced], task) == one  # the same windows, so the same bits
    shuffled = generator.permutation(count)
    rows = sorted(explain([whole.take(pa.array(shuffled))], task), key=lambda row: int(row["doc_id"].split()[1]))
    assert_same(one, rows)


def test_rows_leave_before_the_last_batch_came(shelf: Shelf, models: ModelCache):
    """A partition may hold more documents than the memory does."""
    read = []

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(4):
            read.append(number)
            yield stage([f"tax {number} {place}" for place in range(LOOK_AHEAD_DOCUMENTS)])

    found = explain_batches(batches(), make_task(model_task(shelf.folder("bert"))), "cpu")
    assert next(found).num_rows == LOOK_AHEAD_DOCUMENTS
    assert read == [0, 1, 2], "the texts of one look-ahead are read while those of another are explained"


# --- models -----------------------------------------------------------------------------------------------------


def test_model_loads_once_over_many_batches_and_tasks(shelf: Shelf, models: ModelCache):
    task = make_task(model_task(shelf.folder("bert")))
    for _ in range(3):
        explain([stage(TEXTS)] * 3, task)
    assert models.loads == 1


def test_full_cache_drops_the_least_recently_used(shelf: Shelf):
    cache = ModelCache()
    tasks = [model_task(shelf.folder("bert", seed=seed), seed) for seed in (0, 1, 2)]

    def load(number: int) -> Classifier:
        return cache.load(tasks[number], make_task(*tasks, models_in_memory=2), "cpu")

    first, second = load(0), load(1)
    assert load(0) is first
    load(2)  # drops 1
    assert load(0) is first
    assert cache.loads == 3
    assert load(1) is not second
    assert cache.loads == 4


def test_dropped_model_is_gone_before_the_next_is_loaded(shelf: Shelf):
    """Two models at once would not fit a device that was planned for one."""
    cache, small = ModelCache(), make_task(models_in_memory=1)
    gc.collect()
    gc.disable()
    try:
        old = cache.load(model_task(shelf.folder("bert")), small, "cpu")
        parts = [weakref.ref(old), weakref.ref(old.model), weakref.ref(old._embeddings.weight)]
        del old
        cache.load(model_task(shelf.folder("bert", seed=1), 1), small, "cpu")
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


def test_models_are_told_apart_by_digest(shelf: Shelf, models: ModelCache):
    tasks = [model_task(shelf.folder("bert", seed=seed), split) for split, seed in ((0, 0), (1, 1), (2, 0))]
    rows = explain([stage(TEXTS[:1], splits=(0, 1, 2))], make_task(*tasks))
    scores = [row["target_score"] for row in rows]
    assert models.loads == 2
    assert scores[0] == scores[2] != scores[1]


def test_other_files_than_the_driver_saw_are_an_error(shelf: Shelf, models: ModelCache):
    model = dataclasses.replace(model_task(shelf.folder("bert")), digest="0" * 64)
    with pytest.raises(ModelError, match="must have the digest 000000000000"):
        explain([stage(TEXTS[:1])], make_task(model))
    assert models.loads == 0


def test_missing_model_is_an_error(models: ModelCache, tmp_path: Path):
    with pytest.raises(ModelError, match="absent"):
        explain([stage(TEXTS[:1])], make_task(ModelTask(0, "key", str(tmp_path / "absent"), "0" * 64)))


def test_lack_of_memory_is_remembered(shelf: Shelf, models: ModelCache):
    """Each window of documents used to find out anew how much fits, at the cost of a failed pass."""
    task = make_task(model_task(shelf.folder("bert")), budget_tokens=400)
    classifier = models.load(task.models[0], dataclasses.replace(task, models_in_memory=1), "cpu")
    failures = 0

    def fail_above_100_tokens(_: torch.nn.Module, __: Any, inputs: dict[str, torch.Tensor]) -> None:
        nonlocal failures
        if inputs["inputs_embeds"].shape[:2].numel() > 100:
            failures += 1
            raise torch.OutOfMemoryError("planted")

    unlimited = explain([stage(TEXTS)], task)
    handle = classifier.model.register_forward_pre_hook(fail_above_100_tokens, with_kwargs=True)
    try:
        first = explain([stage(TEXTS)], task)
        assert failures > 0
        learnt = failures
        second = explain([stage(TEXTS)], task)
        assert failures == learnt
    finally:
        handle.remove()
    assert_same(unlimited, first)
    assert_same(unlimited, second)


@pytest.mark.parametrize("budget_tokens", [16, None])
def test_budget_changes_no_number(shelf: Shelf, models: ModelCache, budget_tokens: int | None):
    model = model_task(shelf.folder("bert"))
    assert_same(
        explain([stage(TEXTS)], make_task(model)),
        explain([stage(TEXTS)], make_task(model, budget_tokens=budget_tokens)),
    )


# --- devices ----------------------------------------------------------------------------------------------------

CHOICES: list[tuple[str, list[str], int | None, int, str | type[Exception]]] = [
    # requested, addresses, local partition, GPUs that torch sees, device
    ("cpu", [], None, 0, "cpu"),
    ("cpu", [], 3, 2, "cpu"),
    ("cpu", ["1"], None, 2, "cpu"),
    ("auto", [], None, 0, "cpu"),
    ("auto", [], 0, 0, "cpu"),
    ("auto", [], None, 2, "cpu"),  # a cluster's task was assigned none
    ("auto", [], 3, 2, "cuda:1"),
    ("auto", ["1"], None, 2, "cuda:1"),
    ("auto", ["1"], 0, 2, "cuda:1"),
    ("gpu", ["0"], None, 1, "cuda:0"),
    ("gpu", [], 5, 4, "cuda:1"),
    ("gpu", [], None, 0, DeviceError),
    ("gpu", [], None, 4, DeviceError),
    ("gpu", [], 0, 0, DeviceError),
    ("gpu", ["0"], None, 0, DeviceError),
    ("auto", ["0"], None, 0, DeviceError),
    ("auto", ["2"], None, 2, DeviceError),
    ("auto", ["-1"], None, 2, DeviceError),
    ("auto", ["²"], None, 2, DeviceError),
    ("gpu", ["GPU-5fd4f6c1"], None, 2, DeviceError),  # torch is loaded: too late to choose by UUID
]


@pytest.mark.parametrize(("requested", "addresses", "partition", "count", "device"), CHOICES)
def test_choose_device(
    monkeypatch: pytest.MonkeyPatch,
    requested: Any,
    addresses: list[str],
    partition: int | None,
    count: int,
    device: Any,
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    if isinstance(device, str):
        assert choose_device(requested, addresses, local_partition=partition) == device
    else:
        with pytest.raises(device, match="would have run on"):
            choose_device(requested, addresses, local_partition=partition)


def test_device_by_uuid_is_set_before_torch_and_kept():
    """A MIG slice has no number; Spark uses the worker again for the next task of the same slice."""
    code = """
import os, sys
from lexplain.executor import choose_device
from lexplain.errors import DeviceError
assert "torch" not in sys.modules
for _ in range(2):
    try:
        choose_device("gpu", ["MIG-a"], local_partition=None)
    except DeviceError as error:  # there is no such device here, but it was looked for by number
        assert "'0' is none of the 0 GPUs" in str(error), error
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-a" and "torch" in sys.modules
try:
    choose_device("gpu", ["MIG-b"], local_partition=None)
except DeviceError as error:
    assert "'MIG-b' is none of" in str(error), error
else:
    raise SystemExit("took another device than it was given")
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PYTHONPATH"] = str(Path(lexplain.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


# --- the task -------------------------------------------------------------------------------------------------


def plain_values(value: object) -> Iterator[object]:
    """Everything inside a task that is no container."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from plain_values(getattr(value, one.name))
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from plain_values(name)
            yield from plain_values(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from plain_values(part)
    else:
        yield value


def test_task_pickles_and_holds_plain_values_only(shelf: Shelf, models: ModelCache):
    task = make_task(model_task(shelf.folder("bert")))
    explain([stage(TEXTS[:1])], task)  # using it must not hang a model on it
    pickled = cloudpickle.dumps(task)
    assert cloudpickle.loads(pickled) == task
    assert len(pickled) < 2000
    assert {type(value) for value in plain_values(task)} <= {str, int, float, bool, type(None)}


# --- words of labelled documents --------------------------------------------------------------------------------


def test_word_keys_of_labelled_documents():
    schema = pa.schema([("doc_id", pa.string()), ("text", pa.binary()), ("labels", pa.list_(pa.string())),
                        ("words", pa.list_(pa.string())), ("bucket", pa.int32())])  # fmt: skip
    rows: list[tuple[bytes | None, list[str] | None, list[str] | None]] = [
        (b"The TAX, the tax!", ["a"], ["tax", "the"]),
        ("Ko\u0308ttbullar 今日は".encode(), ["a", "b"], sorted(["köttbullar", "今日", "は"])),
        (b"The tax", None, None),
        (b"The tax", [], None),
        (b"caf\xe9", ["a"], []),
        (None, ["a"], []),
        (b"...", ["a"], []),
    ]
    batch = pa.RecordBatch.from_pylist(
        [{"doc_id": "x", "text": text, "labels": labels} for text, labels, _ in rows], schema
    )
    (filled,) = add_word_keys(iter([batch]))
    assert filled.schema == schema
    assert filled["words"].to_pylist() == [words for _, _, words in rows]
    assert filled.drop_columns("words") == batch.drop_columns("words")
    (empty,) = add_word_keys(iter([batch.slice(0, 0)]))
    assert empty.schema == schema
    assert empty.num_rows == 0
