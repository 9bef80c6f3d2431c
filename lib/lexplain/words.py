"""Words of a text, and the scores of tokens summed into them.

A word is a Unicode word (UAX 29, with ICU's dictionaries for Chinese, Japanese, Thai and their like)
that holds a letter or a number; connectors and unseen characters at its edges are left out. It is known
by its character offsets in the original text, so no tokenizer, script or language needs a rule here.

Offsets are Unicode code points, 0-based, end exclusive.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from icu4py.breakers import WordBreaker
from numpy.typing import NDArray

from lexplain.errors import DocumentError

# The root locale: one text gives the same words whatever language its reader assumes.
_LOCALE = "root"

# In Python's re, \w is "letter, number or underscore", which leaves Unicode categories L* and N* here.
_find_letter_or_number = re.compile(r"[^\W_]").search

# UAX 29 counts these to the word beside them, where they would make a second key for the same word:
# connectors ("_so_", French "prix" with a narrow no-break space before its colon), and what is not seen
# (soft hyphen, marks of direction, byte order mark). The joiners U+200C and U+200D spell words and stay.
_NOT_AT_EDGES = (
    "_\u203f\u2040\u2054\ufe33\ufe34\ufe4d\ufe4e\ufe4f\uff3f\u202f"
    "\u00ad\u061c\u180e\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
    "\u2060\u2061\u2062\u2063\u2064\u2066\u2067\u2068\u2069\ufeff"
)

# White space by code point; the last entry stands for every code point above the last white space, U+3000.
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])


# A longer word may have so many marks on a letter that sorting them takes minutes.
_SORTED_AT_ONCE = 500

# Raised by every change, here or where the engine joins tokens and windows, that moves a word's borders, key or score.
WORD_RULES = "uax29.v2"


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a text.

    Attributes:
        key: `word_key` of the surface form, by which words of different texts are the same word.
        start: Code point where the word starts in the original text.
        end: Code point after its last one; `text[start:end]` is the surface form.
    """

    key: str
    start: int
    end: int


def word_key(surface: str) -> str:
    """Return the key of a surface form: NFC, then lower-case.

    The key is in NFC again where lower-casing made a composable pair (H with macron below has no
    composed form, h with macron below has), so that a key is its own key.
    """
    if surface.isascii():
        return surface.lower()
    return _compose(_compose(surface).lower())


def _compose(text: str) -> str:
    """Return NFC in a time that is log-linear in the length.

    Python sorts the marks on a letter by insertion: of a hundred thousand in the wrong order that takes seconds, of a
    million a quarter of an hour. Sorted marks cost nothing, and sorting them by class is what NFC asks for.
    """
    if len(text) > _SORTED_AT_ONCE:
        # one by one: nothing is sorted across characters yet
        decomposed = [part for character in text for part in unicodedata.normalize("NFD", character)]
        runs = groupby(decomposed, key=lambda part: unicodedata.combining(part) > 0)
        text = "".join("".join(sorted(run, key=unicodedata.combining) if marks else run) for marks, run in runs)
    return unicodedata.normalize("NFC", text)


def segment(text: str) -> list[Word]:
    """Return the words of a text in order; they do not overlap.

    Punctuation, white space, symbols and emoji are no words. A number is one, so the keycap emoji,
    which are digits with marks, are too.

    Args:
        text: Any text, of any length, edited in no way.

    Returns:
        Words with offsets into `text`; empty if no character is a letter or a number.

    Raises:
        DocumentError: `text` holds a lone surrogate (reason `lone_surrogate`).

    Note:
        Runs on: executor. Cost: linear in the text, about 1.3 million words a second on one core.
        Source: Unicode Standard Annex 29, section 4.
    """
    try:
        pieces = WordBreaker(text, _LOCALE)
    except UnicodeEncodeError as error:
        raise DocumentError(
            "lone_surrogate",
            f"text[{error.start}]={text[error.start]!r} is half of a surrogate pair. No tokenizer or table "
            "can hold it, and dropping it would move every offset behind it. Decode the source as UTF-8 "
            "with errors='replace'.",
        ) from error
    words = []
    start = 0
    # The pieces' own lengths count code points; the breaker's offsets count UTF-16 units.
    for piece in pieces:
        end = start + len(piece)
        if piece.isalnum():
            words.append(Word(word_key(piece), start, end))
        elif end - start > 1 and _find_letter_or_number(piece):
            surface = piece.strip(_NOT_AT_EDGES)
            surface_start = start + piece.index(surface)
            words.append(Word(word_key(surface), surface_start, surface_start + len(surface)))
        start = end
    return words


def merge_tokens(
    words: Sequence[Word],
    offsets: NDArray[np.integer],
    scores: NDArray[np.float64],
    text: str,
    *,
    rule: Literal["sum", "absmax"],
) -> tuple[NDArray[np.float64], float]:
    """Merge token scores into word scores by the characters that they share.

    A token's score is spread in equal parts over the characters that it covers and that are not white
    space. Parts on a word's characters are that word's; all other parts are the second result:
    punctuation, symbols, tokens over white space only, and tokens over nothing (special tokens).

    Args:
        words: W words of `text`, as from `segment`.
        offsets: (T, 2) start and end of each token in `text`, in any order; tokens may overlap.
        scores: (T,) one score a token, in any unit.
        text: The text of the offsets.
        rule: `sum` adds a word's parts up. `absmax` gives it the signed part with the largest absolute
            value, of equal ones that of the later token (one part a token and word).

    Returns:
        (W,) float64 word scores, 0.0 for a word that no token covers, and the sum of the parts outside
        words. With `sum`, words and other parts together equal the sum of `scores` up to rounding;
        with `absmax` they do not.

    Raises:
        ValueError: Shapes do not fit, an offset lies outside the text, or the rule is unknown.

    Note:
        Runs on: executor. Cost: linear in characters and tokens, log-linear with `absmax`.
        Source: `absmax` is the rule of SACX (Rönnqvist et al. 2022); `sum` keeps the completeness axiom.
    """
    _check_tokens(offsets, scores, text)
    # visible[i] = characters before i that are not white space, so a span's count is one subtraction.
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    visible = np.concatenate(([0], np.cumsum(~_IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)])))
    covered = visible[offsets[:, 1]] - visible[offsets[:, 0]]  # (T,)
    token, word, shared = _pair_tokens_with_words(words, offsets, visible)
    # The ratio first: it is exactly 1.0 for a token inside one word, whose score then stays as it is.
    parts = scores[token] * (shared / covered[token])
    inside = np.bincount(token, weights=shared, minlength=len(scores))
    outside = np.where(covered > 0, (covered - inside) / np.maximum(covered, 1), 1.0)
    other = float(np.sum(scores * outside))
    merged = np.zeros(len(words))
    if rule == "sum":
        np.add.at(merged, word, parts)
    elif rule == "absmax":
        # A stable sort by word, then size: of the values written to one word, the last one stays.
        order = np.lexsort((np.abs(parts), word))
        merged[word[order]] = parts[order]
    else:
        raise ValueError(
            f"merge={rule!r} must be 'sum' or 'absmax'. Every word would have the score 0.0. "
            "Write merge: sum, which keeps completeness."
        )
    return merged, other


def number_tokens(words: Sequence[Word], offsets: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the number of the word that holds each token's last character, (T,), -1 where none does.

    The last: a SentencePiece token may start with the space before its word.

    Args:
        words: W words of the text, as from `segment`.
        offsets: (T, 2) start and end of each token in the text.
    """
    starts = np.array([word.start for word in words], dtype=np.int64)
    ends = np.array([0, *(word.end for word in words)], dtype=np.int64)  # of no word, then of each
    last = offsets[:, 1] - 1
    found = np.searchsorted(starts, last, side="right") - 1
    return np.where(last < ends[found + 1], found, -1)


def _pair_tokens_with_words(
    words: Sequence[Word], offsets: NDArray[np.integer], visible: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (token, word, visible characters shared), one row for each pair that shares some, by token."""
    word_starts = np.fromiter((word.start for word in words), dtype=np.int64, count=len(words))
    word_ends = np.fromiter((word.end for word in words), dtype=np.int64, count=len(words))
    starts, ends = offsets[:, 0], offsets[:, 1]
    first = np.searchsorted(word_ends, starts, side="right")
    behind_last = np.searchsorted(word_starts, ends, side="left")
    counts = np.maximum(behind_last - first, 0)
    token = np.repeat(np.arange(len(offsets)), counts)
    word = np.arange(len(token)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    shared_starts = np.maximum(starts[token], word_starts[word])
    shared_ends = np.minimum(ends[token], word_ends[word])
    shared = visible[shared_ends] - visible[shared_starts]
    # An empty span inside a word, and white space inside a word ("10 000" with U+202F), share nothing.
    sharing = shared > 0
    return token[sharing], word[sharing], shared[sharing]


def _check_tokens(offsets: NDArray[np.integer], scores: NDArray[np.float64], text: str) -> None:
    if scores.ndim != 1 or offsets.shape != (len(scores), 2):
        raise ValueError(
            f"offsets.shape={offsets.shape} must be (T, 2) for scores.shape={scores.shape}. Scores would be "
            "given to the words of other tokens. Pass one (start, end) and one score for each token."
        )
    outside = (offsets[:, 0] < 0) | (offsets[:, 1] < offsets[:, 0]) | (offsets[:, 1] > len(text))
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(
            f"offsets[{row}]={offsets[row].tolist()} must lie in order within 0 and {len(text)}. Its score "
            "would be given to characters that the token does not cover. Pass the offsets of this text, in "
            "code points."
        )
