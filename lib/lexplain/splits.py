"""Which split a text trains in: a function of (seed, text digest), as Python and as SQL.

No list of training documents is kept. Whoever knows a split and a text's digest knows on which side the
text is: the fine-tuning on an executor, and the query that explains only texts a model has not trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lexplain.errors import CorpusError

# 60 bits: far finer than any share of documents, and cheap to compare as text in SQL.
_HEX_DIGITS = 15

# The paper's redraw rule needs a few draws; where a thousand fail, the labels are too rare for the share.
_MAX_DRAWS = 1000

_is_identifier = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch


def digest_text(text: bytes) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes as 64 lower-case hex digits.

    The same as Spark's `sha2(column, 256)`, whether the column is a string or its bytes.
    """
    return hashlib.sha256(text).hexdigest()


@dataclass(frozen=True, slots=True)
class Split:
    """One random split of the labelled texts into a training part and a test part.

    Attributes:
        seed: Seed of all splits of a plan.
        number: Which of them, from 0.
        draw: How many draws were discarded before this one.
        test_share: Expected share of the texts in the test part; above 0 and below 1.

    Raises:
        ValueError: `test_share` is not between 0 and 1.
    """

    seed: int
    number: int
    draw: int
    test_share: float

    def __post_init__(self) -> None:
        """Refuse a share that leaves one part empty."""
        if not 0.0 < self.test_share < 1.0:
            raise ValueError(
                f"models.test_share={self.test_share!r} must be above 0 and below 1. One part would be "
                "empty: no text to train on, or none held out. Write test_share: 0.33."
            )

    @property
    def salt(self) -> str:
        """What is put before a digest, so that every draw of every split is a draw of its own."""
        # The format d refuses anything but an integer: the salt is safe inside a SQL literal.
        return f"{self.seed:d}/{self.number:d}/{self.draw:d}:"

    @property
    def _threshold(self) -> str:
        return f"{int((1.0 - self.test_share) * 16**_HEX_DIGITS):0{_HEX_DIGITS}x}"

    def trains_on(self, text_digest: str) -> bool:
        """Return whether the text is in the training part.

        Equal texts have equal digests, so copies of one text are never on both sides.

        Args:
            text_digest: As `digest_text` makes it.
        """
        drawn = hashlib.sha256(f"{self.salt}{text_digest}".encode()).hexdigest()[:_HEX_DIGITS]
        return drawn < self._threshold

    def sql(self, column: str) -> str:
        """Return `trains_on` as a boolean expression of Spark SQL; null where the column is null.

        Args:
            column: A column of text digests; a plain identifier (ASCII letters, digits, underscore).

        Raises:
            ValueError: `column` is anything else.
        """
        if not _is_identifier(column):
            raise ValueError(
                f"column={column!r} must be a plain identifier. It would run as a part of the query. "
                "Rename the column, for example to text_digest."
            )
        drawn = f"substring(sha2(concat('{self.salt}', {column}), 256), 1, {_HEX_DIGITS})"
        return f"{drawn} < '{self._threshold}'"


def draw_split(seed: int, number: int, test_share: float, labelled: Sequence[tuple[str, Sequence[str]]]) -> Split:
    """Draw a split in which every label occurs in both parts.

    Args:
        seed: Seed of all splits of a plan.
        number: Which of them, from 0.
        test_share: Expected share of the texts in the test part; above 0 and below 1.
        labelled: Text digest and labels of each document; a document may have several labels, or none.

    Returns:
        The first of the draws 0, 1, 2, ... that serves every label.

    Raises:
        CorpusError: No label at all, a label with fewer than two different texts, or no draw serves.
        ValueError: `test_share` is not between 0 and 1.

    Note:
        Runs on: driver. Cost: a few hashes a label and draw.
        Source: the redraw rule of SACX (Rönnqvist et al. 2022).
    """
    digests_of: dict[str, set[str]] = {}
    for text_digest, labels in labelled:
        for label in labels:
            digests_of.setdefault(label, set()).add(text_digest)
    if not digests_of:
        raise CorpusError(
            f"training has {len(labelled)} documents and no label. A model without labels has no class to "
            "explain. Write the column that holds them as training.columns.labels."
        )
    alone = sorted(label for label, digests in digests_of.items() if len(digests) < 2)
    if alone:
        raise _refuse(alone, "has only one text, counting copies once, and cannot be in both parts")
    for draw in range(_MAX_DRAWS):
        split = Split(seed, number, draw, test_share)
        missing = [label for label, digests in digests_of.items() if not _is_in_both_parts(split, digests)]
        if not missing:
            return split
    raise _refuse(sorted(missing), f"was still missing from one part in draw {_MAX_DRAWS}")


def _is_in_both_parts(split: Split, digests: Iterable[str]) -> bool:
    sides = set()
    for text_digest in digests:
        sides.add(split.trains_on(text_digest))
        if len(sides) == 2:
            return True
    return False


def _refuse(labels: Sequence[str], rule: str) -> CorpusError:
    return CorpusError(
        f"training.labels={list(labels)!r}: each of them {rule}. Its model would never learn the label, or "
        "nothing held out could test it. Add documents, drop or join the label, or move "
        "models.test_share toward 0.5."
    )
