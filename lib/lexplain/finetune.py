"""One fine-tuning: labelled texts in, a model folder and its scores out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lexplain.classifier import Classifier
from lexplain.errors import CorpusError, ModelError
from lexplain.frozen_encoder import FEATURES_VERSION, compute_features, encoder_replaced
from lexplain.model_store import check_index, digest_folder
from lexplain.plan import LEARNING_RATES

RECORD_FILE = "fine_tuning.json"

_MAX_GRADIENT_NORM = 1.0
_EVALUATION_BATCH = 32
# Batches are cut from pools of so many batches, sorted by length: little padding, yet other batches each epoch.
_POOL_BATCHES = 16
# Cached features go into the head one by one, without padding; only float noise may separate the two ways.
_HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is fine-tuned.

    Attributes:
        train: `full`: all weights. `head`: the encoder stays frozen, and what its head reads is computed
            once for all splits; the head then trains in seconds. The head includes the base model's pooler.
        epochs: Passes over the training half, at most.
        learning_rate: Peak learning rate. None: 5e-5 for `full`, 1e-3 for `head`.
        batch_size: Documents in one forward pass.
        accumulate: Passes whose gradients make one step; a step sees batch_size x accumulate documents.
        max_tokens: Longer texts are cut, special tokens included.
        patience: Epochs without a lower evaluation loss before training stops.
        warmup_share: Share of the steps in which the learning rate rises; then it falls to 0, linearly.
        weight_decay: Of AdamW, on matrices only.
    """

    train: Literal["full", "head"] = "full"
    epochs: int = 3
    learning_rate: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    max_tokens: int = 512
    patience: int = 1
    warmup_share: float = 0.06
    weight_decay: float = 0.01

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate used: the one written, or the default of `train`."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES[self.train]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How well a fine-tuned model labels the held-out half.

    Attributes:
        macro_f1: Mean of the labels' F1.
        micro_f1: F1 over all decisions; with one label a document this is the accuracy.
        label_f1: F1 of each label; 0.0 where it is undefined.
        evaluation_loss: Mean loss on the held-out half.
        epochs: Epochs that made the kept weights.
        n_train: Documents in the training half.
        n_test: Documents in the held-out half.
        seconds: Wall-clock time of the fine-tuning, loading and saving included.
    """

    macro_f1: float
    micro_f1: float
    label_f1: dict[str, float]
    evaluation_loss: float
    epochs: int
    n_train: int
    n_test: int
    seconds: float


def f1_scores(gold: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> tuple[float, float, NDArray[np.float64]]:
    """Return macro F1, micro F1 and the F1 of each label.

    Args:
        gold: (N, C) bool, the labels of N documents.
        predicted: (N, C) bool.

    Returns:
        Macro, micro, and (C,) float64. A label that is neither gold nor predicted anywhere has 0.0.
    """
    true_positives = (gold & predicted).sum(axis=0)
    either = gold.sum(axis=0) + predicted.sum(axis=0)
    by_label = 2.0 * true_positives / np.maximum(either, 1)
    micro = 2.0 * true_positives.sum() / max(int(either.sum()), 1)
    return float(by_label.mean()), float(micro), by_label


def fine_tune(
    base: Path,
    texts: Sequence[str],
    labels: Sequence[Sequence[str]],
    in_training: Sequence[bool],
    *,
    label_names: Sequence[str],
    multi_label: bool,
    recipe: Recipe,
    seed: int,
    folder: Path,
    features: Path | None = None,
    device: str = "cpu",
    report: Callable[[int, int], None] | None = None,
) -> Scores:
    """Fine-tune a model on one half of the texts, score it on the other, and save it.

    AdamW with linear warm-up and decay, gradients clipped to norm 1, texts of similar length in one
    batch; bfloat16 forward passes where the device has units for it. After each epoch the held-out
    half is evaluated in float32, and the weights with the lowest loss are the ones saved.

    The folder appears under its name only when it is complete. A folder that is there already and was
    made from the same inputs is left as it is, and its scores are returned: a killed run resumes.

    Args:
        base: Hugging Face folder with safetensors weights. Its output layer is always drawn anew.
        texts: N texts, both halves.
        labels: Label names of each text; exactly one unless `multi_label`.
        in_training: For each text, whether it is in the training half.
        label_names: All labels, in the order of the model's outputs.
        multi_label: Sigmoid outputs with threshold 0.5, instead of softmax.
        recipe: How to train.
        seed: Decides the drawn weights, dropout and batches. On one kind of CPU the same inputs and number of
            threads give the same weights, bit for bit.
        folder: Where the model goes: config, weights, tokenizer and `fine_tuning.json`.
        features: Folder in which `train: head` keeps the frozen encoder's outputs for all splits. None: nowhere.
        device: Torch device, as `cuda:0`.
        report: Called with (steps done, all steps); for `head` first with batches of texts encoded.

    Raises:
        CorpusError: A text or its labels cannot be trained on, or a half lacks a label.
        ModelError: The base cannot be loaded or trained so, or `folder` holds something else.

    Note:
        Runs on: executor, or driver. Cost: forward and backward passes over n_train texts, epochs times.
        With `head`: one forward pass over all texts, once for all splits.
    """
    started = time.perf_counter()
    targets = _targets(texts, labels, in_training, label_names, multi_label)
    inputs: dict[str, Any] = {
        "base_digest": digest_folder(base),
        "texts_digest": _digest(*texts),
        "targets_digest": _digest(targets.tobytes(), np.asarray(in_training, bool).tobytes()),
        "label_names": list(label_names),
        "multi_label": multi_label,
        "recipe": asdict(replace(recipe, learning_rate=recipe.peak_learning_rate)),
        "seed": seed,
    }
    if folder.exists():
        return _read_scores(folder, inputs)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with quiet_transformers(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        model, tokenizer = _load(base, label_names, multi_label)
        Classifier(model, tokenizer, "single_label", tuple(label_names)).check_windows(recipe.max_tokens, 0)
        documents = _tokenize(tokenizer, texts, recipe.max_tokens)
        model.to(device)
        data = _Data(torch.from_numpy(targets).to(device), np.asarray(in_training, bool), multi_label)
        if recipe.train == "head":
            key = _digest(FEATURES_VERSION, inputs["base_digest"], inputs["texts_digest"], str(recipe.max_tokens))
            cache = features and features / f"{key}.safetensors"
            best = _train_head(model, documents, data, recipe, seed, cache, report)
        else:
            best = _train(model, partial(_logits, model, documents), documents.lengths, data, recipe, seed, report)
        macro, micro, by_label = f1_scores(targets[~data.in_training], best.predicted)
        scores = Scores(
            macro_f1=macro,
            micro_f1=micro,
            label_f1=dict(zip(label_names, by_label.tolist(), strict=True)),
            evaluation_loss=best.loss,
            epochs=best.epochs,
            n_train=int(data.in_training.sum()),
            n_test=int((~data.in_training).sum()),
            seconds=time.perf_counter() - started,
        )
        return _save(model, base, folder, inputs, scores)


@dataclass(frozen=True)
class _Documents:
    """Token ids of N texts, special tokens included."""

    ids: list[list[int]]
    pad_id: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(ids) for ids in self.ids])

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
        """Pad the rows' ids on the right: position ids of the RoBERTa family count from the left."""
        sequences = [torch.tensor(self.ids[row], dtype=torch.long) for row in rows]
        ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, S)
        return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


@dataclass(frozen=True)
class _Data:
    """Targets (N, C) bool on the device, and which rows are in the training half (N,) bool."""

    targets: Tensor
    in_training: NDArray[np.bool_]
    multi_label: bool

    def loss(self, logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Mean loss over the rows; (B, C) float32 logits."""
        targets = self.targets[torch.from_numpy(rows).to(logits.device)].float()
        if self.multi_label:
            return functional.binary_cross_entropy_with_logits(logits, targets)
        return functional.cross_entropy(logits, targets.argmax(dim=1))

    def predict(self, logits: Tensor) -> NDArray[np.bool_]:
        """(B, C) bool: over 0.5, or the most probable one."""
        values = logits.cpu().numpy()
        if self.multi_label:
            return np.asarray(values > 0.0)
        return np.asarray(np.arange(values.shape[1]) == values.argmax(axis=1)[:, None])


@dataclass(frozen=True)
class _Evaluation:
    """The held-out half after an epoch; predicted (n_test, C) in the order of the texts."""

    loss: float
    predicted: NDArray[np.bool_]
    epochs: int


def _train(
    model: nn.Module,
    forward: Callable[[NDArray[np.int64]], Tensor],
    lengths: NDArray[np.int64],
    data: _Data,
    recipe: Recipe,
    seed: int,
    report: Callable[[int, int], None] | None,
) -> _Evaluation:
    """Train all parameters of `model`, leave it with the best weights, return their evaluation.

    A loop of our own rather than `transformers.Trainer`: that one needs accelerate on every executor,
    writes checkpoints while it runs, and cannot train a head on cached features.
    """
    train_rows, test_rows = np.flatnonzero(data.in_training), np.flatnonzero(~data.in_training)
    # Of its own: the batches do not depend on how many numbers dropout has drawn.
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = math.ceil(math.ceil(len(train_rows) / recipe.batch_size) / recipe.accumulate)
    steps = recipe.epochs * steps_per_epoch
    step = 0
    optimizer, scheduler = _optimizer(model, recipe, steps)
    best = _Evaluation(math.inf, np.zeros(0, bool), 0)
    best_weights: dict[str, Tensor] = {}
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        batches = _shuffled(train_rows, lengths, recipe.batch_size, generator)
        for start in range(0, len(batches), recipe.accumulate):
            group = batches[start : start + recipe.accumulate]
            n_documents = sum(map(len, group))
            for rows in group:
                # Weighted, so that a step over several batches is the step over one large batch.
                torch.autograd.backward(data.loss(forward(rows).float(), rows) * (len(rows) / n_documents))
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if report is not None:
                report(step, steps)
        evaluation = _evaluate(model, forward, lengths, test_rows, data, epoch)
        if evaluation.loss < best.loss:
            best = evaluation
            best_weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        elif epoch - best.epochs >= recipe.patience:
            break
    if report is not None and step < steps:
        report(steps, steps)
    model.load_state_dict(best_weights)
    model.eval()
    return best


def _optimizer(
    model: nn.Module, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW without decay of biases and norms; the rate rises over the warm-up, then falls to 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, fused=True)
    warmup = math.ceil(steps * recipe.warmup_share)

    def factor(step: int) -> float:
        # Counted from 1: a first step with rate 0 would be lost.
        return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(steps - warmup, 1)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _shuffled(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, generator: torch.Generator
) -> list[NDArray[np.int64]]:
    """Return one epoch's batches: shuffled rows, those of similar length together."""
    order = rows[torch.randperm(len(rows), generator=generator).numpy()]
    pool = batch_size * _POOL_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    forward: Callable[[NDArray[np.int64]], Tensor],
    lengths: NDArray[np.int64],
    rows: NDArray[np.int64],
    data: _Data,
    epochs: int,
) -> _Evaluation:
    """Score the held-out rows as the model will be used."""
    model.eval()
    by_length = np.argsort(lengths[rows], kind="stable")
    predicted = np.zeros((len(rows), data.targets.shape[1]), bool)
    total = 0.0
    for start in range(0, len(rows), _EVALUATION_BATCH):
        positions = by_length[start : start + _EVALUATION_BATCH]
        logits = forward(rows[positions]).float()
        total += float(data.loss(logits, rows[positions])) * len(positions)
        predicted[positions] = data.predict(logits)
    loss = total / len(rows)
    if not math.isfinite(loss):
        raise ModelError(
            f"evaluation_loss={loss} after epoch {epochs} must be a finite number. The training diverged, and the "
            "model would have given every text the same label. Write a lower learning_rate."
        )
    return _Evaluation(loss, predicted, epochs)


def _train_head(
    model: Any,
    documents: _Documents,
    data: _Data,
    recipe: Recipe,
    seed: int,
    cache: Path | None,
    report: Callable[[int, int], None] | None,
) -> _Evaluation:
    """Train what follows the encoder, on the encoder's outputs; the encoder's weights do not move."""
    model.eval()
    features = compute_features(model, documents.batch, documents.lengths, cache=cache, report=report)

    def forward(rows: NDArray[np.int64]) -> Tensor:
        # A text is one vector, a sequence of length 1: (B, 1, D).
        vectors = features[torch.from_numpy(rows)][:, None]
        logits: Tensor = model(inputs_embeds=vectors.to(data.targets.device)).logits
        return logits

    probe = np.argsort(documents.lengths, kind="stable")[[0, -1]]
    with torch.no_grad():
        expected = _logits(model, documents, probe)
    with encoder_replaced(model):
        with torch.no_grad():
            found = forward(probe)
        if not torch.allclose(found, expected, rtol=_HEAD_TOLERANCE, atol=_HEAD_TOLERANCE):
            raise ModelError(
                f"recipe.train='head' cannot be used for {type(model).__name__}: its head reads more than one vector "
                "a text. It would have been trained on other numbers than it reads later. Write train: full."
            )
        # Lengths do not matter here: all 0 leaves the batches as shuffled.
        return _train(model, forward, np.zeros_like(documents.lengths), data, recipe, seed, report)


def _logits(model: Any, documents: _Documents, rows: NDArray[np.int64]) -> Tensor:
    """Run the whole model, (B, C): training in bfloat16 where the device multiplies it, else in float32."""
    if model.device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without matrix units a CPU is slower in bfloat16; a torch too old to tell trains in float32.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        has_bfloat16 = model.device.type == "cpu" and bool(capabilities.get("amx_bf16"))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16 and model.training):
        logits: Tensor = model(**documents.batch(rows, model.device)).logits
    return logits


def _load(base: Path, label_names: Sequence[str], multi_label: bool) -> tuple[Any, Any]:
    """Return model and tokenizer; the output layer is drawn, whatever the base holds."""
    if not any(base.glob("*.safetensors")):
        raise ModelError(
            f"base={str(base)!r} must hold its weights as *.safetensors. Loading a pickle runs whatever code it "
            "carries, on every executor. Save the model anew with save_pretrained, which writes safetensors."
        )
    check_index(base)
    try:
        config = AutoConfig.from_pretrained(
            base,
            local_files_only=True,
            trust_remote_code=False,
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
            problem_type="multi_label_classification" if multi_label else "single_label_classification",
        )
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # The checkpoint's own type, the default, would train in half precision where it was saved so.
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"base={str(base)!r} cannot be loaded as a sequence classifier: {error}. No model would have been "
            "trained. Write the folder of an encoder that transformers knows, with its tokenizer."
        ) from error
    # An output layer of the right size would have been loaded: one that has seen the held-out texts, maybe.
    inside_encoder = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        is_output = isinstance(module, nn.Linear) and module.out_features == len(label_names)
        if is_output and not name.startswith(inside_encoder):
            nn.init.normal_(module.weight, std=getattr(config, "initializer_range", 0.02))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model, tokenizer


def _tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> _Documents:
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"tokenizer={type(tokenizer).__name__} must have a padding token. Texts of different length could not "
            "share a batch. Write an encoder whose tokenizer has one, as BERT or XLM-R."
        )
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return _Documents(encoded["input_ids"], tokenizer.pad_token_id)


def _targets(
    texts: Sequence[str],
    labels: Sequence[Sequence[str]],
    in_training: Sequence[bool],
    label_names: Sequence[str],
    multi_label: bool,
) -> NDArray[np.bool_]:
    """Check the labelled texts and return their targets, (N, C) bool."""
    if not len(texts) == len(labels) == len(in_training):
        raise CorpusError(
            f"labels={len(labels)} and in_training={len(in_training)} must be as many as the {len(texts)} texts. "
            "Texts would have been trained with labels of others. Pass one entry a text."
        )
    if len(set(label_names)) != len(label_names) or len(label_names) < (1 if multi_label else 2):
        raise CorpusError(
            f"label_names={list(label_names)!r} must be distinct, and at least two unless multi_label. One softmax "
            "output is always 1, whatever the text. Write more labels, or multi_label: true."
        )
    column = {name: index for index, name in enumerate(label_names)}
    targets = np.zeros((len(texts), len(label_names)), bool)
    for row, names in enumerate(labels):
        unknown = [name for name in names if name not in column]
        if unknown:
            raise CorpusError(
                f"labels[{row}]={list(names)!r} must be among {list(label_names)!r}. The text would have been trained "
                f"as one without {unknown[0]!r}. Add the label to label_names, or leave the text out."
            )
        if not multi_label and len(set(names)) != 1:
            raise CorpusError(
                f"labels[{row}]={list(names)!r} must be exactly one label. A softmax model would have learned one "
                "of them, or none. Write multi_label: true, or leave the text out."
            )
        targets[row, [column[name] for name in names]] = True
    _check_halves(targets, np.asarray(in_training, bool), label_names)
    return targets


def _check_halves(targets: NDArray[np.bool_], in_training: NDArray[np.bool_], label_names: Sequence[str]) -> None:
    for half, name in ((in_training, "training"), (~in_training, "held-out")):
        missing = [label_names[column] for column in np.flatnonzero(~targets[half].any(axis=0)).tolist()]
        if missing:
            raise CorpusError(
                f"labels={missing!r} must occur in the {name} half. The model could not have learned them, or its "
                "F1 for them would have been 0 by construction. Draw the split with splits.draw_split, which redraws "
                "until both halves have every label, or drop labels with fewer than two texts."
            )


def _digest(*parts: str | bytes) -> str:
    """Return the SHA-256 of a sequence; no two sequences are joined to the same bytes."""
    total = hashlib.sha256()
    for number, part in enumerate(parts):
        try:
            content = part.encode() if isinstance(part, str) else part
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"texts[{number}]={part[error.start : error.end]!r} at character {error.start} must be valid Unicode. "
                "A lone surrogate cannot be written as UTF-8, and the tokenizer would have failed on it. "
                "Leave the text out, or repair its encoding where it is read."
            ) from error
        total.update(len(content).to_bytes(8, "big") + content)
    return total.hexdigest()


def _save(model: Any, base: Path, folder: Path, inputs: dict[str, Any], scores: Scores) -> Scores:
    """Write the folder beside its place and rename it; if a twin was quicker, keep the twin's."""
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {**inputs, "scores": asdict(scores), "versions": versions}
    try:
        model.save_pretrained(unfinished)
        # Read again: the one used for training remembers its truncation, and would save it.
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        # How a file was read is not part of it.
        tokenizer.init_kwargs.pop("local_files_only", None)
        tokenizer.save_pretrained(unfinished)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (unfinished / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
        for file in unfinished.iterdir():
            # Safetensors files are made for their owner alone; executors may be other users.
            file.chmod((unfinished / RECORD_FILE).stat().st_mode)
        unfinished.rename(folder)
    except OSError:
        if not (folder / RECORD_FILE).is_file():
            raise
        return _read_scores(folder, inputs)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return scores


def _read_scores(folder: Path, inputs: dict[str, Any]) -> Scores:
    """Return the scores of a finished folder, if it was made from these inputs."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = {}
    changed = [name for name, value in inputs.items() if record.get(name) != value]
    if changed:
        raise ModelError(
            f"folder={str(folder)!r} holds another fine-tuning (other {', '.join(changed)}). Its model would have been "
            "taken for the one asked for. Write another folder, or delete this one."
        )
    return Scores(**record["scores"])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence load reports and progress bars of transformers, and restore them."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is partly typed
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # as above
