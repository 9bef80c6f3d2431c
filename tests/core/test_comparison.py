"""Figures of an evaluation beside slow restatements by pandas and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from lexplain.comparison import PRESETS, Difference, Metric, compare_methods, compute_figures, gather_values
from lexplain.faithfulness import PROTOCOLS

DEFAULT = ("dig-2021", "eraser-2020", "marc-2023")


def row(digest: str, label: str, protocol: str, whole: float, without: list[float], **more: Any) -> dict[str, Any]:
    known = {
        "explain_key": "k", "text_digest": digest, "label": label, "protocol": protocol, "whole": whole, "without": without,
        "sizes": list(range(1, len(without) + 1)), "alone": None, "predicted": [label] * len(without), "is_gold": None,
        "label_rank": 0, "gold": None,
    }  # fmt: skip
    return known | more


def test_figures_are_means_over_documents_and_pairs_with_random() -> None:
    """A document with two explanations counts once; differences are of the documents that both methods have."""
    draw = np.random.default_rng(4)
    rows: dict[str, list[dict[str, Any]]] = {"random": [], "good": []}
    truth: dict[str, dict[str, list[float]]] = {"random": {}, "good": {}}
    for number in range(30):
        for method in rows:
            if method == "random" and number == 0:
                continue
            for label in ("a", "b")[: 1 + number % 2]:
                whole, loss = 0.9, float(draw.uniform(0.3, 0.6) if method == "good" else draw.uniform(0, 0.2))
                truth[method].setdefault(f"d{number}", []).append(loss)
                for protocol in ("dig-2021", "dig-2021-log-odds", "eraser-2020", "marc-2023"):
                    alone = None if protocol.endswith("log-odds") else [whole - 0.1, whole - 0.3]
                    rows[method].append(
                        row(f"d{number}", label, protocol, whole, [whole - loss, whole - loss], alone=alone)
                    )
    values = gather_values(rows, DEFAULT)
    figures = {(f.method, f.protocol, f.metric, f.label): f for f in compute_figures(values)}
    mine = {name: float(np.mean(values)) for name, values in truth["good"].items()}
    other = {name: float(np.mean(values)) for name, values in truth["random"].items()}
    found = figures["good", "marc-2023", "comprehensiveness", None]
    assert found.value == pytest.approx(np.mean(list(mine.values())))
    assert found.n_documents == 30
    differences = np.array([mine[name] - other[name] for name in other])
    assert found.over_random == pytest.approx(differences.mean())
    # the interval of a mean of 29: a normal one is close
    error = differences.std(ddof=1) / np.sqrt(29)
    assert found.over_random_low == pytest.approx(differences.mean() - 1.96 * error, abs=0.3 * error)
    assert found.over_random_high == pytest.approx(differences.mean() + 1.96 * error, abs=0.3 * error)
    assert figures["good", "eraser-2020", "sufficiency", None].value == pytest.approx(0.2)
    assert figures["good", "dig-2021-log-odds", "log_odds", None].value < 0
    assert figures["good", "marc-2023", "comprehensiveness", "b"].n_documents == 15
    assert figures["random", "marc-2023", "comprehensiveness", None].over_random is None
    assert len(figures) == 2 * 7 * 3
    (difference,) = [d for d in compare_methods(values) if (d.protocol, d.metric) == ("marc-2023", "comprehensiveness")]
    assert {difference.method, difference.other} == {"random", "good"}
    assert difference.difference == pytest.approx(-differences.mean())
    assert difference.n_documents == 29
    assert difference.ahead == "good"
    assert found.beats_random is True


def test_whoever_is_ahead_is_so_beyond_chance_and_in_the_good_direction() -> None:
    def differ(metric: str, difference: float, p_adjusted: float) -> str | None:
        return Difference("one", "other", "p", metric, difference, -1, 1, p_adjusted, p_adjusted, 9).ahead

    assert differ("comprehensiveness", 0.1, 0.01) == "one"
    assert differ("comprehensiveness", -0.1, 0.01) == "other"
    assert differ("sufficiency", 0.1, 0.01) == "other"
    assert differ("log_odds", -0.1, 0.05) == "one"
    assert differ("accuracy_of_mistaken_gold", 0.1, 0.01) == "one"
    assert differ("comprehensiveness", 0.1, 0.051) is None


def test_pairs_of_a_metric_are_adjusted_together() -> None:
    draw = np.random.default_rng(7)
    rows = {
        method: [row(f"d{number}", "a", protocol, 0.9, [0.9 - draw.uniform(0, 0.3) - shift], alone=[0.5])
                 for number in range(40) for protocol in ("eraser-2020",)]
        for method, shift in (("random", 0.0), ("same", 0.0), ("better", 0.05), ("best", 0.2))
    }  # fmt: skip
    found = compare_methods(gather_values(rows, ["eraser-2020"]))
    assert len(found) == 2 * 6
    mine = sorted((d for d in found if d.metric == "comprehensiveness"), key=lambda d: d.p_value)
    for rank, each in enumerate(mine):
        assert each.p_adjusted >= min(1.0, (6 - rank) * each.p_value) - 1e-12
    ahead = {(d.method, d.other): d.ahead for d in mine}
    assert ahead["random", "best"] == "best"
    assert ahead["random", "same"] is None
    # all are equally sufficient
    assert all(d.ahead is None and d.p_value == 1.0 for d in found if d.metric == "sufficiency")


def trace_arras() -> list[dict[str, Any]]:
    """Twelve documents by two models, with gold labels, and what the models predict while words go."""
    draw, rows = np.random.default_rng(3), []
    labels = ["a", "b", "c"]
    for number in range(12):
        gold = labels[number % 3]
        for key in ("one", "two"):
            first = labels[int(draw.integers(3))]
            for rank, label in enumerate(dict.fromkeys([first, gold])):
                for protocol in ("arras-2016", "arras-2016-rising"):
                    predicted = [labels[int(each)] for each in draw.integers(3, size=5)]
                    rows.append(row(
                        f"d{number}", label, protocol, 0.5, [0.1] * 5, explain_key=key, gold=[gold], is_gold=label == gold,
                        label_rank=rank, predicted=predicted,
                    ))  # fmt: skip
    return rows


def test_deletion_by_arras_tells_the_share_of_right_predictions() -> None:
    """In pandas: of right predictions while the words for them go, of wrong ones while what misled goes."""
    rows = trace_arras()
    table = pd.DataFrame(rows)
    table["right"] = [np.mean([label in gold for label in predicted])
                      for predicted, gold in zip(table.predicted, table.gold, strict=True)]  # fmt: skip
    top = table[table.label_rank == 0].drop_duplicates(["explain_key", "text_digest"])
    wrong = top[~top.is_gold].set_index(["explain_key", "text_digest"]).index
    of_wrong = table.set_index(["explain_key", "text_digest"]).index.isin(wrong)
    falling, rising = (table.protocol == name for name in ("arras-2016", "arras-2016-rising"))
    expected = {
        "accuracy_of_correct": table[falling & (table.label_rank == 0) & table.is_gold],
        "accuracy_of_mistaken_gold": table[rising & of_wrong & table.is_gold],
        "accuracy_of_mistaken_predicted": table[falling & of_wrong & (table.label_rank == 0)],
    }
    figures = compute_figures(gather_values({"random": rows}, ["arras-2016"]))
    for metric, mine in expected.items():
        (found,) = [figure for figure in figures if figure.metric == metric and figure.label is None]
        by_document = mine.groupby("text_digest").right.mean()
        assert found.value == pytest.approx(by_document.mean())
        assert found.n_documents == len(by_document) > 3
        assert found.low_is_good == (metric == "accuracy_of_correct")


def test_documents_without_gold_labels_have_no_accuracy() -> None:
    rows = [each | {"is_gold": None, "gold": None} for each in trace_arras()]
    assert compute_figures(gather_values({"random": rows}, ["arras-2016"])) == []


def test_presets_name_protocols_that_there_are() -> None:
    for metrics in PRESETS.values():
        for metric in metrics:
            assert isinstance(metric, Metric)
            assert metric.protocol in PROTOCOLS
            if metric.name == "sufficiency":
                assert PROTOCOLS[metric.protocol].keeps
