"""Tiny random classifiers of every supported family, saved as folders like any other model.

Real tokenizers over the words of a few lines, the same in every run; weights drawn large enough for logits to differ between texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lexplain.classifier import Classifier
from lexplain.textcnn import save_textcnn

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

BATCH_TOLERANCE = 1e-5
"""Largest difference, in logits, that batch mates, padding or chunk size may make to a score in float32."""

LINES = (
    "The minister said the new tax would be cut before the election, and the party cheered.",
    "A striker scored twice in the final; the coach said the team was ready for the cup!",
    "Shares fell on Monday - the bank warned of a weak quarter and rising costs.",
    "The phone has a better camera, a faster chip and software that learns from its user.",
    "Das Wetter ist schön, aber die Straße nach Köln bleibt gesperrt.",
    "Räksmörgås och köttbullar säljs på torget varje lördag.",
    "今日は晴れです。明日は雨が降るでしょう。",
)

TEXTS = (
    "The party said the bank warned of a new tax.",
    "A better team scored twice",
    "Köttbullar, räksmörgås & more: the user said 今日は晴れです! " * 2,
    "phone",
)

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert")

_CONFIGS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "bert": (transformers.BertConfig, {"intermediate_size": 48}),
    "roberta": (transformers.RobertaConfig, {"intermediate_size": 48, "type_vocab_size": 1}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {"intermediate_size": 48, "type_vocab_size": 1}),
    "distilbert": (transformers.DistilBertConfig, {"hidden_dim": 48}),
    "electra": (transformers.ElectraConfig, {"intermediate_size": 48, "embedding_size": 16}),
    "albert": (transformers.AlbertConfig, {"intermediate_size": 48, "embedding_size": 16}),
    "deberta-v2": (
        transformers.DebertaV2Config,
        {"intermediate_size": 48, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
         "position_biased_input": False, "type_vocab_size": 0, "norm_rel_ebd": "layer_norm",
         "share_att_key": True},
    ),
    "modernbert": (transformers.ModernBertConfig, {"intermediate_size": 48, "local_attention": 8}),
    "gpt2": (transformers.GPT2Config, {}),
}  # fmt: skip

_ANGLE = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
_SQUARE = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Short words whole, longer ones in threes; and whether a piece begins its word. Always the same."""
    for word in sorted(set("".join(c if c.isalpha() else " " for c in text).split())):
        size = len(word) if len(word) <= 5 else 3
        for start in range(0, len(word), size):
            yield word[start : start + size], start == 0


def _wordpiece() -> Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=True)
    text = normalizer.normalize_str(" ".join(LINES))
    characters = sorted(set(text) - {" "})
    pieces = [piece if first else f"##{piece}" for piece, first in _pieces(text)]
    tokens = [*_SQUARE.values(), *characters, *(f"##{character}" for character in characters), *pieces]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _byte_bpe(special: Sequence[str]) -> Tokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    merges: dict[tuple[str, str], None] = {}
    for piece, first in _pieces(" ".join(LINES)):
        if first:
            ((symbols, _),) = level.pre_tokenize_str(piece)
            merges |= {(symbols[:end], symbols[end]): None for end in range(1, len(symbols))}
    tokens = [*special, *sorted(level.alphabet()), *("".join(merge) for merge in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def _unigram(special: dict[str, str], *, lower: bool) -> Tokenizer:
    accents = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()] if lower else []
    normalizer = normalizers.Sequence([normalizers.NFKC(), *accents])
    text = normalizer.normalize_str(" ".join(LINES))
    scores = dict.fromkeys(special.values(), 0.0) | {"▁": -6.0}
    scores |= dict.fromkeys(sorted(set(text) - {" "}), -8.0)
    scores |= {f"▁{piece}" if first else piece: -4.0 - len(piece) / 8 for piece, first in _pieces(text)}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=list(scores).index(special["unk"])))
    backend.normalizer = normalizer
    split = [] if lower else [pre_tokenizers.WhitespaceSplit()]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.Metaspace()])
    return backend


def _frame(backend: Tokenizer, tokens: dict[str, str], *, pair_types: bool) -> Tokenizer:
    """Put the first and the last special token round a text."""
    ids = [(tokens[name], backend.token_to_id(tokens[name])) for name in ("cls", "sep")]
    first, last = tokens["cls"], tokens["sep"]
    second = ":1" if pair_types else ":0"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B{second} {last}{second}", special_tokens=ids
    )
    return backend


def _tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    types = ["input_ids", "token_type_ids", "attention_mask"]
    if family in ("bert", "distilbert", "electra"):
        backend, tokens = _frame(_wordpiece(), _SQUARE, pair_types=True), _SQUARE
    elif family == "modernbert":
        backend, tokens = _frame(_byte_bpe(list(_SQUARE.values())), _SQUARE, pair_types=False), _SQUARE
    elif family == "roberta":
        backend, tokens = _byte_bpe(list(_ANGLE.values())), _ANGLE
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>")), add_prefix_space=False
        )
    elif family == "xlm-roberta":
        backend, tokens = _frame(_unigram(_ANGLE, lower=False), _ANGLE, pair_types=False), _ANGLE
    elif family == "gpt2":
        backend, tokens = _byte_bpe(["<|endoftext|>"]), {"unk": "<|endoftext|>", "pad": "<|endoftext|>"}
    else:
        backend, tokens = (
            _frame(_unigram(_SQUARE, lower=family == "albert"), _SQUARE, pair_types=True),
            _SQUARE,
        )
    names = {f"{name}_token": token for name, token in tokens.items()}
    inputs = types if family in ("bert", "electra", "albert", "deberta-v2") else [types[0], types[2]]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def _sizes(family: str, max_tokens: int, first_position: int) -> dict[str, int]:
    if family == "gpt2":
        return {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": max_tokens}
    if family == "distilbert":
        return {"dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": max_tokens}
    return {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": max_tokens + first_position,
    }  # fmt: skip


def save_classifier(
    folder: Path,
    family: str,
    *,
    labels: Sequence[str] = ("business", "politics", "NA"),
    problem_type: str | None = None,
    seed: int = 0,
    max_tokens: int = 64,
) -> Path:
    """Save a random classifier of a family, with weights large enough that texts get different labels."""
    if family == "textcnn":
        return _save_textcnn(folder, labels, problem_type, seed, max_tokens)
    tokenizer = _tokenizer(family)
    config_class, options = _CONFIGS[family]
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    config = config_class(
        vocab_size=len(tokenizer),
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type=problem_type,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        **_sizes(family, max_tokens, tokenizer.pad_token_id + 1 if "roberta" in family else 0),
        **{name: number for name, number in special.items() if number is not None},
        **options,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.1)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _save_textcnn(folder: Path, labels: Sequence[str], problem_type: str | None, seed: int, max_tokens: int) -> Path:
    """A base folder over the words of the lines, then another output layer and larger weights."""
    save_textcnn(
        folder, LINES, train_embeddings=True, embedding_size=8, filter_widths=(2, 3), filters=6, min_count=1,
        max_tokens=max_tokens, seed=seed,
    )  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(
        folder,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type=problem_type,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.3 if weight.ndim > 1 else 0.1)
        model.embeddings.weight.normal_()[config.pad_token_id] = 0.0
    model.save_pretrained(folder)
    return folder


# Planted corpora: the word that decides each label, and words that decide nothing.
CLUES = {"politics": "election", "sport": "striker", "NA": "bank"}
FILLER = [
    "the",
    "said",
    "was",
    "a",
    "for",
    "be",
    "team",
    "new",
    "as",
    "and",
    "of",
    "on",
    "user",
    "better",
    "phone",
    "camera",
]


def save_trainable(folder: Path) -> Path:
    """Save a tiny BERT whose head has another size, as a checkpoint from the Hub may have one."""
    save_classifier(folder, "bert", labels=("one", "two"))
    weights = load_file(folder / "model.safetensors")
    # smaller matrices than those drawn for explanations, which are too steep to train from
    weights = {name: weight * 0.3 if weight.ndim > 1 else weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class Shelf:
    """Tiny classifiers under one folder, each made and loaded once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._loaded: dict[str, Classifier] = {}

    def folder(self, family: str, **options: Any) -> Path:
        """The folder of a classifier, as `save_classifier` makes it."""
        folder = self._root / (family + "".join(f"-{name}={value}" for name, value in sorted(options.items())))
        return folder if folder.exists() else save_classifier(folder, family, **options)

    def classifier(self, family: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Classifier:
        """The loaded classifier."""
        folder = self.folder(family, **options)
        name = f"{folder.name}-{dtype}"
        if name not in self._loaded:
            self._loaded[name] = Classifier.load(folder, dtype=dtype)
        return self._loaded[name]


@dataclass
class Passes:
    """What a model was made to do: forward passes, sequences in them, tokens of the largest, backward passes and theirs."""

    forward: int = 0
    sequences: int = 0
    largest_tokens: int = 0
    backward: int = 0
    backward_sequences: int = 0


@contextmanager
def count_passes(classifier: Classifier) -> Iterator[Passes]:
    """Count the passes of a classifier's model from outside: by its inputs, and by autograd's hook on them."""
    passes = Passes()

    def note(_: torch.nn.Module, __: Any, inputs: dict[str, torch.Tensor]) -> None:
        embeddings = inputs["inputs_embeds"]
        passes.forward += 1
        passes.sequences += embeddings.shape[0]
        passes.largest_tokens = max(passes.largest_tokens, embeddings.shape[0] * embeddings.shape[1])
        if embeddings.requires_grad:
            embeddings.register_hook(note_backward)

    def note_backward(gradients: torch.Tensor) -> None:
        passes.backward += 1
        passes.backward_sequences += gradients.shape[0]

    handle = classifier.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()
