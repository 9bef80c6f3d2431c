"""Fine-tuning: what it learns, what it saves, and that the same inputs give the same weights."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from core.models import CLUES, FAMILIES, FILLER, save_classifier, save_trainable
from lexplain.classifier import Classifier
from lexplain.errors import CorpusError, ModelError
from lexplain.finetune import RECORD_FILE, Recipe, Scores, f1_scores, fine_tune
from lexplain.model_store import digest_folder

FAST = Recipe(epochs=3, learning_rate=3e-3, batch_size=8, max_tokens=32)


@dataclass(frozen=True)
class Corpus:
    """Texts in which one word decides each label; a third is held out."""

    texts: list[str]
    labels: list[list[str]]
    in_training: list[bool]


def plant(n: int, *, labels_per_text: Sequence[int] = (1,), seed: int = 0) -> Corpus:
    draw = random.Random(seed)
    texts, labels = [], []
    for number in range(n):
        names = draw.sample(list(CLUES), labels_per_text[number % len(labels_per_text)])
        words = draw.choices(FILLER, k=draw.randint(2, 14)) + [CLUES[name] for name in names] * 2
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(names)
    return Corpus(texts, labels, [number % 3 > 0 for number in range(n)])


def tune(base: Path, corpus: Corpus, folder: Path, recipe: Recipe = FAST, **options: object) -> Scores:
    settings = {"label_names": list(CLUES), "multi_label": False, "seed": 1, **options}
    return fine_tune(base, corpus.texts, corpus.labels, corpus.in_training, recipe=recipe, folder=folder, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trainable(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return plant(90)


def test_a_planted_word_is_learned(base: Path, tmp_path: Path) -> None:
    scores = tune(base, plant(240), tmp_path / "model", replace(FAST, epochs=12, patience=12))
    assert scores.macro_f1 == scores.micro_f1 == 1.0
    assert scores.label_f1 == dict.fromkeys(CLUES, 1.0)
    assert (scores.n_train, scores.n_test) == (160, 80)


def test_several_labels_a_text_and_none(base: Path, tmp_path: Path) -> None:
    corpus = plant(300, labels_per_text=(0, 1, 2, 3, 1))
    recipe = replace(FAST, epochs=12, patience=12)
    scores = tune(base, corpus, tmp_path / "model", recipe, multi_label=True)
    assert scores.macro_f1 == 1.0
    classifier = Classifier.load(tmp_path / "model")
    assert classifier.problem == "multi_label"
    assert classifier.labels == tuple(CLUES)


def test_the_saved_model_gives_the_scores(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    scores = tune(base, corpus, tmp_path / "model")
    gold, predicted, loss = predict(tmp_path / "model", corpus)
    macro, micro, by_label = f1_scores(gold, predicted)
    assert (scores.macro_f1, scores.micro_f1) == pytest.approx((macro, micro))
    assert list(scores.label_f1) == list(CLUES)
    assert list(scores.label_f1.values()) == pytest.approx(by_label.tolist())
    assert scores.evaluation_loss == pytest.approx(loss, rel=1e-4)


def predict(folder: Path, corpus: Corpus) -> tuple[np.ndarray, np.ndarray, float]:
    """Held-out gold and predicted labels and mean loss, one text at a time with transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = [model.config.id2label[index] for index in range(len(CLUES))]
    gold, predicted, losses = [], [], []
    for text, (label,), trains in zip(corpus.texts, corpus.labels, corpus.in_training, strict=True):
        if trains:
            continue
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=FAST.max_tokens, return_tensors="pt")).logits[
                0
            ]
        gold.append([name == label for name in names])
        predicted.append([index == int(logits.argmax()) for index in range(len(names))])
        losses.append(-float(logits.log_softmax(0)[names.index(label)]))
    return np.array(gold), np.array(predicted), float(np.mean(losses))


def test_same_seed_same_weights(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(5)
    tune(base, corpus, tmp_path / "first")
    after_first = torch.get_rng_state()
    torch.manual_seed(6)
    copy = shutil.copytree(base, tmp_path / "elsewhere")
    tune(copy, corpus, tmp_path / "second")
    tune(base, corpus, tmp_path / "other", seed=2)
    assert digest_folder(tmp_path / "first") == digest_folder(tmp_path / "second")
    assert digest_folder(tmp_path / "first") != digest_folder(tmp_path / "other")
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), after_first), "the caller's random numbers were used up"


def test_the_output_layer_is_drawn_anew(tmp_path: Path, corpus: Corpus) -> None:
    """A base that was fine-tuned on these labels must not bring an output layer that saw the held-out texts."""
    base = save_classifier(tmp_path / "base", "bert", labels=list(CLUES))
    recipe = replace(FAST, learning_rate=1e-12)
    tune(base, corpus, tmp_path / "model", recipe)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    assert not torch.allclose(before["classifier.weight"], after["classifier.weight"], atol=1e-2)
    assert torch.allclose(
        before["bert.encoder.layer.0.output.dense.weight"], after["bert.encoder.layer.0.output.dense.weight"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_trained_on_features_is_the_saved_model(family: str, tmp_path: Path) -> None:
    base = save_classifier(tmp_path / "base", family, labels=("one", "two"))
    corpus = plant(90)
    recipe = replace(FAST, train="head", epochs=4, learning_rate=1e-2)
    scores = tune(base, corpus, tmp_path / "model", recipe, features=tmp_path / "features")
    gold, predicted, loss = predict(tmp_path / "model", corpus)
    assert scores.evaluation_loss == pytest.approx(loss, rel=1e-4)
    assert scores.micro_f1 == pytest.approx(f1_scores(gold, predicted)[1])
    assert (
        scores.evaluation_loss
        < tune(base, corpus, tmp_path / "still", replace(recipe, learning_rate=1e-12)).evaluation_loss
    )
    assert_encoder_frozen(base, tmp_path / "model")


def assert_encoder_frozen(base: Path, folder: Path) -> None:
    before, after = (AutoModel.from_pretrained(path).state_dict() for path in (base, folder))
    assert set(before) == set(after)
    for name, weight in before.items():
        if not name.startswith("pooler."):
            assert torch.equal(weight, after[name]), name


def test_mean_pooling_heads(tmp_path: Path, corpus: Corpus) -> None:
    base = save_classifier(tmp_path / "base", "modernbert", labels=("one", "two"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "classifier_pooling": "mean"}))
    scores = tune(base, corpus, tmp_path / "model", replace(FAST, train="head"))
    assert scores.evaluation_loss == pytest.approx(predict(tmp_path / "model", corpus)[2], rel=1e-4)


def test_features_are_computed_once_for_all_splits(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    recipe = replace(FAST, train="head")
    seen: list[tuple[int, int]] = []
    features = tmp_path / "features"
    tune(base, corpus, tmp_path / "a", recipe, features=features, report=lambda *step: seen.append(step))
    encoded = [step for step in seen if step[1] == 3]
    assert encoded == [(1, 3), (2, 3), (3, 3)]  # 90 texts, 32 in a pass
    other = replace(corpus, in_training=[not trains for trains in corpus.in_training])
    seen.clear()
    tune(base, other, tmp_path / "b", recipe, features=features, report=lambda *step: seen.append(step))
    assert {total for _, total in seen} == {12}  # 30 texts, batches of 8, 3 epochs
    assert len(list(features.glob("*.safetensors"))) == 1
    tune(base, corpus, tmp_path / "c", replace(recipe, max_tokens=16), features=features)
    assert len(list(features.glob("*.safetensors"))) == 2
    tune(base, corpus, tmp_path / "uncached", recipe)
    assert digest_folder(tmp_path / "uncached") == digest_folder(tmp_path / "a")


def test_a_model_without_an_encoder_trains_whole(
    base: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    words = lambda self: self.bert.embeddings.word_embeddings  # noqa: E731  # as a model without a base has it
    monkeypatch.setattr(BertForSequenceClassification, "get_input_embeddings", words)
    monkeypatch.setattr(BertForSequenceClassification, "base_model_prefix", "")
    with pytest.raises(ModelError, match=r"no encoder apart from its head.*Write train: full"):
        tune(base, corpus, tmp_path / "model", replace(FAST, train="head"))


def test_a_head_that_reads_the_whole_sequence_is_refused(
    base: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertPooler

    monkeypatch.setattr(BertPooler, "forward", lambda self, hidden: self.activation(self.dense(hidden.mean(dim=1))))
    with pytest.raises(ModelError, match="reads more than one vector"):
        tune(base, corpus, tmp_path / "model", replace(FAST, train="head"))


def test_training_stops_early_and_keeps_the_best_weights(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    """A rate that wrecks the model after the first epochs: the epochs before the wreck are what is kept."""
    draw = random.Random(3)
    labels = [[draw.choice(list(CLUES))] for _ in corpus.texts]  # nothing to learn: only over-fitting
    noise = replace(corpus, labels=labels)
    steps: list[tuple[int, int]] = []
    recipe = replace(FAST, epochs=40, patience=2)
    scores = tune(base, noise, tmp_path / "model", recipe, report=lambda *step: steps.append(step))
    trained = max(step for step, _ in steps[:-1]) // 8  # 60 texts in batches of 8
    assert scores.epochs + 2 == trained < 40
    assert steps[-1] == (320, 320)
    assert scores.evaluation_loss == pytest.approx(predict(tmp_path / "model", noise)[2], rel=1e-4)
    later = tune(base, noise, tmp_path / "later", replace(recipe, patience=40))
    assert later.evaluation_loss <= scores.evaluation_loss
    assert later.epochs < 40, "over-fitted long before, and still the last weights were kept"


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # float32 on any CPU
    base = save_classifier(tmp_path / "base", "bert", labels=("one", "two"))
    config = json.loads((base / "config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps({**config, **still}))
    corpus = plant(21)  # 14 in training: batches of 4, 4, 4 and 2
    tune(base, corpus, tmp_path / "large", replace(FAST, batch_size=14))
    tune(base, corpus, tmp_path / "small", replace(FAST, batch_size=4, accumulate=4))
    before, large, small = (
        load_file(folder / "model.safetensors")["bert.pooler.dense.weight"]
        for folder in (base, tmp_path / "large", tmp_path / "small")
    )
    assert (large - small).abs().mean() < 0.002 * (large - before).abs().mean()


def test_a_finished_folder_is_kept(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    scores = tune(base, corpus, folder)
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    assert tune(base, corpus, folder) == scores
    assert (folder / "model.safetensors").stat().st_mtime_ns == changed
    with pytest.raises(ModelError, match=r"other recipe, seed\)"):
        tune(base, corpus, folder, replace(FAST, epochs=4), seed=2)
    with pytest.raises(ModelError, match="other texts_digest, targets_digest"):
        tune(base, plant(90, seed=1), folder)


def test_a_folder_of_something_else_is_left_alone(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds another fine-tuning"):
        tune(base, corpus, tmp_path / "model")
    assert (tmp_path / "model" / "thesis.txt").read_text() == "mine"


def test_a_killed_run_leaves_no_folder(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    def kill(step: int, _: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(base, corpus, tmp_path / "out" / "model", report=kill)
    assert not (tmp_path / "out").exists()


def test_of_two_at_once_the_first_is_kept(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    """A speculative task writes the same folder: one of them wins, both return its scores."""
    both = threading.Barrier(2)
    results: dict[int, Scores] = {}

    def work(number: int) -> None:
        def wait(step: int, steps: int) -> None:
            if step == steps:
                both.wait(timeout=60)

        results[number] = tune(base, corpus, tmp_path / "model", report=wait)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert results[0].seconds == json.loads((tmp_path / "model" / RECORD_FILE).read_text())["scores"]["seconds"]


def test_the_folder_is_complete(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    tune(base, corpus, tmp_path / "model")
    record = json.loads((tmp_path / "model" / RECORD_FILE).read_text())
    assert record["recipe"]["epochs"] == 3
    assert record["seed"] == 1
    assert record["label_names"] == list(CLUES)
    assert record["base_digest"] == digest_folder(base)
    assert set(record["versions"]) == {"torch", "transformers"}
    classifier = Classifier.load(tmp_path / "model")
    assert (classifier.labels, classifier.problem) == (tuple(CLUES), "single_label")
    text = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert text["truncation"] is None, "the length of training would be kept by whoever reads the file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [["sports"]] * 90}, r"labels\[0\]=\['sports'\] must be among"),
        ({"labels": [["politics", "sport"]] * 90}, "exactly one label.*multi_label: true"),
        ({"labels": [[]] * 90}, "exactly one label"),
        ({"labels": [["sport"]] * 90}, r"labels=\['politics', 'NA'\] must occur in the training half"),
        ({"in_training": [True] * 90}, "must occur in the held-out half.*draw_split"),
        ({"in_training": [True] * 89}, "must be as many as the 90 texts"),
        ({"texts": ["fine"] * 89 + ["half \ud83d emoji"]}, r"texts\[89\].*at character 5 must be valid Unicode"),
    ],
)
def test_labels_that_cannot_be_trained_on(
    base: Path, corpus: Corpus, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(CorpusError, match=f"(?s){message}"):
        tune(base, replace(corpus, **change), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_one_label_is_no_choice(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="at least two unless multi_label"):
        tune(base, corpus, tmp_path / "model", label_names=["sport"])


def test_pickled_weights_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    base = save_classifier(tmp_path / "base", "bert")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Loading a pickle runs whatever code"):
        tune(base, corpus, tmp_path / "model")


def test_more_tokens_than_positions_are_refused(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="max_tokens=65 must be at most 64"):
        tune(base, corpus, tmp_path / "model", replace(FAST, max_tokens=65))


def test_divergence_is_an_error(base: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"evaluation_loss=.*lower learning_rate"):
        tune(base, corpus, tmp_path / "model", replace(FAST, learning_rate=1e30, warmup_share=0.0))


def test_nothing_is_printed(base: Path, corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tune(base, corpus, tmp_path / "model")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_default_learning_rates() -> None:
    assert Recipe().peak_learning_rate == 5e-5
    assert Recipe(train="head").peak_learning_rate == 1e-3
    assert Recipe(train="head", learning_rate=0.5).peak_learning_rate == 0.5


@given(st.integers(1, 5).flatmap(lambda width: arrays(bool, st.tuples(st.just(2), st.integers(1, 30), st.just(width)))))
def test_f1_equals_scikit_learn(labels: np.ndarray) -> None:
    gold, predicted = labels
    macro, micro, by_label = f1_scores(gold, predicted)
    expected = [f1_score(gold, predicted, average=kind, zero_division=0) for kind in ("macro", "micro")]
    if gold.shape[1] == 1:  # scikit-learn takes a single column for a binary problem with two classes
        expected = [f1_score(gold[:, 0], predicted[:, 0], zero_division=0)] * 2
    assert (macro, micro) == pytest.approx(tuple(expected))
    by_column = [f1_score(gold[:, c], predicted[:, c], zero_division=0) for c in range(gold.shape[1])]
    assert by_label.tolist() == pytest.approx(by_column)
