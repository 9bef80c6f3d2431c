"""One fine-tuned text classifier: text to windows of token ids, word embeddings to logits.

Shape letters: B rows, S tokens of a padded window, D embedding, C labels, T content tokens of a text.

Attribution moves the word embeddings only. The model itself adds positions, token types and LayerNorm, once:
a caller that adds them before `inputs_embeds` explains another network.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lexplain.textcnn  # noqa: F401  # registers its folders with the auto classes
from lexplain.errors import ModelError
from lexplain.model_store import ProblemType, check_index, read_outputs

FAMILIES = "BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, ALBERT, DeBERTa-v2, ModernBERT and TextCNN"
"""Families verified to give the same logits from embeddings as from ids."""

PARITY_TOLERANCE = 1e-4
"""Largest difference allowed at load, absolute plus relative, in float32: rounding alone stays below 1e-5."""

# Where the families keep their layers, below the base model; ALBERT's is one, called time and again.
_LAYERS = ("encoder.layer", "transformer.layer", "layers", "encoder.albert_layer_groups")


@dataclass(frozen=True, slots=True)
class Window:
    """One model input, without padding.

    Attributes:
        ids: Token ids, special tokens included.
        token_types: The tokenizer's own token types; None when it gives none or the model takes none.
        special: True where the tokenizer added the token.
        start: Number of the text's first content token in this window.
        stop: One past its last.
    """

    ids: Sequence[int]
    token_types: Sequence[int] | None
    special: Sequence[bool]
    start: int
    stop: int


@dataclass(frozen=True, eq=False, slots=True)
class Encoding:
    """The windows of one text.

    Attributes:
        windows: At least one; a text without tokens has a window of special tokens only.
        offsets: (T, 2) code points of the original text, start and exclusive end of each content token that
            some window holds.
    """

    windows: tuple[Window, ...]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Windows padded on the right to one length: (B, S) tensors on the classifier's device.

    Right, because RoBERTa-type models count positions from the left when they are given embeddings.
    """

    ids: Tensor
    mask: Tensor
    special: Tensor
    token_types: Tensor | None


class Classifier:
    """A sequence classifier whose logits can be computed from word embeddings.

    Made by `load`. The weights are frozen, no hook is set, nothing of the model is changed.

    Attributes:
        labels: Label names, in the order of the logits. A one-logit model has two: "not X", then "X". A regression
            has one, what its config calls the output.
        problem: `single_label` (softmax), `multi_label` (sigmoids), `binary` (one logit) or `regression`.
        max_tokens: Positions that the model can take, special tokens included.
        device: Where the model is.
        dtype: Of the model's weights.
        embedding_size: D.
        model: The network itself; whoever changes how it computes changes it back.
        n_passes: Forward passes that were made so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problem: ProblemType,
        labels: tuple[str, ...],
    ) -> None:
        """Wrap a model that has passed the checks of `load`."""
        self.model = model
        self._tokenizer = tokenizer
        self._embeddings = cast(nn.Embedding, model.get_input_embeddings())
        self._takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._special_tokens = int(tokenizer.num_special_tokens_to_add())
        self.labels = labels
        self.problem = problem
        self.max_tokens = _count_positions(model, tokenizer)
        self.embedding_size = int(self._embeddings.embedding_dim)
        self.n_passes = 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; paths and logits are float32 even when it is shorter."""
        return self._embeddings.weight.dtype

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_pickle: bool = False,
    ) -> Classifier:
        """Load a Hugging Face folder and check that the model can be explained.

        Args:
            folder: Holds config.json, tokenizer.json and safetensors weights. Nothing is downloaded, and no
                code of the folder is run.
            device: As torch names it.
            dtype: Of the weights.
            allow_pickle: Also load pickled weights (pytorch_model.bin), when there is no other.

        Raises:
            ModelError: A part is missing, the classification head is not in the weights, or logits from
                embeddings differ from logits from ids.

        Note:
            Runs on: executor. Cost: reading the weights, and six forward passes of a dozen tokens.
        """
        folder = Path(folder)
        safetensors = _has_safetensors(folder, allow_pickle)
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, **local)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=safetensors,
                output_loading_info=True,
                **local,
            )
        except Exception as error:  # whatever transformers stumbles over is this folder's
            raise ModelError(
                f"model={str(folder)!r} cannot be loaded: {_first_line(error)}. There would be nothing to "
                f"explain. Write the folder of a sequence classifier with a fast tokenizer, as "
                f"save_pretrained() makes it."
            ) from error
        problem, labels = _read_labels(folder, config)
        _check_parts(folder, tokenizer, info)
        tokenizer.truncation_side = "right"  # a text's windows are counted from its head
        model.eval().requires_grad_(False)
        classifier = cls(model, tokenizer, problem, labels)
        classifier._check_parity(folder, str(config.model_type))
        model.to(device=device, dtype=dtype)
        return classifier

    def check_windows(self, max_tokens: int, overlap: int) -> None:
        """Check that windows of this shape fit the model.

        Raises:
            ModelError: They do not.
        """
        if max_tokens > self.max_tokens:
            raise ModelError(
                f"max_tokens={max_tokens} must be at most {self.max_tokens}, the tokens that this model takes. "
                f"Every longer text would have failed inside the model. Write max_tokens: {self.max_tokens}."
            )
        capacity = max_tokens - self._special_tokens
        if capacity < 1:
            raise ModelError(
                f"max_tokens={max_tokens} must be above {self._special_tokens}, the special tokens of this "
                f"model. No window would have held any text. Write max_tokens: {self.max_tokens}."
            )
        if not 0 <= overlap < capacity:
            raise ModelError(
                f"overlap={overlap} must be between 0 and {capacity - 1} (max_tokens less special tokens, "
                f"less one). The windows would never have reached the end of the text. Write overlap: "
                f"{capacity // 4}."
            )

    def encode(self, text: str, *, max_tokens: int, overlap: int, max_windows: int | None) -> Encoding:
        """Return the windows of a text, each exactly what the tokenizer makes of its tokens.

        Args:
            text: Never edited.
            max_tokens: Tokens a window at most, special tokens included.
            overlap: Content tokens that two neighbouring windows share.
            max_windows: The first so many windows only; 1 is the head of the text, None is all of it.

        Raises:
            ModelError: Windows of this shape do not fit the model.
        """
        self.check_windows(max_tokens, overlap)
        encoded = self._tokenizer(
            text, truncation=True, max_length=max_tokens, stride=overlap, return_overflowing_tokens=True,
            return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False,
        )  # fmt: skip
        token_types = encoded.get("token_type_ids") if self._takes_token_types else None
        step = max_tokens - self._special_tokens - overlap
        windows: list[Window] = []
        offsets: list[tuple[int, int]] = []
        for number, ids in enumerate(encoded["input_ids"][:max_windows]):
            special = [flag == 1 for flag in encoded["special_tokens_mask"][number]]
            spans = [span for span, added in zip(encoded["offset_mapping"][number], special, strict=True) if not added]
            start = number * step
            offsets += spans[len(offsets) - start :]
            types = None if token_types is None else token_types[number]
            windows.append(Window(ids, types, special, start, start + len(spans)))
        return Encoding(tuple(windows), np.asarray(offsets, dtype=np.int64).reshape(-1, 2))

    def collate(self, windows: Sequence[Window]) -> Batch:
        """Pad windows on the right to the longest of them."""
        shape = (len(windows), max(len(window.ids) for window in windows))
        pad_id = self._tokenizer.pad_token_id
        ids = np.full(shape, 0 if pad_id is None else pad_id, dtype=np.int64)
        mask, special = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        token_types = np.zeros(shape, dtype=np.int64)
        for row, window in enumerate(windows):
            length = len(window.ids)
            ids[row, :length] = window.ids
            mask[row, :length] = True
            special[row, :length] = window.special
            if window.token_types is not None:
                token_types[row, :length] = window.token_types
        typed = any(window.token_types is not None for window in windows)
        return Batch(
            ids=torch.from_numpy(ids).to(self.device),
            mask=torch.from_numpy(mask).to(self.device),
            special=torch.from_numpy(special).to(self.device),
            token_types=torch.from_numpy(token_types).to(self.device) if typed else None,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Return the word embeddings that `logits` expects, (B, S) to (B, S, D), float32 or longer."""
        with torch.no_grad():
            embeddings: Tensor = self._embeddings(ids)
        return embeddings.to(torch.promote_types(self.dtype, torch.float32))

    def logits(self, embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
        """Return one logit a label, differentiable with respect to the embeddings.

        Args:
            embeddings: (B, S, D) word embeddings, padded on the right.
            mask: (B, S) bool, False on padding. Always needed: embeddings do not tell where the padding is.
            token_types: (B, S), or None.

        Returns:
            (B, C), float32 or longer; a one-logit model's z gives (-z, z), a regression's output stays as it is.
        """
        return self._forward(self._name_inputs(embeddings, mask, token_types))

    def count_layers(self) -> int:
        """Return how many hidden layers the model has, without what the first is given.

        Raises:
            ModelError: The model's layers are not where those of the known families are.
        """
        self._find_layers()
        return int(self.model.config.num_hidden_layers)  # ALBERT's one layer counts as often as it is called

    @torch.no_grad()
    def pool_layers(self, embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> Tensor:
        """Return the mean over real tokens of each hidden layer, (B, layers + 1, H) float64; 0 is what the first is given.

        Args:
            embeddings: As in `logits`.
            mask: As in `logits`.
            token_types: As in `logits`.

        Raises:
            ModelError: The model's layers are not where those of the known families are.

        Note:
            Runs on: executor. Cost: one forward pass; no layer's states are kept. Hooks that read them are gone after.
        """
        pooled: list[Tensor] = []
        thread = threading.get_ident()  # another one's passes of this model are not ours

        def keep(states: Tensor) -> None:
            pooled.append((states.double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

        def keep_given(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread and not pooled:
                keep(given[0])

        def keep_made(layer: nn.Module, given: object, made: Tensor | tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                keep(made if isinstance(made, Tensor) else made[0])

        layers = self._find_layers()
        # transformers' own output_hidden_states leaves hooks behind
        hooks = [layers[0].register_forward_pre_hook(keep_given)]
        hooks += [layer.register_forward_hook(keep_made) for layer in layers]
        try:
            self.model.base_model(**self._name_inputs(embeddings, mask, token_types))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(pooled, dim=1)

    def _find_layers(self) -> nn.ModuleList:
        for place in _LAYERS:
            with contextlib.suppress(AttributeError):
                return cast(nn.ModuleList, self.model.base_model.get_submodule(place))
        raise ModelError(
            f"model_type={self.model.config.model_type!r} must have its layers at one of {', '.join(_LAYERS)}. What they "
            "hold of a text could not have been read. Write a method that compares no documents, or a model of a "
            f"family that works: {FAMILIES}."
        )

    def baseline_ids(self, ids: Tensor, special: Tensor, mask: Tensor, token: str) -> Tensor:
        """Return ids with every content token replaced; special tokens and padding stay.

        Args:
            ids: (B, S) token ids.
            special: (B, S) bool, True on special tokens.
            mask: (B, S) bool, False on padding.
            token: `mask` (the mask token, or padding where the tokenizer has none), `pad`, or a token of the
                vocabulary, as "-".

        Raises:
            ModelError: The tokenizer has no such token.
        """
        return ids.masked_fill(mask & ~special, self.find_token(token))

    def find_token(self, token: str) -> int:
        """Return the id of a baseline token, named as in `baseline_ids`.

        Raises:
            ModelError: The tokenizer has no such token.
        """
        tokenizer = self._tokenizer
        named = {"mask": tokenizer.mask_token_id, "pad": tokenizer.pad_token_id}
        if named["mask"] is None:
            named["mask"] = named["pad"]
        found = named[token] if token in named else tokenizer.backend_tokenizer.token_to_id(token)
        if found is None:
            raise ModelError(
                f"baseline={token!r} must be a token of this model. The unknown token would have been taken "
                f"for the absence of a word. Write baseline: mask, pad, or a token that stands in its "
                f"vocabulary."
            )
        return int(found)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities, (B, C) to (B, C): a softmax over labels, or one sigmoid a label.

        Raises:
            ModelError: The model is a regression.
        """
        if self.problem == "regression":
            raise ModelError(
                "problem='regression' must be a classification. A regression's output would have been read "
                "as the logit of a class. Write a model with classes."
            )
        return logits.softmax(-1) if self.problem == "single_label" else logits.sigmoid()

    def predict(self, probabilities: Tensor) -> list[int]:
        """Return the numbers of the predicted labels, most probable first.

        Args:
            probabilities: (C,).

        Returns:
            The most probable label, or with `multi_label` every label above 0.5, maybe none. Ties: the label
            that comes first.
        """
        values = probabilities.tolist()
        ranked = sorted(range(len(values)), key=lambda label: -values[label])
        if self.problem == "multi_label":
            return [label for label in ranked if values[label] > 0.5]
        return ranked[:1]

    def _name_inputs(self, embeddings: Tensor, mask: Tensor, token_types: Tensor | None) -> dict[str, Tensor]:
        """Return what the network is called with."""
        inputs = {"inputs_embeds": embeddings.to(self.dtype), "attention_mask": mask.long()}
        if token_types is not None and self._takes_token_types:
            inputs["token_type_ids"] = token_types
        return inputs

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        self.n_passes += 1
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.cat([-logits, logits], dim=-1) if self.problem == "binary" else logits

    @torch.no_grad()
    def _check_parity(self, folder: Path, family: str) -> None:
        """Compare logits from embeddings with logits from ids, each text alone and in a padded batch."""
        generator = torch.Generator().manual_seed(0)
        special_ids = set(self._tokenizer.all_special_ids)
        usable = torch.tensor([i for i in range(self._embeddings.num_embeddings) if i not in special_ids])
        lengths = [min(length, self.max_tokens) for length in (12, 7)]
        texts = [usable[torch.randint(len(usable), (length,), generator=generator)].tolist() for length in lengths]
        windows = [Window(ids, None, [False] * len(ids), 0, len(ids)) for ids in texts]
        logits: list[Tensor] = []
        try:
            for group in (windows[:1], windows[1:], windows):
                batch = self.collate(group)
                from_ids = self._forward({"input_ids": batch.ids, "attention_mask": batch.mask.long()})
                logits += [from_ids, self.logits(self.embed(batch.ids), batch.mask, None)]
        except Exception as error:  # whatever a network stumbles over is its own
            raise _refuse_family(folder, family, _first_line(error)) from error
        alone = torch.cat([logits[0], logits[2]])
        for found in (torch.cat([logits[1], logits[3]]), logits[4], logits[5]):
            if not torch.allclose(found, alone, rtol=PARITY_TOLERANCE, atol=PARITY_TOLERANCE):
                difference = float((found - alone).abs().max())
                raise _refuse_family(folder, family, f"its logits differ by {difference:.2g}")


def _has_safetensors(folder: Path, allow_pickle: bool) -> bool:
    """Tell which weights to load: safetensors, or pickled ones where that is allowed."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model={str(folder)!r} must be a folder with a config.json. Its name would have been looked up "
            f"on the internet. Write the folder of a model, as save_pretrained() makes it."
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model={str(folder)!r} must have no adapter_config.json. Its adapter would have been added where peft is "
            "installed, and passed over elsewhere. Merge it with merge_and_unload(), and save the model."
        )
    if any(folder.glob("*.safetensors")):
        check_index(folder)
        return True
    if allow_pickle:
        return False
    raise ModelError(
        f"model={str(folder)!r} must have weights in safetensors files. Pickled weights can run code of "
        f"whoever made them, on every executor. Save the model with save_pretrained(), or write "
        f"allow_pickle: true if you trust it."
    )


def _check_parts(folder: Path, tokenizer: PreTrainedTokenizerBase, info: Mapping[str, Iterable[str]]) -> None:
    """Check that the tokenizer tells offsets, and that no weight was made up."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"model={str(folder)!r} must have a fast tokenizer (tokenizer.json). Without character offsets "
            f"tokens would have been matched to words by guesswork. Save it with a fast tokenizer."
        )
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"model={str(folder)!r} lacks the weights {', '.join(missing[:4])}. They would have been drawn "
            f"at random, and the explanations would be those of a random classifier. Fine-tune the model "
            f"first."
        )


def _read_labels(folder: Path, config: PreTrainedConfig) -> tuple[ProblemType, tuple[str, ...]]:
    """Return the problem type and the label names in the order of the logits."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    labels = tuple(names[index] for index in sorted(names))
    if sorted(names) != list(range(len(names))) or len(set(labels)) != len(labels):
        raise ModelError(
            f"id2label={names!r} in {str(folder)!r} must name each logit once. Two classes would have shared "
            f"one keyword table. Write id2label with different names for 0 to {len(names) - 1}."
        )
    return read_outputs(labels, config.problem_type)


def _count_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the model can take."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa-type models start to count after the padding index
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    positions = getattr(model.config, "max_position_embeddings", None)
    return int(positions) if positions and positions > 0 else int(tokenizer.model_max_length)


def _refuse_family(folder: Path, family: str, why: str) -> ModelError:
    return ModelError(
        f"model={str(folder)!r} ({family}) must give the same logits from embeddings as from ids, alone and "
        f"padded: {why}. The explanations would be those of another function. Write a model of a family that "
        f"works: {FAMILIES}."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(".")
