"""Nodes and weights fitted to a model: where on the path its gradient moves is much the same in every document.

Pure arithmetic on the derivatives of a sample, which `Explainer.sample_paths` collects; the fitted rules travel to
the executors as plain numbers. Shape letters: N nodes of the fine grid, n nodes of a rule, S tokens of a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lexplain.errors import MethodError
from lexplain.overlap import rank_biased_overlap

if TYPE_CHECKING:
    from scipy.interpolate import CubicSpline

SAMPLE_NODES = (33, 65, 129)
"""Equally spaced points at which a sample is evaluated, both ends among them: more where the gradient is sharper."""

SAMPLE_DOCUMENTS = 48
"""Documents of a sample; errors of the rules hardly fall with more."""

MOST_REFERENCE_ERROR = 0.04
"""Largest `reference_error` at which a sample's own reference counts as converged."""

QUADRATURE_SHARE = 0.5
"""Error that few nodes may add to a word's mean, as a share of the standard error between documents."""

MOST_NODES = 16
"""Nodes of the largest fitted rule: past it a fixed rule is as good."""

# Candidate nodes between two sampled ones: the gradient is smooth there, so that it can be interpolated.
_FINER = 4
# Of the sample, what rules are fitted on; their errors are measured on the rest.
_FITTED_SHARE = 2 / 3
# L2 error that nine documents of ten must stay below where no word can be compared.
_UNCOMPARED_ERROR = 0.1
# Words of a class whose order is compared.
_LISTED = 20
# How far a node may move in one step of the search, in candidates.
_REACH = 6


@dataclass(frozen=True)
class CalibratedRule:
    """A quadrature rule for one model and baseline.

    Attributes:
        nodes: Ascending, on [0, 1].
        weights: Not negative; they need not sum to 1.
        error_median: Median L2 error relative to the scores' L2 norm, on documents that the rule was not fitted on.
        error_p90: Its 90th percentile.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    error_median: float
    error_p90: float


@dataclass(frozen=True)
class KeywordAccuracy:
    """What few nodes do to class keyword lists, measured on the sample.

    Attributes:
        nodes: Nodes of the rule for class keyword tables.
        quadrature_share: Error that this rule adds to a word's mean over the corpus, as a share of its standard error;
            None where no word stands in three documents of one class: then the rule's own error decides.
        list_overlap: Rank-biased overlap of its lists with the converged ones of the same documents, mean over classes.
        sampling_overlap: Rank-biased overlap of converged lists of one half of the documents with those of the other.
    """

    nodes: int
    quadrature_share: float | None
    list_overlap: float | None
    sampling_overlap: float | None


@dataclass(frozen=True)
class SampledPath:
    """One document of a sample.

    Attributes:
        label: The label that is explained.
        words: Word key of each token, None outside words, (S,).
        derivatives: (N, S) along the line by token, at equally spaced points from baseline to input.
    """

    label: str
    words: tuple[str | None, ...]
    derivatives: NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """What a sample of documents says about one model and baseline.

    Attributes:
        rules: Fitted rules, by ascending number of nodes.
        n_documents: Documents of the sample.
        reference_error: Median relative difference between the sample's own reference and that of half its points.
        keywords: How many nodes a class keyword list needs.
    """

    rules: tuple[CalibratedRule, ...]
    n_documents: int
    reference_error: float
    keywords: KeywordAccuracy

    def rule(self, nodes: int) -> CalibratedRule:
        """Return the rule with so many nodes.

        Raises:
            MethodError: There is none.
        """
        for rule in self.rules:
            if len(rule.nodes) == nodes:
                return rule
        raise MethodError(
            f"nodes={nodes} must be the size of a calibrated rule. No point would have been placed. Write nodes: "
            f"2 to {len(self.rules[-1].nodes)}."
        )

    def to_json(self) -> str:
        """Return all of it as text; numbers keep every digit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Return what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        rules: list[dict[str, Any]] = fields.pop("rules")
        for rule in rules:
            rule |= {name: tuple(rule[name]) for name in ("nodes", "weights")}
        keywords = KeywordAccuracy(**fields.pop("keywords"))
        return cls(rules=tuple(CalibratedRule(**rule) for rule in rules), keywords=keywords, **fields)


def fit_calibration(sample: Sequence[SampledPath], *, n_documents: int) -> Calibration:
    """Fit rules of 1 to `MOST_NODES` nodes to a sample, and choose how many a keyword list needs.

    Nodes are added one after the other, where they lower the mean squared relative error most, then moved until no
    move lowers it; weights are the non-negative least squares ones.

    Args:
        sample: At least 12 documents with scores: one without teaches nothing.
        n_documents: Documents of the corpus that the model explains: the more, the smaller the noise between them,
            and the more accurate the nodes must be to stay below it.

    Raises:
        MethodError: Fewer than 12 documents have scores.

    Note:
        Runs on: driver. Cost: seconds; Gram matrices of the documents are all that is kept.
    """
    sample = [each for each in sample if np.isfinite(each.derivatives).all() and np.any(_reference(each.derivatives))]
    if len(sample) < 12:
        raise MethodError(
            f"sample={len(sample)} documents with scores are too few to calibrate on. The rules would have fitted their "
            "noise. Write accuracy: document, or a larger corpus."
        )
    paths = [each.derivatives for each in sample]
    cut = round(len(paths) * _FITTED_SHARE)
    gram, projection = _normalised_gram(paths[:cut])
    held_out = [_finer(path) / np.linalg.norm(_reference(path)) for path in paths[cut:]]
    rules: list[CalibratedRule] = []
    chosen: list[int] = []
    for _ in range(MOST_NODES):
        chosen = _move(gram, projection, _add_node(gram, projection, chosen))
        rules.append(_measure(gram, projection, sorted(chosen), held_out))
    halves = [
        np.linalg.norm(_reference(path) - _reference(path[::2])) / np.linalg.norm(_reference(path)) for path in paths
    ]
    keywords = _choose_nodes(sample, rules, n_documents)
    return Calibration(tuple(rules), len(paths), float(np.median(halves)), keywords)


def _choose_nodes(sample: Sequence[SampledPath], rules: Sequence[CalibratedRule], n_documents: int) -> KeywordAccuracy:
    """Return the smallest rule whose error in the words' means stays below `QUADRATURE_SHARE` of their noise.

    The mean difference of a word's scores from the converged ones is partly chance, which falls with the number of
    documents as their own noise does, and partly the same in every document, which does not.
    """
    exact = [_score_words(each, _reference(each.derivatives)) for each in sample]
    growth = n_documents / len(sample)
    for rule in rules:
        numbers = np.round(np.array(rule.nodes) * _FINER * (len(sample[0].derivatives) - 1)).astype(int)
        found = [_score_words(each, rule.weights @ _finer(each.derivatives)[numbers]) for each in sample]
        share = _compare_noise(sample, exact, found, growth)
        fits = rule.error_p90 <= _UNCOMPARED_ERROR if share is None else share <= QUADRATURE_SHARE
        if fits or rule is rules[-1]:
            break
    labels = [each.label for each in sample]
    overlap = _mean_overlap(_list_words(labels, exact), _list_words(labels, found))
    halves = [_list_words(labels[half::2], exact[half::2]) for half in (0, 1)]
    return KeywordAccuracy(len(rule.nodes), share, overlap, _mean_overlap(*halves))


def _score_words(document: SampledPath, scores: NDArray[np.float64]) -> dict[str, float]:
    """Return the sum of each word's scores, divided by the L2 norm of all."""
    sums: dict[str, float] = {}
    norm = float(np.linalg.norm(scores)) or 1.0
    for word, score in zip(document.words, scores.tolist(), strict=True):
        if word is not None:
            sums[word] = sums.get(word, 0.0) + score / norm
    return sums


def _compare_noise(
    sample: Sequence[SampledPath], exact: Sequence[dict[str, float]], found: Sequence[dict[str, float]], growth: float
) -> float | None:
    """Return the error of the words' means over a corpus `growth` times the sample, as a share of their noise."""
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for document, right, approximate in zip(sample, exact, found, strict=True):
        for word, score in right.items():
            pairs.setdefault((document.label, word), []).append((score, approximate[word] - score))
    bias = chance = noise = 0.0
    for values in pairs.values():
        if len(values) < 3:
            continue
        scores, errors = np.array(values).T
        variance = errors.var(ddof=1) / len(values)
        bias += errors.mean() ** 2 - variance
        chance += variance / growth
        noise += scores.var(ddof=1) / len(values) / growth
    return float(np.sqrt((max(bias, 0.0) + chance) / noise)) if noise else None


def _list_words(labels: Sequence[str], documents: Sequence[dict[str, float]]) -> dict[str, list[str]]:
    """Return each label's words by falling mean score; those of one document alone are left out."""
    totals: dict[str, dict[str, list[float]]] = {}
    for label, words in zip(labels, documents, strict=True):
        for word, score in words.items():
            totals.setdefault(label, {}).setdefault(word, []).append(score)
    lists = {}
    for label, words_of in totals.items():
        means = {word: float(np.mean(scores)) for word, scores in words_of.items() if len(scores) > 1}
        lists[label] = sorted((word for word in means if means[word] > 0), key=lambda word: (-means[word], word))[
            :_LISTED
        ]
    return lists


def _mean_overlap(first: dict[str, list[str]], second: dict[str, list[str]]) -> float | None:
    """Return the mean rank-biased overlap of the labels' lists, of those that have words in both."""
    found = [rank_biased_overlap(first[label], second[label]) for label in first.keys() & second.keys()
             if first[label] and second[label]]  # fmt: skip
    return float(np.mean(found)) if found else None


def _measure(
    gram: NDArray[np.float64], projection: NDArray[np.float64], chosen: list[int], held_out: Sequence[NDArray[np.float64]]
) -> CalibratedRule:  # fmt: skip
    """Return the rule with its errors on documents that it was not fitted on, each divided by its scores' norm."""
    weights = _solve(gram, projection, chosen)[0]
    errors = [np.linalg.norm(weights @ path[chosen] - _reference(path)) for path in held_out]
    return CalibratedRule(
        nodes=tuple(number / (len(gram) - 1) for number in chosen),
        weights=tuple(weights.tolist()),
        error_median=float(np.median(errors)),
        error_p90=float(np.quantile(errors, 0.9)),
    )


def _finer(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolate a document's derivatives to the candidate nodes."""
    return np.asarray(_spline(path)(np.linspace(0, 1, (len(path) - 1) * _FINER + 1)))


def _reference(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integrate a cubic spline: the trapezoid would be off by the gradient's slope at the two ends."""
    return np.asarray(_spline(path).integrate(0, 1))


def _spline(path: NDArray[np.float64]) -> CubicSpline:
    from scipy.interpolate import CubicSpline

    return CubicSpline(np.linspace(0, 1, len(path)), path, axis=0)


def _normalised_gram(paths: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the means over documents of C C^T / |a|^2, (N, N), and of C a / |a|^2, (N,)."""
    size = (len(paths[0]) - 1) * _FINER + 1
    gram, projection = np.zeros((size, size)), np.zeros(size)
    for path in paths:
        reference, candidates = _reference(path), _finer(path)
        square = float(reference @ reference)
        gram += candidates @ candidates.T / square / len(paths)
        projection += candidates @ reference / square / len(paths)
    return gram, projection


def _solve(
    gram: NDArray[np.float64], projection: NDArray[np.float64], chosen: Sequence[int]
) -> tuple[NDArray[np.float64], float]:
    """Return non-negative weights of the chosen nodes, and their mean squared relative error."""
    from scipy.optimize import nnls

    inner = gram[np.ix_(chosen, chosen)]
    values, vectors = np.linalg.eigh(inner)
    # Nearly equal nodes make a matrix that rounding may leave without a Cholesky factor.
    roots = np.sqrt(values.clip(max(1e-10 * values[-1], 1e-200)))
    weights = nnls(roots[:, None] * vectors.T, (vectors.T @ projection[chosen]) / roots)[0]
    return weights, float(1 - 2 * weights @ projection[chosen] + weights @ inner @ weights)


def _add_node(gram: NDArray[np.float64], projection: NDArray[np.float64], chosen: list[int]) -> list[int]:
    free = [number for number in range(len(projection)) if number not in chosen]
    return min(([*chosen, number] for number in free), key=lambda nodes: _solve(gram, projection, nodes)[1])


def _move(gram: NDArray[np.float64], projection: NDArray[np.float64], chosen: list[int]) -> list[int]:
    """Move nodes one at a time to better places until there is none."""
    best, moved = _solve(gram, projection, chosen)[1], True
    while moved:
        moved = False
        for place in range(len(chosen)):
            near = range(max(0, chosen[place] - _REACH), min(len(projection), chosen[place] + _REACH + 1))
            for number in near:
                if number in chosen:
                    continue
                nodes = [*chosen[:place], number, *chosen[place + 1 :]]
                error = _solve(gram, projection, nodes)[1]
                if error < best - 1e-6 * abs(best) - 1e-12:  # rounding must not move nodes to and fro
                    chosen, best, moved = nodes, error, True
    return chosen
