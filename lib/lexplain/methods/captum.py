"""Methods that captum has, behind our interface: word embeddings of one row at a time.

Nothing is batched across documents here, and each target of a text is a run of its own. The package captum is loaded
when one of these methods first runs.

Shape letters: B rows, S tokens, N points, T content tokens of a row, D embedding, U units (words) of a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lexplain.methods import Attribution, Evaluate, Inputs, method
from lexplain.methods.hooks import replaced_logits
from lexplain.methods.noise import measure_spread
from lexplain.methods.units import count_tokens, number_units

if TYPE_CHECKING:
    from lexplain.methods import Score

Rule = Literal["gausslegendre", "riemann_middle", "riemann_trapezoid", "riemann_left", "riemann_right"]

# Noisy copies in one pass. Fixed: the numbers of a pass are drawn together, so it must not depend on the memory.
_SAMPLES_A_PASS = 5


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """One row as captum sees it: content tokens only, since the others never change.

    Attributes:
        number: Of the row in its batch.
        x: (1, T, D) word embeddings of the content tokens.
        baseline: (1, T, D).
        units: (1, T, 1) long, the unit of each.
        score: Takes (N, T, D), returns the logit of the row's target (N,).
        points: How many points fit a pass.
    """

    number: int
    x: Tensor
    baseline: Tensor
    units: Tensor
    score: Score
    points: int


@method(
    name="captum.layer_integrated_gradients", version=1, complete=True, signed=True, cite="sundararajan2017axiomatic",
    ranges={"n_steps": (2, 2000)}, batched=False, requires=("captum",), cost=lambda options, tokens: 2 * options["n_steps"] + 1,
)  # fmt: skip
def layer_integrated_gradients(
    evaluate: Evaluate, inputs: Inputs, *, n_steps: int = 50, rule: Rule = "gausslegendre", baseline: str = "mask"
) -> Attribution:
    """Return captum's Integrated Gradients of the word embedding layer, summed over the embedding.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        n_steps: Points, 2 to 2000.
        rule: Where they lie, captum's `method`. The weights of its `riemann_trapezoid` sum to less than 1.
        baseline: Token that stands for the absence of a word, named as in `integrated_gradients`.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding.

    Note:
        Runs on: executor. Cost: `n_steps` forward and backward passes a row, one forward pass for F(baseline).
        Source: Sundararajan et al. 2017; `integrated_gradients` is the same, batched.
    """

    def explain(row: _Row) -> Tensor:
        from captum.attr import IntegratedGradients

        found: Tensor = IntegratedGradients(row.score).attribute(
            row.x, row.baseline, n_steps=n_steps, method=rule, internal_batch_size=row.points
        )
        return found[0].sum(-1)

    return Attribution.from_scores(_explain_rows(evaluate, inputs, explain), evaluate, inputs, evaluations=n_steps)


@method(
    name="captum.gradient_shap", version=1, signed=True, stochastic=True, cite="lundberg2017unified",
    ranges={"n_samples": (1, 2000), "stdevs": (0.0, 10.0)}, batched=False, requires=("captum",),
    cost=lambda options, tokens: 2 * options["n_samples"] + 1,
)  # fmt: skip
def gradient_shap(
    evaluate: Evaluate, inputs: Inputs, *, n_samples: int = 25, stdevs: float = 0.0, baseline: str = "mask"
) -> Attribution:
    """Return captum's GradientSHAP: the gradient at random points between baseline and noisy input, times their distance.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        n_samples: Random points, 1 to 2000; captum takes 5.
        stdevs: Standard deviation of the Gaussian noise on content tokens, as a share of that of the row's own
            embeddings, since those of one model are some 20 times those of another.
        baseline: Token that stands for the absence of a word, named as in `integrated_gradients`. captum draws
            baselines from a distribution; here all of it lies on this one text.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. Without noise they are Integrated
        Gradients with random nodes, and sum to F(x) - F(baseline) on average only.

    Note:
        Runs on: executor. Cost: `n_samples` forward and backward passes a row, one forward pass for F(baseline).
        Source: Lundberg and Lee 2017, as captum has it.
    """
    spread = measure_spread(inputs)

    def explain(row: _Row) -> Tensor:
        from captum.attr import GradientShap

        shap, total = GradientShap(row.score), torch.zeros_like(row.x[0, :, 0])
        with _seeded(inputs, row):
            for start in range(0, n_samples, _SAMPLES_A_PASS):
                size = min(_SAMPLES_A_PASS, n_samples - start)
                found: Tensor = shap.attribute(
                    row.x, row.baseline, n_samples=size, stdevs=stdevs * float(spread[row.number])
                )
                total += size * found[0].sum(-1)
        return total / n_samples

    return Attribution.from_scores(_explain_rows(evaluate, inputs, explain), evaluate, inputs, evaluations=n_samples)


@method(
    name="captum.deep_lift", version=1, complete=True, signed=True, cite="shrikumar2017learning", models=("textcnn",),
    batched=False, requires=("captum",), cost=lambda options, tokens: 5,
)  # fmt: skip
def deep_lift(evaluate: Evaluate, inputs: Inputs, *, baseline: str = "mask") -> Attribution:
    """Return captum's DeepLIFT with the Rescale rule, summed over the embedding. TextCNN only.

    captum puts its rule on modules that it knows, as ReLU and MaxPool1d. Attention, LayerNorm and GELU of transformers
    are none of them: plain gradients would pass there, and the scores would not sum to anything.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows.
        baseline: Token that stands for the absence of a word, named as in `integrated_gradients`.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. They sum to F(x) - F(baseline).

    Note:
        Runs on: executor. Cost: two forward and backward passes a row, one forward pass for F(baseline).
        Source: Shrikumar et al. 2017.
    """
    model: Any = evaluate.model

    def explain(row: _Row) -> Tensor:
        from captum.attr import DeepLift

        length = int(inputs.mask[row.number].sum())
        layers = _TextCNNLayers(model, length)
        with replaced_logits(model, lambda given, _: layers(given["inputs_embeds"])):
            found: Tensor = DeepLift(_Scored(row.score, layers)).attribute(row.x, row.baseline)
        return found[0].sum(-1)

    return Attribution.from_scores(_explain_rows(evaluate, inputs, explain), evaluate, inputs, evaluations=2)


@method(
    name="captum.lime", version=1, signed=True, stochastic=True, by_word=True, cite="ribeiro2016should",
    ranges={"n_samples": (10, 100_000), "alpha": (1e-6, 10.0)}, batched=False, requires=("captum", "scikit-learn"),
    cost=lambda options, tokens: options["n_samples"] + 1,
)  # fmt: skip
def lime(
    evaluate: Evaluate, inputs: Inputs, *, n_samples: int = 500, alpha: float = 0.01, baseline: str = "mask"
) -> Attribution:
    """Return captum's LIME: the weights of a sparse linear model of the logit around the text, a word one feature.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows. A token outside words is a word of its own.
        n_samples: Texts in which each word was kept or not by the toss of a coin, 10 to 100 000; captum takes 25,
            fewer than a text has words.
        alpha: Penalty of the lasso, 0.000001 to 10.
        baseline: Token in the place of those taken away, named as in `integrated_gradients`.

    Returns:
        Scores in logits, of both signs, in equal parts on a word's tokens; exactly 0.0 on special tokens and padding,
        and on words that the lasso drops. Samples are weighed by exp(-d^2 / 2), d one less the cosine to the
        text's embeddings: captum's default.

    Note:
        Runs on: executor. Cost: `n_samples` forward passes a row, one for F(baseline), and a regression on the CPU.
        Source: Ribeiro et al. 2016.
    """

    def explain(row: _Row) -> Tensor:
        from captum._utils.models.linear_model import SkLearnLasso
        from captum.attr import Lime

        explainer = Lime(_only_finite(row.score), interpretable_model=SkLearnLasso(alpha=alpha))
        try:
            with _seeded(inputs, row):
                found: Tensor = explainer.attribute(
                    row.x, row.baseline, feature_mask=row.units, n_samples=n_samples, perturbations_per_eval=row.points
                )
        except FloatingPointError:
            return torch.full_like(row.x[0, :, 0], torch.nan)
        return found[0, :, 0]

    scores = _share_over_tokens(_explain_rows(evaluate, inputs, explain), inputs)
    return Attribution.from_scores(scores, evaluate, inputs, evaluations=0)


@method(
    name="captum.shapley_value_sampling", version=1, complete=True, signed=True, stochastic=True, by_word=True,
    cite="strumbelj2010efficient", ranges={"n_samples": (1, 10_000)}, batched=False, requires=("captum",),
    cost=lambda options, tokens: options["n_samples"] * tokens + 2,
)  # fmt: skip
def shapley_value_sampling(
    evaluate: Evaluate, inputs: Inputs, *, n_samples: int = 25, baseline: str = "mask"
) -> Attribution:
    """Return captum's Shapley values of the words, averaged over random orders in which they are put in.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows. A token outside words is a word of its own.
        n_samples: Orders, 1 to 10 000.
        baseline: Token in the place of words that are not there yet, named as in `integrated_gradients`.

    Returns:
        Scores in logits, of both signs, in equal parts on a word's tokens; exactly 0.0 on special tokens and padding.
        They sum to F(x) - F(baseline), however few orders there are.

    Note:
        Runs on: executor. Cost: `n_samples` forward passes for each word of a row, and two for F(baseline).
        Source: Strumbelj and Kononenko 2010.
    """

    def explain(row: _Row) -> Tensor:
        from captum.attr import ShapleyValueSampling

        with _seeded(inputs, row):
            found: Tensor = ShapleyValueSampling(row.score).attribute(
                row.x, row.baseline, feature_mask=row.units, n_samples=n_samples, perturbations_per_eval=row.points
            )
        return found[0, :, 0]

    scores = _share_over_tokens(_explain_rows(evaluate, inputs, explain), inputs)
    return Attribution.from_scores(scores, evaluate, inputs, evaluations=0)


def _explain_rows(evaluate: Evaluate, inputs: Inputs, explain: Callable[[_Row], Tensor]) -> Tensor:
    """Return one score a token, (B, S) float64, from a function that gives a row's content tokens theirs, (T,)."""
    scores = torch.zeros(inputs.special.shape, dtype=torch.float64, device=inputs.x.device)
    units = number_units(inputs)
    for number, special in enumerate(inputs.special):
        content = (~special).nonzero()[:, 0]
        if len(content) == 0:
            continue

        def explain_row(score: Score, points: int, number: int = number, content: Tensor = content) -> None:
            whole = inputs.x[number, : int(inputs.mask[number].sum())]

            def score_content(embeddings: Tensor) -> Tensor:
                return score(whole.repeat(len(embeddings), 1, 1).index_copy(1, content, embeddings))

            row = _Row(
                number, inputs.x[number, content][None], inputs.baseline[number, content][None],
                units[number, content][None, :, None], score_content, points,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each run of DeepLIFT warns of its hooks
                scores[number, content] = explain(row).detach().double()

        evaluate.visit_alone(number, explain_row)
    return scores


def _only_finite(score: Score) -> Score:
    """Return a score that raises FloatingPointError where it is NaN or infinite: a regression refuses such numbers."""

    def checked(embeddings: Tensor) -> Tensor:
        found = score(embeddings)
        if not found.isfinite().all():
            raise FloatingPointError
        return found

    return checked


def _share_over_tokens(scores: Tensor, inputs: Inputs) -> Tensor:
    """Return (B, S) the score of each token's unit, in equal parts on its tokens."""
    units = number_units(inputs)
    return scores / count_tokens(units).gather(1, units.clamp(min=0)).clamp(min=1)


@contextmanager
def _seeded(inputs: Inputs, row: _Row) -> Iterator[None]:
    """Let captum draw a row's own numbers from the generators of the process, and put these back as they were."""
    seed = int(inputs.seeds[row.number])
    devices = [row.x.device] if row.x.is_cuda else []
    state = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(devices[0]):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


class _TextCNNLayers(nn.Module):
    """A TextCNN for texts of one length without padding, each step a module that captum has a rule for."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        widths = model.config.filter_widths
        self.missing = max(0, max(widths) - length)
        self.convolutions = model.convolutions
        self.maxima = nn.ModuleList(nn.MaxPool1d(max(length - width, 0) + 1) for width in widths)
        self.activation = nn.ReLU()
        self.classifier = model.classifier

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits, (N, C), of word vectors (N, length, D)."""
        padded = functional.pad(embeddings.mT, (0, self.missing))
        pooled = [
            # a width longer than the text has one window, at its start
            maximum(convolution(padded)[..., : maximum.kernel_size])[..., 0]
            for maximum, convolution in zip(self.maxima, self.convolutions, strict=True)
        ]
        logits: Tensor = self.classifier(self.activation(torch.cat(pooled, dim=-1)))
        return logits


class _Scored(nn.Module):
    """A score as the module that captum wants, with the layers inside that it puts its rules on."""

    def __init__(self, score: Score, layers: _TextCNNLayers) -> None:
        super().__init__()
        self.score = score
        self.layers = layers

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return (N,) the scores of (N, T, D)."""
        return self.score(embeddings)
