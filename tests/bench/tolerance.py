"""What the adaptive rule spends and how far it is off, beside fixed rules, on texts whose whole path is known.

The derivatives of each text are taken at many equally spaced points, once; a cubic spline through them stands in for the
model, so that every rule can be run and its error told, with few passes. `make bench-methods` runs it, on MiniLM and
BBC News or, with --on newsgroups, on TextCNN; --baseline and --max-tokens make other paths of the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from torch import Tensor

from bench.ablation import write_table
from bench.attribution import add_cache, describe_run, measure_peak
from bench.bars import make_explainer
from bench.methods import MODELS
from lexplain.classifier import Classifier
from lexplain.finetune import quiet_transformers
from lexplain.methods import Inputs, find_method
from lexplain.methods.paths import integrated_gradients
from lexplain.model_store import digest_folder

SETTINGS: dict[str, dict[str, object]] = {
    "adaptive": {},
    **{f"adaptive, tolerance {tolerance}": {"tolerance": tolerance} for tolerance in (0.1, 0.02)},
    **{f"Gauss-Legendre {nodes}": {"rule": "gauss_legendre", "nodes": nodes} for nodes in (12, 16, 24, 32, 40, 50)},
    **{f"midpoint {nodes}": {"rule": "midpoint", "nodes": nodes} for nodes in (12, 16, 24, 32, 40, 50)},
}


class SplinePath:
    """One text's path, an `Evaluate` without a model: F and its derivatives by token from a spline through samples.

    Attributes:
        scores: Exact on the spline.
        sampling_error: How far they are from those of a spline through every second sample, relative to their norm: where
            it is not small, the path is smoother than the model's.
    """

    def __init__(self, derivatives: NDArray[np.float64]) -> None:
        self._derivative = CubicSpline(np.linspace(0, 1, len(derivatives)), derivatives, axis=0)
        self._integral = self._derivative.antiderivative()
        self.scores = self._integral(1.0)
        coarse = CubicSpline(np.linspace(0, 1, len(derivatives[::2])), derivatives[::2], axis=0).integrate(0, 1)
        self.sampling_error = float(np.linalg.norm(self.scores - coarse) / np.linalg.norm(self.scores))
        tokens = torch.zeros((1, derivatives.shape[1]), dtype=torch.long)
        nowhere = torch.zeros((*tokens.shape, 1))
        self.inputs = Inputs(
            x=nowhere, baseline=nowhere, ids=tokens, mask=tokens == 0, special=tokens > 0, words=tokens, seeds=tokens[:, 0],
            target_score=self.logits(tokens[0, :1], torch.ones(1, dtype=torch.float64)), baseline_id=0,
        )  # fmt: skip

    def logits(self, rows: Tensor, alphas: Tensor) -> Tensor:
        """Return F(alpha) - F(0)."""
        return torch.from_numpy(self._integral(alphas.numpy()).sum(-1))

    def directional(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Return F(alpha) - F(0) and the derivatives."""
        return self.logits(rows, alphas), torch.from_numpy(self._derivative(alphas.numpy()))


def sample_paths(
    classifier: Classifier, texts: Sequence[str], baseline: str, max_tokens: int, nodes: int
) -> list[NDArray[np.float64]]:
    """Return the derivatives of each text at so many points, (nodes, tokens)."""
    explainer = make_explainer(classifier, find_method("integrated_gradients"), max_tokens, baseline=baseline)
    found: list[NDArray[np.float64]] = []
    for start in range(0, len(texts), 20):
        paths = explainer.sample_paths(explainer.read_texts(texts[start : start + 20]), nodes)
        found += [path.derivatives for path in paths if np.any(path.derivatives)]
        print(f"{len(found)} of {len(texts)} paths", flush=True)
    return found


def measure(paths: Sequence[SplinePath], options: dict[str, object]) -> dict[str, float]:
    """Return what a rule spends and how far its scores are off, relative to the exact ones' norm."""
    evaluations, errors, converged = [], [], []
    for path in paths:
        found = integrated_gradients(path, path.inputs, **options)  # type: ignore[arg-type]  # what an Evaluate needs here
        errors.append(np.linalg.norm(found.scores[0].numpy() - path.scores) / np.linalg.norm(path.scores))
        evaluations.append(int(found.evaluations[0]))
        converged.append(bool(found.converged[0]))
    quantiles = dict(zip(("median", "p90", "p99", "max"), np.quantile(errors, (0.5, 0.9, 0.99, 1)), strict=True))
    means = {"evaluations": float(np.mean(evaluations)), "converged": float(np.mean(converged))}
    return means | {f"error {name}": float(value) for name, value in quantiles.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Sample, measure, write the JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=list(MODELS), default="bbc", help="model and corpus (default: bbc)")
    parser.add_argument("--documents", type=int, default=200, help="texts to explain (default: 200)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a text's window (default: 128)")
    parser.add_argument("--baseline", default="mask", help="token of the baseline (default: mask)")
    parser.add_argument("--nodes", type=int, default=65, help="points of a path that are taken (default: 65)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add_cache(parser)
    parser.add_argument("--out", type=Path, help="the figures, as JSON (default: bench-tolerance-ON.json)")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    folder, documents = MODELS[arguments.on](arguments.cache)
    with quiet_transformers():
        classifier = Classifier.load(folder)
    texts = [each["text"] for each in documents[: arguments.documents]]
    sampled = sample_paths(classifier, texts, arguments.baseline, arguments.max_tokens, arguments.nodes)
    paths = [SplinePath(each) for each in sampled]
    found = {name: measure(paths, options) for name, options in SETTINGS.items()}
    record = describe_run(arguments, digest_folder(folder), measure_peak(), ["torch", "transformers", "numpy"], {})
    out = arguments.out or Path(f"bench-tolerance-{arguments.on}.json")
    sampling = [path.sampling_error for path in paths]
    told = {"documents": len(paths), "sampling_error_median": float(np.median(sampling)), "rules": found}
    out.write_text(json.dumps(record | told, indent=2) + "\n")
    print(write_table("rule", found))
    print(f"sampling error: median {np.median(sampling):.2g}, largest {max(sampling):.2g}")


if __name__ == "__main__":
    main()
