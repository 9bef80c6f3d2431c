"""Training a head alone: a frozen encoder's outputs, computed once and given to the head again and again."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lexplain.errors import ModelError

FEATURES_VERSION = "1"
"""Part of a cache's name: raised when other numbers are computed from the same texts."""

_BATCH = 32


@torch.no_grad()
def compute_features(
    model: Any,
    batch: Callable[[NDArray[np.int64], torch.device], dict[str, Tensor]],
    lengths: NDArray[np.int64],
    *,
    cache: Path | None,
    report: Callable[[int, int], None] | None,
) -> Tensor:
    """Return the one vector of each text that the model's head reads.

    That is the encoder's output at the first token, before the pooler, or its mean over the text where
    the model pools so (ModernBERT).

    Args:
        model: Sequence classifier of transformers, in evaluation mode.
        batch: Gives the padded model inputs of some rows on a device.
        lengths: (N,) tokens of each text; texts of one length share a batch.
        cache: File to keep the vectors in, or to take them from. Callers that come together wait for the
            first one's pass. Its name must change with weights, texts and their length.
        report: Called with (batches done, all batches).

    Returns:
        (N, D) float32 on the CPU.

    Raises:
        ModelError: The model has no encoder apart from its head.

    Note:
        Runs on: executor. Cost: one forward pass over all texts, unless `cache` has them.
    """
    if not model.base_model_prefix or model.base_model is model:
        raise ModelError(
            f"recipe.train='head' cannot be used for {type(model).__name__}: it has no encoder apart from its head. "
            "Every weight would have stayed as it was. Write train: full."
        )
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cache}.lock"):
            if not cache.exists():
                features = compute_features(model, batch, lengths, cache=None, report=report)
                unfinished = cache.with_name(f".{cache.name}.{uuid.uuid4().hex}")
                save_file({"features": features}, unfinished)
                unfinished.rename(cache)
        return load_file(cache)["features"]
    features = torch.empty(len(lengths), model.config.hidden_size)
    order = np.argsort(lengths, kind="stable")
    steps = -(-len(order) // _BATCH)
    for step in range(steps):
        rows = order[step * _BATCH : (step + 1) * _BATCH]
        inputs = batch(rows, model.device)
        hidden = model.base_model(**inputs).last_hidden_state  # (B, S, D)
        if getattr(model.config, "classifier_pooling", "cls") == "mean":
            mask = inputs["attention_mask"][:, :, None]
            vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        else:
            vectors = hidden[:, 0]
        features[torch.from_numpy(rows)] = vectors.float().cpu()
        if report is not None:
            report(step + 1, steps)
    return features


@contextmanager
def encoder_replaced(model: Any) -> Iterator[None]:
    """Let the model read features instead of texts: `model(inputs_embeds=features[:, None])`.

    Inside, the model's parameters are those of its head and of its base model's pooler.
    """
    encoder = model.base_model
    setattr(model, model.base_model_prefix, _FeatureReader(encoder))
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, encoder)


class _FeatureReader(nn.Module):
    """Stands in for a base model: hands on the vectors it is given, (B, 1, D), and pools them as that would."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.pooler = getattr(encoder, "pooler", None)
        # ALBERT's pooler is a bare matrix; its activation lies beside it.
        self.pooler_activation = getattr(encoder, "pooler_activation", None)

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> BaseModelOutputWithPooling:
        pooled = None
        if isinstance(self.pooler, nn.Linear) and self.pooler_activation is not None:
            pooled = self.pooler_activation(self.pooler(inputs_embeds[:, 0]))
        elif self.pooler is not None:
            pooled = self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)
