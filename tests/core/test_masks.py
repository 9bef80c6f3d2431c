"""MaRC: against a slow re-statement, on a model that reads one planted word, rows that stop, spans and windows."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
from core.models import CLUES, FILLER, TEXTS, Shelf, count_passes, save_trainable
from core.test_controls import with_words
from core.test_engine import LONG_TEXT, MULTI_LABEL, explanations, only
from core.test_finetune import FAST, plant, tune
from core.test_methods import Formula, points
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.explanation import Outcome, Rejection
from lexplain.methods import Attribution, Inputs, Method, find_method
from lexplain.methods.masks import Span, find_spans, has_settled, marc, weigh_windows
from lexplain.methods.noise import draw_normal, draw_uniform

SILENT: dict[str, Any] = {"noise": 0.0, "forced": 0.0}


# --- against the slow one -----------------------------------------------------------------------------------------


def evidence(point: Tensor) -> Tensor:
    """A logit that the first dimension raises, the second one lowers, and saturates."""
    return 4 * torch.tanh(point[..., 0].sum(-1) - 0.5 * point[..., 1].square().sum(-1))


def small_problem(seed: int = 0) -> tuple[Formula, list[list[list[int]]]]:
    """Two rows of seven tokens: words of one, two and three pieces, one token outside words; a row is padded."""
    x, baseline = points(seed, rows=2, tokens=7, size=3)
    words = [[-1, 0, 1, 1, -1, 2, -1], [-1, 4, 4, 4, 5, -1, -1]]
    special = [[1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1, 1]]
    formula = Formula(evidence, x, baseline)
    formula.inputs = with_words(formula.inputs, words, special)
    formula.baseline = formula.inputs.baseline
    return formula, [[[1], [2, 3], [4], [5]], [[1, 2, 3], [4]]]


def over_tokens(masks: np.ndarray, words: Sequence[Sequence[int]], n_tokens: int) -> np.ndarray:
    scores = np.zeros(n_tokens)
    for positions, mask in zip(words, masks, strict=True):
        scores[list(positions)] = mask
    return scores


def probability(point: Tensor) -> Tensor:
    return evidence(point[None])[0].sigmoid()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "sigma", "complement": "log_p", "weight_decay": 0.0},
        {"complement": "log_p", "sparsity": 3.0},
        {"sufficiency": 0.0, "smoothness": 0.0, "learning_rate": 0.2},
        {"comprehensiveness": 0.0, "kernel": "sigma"},
        {"sufficiency": 2.0, "sparsity": 0.0},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_masks_equal_the_slow_ones(options: dict[str, Any]) -> None:
    """Every kernel, complement and weight, against the textbook's loops, autograd and torch's AdamW."""
    formula, words = small_problem()
    found = marc(formula, formula.inputs, steps=60, **SILENT, **options)
    search = oracles.MaskSearch(steps=60, **options)
    for row in range(2):
        masks, steps, _ = search.run(probability, formula.x[row], formula.baseline[row], words[row])
        assert steps == 60
        np.testing.assert_allclose(found.scores[row], over_tokens(masks, words[row], 7), rtol=0, atol=1e-9)
    sides = 2 - (0.0 in (options.get("sufficiency"), options.get("comprehensiveness")))
    assert found.evaluations.tolist() == [60 * sides] * 2
    assert formula.gradients == 2 * 60 * sides
    torch.testing.assert_close(found.baseline_score, evidence(formula.baseline))
    kept = torch.lerp(formula.baseline, formula.x, found.scores[..., None])
    torch.testing.assert_close(found.completeness_gap, evidence(formula.x) - evidence(kept))


def test_noisy_masks_equal_the_slow_ones() -> None:
    """The oracle is handed the same numbers: tokens forced to 0 or 1, and noise on the content of both texts."""
    formula, words = small_problem(1)
    found = marc(formula, formula.inputs, steps=40, forced=0.2, noise=0.3)
    for row in range(2):
        seed, content = formula.inputs.seeds[row : row + 1], ~formula.inputs.special[row]
        spread = formula.x[row, content].std(correction=0)

        def force(step: int, seed: Tensor = seed) -> dict[int, float]:
            uniform = draw_uniform(seed, torch.tensor([3 * step]), 7, 2)[0]
            flags = [(float(hidden) < 0.2, float(shown) < 0.2) for hidden, shown in uniform]
            return {place: float(shown) for place, (hidden, shown) in enumerate(flags) if hidden != shown}

        def noise(step: int, seed: Tensor = seed, size: Tensor = spread, content: Tensor = content) -> Any:
            drawn = [draw_normal(seed, torch.tensor([3 * step + side]), 7, 3)[0].double() for side in (1, 2)]
            return tuple((0.3 * size * normal).masked_fill(~content[:, None], 0.0) for normal in drawn)

        slow = oracles.MaskSearch(steps=40)
        masks, _, _ = slow.run(probability, formula.x[row], formula.baseline[row], words[row], force, noise)
        np.testing.assert_allclose(found.scores[row], over_tokens(masks, words[row], 7), rtol=0, atol=1e-9)


def test_rows_stop_one_by_one_and_are_no_longer_evaluated() -> None:
    formula, words = small_problem(2)
    options = {"sparsity": 4.0, "smoothness": 0.1}
    found = marc(formula, formula.inputs, steps=400, **SILENT, **options)
    taken = []
    for row in range(2):
        masks, steps, settled = oracles.MaskSearch(steps=400, **options).run(
            probability, formula.x[row], formula.baseline[row], words[row]
        )
        taken.append(2 * steps)
        assert found.converged[row] == settled
        assert not settled or masks.mean() < 0.45
        np.testing.assert_allclose(found.scores[row], over_tokens(masks, words[row], 7), rtol=0, atol=1e-8)
    assert found.evaluations.tolist() == taken
    assert formula.gradients == sum(taken)
    assert taken[0] != taken[1]
    assert min(taken) < 800


@pytest.mark.parametrize(
    ("now", "before", "step", "stops"),
    [
        (0.449, 0.4505, 199, True), (0.451, 0.4505, 199, False), (0.4, 0.4045, 199, True), (0.4, 0.4055, 199, False),
        (0.4, 0.4, 149, False), (0.299, 0.3, 49, True), (0.301, 0.3, 49, False), (0.19, 0.202, 49, True),
        (0.19, 0.203, 49, False), (0.21, 0.22, 49, False), (float("nan"), 0.2, 899, False),
    ],
)  # fmt: skip
def test_when_a_row_stops(now: float, before: float, step: int, stops: bool) -> None:
    """Calm for 50 steps, small, and either very small or 200 steps old."""
    assert has_settled(torch.tensor([now]), torch.tensor([before]), step).tolist() == [stops]


def test_the_text_that_says_nothing_is_let_go() -> None:
    """Only sparsity is left: every mask falls, the row stops, and no model is asked without its two terms."""
    formula, _ = small_problem()
    found = marc(formula, formula.inputs, steps=900, sufficiency=0.0, comprehensiveness=0.0, smoothness=0.0)
    assert formula.gradients == 0
    assert found.evaluations.tolist() == [0, 0]
    assert found.converged.all()
    assert float(found.scores.max()) < 0.3


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    formula, _ = small_problem()
    expected = marc(formula, formula.inputs, steps=60)
    formula.x[0, 1, 2] = math.nan
    formula.formula = lambda point: evidence(point) + 0 * point[..., 2].sum(-1)
    found = marc(formula, formula.inputs, steps=60)
    assert found.scores[0].isnan().any()
    assert torch.equal(found.scores[1], expected.scores[1])
    assert not found.converged[0]
    assert found.evaluations.tolist() == [100, 120]  # it leaves at the first look


@pytest.mark.parametrize("seed", range(4))
def test_a_word_has_the_sign_of_its_gradient_x_input(seed: int) -> None:
    formula, words = small_problem(seed)
    plain = marc(formula, formula.inputs, steps=30)
    signed = marc(formula, formula.inputs, steps=30, sign="gradient_x_input")
    x = formula.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(evidence(x).sum(), x)
    for row in range(2):
        for positions in words[row]:
            negative = float((x.detach() * gradient)[row, positions].sum()) < 0
            expected = plain.scores[row, positions] * (-1 if negative else 1)
            assert torch.equal(signed.scores[row, positions], expected)
    assert torch.equal(signed.scores.abs(), plain.scores)
    assert torch.equal(signed.completeness_gap, plain.completeness_gap)
    assert (signed.evaluations - plain.evaluations).tolist() == [1, 1]
    assert (signed.scores < 0).any()
    assert (signed.scores > 0).any()


def test_a_window_without_content_has_an_empty_mask() -> None:
    formula, _ = small_problem()
    formula.inputs = with_words(formula.inputs, [[-1] * 7] * 2, [[1] * 7] * 2)
    formula.baseline = formula.inputs.baseline
    found = marc(formula, formula.inputs, steps=60)
    assert (found.scores == 0).all()
    assert found.completeness_gap.tolist() == [0.0, 0.0]


# --- through the explainer ----------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What the method was given and returned for one batch."""

    evaluate: Any
    inputs: Inputs
    attribution: Attribution


def spy(seen: list[Kept]) -> Method:
    original = find_method("marc")

    def function(evaluate: Any, inputs: Inputs, **options: Any) -> Attribution:
        seen.append(Kept(evaluate, inputs, original.function(evaluate, inputs, **options)))
        return seen[-1].attribution

    return replace(original, function=function)


def explain(
    classifier: Classifier, texts: Sequence[str], *, seen: list[Kept] | None = None, **options: Any
) -> list[Outcome]:
    """Words have the largest token of theirs: they are equal."""
    shape = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "absmax", "budget_tokens": 4000}
    shape |= {name: options.pop(name) for name in list(options) if name in shape}
    return Explainer(classifier, spy([] if seen is None else seen), options, **shape).explain(texts)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """A tiny BERT for which one word decides; a text without any is "NA"."""
    folder = tmp_path_factory.mktemp("planted")
    tune(save_trainable(folder / "base"), plant(240), folder / "model", replace(FAST, epochs=12, patience=12))
    return Classifier.load(folder / "model")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Fifteen words each, one of them planted; none of "NA", which the empty text is too."""
    draw = random.Random(3)
    made = []
    for number in range(12):
        words = draw.choices(FILLER, k=14)
        words.insert(draw.randrange(15), CLUES["politics" if number % 2 else "sport"])
        made.append(" ".join(words))
    return made


def list_units(words: list[int], special: list[bool]) -> list[list[int]]:
    """Positions of each word, and of each token outside words, in the order of the text."""
    units: dict[str, list[int]] = {}
    for place, (word, frame) in enumerate(zip(words, special, strict=True)):
        if not frame:
            units.setdefault(f"word {word}" if word >= 0 else f"token {place}", []).append(place)
    return list(units.values())


def mix(classifier: Classifier, kept: Kept, masks: Tensor) -> Tensor:
    """Probability of each row's target when the masks are kept, by the classifier itself."""
    inputs = kept.inputs
    points = inputs.baseline + masks[..., None].to(inputs.x) * (inputs.x - inputs.baseline)
    with torch.no_grad():
        whole = classifier.probabilities(classifier.logits(inputs.x, inputs.mask, None))
        mixed = classifier.probabilities(classifier.logits(points, inputs.mask, None))
    return mixed.gather(1, whole.argmax(1, keepdim=True))[:, 0]


@dataclass
class Run:
    """The planted texts, explained."""

    kept: Kept
    outcomes: list[Outcome]


@pytest.fixture(scope="module")
def smooth(planted: Classifier, texts: list[str]) -> Run:
    """As smooth as MaRC is by default: neighbours are kept along, which is what spans are made of."""
    seen: list[Kept] = []
    outcomes = explain(planted, texts, seen=seen, steps=150)
    return Run(seen[0], outcomes)


@pytest.fixture(scope="module")
def sharp(planted: Classifier, texts: list[str]) -> Run:
    seen: list[Kept] = []
    outcomes = explain(planted, texts, seen=seen, steps=250, smoothness=0.1)
    return Run(seen[0], outcomes)


def test_the_kept_text_retains_the_prediction_and_the_complement_loses_it(planted: Classifier, smooth: Run) -> None:
    kept, masks = smooth.kept, smooth.kept.attribution.scores
    assert float(mix(planted, kept, torch.ones_like(masks)).min()) > 0.99
    assert float(mix(planted, kept, masks).min()) > 0.99
    assert float(mix(planted, kept, 1 - masks).max()) < 0.1
    assert float(mix(planted, kept, torch.zeros_like(masks)).max()) < 0.1
    relative = kept.attribution.completeness_gap / (kept.inputs.target_score - kept.attribution.baseline_score)
    assert float(relative.abs().max()) < 0.1


def test_the_planted_word_is_on_top(texts: list[str], sharp: Run) -> None:
    for text, outcome in zip(texts, sharp.outcomes, strict=True):
        found = only(outcome)
        ranked = [text[word.start : word.end] for word, _ in found.words]
        assert CLUES[found.label] in ranked[:2]
        assert found.words[0][1] > 0.75
        assert found.words[-1][1] < 0.1
        assert np.mean([score for _, score in found.words]) < 0.45


def test_more_smoothness_makes_longer_spans(smooth: Run, sharp: Run) -> None:
    lengths = []
    for run in (sharp, smooth):
        spans = []
        for outcome in run.outcomes:
            in_order = sorted(only(outcome).words, key=lambda pair: pair[0].start)
            spans += find_spans(np.array([score for _, score in in_order]))
        assert len(spans) >= len(run.outcomes)
        lengths.append(np.mean([span.stop - span.start for span in spans]))
    assert lengths[1] > lengths[0] + 1


def test_masks_that_stop_early_are_small(sharp: Run) -> None:
    kept = sharp.kept
    means = kept.attribution.scores.sum(1) / (~kept.inputs.special).sum(1)
    stopped = kept.attribution.converged
    assert 0 < int(stopped.sum()) < len(stopped)
    assert float(means[stopped].max()) < 0.45
    assert sum(only(outcome).converged for outcome in sharp.outcomes) == int(stopped.sum())
    for outcome in sharp.outcomes:
        assert only(outcome).evaluations == 500 or only(outcome).converged
        assert only(outcome).evaluations % 100 == 0


def test_rows_are_optimised_together(planted: Classifier) -> None:
    """The same masks as one text at a time, in a fifth of the passes or less."""
    texts = plant(32, seed=9).texts
    double = Classifier.load(planted.model.name_or_path, dtype=torch.float64)
    with count_passes(double) as few:
        together = explain(double, texts, steps=8)
    with count_passes(double) as many:
        alone = [explain(double, [text], steps=8)[0] for text in texts]
    assert 5 * few.backward <= many.backward
    assert 5 * few.forward <= many.forward
    for mine, theirs in zip(together, alone, strict=True):
        assert [word for word, _ in only(mine).words] == [word for word, _ in only(theirs).words]
        scores = [[score for _, score in only(outcome).words] for outcome in (mine, theirs)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)
        assert only(mine).completeness_gap == pytest.approx(only(theirs).completeness_gap, abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_pieces_of_a_word_are_equal_and_special_tokens_and_padding_0(shelf: Shelf, family: str) -> None:
    seen: list[Kept] = []
    explain(shelf.classifier(family), TEXTS, seen=seen, steps=10, max_windows=1)
    ((inputs, scores),) = [(kept.inputs, kept.attribution.scores) for kept in seen]
    assert not inputs.mask.all()
    assert (scores[inputs.special] == 0).all()
    assert ((scores[~inputs.special] > 0) & (scores[~inputs.special] < 1)).all()
    several = 0
    for row in range(len(scores)):
        for word in set(inputs.words[row].tolist()) - {-1}:
            pieces = scores[row, inputs.words[row] == word]
            assert len(pieces.unique()) == 1
            several += len(pieces) > 1
    assert several > 3


@pytest.mark.parametrize(
    ("labels", "problem_type"), [(("a", "b", "c", "d", "e"), MULTI_LABEL), (("toxic",), None), (("a", "b"), None)],
    ids=["multi_label", "binary", "single_label"],
)  # fmt: skip
def test_the_probability_is_that_of_the_model(shelf: Shelf, labels: tuple[str, ...], problem_type: Any) -> None:
    """Sigmoids for a multi-label or one-logit model, a softmax else; each target has a mask of its own."""
    classifier = shelf.classifier("bert", labels=labels, problem_type=problem_type, dtype=torch.float64)
    seen: list[Kept] = []
    (outcome,) = explain(classifier, [TEXTS[0]], seen=seen, steps=30, **SILENT)
    (kept,) = seen
    logits = classifier.logits(kept.inputs.x, kept.inputs.mask, None)
    rows = torch.arange(len(logits))
    found = kept.evaluate.probabilities(logits, rows)
    expected = [explanation.probability for explanation in explanations(outcome)]
    np.testing.assert_allclose(found.detach(), expected, rtol=0, atol=1e-12)
    assert len(expected) > 1 or problem_type is None
    slow = oracles.MaskSearch(steps=30)
    for row, explanation in enumerate(explanations(outcome)):
        label = classifier.labels.index(explanation.label)

        def score(point: Tensor, label: int = label) -> Tensor:
            return classifier.probabilities(classifier.logits(point[None], torch.ones(1, len(point)).bool(), None))[
                0, label
            ]

        positions = list_units(kept.inputs.words[row].tolist(), kept.inputs.special[row].tolist())
        masks, _, _ = slow.run(score, kept.inputs.x[row], kept.inputs.baseline[row], positions)
        expected_scores = over_tokens(masks, positions, kept.inputs.x.shape[1])
        np.testing.assert_allclose(kept.attribution.scores[row], expected_scores, rtol=0, atol=1e-6)


def test_the_same_text_has_the_same_mask_in_any_order(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    one = explain(classifier, [*TEXTS, LONG_TEXT], steps=12)
    other = explain(classifier, [LONG_TEXT, *TEXTS[::-1]], steps=12)
    assert [only(outcome).words for outcome in one] == [only(outcome).words for outcome in [*other[:0:-1], other[0]]]


def test_spans_are_found_on_the_mask_whatever_the_sign(shelf: Shelf) -> None:
    """Also in a text of several windows; a span's score is the mean of its words' signed ones."""
    classifier = shelf.classifier("bert", dtype=torch.float64)
    plain, signed = (
        explain(classifier, [*TEXTS, LONG_TEXT], steps=12, sign=sign) for sign in ("none", "gradient_x_input")
    )
    negative = 0
    for one, other in zip(plain, signed, strict=True):
        mine, theirs = only(one), only(other)
        assert [words for words, _ in mine.spans] == [words for words, _ in theirs.spans]
        scores = dict(theirs.words)
        for words, score in theirs.spans:
            assert score == pytest.approx(np.mean([scores[word] for word in words]), abs=1e-12)
        sizes = {word: abs(score) for word, score in theirs.words}
        assert sizes == pytest.approx(dict(mine.words), abs=1e-12), "windows of different signs fade no mask"
        assert theirs.token_norm == pytest.approx(mine.token_norm)
        negative += sum(score < 0 for _, score in theirs.words)
    assert negative > 5
    assert only(plain[-1]).n_windows > 1
    assert sum(len(only(outcome).spans) for outcome in plain) > 3


def test_a_text_that_fits_no_memory_is_rejected_and_the_others_are_not(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = shelf.classifier("bert", dtype=torch.float64)
    forward = classifier.logits

    def fail_on_long(embeddings: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
        if embeddings.requires_grad and embeddings.shape[1] > 30:
            raise torch.OutOfMemoryError
        return forward(embeddings, mask, types)

    expected = explain(classifier, TEXTS[:2], steps=10)
    monkeypatch.setattr(classifier, "logits", fail_on_long)
    found = explain(classifier, [*TEXTS[:2], LONG_TEXT], steps=10)
    assert isinstance(found[2], Rejection)
    assert found[2].reason == "out_of_memory"
    for mine, theirs in zip(found, expected, strict=False):
        scores = [[score for _, score in only(outcome).words] for outcome in (mine, theirs)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)


def test_the_registry_knows_that_scores_are_a_mask() -> None:
    found = find_method("marc")
    assert (found.id, found.mask, found.signed, found.stochastic, found.complete) == (
        "marc.v1",
        True,
        False,
        True,
        False,
    )
    assert not find_method("integrated_gradients").mask
    assert found.complete_options({})["steps"] == 900
    assert found.check({"comprehensiveness": 0}) == found.check({"sufficiency": 0.0}) == []
    (problem,) = found.check({"comprehensiveness": 0, "sufficiency": 0.0})
    assert str(problem).startswith("method.comprehensiveness=0 must be above 0 where sufficiency is 0")
    assert [problem.field for problem in found.check({"steps": 0, "kernel": "box", "forced": 0.6})] == [
        "method.steps", "method.kernel", "method.forced",
    ]  # fmt: skip


def test_presets_write_out_what_the_code_and_the_paper_fix() -> None:
    """The released code is our default; the paper knows no forced tokens and no noise."""
    found = find_method("marc")
    released, paper = (found.presets[name] for name in ("marc-2023", "marc-paper"))
    assert found.complete_options(released) == found.complete_options({})
    assert set(found.options) - set(released) == {"sign"}
    assert set(released) - set(paper) == {"steps", "learning_rate", "baseline"}
    differing = {name: value for name, value in paper.items() if released[name] != value}
    assert differing == {"kernel": "sigma", "complement": "log_p", "weight_decay": 0.0, "forced": 0.0, "noise": 0.0}


# --- spans and windows --------------------------------------------------------------------------------------------


def test_spans_are_runs_at_or_above_the_threshold() -> None:
    scores = np.array([0.5, 0.9, 0.1, 0.0, 0.7, 0.49, 0.6])
    assert find_spans(scores) == [
        Span(0, 2, pytest.approx(0.7)), Span(4, 5, pytest.approx(0.7)), Span(6, 7, pytest.approx(0.6)),
    ]  # fmt: skip
    assert find_spans(scores, threshold=0.0) == [Span(0, 7, pytest.approx(scores.mean()))]
    assert find_spans(scores, threshold=0.95) == []
    assert find_spans(np.zeros(0)) == []


some_masks = st.lists(st.floats(0, 1), max_size=30)


@settings(max_examples=60)
@given(masks=some_masks, threshold=st.floats(0, 1))
def test_spans_hold_every_kept_word_once_and_no_other(masks: list[float], threshold: float) -> None:
    scores = np.array(masks, dtype=np.float64)
    spans = find_spans(scores, threshold=threshold)
    covered = [place for span in spans for place in range(span.start, span.stop)]
    assert covered == [place for place, mask in enumerate(masks) if mask >= threshold]
    assert all(left.stop < right.start for left, right in pairwise(spans))


def blend(masks: Sequence[np.ndarray], starts: Sequence[int]) -> np.ndarray:
    """One mask of a text from those of its windows."""
    ranges = [(start, start + len(mask)) for start, mask in zip(starts, masks, strict=True)]
    blended = np.zeros(ranges[-1][1])
    for (start, stop), weight, mask in zip(ranges, weigh_windows(ranges), masks, strict=True):
        blended[start:stop] += weight * mask
    return blended


def test_windows_go_over_into_one_another_in_equal_steps() -> None:
    blended = blend([np.zeros(5), np.ones(6), np.full(3, 0.5)], [0, 2, 7])
    np.testing.assert_allclose(blended, [0, 0, 0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.5], rtol=0, atol=1e-15)
    assert blend([np.array([0.2, 0.4])], [0]).tolist() == [0.2, 0.4]
    assert blend([np.array([0.2]), np.array([0.4])], [0, 1]).tolist() == [0.2, 0.4]
    assert len(blend([np.zeros(0)], [0])) == 0


@settings(max_examples=60)
@given(st.data())
def test_weights_of_a_token_sum_to_one(data: st.DataObject) -> None:
    """Also where three or more windows overlap: what they agree about stays as it is."""
    capacity = data.draw(st.integers(1, 8))
    overlap = data.draw(st.integers(0, capacity - 1))
    starts = [number * (capacity - overlap) for number in range(data.draw(st.integers(1, 5)))]
    n_tokens = starts[-1] + data.draw(st.integers(overlap + 1 if len(starts) > 1 else 1, capacity))
    text = np.array(data.draw(st.lists(st.floats(0, 1), min_size=n_tokens, max_size=n_tokens)))
    pieces = [text[start : start + capacity] for start in starts]
    np.testing.assert_allclose(blend(pieces, starts), text, rtol=0, atol=1e-12)
    weights = weigh_windows([(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)])
    assert all((weight > 0).all() for weight in weights)
