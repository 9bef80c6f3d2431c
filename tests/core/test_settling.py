"""When lists are settled: on worlds of words whose whole corpus is known, beside what was predicted of it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from lexplain.extrapolation import Evidence, ListRules
from lexplain.overlap import rank_biased_overlap
from lexplain.settling import Prediction, is_due, is_settled, predict_overlaps, rank_words

SPLITS, LABELS, CELLS = 5, 3, 100
RULES = ListRules(k=10, n_splits=SPLITS, min_splits=3, min_df=5, max_classes=None, known_frequencies=False)


@dataclasses.dataclass(frozen=True)
class World:
    """A corpus as its explanations: one entry a (document, class, split, word), its score and the document's cell."""

    label: NDArray[np.int64]
    word: NDArray[np.int64]
    split: NDArray[np.int64]
    document: NDArray[np.int64]
    cell: NDArray[np.int64]
    score: NDArray[np.float64]


def make_world(seed: int, documents: int = 2000, words: int = 300, noise: float = 0.4) -> World:
    """Words by Zipf's law, each with a mean score of its own in each class; documents hold a dozen."""
    random = np.random.default_rng(seed)
    chance = 1 / np.arange(1, words + 1)
    truth = random.beta(1, 6, (LABELS, words))
    labels = random.choice(LABELS, documents, p=[0.6, 0.3, 0.1])
    drawn = random.choice(words, (documents, 12), p=chance / chance.sum())
    pairs = np.unique(np.repeat(np.arange(documents), 12) * words + drawn.ravel())
    document, word = np.divmod(pairs, words)
    level = truth[labels[document], word] * np.exp(noise * random.standard_normal(len(pairs)))
    level = level * random.uniform(0.9, 1.1, (SPLITS, len(pairs)))
    split, held = np.nonzero(random.random((SPLITS, len(pairs))) < 0.8)
    order = random.permutation(words)  # the order of the words' bytes says nothing of their frequency
    document = document[held]
    return World(labels[document], order[word[held]], split, document, document % CELLS, level[split, held])


def read(world: World, cells: NDArray[np.int64]) -> Evidence:
    """Count what some cells hold."""
    inside = np.isin(world.cell, cells)
    label, word, split, document, cell = (
        getattr(world, name)[inside] for name in ("label", "word", "split", "document", "cell")
    )
    rows, row = np.unique(word * LABELS + label, return_inverse=True)
    size = len(rows)

    def count(number: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        return np.bincount(np.unique(row * most + number) // most, minlength=size)

    scores = np.bincount(row * CELLS + cell, world.score[inside], size * CELLS).reshape(size, CELLS)
    occurrences = np.bincount(row * CELLS + cell, minlength=size * CELLS).reshape(size, CELLS)
    documents = count(document, 10**6)
    return Evidence(
        label=rows % LABELS, word=rows // LABELS, n_selected=count(split, SPLITS), n_documents=documents,
        n_split_documents=occurrences.sum(1), document_frequency=documents, n_occurrences=occurrences.sum(1),
        score_sum=scores.sum(1), n_cells=(occurrences > 0).sum(1), score_squares=(scores**2).sum(1),
        occurrence_squares=(occurrences**2).sum(1).astype(float), products=(scores * occurrences).sum(1),
        shares=np.full(LABELS, len(cells) / CELLS),
    )  # fmt: skip


def list_by_hand(evidence: Evidence, rules: ListRules) -> list[list[int]]:
    passing = [
        (int(evidence.label[row]), int(evidence.word[row]), evidence.score_sum[row] / evidence.n_occurrences[row])
        for row in range(len(evidence.word))
        if evidence.n_selected[row] >= rules.min_splits and evidence.document_frequency[row] > rules.min_df
    ]
    classes = defaultdict(set)
    for label, word, _ in passing:
        classes[word].add(label)
    kept = [each for each in passing if rules.max_classes is None or len(classes[each[1]]) <= rules.max_classes]
    kept.sort(key=lambda each: (-each[2], each[1]))
    return [[word for of, word, _ in kept if of == label][: rules.k] for label in range(LABELS)]


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.mark.parametrize("max_classes", [1, 2, None])
def test_lists_are_those_of_the_rules(world: World, max_classes: int | None) -> None:
    rules = dataclasses.replace(RULES, max_classes=max_classes)
    evidence = read(world, np.arange(30))
    found = rank_words(evidence, rules)
    assert found == list_by_hand(evidence, rules)
    assert found[0]


def test_equal_means_go_by_the_order_of_the_words() -> None:
    ones, words = np.ones(4, dtype=int), np.array([3, 5, 7, 9])
    evidence = Evidence(
        label=0 * ones, word=words, n_selected=5 * ones, n_documents=9 * ones, n_split_documents=45 * ones,
        document_frequency=9 * ones, n_occurrences=9 * ones, score_sum=np.array([1.0, 2.0, 2.0, 2.0]), n_cells=9 * ones,
        score_squares=np.ones(4), occurrence_squares=np.ones(4), products=np.ones(4), shares=np.array([0.5]),
    )  # fmt: skip
    assert rank_words(evidence, dataclasses.replace(RULES, k=3)) == [[5, 7, 9]]


def test_nothing_is_left_to_predict_of_a_corpus_that_was_read_whole(world: World) -> None:
    for found in predict_overlaps(read(world, np.arange(CELLS)), RULES):
        assert found.low == found.overlap == found.high == pytest.approx(1)
        assert (found.n_words, found.share) == (RULES.k, 1)


def test_a_seed_gives_the_same_and_more_documents_a_surer_prediction(world: World) -> None:
    few, many = (predict_overlaps(read(world, np.arange(count)), RULES, seed=3) for count in (10, 80))
    assert few == predict_overlaps(read(world, np.arange(10)), RULES, seed=3)
    assert few != predict_overlaps(read(world, np.arange(10)), RULES, seed=4)
    for one, other in zip(few, many, strict=True):
        assert one.overlap < other.overlap
        assert one.high < other.high


def test_rare_classes_are_less_sure(world: World) -> None:
    common, _, rare = predict_overlaps(read(world, np.arange(30)), RULES)
    assert rare.low < common.low


def test_a_class_without_a_list_is_never_settled(world: World) -> None:
    evidence = dataclasses.replace(read(world, np.arange(30)), shares=np.full(LABELS + 1, 0.3))
    nothing = predict_overlaps(evidence, RULES)[LABELS]
    assert (nothing.n_words, nothing.overlap, nothing.low, nothing.high) == (0, 0, 0, 1)
    assert not is_settled([nothing, nothing], 0.01, 10)


def test_scores_without_noise_are_settled_at_once() -> None:
    quiet = make_world(1, noise=0.0)
    rules = dataclasses.replace(RULES, min_df=0, min_splits=1, max_classes=None, k=5)
    common = predict_overlaps(read(quiet, np.arange(50)), rules)[0]
    noisy = predict_overlaps(read(make_world(1, noise=1.2), np.arange(50)), rules)[0]
    assert common.overlap > noisy.overlap


@pytest.mark.parametrize(("share", "max_classes"), [(15, None), (50, None), (50, 2)])
def test_intervals_cover_what_is_achieved(share: int, max_classes: int | None) -> None:
    rules = dataclasses.replace(RULES, max_classes=max_classes)
    covered, below = [], []
    for seed in range(15):
        world = make_world(100 + seed)
        whole = rank_words(read(world, np.arange(CELLS)), rules)
        evidence = read(world, np.arange(share))
        for listed, of, found in zip(
            rank_words(evidence, rules), whole, predict_overlaps(evidence, rules), strict=True
        ):
            achieved = rank_biased_overlap(listed, of)
            covered.append(found.low - 1e-9 <= achieved <= found.high + 1e-9)
            below.append(achieved < found.low)
    assert np.mean(covered) >= 0.9
    assert np.mean(below) <= 0.07


def test_words_that_no_document_has_had_yet_make_a_list_less_sure(world: World) -> None:
    """Half of the corpus's words are met for the first time in the half to come: they may be among the best."""
    evidence = read(world, np.arange(20))
    rare = evidence.n_documents > 3
    known = {
        field.name: getattr(evidence, field.name)[rare]
        for field in dataclasses.fields(Evidence)
        if field.name != "shares"
    }
    rules = dataclasses.replace(RULES, min_df=0, min_splits=1)
    with_rare = predict_overlaps(evidence, rules)
    without = predict_overlaps(Evidence(**known, shares=evidence.shares), rules)
    assert np.mean([one.overlap for one in with_rare]) < np.mean([one.overlap for one in without])


def look(low: float) -> Prediction:
    return Prediction(0, 0.95, low, 1.0, 20, 0.4)


def test_settled_needs_two_looks_running() -> None:
    assert is_settled([look(0.7), look(0.9), look(0.95)], 0.9, 20)
    assert not is_settled([look(0.95), look(0.89)], 0.9, 20)
    assert not is_settled([look(0.9), look(0.7), look(0.9)], 0.9, 20)
    assert not is_settled([look(1.0)], 0.9, 20)
    assert not is_settled([], 0.9, 20)
    assert not is_settled([look(0.95), look(0.95)], 0.9, 21)


def test_looks_are_due_as_the_share_grows() -> None:
    last, looks = 0.0, []
    for chunk in range(1, 1001):
        if is_due(chunk / 1000, last):
            last = chunk / 1000
            looks.append(chunk)
    assert looks[:4] == [1, 2, 3, 4]
    assert len(looks) < 60
    assert all(later / earlier >= 1.249 for earlier, later in pairwise(looks))
