"""Faithfulness of word scores: what a prediction loses when its words are taken away, and what it keeps of them alone.

Words are taken away on the token ids that the model read: no text is edited, decoded or tokenized again. Special tokens
stay. A text of several windows has the mean of their logits, as where it was explained.

Shape letters: B rows, S tokens of the padded length, T content tokens of a text, U units (words or tokens) that can be
taken away, K sizes, C labels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lexplain.classifier import Classifier, Encoding, Window
from lexplain.errors import ModelError
from lexplain.passes import Budget
from lexplain.words import Word, number_tokens, segment

Replacement = Literal["delete", "pad", "zero"]
"""`delete`: the token is gone, those behind it move up. `pad`: the padding token stands in its place, and is attended to.
`zero`: its word embedding is zero, and is attended to."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """Which words are taken away, and how.

    Attributes:
        replaced: What stands in the place of a token that is taken away.
        unit: `word`: a word goes with all its tokens, and what is outside words is never taken for itself. `token`: each
            token goes alone, those of one word one after the other; tokens outside words score 0.
        shares: Shares of the units, rounded down; for `counts` numbers of units.
        counts: `shares` are numbers of units.
        at_least_one: A share of a short text is one unit at least, and not none.
        with_special: Special tokens count where a share is taken, although none is ever taken away.
        keeps: The text of the units alone is read, too.
        rising: The unit with the lowest score goes first.
    """

    replaced: Replacement
    unit: Literal["word", "token"]
    shares: tuple[float, ...]
    counts: bool = False
    at_least_one: bool = True
    with_special: bool = False
    keeps: bool = True
    rising: bool = False

    def list_sizes(self, units: int, special: int) -> list[int]:
        """Return the numbers of units that are taken, one for each share, at most all."""
        if self.counts:
            return [min(int(count), units) for count in self.shares]
        of = units + special if self.with_special else units
        # a share like .15 is not exact in binary, and floor(.15 * 20) would be 2
        sizes = [int(np.floor(share * of + 1e-9)) for share in self.shares]
        least = 1 if self.at_least_one else 0
        return [min(max(size, least), units) for size in sizes]


_DIG = {"unit": "token", "shares": (0.2,), "at_least_one": False, "with_special": True}
_ARRAS = {"replaced": "zero", "unit": "word", "shares": tuple(range(51)), "counts": True, "keeps": False}

PROTOCOLS: dict[str, Protocol] = {
    "dig-2021": Protocol("delete", **_DIG),  # type: ignore[arg-type]  # mypy joins the values' types
    "dig-2021-log-odds": Protocol("pad", **_DIG, keeps=False),  # type: ignore[arg-type]
    "eraser-2020": Protocol("delete", "token", (0.01, 0.05, 0.1, 0.2, 0.5)),
    "marc-2023": Protocol("pad", "word", tuple(percent / 100 for percent in range(5, 100, 5))),
    "arras-2016": Protocol(**_ARRAS),  # type: ignore[arg-type]
    "arras-2016-rising": Protocol(**_ARRAS, rising=True),  # type: ignore[arg-type]
}
"""By name: Sanyal and Ren 2021, DeYoung et al. 2020, Brinner and Zarriess 2023, Arras et al. 2016."""


@dataclass(frozen=True, eq=False, slots=True)
class ScoredText:
    """A text, and what an explanation says of its words.

    Attributes:
        text: As it was explained.
        label: The label that was explained.
        words: W words of the text with their scores, in the order of the text.
    """

    text: str
    label: str
    words: Sequence[tuple[Word, float]]


@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """What a model says of a text while its units are taken away; probabilities are those of the explained label.

    Attributes:
        sizes: (K,) units taken.
        whole: Probability for the whole text.
        without: (K,) without the first units.
        alone: (K,) of the first units alone; None if the protocol does not ask.
        predicted: (K,) most probable label without the first units; None where nobody asks.
    """

    sizes: NDArray[np.int64]
    whole: float
    without: NDArray[np.float64]
    alone: NDArray[np.float64] | None
    predicted: NDArray[np.int64] | None = None

    @property
    def comprehensiveness(self) -> float:
        """Mean over sizes of what the probability loses with the units; 0 for a size of no unit."""
        return float((self.whole - self.without).mean())

    @property
    def sufficiency(self) -> float:
        """Mean over sizes of what the probability lacks with the units alone; 0 for a size of no unit, as published."""
        assert self.alone is not None  # the protocol keeps
        return float(np.where(self.sizes > 0, self.whole - self.alone, 0.0).mean())

    @property
    def log_odds(self) -> float:
        """Mean over sizes of the log ratio of the probability without the units and that of the whole text."""
        tiny = np.finfo(np.float64).tiny
        return float((np.log(np.maximum(self.without, tiny)) - np.log(max(self.whole, tiny))).mean())


@dataclass(frozen=True, eq=False, slots=True)
class Removal:
    """What a model says of a text without the words of lists.

    Attributes:
        whole: (C,) probabilities for the whole text.
        without: (L, C) without the words of each list.
        n_words: Occurrences that each list took.
    """

    whole: NDArray[np.float64]
    without: NDArray[np.float64]
    n_words: list[int]


class DeletionTracer:
    """Reads texts with words taken away, for one classifier."""

    def __init__(
        self, classifier: Classifier, *, max_tokens: int, overlap: int, max_windows: int | None, budget_tokens: int
    ) -> None:
        """Check the model and the windows.

        Args:
            classifier: The model that was explained.
            max_tokens: Tokens a window at most, as it was explained; so for the others.
            overlap: Content tokens that two neighbouring windows share.
            max_windows: Windows a text at most; None for all of it.
            budget_tokens: Tokens of one pass of the model.

        Raises:
            ModelError: The model is a regression, or windows of this shape do not fit it.
        """
        if classifier.problem == "regression":
            raise ModelError(
                "problem='regression' has no probability that words could lower. A number would have been read as the "
                "logit of a class. Evaluate a model with classes."
            )
        classifier.check_windows(max_tokens, overlap)
        self._classifier = classifier
        self._windows = {"max_tokens": max_tokens, "overlap": overlap, "max_windows": max_windows}
        self._budget = Budget(budget_tokens)
        self._pad = classifier.find_token("pad")

    @property
    def labels(self) -> Sequence[str]:
        """Names of the classes, in the order of probabilities."""
        return self._classifier.labels

    def trace(self, texts: Sequence[ScoredText], protocols: Sequence[Protocol]) -> list[list[Trace] | None]:
        """Take words away by their scores, in every way that the protocols name.

        Texts with equal units taken in the same way are read once; passes hold texts of many documents.

        Returns:
            A trace a protocol for each text, in their orders; None for a text that does not fit the memory.

        Note:
            Runs on: executor. Cost: a forward pass for each size of each protocol, two where it keeps, and one for the
            whole text; sizes that come to the same units cost once.
            Source: DeYoung et al. 2020, section 4; Sanyal and Ren 2021, section 4.2; Arras et al. 2016, section 4.
        """
        readings = _Readings(self._classifier, self._pad)
        plans = [self._plan(readings, text, protocols) for text in texts]
        logits = readings.run(self._budget)
        return [None if not np.isfinite(logits[plan.numbers]).all() else self._close(plan, logits) for plan in plans]

    def remove(self, texts: Sequence[str], lists: Sequence[Sequence[Collection[str]]]) -> list[Removal | None]:
        """Delete the words of lists from texts, every occurrence of them.

        Args:
            texts: As they were explained.
            lists: For each text, L lists of word keys.

        Returns:
            What each text comes to; None for one that does not fit the memory, or whose logits are not finite.

        Note:
            Runs on: executor. Cost: a forward pass of a text's windows for each list that takes different words, and one for
            the whole text.
        """
        readings = _Readings(self._classifier, self._pad)
        plans: list[tuple[list[int], list[int]]] = []
        for text, mine in zip(texts, lists, strict=True):
            encoding = self._classifier.encode(text, **self._windows)  # type: ignore[arg-type]  # joined types
            words = segment(text)
            of_token = number_tokens(words, encoding.offsets)
            numbers, counts = [readings.add(encoding, np.zeros(len(of_token), dtype=bool), "delete")], []
            for keys in mine:
                chosen = [number for number, word in enumerate(words) if word.key in keys]
                taken = np.isin(of_token, chosen)
                numbers.append(readings.add(encoding, taken, "delete"))
                counts.append(len(np.unique(of_token[taken])))
            plans.append((numbers, counts))
        logits = readings.run(self._budget)
        found = self._classifier.probabilities(torch.from_numpy(logits)).numpy()
        return [
            Removal(found[numbers[0]], found[numbers[1:]], counts) if np.isfinite(logits[numbers]).all() else None
            for numbers, counts in plans
        ]

    def _plan(self, readings: _Readings, text: ScoredText, protocols: Sequence[Protocol]) -> _Plan:
        encoding = self._classifier.encode(text.text, **self._windows)  # type: ignore[arg-type]  # joined types
        nothing = np.zeros(len(encoding.offsets), dtype=bool)
        special = sum(sum(window.special) for window in encoding.windows)
        plan = _Plan(self._classifier.labels.index(text.label), readings.add(encoding, nothing, "delete"), [])
        of_token = number_tokens([word for word, _ in text.words], encoding.offsets)
        for protocol in protocols:
            ranked = _rank_units(text, of_token, protocol)
            sizes = protocol.list_sizes(len(ranked), special)
            without, alone = [], []
            for size in sizes:
                taken = nothing.copy()
                for unit in ranked[:size]:
                    taken[unit] = True
                without.append(readings.add(encoding, taken, protocol.replaced))
                if protocol.keeps:
                    alone.append(readings.add(encoding, ~taken, protocol.replaced))
            plan.steps.append((np.array(sizes, dtype=np.int64), without, alone))
        return plan

    def _close(self, plan: _Plan, logits: NDArray[np.float64]) -> list[Trace]:
        found = self._classifier.probabilities(torch.from_numpy(logits)).numpy()
        return [
            Trace(
                sizes, float(found[plan.whole, plan.label]), found[without, plan.label],
                found[alone, plan.label] if alone else None, found[without].argmax(1),
            )
            for sizes, without, alone in plan.steps
        ]  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class _Plan:
    """Which readings a text's traces are made of."""

    label: int
    whole: int
    steps: list[tuple[NDArray[np.int64], list[int], list[int]]]  # a protocol's sizes, readings without and alone

    @property
    def numbers(self) -> list[int]:
        return [self.whole, *(number for _, without, alone in self.steps for number in (*without, *alone))]


class _Readings:
    """Texts with tokens taken away, each to be read once by the model."""

    def __init__(self, classifier: Classifier, pad: int) -> None:
        self._classifier = classifier
        self._pad = pad
        self._numbers: dict[tuple[int, bytes, str], int] = {}
        self._encodings: list[Encoding] = []  # kept: their ids are the keys
        self._windows: list[tuple[int, Window, NDArray[np.bool_]]] = []  # reading, tokens, which embeddings are zero

    def add(self, encoding: Encoding, taken: NDArray[np.bool_], replaced: Replacement) -> int:
        """Return the number of a reading; `taken` is (T,), over content tokens."""
        key = (id(encoding), taken.tobytes(), replaced if taken.any() else "delete")
        if key not in self._numbers:
            self._numbers[key] = number = len(self._numbers)
            self._encodings.append(encoding)
            self._windows += [(number, *self._cut(window, taken, replaced)) for window in encoding.windows]
        return self._numbers[key]

    def _cut(self, window: Window, taken: NDArray[np.bool_], replaced: Replacement) -> tuple[Window, NDArray[np.bool_]]:
        special = np.asarray(window.special, dtype=bool)
        gone = np.zeros(len(special), dtype=bool)
        gone[~special] = taken[window.start : window.stop]
        ids = np.asarray(window.ids)
        types = None if window.token_types is None else np.asarray(window.token_types)
        if replaced == "delete":
            stays = ~gone
            if not stays.any():
                stays, ids = np.arange(len(ids)) < 1, np.full(1, self._pad)  # a model without special tokens reads one
            ids, special, gone = ids[stays], special[stays], np.zeros(int(stays.sum()), dtype=bool)
            types = None if types is None else types[stays]
        elif replaced == "pad":
            ids, gone = np.where(gone, self._pad, ids), np.zeros_like(gone)
        listed = None if types is None else types.tolist()
        return Window(ids.tolist(), listed, special.tolist(), window.start, window.stop), gone

    def run(self, budget: Budget) -> NDArray[np.float64]:
        """Return the mean logits of each reading's windows, (readings, C); NaN where memory was lacking."""
        lengths = np.array([len(window.ids) for _, window, _ in self._windows], dtype=np.int64)
        owners = np.array([number for number, _, _ in self._windows], dtype=np.int64)
        sums = np.zeros((len(self._numbers), len(self._classifier.labels)))

        def compute(chunk: NDArray[np.int64]) -> None:
            batch = self._classifier.collate([self._windows[item][1] for item in chunk])
            embeddings = self._classifier.embed(batch.ids)
            for row, item in enumerate(chunk):
                zero = np.flatnonzero(self._windows[item][2])
                embeddings[row, torch.from_numpy(zero).to(embeddings.device)] = 0.0
            with torch.no_grad():
                logits = self._classifier.logits(embeddings, batch.mask, batch.token_types)
            np.add.at(sums, owners[chunk], logits.double().cpu().numpy())

        for unfit in budget.spend(lengths, compute):
            sums[owners[unfit]] = np.nan
        return sums / np.bincount(owners, minlength=len(sums))[:, None]


def _rank_units(text: ScoredText, of_token: NDArray[np.int64], protocol: Protocol) -> list[NDArray[np.int64]]:
    """Return the tokens of each unit, first the one that goes first; equal ones in the order of the text.

    Args:
        text: Its words with their scores.
        of_token: (T,) word of each token, -1 for none.
        protocol: What a unit is, and which end goes first.
    """
    scores = np.array([score for _, score in text.words])
    if protocol.unit == "token":
        units = np.arange(len(of_token))
        values = np.where(of_token >= 0, scores[of_token] if len(scores) else 0.0, 0.0)
    else:
        units = np.unique(of_token[of_token >= 0])
        values = scores[units]  # of several words that end in one token the others have none, and are no units
    order = units[np.argsort(values if protocol.rising else -values, kind="stable")]
    if protocol.unit == "token":
        return [np.array([token]) for token in order]
    tokens = np.argsort(of_token, kind="stable")
    starts = np.searchsorted(of_token[tokens], order, side="left")
    ends = np.searchsorted(of_token[tokens], order, side="right")
    return [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
