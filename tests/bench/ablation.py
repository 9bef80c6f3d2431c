"""What each term of MaRC's objective does: its masks with one term or the other switched off.

`make bench-methods` runs it, on MiniLM and BBC News or, with --on newsgroups, on TextCNN. Of the masks: their mean, the
share of words at .5 or above, the spans that these make; what the probability loses without them and lacks with them
alone (the others replaced by the padding token), and the same for their order of words, averaged over shares of the text.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.attribution import add_cache, describe_run, measure_peak
from bench.bars import explain_all, make_explainer
from bench.contenders import BUDGET_TOKENS
from bench.methods import MODELS
from lexplain.classifier import Classifier
from lexplain.faithfulness import PROTOCOLS, DeletionTracer, Protocol, ScoredText
from lexplain.finetune import quiet_transformers
from lexplain.methods import find_method
from lexplain.model_store import digest_folder

SETTINGS: dict[str, dict[str, Any]] = {
    "all terms": {},
    "no sufficiency": {"sufficiency": 0.0},
    "no comprehensiveness": {"comprehensiveness": 0.0},
    "no sparsity": {"sparsity": 0.0},
    "no smoothness": {"smoothness": 0.0},
    "no forced tokens, no noise": {"forced": 0.0, "noise": 0.0},
    "marc-paper": dict(find_method("marc").presets["marc-paper"]),
}


def measure(classifier: Classifier, texts: Sequence[str], max_tokens: int, options: dict[str, Any]) -> dict[str, float]:
    """Return means over texts of what the masks of one setting come to."""
    found = explain_all(make_explainer(classifier, find_method("marc"), max_tokens, **options), texts)
    tracer = DeletionTracer(classifier, max_tokens=max_tokens, overlap=0, max_windows=1, budget_tokens=BUDGET_TOKENS)
    rows = []
    for text, explanation in zip(texts, found, strict=True):
        words = sorted(explanation.words, key=lambda pair: pair[0].start)
        kept = sum(score >= 0.5 for _, score in words)
        hard = Protocol("pad", "word", (kept,), counts=True)
        scored = ScoredText(text, explanation.label, words)
        (traces,) = tracer.trace([scored], [hard, PROTOCOLS["marc-2023"]])
        if traces is None:
            raise SystemExit(f"a text of {explanation.n_tokens} tokens does not fit the memory")
        mask, order = traces
        assert mask.alone is not None  # the protocol keeps
        rows.append({
            "mean mask": float(np.mean([score for _, score in words])), "share of words": kept / len(words),
            "spans": len(explanation.spans),
            "words a span": kept / len(explanation.spans) if explanation.spans else float("nan"),
            "comprehensiveness": mask.comprehensiveness, "sufficiency": mask.whole - float(mask.alone[0]),
            "AOPC comprehensiveness": order.comprehensiveness, "AOPC sufficiency": order.sufficiency,
            "steps": explanation.evaluations / 2, "settled": float(explanation.converged),
        })  # fmt: skip
    told = {name: [row[name] for row in rows if not np.isnan(row[name])] for name in rows[0]}
    return {name: float(np.mean(values)) if values else float("nan") for name, values in told.items()}


def write_table(varied: str, found: dict[str, dict[str, float]]) -> str:
    """Return Markdown, a row a setting of what is varied."""
    names = list(next(iter(found.values())))
    lines = [f"| {varied} | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for setting, figures in found.items():
        lines.append(f"| {setting} | " + " | ".join(f"{figures[name]:.3g}" for name in names) + " |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file after each setting, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=list(MODELS), default="bbc", help="model and corpus (default: bbc)")
    parser.add_argument("--documents", type=int, default=12, help="texts to explain (default: 12)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a text's window (default: 64)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add_cache(parser)
    parser.add_argument("--out", type=Path, help="the figures, as JSON (default: bench-ablation-ON.json)")
    arguments = parser.parse_args(words)
    out = arguments.out or Path(f"bench-ablation-{arguments.on}.json")
    torch.set_num_threads(arguments.threads)
    folder, documents = MODELS[arguments.on](arguments.cache)
    with quiet_transformers():
        classifier = Classifier.load(folder)
    texts = [each["text"] for each in documents[: arguments.documents]]
    record = describe_run(arguments, digest_folder(folder), measure_peak(), ["torch", "transformers", "numpy"], {})
    found: dict[str, dict[str, float]] = {}
    for name, options in SETTINGS.items():
        found[name] = measure(classifier, texts, arguments.max_tokens, options)
        out.write_text(json.dumps(record | {"settings": found}, indent=2) + "\n")
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    print(write_table("terms", found))


if __name__ == "__main__":
    main()
