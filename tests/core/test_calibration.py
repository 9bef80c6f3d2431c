"""Calibrated rules: fitted to a sample, measured on what they were not fitted on, as few nodes as a list needs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.integrate import quad

from lexplain.calibration import (
    MOST_NODES,
    QUADRATURE_SHARE,
    SAMPLE_NODES,
    CalibratedRule,
    Calibration,
    SampledPath,
    fit_calibration,
)
from lexplain.errors import MethodError
from lexplain.methods.paths import weigh_nodes

VOCABULARY = tuple(f"word{number}" for number in range(12))


def bump(alpha: float | NDArray[np.float64], centre: float, width: float) -> NDArray[np.float64]:
    """How a gradient moves along the path of a classifier: at rest at both ends, and busy in between."""
    return np.asarray(np.exp(-(((alpha - centre) / width) ** 2)))


def make_sample(count: int, *, nodes: int = SAMPLE_NODES[0], width: float = 0.1, seed: int = 0) -> list[SampledPath]:
    """Documents whose tokens have bumps of their own near .3, and words that differ between documents."""
    generator = np.random.default_rng(seed)
    alphas = np.linspace(0, 1, nodes)
    sample = []
    for number in range(count):
        centres = generator.normal(0.35, 0.05, 12)
        widths = width * generator.uniform(0.6, 1.4, 12)
        sizes = np.linspace(2, -1, 12) + generator.normal(0, 1.0, 12)
        path = np.stack([size * bump(alphas, c, w) for size, c, w in zip(sizes, centres, widths, strict=True)], 1)
        sample.append(SampledPath(("a", "b")[number % 2], VOCABULARY, path))
    return sample


def integrate(path: SampledPath) -> NDArray[np.float64]:
    """The trapezoid over many points: the bumps rest at both ends."""
    return np.asarray(path.derivatives.sum(0) / (len(path.derivatives) - 1))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fit_calibration(make_sample(48), n_documents=1000)


def at_nodes(rule: CalibratedRule, fresh: list[SampledPath]) -> torch.Tensor:
    """(B, n, S) derivatives at the rule's nodes, which all lie on the grid of the fresh documents."""
    step = len(fresh[0].derivatives) - 1
    places = np.round(np.array(rule.nodes) * step).astype(int)
    assert np.array(rule.nodes) == pytest.approx(places / step)
    return torch.tensor(np.stack([path.derivatives[places] for path in fresh]))


def errors(rule: CalibratedRule, fresh: list[SampledPath]) -> NDArray[np.float64]:
    exact = np.stack([integrate(path) for path in fresh])
    off = np.linalg.norm(weigh_nodes(rule.weights, at_nodes(rule, fresh)).numpy() - exact, axis=1)
    return np.asarray(off / np.linalg.norm(exact, axis=1))


def test_the_largest_rule_is_the_integral(calibration: Calibration) -> None:
    """Against adaptive quadrature of a bump that no sample held."""
    rule = calibration.rules[-1]
    found = np.array(rule.weights) @ bump(np.array(rule.nodes), 0.33, 0.11)
    assert found == pytest.approx(quad(lambda alpha: float(bump(alpha, 0.33, 0.11)), 0, 1)[0], rel=0.01)


def test_rules_grow_by_one_node_and_get_better(calibration: Calibration) -> None:
    assert [len(rule.nodes) for rule in calibration.rules] == list(range(1, MOST_NODES + 1))
    for rule in calibration.rules:
        assert list(rule.nodes) == sorted(set(rule.nodes))
        assert rule.nodes[0] >= 0
        assert rule.nodes[-1] <= 1
        assert min(rule.weights) >= 0
        assert len(rule.weights) == len(rule.nodes)
        assert rule.error_median <= rule.error_p90
    found = [rule.error_median for rule in calibration.rules]
    assert found[7] < found[4] / 3 < found[1] / 9


def test_errors_are_those_of_documents_not_seen(calibration: Calibration) -> None:
    """What a rule says of its own error holds for other documents."""
    fresh = make_sample(200, nodes=129, seed=9)
    for nodes in (3, 5, 8):
        rule = calibration.rule(nodes)
        found = errors(rule, fresh)
        assert np.median(found) == pytest.approx(rule.error_median, rel=0.5)
        assert np.quantile(found, 0.9) == pytest.approx(rule.error_p90, rel=0.5)


def test_few_calibrated_nodes_do_what_many_uniform_ones_do(calibration: Calibration) -> None:
    fresh = make_sample(100, nodes=385, seed=3)
    exact = np.stack([integrate(path) for path in fresh])
    middles = np.stack([path.derivatives[32::64].mean(0) for path in fresh])  # the 6 midpoints
    uniform = np.linalg.norm(middles - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert np.median(errors(calibration.rule(6), make_sample(100, nodes=129, seed=3))) < np.median(uniform) / 3


def test_more_documents_ask_for_more_nodes() -> None:
    """The noise between documents falls with their number; what the nodes do to every document alike does not."""
    sample = make_sample(48)
    found = [fit_calibration(sample, n_documents=count).keywords for count in (48, 10_000, 10_000_000)]
    nodes = [each.nodes for each in found]
    assert nodes == sorted(nodes)
    assert nodes[0] < nodes[-1]
    assert all(each.quadrature_share <= QUADRATURE_SHARE for each in found[:2])
    assert found[-1].list_overlap == pytest.approx(1.0, abs=0.05)
    sampling = {each.sampling_overlap for each in found}
    assert len(sampling) == 1, "how two halves agree has nothing to do with nodes"


def test_equal_halves_overlap_wholly() -> None:
    """Rank-biased overlap of a list with itself is 1, of lists without a common word 0."""
    twins = [path for path in make_sample(24) for _ in (0, 1)]
    in_pairs = [dataclasses.replace(path, label="a") for path in twins]
    assert fit_calibration(in_pairs, n_documents=48).keywords.sampling_overlap == pytest.approx(1.0)
    other = [
        dataclasses.replace(path, label="a", words=tuple(f"{word}{number % 2}" for word in VOCABULARY))
        for number, path in enumerate(twins)
    ]
    assert fit_calibration(other, n_documents=48).keywords.sampling_overlap == 0.0


def test_the_order_of_weights_survives_json(calibration: Calibration) -> None:
    assert Calibration.from_json(calibration.to_json()) == calibration


def test_documents_without_scores_teach_nothing(calibration: Calibration) -> None:
    sample = make_sample(48)
    empty = dataclasses.replace(sample[0], derivatives=np.zeros_like(sample[0].derivatives))
    broken = dataclasses.replace(sample[0], derivatives=np.full_like(sample[0].derivatives, np.nan))
    assert fit_calibration([empty, *sample, broken], n_documents=1000) == calibration


def test_too_few_documents_are_refused() -> None:
    with pytest.raises(MethodError, match="sample=11 documents"):
        fit_calibration(make_sample(11), n_documents=100)


def test_a_rule_of_another_size_is_refused(calibration: Calibration) -> None:
    with pytest.raises(MethodError, match=r"nodes=17 .* nodes: 2 to 16"):
        calibration.rule(17)


def test_a_sharper_gradient_shows_in_the_reference_error() -> None:
    smooth = fit_calibration(make_sample(24), n_documents=100)
    sharp = fit_calibration(make_sample(24, width=0.03), n_documents=100)
    assert smooth.reference_error < 0.01 < sharp.reference_error


def test_classes_too_many_to_compare_are_judged_by_the_rules_error() -> None:
    """No word in three documents of a class: no noise to compare with is no licence for one node."""
    sample = [dataclasses.replace(path, label=f"class{number // 2}") for number, path in enumerate(make_sample(48))]
    keywords = fit_calibration(sample, n_documents=1_000_000).keywords
    assert keywords.quadrature_share is None
    assert keywords.nodes > 1
    assert fit_calibration(sample, n_documents=1_000_000).rule(keywords.nodes).error_p90 <= 0.1
