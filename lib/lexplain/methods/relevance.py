"""Layer-wise relevance propagation (LRP): for TextCNN, and as AttnLRP and CP-LRP for transformers.

The logit of a row's target is passed back, layer by layer, as relevance; each layer shares what it gets out over
its inputs. One forward and one backward pass a row.

LRP is patented: according to its authors it is free of charge for personal and scientific use, and commercial use
needs a licence.

Shape letters: B rows, N points of one pass, S tokens, D embedding, H filter width, F filters of one width, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lexplain.errors import ModelError, Problem
from lexplain.methods import Attribution, Evaluate, Inputs, method
from lexplain.methods.gradients import measure_products, visit_inputs
from lexplain.methods.hooks import replaced_logits

if TYPE_CHECKING:
    from lexplain.textcnn import TextCNNForSequenceClassification

Rule = Literal["auto", "epsilon", "attnlrp", "cp_lrp"]

TRANSFORMERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra")
"""Model types, as transformers names them, whose every layer has a rule here."""

# One function of torch each. What is composed of several ("gelu_new") would be taken apart.
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu", "tanh")

# The stabiliser that the authors of the epsilon rule for texts advise.
_TEXTCNN_EPS = 0.001


def _check_across(options: Mapping[str, object]) -> list[Problem]:
    """Return what is wrong between options: only the epsilon rule shares out biases."""
    if options.get("rule") in ("attnlrp", "cp_lrp") and "bias_factor" in options:
        return [Problem("method.bias_factor", options["bias_factor"], f"is not read by rule: {options['rule']}",
                        "The biases' shares would have been lost all the same", "Leave bias_factor out")]  # fmt: skip
    return []


def check_rule(config: Any, options: Mapping[str, Any]) -> None:
    """Check that the rule of the options is one for this network.

    Raises:
        ModelError: It is not.
    """
    _choose_rule(config, options["rule"], options["bias_factor"])


@method(
    version=1, signed=True, cite="bach2015pixel", models=("textcnn", *TRANSFORMERS), across=_check_across,
    fits=check_rule,
    ranges={"eps": (0.0, 1.0), "bias_factor": (0.0, 1.0)},
    presets={
        "arras-2016": {"rule": "epsilon", "eps": 0.01, "bias_factor": 1.0},
        "attnlrp-2024": {"rule": "attnlrp"},
        "cp-lrp-2022": {"rule": "cp_lrp"},
    },
    cost=lambda options, tokens: 2,
    note="LRP is patented: according to its authors free for personal and scientific use, commercial use needs a licence",
)  # fmt: skip
def lrp(
    evaluate: Evaluate, inputs: Inputs, *, rule: Rule = "auto", eps: float | None = None, bias_factor: float = 0.0
) -> Attribution:
    """Return one score a token: its share of the target logit, by the rules of LRP.

    A linear layer shares relevance in proportion to input times weight. Of a maximum over time only the winning
    window gets any; of equal ones the first, and where the ReLU leaves nothing, the one nearest to firing.
    An activation hands on what it gets, and a LayerNorm takes its deviation for a constant. Attention:

    - `attnlrp`: the products halve relevance between their factors, the softmax is linearised.
    - `cp_lrp`: attention weights are constants, all relevance goes through the values.

    Args:
        evaluate: The model with the target of each row.
        inputs: The rows; the baseline plays no part.
        rule: `epsilon` for TextCNN; `attnlrp` or `cp_lrp` for transformers; `auto`: the first that fits the model.
        eps: Stabiliser in logits, 0 to 1, added to a linear layer's output with that output's sign before it
            divides. None: 0.001 for TextCNN, 0 for transformers.
        bias_factor: 0 to 1: how much of bias and stabiliser is shared out equally over a linear layer's inputs.
            1: the scores sum to the logit. 0: what they take is lost. Transformers have 0 only.

    Returns:
        Scores in logits, of both signs; exactly 0.0 on special tokens and padding. Of TextCNN's windows, those
        longer than the text give the padding's share to the real words.
        LRP decomposes F(x) itself, so baseline_score is 0.0, and the completeness gap is F(x) less the scores:
        what biases, the stabiliser, positions and special tokens took.

    Raises:
        ModelError: The model has no rules, or not this one.

    Note:
        Runs on: executor. Cost: one gradient; at most half as much again.
        Source: Arras et al. 2016 and 2017 (`epsilon`), Achtibat et al. 2024 (`attnlrp`), Ali et al. 2022
        (`cp_lrp`). Patented, see the module.
    """
    model: Any = evaluate.model
    chosen = _choose_rule(model.config, rule, bias_factor)
    if chosen == "epsilon":
        scores = torch.zeros(inputs.mask.shape, dtype=torch.float64, device=inputs.x.device)

        def see(points: Tensor, values: Tensor, relevance: Tensor | None) -> None:
            assert relevance is not None  # it comes as a gradient
            scores[points, : relevance.shape[1]] = relevance.sum(-1, dtype=torch.float64)

        with _textcnn_rules(model, _TEXTCNN_EPS if eps is None else eps, bias_factor):
            visit_inputs(evaluate, inputs, see)
        scores.masked_fill_(inputs.special, 0.0)
    else:
        with _TransformerRules(chosen, eps or 0.0):
            scores = measure_products(evaluate, inputs)
    return Attribution(
        scores=scores,
        baseline_score=torch.zeros_like(inputs.target_score),
        completeness_gap=inputs.target_score - scores.sum(-1),
        evaluations=torch.ones(len(inputs.x), dtype=torch.long),
        converged=torch.ones(len(inputs.x), dtype=torch.bool),
    )


def _choose_rule(config: Any, rule: Rule, bias_factor: float) -> Rule:
    """Return the rule for a model, or refuse."""
    kind = str(config.model_type)
    known: tuple[Rule, ...] = ("epsilon",) if kind == "textcnn" else ("attnlrp", "cp_lrp")
    if rule not in ("auto", *known):
        raise ModelError(
            f"method.rule={rule!r} must be {' or '.join(known)} for a {kind} model. Its layers would have got rules "
            f"of another network. Write rule: {known[0]}, or rule: auto."
        )
    if kind == "textcnn":
        return "epsilon"
    if bias_factor:
        raise ModelError(
            f"method.bias_factor={bias_factor:g} must be 0 for a {kind} model. The biases' shares would have been "
            f"lost all the same. Leave bias_factor out."
        )
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    attention = getattr(config, "_attn_implementation", None)
    if activation not in _ACTIVATIONS or attention not in (None, "sdpa"):  # None: a network that is not loaded yet
        raise ModelError(
            f"model must have activations among {', '.join(_ACTIVATIONS)} and sdpa attention for lrp, and has "
            f"{activation} and {attention}. They would have passed on plain gradients. Write another method, as "
            f"integrated_gradients."
        )
    return known[0] if rule == "auto" else rule


# --- TextCNN ----------------------------------------------------------------------------------------------------


def _textcnn_rules(
    model: TextCNNForSequenceClassification, eps: float, bias_factor: float
) -> AbstractContextManager[None]:
    """Let the gradient of a logit with respect to the embeddings be their relevance."""

    def make(inputs: Mapping[str, Any], logits: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return logits
        mask = inputs["attention_mask"].bool()
        made: Tensor = _TextCNNRelevance.apply(inputs["inputs_embeds"], logits.detach(), mask, model, eps, bias_factor)
        return made

    return replaced_logits(model, make)


class _TextCNNRelevance(torch.autograd.Function):
    """Hands on a TextCNN's logits; backward, what arrives is taken times the logits, and passed on as relevance."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, logits: Tensor, mask: Tensor, model: Any, eps: float, bias_factor: float
    ) -> Tensor:
        ctx.save_for_backward(embeddings, mask)
        ctx.rest = model, eps, bias_factor
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        embeddings, mask = ctx.saved_tensors
        return (_propagate(embeddings, mask, gradients[0], *ctx.rest), None, None, None, None, None)


def _propagate(
    embeddings: Tensor,
    mask: Tensor,
    start: Tensor,
    model: TextCNNForSequenceClassification,
    eps: float,
    bias_factor: float,
) -> Tensor:
    """Return the relevance of each component of the word vectors, (N, S, D).

    Args:
        embeddings: (N, S, D) word vectors.
        mask: (N, S) bool, False on padding.
        start: (N, C), 1 at the target's logit and 0 elsewhere; -1 where the score is the logit's negative.
        model: The network.
        eps: Stabiliser.
        bias_factor: How much of bias and stabiliser is shared out.
    """
    maxima = [_find_maximum(found) for found in model.scan(embeddings, mask)]
    pooled = torch.cat([values for values, _ in maxima], dim=-1).relu()  # (N, F of all widths)
    output = model.classifier
    logits = output(pooled)
    stabiliser = _give_sign(eps, logits, logits >= 0)
    ratio = _divide(start * logits, logits + stabiliser)
    shared = bias_factor * (ratio * (output.bias + stabiliser)).sum(-1, keepdim=True) / pooled.shape[1]
    by_width = (pooled * (ratio @ output.weight) + shared).chunk(len(maxima), dim=-1)
    gradient, share = torch.zeros_like(embeddings), torch.zeros_like(embeddings[..., 0])
    convolutions: Iterable[Any] = model.convolutions
    for (values, winners), relevance, convolution in zip(maxima, by_width, convolutions, strict=True):
        stabiliser = _give_sign(eps, values, values > 0)
        ratio = _divide(relevance, values + stabiliser)
        biases = bias_factor * ratio * (convolution.bias + stabiliser)
        flow, shared = _share_windows(ratio, biases, winners, convolution, mask)
        gradient += flow
        share += shared
    return (embeddings * gradient + share[..., None] / embeddings.shape[-1]) * mask[..., None]


def _find_maximum(found: Tensor) -> tuple[Tensor, Tensor]:
    """Return each filter's maximum over the windows, and the first window that has it.

    Windows of the same words are equal but for rounding: in which order a convolution sums depends on the place and
    the processor. The winner must not. What bfloat16 rounds is too coarse to tell equal windows from others.
    """
    values = found.amax(-1)
    rounding = 16 * torch.finfo(torch.float32).eps * values.abs().clamp_min(1)
    return values, (found >= (values - rounding)[..., None]).byte().argmax(-1)


def _share_windows(
    ratio: Tensor, biases: Tensor, winners: Tensor, convolution: Any, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Spread the filters' relevance over their winning windows.

    Args:
        ratio: (N, F) relevance by unit of a filter's output.
        biases: (N, F) relevance that belongs to bias and stabiliser.
        winners: (N, F) first token of each filter's winning window.
        convolution: The filters.
        mask: (N, S) bool, False on padding.

    Returns:
        (N, S, D) relevance by unit of a word vector's component, and (N, S) what each token gets of `biases`: an
        equal part of each window's among the window's real tokens.
    """
    length, (width,) = mask.shape[1], convolution.kernel_size
    windows = torch.zeros((*ratio.shape, length + 1), dtype=ratio.dtype, device=ratio.device)  # (N, F, S + 1)
    windows.scatter_(2, winners[..., None], ratio[..., None])
    flow = functional.conv_transpose1d(windows, convolution.weight)[..., :length].mT
    real = functional.pad(mask.to(ratio.dtype), (0, width)).unfold(1, width, 1).sum(-1)  # (N, S + 1)
    by_window = torch.zeros_like(real).scatter_add_(1, winners, biases) / real.clamp(min=1.0)
    by_token = functional.pad(by_window, (width - 1, 0)).unfold(1, width, 1).sum(-1)  # (N, S + 1)
    return flow, by_token[:, :length] * mask


def _give_sign(eps: float, like: Tensor, positive: Tensor) -> Tensor:
    """Return eps where positive, else -eps; in the type of `like`, never 0 as a sign function is at 0."""
    return torch.full_like(like, eps).where(positive, -eps)


def _divide(relevance: Tensor, by: Tensor) -> Tensor:
    """Return the quotient, 0 where there is nothing to divide by: without a stabiliser an output can be 0."""
    return torch.where(by == 0, 0.0, relevance / by)


# --- transformers -----------------------------------------------------------------------------------------------


class _TransformerRules(TorchFunctionMode):
    """Inside this block embedding times gradient is relevance: each function hands back what its rule says.

    Values stay bit for bit. Torch keeps such modes by thread and ends them with the block, so no class, module or
    registry is touched, and another explainer in the process sees nothing of it.
    """

    def __init__(self, rule: Rule, eps: float) -> None:
        super().__init__()
        self._rules: dict[Callable[..., Any], Callable[..., Tensor]] = {
            functional.layer_norm: _normalise,
            functional.scaled_dot_product_attention: _attend if rule == "attnlrp" else _attend_with_constants,
        }
        for function in (functional.gelu, functional.relu, functional.silu, torch.tanh):
            self._rules[function] = _activate(function)
        if eps:
            self._rules[functional.linear] = _map_linearly(eps)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Put a rule in a function's place while gradients are recorded."""
        rule: Callable[..., Any] = self._rules.get(func, func) if torch.is_grad_enabled() else func
        return rule(*args, **(kwargs or {}))


class _Handback(torch.autograd.Function):
    """Has a value of its own; hands `factor` times the gradient back to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] * ctx.factor, None, None


class _Normalisation(torch.autograd.Function):
    """LayerNorm whose deviation is a constant to the gradient; its mean is linear, and stays."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        value, _, inverse_deviation = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(weight, inverse_deviation)
        ctx.dimensions = tuple(range(-len(shape), 0))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, inverse_deviation = ctx.saved_tensors
        gradient = gradients[0] if weight is None else gradients[0] * weight
        gradient = (gradient - gradient.mean(ctx.dimensions, keepdim=True)) * inverse_deviation
        return gradient.to(gradients[0].dtype), None, None, None, None


def _normalise(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    found: Tensor = _Normalisation.apply(x, normalized_shape, weight, bias, eps)
    return found


def _activate(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Identity rule: relevance goes through an activation as it is, whatever the slope."""

    def rule(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            value = function(x, *args, **kwargs)
            factor = _divide(value, x)
        found: Tensor = _Handback.apply(x, value, factor)
        return found

    return rule


def _map_linearly(eps: float) -> Callable[..., Tensor]:
    """Epsilon rule. Without a stabiliser it is the gradient, which needs no rule."""

    def rule(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        value = functional.linear(x, weight, bias)
        with torch.no_grad():
            size = value.abs()
            factor = size / (size + eps)  # the same as with the value's sign on all three
        found: Tensor = _Handback.apply(value, value, factor)
        return found

    return rule


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """AttnLRP: a product's factors get half each, so query and key get half of the weights' half."""
    query, key, value = (
        _Handback.apply(factor, factor, share) for factor, share in ((query, 0.25), (key, 0.25), (value, 0.5))
    )
    return functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def _attend_with_constants(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """CP-LRP: attention weights are constants."""
    return functional.scaled_dot_product_attention(query.detach(), key.detach(), value, *args, **kwargs)
