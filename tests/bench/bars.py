"""What single methods promise, measured: DIG's search of word paths, MaRC's masks together, AttnLRP beside a gradient.

`make bench-methods` runs it first. Each figure is a ratio of two ways to the same numbers, taken in turns in one run with
the same threads, the quickest turn of each. DIG is beside the search as one would write it from the paper, a word and a
candidate at a time, with numpy for the distances; that it finds the same paths is checked for every word.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import oracles
from bench.attribution import add_cache, describe_run, measure_peak
from bench.contenders import BUDGET_TOKENS
from bench.methods import find_bbc
from lexplain.anchors import AnchorFinder, AnchorRule, read_vocabulary
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.explanation import Explanation
from lexplain.finetune import quiet_transformers
from lexplain.methods import Attribution, Evaluate, Inputs, Method, find_method
from lexplain.methods.gradients import measure_products
from lexplain.model_store import digest_folder


@dataclass(frozen=True)
class NaiveSearch(oracles.AnchorSearch):
    """The slow search with numpy inside: all distances of a word at once and once for all, then a candidate at a time."""

    known: dict[int, list[int]] = field(default_factory=dict)

    def nearest(self, word: int, current: int, hop: int) -> list[int]:
        if current not in self.known:
            distances = ((self.vocabulary - self.vocabulary[current]) ** 2).sum(1)
            distances[current] = np.inf
            self.known[current] = np.argsort(distances, kind="stable")[: self.neighbours].tolist()
        return self.known[current]

    def cost(self, current: int, other: int) -> float:
        u, v, end = self.vocabulary[current], self.vocabulary[other], self.vocabulary[self.baseline]
        between = (np.minimum(end, u) <= v) & (v <= np.maximum(end, u))
        return float(np.linalg.norm(v - np.where(between, v, u - (u - end) / self.steps)))


def measure_anchors(classifier: Classifier, texts: Sequence[str], words: int, max_tokens: int) -> dict[str, Any]:
    """Search the paths of random words in both ways, then those of a corpus as a job does."""
    vocabulary = read_vocabulary(classifier.model)
    rule = AnchorRule(classifier.find_token("mask"), steps=30, neighbours=500, strategy="greedy", uniform=False)
    ids = np.random.default_rng(0).permutation(len(vocabulary))[:words]
    started = time.perf_counter()
    found = AnchorFinder(rule, len(vocabulary)).find(ids, lambda: vocabulary)
    seconds = time.perf_counter() - started
    search = NaiveSearch(vocabulary.double().numpy(), rule.baseline_id, rule.steps, rule.neighbours, "greedy", False)
    started, same = time.perf_counter(), 0
    for number, word in enumerate(ids):
        same += search.run(int(word)) == found[number].tolist()
        if number % 50 == 49:
            print(f"naive search: {number + 1} of {words} words, {same} alike", flush=True)
    naive_seconds = time.perf_counter() - started
    windows = [classifier.encode(text, max_tokens=max_tokens, overlap=0, max_windows=1).windows[0] for text in texts]
    met = np.unique(np.concatenate([np.array(w.ids)[~np.array(w.special, dtype=bool)] for w in windows]))
    started = time.perf_counter()
    AnchorFinder(rule, len(vocabulary)).find(met, lambda: vocabulary)
    corpus_seconds = time.perf_counter() - started
    return {
        "words": words, "same_paths": same, "seconds": seconds, "naive_seconds": naive_seconds,
        "times_faster": naive_seconds / seconds, "corpus_documents": len(texts), "corpus_words": len(met),
        "milliseconds_a_document": 1e3 * corpus_seconds / len(texts),
    }  # fmt: skip


def make_explainer(classifier: Classifier, method: Method, max_tokens: int, **options: object) -> Explainer:
    return Explainer(
        classifier, method, options, max_tokens=max_tokens, overlap=0, max_windows=1, merge="sum",
        budget_tokens=BUDGET_TOKENS, top_k=1,
    )  # fmt: skip


def explain_all(explainer: Explainer, texts: Sequence[str]) -> list[Explanation]:
    found = []
    for outcome in explainer.explain(texts):
        assert isinstance(outcome, list), outcome
        found += outcome
    return found


def scores_in_order(explanation: Explanation) -> NDArray[np.float64]:
    return np.array([score for _, score in sorted(explanation.words, key=lambda pair: pair[0].start)])


def take_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the quickest turn of each, in seconds."""
    best = dict.fromkeys(ways, np.inf)
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def measure_masks(classifier: Classifier, texts: Sequence[str], max_tokens: int, steps: int) -> dict[str, Any]:
    """Optimise masks of all texts together and one at a time."""
    explainer = make_explainer(classifier, find_method("marc"), max_tokens, steps=steps)
    kept: dict[str, list[Explanation]] = {}

    def together() -> None:
        kept["together"] = explain_all(explainer, texts)

    def alone() -> None:
        kept["alone"] = [explain_all(explainer, [text])[0] for text in texts]

    seconds = take_turns({"together": together, "alone": alone}, 1)
    differences = [
        float(abs(scores_in_order(one) - scores_in_order(other)).max())
        for one, other in zip(kept["together"], kept["alone"], strict=True)
    ]
    return {
        "documents": len(texts), "steps": steps, "max_tokens": max_tokens, **seconds,
        "times_faster": seconds["alone"] / seconds["together"], "largest_difference": max(differences),
        "median_difference": float(np.median(differences)),
    }  # fmt: skip


def take_gradient(evaluate: Evaluate, inputs: Inputs, **options: object) -> Attribution:
    """Gradient x input with nothing beside it: ours also tells F(baseline), a forward pass that LRP does not take."""
    scores, nothing = measure_products(evaluate, inputs), torch.zeros_like(inputs.target_score)
    one = torch.ones(len(inputs.x), dtype=torch.long)
    return Attribution(scores, nothing, nothing, evaluations=one, converged=one.bool())


def measure_relevance(classifier: Classifier, texts: Sequence[str], max_tokens: int, rounds: int) -> dict[str, Any]:
    """Explain the same texts by AttnLRP and by a gradient; both predict first, then go forward and backward once."""
    lrp = find_method("lrp")
    ways = {
        "lrp": make_explainer(classifier, lrp, max_tokens, rule="attnlrp"),
        "gradient": make_explainer(classifier, dataclasses.replace(lrp, function=take_gradient), max_tokens),
    }
    seconds = take_turns({name: lambda e=e: explain_all(e, texts) for name, e in ways.items()}, rounds)
    return {
        "documents": len(texts), "max_tokens": max_tokens, **seconds,
        "times_a_gradient": seconds["lrp"] / seconds["gradient"],
    }  # fmt: skip


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=1000, help="words whose paths are searched in both ways")
    parser.add_argument("--masks", type=int, default=32, help="documents whose masks are optimised together")
    parser.add_argument("--steps", type=int, default=100, help="of a mask, in both ways (default: 100)")
    parser.add_argument("--relevance", type=int, default=200, help="documents of AttnLRP and gradient")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a text's window (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of AttnLRP and gradient (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-bars.json"), help="the figures, as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print the figures."""
    arguments = read_arguments(words)
    torch.set_num_threads(arguments.threads)
    folder, documents = find_bbc(arguments.cache)
    with quiet_transformers():
        classifier = Classifier.load(folder)
    texts = [each["text"] for each in documents]
    record = describe_run(arguments, digest_folder(folder), measure_peak(), ["torch", "transformers", "numpy"], {})
    size = arguments.max_tokens
    for name, measure in {
        "relevance": lambda: measure_relevance(classifier, texts[: arguments.relevance], size, arguments.rounds),
        "masks": lambda: measure_masks(classifier, texts[: arguments.masks], size, arguments.steps),
        "anchors": lambda: measure_anchors(classifier, texts, arguments.words, size),
    }.items():
        record[name] = measure()
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{name}: {json.dumps(record[name])}", flush=True)


if __name__ == "__main__":
    main()
