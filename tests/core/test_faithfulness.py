"""Faithfulness: the same figures as a slow reading of one text with one set of words taken away after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.models import TEXTS, Shelf
from lexplain.classifier import Classifier
from lexplain.errors import ModelError
from lexplain.faithfulness import PROTOCOLS, DeletionTracer, Protocol, ScoredText, Trace
from lexplain.words import Word, segment

TOLERANCE = 1e-5  # float32 against float64


def score_words(text: str, seed: int = 0) -> list[tuple[Word, float]]:
    words = segment(text)
    return list(zip(words, np.random.default_rng(seed).normal(size=len(words)).round(1).tolist(), strict=True))


def make_tracer(classifier: Classifier, max_tokens: int = 64, budget: int = 500) -> DeletionTracer:
    return DeletionTracer(classifier, max_tokens=max_tokens, overlap=0, max_windows=None, budget_tokens=budget)


def trace(classifier: Classifier, text: ScoredText, *protocols: Protocol, max_tokens: int = 64) -> list[Trace]:
    (found,) = make_tracer(classifier, max_tokens).trace([text], protocols)
    assert found is not None
    return found


class SlowReader:
    """One text, read by transformers alone, in float64; windows are cut by hand."""

    def __init__(self, folder: str, max_tokens: int, multi_label: bool = False) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
        self.capacity = max_tokens - self.tokenizer.num_special_tokens_to_add()
        self.multi_label = multi_label
        encoded = self.tokenizer("phone", return_special_tokens_mask=True)
        flags = encoded["special_tokens_mask"]
        first = flags.index(0)
        last = len(flags) - flags[::-1].index(0)
        self.before, self.after = encoded["input_ids"][:first], encoded["input_ids"][last:]

    def rank(self, text: ScoredText, protocol: Protocol) -> tuple[list[list[int]], int]:
        """Tokens of each unit in the order in which they go, and how many special tokens there are."""
        encoded = self.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
        owners: list[int | None] = []
        for _, end in encoded["offset_mapping"]:
            inside = [n for n, (word, _) in enumerate(text.words) if word.start < end <= word.end]
            owners.append(inside[0] if inside else None)
        value = {n: score for n, (_, score) in enumerate(text.words)}
        sign = 1 if protocol.rising else -1
        if protocol.unit == "token":
            scores = [0.0 if owner is None else value[owner] for owner in owners]
            units = [[token] for token in sorted(range(len(owners)), key=lambda token: (sign * scores[token], token))]
        else:
            present = sorted({owner for owner in owners if owner is not None}, key=lambda n: (sign * value[n], n))
            units = [[token for token, owner in enumerate(owners) if owner == unit] for unit in present]
        windows = max(1, -(-len(owners) // self.capacity))
        return units, windows * self.tokenizer.num_special_tokens_to_add()

    def read(self, text: str, taken: set[int], replaced: str) -> NDArray[np.float64]:
        """Mean logits over windows as probabilities, without the taken tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        logits = []
        for start in range(0, max(1, len(ids)), self.capacity):
            part = range(start, min(start + self.capacity, len(ids)))
            stays = [token for token in part if replaced != "delete" or token not in taken]
            new = [
                self.tokenizer.pad_token_id if token in taken and replaced == "pad" else ids[token] for token in stays
            ]
            framed = [*self.before, *new, *self.after] or [self.tokenizer.pad_token_id]
            embeddings = self.model.get_input_embeddings()(torch.tensor([framed])).detach()
            if replaced == "zero":
                for place, token in enumerate(stays):
                    if token in taken:
                        embeddings[0, len(self.before) + place] = 0.0
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
            with torch.no_grad():
                logits.append(self.model(inputs_embeds=embeddings, attention_mask=mask).logits[0])
        mean = torch.stack(logits).mean(0)
        found: NDArray[np.float64] = (mean.sigmoid() if self.multi_label else mean.softmax(-1)).numpy()
        return found


def check(found: Trace, reader: SlowReader, text: ScoredText, protocol: Protocol, label: int) -> None:
    units, special = reader.rank(text, protocol)
    whole = reader.read(text.text, set(), "delete")[label]
    assert found.whole == pytest.approx(whole, abs=TOLERANCE)
    assert found.sizes.tolist() == protocol.list_sizes(len(units), special)
    everything = set(range(10_000))
    lost, lacking = [], []
    for number, size in enumerate(found.sizes):
        taken = {token for unit in units[:size] for token in unit}
        without = reader.read(text.text, taken, protocol.replaced)
        assert found.without[number] == pytest.approx(without[label], abs=TOLERANCE)
        ranked = np.sort(without)
        if ranked[-1] - ranked[-2] > 1e-3:
            assert found.predicted[number] == without.argmax()
        lost.append(whole - without[label])
        if protocol.keeps:
            assert found.alone is not None
            alone = reader.read(text.text, everything - taken, protocol.replaced)[label]
            assert found.alone[number] == pytest.approx(alone, abs=TOLERANCE)
            lacking.append(whole - alone if size else 0.0)
    assert found.comprehensiveness == pytest.approx(np.mean(lost), abs=TOLERANCE)
    assert found.log_odds == pytest.approx(np.mean([np.log((whole - loss) / whole) for loss in lost]), abs=1e-3)
    if protocol.keeps:
        assert found.sufficiency == pytest.approx(np.mean(lacking), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "textcnn"])
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_traces_are_those_of_a_slow_reader(shelf: Shelf, family: str, name: str) -> None:
    classifier, protocol = shelf.classifier(family), PROTOCOLS[name]
    reader = SlowReader(str(shelf.folder(family)), 64)
    for number, line in enumerate(TEXTS):
        text = ScoredText(line, classifier.labels[number % len(classifier.labels)], score_words(line, number))
        (found,) = trace(classifier, text, protocol)
        check(found, reader, text, protocol, number % len(classifier.labels))


@pytest.mark.parametrize(("family", "max_tokens"), [("bert", 64), ("bert", 12), ("roberta", 64), ("textcnn", 64)])
def test_lists_of_words_go_with_all_their_occurrences(shelf: Shelf, family: str, max_tokens: int) -> None:
    """As a slow reader deletes their tokens; every text with lists of its own, words that it lacks among them."""
    classifier, reader = shelf.classifier(family), SlowReader(str(shelf.folder(family)), max_tokens)
    texts = [f"{line} Again: {line.upper()}" for line in TEXTS]
    keys = [sorted({word.key for word in segment(text)}) for text in texts]
    lists = [[{mine[0]}, set(mine[1::3]), set(mine), {"absent"}] for mine in keys]
    found = make_tracer(classifier, max_tokens).remove(texts, lists)
    protocol = Protocol("delete", "word", (1.0,))
    for text, mine, removal in zip(texts, lists, found, strict=True):
        assert removal is not None
        words = score_words(text)
        units = {unit[0]: unit for unit in reader.rank(ScoredText(text, "any", words), protocol)[0]}
        np.testing.assert_allclose(removal.whole, reader.read(text, set(), "delete"), rtol=0, atol=TOLERANCE)
        encoded = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for number, chosen in enumerate(mine):
            gone, occurrences = set(), 0
            for first, unit in units.items():
                _, end = encoded["offset_mapping"][first]
                (word,) = [word for word, _ in words if word.start < end <= word.end]
                if word.key in chosen:
                    gone |= set(unit)
                    occurrences += 1
            assert removal.n_words[number] == occurrences
            right = reader.read(text, gone, "delete")
            np.testing.assert_allclose(removal.without[number], right, rtol=0, atol=TOLERANCE)
        assert removal.n_words[3] == 0
        assert removal.n_words[2] > len(mine[2])
        np.testing.assert_array_equal(removal.without[3], removal.whole)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_long_texts_lose_words_in_every_window(shelf: Shelf, name: str) -> None:
    """Units are ranked over the whole text; the probability is that of the mean logits."""
    classifier, protocol = shelf.classifier("bert"), PROTOCOLS[name]
    reader = SlowReader(str(shelf.folder("bert")), 12)
    text = ScoredText(TEXTS[2], classifier.labels[0], score_words(TEXTS[2]))
    (found,) = trace(classifier, text, protocol, max_tokens=12)
    check(found, reader, text, protocol, 0)


def test_several_texts_and_protocols_share_passes_and_change_nothing(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    texts = [ScoredText(line, classifier.labels[0], score_words(line)) for line in (*TEXTS, *TEXTS[:2])]
    protocols = list(PROTOCOLS.values())
    together = make_tracer(classifier, budget=4000).trace(texts, protocols)
    for text, found in zip(texts, together, strict=True):
        assert found is not None
        for mine, alone in zip(found, trace(classifier, text, *protocols), strict=True):
            np.testing.assert_allclose(mine.without, alone.without, rtol=0, atol=TOLERANCE)
            assert mine.whole == pytest.approx(alone.whole, abs=TOLERANCE)


def test_sizes() -> None:
    dig, eraser, marc = PROTOCOLS["dig-2021"], PROTOCOLS["eraser-2020"], PROTOCOLS["marc-2023"]
    assert dig.list_sizes(2, 2) == [0]  # four tokens, special ones among them
    assert dig.list_sizes(3, 2) == [1]
    assert eraser.list_sizes(50, 2) == [1, 2, 5, 10, 25]
    assert eraser.list_sizes(1, 2) == [1] * 5
    assert marc.list_sizes(20, 2) == list(range(1, 20))  # .15 * 20 is 3
    assert PROTOCOLS["arras-2016"].list_sizes(3, 2) == [0, 1, 2, *[3] * 48]


def test_no_unit_taken_is_no_loss(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    text = ScoredText("phone", classifier.labels[0], score_words("phone"))
    (found,) = trace(classifier, text, PROTOCOLS["dig-2021"])
    assert found.sizes.tolist() == [0]
    assert (found.comprehensiveness, found.sufficiency, found.log_odds) == (0.0, 0.0, 0.0)


def test_a_text_without_scores_of_words_is_read(shelf: Shelf) -> None:
    """Its tokens all score 0; by words there is nothing to take."""
    classifier = shelf.classifier("bert")
    text = ScoredText("- ... -", classifier.labels[0], [])
    by_token, by_word = trace(classifier, text, PROTOCOLS["eraser-2020"], PROTOCOLS["marc-2023"])
    assert by_token.sizes.tolist() == [1, 1, 1, 1, 2]
    assert by_word.sizes.tolist() == [0] * 19
    assert by_word.comprehensiveness == 0.0


def test_sizes_that_are_the_same_are_read_once(shelf: Shelf) -> None:
    from core.models import count_passes

    classifier = shelf.classifier("bert")
    text = ScoredText(TEXTS[1], classifier.labels[0], score_words(TEXTS[1]))  # five words
    tracer = make_tracer(classifier)
    with count_passes(classifier) as passes:
        tracer.trace([text, text], [PROTOCOLS["marc-2023"], PROTOCOLS["arras-2016"], PROTOCOLS["arras-2016"]])
    # a text: whole; 1 to 4 words gone, and alone; 1 to 5 at zero; a copy of the text is not known to be one
    assert passes.sequences == 2 * (1 + 2 * 4 + 5)


def test_more_important_words_lose_more(shelf: Shelf) -> None:
    """Leaving one word out tells what the model loses, so its order beats the opposite order."""
    classifier = shelf.classifier("bert")
    tracer = make_tracer(classifier)
    text = TEXTS[0]
    words = segment(text)
    one = Protocol("pad", "word", (1,), counts=True, keeps=False)
    losses = []
    for chosen in range(len(words)):
        scored = ScoredText(text, classifier.labels[0], [(w, float(n == chosen)) for n, w in enumerate(words)])
        (found,) = tracer.trace([scored], [one])
        assert found is not None
        losses.append(found[0].comprehensiveness)
    for sign in (1, -1):
        scored = ScoredText(text, classifier.labels[0], [(w, sign * x) for w, x in zip(words, losses, strict=True)])
        (found,) = tracer.trace([scored], [one])
        assert found is not None
        assert found[0].comprehensiveness == pytest.approx(max(losses) if sign > 0 else min(losses), abs=TOLERANCE)


def test_a_regression_is_refused(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = shelf.classifier("bert")
    monkeypatch.setattr(classifier, "problem", "regression")
    with pytest.raises(ModelError, match="has no probability"):
        make_tracer(classifier)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(-3, 3), min_size=1, max_size=12), share=st.floats(0.01, 0.99),
    unit=st.sampled_from(["word", "token"]), special=st.integers(0, 3),
)  # fmt: skip
def test_sizes_stay_inside_the_text(scores: Sequence[float], share: float, unit: str, special: int) -> None:
    protocol = Protocol("pad", unit, (share, 1.0))  # type: ignore[arg-type]  # drawn
    least, most = protocol.list_sizes(len(scores), special)
    assert 1 <= least <= most == len(scores)
