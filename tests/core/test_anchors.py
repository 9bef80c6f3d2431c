"""Anchors of discretized paths: the same as a slow search, whatever the vocabulary; kept, looked up, refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import lexplain.anchors as module
import oracles
from core.models import FAMILIES, Shelf
from lexplain.anchors import AnchorFinder, AnchorRule, Anchors, digest_vocabulary, open_finder, read_vocabulary
from lexplain.errors import MethodError

BASELINE = 3


def draw(words: int, size: int, seed: int = 0) -> Tensor:
    """A vocabulary of float32, some of whose words are equal to others."""
    vocabulary = torch.randn(words, size, generator=torch.Generator().manual_seed(seed))
    vocabulary[words // 2 : words // 2 + 20] = vocabulary[10:30]
    vocabulary[-5:] = 0.0
    return vocabulary


def find(vocabulary: Tensor, ids: NDArray[np.int64], rule: AnchorRule) -> NDArray[np.int32]:
    return AnchorFinder(rule, len(vocabulary)).find(ids, lambda: vocabulary)


def slow(vocabulary: Tensor, rule: AnchorRule) -> oracles.AnchorSearch:
    return oracles.AnchorSearch(
        vocabulary.double().numpy(), rule.baseline_id, rule.steps, rule.neighbours, rule.strategy, rule.uniform
    )


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("strategy", ["greedy", "maxcount"])
def test_a_thousand_tokens_have_the_anchors_of_the_slow_search(strategy: Any, uniform: bool) -> None:
    vocabulary = draw(1300, 8)
    rule = AnchorRule(BASELINE, steps=6, neighbours=12, strategy=strategy, uniform=uniform)
    ids = np.random.default_rng(1).permutation(1300)[:1000]
    found = find(vocabulary, ids, rule)
    assert found.shape == (1000, 6)
    assert found.dtype == np.int32
    search = slow(vocabulary, rule)
    assert found.tolist() == [search.run(int(word)) for word in ids]
    assert len(np.unique(found)) > 200


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("strategy", ["greedy", "maxcount"])
@pytest.mark.parametrize(("words", "steps", "neighbours"), [(60, 9, 4), (8, 20, 50), (60, 2, 1)])
def test_candidates_run_out(words: int, steps: int, neighbours: int, strategy: Any, uniform: bool) -> None:
    """The path then goes to the baseline and stays; a small vocabulary has no more neighbours than words."""
    vocabulary = torch.randn(words, 3, generator=torch.Generator().manual_seed(2))
    rule = AnchorRule(BASELINE, steps, neighbours, strategy, uniform)
    found = find(vocabulary, np.arange(words), rule)
    search = slow(vocabulary, rule)
    assert found.tolist() == [search.run(word) for word in range(words)]
    assert (found[BASELINE] == BASELINE).all()
    if words == 8:
        assert (found[:, -1] == BASELINE).all()


@pytest.mark.parametrize("uniform", [False, True])
def test_many_equal_words_are_taken_by_number(uniform: bool) -> None:
    """More of them at one distance than the first look takes in."""
    vocabulary = torch.randn(400, 4, generator=torch.Generator().manual_seed(3))
    vocabulary[100:350] = vocabulary[100]
    rule = AnchorRule(BASELINE, steps=5, neighbours=6, strategy="maxcount", uniform=uniform)
    ids = np.array([100, 120, 349, 7, 8, 399])
    search = slow(vocabulary, rule)
    assert find(vocabulary, ids, rule).tolist() == [search.run(int(word)) for word in ids]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_word_that_is_not_finite_is_nobodys_candidate(
    uniform: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others have the anchors that they have without it, and as few words are looked at closely."""
    vocabulary = torch.randn(400, 4, generator=torch.Generator().manual_seed(4))
    broken = torch.cat([vocabulary, vocabulary[:2]])
    broken[400, 2], broken[401] = value, value
    looks: list[int] = []
    order = module._Words._order

    def spy(self: Any, candidates: Tensor, *points: Tensor) -> Tensor:
        looks.append(candidates.shape[1])
        return order(self, candidates, *points)

    monkeypatch.setattr(module._Words, "_order", spy)
    rule = AnchorRule(BASELINE, steps=5, neighbours=6, strategy="greedy", uniform=uniform)
    expected = find(vocabulary, np.arange(400), rule)
    shortest = max(looks)
    looks.clear()
    found = find(broken, np.arange(402), rule)
    assert (found[:400] == expected).all()
    assert (found[400:] == BASELINE).all()
    assert max(looks) == shortest < 100
    ends_nowhere = AnchorRule(400, steps=5, neighbours=6, strategy="greedy", uniform=uniform)
    assert (find(broken, np.arange(402), ends_nowhere) == 400).all()


@pytest.mark.parametrize("uniform", [False, True])
def test_blocks_change_nothing(uniform: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, ids = draw(300, 5), np.arange(300)
    rule = AnchorRule(BASELINE, steps=5, neighbours=20, strategy="greedy", uniform=uniform)
    expected = find(vocabulary, ids, rule)
    monkeypatch.setattr(module, "_BLOCK_DISTANCES", 700)
    monkeypatch.setattr(module, "_BLOCK_NUMBERS", 1)
    assert (find(vocabulary, ids, rule) == expected).all()


@pytest.mark.parametrize("uniform", [False, True])
def test_words_asked_for_later_have_the_same_paths(uniform: bool) -> None:
    """In any order, together or one by one; what is known is not searched again."""
    vocabulary = draw(200, 5)
    rule = AnchorRule(BASELINE, steps=4, neighbours=10, strategy="greedy", uniform=uniform)
    expected = find(vocabulary, np.arange(200), rule)
    finder, looks = AnchorFinder(rule, 200), []

    def look() -> Tensor:
        looks.append(1)
        return vocabulary

    for ids in ([5, 9, 5], [150, 9], [5, 150, 9], [1]):
        assert (finder.find(np.array(ids), look) == expected[ids]).all()
    assert len(looks) == 3


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rule = AnchorRule(BASELINE, steps=4, neighbours=10, strategy="maxcount", uniform=True)
    ids = np.arange(0, 40, 2)
    table = Anchors(rule, ids.astype(np.int32), find(draw(200, 5), ids, rule))
    path = table.save(tmp_path / "prepared")
    assert table.save(tmp_path / "prepared") == path
    assert [file.name for file in (tmp_path / "prepared").iterdir()] == [path.name]
    read = Anchors.load(str(path))
    assert read.rule == rule
    assert (read.token_ids == ids).all()
    assert (read.anchors == table.anchors).all()
    assert Anchors.load(str(path)) is read
    other = Anchors(rule, table.token_ids[:3], table.anchors[:3]).save(tmp_path / "prepared")
    assert other != path


def test_a_table_of_all_content_tokens_is_enough() -> None:
    """Special tokens are looked up as the baseline word; a search for it would load the whole vocabulary."""
    rule = AnchorRule(BASELINE, steps=4, neighbours=10, strategy="greedy", uniform=False)
    ids = np.array([number for number in range(0, 40, 2) if number != BASELINE])
    finder = AnchorFinder(rule, 200)
    finder.add(Anchors(rule, ids.astype(np.int32), find(draw(200, 5), ids, rule)))

    def refuse() -> Tensor:
        raise AssertionError("nothing is left to search")

    found = finder.find(np.array([BASELINE, *ids]), refuse)
    assert (found[0] == BASELINE).all()
    assert (found == find(draw(200, 5), np.array([BASELINE, *ids]), rule)).all()


def test_a_table_that_is_not_there_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for path in (tmp_path / "missing.safetensors", broken):
        with pytest.raises(MethodError, match=r"prepared='.*' cannot be read here.*Write a sink\.path"):
            Anchors.load(str(path))


def test_a_table_answers_for_its_own_rule_only(shelf: Shelf) -> None:
    model = shelf.classifier("bert", seed=7).model
    rule = AnchorRule(4, steps=3, neighbours=10, strategy="greedy", uniform=False)
    other = AnchorRule(4, steps=3, neighbours=10, strategy="maxcount", uniform=False)
    planted = Anchors(rule, np.array([8, 9], dtype=np.int32), np.array([[1, 1, 1], [2, 2, 2]], dtype=np.int32))

    def vocabulary() -> Tensor:
        return read_vocabulary(model)

    assert open_finder(model, rule, planted).find(np.array([9, 8]), vocabulary).tolist() == [[2, 2, 2], [1, 1, 1]]
    assert open_finder(model, rule) is open_finder(model, rule, planted)
    expected = find(vocabulary(), np.array([8, 9]), other)
    assert (open_finder(model, other, planted).find(np.array([8, 9]), vocabulary) == expected).all()


@pytest.mark.parametrize("family", [*FAMILIES, "textcnn"])
def test_a_vocabulary_is_what_the_first_layer_gives(shelf: Shelf, family: str) -> None:
    """Also where its embeddings are smaller than the layers above, as ALBERT's and ELECTRA's."""
    classifier = shelf.classifier(family)
    vocabulary = read_vocabulary(classifier.model)
    assert vocabulary.shape[1] == classifier.embedding_size
    ids = torch.tensor([[1, 7, len(vocabulary) - 1]])
    assert torch.equal(vocabulary[ids], classifier.embed(ids))
    assert not vocabulary.requires_grad


def test_models_with_equal_embeddings_share_a_digest(shelf: Shelf) -> None:
    model = shelf.classifier("bert", seed=1).model
    digest = digest_vocabulary(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight += 1  # above the embeddings
    assert digest_vocabulary(other) == digest
    with torch.no_grad():
        other.get_input_embeddings().weight[7, 0] += 1
    assert digest_vocabulary(other) != digest
    assert digest == digest_vocabulary(shelf.classifier("bert", seed=1, dtype=torch.float64).model)
    assert digest != digest_vocabulary(shelf.classifier("bert", seed=2).model)
