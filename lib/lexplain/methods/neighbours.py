"""Attribution that borrows from similar documents: LAFA.

Shape letters: B rows, S tokens, D embedding, K tokens of all neighbours of a row, H hidden size, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lexplain.errors import MethodError, ModelError, Problem
from lexplain.methods import Attribution, Evaluate, Identity, Inputs, method
from lexplain.methods.gradients import Sign, saliency, smoothgrad
from lexplain.neighbours import Reference, ReferenceIndex

Base = Literal["saliency", "smoothgrad"]
Kernel = Literal["indicator", "cosine", "rbf", "laplacian", "cubic", "l2_inverse"]
Scale = Literal["none", "unit_max"]


def _check_across(options: Mapping[str, object]) -> list[Problem]:
    """Return what is wrong between options: saliency takes no noisy copies."""
    unread = [name for name in ("samples", "noise") if name in options and options.get("base") == "saliency"]
    return [Problem(f"method.{name}", options[name], "is not read by base: saliency",
                    "It would have been ignored", f"Leave {name} out, or write base: smoothgrad") for name in unread]  # fmt: skip


def check_layers(config: Any, options: Mapping[str, Any]) -> None:
    """Check that a network has the hidden layer that the options name.

    Raises:
        ModelError: It has not.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        raise ModelError(
            f"model_type={config.model_type!r} must have hidden layers for lafa. Documents could not have been "
            "compared as the model sees them. Write a transformer, or method: smoothgrad."
        )
    if options["layer"] != "auto" and options["layer"] > layers:
        raise ModelError(
            f"method.options.layer={options['layer']} must be at most {layers}, the layers of this model. Documents could "
            f"not have been compared. Write layer: {(layers + 1) // 2}, or auto."
        )


def _tell_cost(options: Mapping[str, Any], tokens: int) -> float:
    """Return forward-equivalents: the base method, F(baseline), and the hidden states; the index is made before."""
    return float(2 * (options["samples"] if options["base"] == "smoothgrad" else 1) + 2)


@method(
    version=1, signed=False, stochastic=True, cite="zhang2022locally", across=_check_across, fits=check_layers,
    prepares=lambda options: "neighbours", cost=_tell_cost,
    note="neighbours are at most 5,000 documents, of the training half or, with ready models, of the corpus: in plans only",
    ranges={
        "samples": (1, 1000), "noise": (0.0, 10.0), "layer": (1, 1000), "neighbours": (1, 1000), "quantile": (0.0, 1.0),
        "weight": (0.0, 1e6),
    },
    presets={
        "lafa-sst2": {"base": "smoothgrad", "samples": 25, "noise": 0.15, "layer": 2, "neighbours": 10, "quantile": 0.05,
                      "same_class": True, "kernel": "indicator", "weight": 0.44},
        "lafa-relation": {"base": "saliency", "kernel": "cosine", "weight": 1.0, "same_class": False},
        "lafa-price": {"base": "saliency", "layer": 5, "neighbours": 10, "kernel": "indicator", "weight": 1.0,
                       "same_class": False},
    },
)  # fmt: skip
def lafa(
    evaluate: Evaluate, inputs: Inputs, *, base: Base = "smoothgrad", samples: int = 25, noise: float = 0.15,
    layer: int | Literal["auto"] = "auto", neighbours: int = 10, quantile: float = 0.05, same_class: bool = True,
    kernel: Kernel = "indicator", weight: float = 0.44, scale: Scale = "none", sign: Sign = "none",
    baseline: str = "mask",
) -> Attribution:  # fmt: skip
    """Return one score a token: its base score, and a share of what the same words score in similar documents.

    score_t = m_t + weight E(w_t), E(w) = mean over neighbours i of 1/T_i sum over their tokens k of m_ik kernel(w, w_ik);
    0 where a row has no neighbour. Neighbours are reference documents whose mean hidden state is near to the row's; each
    is scored for its own predicted label. The row's own text is none of them.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows, with a `ReferenceIndex`.
        base: m: sum of squares of the gradient at each token (`saliency`), or of the mean gradient over noisy copies.
        samples: Noisy copies of `smoothgrad`, 1 to 1000.
        noise: Of `smoothgrad`; the paper gives no value, 0.15 is ours.
        layer: Hidden layer that documents are compared by, 1 the first. auto: the one whose nearest neighbours are most
            often of a document's own class, chosen before the run.
        neighbours: At most so many a row, 1 to 1000.
        quantile: Neighbours are nearer than this share of all pairs of references, 0 to 1; 1: no cut-off.
        same_class: Only references with the row's label among their predicted ones.
        kernel: Of word embeddings a, b: `indicator`: 1 for equal words whatever their case, and a word of several tokens
            gets it once, in equal parts; `cosine`; `rbf`: exp(-|a - b|_2 / 4); `laplacian`: exp(-|a - b|_1 / 4);
            `cubic`: (7 ab)^3; `l2_inverse`: 1 / |a - b|_2, between 1/3 and 1/0.3. With `cosine` and `cubic` a neighbour
            may also lower a score, to 0 at most: sizes have no sign.
        weight: The paper's lambda; 0 is the base method, with noise drawn for this one.
        scale: `unit_max`: the base scores of every document are first divided by its largest, so that no long or
            uncertain one prevails, and weight has no unit.
        sign: As in `saliency`: that of gradient x input in the row itself; neighbours have none.
        baseline: Token whose logit is reported as the baseline score; no score depends on it.

    Returns:
        Scores as those of the base method, or without unit; exactly 0.0 on special tokens and padding.

    Raises:
        MethodError: No index was prepared.

    Note:
        Runs on: executor. Cost: that of the base method, and one forward pass a window; before the run, the same once
        for every reference. A neighbour at the very cut-off may come or go with the rounding of batch mates.
        Source: Zhang et al. 2022 (LAFA).
    """
    index, identity = inputs.prepared, inputs.identity
    if not isinstance(index, ReferenceIndex) or identity is None:
        raise MethodError(
            "prepared=None must be an index of reference documents for lafa. Scores would have been those of the base "
            "method. Run the plan first, `lexplain run PLAN.yaml`, which makes the index; or write method: smoothgrad."
        )
    found = _measure_base(evaluate, inputs, base, samples, noise, sign, baseline)
    sizes, negative = found.scores.abs(), found.scores < 0
    if scale == "unit_max":
        largest = sizes.amax(1, keepdim=True)
        sizes = sizes / torch.where(largest > 0, largest, 1.0)
    near = index.search(
        evaluate.hidden()[:, index.layer], texts=identity.texts, labels=identity.labels if same_class else None,
        count=neighbours, within=index.cut_off(quantile),
    )  # fmt: skip
    borrowed = torch.zeros_like(sizes)
    for row, numbers in enumerate(near):
        if len(numbers):
            tokens, shares = _weigh_tokens(index, numbers, scale)
            borrowed[row] = (
                _sum_equal_words(index.words[tokens], shares, inputs, identity, row)
                if kernel == "indicator"
                else _sum_similar_tokens(index.ids[tokens], shares, evaluate.model, inputs.ids[row], kernel)
            )
    scores = (sizes + weight * borrowed).clamp(min=0)
    scores = torch.where(negative, -scores, scores).masked_fill(inputs.special, 0.0)
    gap = inputs.target_score - found.baseline_score - scores.sum(-1)
    return dataclasses.replace(found, scores=scores, completeness_gap=gap)


def make_references(
    evaluate: Evaluate, inputs: Inputs, layer: int | None, options: Mapping[str, Any]
) -> Sequence[Reference]:
    """Return what an index keeps of rows, in their order; the rows of a window by falling probability of the target.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows, with their identity.
        layer: Hidden layer of the vectors. None: those of all layers, and no base scores, which is what a layer is
            chosen by.
        options: Of `lafa`.

    Note:
        Runs on: executor. Cost: one forward pass a window; with a layer, that of the base method.
    """
    identity = inputs.identity
    assert identity is not None  # lafa prepares neighbours
    vectors = evaluate.hidden().float().cpu().numpy()
    if layer is not None:
        vectors = vectors[:, layer : layer + 1]
    scores = torch.zeros(inputs.special.shape)
    if layer is not None:
        asked = {name: options[name] for name in ("base", "samples", "noise", "baseline")}
        scores = _measure_base(evaluate, inputs, **asked, sign="none").scores.float().cpu()
    texts, content, ids = identity.texts.tolist(), ~inputs.special.cpu(), inputs.ids.cpu()
    return [
        Reference(
            text=text,
            label=int(identity.labels[row]),
            foremost=row == 0 or texts[row - 1] != text,
            vectors=vectors[row],
            ids=ids[row][content[row]].numpy(),
            words=identity.words[row][content[row]].numpy(),
            scores=scores[row][content[row]].numpy(),
        )
        for row, text in enumerate(texts)
    ]


def _measure_base(
    evaluate: Evaluate, inputs: Inputs, base: Base, samples: int, noise: float, sign: Sign, baseline: str
) -> Attribution:
    if base == "saliency":
        return saliency(evaluate, inputs, sign=sign, baseline=baseline)
    return smoothgrad(evaluate, inputs, samples=samples, noise=noise, sign=sign, baseline=baseline)


def _weigh_tokens(index: ReferenceIndex, numbers: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
    """Return the places of the neighbours' tokens, (K,), and m_ik / T_i / neighbours, (K,) float64."""
    places, shares = [], []
    for number in numbers.tolist():
        start, stop = int(index.offsets[number]), int(index.offsets[number + 1])
        scores = index.scores[start:stop].double()
        largest = float(scores.max()) if scale == "unit_max" and len(scores) else 0.0
        places.append(torch.arange(start, stop))
        shares.append(scores / (largest or 1.0) / max(stop - start, 1) / len(numbers))
    return torch.cat(places), torch.cat(shares)


def _sum_equal_words(words: Tensor, shares: Tensor, inputs: Inputs, identity: Identity, row: int) -> Tensor:
    """Return E of each token, (S,): what equal words have together, in equal parts on the tokens of the row's word."""
    found, places = torch.unique(torch.cat([words, identity.words[row]]), return_inverse=True)
    sums = torch.zeros(len(found), dtype=torch.float64).index_add_(0, places[: len(words)], shares)
    number = inputs.words[row].cpu()
    inside = number >= 0
    pieces = torch.ones_like(number)
    pieces[inside] = number[inside].bincount()[number[inside]]
    return (sums[places[len(words) :]] / pieces).to(inputs.x.device)


def _sum_similar_tokens(ids: Tensor, shares: Tensor, model: nn.Module, own: Tensor, kernel: Kernel) -> Tensor:
    """Return E of each token, (S,), by a kernel of word embeddings; each pair of tokens is compared once."""
    embeddings: Any = model
    with torch.no_grad():
        found, places = torch.unique(ids.to(own.device), return_inverse=True)
        sums = torch.zeros(len(found), dtype=torch.float64, device=own.device)
        sums.index_add_(0, places, shares.to(own.device))
        mine, tokens = torch.unique(own, return_inverse=True)
        embed = embeddings.get_input_embeddings()
        compared: Tensor = _compare(embed(mine).double(), embed(found).double(), kernel) @ sums
        return compared[tokens]


def _compare(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    """Return the kernel of each pair, (U, D) and (V, D) to (U, V), as in appendix E of the paper."""
    if kernel == "cosine":
        return functional.normalize(a, dim=-1) @ functional.normalize(b, dim=-1).T
    if kernel == "cubic":
        return (7 * (a @ b.T)) ** 3
    if kernel == "laplacian":
        return torch.exp(-torch.cdist(a, b, p=1) / 4)
    # by matrix products equal embeddings would have a distance above 0
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-distances / 4) if kernel == "rbf" else 1 / distances.clamp(0.3, 3)
