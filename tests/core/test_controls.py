"""Random scores and occlusion; the units and the random numbers that methods share."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import oracles
from core.models import BATCH_TOLERANCE, TEXTS, Shelf, count_passes
from core.test_engine import LABELS, LONG_TEXT, MULTI_LABEL, assert_close, explanations, only, word_scores
from core.test_methods import Formula, points
from lexplain.engine import Explainer
from lexplain.methods import Inputs, find_method
from lexplain.methods.controls import occlusion, random
from lexplain.methods.noise import draw_normal, draw_uniform, measure_spread
from lexplain.methods.units import count_tokens, number_units, spread_over_tokens

SETTINGS = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum", "budget_tokens": 600}


def with_words(inputs: Inputs, words: list[list[int]], special: list[list[int]]) -> Inputs:
    """Inputs with the words given, whose baseline equals x where tokens are special."""
    flags = torch.tensor(special, dtype=torch.bool)
    baseline = torch.where(flags[..., None], inputs.x, inputs.baseline)
    seeds = torch.arange(len(words)) + 7
    return dataclasses.replace(inputs, words=torch.tensor(words), special=flags, baseline=baseline, seeds=seeds)


# --- units --------------------------------------------------------------------------------------------------------


def test_units_are_words_and_tokens_outside_words() -> None:
    x, baseline = points(0, rows=4, tokens=7, size=1)
    inputs = with_words(
        Formula(lambda point: point.sum((1, 2)), x, baseline).inputs,
        [[-1, 3, 3, -1, 5, -1, -1], [-1, 0, -1, 0, 1, -1, -1], [-1, -1, -1, 2, 9, 9, -1], [-1] * 7],
        [[1, 0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1], [1] * 7],
    )
    units = number_units(inputs)
    assert units.tolist() == [
        [-1, 0, 0, 1, 2, -1, -1],
        [-1, 0, 1, 0, 2, 3, -1],  # a token outside words between two pieces of one word
        [-1, 0, 1, 2, 3, 3, -1],
        [-1] * 7,
    ]
    assert count_tokens(units).tolist() == [[2, 1, 1, 0], [2, 1, 1, 1], [1, 1, 1, 2], [0, 0, 0, 0]]
    spread = spread_over_tokens(torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 4), units)
    assert spread[0].tolist() == [0, 10, 10, 20, 30, 0, 0]
    assert spread[3].tolist() == [0] * 7


# --- random numbers -----------------------------------------------------------------------------------------------


def splitmix64(state: int, count: int) -> list[int]:
    """Steele et al. 2014, with Python's own integers."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_numbers_are_those_of_splitmix64() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # the published test vector
    seeds = [0, 1, 2**63 - 1, 987654321987654321]
    drawn = draw_uniform(torch.tensor(seeds), torch.tensor([0, 1, 2, 899]), 3, 2)
    for seed, draw, found in zip(seeds, [0, 1, 2, 899], drawn, strict=True):
        (start,) = splitmix64((seed + (draw - 1) * 0x9E3779B97F4A7C15) % 2**64, 1)
        assert found.flatten().tolist() == [number / 2**64 for number in map(clear_low_bits, splitmix64(start, 6))]


def clear_low_bits(number: int) -> int:
    return number >> 11 << 11


def test_numbers_have_their_distribution() -> None:
    seeds, draws = torch.arange(40).repeat_interleave(10), torch.arange(10).repeat(40)
    uniform = draw_uniform(seeds, draws, 250)
    assert 0 <= float(uniform.min()) < 1e-4 < 0.9999 < float(uniform.max()) < 1
    shares = torch.histc(uniform.float(), bins=20, min=0, max=1) / uniform.numel()
    assert float((shares - 0.05).abs().max()) < 0.003  # 0.003 is four standard deviations of a share
    normal = draw_normal(seeds, draws, 50, 5).double()
    moments = [float((normal**power).mean()) for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.1)
    flat = normal.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))  # between draws and between seeds
    assert float(correlation.abs().max()) < 6 / 250**0.5
    assert abs(float(torch.corrcoef(torch.stack([flat[:, :-1].flatten(), flat[:, 1:].flatten()]))[0, 1])) < 0.015


def test_numbers_do_not_depend_on_padding_or_batch_mates() -> None:
    seeds, draws = torch.tensor([5, 99]), torch.tensor([0, 3])
    for drawing in (draw_uniform, draw_normal):
        both = drawing(seeds, draws, 9, 4)
        assert torch.equal(drawing(seeds[1:], draws[1:], 6, 4)[0], both[1, :6])
        assert not torch.equal(drawing(seeds[1:], draws[1:] + 1, 9, 4)[0], both[1])


def test_the_spread_is_that_of_the_content() -> None:
    x, baseline = points(3, rows=2, tokens=4, size=5)
    inputs = with_words(
        Formula(lambda point: point.sum((1, 2)), x, baseline).inputs, [[-1, 0, 1, -1]] * 2, [[1, 0, 0, 1], [1] * 4]
    )  # fmt: skip
    assert measure_spread(inputs).tolist() == [pytest.approx(np.std(x[0, 1:3].numpy())), 0.0]


# --- random -------------------------------------------------------------------------------------------------------


def test_random_scores_are_uniform_over_words_and_keep_their_row() -> None:
    x, baseline = points(1, rows=300, tokens=6, size=2)
    formula = Formula(lambda point: point.sum((1, 2)), x, baseline)
    inputs = with_words(formula.inputs, [[-1, 0, 1, 1, 1, -1]] * 300, [[1, 0, 0, 0, 0, 1]] * 300)
    found = random(formula, inputs)
    short, long = found.scores[:, 1], found.scores[:, 2:5].sum(1)
    assert float(short.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(long.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(long.std()) == pytest.approx(12**-0.5, abs=0.03)
    assert torch.equal(found.scores[:, [0, 5]], torch.zeros(300, 2, dtype=torch.float64))
    assert len(found.scores.unique(dim=0)) == 300
    alone = dataclasses.replace(
        inputs, **{name: getattr(inputs, name)[7:8] for name in ("x", "baseline", "words", "special", "seeds", "target_score")}
    )  # fmt: skip
    formula = Formula(lambda point: point.sum((1, 2)), x[7:8], baseline[7:8])
    assert torch.equal(random(formula, alone).scores[0], found.scores[7])


# --- occlusion ----------------------------------------------------------------------------------------------------


def test_occlusion_of_a_linear_function_is_weight_times_difference() -> None:
    x, baseline = points(2, rows=3, tokens=5, size=4)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    formula = Formula(lambda point: (weight * point).sum((1, 2)), x, baseline)
    formula.inputs = with_words(formula.inputs, [[-1, 0, 1, -1, -1]] * 3, [[1, 0, 0, 0, 1]] * 3)
    formula.baseline = formula.inputs.baseline
    found = occlusion(formula, formula.inputs)
    expected = (weight * (x - formula.baseline)).sum(-1)
    torch.testing.assert_close(found.scores, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.completeness_gap, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.evaluations.tolist() == [0, 0, 0]
    assert formula.gradients == 0


def test_occlusion_equals_the_slow_one() -> None:
    x, baseline = points(4, rows=2, tokens=6, size=3)
    weight = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def score(point: Tensor) -> Tensor:
        return torch.tanh(point @ weight).cumsum(-1).prod(-1)

    formula = Formula(score, x, baseline)
    inputs = with_words(formula.inputs, [[-1, 0, 0, 1, -1, -1], [-1, 2, 3, 3, 3, -1]], [[1, 0, 0, 0, 0, 1]] * 2)
    found = occlusion(formula, inputs)
    for row, words in enumerate([[[1, 2], [3], [4]], [[1], [2, 3, 4]]]):
        expected = oracles.occlusion(lambda point: score(point[None])[0], x[row], inputs.baseline[row], words)
        np.testing.assert_allclose(found.scores[row], expected, rtol=0, atol=1e-12)


def test_occluded_words_are_those_of_the_text(shelf: Shelf) -> None:
    """Each word's tokens replaced by the mask token, in a text of one window, against the model's own library."""
    slow = oracles.SlowExplainer(shelf.folder("bert"))
    classifier = shelf.classifier("bert", dtype=torch.float64)
    found = only(Explainer(classifier, find_method("occlusion"), {}, **SETTINGS).explain([TEXTS[0]])[0])
    whole = slow.tokenizer(TEXTS[0], return_offsets_mapping=True)
    ids, label = torch.tensor(whole["input_ids"]), LABELS.index(found.label)
    embed = slow.model.get_input_embeddings()
    for word, score in found.words:
        inside = [word.start <= start < end <= word.end for start, end in whole["offset_mapping"]]
        without = ids.masked_fill(torch.tensor(inside), slow.tokenizer.mask_token_id)
        with torch.no_grad():
            lost = slow.logit(embed(ids), label) - slow.logit(embed(without), label)
        assert score == pytest.approx(float(lost), abs=1e-10)
    assert found.other_score != 0


@pytest.mark.parametrize("method", ["random", "occlusion"])
def test_scores_do_not_depend_on_batch_mates(shelf: Shelf, method: str) -> None:
    classifier = shelf.classifier("bert")
    texts = [*TEXTS, LONG_TEXT]
    together = Explainer(classifier, find_method(method), {}, **SETTINGS).explain(texts)
    for text, outcome in zip(texts, together, strict=True):
        alone = Explainer(classifier, find_method(method), {}, **SETTINGS | {"budget_tokens": 1}).explain([text])[0]
        assert_close(only(outcome), only(alone), BATCH_TOLERANCE)


def test_targets_of_a_window_share_their_occluded_texts(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert", problem_type=MULTI_LABEL, labels=tuple("abcdefgh"))
    explainer = Explainer(classifier, find_method("occlusion"), {}, **SETTINGS)
    with count_passes(classifier) as passes:
        found = explanations(explainer.explain([TEXTS[0]])[0])
    assert len(found) > 1
    n_units = len(found[0].words) + 1  # and the full stop
    assert passes.sequences == 1 + n_units + 1  # prediction, occluded texts, baseline
    assert passes.backward == 0
    assert not np.allclose(word_scores(found[0]), word_scores(found[1]))
