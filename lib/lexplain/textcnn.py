"""TextCNN: the convolutional classifier of Arras et al. 2016, as a model and a tokenizer of transformers.

Word vectors, one convolution over time, ReLU, the maximum over time, dropout, one linear layer. Importing this
module registers it with AutoConfig and AutoModelForSequenceClassification, so its folders load like any other.

Shape letters: B rows, S tokens, D embedding, H filter width, F filters of one width, C labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from lexplain.errors import ModelError

_PAD, _UNKNOWN = "[PAD]", "[UNK]"

# Scripts that put no space between words: each character is a token, since a run of them would seldom come twice.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# Whatever is not white space is in some token, so that a text with a word always has a token.
_TOKEN = rf"[{_UNSPACED}]\p{{M}}*|(?:(?![{_UNSPACED}])\w)+(?:['’](?:(?![{_UNSPACED}])\w)+)*|[^\w\s]"

# Deviation of vectors that are drawn, about that of published word vectors.
_DRAWN_DEVIATION = 0.25


class TextCNNConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # transformers is partly typed
    """Shape of a TextCNN.

    Attributes:
        vocab_size: Tokens, padding and the unknown token included.
        embedding_size: D.
        filter_widths: H of each group of filters.
        filters: F, in each group.
        dropout: Share of the pooled features that training leaves out.
        train_embeddings: Whether fine-tuning moves the word vectors.
        initializer_range: Deviation of drawn filters and of a drawn output layer.
    """

    model_type = "textcnn"

    def __init__(
        self,
        vocab_size: int = 2,
        embedding_size: int = 300,
        filter_widths: Sequence[int] = (2,),
        filters: int = 800,
        dropout: float = 0.5,
        train_embeddings: bool = False,
        initializer_range: float = 0.05,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.filter_widths = list(filter_widths)
        self.filters = filters
        self.dropout = dropout
        self.train_embeddings = train_embeddings
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id


class TextCNNForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]  # as above
    """Word vectors, convolution, ReLU, maximum over time, linear layer.

    Attributes:
        embeddings: The word vectors; padding is the zero vector.
        convolutions: One for each filter width.
        classifier: From the pooled features, those of the first width first, to the logits.
    """

    config_class = TextCNNConfig
    _input_embed_layer = "embeddings"

    def __init__(self, config: TextCNNConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.embedding_size, config.filters, width) for width in config.filter_widths
        )
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.filters * len(config.filter_widths), len(config.id2label or ()))
        self.post_init()  # type: ignore[no-untyped-call]  # as above

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """Return the logits, (B, C).

        Args:
            input_ids: (B, S) token ids; or else `inputs_embeds`.
            attention_mask: (B, S), 0 on padding. None: no padding.
            inputs_embeds: (B, S, D) word vectors.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
            if not self.config.train_embeddings:
                # loading a folder makes every weight trainable, so this is decided here
                inputs_embeds = inputs_embeds.detach()
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
        pooled = torch.cat([found.amax(-1) for found in self.scan(inputs_embeds, attention_mask.bool())], dim=-1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled.relu())))

    def scan(self, embeddings: Tensor, mask: Tensor) -> list[Tensor]:
        """Return what each filter finds in each window, before the ReLU.

        A window counts when all its tokens are real. A text shorter than the filter has one window, its tokens
        followed by zeros. So padding wins no maximum, and a text has the same logits alone and in a batch.

        Args:
            embeddings: (B, S, D) word vectors.
            mask: (B, S) bool, False on padding.

        Returns:
            For each width (B, F, S + 1): by the first token of the window, -inf where no window counts.
        """
        found = []
        visible = (embeddings * mask[..., None].to(embeddings.dtype)).mT  # (B, D, S)
        for width, convolution in zip(self.config.filter_widths, self.convolutions, strict=True):
            maps = convolution(functional.pad(visible, (0, width)))
            found.append(maps.masked_fill(~find_windows(mask, width)[:, None], -torch.inf))
        return found


def find_windows(mask: Tensor, width: int) -> Tensor:
    """Return which windows of a width count, see `TextCNNForSequenceClassification.scan`.

    Args:
        mask: (B, S) bool, False on padding.
        width: Of the filters.

    Returns:
        (B, S + 1) bool, by the first token of the window; at least one in a row.
    """
    padded = functional.pad(mask, (0, width))
    whole = padded.unfold(1, width, 1).all(-1)
    first = padded.long().argmax(1, keepdim=True)
    starts = torch.arange(whole.shape[1], device=mask.device)
    return whole | (~whole.any(1, keepdim=True) & (starts == first))


def save_textcnn(
    folder: Path,
    texts: Iterable[str],
    *,
    vectors: tuple[Sequence[str], NDArray[np.floating]] | None = None,
    train_embeddings: bool = False,
    embedding_size: int = 300,
    filter_widths: Sequence[int] = (2,),
    filters: int = 800,
    dropout: float = 0.5,
    min_count: int = 2,
    max_words: int = 50_000,
    max_tokens: int = 400,
    seed: int = 0,
) -> None:
    """Make a base folder for fine-tuning: a vocabulary from texts, word vectors, drawn filters.

    Args:
        folder: Where config, weights and tokenizer go.
        texts: What the vocabulary is counted in; read once.
        vectors: V words and their (V, D) vectors, as from GloVe or word2vec. Of words that differ in case only,
            the first counts. Words of the texts that have no vector get a drawn one. None: all are drawn.
        train_embeddings: Whether fine-tuning moves the vectors.
        embedding_size: D of drawn vectors; given ones have their own.
        filter_widths: H of each group of filters; (2,) for Arras et al. 2016.
        filters: F, in each group.
        dropout: Share of the pooled features that training leaves out.
        min_count: A word that comes more seldom is unknown.
        max_words: The most frequent words that are kept, ties by word.
        max_tokens: The most that `max_tokens` of a plan may be; longer texts are cut, or read in windows.
        seed: Of all that is drawn.

    Raises:
        ModelError: No word is left, the vectors do not fit their words, or would be random for ever.

    Note:
        Runs on: driver. Cost: one pass over the texts, about a million words a second.
    """
    if vectors is None and not train_embeddings:
        raise ModelError(
            "train_embeddings=False must be true where no vectors are given. Every word would have kept a random "
            "vector. Write train_embeddings=True, or pass vectors."
        )
    if vectors is not None and (vectors[1].ndim != 2 or len(vectors[0]) != len(vectors[1])):
        raise ModelError(
            f"vectors.shape={vectors[1].shape} must be (V, D) for its V={len(vectors[0])} words. Words would have "
            f"got the vectors of others. Pass one vector for each word."
        )
    tokenizer = _build_tokenizer(texts, min_count, max_words)
    config = TextCNNConfig(
        vocab_size=tokenizer.get_vocab_size(),
        embedding_size=embedding_size if vectors is None else vectors[1].shape[1],
        filter_widths=filter_widths,
        filters=filters,
        dropout=dropout,
        train_embeddings=train_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TextCNNForSequenceClassification(config)
        with torch.no_grad():
            _fill_vectors(model.embeddings, tokenizer, vectors)
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for the owner alone, while executors may be somebody else
        file.chmod((folder / "config.json").stat().st_mode)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # as above
        tokenizer_object=tokenizer, pad_token=_PAD, unk_token=_UNKNOWN, model_max_length=max_tokens,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def read_vectors(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Read word vectors from text: a line a word, then its D numbers, as GloVe and word2vec write them.

    A first line of two numbers, word2vec's, is their count and size and no vector. A word may hold spaces, as in GloVe's
    largest file.

    Args:
        path: The file, UTF-8.

    Returns:
        V words and their (V, D) vectors.

    Raises:
        ModelError: The file cannot be read, holds no vector, or a line has not as many numbers as the first.

    Note:
        Runs on: driver. Cost: V D numbers of 4 bytes.
    """
    words: list[str] = []
    rows: list[NDArray[np.float32]] = []
    size = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.rstrip().split(" ")
                if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
                    continue
                size = size or len(fields) - 1
                try:
                    row = np.array(fields[len(fields) - size :], dtype=np.float32)
                except ValueError:
                    row = np.empty(0, dtype=np.float32)
                if size < 1 or len(fields) <= size or len(row) != size or not np.isfinite(row).all():
                    raise ModelError(
                        f"vectors={str(path)!r}: line {number} must be a word and {max(size, 1)} numbers, and is {line[:40]!r}. "
                        "Words would have got the vectors of others. Mend the line, or pass a file of word vectors as text."
                    )
                words.append(" ".join(fields[: len(fields) - size]))
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"vectors={str(path)!r} cannot be read ({error}). All words would have got drawn vectors. Pass a UTF-8 text "
            "file, a line a word."
        ) from error
    if not rows:
        raise ModelError(
            f"vectors={str(path)!r} holds no vector. All words would have got drawn ones. Pass a file with a line a word."
        )
    return words, np.stack(rows)


def _build_tokenizer(texts: Iterable[str], min_count: int, max_words: int) -> Tokenizer:
    """Return a tokenizer of whole words in lower case, the frequent ones of some texts."""
    # the same folding as a word's key
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.NFC()])
    split = pre_tokenizers.Split(Regex(_TOKEN), behavior="removed", invert=True)
    counts = Counter(
        word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))
    )  # fmt: skip
    frequent = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
    if not frequent:
        raise ModelError(
            f"min_count={min_count} must leave words: of {len(counts)} different ones none comes that often. Every "
            f"word would have been unknown, and every text the same. Write a smaller min_count, or pass more texts."
        )
    vocabulary = {token: number for number, token in enumerate([_PAD, _UNKNOWN, *frequent[:max_words]])}  # padding is 0
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    return tokenizer


def _fill_vectors(
    embeddings: nn.Embedding, tokenizer: Tokenizer, vectors: tuple[Sequence[str], NDArray[np.floating]] | None
) -> None:
    """Draw all vectors with the deviation of the given ones, then write the given ones and zero for padding."""
    deviation = _DRAWN_DEVIATION if vectors is None else float(vectors[1].std())
    nn.init.normal_(embeddings.weight, std=deviation)
    if vectors is not None:
        assert tokenizer.normalizer is not None  # _build_tokenizer sets it
        rows: dict[str, int] = {}
        for row, word in enumerate(vectors[0]):
            rows.setdefault(tokenizer.normalizer.normalize_str(word), row)
        known = [(number, rows[word]) for word, number in tokenizer.get_vocab().items() if word in rows]
        numbers, chosen = [number for number, _ in known], [row for _, row in known]
        embeddings.weight[numbers] = torch.from_numpy(vectors[1][chosen]).to(embeddings.weight.dtype)
    embeddings.weight[embeddings.padding_idx] = 0.0


AutoConfig.register(TextCNNConfig.model_type, TextCNNConfig, exist_ok=True)
AutoModelForSequenceClassification.register(TextCNNConfig, TextCNNForSequenceClassification, exist_ok=True)
