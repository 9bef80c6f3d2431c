"""What the benchmark of attribution lets compete: lexplain's rules, captum, SHAP; each from text to word scores.

All see the same first window of a text, with the mask token as baseline, and merge token scores into the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexplain.calibration import Calibration
from lexplain.classifier import Batch, Classifier, Encoding
from lexplain.engine import Explainer
from lexplain.explanation import Rejection
from lexplain.methods import find_method
from lexplain.words import merge_tokens, segment

BUDGET_TOKENS = 2048
"""Tokens of one pass, for every batched contender: what a job takes on a CPU when its plan says nothing."""

TOLERANCE = 0.05
"""Of the adaptive rule: its default."""


@dataclass(frozen=True)
class Scores:
    """Word scores of one text and label: words in the order of the text, then what is outside words."""

    label: str
    values: NDArray[np.float64]
    converged: bool | None = None  # None: the contender does not tell


Run = Callable[[Sequence[str], int], list[list[Scores]]]
"""Texts and number of most probable labels in, their scores out, most probable label first."""


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Attributes:
        name: In the table.
        run: What is timed.
        once: Run in the first round and for one target only: it is there for its accuracy, or takes very long.
        documents: Only so many; None for all.
    """

    name: str
    run: Run
    once: bool = False
    documents: int | None = None


def run_lexplain(
    classifier: Classifier, max_tokens: int, options: dict[str, object], prepared: Calibration | None = None
) -> Run:
    """Return Integrated Gradients of our engine."""

    def run(texts: Sequence[str], top_k: int) -> list[list[Scores]]:
        found = []
        for outcome in make_explainer(classifier, max_tokens, options, top_k, prepared).explain(texts):
            if isinstance(outcome, Rejection):
                raise RuntimeError(f"a document was rejected: {outcome.message}")
            told = options.get("rule") == "adaptive"
            rows = []
            for each in outcome:
                in_order = sorted(each.words, key=lambda pair: pair[0].start)
                values = np.array([*(score for _, score in in_order), each.other_score])
                rows.append(Scores(each.label, values, each.converged if told else None))
            found.append(rows)
        return found

    return run


def make_explainer(
    classifier: Classifier, max_tokens: int, options: dict[str, object], top_k: int, prepared: Calibration | None = None
) -> Explainer:
    return Explainer(
        classifier, find_method("integrated_gradients"), options, max_tokens=max_tokens, overlap=0, max_windows=1,
        merge="sum", budget_tokens=BUDGET_TOKENS, top_k=top_k, prepared=prepared,
    )  # fmt: skip


def run_captum_loop(classifier: Classifier, max_tokens: int, steps: int) -> Run:
    """Return captum's Integrated Gradients as pipelines have it: one document and one label after the other."""
    from captum.attr import LayerIntegratedGradients

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = classifier.model(input_ids=ids, attention_mask=mask.long()).logits
        return found

    def run(texts: Sequence[str], top_k: int) -> list[list[Scores]]:
        layer = LayerIntegratedGradients(logits, classifier.model.get_input_embeddings())
        found = []
        for text in texts:
            encoding = read_window(classifier, text, max_tokens)
            batch = classifier.collate(encoding.windows)
            baseline = classifier.baseline_ids(batch.ids, batch.special, batch.mask, "mask")
            with torch.no_grad():
                labels = rank_labels(logits(batch.ids, batch.mask), top_k)[0]
            rows = []
            for label in labels.tolist():
                scores, _ = layer.attribute(
                    batch.ids, baseline, target=label, additional_forward_args=(batch.mask,), n_steps=steps,
                    internal_batch_size=30, return_convergence_delta=True,
                )  # fmt: skip
                rows.append(Scores(classifier.labels[label], sum_words(text, encoding, scores[0].sum(-1))))
            found.append(rows)
        return found

    return run


def run_captum_batched(classifier: Classifier, max_tokens: int, steps: int) -> Run:
    """Return captum's Integrated Gradients as well as it can be used: full passes of documents of similar length."""
    from captum.attr import IntegratedGradients

    def logits(embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
        return classifier.logits(embeddings, mask, token_types)

    def attribute(batch: Batch, top_k: int) -> tuple[Tensor, list[Tensor]]:
        baseline = classifier.baseline_ids(batch.ids, batch.special, batch.mask, "mask")
        x, other = classifier.embed(batch.ids), (batch.mask, batch.token_types)
        with torch.no_grad():
            labels = rank_labels(logits(x, *other), top_k)
        size = max(1, BUDGET_TOKENS // x.shape[1])
        found = []
        for rank in range(labels.shape[1]):
            scores, _ = IntegratedGradients(logits).attribute(
                x, classifier.embed(baseline), target=labels[:, rank], additional_forward_args=other, n_steps=steps,
                internal_batch_size=size, return_convergence_delta=True,
            )  # fmt: skip
            found.append(scores.sum(-1))
        return labels, found

    def run(texts: Sequence[str], top_k: int) -> list[list[Scores]]:
        encodings = [read_window(classifier, text, max_tokens) for text in texts]
        order = sorted(range(len(texts)), key=lambda number: -len(encodings[number].windows[0].ids))
        found: list[list[Scores]] = [[] for _ in texts]
        while order:
            count = max(1, BUDGET_TOKENS // len(encodings[order[0]].windows[0].ids))
            mine, order = order[:count], order[count:]
            labels, by_rank = attribute(classifier.collate([encodings[n].windows[0] for n in mine]), top_k)
            for row, number in enumerate(mine):
                for rank, scores in enumerate(by_rank):
                    values = sum_words(texts[number], encodings[number], scores[row])
                    found[number].append(Scores(classifier.labels[int(labels[row, rank])], values))
        return found

    return run


def run_shap(classifier: Classifier, folder: Path, max_tokens: int) -> Run:
    """Return SHAP's partition explainer for texts at its defaults; it scores all labels at once, and only roughly."""
    import shap
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def logits(texts: Sequence[str]) -> NDArray[np.float32]:
        encoded = tokenizer(list(map(str, texts)), truncation=True, max_length=max_tokens, padding=True,
                            return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            found: NDArray[np.float32] = classifier.model(**encoded).logits.numpy()
        return found

    def run(texts: Sequence[str], top_k: int) -> list[list[Scores]]:
        explainer = shap.Explainer(logits, shap.maskers.Text(tokenizer), output_names=list(classifier.labels))
        # what the others see of a text, no more
        explainer(
            [text[: int(read_window(classifier, text, max_tokens).offsets[-1, 1])] for text in texts], silent=True
        )
        return []

    run(["A text, to compile what SHAP compiles."], 1)
    return run


def read_window(classifier: Classifier, text: str, max_tokens: int) -> Encoding:
    return classifier.encode(text, max_tokens=max_tokens, overlap=0, max_windows=1)


def rank_labels(logits: Tensor, top_k: int) -> Tensor:
    return logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]


def sum_words(text: str, encoding: Encoding, scores: Tensor) -> NDArray[np.float64]:
    """Return word scores of a window's token scores, as the engine merges them."""
    window = encoding.windows[0]
    content = scores.detach().double().numpy()[: len(window.ids)][~np.asarray(window.special, dtype=bool)]
    words = [word for word in segment(text) if word.start < encoding.offsets[:, 1].max()]
    sums, other = merge_tokens(words, encoding.offsets, content, text, rule="sum")
    return np.array([*sums, other])


def list_contenders(
    classifier: Classifier, folder: Path, max_tokens: int, calibration: Calibration, shap_documents: int
) -> list[Contender]:
    def ours(name: str, prepared: Calibration | None = None, *, once: bool = False, **options: object) -> Contender:
        return Contender(f"lexplain {name}", run_lexplain(classifier, max_tokens, options, prepared), once)

    fixed = {"midpoint": (16, 24, 50), "gauss_legendre": (16, 20, 24, 30, 50)}
    timed = {("midpoint", 16), ("midpoint", 24), ("gauss_legendre", 50)}  # the others' time follows from their nodes
    chosen = calibration.keywords.nodes
    found = [
        *(Contender(f"captum loop, {n} steps", run_captum_loop(classifier, max_tokens, n)) for n in (30, 50)),
        Contender("captum batched, 50 steps", run_captum_batched(classifier, max_tokens, 50)),
        *(
            ours(f"{rule} {nodes}", once=(rule, nodes) not in timed, rule=rule, nodes=nodes)
            for rule, sizes in fixed.items()
            for nodes in sizes
        ),
        ours("adaptive", rule="adaptive", tolerance=TOLERANCE),
        *(ours(f"calibrated {n}", calibration, rule="calibrated", nodes=n) for n in dict.fromkeys((chosen, 4))),
    ]
    if shap_documents:
        shap = run_shap(classifier, folder, max_tokens)
        found.append(Contender("SHAP partition, defaults", shap, once=True, documents=shap_documents))
    return found
