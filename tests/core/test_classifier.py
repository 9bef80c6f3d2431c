"""Classifier: what is loaded, what is refused, windows, embeddings, baselines, labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.models import FAMILIES, TEXTS, Shelf, save_classifier
from lexplain.classifier import Classifier
from lexplain.errors import ModelError

LONG_TEXT = " ".join(f"the bank warned of a weak quarter and {number} rising costs" for number in range(40))


def edited_config(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a model folder with another config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


# --- what is loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_model_on_ids(shelf: Shelf, family: str) -> None:
    classifier = shelf.classifier(family)
    model = AutoModelForSequenceClassification.from_pretrained(shelf.folder(family)).eval()
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder(family))
    batch = classifier.collate(
        [classifier.encode(text, max_tokens=64, overlap=0, max_windows=1).windows[0] for text in TEXTS]
    )
    with torch.no_grad():
        found = classifier.logits(classifier.embed(batch.ids), batch.mask, batch.token_types)
        expected = torch.cat(
            [model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits for text in TEXTS]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_e14_inputs_equal_the_tokenizers_own(shelf: Shelf, family: str) -> None:
    """transformers-interpret gave the last [SEP] token type 1 and respaced the text first."""
    classifier = shelf.classifier(family)
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder(family))
    for text in ("phone", "A  better\tteam,scored twice!", "Räksmörgås & 今日は晴れです", ""):
        expected = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=True)
        encoding = classifier.encode(text, max_tokens=64, overlap=8, max_windows=None)
        (window,) = encoding.windows
        content = [flag == 0 for flag in expected["special_tokens_mask"]]
        assert list(window.ids) == expected["input_ids"]
        assert [not flag for flag in window.special] == content
        assert window.token_types == (expected.get("token_type_ids") if window.token_types is not None else None)
        assert encoding.offsets.tolist() == [
            list(span) for span, kept in zip(expected["offset_mapping"], content, strict=True) if kept
        ]


def test_e13_xlm_roberta_takes_its_own_token_types_and_positions(shelf: Shelf) -> None:
    """transformers-interpret sent token type 1 to a type vocabulary of 1, and positions from 0: IndexError."""
    classifier = shelf.classifier("xlm-roberta")
    encoding = classifier.encode(LONG_TEXT, max_tokens=classifier.max_tokens, overlap=0, max_windows=1)
    batch = classifier.collate(encoding.windows)
    model = AutoModelForSequenceClassification.from_pretrained(shelf.folder("xlm-roberta")).eval()
    with torch.no_grad():
        found = classifier.logits(classifier.embed(batch.ids), batch.mask, batch.token_types)
        torch.testing.assert_close(found, model(input_ids=batch.ids).logits, rtol=1e-4, atol=1e-5)
    assert encoding.windows[0].token_types is None


@pytest.mark.parametrize("family", FAMILIES)
def test_all_positions_of_the_model_can_be_used(shelf: Shelf, family: str) -> None:
    classifier = shelf.classifier(family)
    assert classifier.max_tokens == 64
    batch = classifier.collate(classifier.encode(LONG_TEXT, max_tokens=64, overlap=0, max_windows=1).windows)
    assert batch.ids.shape == (1, 64)
    assert classifier.logits(classifier.embed(batch.ids), batch.mask, batch.token_types).shape == (1, 3)


def test_weights_are_frozen_and_dropout_is_off(shelf: Shelf) -> None:
    model = shelf.classifier("bert").model
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_pickle_is_loaded_only_where_it_is_allowed(shelf: Shelf, tmp_path: Path) -> None:
    folder = shutil.copytree(shelf.folder("bert"), tmp_path / "pickled")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="allow_pickle: true"):
        Classifier.load(folder)
    allowed = Classifier.load(folder, allow_pickle=True)
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    expected = shelf.classifier("bert")
    torch.testing.assert_close(
        allowed.logits(allowed.embed(ids), mask, None), expected.logits(expected.embed(ids), mask, None)
    )


def test_a_shorter_type_keeps_logits_and_embeddings_in_float32(shelf: Shelf) -> None:
    short, long = shelf.classifier("bert", dtype=torch.bfloat16), shelf.classifier("bert")
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert short.dtype == torch.bfloat16
    assert short.embed(ids).dtype == torch.float32
    found, expected = short.logits(short.embed(ids), mask, None), long.logits(long.embed(ids), mask, None)
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).abs().max()) < 0.1


# --- what is refused --------------------------------------------------------------------------------------------


def test_e23_a_decoder_is_refused(shelf: Shelf) -> None:
    """With embeddings a GPT-2 classifier cannot see the padding and pools another token; it only warns."""
    with pytest.raises(ModelError, match=r"gpt2.*another function.*BERT, RoBERTa") as caught:
        Classifier.load(shelf.folder("gpt2"))
    assert "its logits differ by" in str(caught.value)


def test_a_model_that_takes_no_embeddings_is_refused(tmp_path: Path, shelf: Shelf) -> None:
    """Longformer has no working `inputs_embeds`."""
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder("roberta"))
    config = transformers.LongformerConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=66, attention_window=8, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"longformer.*TypeError"):
        Classifier.load(tmp_path)


def test_a_base_model_without_a_head_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    """transformers draws a missing head at random and only logs it."""
    model = AutoModelForSequenceClassification.from_pretrained(shelf.folder("bert"))
    model.bert.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(shelf.folder("bert")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks the weights classifier\.bias, classifier\.weight"):
        Classifier.load(tmp_path)


def test_a_name_is_not_looked_up_on_the_internet(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"folder with a config\.json"):
        Classifier.load("bert-base-uncased")
    with pytest.raises(ModelError, match=r"folder with a config\.json"):
        Classifier.load(tmp_path)


def test_code_in_the_folder_is_not_run(shelf: Shelf, tmp_path: Path) -> None:
    auto_map = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Evil"}
    folder = edited_config(shelf.folder("bert"), tmp_path / "evil", auto_map=auto_map, model_type="evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Classifier.load(folder)
    assert not (tmp_path / "was-run").exists()


def test_damaged_weights_are_a_model_error(shelf: Shelf, tmp_path: Path) -> None:
    folder = shutil.copytree(shelf.folder("bert"), tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        Classifier.load(folder)


@pytest.mark.parametrize("names", [{"0": "sport", "1": "sport", "2": "tech"}, {"0": "a", "1": "b", "3": "c"}])
def test_label_names_that_clash_are_refused(shelf: Shelf, tmp_path: Path, names: dict[str, str]) -> None:
    folder = edited_config(shelf.folder("bert"), tmp_path / "labels", id2label=names)
    with pytest.raises(ModelError, match="must name each logit once"):
        Classifier.load(folder)


@pytest.mark.parametrize(
    ("max_tokens", "overlap", "message"),
    [(65, 0, "must be at most 64"), (2, 0, "must be above 2"), (16, 14, "between 0 and 13"), (16, -1, "between 0")],
)
def test_windows_that_do_not_fit_are_refused(shelf: Shelf, max_tokens: int, overlap: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        shelf.classifier("bert").encode("phone", max_tokens=max_tokens, overlap=overlap, max_windows=None)


# --- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overlap", [0, 5])
def test_windows_are_slices_of_the_whole_text_in_the_tokenizers_frame(shelf: Shelf, family: str, overlap: int) -> None:
    classifier = shelf.classifier(family)
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder(family))
    whole = tokenizer(LONG_TEXT, add_special_tokens=False, return_offsets_mapping=True)
    first, last = tokenizer("")["input_ids"]
    encoding = classifier.encode(LONG_TEXT, max_tokens=20, overlap=overlap, max_windows=None)
    assert encoding.offsets.tolist() == [list(span) for span in whole["offset_mapping"]]
    assert encoding.windows[-1].stop == len(whole["input_ids"])
    for number, window in enumerate(encoding.windows):
        assert window.start == number * (18 - overlap)
        assert list(window.ids) == [first, *whole["input_ids"][window.start : window.stop], last]
        assert list(window.special) == [True, *[False] * (window.stop - window.start), True]
    assert all(window.stop - window.start == 18 for window in encoding.windows[:-1])


def test_only_the_first_windows_are_kept(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    whole = classifier.encode(LONG_TEXT, max_tokens=20, overlap=4, max_windows=None)
    head = classifier.encode(LONG_TEXT, max_tokens=20, overlap=4, max_windows=2)
    assert len(whole.windows) > 10
    assert head.windows == whole.windows[:2]
    assert head.offsets.tolist() == whole.offsets[: head.windows[1].stop].tolist()


def test_a_long_text_gives_no_warning(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = shelf.classifier("bert")._tokenizer
    tokenizer.deprecation_warnings.clear()
    with caplog.at_level("WARNING", logger="transformers"):
        shelf.classifier("bert").encode(LONG_TEXT, max_tokens=64, overlap=0, max_windows=None)
    assert not caplog.records


def test_a_tokenizer_that_truncates_on_the_left_still_starts_at_the_head(shelf: Shelf, tmp_path: Path) -> None:
    folder = shutil.copytree(shelf.folder("bert"), tmp_path / "left")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": "left"}))
    encoding = Classifier.load(folder).encode(LONG_TEXT, max_tokens=20, overlap=4, max_windows=1)
    assert encoding.offsets[0, 0] == 0


def test_padding_is_on_the_right(shelf: Shelf) -> None:
    classifier = shelf.classifier("roberta")
    windows = [
        classifier.encode(text, max_tokens=64, overlap=0, max_windows=1).windows[0] for text in ("phone", TEXTS[0])
    ]
    batch = classifier.collate(windows)
    lengths = [len(window.ids) for window in windows]
    assert batch.mask.sum(1).tolist() == lengths
    assert batch.mask[0, : lengths[0]].all()
    assert (batch.ids[0, lengths[0] :] == 1).all()
    assert not batch.special[0, lengths[0] :].any()


# --- baselines --------------------------------------------------------------------------------------------------


def test_a_baseline_replaces_content_only(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    windows = [classifier.encode(text, max_tokens=64, overlap=0, max_windows=1).windows[0] for text in TEXTS[:2]]
    batch = classifier.collate(windows)
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder("bert"))
    for token, number in (("mask", 4), ("pad", 0), ("-", tokenizer.convert_tokens_to_ids("-"))):
        found = classifier.baseline_ids(batch.ids, batch.special, batch.mask, token)
        content = batch.mask & ~batch.special
        assert (found[content] == number).all()
        assert (found[~content] == batch.ids[~content]).all()


def test_the_mask_baseline_is_padding_where_there_is_no_mask_token(shelf: Shelf, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "no-mask", "bert")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Classifier.load(folder).find_token("mask") == 0


def test_an_unknown_baseline_token_is_refused(shelf: Shelf) -> None:
    with pytest.raises(ModelError, match="baseline='nonesuch'"):
        shelf.classifier("bert").find_token("nonesuch")


# --- labels and probabilities -------------------------------------------------------------------------------------


def test_labels_stand_in_the_order_of_the_logits_and_na_is_a_label(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", labels=(*tuple(f"class {number}" for number in range(11)), "NA"))
    assert classifier.labels == (*(f"class {number}" for number in range(11)), "NA")
    assert shelf.classifier("bert").labels[2] == "NA"


def test_single_label_is_a_softmax_and_its_most_probable_label(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    found = classifier.probabilities(logits)
    exponents = np.exp(logits.numpy())
    np.testing.assert_allclose(found.numpy(), exponents / exponents.sum(1, keepdims=True), rtol=1e-6)
    assert classifier.problem == "single_label"
    assert [classifier.predict(row) for row in found] == [[1], [0]]


def test_multi_label_is_one_sigmoid_a_label_and_every_label_above_half(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", problem_type="multi_label_classification")
    found = classifier.probabilities(torch.tensor([[1.0, -1.0, 2.0], [-3.0, -1.0, 0.0]]))
    np.testing.assert_allclose(found[0].numpy(), 1 / (1 + np.exp([-1.0, 1.0, -2.0])), rtol=1e-6)
    assert classifier.problem == "multi_label"
    assert [classifier.predict(row) for row in found] == [[2, 0], []]


def test_one_logit_is_a_label_and_its_opposite(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", labels=("toxic",))
    ids = torch.tensor([[2, 9, 8, 7, 3]])
    model = AutoModelForSequenceClassification.from_pretrained(shelf.folder("bert", labels=("toxic",))).eval()
    with torch.no_grad():
        z = model(input_ids=ids).logits[0, 0].item()
    logits = classifier.logits(classifier.embed(ids), torch.ones_like(ids, dtype=torch.bool), None)
    assert classifier.problem == "binary"
    assert classifier.labels == ("not toxic", "toxic")
    assert logits[0].tolist() == pytest.approx([-z, z], abs=1e-5)
    probabilities = classifier.probabilities(logits)[0]
    assert probabilities.tolist() == pytest.approx([1 / (1 + np.exp(z)), 1 / (1 + np.exp(-z))], abs=1e-6)
    assert classifier.predict(probabilities) == [int(z > 0)]


def test_a_regression_of_several_outputs_is_refused(shelf: Shelf) -> None:
    with pytest.raises(ModelError, match="must have one output"):
        shelf.classifier("bert", labels=("stars", "length"), problem_type="regression")


def test_a_regression_has_no_probabilities(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", labels=("stars",), problem_type="regression")
    assert classifier.problem == "regression"
    with pytest.raises(ModelError, match="must be a classification"):
        classifier.probabilities(torch.zeros(1, 1))
