"""Slow re-statements of what lexplain computes fast, in float64, straight from the papers.

Nothing here is imported from lexplain: models and tokenizers are used as their own library documents them, one text,
one window, one path point at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf, roots_legendre
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def quadrature(rule: str, nodes: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1], each from its textbook definition."""
    if rule == "midpoint":
        return [((2 * i + 1) / (2 * nodes), 1 / nodes) for i in range(nodes)]
    if rule == "trapezoid":
        step = 1 / (nodes - 1)
        return [(i * step, step / 2 if i in (0, nodes - 1) else step) for i in range(nodes)]
    abscissae, weights = roots_legendre(nodes)
    return [((1 + a) / 2, w / 2) for a, w in zip(abscissae.tolist(), weights.tolist(), strict=True)]


def integrated_gradients(
    score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, rule: str, nodes: int
) -> NDArray[np.float64]:
    """Sundararajan et al. 2017, section 3: (S,) scores of one (S, D) input in float64, one node after the other."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for alpha, weight in quadrature(rule, nodes):
        point = (baseline + alpha * (x - baseline)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(point), point)
        total += weight * ((x - baseline) * gradient).sum(-1)
    return total.numpy()


def sequential_integrated_gradients(
    score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, rule: str, nodes: int
) -> NDArray[np.float64]:
    """Enguehard 2023: (S,) scores; each token alone moves from its baseline, one node after the other."""
    scores = np.zeros(len(x))
    for token in range(len(x)):
        for alpha, weight in quadrature(rule, nodes):
            point = x.clone()
            point[token] = baseline[token] + alpha * (x[token] - baseline[token])
            point.requires_grad_(True)
            (gradient,) = torch.autograd.grad(score(point), point)
            scores[token] += weight * float(((x[token] - baseline[token]) * gradient[token]).sum())
    return scores


@dataclass(frozen=True)
class AnchorSearch:
    """Sanyal & Ren 2021 and Sinha Roy & Kundu 2024: anchors of one word at a time, dimension by dimension."""

    vocabulary: NDArray[np.float64]  # (V, D)
    baseline: int
    steps: int
    neighbours: int
    strategy: str
    uniform: bool

    def run(self, word: int) -> list[int]:
        """The m anchors after the word."""
        path = [word]
        for hop in range(self.steps):
            current = path[-1]
            if current == self.baseline:
                path.append(self.baseline)
                continue
            candidates = [
                other for other in self.nearest(word, current, hop) if other != self.baseline and other not in path
            ]
            # the first of equals: the nearest
            path.append(min(candidates, key=lambda other: self.cost(current, other)) if candidates else self.baseline)
        return path[1:]

    def nearest(self, word: int, current: int, hop: int) -> list[int]:
        x, end = self.vocabulary[word], self.vocabulary[self.baseline]
        point = end + (self.steps - hop) / (self.steps + 1) * (x - end) if self.uniform else self.vocabulary[current]
        distances = ((self.vocabulary - point) ** 2).sum(1)
        others = [other for other in range(len(distances)) if self.uniform or other != current]
        return sorted(others, key=lambda other: (distances[other], other))[: self.neighbours]

    def cost(self, current: int, other: int) -> float:
        u, v, end = self.vocabulary[current], self.vocabulary[other], self.vocabulary[self.baseline]
        if self.strategy == "maxcount":
            return -sum(is_between(end[i], u[i], v[i]) for i in range(len(v)))
        monotone = monotonize(end, u, v, self.steps)
        return math.sqrt(sum((v[i] - monotone[i]) ** 2 for i in range(len(v))))

    def points(self, word: int, factor: int) -> NDArray[np.float64]:
        """The path of a word, from the baseline to it, (2^f (m + 1) + 1, D)."""
        end = self.vocabulary[self.baseline]
        path = [self.vocabulary[word]]
        for anchor in self.run(word):
            path.append(monotonize(end, path[-1], self.vocabulary[anchor], self.steps))
        path = [*path, end][::-1]
        for _ in range(factor):
            between = [(one + other) / 2 for one, other in pairwise(path)]
            path = [point for pair in zip(path, between, strict=False) for point in pair] + [path[-1]]
        return np.array(path)


def is_between(end: float, u: float, v: float) -> bool:
    return min(end, u) <= v <= max(end, u)


def monotonize(
    end: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64], steps: int
) -> NDArray[np.float64]:
    """v where it lies between u and the end, elsewhere 1/m of the way from u to the end."""
    return np.array([v[i] if is_between(end[i], u[i], v[i]) else u[i] - (u[i] - end[i]) / steps for i in range(len(v))])


def discretized_integrated_gradients(
    score: Callable[[Tensor], Tensor], paths: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Left Riemann sum, (S,), along the paths of all tokens together; each path (points, D)."""
    points = torch.from_numpy(np.stack(list(paths), axis=1))  # (points, S, D)
    scores = np.zeros(points.shape[1])
    for here, there in pairwise(points):
        point = here.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(point), point)
        scores += (gradient * (there - here)).sum(-1).numpy()
    return scores


def saliency(score: Callable[[Tensor], Tensor], x: Tensor, norm: str) -> NDArray[np.float64]:
    """Arras et al. 2016: the size of each token's gradient, (S,), one number after the other."""
    point = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(point), point)
    return measure_gradients(gradient, norm)


def measure_gradients(gradient: Tensor, norm: str) -> NDArray[np.float64]:
    """The size of each row of an (S, D) gradient."""
    if norm == "l1":
        return np.array([sum(abs(number) for number in token) for token in gradient.tolist()])
    squares = np.array([sum(number * number for number in token) for token in gradient.tolist()])
    return np.sqrt(squares) if norm == "l2" else squares


def smoothgrad(score: Callable[[Tensor], Tensor], x: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """Smilkov et al. 2017: the mean gradient over noisy copies, (S, D)."""
    total = torch.zeros_like(x)
    for noise in noises:
        point = (x + noise).requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(point), point)
        total += gradient
    return total / len(noises)


def occlusion(
    score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, words: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """What F loses without each word, in equal parts on the word's tokens, (S,); `words` lists positions."""
    scores = np.zeros(len(x))
    for positions in words:
        without = x.clone()
        for position in positions:
            without[position] = baseline[position]
        for position in positions:
            scores[position] = (score(x) - score(without)).item() / len(positions)
    return scores


def shapley_values(
    score: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, words: Sequence[Sequence[int]], orders: Sequence[Sequence[int]]
) -> NDArray[np.float64]:  # fmt: skip
    """Strumbelj and Kononenko 2010: what each word adds when it is put in, mean over orders of the words.

    Args:
        score: Of one (S, D) input.
        x: (S, D).
        baseline: (S, D).
        words: The tokens of each word.
        orders: Permutations of the words.

    Returns:
        (S,) a word's value in equal parts on its tokens.
    """
    scores = np.zeros(len(x))
    for order in orders:
        point, before = baseline.clone(), float(score(baseline))
        for word in order:
            tokens = list(words[word])
            point[tokens] = x[tokens]
            after = float(score(point))
            scores[tokens] += (after - before) / len(tokens) / len(orders)
            before = after
    return scores


def textcnn_deep_lift(
    x: NDArray[np.float64], baseline: NDArray[np.float64], filters: Sequence[Weights], output: Weights, label: int
) -> NDArray[np.float64]:
    """DeepLIFT of Shrikumar et al. 2017 for one text, (L, D): Rescale at the ReLU, linear rule elsewhere.

    What a filter's maximum changes by is split at the larger of the two maxima: the winning window of the text is
    given the way up to it, the winning window of the baseline the way down.

    Args:
        x: (L, D) word vectors, no padding, L at least every width.
        baseline: (L, D).
        filters: As in `textcnn_relevance`.
        output: As in `textcnn_relevance`.
        label: Whose score is shared out.
    """
    scores = np.zeros_like(x)
    number = 0
    for weights, biases in filters:
        width = weights.shape[2]
        for weight, bias in zip(weights, biases, strict=True):
            values, empty = (
                [float(bias + (weight.T * text[start : start + width]).sum()) for start in range(len(x) - width + 1)]
                for text in (x, baseline)
            )
            top, bottom = max(values), max(empty)
            change = top - bottom
            slope = (max(top, 0.0) - max(bottom, 0.0)) / change if change else float(top > 0)
            larger = max(top, bottom)
            for window, part in ((int(np.argmax(values)), larger - bottom), (int(np.argmax(empty)), top - larger)):
                moved = values[window] - empty[window]
                if part and moved:
                    inside = slice(window, window + width)
                    multiplier = output[0][label][number] * slope * part / moved
                    scores[inside] += multiplier * weight.T * (x[inside] - baseline[inside])
            number += 1
    return scores


@dataclass(frozen=True)
class MaskSearch:
    """Brinner & Zarriess 2023, equations 5 to 8, in the variants of paper and released code."""

    steps: int
    kernel: str = "sigma_squared"
    complement: str = "one_minus_p"
    sufficiency: float = 1.0
    comprehensiveness: float = 1.0
    sparsity: float = 1.0
    smoothness: float = 1.2
    learning_rate: float = 0.03
    weight_decay: float = 0.01

    def mask(self, weights: Tensor, widths: Tensor) -> list[Tensor]:
        """Lambda of each word, equations 5 and 6."""
        masks = []
        for j in range(len(weights)):
            total = torch.zeros((), dtype=torch.float64)
            for i in range(len(weights)):
                width = widths[i] ** 2 if self.kernel == "sigma_squared" else widths[i]
                total = total + weights[i] * torch.exp(-((i - j) ** 2) / width)
            masks.append(1 / (1 + torch.exp(-total)))
        return masks

    def loss(
        self, probability: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, words: Sequence[Sequence[int]],
        masks: Sequence[Tensor], widths: Tensor, forced: dict[int, float], noises: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        """Equation 8, with the squeezed probabilities of the released code."""
        share = [torch.ones((), dtype=torch.float64)] * len(x)
        for positions, mask in zip(words, masks, strict=True):
            for position in positions:
                share[position] = torch.tensor(forced[position]) if position in forced else mask
        column = torch.stack(share)[:, None]
        kept = 0.99999 * probability(column * x + (1 - column) * baseline + noises[0]) + 5e-6
        left = 0.99999 * probability((1 - column) * x + column * baseline + noises[1]) + 5e-6
        complement = -torch.log(1 - left) if self.complement == "one_minus_p" else torch.log(left)
        mean = sum(masks) / len(masks)
        logs = sum(torch.log(width) for width in widths) / len(widths)
        return (
            -self.sufficiency * torch.log(kept)
            + self.comprehensiveness * complement
            + self.sparsity * mean**2
            - self.smoothness * logs
        )

    def run(
        self, probability: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, words: Sequence[Sequence[int]],
        force: Callable[[int], dict[int, float]] = lambda step: {},
        noise: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[NDArray[np.float64], int, bool]:  # fmt: skip
        """Word masks, steps taken, and whether the early stop was met; `torch.optim.AdamW` descends."""
        weights = torch.full((len(words),), 1.2, dtype=torch.float64, requires_grad=True)
        widths = torch.full((len(words),), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([weights, widths], lr=self.learning_rate, weight_decay=self.weight_decay)
        silent = (torch.zeros_like(x), torch.zeros_like(x))

        def mean() -> float:
            with torch.no_grad():
                return float(sum(self.mask(weights, widths)) / len(words))

        before = mean()
        for step in range(self.steps):
            masks = self.mask(weights, widths)
            noises = silent if noise is None else noise(step)
            optimizer.zero_grad()
            self.loss(probability, x, baseline, words, masks, widths, force(step), noises).backward()
            optimizer.step()
            with torch.no_grad():
                widths.clamp_(min=0.01)  # ours: the code has no bound, and log(sigma) may fail
            if step % 50 == 49:
                now = mean()
                calm = abs(now - before) < 1 / 200 or (abs(now - before) < 1 / 80 and now < 0.2)
                if calm and (step >= 199 or now < 0.3) and now < 0.45:
                    return np.array([mask.item() for mask in self.mask(weights, widths)]), step + 1, True
                before = now
        return np.array([mask.item() for mask in self.mask(weights, widths)]), self.steps, False


@dataclass
class TextScores:
    """What an explanation of one label of one text comes down to."""

    offsets: list[tuple[int, int]]
    token_scores: NDArray[np.float64]
    target_score: float
    baseline_score: float
    n_windows: int


class SlowExplainer:
    """One classifier folder in float64, explained without batches, padding or shared passes."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        frame = self.tokenizer("")["input_ids"]
        self.first, self.last = frame[:1], frame[1:]

    def windows(self, text: str, max_tokens: int, overlap: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Content token ids of each window, and the offsets of all content tokens."""
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, capacity = whole["input_ids"], max_tokens - 2
        count = 1 if len(ids) <= capacity else 1 + math.ceil((len(ids) - capacity) / (capacity - overlap))
        starts = [number * (capacity - overlap) for number in range(count)]
        return [ids[start : start + capacity] for start in starts], whole["offset_mapping"]

    def logit(self, embeddings: Tensor, label: int) -> Tensor:
        """The label's logit of one unpadded window; one-logit models have z for label 1 and -z for label 0."""
        logits = self.model(inputs_embeds=embeddings[None], attention_mask=torch.ones(1, len(embeddings))).logits[0]
        if len(logits) == 1:
            return logits[0] if label == 1 else -logits[0]
        return logits[label]

    def integrated_gradients(
        self, text: str, label: int, *, baseline: str, rule: str, nodes: int, max_tokens: int, overlap: int
    ) -> TextScores:
        """Token scores of one label: the mean over the windows of the text."""
        embed = self.model.get_input_embeddings()
        baseline_id = self.tokenizer.convert_tokens_to_ids(baseline)
        pieces, offsets = self.windows(text, max_tokens, overlap)
        scores = np.zeros(len(offsets))
        targets: list[float] = []
        baselines: list[float] = []
        for number, content in enumerate(pieces):
            with torch.no_grad():
                x = embed(torch.tensor(self.first + content + self.last))
                empty = embed(torch.tensor(self.first + [baseline_id] * len(content) + self.last))
                targets.append(self.logit(x, label).item())
                baselines.append(self.logit(empty, label).item())
            found = integrated_gradients(lambda point: self.logit(point, label), x, empty, rule, nodes)
            start = number * (max_tokens - 2 - overlap)
            scores[start : start + len(content)] += found[1:-1] / len(pieces)
        return TextScores(offsets, scores, float(np.mean(targets)), float(np.mean(baselines)), len(pieces))

    def measure(self, text: str, label: int, max_tokens: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The first window's mean hidden states, (layers + 1, H), and its content tokens' squared gradients, (T,)."""
        content = self.windows(text, max_tokens, 0)[0][0]
        ids = torch.tensor([self.first + content + self.last])
        with torch.no_grad():
            states = self.model(input_ids=ids, output_hidden_states=True).hidden_states
            x = self.model.get_input_embeddings()(ids[0])
        means = [np.mean([token.numpy() for token in layer[0]], axis=0) for layer in states]
        return np.array(means), saliency(lambda point: self.logit(point, label), x, "l2_squared")[1:-1]


def lafa(
    scores: Sequence[float], tokens: Sequence[Any], neighbours: Sequence[tuple[Sequence[float], Sequence[Any]]],
    similar: Callable[[Any, Any], float], weight: float,
) -> NDArray[np.float64]:  # fmt: skip
    """Zhang et al. 2022, equations 6 and 7: scores and tokens of a text, and of each of its neighbours."""
    found = []
    for score, token in zip(scores, tokens, strict=True):
        borrowed = 0.0
        for theirs, others in neighbours:
            total = sum(m * similar(token, other) for m, other in zip(theirs, others, strict=True))
            borrowed += total / len(others) / len(neighbours)
        found.append(score + weight * borrowed)
    return np.array(found)


def compare_embeddings(kernel: str, a: Sequence[float], b: Sequence[float]) -> float:
    """Zhang et al. 2022, appendix E, one number after the other."""
    product = sum(x * y for x, y in zip(a, b, strict=True))
    straight = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
    if kernel == "cosine":
        return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    if kernel == "rbf":
        return math.exp(-straight / 2**2)
    if kernel == "laplacian":
        return math.exp(-sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2**2)
    if kernel == "cubic":
        return (7 * product + 0) ** 3
    return 1 / min(max(straight, 0.3), 3.0)


def words_by_character(
    text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], scores: Sequence[float]
) -> tuple[list[float], float]:
    """Word sums and the rest, one character at a time: a token is shared out over its characters but white space."""
    words, other = [0.0] * len(spans), 0.0
    owner = {place: number for number, (start, end) in enumerate(spans) for place in range(start, end)}
    for (start, end), score in zip(offsets, scores, strict=True):
        places = [place for place in range(start, end) if not text[place].isspace()]
        for place in places:
            if place in owner:
                words[owner[place]] += score / len(places)
            else:
                other += score / len(places)
        if not places:
            other += score
    return words, other


Weights = tuple[NDArray[np.float64], NDArray[np.float64]]  # and biases


def textcnn_weights(model: torch.nn.Module) -> tuple[list[Weights], Weights, NDArray[np.float64]]:
    """Filters by width, output layer and word vectors of a TextCNN in float64."""
    filters = [(_array(layer.weight), _array(layer.bias)) for layer in model.convolutions]
    output = _array(model.classifier.weight), _array(model.classifier.bias)
    return filters, output, _array(model.embeddings.weight)


def textcnn_relevance(
    x: NDArray[np.float64],
    filters: Sequence[Weights],
    output: Weights,
    label: int,
    eps: float,
    bias_factor: float,
) -> tuple[float, NDArray[np.float64]]:
    """LRP of Arras et al. 2017 for one text: its score, and (L, D) relevance.

    Every share z of the equations is formed by itself. Bias and stabiliser are shared equally over the inputs that
    are there: a window longer than the text has the text's words only.

    Args:
        x: (L, D) word vectors, no padding.
        filters: For each width H, weights (F, D, H) and biases (F,).
        output: Weights (C, all F) and biases (C,).
        label: Whose score is shared out.
        eps: Stabiliser.
        bias_factor: Share of bias and stabiliser that is handed out.
    """
    length, size = x.shape
    relevance = np.zeros_like(x)
    winners: list[tuple[NDArray[np.float64], float, list[int], float]] = []  # (weights, bias, words, value)
    for weights, biases in filters:
        width = weights.shape[2]
        starts = range(length - width + 1) if length >= width else range(1)
        for weight, bias in zip(weights, biases, strict=True):
            best: tuple[NDArray[np.float64], float, list[int], float] | None = None
            for start in starts:
                words = list(range(start, min(start + width, length)))
                value = float(bias)
                for place, word in enumerate(words):
                    value += float(np.dot(weight[:, place], x[word]))
                if best is None or value > best[3]:
                    best = (weight, float(bias), words, value)
            assert best is not None
            winners.append(best)
    hidden = [max(value, 0.0) for *_, value in winners]
    score = float(output[1][label] + sum(h * w for h, w in zip(hidden, output[0][label], strict=True)))
    signed = eps if score >= 0 else -eps
    for h, w, (weight, bias, words, value) in zip(hidden, output[0][label], winners, strict=True):
        z = h * w + bias_factor * (output[1][label] + signed) / len(hidden)
        received = z / (score + signed) * score
        inner = eps if value > 0 else -eps
        for place, word in enumerate(words):
            for i in range(size):
                z = x[word, i] * weight[i, place] + bias_factor * (bias + inner) / (len(words) * size)
                relevance[word, i] += z / (value + inner) * received
    return score, relevance


class TransformerRelevance:
    """AttnLRP and CP-LRP of one encoder in float64, by handing relevance from layer to layer.

    Every layer's output is computed here, and its relevance divided among its inputs by the layer's own rule, with
    the shares z / sum of z written out. No gradient is taken.
    """

    def __init__(self, folder: Path, rule: str, eps: float) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
        self.family = self.model.config.model_type
        self.rule, self.eps = rule, eps

    def explain(self, ids: Sequence[int], label: int) -> tuple[float, NDArray[np.float64]]:
        """The label's logit, and (S,) relevance of the tokens' word embeddings, special ones too."""
        back: list[Callable[[NDArray[np.float64]], NDArray[np.float64]]] = []

        def step(pair: tuple[NDArray[np.float64], Callable[..., NDArray[np.float64]]]) -> NDArray[np.float64]:
            back.append(pair[1])
            return pair[0]

        hidden = step(self._embed(ids))
        embeddings = self.model.base_model.embeddings
        hidden = step(self._norm(hidden, embeddings.LayerNorm))
        if hasattr(self.model.base_model, "embeddings_project"):
            hidden = step(self._linear(hidden, self.model.base_model.embeddings_project))
        for layer in self._layers():
            hidden = step(self._layer(hidden, layer))
        first, activation, last = self._head()
        vector = hidden[0]
        length = len(hidden)
        back.append(lambda r: np.concatenate([r[None], np.zeros((length - 1, len(r)))]))
        vector = step(self._linear(vector, first))
        vector = activation(vector)  # identity rule: relevance passes as it is
        logits = step(self._linear(vector, last))
        relevance = np.zeros_like(logits)
        relevance[label] = logits[label]
        for rule in reversed(back):
            relevance = rule(relevance)
        return float(logits[label]), relevance.sum(-1)

    def _layers(self) -> list[dict[str, torch.nn.Module]]:
        if self.family == "distilbert":
            return [
                {"query": layer.attention.q_lin, "key": layer.attention.k_lin, "value": layer.attention.v_lin,
                 "mix": layer.attention.out_lin, "norm": layer.sa_layer_norm, "up": layer.ffn.lin1,
                 "down": layer.ffn.lin2, "last_norm": layer.output_layer_norm}
                for layer in self.model.base_model.transformer.layer
            ]  # fmt: skip
        return [
            {"query": layer.attention.self.query, "key": layer.attention.self.key, "value": layer.attention.self.value,
             "mix": layer.attention.output.dense, "norm": layer.attention.output.LayerNorm,
             "up": layer.intermediate.dense, "down": layer.output.dense, "last_norm": layer.output.LayerNorm}
            for layer in self.model.base_model.encoder.layer
        ]  # fmt: skip

    def _head(self) -> tuple[torch.nn.Module, Callable[..., NDArray[np.float64]], torch.nn.Module]:
        model = self.model
        if self.family == "bert":
            return model.base_model.pooler.dense, np.tanh, model.classifier
        if self.family == "distilbert":
            return model.pre_classifier, lambda x: np.maximum(x, 0.0), model.classifier
        return model.classifier.dense, _gelu if self.family == "electra" else np.tanh, model.classifier.out_proj

    def _embed(self, ids: Sequence[int]) -> tuple[NDArray[np.float64], Callable[..., NDArray[np.float64]]]:
        embeddings = self.model.base_model.embeddings
        first = embeddings.word_embeddings.padding_idx + 1 if "roberta" in self.family else 0
        word = _array(embeddings.word_embeddings.weight)[list(ids)]
        total = word + _array(embeddings.position_embeddings.weight)[first : first + len(ids)]
        if hasattr(embeddings, "token_type_embeddings"):
            total = total + _array(embeddings.token_type_embeddings.weight)[0]
        return total, lambda r: word / total * r

    def _linear(
        self, x: NDArray[np.float64], layer: torch.nn.Module
    ) -> tuple[NDArray[np.float64], Callable[..., NDArray[np.float64]]]:
        weight, bias = _array(layer.weight), _array(layer.bias)
        out = x @ weight.T + bias

        def back(relevance: NDArray[np.float64]) -> NDArray[np.float64]:
            z = x[..., None, :] * weight  # (..., out, in)
            stable = out + np.where(out >= 0, self.eps, -self.eps)
            return (z / stable[..., None] * relevance[..., None]).sum(-2)

        return out, back

    def _norm(
        self, x: NDArray[np.float64], layer: torch.nn.Module
    ) -> tuple[NDArray[np.float64], Callable[..., NDArray[np.float64]]]:
        size = x.shape[-1]
        deviation = np.sqrt(x.var(-1, keepdims=True) + layer.eps)
        weight = _array(layer.weight)
        out = (x - x.mean(-1, keepdims=True)) / deviation * weight + _array(layer.bias)

        def back(relevance: NDArray[np.float64]) -> NDArray[np.float64]:
            matrix = (np.eye(size) - 1 / size) * weight[:, None]  # (out, in), the deviation a constant
            z = x[..., None, :] * matrix / deviation[..., None]
            return (z / out[..., None] * relevance[..., None]).sum(-2)

        return out, back

    def _attention(
        self, hidden: NDArray[np.float64], layer: dict[str, torch.nn.Module]
    ) -> tuple[NDArray[np.float64], Callable[..., NDArray[np.float64]]]:
        backs, parts = [], []
        heads = self.model.config.num_attention_heads
        for name in ("query", "key", "value"):
            out, back = self._linear(hidden, layer[name])
            backs.append(back)
            parts.append(out.reshape(len(hidden), heads, -1).transpose(1, 0, 2))  # (heads, S, d)
        query, key, value = parts
        scale = query.shape[-1] ** -0.5
        scores = query @ key.transpose(0, 2, 1) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = weights @ value

        def join(x: NDArray[np.float64]) -> NDArray[np.float64]:
            return x.transpose(1, 0, 2).reshape(len(hidden), -1)

        def back(relevance: NDArray[np.float64]) -> NDArray[np.float64]:
            relevance = relevance.reshape(len(hidden), heads, -1).transpose(1, 0, 2)
            # (heads, from, to, d): what each pair of tokens adds to the context
            shares = weights[..., None] * value[:, None] / context[:, :, None] * relevance[:, :, None]
            if self.rule == "cp_lrp":
                return backs[2](join(shares.sum(1)))
            found = backs[2](join(shares.sum(1) / 2))
            of_weights = shares.sum(-1) / 2
            of_scores = scores * (of_weights - weights * of_weights.sum(-1, keepdims=True))
            pairs = query[:, :, None] * key[:, None] * scale / scores[..., None] * of_scores[..., None] / 2
            return found + backs[0](join(pairs.sum(2))) + backs[1](join(pairs.sum(1)))

        return join(context), back

    def _layer(
        self, x: NDArray[np.float64], layer: dict[str, torch.nn.Module]
    ) -> tuple[NDArray[np.float64], Callable[..., NDArray[np.float64]]]:
        context, attention_back = self._attention(x, layer)
        mixed, mix_back = self._linear(context, layer["mix"])
        middle, norm_back = self._norm(mixed + x, layer["norm"])
        up, up_back = self._linear(middle, layer["up"])
        down, down_back = self._linear(_gelu(up), layer["down"])
        out, last_back = self._norm(down + middle, layer["last_norm"])

        def back(relevance: NDArray[np.float64]) -> NDArray[np.float64]:
            relevance = last_back(relevance)
            total = down + middle
            of_middle = middle / total * relevance + up_back(down_back(down / total * relevance))
            of_middle = norm_back(of_middle)
            total = mixed + x
            return x / total * of_middle + attention_back(mix_back(mixed / total * of_middle))

        return out, back


def _array(weight: Tensor) -> NDArray[np.float64]:
    return weight.detach().numpy()


def _gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * (1 + erf(x / math.sqrt(2))) / 2
