"""TextCNN: its logits, padding, words and vectors, and that it is fine-tuned, saved and explained like any other."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import oracles
from core.models import CLUES, FILLER, LINES, TEXTS, Shelf
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.errors import ModelError
from lexplain.finetune import Recipe, fine_tune
from lexplain.methods import find_method
from lexplain.textcnn import TextCNNForSequenceClassification, find_windows, read_vectors, save_textcnn
from lexplain.words import segment

RECIPE = Recipe(epochs=8, patience=8, learning_rate=1e-2, batch_size=8, max_tokens=400)


def read(classifier: Classifier, text: str) -> list[int]:
    return list(classifier.encode(text, max_tokens=64, overlap=0, max_windows=1).windows[0].ids)


# --- logits and padding -----------------------------------------------------------------------------------------


def test_logits_are_those_of_the_equations(shelf: Shelf) -> None:
    classifier = shelf.classifier("textcnn", dtype=torch.float64)
    filters, output, vectors = oracles.textcnn_weights(classifier.model)
    for text in TEXTS:
        ids = read(classifier, text)
        with torch.no_grad():
            logits = classifier.model(input_ids=torch.tensor([ids])).logits[0]
        for label, logit in enumerate(logits.tolist()):
            score, _ = oracles.textcnn_relevance(vectors[ids], filters, output, label, 0.01, 1.0)
            assert logit == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_logit_even_where_it_would_win(shelf: Shelf, side: str) -> None:
    """With filters that real words push below zero, a window of zeros would win every maximum."""
    classifier = Classifier.load(shelf.folder("textcnn"), dtype=torch.float64)
    model = classifier.model
    with torch.no_grad():
        model.embeddings.weight.abs_()
        for convolution in model.convolutions:
            convolution.weight.abs_().neg_()
            convolution.bias.fill_(9.0)
        model.embeddings.weight[classifier.find_token("pad")] = 0.0
    ids = [read(classifier, text) for text in TEXTS]
    longest = max(map(len, ids)) + 3
    pads = [[0] * (longest - len(each)) for each in ids]
    rows = [pad + each if side == "left" else each + pad for each, pad in zip(ids, pads, strict=True)]
    mask = torch.tensor([[0] * len(pad) + [1] * len(each) for each, pad in zip(ids, pads, strict=True)])
    mask = mask if side == "left" else mask.flip(1)
    with torch.no_grad():
        together = model(input_ids=torch.tensor(rows), attention_mask=mask).logits
        unmasked = model(input_ids=torch.tensor(rows)).logits
        embeddings = model.embeddings(torch.tensor(rows))
        embeddings[mask == 0] = 7.0  # nor does it matter what stands there
        embedded = model(inputs_embeds=embeddings, attention_mask=mask).logits
    filters, output, vectors = oracles.textcnn_weights(model)
    for row, each in enumerate(ids):
        for label in range(3):
            score, _ = oracles.textcnn_relevance(vectors[each], filters, output, label, 0.01, 1.0)
            assert together[row, label].item() == pytest.approx(score, abs=1e-10)
            assert embedded[row, label].item() == pytest.approx(score, abs=1e-10)
            assert unmasked[row, label].item() != pytest.approx(score, abs=1e-3), "padding must be able to win here"


def test_windows_that_count() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert find_windows(mask, 2).long().tolist() == [
        [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0],
    ]  # fmt: skip


def test_texts_without_tokens_have_the_logits_of_zeros(shelf: Shelf) -> None:
    """Fine-tuning may meet an empty text, alone in a batch or not."""
    model = shelf.classifier("textcnn").model
    with torch.no_grad():
        empty = model(input_ids=torch.zeros(2, 0, dtype=torch.long)).logits
        padded = model(input_ids=torch.zeros(1, 5, dtype=torch.long), attention_mask=torch.zeros(1, 5)).logits
        pooled = torch.cat([convolution.bias for convolution in model.convolutions]).relu()
        expected = model.classifier(pooled)
    torch.testing.assert_close(empty, expected.expand(2, -1))
    torch.testing.assert_close(padded, expected[None])


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The BANK, don't!", ["The", "BANK", ",", "don't", "!"]),
        ("l’heure 3.5%", ["l’heure", "3", ".", "5", "%"]),
        ("今日は", ["今", "日", "は"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("\U0001f600 Köttbullar\tİzmir", ["\U0001f600", "Köttbullar", "İzmir"]),
        ("a_b  c\n'd'", ["a_b", "c", "'", "d", "'"]),
    ],
)
def test_tokens_and_their_characters(shelf: Shelf, text: str, tokens: list[str]) -> None:
    offsets = shelf.classifier("textcnn").encode(text, max_tokens=64, overlap=0, max_windows=1).offsets.tolist()
    assert [text[start:end] for start, end in offsets] == tokens


@given(text=st.text(max_size=20))
@settings(max_examples=60)
def test_a_text_with_a_word_has_a_token(shelf: Shelf, text: str) -> None:
    offsets = shelf.classifier("textcnn").encode(text, max_tokens=64, overlap=0, max_windows=1).offsets
    assert all(0 <= start < end <= len(text) for start, end in offsets.tolist())
    for word in segment(text):
        assert ((offsets[:, 0] < word.end) & (word.start < offsets[:, 1])).any()


def test_known_words_by_frequency_then_by_word(tmp_path: Path) -> None:
    texts = ["b a C c", "a b. D", "A b . c"]
    save_textcnn(tmp_path / "all", texts, train_embeddings=True, embedding_size=2, filters=1)
    save_textcnn(tmp_path / "two", texts, train_embeddings=True, embedding_size=2, filters=1, min_count=1, max_words=2)
    every = AutoTokenizer.from_pretrained(tmp_path / "all")
    assert every.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4, ".": 5}
    assert AutoTokenizer.from_pretrained(tmp_path / "two").get_vocab() == {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}
    assert every("A d c")["input_ids"] == [2, 1, 4]


def test_the_absence_of_a_word_is_padding(shelf: Shelf) -> None:
    classifier = shelf.classifier("textcnn")
    assert classifier.find_token("mask") == classifier.find_token("pad") == 0
    assert classifier.find_token("bank") > 1
    assert not classifier.embed(torch.tensor([[0]])).any()


# --- vectors ----------------------------------------------------------------------------------------------------


def test_given_vectors_are_found_by_folded_word(tmp_path: Path) -> None:
    words = ["Bank", "bank", "PARTY", "nowhere"]
    vectors = np.arange(12, dtype=np.float64).reshape(4, 3) + 100
    save_textcnn(tmp_path, LINES, vectors=(words, vectors), filters=4, min_count=1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(model, TextCNNForSequenceClassification)
    vocabulary = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    weight = model.embeddings.weight.detach()
    assert weight[vocabulary["bank"]].tolist() == [100, 101, 102]
    assert weight[vocabulary["party"]].tolist() == [106, 107, 108]
    drawn = [row for word, row in vocabulary.items() if word not in ("bank", "party", "[PAD]")]
    assert 0.7 < float(weight[drawn].std()) / vectors.std() < 1.4
    assert not weight[0].any()


def test_the_same_seed_draws_the_same_folder(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_textcnn(tmp_path / name, LINES, train_embeddings=True, embedding_size=4, filters=4, seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "train_embeddings=False must be true"),
        ({"vectors": (["a"], np.zeros((2, 3)))}, r"vectors\.shape=\(2, 3\) must be \(V, D\)"),
        ({"train_embeddings": True, "min_count": 99}, "min_count=99 must leave words"),
    ],
)
def test_a_base_that_could_not_work_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        save_textcnn(tmp_path / "model", LINES, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "model").exists()


# --- fine-tuned, saved, explained -------------------------------------------------------------------------------


def plant(count: int) -> tuple[list[str], list[list[str]]]:
    """Texts in which one word decides the label, some of them long."""
    draw = random.Random(0)
    texts, labels = [], []
    for number in range(count):
        label = draw.choice(list(CLUES))
        words = [*draw.choices(FILLER, k=300 if number % 20 == 0 else draw.randint(1, 14)), CLUES[label]]
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append([label])
    return texts, labels


def tune(base: Path, folder: Path, recipe: Recipe = RECIPE) -> float:
    texts, labels = plant(180)
    scores = fine_tune(
        base, texts, labels, [number % 3 > 0 for number in range(len(texts))], label_names=list(CLUES),
        multi_label=False, recipe=recipe, seed=1, folder=folder,
    )  # fmt: skip
    return scores.macro_f1


@pytest.mark.parametrize("train_embeddings", [False, True], ids=["frozen", "trained"])
def test_a_planted_word_is_learned_and_explained(tmp_path: Path, train_embeddings: bool) -> None:
    texts, _ = plant(180)
    words = [*FILLER, *CLUES.values()]
    vectors = np.random.default_rng(0).normal(0, 0.4, (len(words), 16))
    base = tmp_path / "base"
    save_textcnn(base, texts, vectors=(words, vectors), train_embeddings=train_embeddings, filters=24)
    assert tune(base, tmp_path / "model") == 1.0
    before, after = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("base", "model"))
    assert torch.equal(before.embeddings.weight, after.embeddings.weight) != train_embeddings
    assert not torch.equal(before.convolutions[0].weight, after.convolutions[0].weight)
    assert not after.embeddings.weight[0].any()
    classifier = Classifier.load(tmp_path / "model")
    for method in ("integrated_gradients", "lrp"):
        explainer = Explainer(classifier, find_method(method), {}, max_tokens=400, overlap=0, max_windows=1,
                              merge="sum", budget_tokens=4000)  # fmt: skip
        for label, clue in CLUES.items():
            ((found,),) = explainer.explain([f"the new {clue} was said of the phone"])
            assert found.label == label
            assert found.words[0][0].key == clue


def test_a_head_alone_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    """Its filters are what is to be learned; no text was read to make them."""
    with pytest.raises(ModelError, match=r"train='head'.*TextCNN.*no encoder.*Write train: full"):
        tune(shelf.folder("textcnn"), tmp_path / "model", replace(RECIPE, train="head", max_tokens=64))
    assert not (tmp_path / "model").exists()


def test_a_fresh_process_loads_a_folder_through_the_classifier_alone(shelf: Shelf) -> None:
    folder, text = shelf.folder("textcnn"), TEXTS[0]
    code = (
        f"import torch; from lexplain.classifier import Classifier; c = Classifier.load({str(folder)!r})\n"
        f"w = c.encode({text!r}, max_tokens=64, overlap=0, max_windows=1).windows; b = c.collate(w)\n"
        f"print([float(x).hex() for x in c.logits(c.embed(b.ids), b.mask, None)[0]], c.max_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    classifier = shelf.classifier("textcnn")
    logits = classifier.model(input_ids=torch.tensor([read(classifier, text)])).logits[0]
    assert done.stdout.strip() == f"{[float(logit).hex() for logit in logits]} 64"


def test_integrated_gradients_is_complete(shelf: Shelf) -> None:
    explainer = Explainer(
        shelf.classifier("textcnn"), find_method("integrated_gradients"), {"rule": "midpoint", "nodes": 300}, max_tokens=12, overlap=2,
        max_windows=None, merge="sum", budget_tokens=2000,
    )  # fmt: skip
    for outcome in explainer.explain(TEXTS):
        (found,) = outcome
        total = sum(score for _, score in found.words) + found.other_score
        assert total == pytest.approx(found.target_score - found.baseline_score, abs=0.02)


@pytest.mark.parametrize("first", ["", "3 2\n"])
def test_vectors_are_read_as_glove_and_word2vec_write_them(tmp_path: Path, first: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(first + "the 0.5 -1\n. . . 1e-3 2\nété 0 3 \n", encoding="utf-8")
    words, vectors = read_vectors(path)
    assert words == ["the", ". . .", "été"]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [[0.5, -1.0], [1e-3, 2.0], [0.0, 3.0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2\nb 1\n", "line 2 must be a word and 2 numbers"),
        ("a 1 2\nb 1 x\n", "line 2 must be a word and 2 numbers"),
        ("a 1 2\nb 1 nan\n", "line 2 must be a word and 2 numbers"),
        ("a\n", "line 1 must be a word and 1 numbers"),
        ("3 2\n", "holds no vector"),
        ("", "holds no vector"),
    ],
)
def test_files_that_are_no_vectors_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        read_vectors(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_vectors(tmp_path / "none.txt")
    path.write_bytes(b"caf\xe9 1 2\n")
    with pytest.raises(ModelError, match="cannot be read"):
        read_vectors(path)
