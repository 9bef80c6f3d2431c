"""What an evaluation tells of methods: figures of traces over documents, and methods against each other. Driver only.

A document counts once, with the mean of its explanations: two splits, or two labels, of one text are no two texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from lexplain.resampling import RESAMPLES, adjust_holm, bootstrap_mean, permute_signs

CONTROL = "random"
"""The method whose scores say nothing: what others must be better than."""

BETTER_LOW = ("sufficiency", "log_odds", "accuracy_of_correct")
"""Metrics that are good when low; of all others high is good."""

ALPHA = 0.05
"""Level at which one method is said to be ahead of another."""

Selection = Literal["all", "correct", "mistaken_gold", "mistaken_predicted"]
"""Which explanations a metric is of: all; those of a document's most probable label where that is gold; where it is not,
those of the gold labels, or that of the most probable one."""


@dataclass(frozen=True)
class Metric:
    """A metric of traces.

    Attributes:
        name: In `faithfulness`.
        protocol: How words were taken away, in `lexplain.faithfulness.PROTOCOLS`.
        of: Which explanations it is of.
    """

    name: str
    protocol: str
    of: Selection = "all"


PRESETS: dict[str, tuple[Metric, ...]] = {
    "dig-2021": (
        Metric("comprehensiveness", "dig-2021"), Metric("sufficiency", "dig-2021"), Metric("log_odds", "dig-2021-log-odds"),
    ),
    "eraser-2020": (Metric("comprehensiveness", "eraser-2020"), Metric("sufficiency", "eraser-2020")),
    "marc-2023": (Metric("comprehensiveness", "marc-2023"), Metric("sufficiency", "marc-2023")),
    "arras-2016": (
        Metric("accuracy_of_correct", "arras-2016", "correct"),
        Metric("accuracy_of_mistaken_gold", "arras-2016-rising", "mistaken_gold"),
        Metric("accuracy_of_mistaken_predicted", "arras-2016", "mistaken_predicted"),
    ),
}  # fmt: skip
"""By name: Sanyal and Ren 2021, DeYoung et al. 2020, Brinner and Zarriess 2023, Arras et al. 2016 (section 4.2)."""

NEEDS_GOLD = ("arras-2016",)
"""Presets that need documents with gold labels, and explanations of these."""


def tell_better(metric: str, low: float, high: float) -> bool:
    """Return whether the interval of a difference lies on the metric's good side."""
    return high < 0 if metric in BETTER_LOW else low > 0


@dataclass(frozen=True)
class Figure:
    """A metric of one method, over documents.

    Attributes:
        method: Id, or name and preset, as it was asked for.
        protocol: Which words are taken away, and how.
        metric: Name of a `Metric`.
        label: Of the explanations; None for all labels.
        value: Mean over documents; a document has the mean of its explanations.
        ci_low: 95 % interval, from 2000 bootstrap samples of documents.
        ci_high: Its upper end.
        n_documents: Documents it is the mean of.
        over_random: Mean difference from random scores on the same documents; None for these themselves.
        over_random_low: Its 95 % interval.
        over_random_high: Its upper end.
    """

    method: str
    protocol: str
    metric: str
    label: str | None
    value: float
    ci_low: float
    ci_high: float
    n_documents: int
    over_random: float | None = None
    over_random_low: float | None = None
    over_random_high: float | None = None

    @property
    def low_is_good(self) -> bool:
        """Whether the metric is good when low."""
        return self.metric in BETTER_LOW

    @property
    def beats_random(self) -> bool | None:
        """Whether it is better than random scores beyond chance; None for these themselves."""
        if self.over_random_low is None or self.over_random_high is None:
            return None
        return tell_better(self.metric, self.over_random_low, self.over_random_high)


@dataclass(frozen=True)
class Difference:
    """Two methods by one metric, on the documents that both have, over all labels.

    Attributes:
        method: One method.
        other: The other.
        protocol: As of the figures.
        metric: As of the figures.
        difference: Mean of the method's value less the other's.
        ci_low: 95 % interval, from 2000 bootstrap samples of documents.
        ci_high: Its upper end.
        p_value: Of a paired permutation test, two-sided.
        p_adjusted: The same for all pairs of methods by this metric together (Holm).
        n_documents: Documents that both have.
    """

    method: str
    other: str
    protocol: str
    metric: str
    difference: float
    ci_low: float
    ci_high: float
    p_value: float
    p_adjusted: float
    n_documents: int

    @property
    def ahead(self) -> str | None:
        """The better of the two, or None if chance may have made the difference."""
        if self.p_adjusted > ALPHA:
            return None
        return self.other if (self.difference > 0) == (self.metric in BETTER_LOW) else self.method


Values = Mapping[tuple[str, str, str], Mapping[str | None, Mapping[str, float]]]
"""By (method, protocol, metric), by label and for all labels (None): the value of each document."""


def gather_values(rows: Mapping[str, Sequence[Mapping[str, Any]]], presets: Sequence[str]) -> Values:
    """Return the value of each document, the mean of its explanations.

    Args:
        rows: By method, rows of `deletions` with the columns is_gold and label_rank of their explanation and `gold`, the
            document's gold labels.
        presets: Names out of `PRESETS`.
    """
    metrics = [metric for name in presets for metric in PRESETS[name]]
    return {
        (method, metric.protocol, metric.name): _mean_by_document(of_method, metric)
        for method, of_method in rows.items()
        for metric in metrics
    }


def _mean_by_document(rows: Sequence[Mapping[str, Any]], metric: Metric) -> dict[str | None, dict[str, float]]:
    mistaken = set[tuple[str, str]]()
    if metric.of == "mistaken_gold":
        mistaken = {_document(row) for row in rows if row["label_rank"] == 0 and row["is_gold"] is False}
    found: dict[str | None, dict[str, list[float]]] = {}
    for row in rows:
        if row["protocol"] != metric.protocol or not _is_of(row, metric.of, mistaken):
            continue
        value = _measure(row, metric.name)
        for label in (None, row["label"]):
            found.setdefault(label, {}).setdefault(row["text_digest"], []).append(value)
    return {
        label: {digest: float(np.mean(each)) for digest, each in sorted(by_document.items())}
        for label, by_document in found.items()
    }


def _document(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["explain_key"], row["text_digest"]


def _is_of(row: Mapping[str, Any], of: Selection, mistaken: set[tuple[str, str]]) -> bool:
    if of == "all":
        return True
    if of == "mistaken_gold":
        return bool(row["is_gold"]) and _document(row) in mistaken
    return row["label_rank"] == 0 and row["is_gold"] is (of == "correct")


def _measure(row: Mapping[str, Any], name: str) -> float:
    if name.startswith("accuracy"):
        return float(np.mean([label in row["gold"] for label in row["predicted"]]))
    from lexplain.faithfulness import Trace  # it loads torch, which those who read figures need not

    alone = None if row["alone"] is None else np.array(row["alone"])
    trace = Trace(np.array(row["sizes"]), row["whole"], np.array(row["without"]), alone)
    return float(getattr(trace, name))


def compute_figures(values: Values, resamples: int = RESAMPLES) -> list[Figure]:
    """Return the figures of each method, metric and label; those of `CONTROL` must be among the values."""
    figures = []
    for (method, protocol, metric), by_label in values.items():
        controls = values[CONTROL, protocol, metric]
        for label, by_document in by_label.items():
            interval = bootstrap_mean(list(by_document.values()), resamples)
            figure = Figure(method, protocol, metric, label, *interval, len(by_document))
            pairs = _pair(by_document, controls.get(label, {}))
            if method != CONTROL and pairs:
                mean, low, high = bootstrap_mean(pairs, resamples)
                figure = replace(figure, over_random=mean, over_random_low=low, over_random_high=high)
            figures.append(figure)
    return figures


def compare_methods(values: Values) -> list[Difference]:
    """Return each pair of methods by each metric, on the documents that both have.

    Note:
        Runs on: driver. Cost: 10,000 sums over the documents for each pair and metric.
        Source: Fisher's permutation test; Holm 1979.
    """
    found: list[Difference] = []
    methods = list(dict.fromkeys(method for method, _, _ in values))
    for protocol, metric in dict.fromkeys((protocol, metric) for _, protocol, metric in values):
        of = {method: values[method, protocol, metric].get(None, {}) for method in methods}
        tested = [
            (one, other, pairs) for one, other in combinations(methods, 2) if (pairs := _pair(of[one], of[other]))
        ]
        p_values = [permute_signs(pairs) for _, _, pairs in tested]
        for (one, other, pairs), p_value, adjusted in zip(tested, p_values, adjust_holm(p_values), strict=True):
            mean, low, high = bootstrap_mean(pairs)
            found.append(
                Difference(one, other, protocol, metric, mean, low, high, p_value, adjusted, len(pairs))
            )  # fmt: skip
    return found


def _pair(one: Mapping[str, float], other: Mapping[str, float]) -> list[float]:
    """Return the differences on the documents that both have."""
    return [one[digest] - other[digest] for digest in sorted(one.keys() & other.keys())]
