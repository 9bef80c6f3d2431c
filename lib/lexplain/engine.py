"""Explainer: texts in, word scores out, in full batches.

Shape letters: B rows, S tokens of the padded length, D embedding, C labels, T content tokens of a text, P
path points.

A row is one (window, target) pair. Long texts have several windows; everything about a text is the mean over
its windows, so completeness holds for the mean logit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lexplain.calibration import SampledPath
from lexplain.classifier import Classifier, Encoding, Window
from lexplain.errors import DocumentError, ModelError, PlanError, Problem
from lexplain.explanation import Explanation, Outcome, Rejection, Settled
from lexplain.methods import Attribution, Identity, Inputs, Method
from lexplain.methods.masks import find_spans, weigh_windows
from lexplain.methods.neighbours import make_references
from lexplain.neighbours import Reference
from lexplain.passes import Budget, Evaluation
from lexplain.words import Word, merge_tokens, number_tokens, segment

# Rows that share a pool of points, in passes of one point a row: enough that the last points of an adaptive rule,
# which few rows still need, fill their passes; few enough that the rows' embeddings stay small beside the model's own.
_POOL_PASSES = 8


class Explainer:
    """Explains the predicted labels of texts with one classifier and one method.

    Texts are sorted by length, equal texts are explained once, and the path points of many texts share each
    pass of the model, so results depend neither on the order of the texts nor, beyond rounding, on which
    texts come together.
    """

    def __init__(
        self, classifier: Classifier, method: Method, options: Mapping[str, object], *, max_tokens: int,
        overlap: int,
        max_windows: int | None, merge: Literal["sum", "absmax"], budget_tokens: int,
        top_k: int | None = None, prepared: object = None, label: str | None = None, against: str | None = None,
        settled: Set[str] = frozenset(),
    ) -> None:  # fmt: skip
        """Check everything that can be checked without a text.

        Args:
            classifier: The model.
            method: Of the registry.
            options: Of the method; those left out take their defaults.
            max_tokens: Tokens a window at most, special tokens included.
            overlap: Content tokens that two neighbouring windows share.
            max_windows: Windows a text at most; None for all of the text.
            merge: How token scores become word scores; `sum` keeps completeness.
            budget_tokens: Path points x padded length of one pass of the model; halved whenever memory runs
                out. A single point is tried whatever its length.
            top_k: Explain so many of the most probable labels, predicted or not; None: the predicted ones.
            prepared: What a preparation has made for this model and method, as a `Calibration`.
            label: Explain this label only, predicted or not.
            against: Explain every other label by what its logit has more than this one's.
            settled: Labels that are predicted but not explained; those that the model does not have are ignored.

        Raises:
            ModelError: The method cannot explain the model, or it has not that many positions or no such baseline
                token or label.
            PlanError: The options break rules of the method.
        """
        problems = method.check(options)
        if budget_tokens < 1:
            problems.append(Problem("execution.budget_tokens", budget_tokens, "must be at least 1",
                                    "No text would have fitted a pass", "Write budget_tokens: "
                                    "16384"))  # fmt: skip
        if max_windows is not None and max_windows < 1:
            problems.append(Problem("text.max_windows", max_windows, "must be at least 1",
                                    "No part of the text would have been read", "Write max_windows: "
                                    "1"))  # fmt: skip
        if problems:
            raise PlanError(method.id, problems)
        completed = method.complete_options(options)
        method.check_network(classifier.model.config, completed)
        for name, value in {"label": label, "against": against}.items():
            if value is not None and value not in classifier.labels:
                raise ModelError(
                    f"{name}={value!r} must be one of {', '.join(classifier.labels)}. Another label's words would have been "
                    f"shown. Write one of these."
                )
        if method.foremost(completed) and (label is not None or (top_k or 1) > 1):
            raise ModelError(
                f"{method.id} explains only a text's most probable label with these options. Another label would have got "
                "that one's words. Leave out label and top_k, or write other options."
            )
        classifier.check_windows(max_tokens, overlap)
        self._classifier = classifier
        self._method = method
        self._options = completed
        self._baseline = str(self._options.get("baseline", "pad"))  # a method without one reads none
        self._baseline_id = classifier.find_token(self._baseline)
        self._max_tokens, self._overlap, self._max_windows = max_tokens, overlap, max_windows
        # a part of a word's score says nothing, so there is none to choose
        self._merge: Literal["sum", "absmax"] = "sum" if method.by_word else merge
        self._budget = Budget(budget_tokens)
        self._top_k = top_k
        self._settled = settled
        self._prepared = prepared
        self._label = label
        self._against = None if against is None else classifier.labels.index(against)
        self._compares = method.prepares(self._options) == "neighbours"

    @property
    def budget_tokens(self) -> int:
        """Tokens x points of a pass, as small as lack of memory has made it."""
        return self._budget.tokens

    def limit_budget(self, tokens: int) -> None:
        """Lower the budget to what another explainer of this model found to fit."""
        self._budget.tokens = min(self._budget.tokens, tokens)

    def explain(self, texts: Sequence[str]) -> list[Outcome]:
        """Explain the labels of every text: `read_texts`, then `explain_documents`."""
        return self.explain_documents(self.read_texts(texts))

    def read_texts(self, texts: Sequence[str], labels: Sequence[Sequence[str]] | None = None) -> Documents:
        """Find words and token windows, which takes no pass of the model: another thread may do it ahead.

        Equal texts are read, and will be explained, once.

        Args:
            texts: To be explained.
            labels: Of each text, labels to explain besides those that the explainer chooses; unknown ones are left out.

        Note:
            Runs on: executor. Cost: about a millisecond a text.
        """
        known = {label: number for number, label in enumerate(self._classifier.labels)}
        asked = [frozenset(known[label] for label in each if label in known) for each in labels or [()] * len(texts)]
        keys = list(zip(texts, asked, strict=True))
        documents = {
            key: _Document(*key) for key in sorted(set(keys), key=lambda key: (len(key[0]), key[0], sorted(key[1])))
        }
        for document in documents.values():
            try:
                self._open(document)
            except MemoryError:
                document.rejection = _no_memory("The words of the text do")
        return Documents([documents[key] for key in keys], list(documents.values()))

    def explain_documents(self, documents: Documents) -> list[Outcome]:
        """Explain what `read_texts` has read.

        Returns:
            One outcome a text, in the order of the texts. A text that cannot be explained is a Rejection,
            never an error. Settled labels are told by `documents.settled`.

        Note:
            Runs on: executor. Cost: one forward pass a window, then what the method takes for each window;
            targets of one window share the forward part.
        """
        self._predict(documents.readable)
        for batch in self._batches(documents.readable):
            self._attribute(batch)
        outcomes = {id(document): self._close(document) for document in documents.distinct}
        return [outcomes[id(document)] for document in documents.in_order]

    def _open(self, document: _Document) -> None:
        """Find the words and the windows of a text."""
        try:
            document.words = segment(document.text)
        except DocumentError as error:
            document.rejection = Rejection(error.reason, error.message)
            return
        if not document.words:
            document.rejection = Rejection("no_words", "The text holds no letter and no number, so it has no words.")
            return
        try:
            document.encoding = self._classifier.encode(
                document.text, max_tokens=self._max_tokens, overlap=self._overlap, max_windows=self._max_windows
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever a tokenizer stumbles over is this text's, not the batch's
            document.rejection = Rejection("not_tokenized", f"The tokenizer fails on this text: {error}")
            return
        document.weights = self._weigh(document.encoding.windows)
        if self._compares:
            document.text_hash = _hash(document.text)
            document.word_hashes = np.array([_hash(word.key) for word in document.words], dtype=np.int64)

    def _predict(self, documents: Sequence[_Document]) -> None:
        """Compute every window's logits, and each text's probabilities and targets."""
        flat = [(document, number) for document in documents for number in range(len(document.encoding.windows))]
        windows = [document.encoding.windows[number] for document, number in flat]
        logits = np.full((len(flat), len(self._classifier.labels)), np.nan)

        def compute(chunk: NDArray[np.int64]) -> None:
            batch = self._classifier.collate([windows[i] for i in chunk])
            with torch.no_grad():
                found = self._classifier.logits(self._classifier.embed(batch.ids), batch.mask, batch.token_types)
            logits[chunk] = found.double().cpu().numpy()

        lengths = np.array([len(window.ids) for window in windows], dtype=np.int64)
        for unfit in self._budget.spend(lengths, compute):
            flat[unfit][0].rejection = _no_memory(f"One point of a window of {lengths[unfit]} tokens does")
        position = 0
        for document in documents:
            document.logits = logits[position : position + len(document.encoding.windows)]
            position += len(document.encoding.windows)
            if document.rejection is None:
                self._choose_targets(document)

    def _choose_targets(self, document: _Document) -> None:
        mean = document.logits.mean(axis=0)
        if not np.isfinite(mean).all():
            document.rejection = _not_finite("logits")
            return
        n_tokens = len(document.encoding.offsets)
        for rank, (label, probability) in enumerate(self._choose_labels(mean, document.asked)):
            name = self._classifier.labels[label]
            if name in self._settled:
                document.settled.append(Settled(name, rank, probability))
            else:
                document.targets.append(_Target(label, rank, probability, np.zeros(n_tokens), np.zeros(n_tokens)))

    def _choose_labels(self, logits: NDArray[np.float64], asked: frozenset[int]) -> list[tuple[int, float | None]]:
        """Return the labels to explain and their probabilities, most probable first; of a regression its output."""
        if self._classifier.problem == "regression":
            return [(0, None)]
        probabilities = self._classifier.probabilities(torch.from_numpy(logits[None]))[0]
        values: list[float] = probabilities.tolist()
        if self._label is not None:
            label = self._classifier.labels.index(self._label)
            return [(label, values[label])]
        ranked = sorted(range(len(values)), key=lambda label: -values[label])
        chosen = set(self._classifier.predict(probabilities) if self._top_k is None else ranked[: self._top_k])
        return [(label, values[label]) for label in ranked if label in chosen | asked and label != self._against]

    def _batches(self, documents: Sequence[_Document]) -> Iterator[list[_Row]]:
        """Yield rows, longest first, in batches of some passes: what one row no longer needs, others fill."""
        pairs = [(document, number) for document in documents for number in range(len(document.encoding.windows))]
        pairs.sort(key=lambda pair: -len(pair[0].encoding.windows[pair[1]].ids))  # stable, so ties keep the order
        batch: list[_Row] = []
        for window_number, (document, number) in enumerate(pairs):
            rows = [_Row(document, number, target, window_number) for target in document.targets]
            size = (len(batch) + len(rows)) * len(batch[0].window.ids) if batch else 0
            if size > _POOL_PASSES * self._budget.tokens:
                yield batch
                batch = []
            batch += rows
        if batch:
            yield batch

    def list_tokens(self, documents: Documents) -> list[int]:
        """Return the distinct content tokens of texts that `read_texts` has read, ascending."""
        windows = [window for document in documents.readable for window in document.encoding.windows]
        pairs = [pair for window in windows for pair in zip(window.ids, window.special, strict=True)]
        return sorted({token for token, special in pairs if not special})

    def sample_paths(self, documents: Documents, nodes: int) -> list[SampledPath]:
        """Return the derivatives along the line from baseline to input: what a calibration is fitted to.

        Args:
            documents: A sample that `read_texts` has read; of each, the first window and the most probable predicted
                label are taken.
            nodes: Equally spaced points, both ends among them.

        Returns:
            One a distinct text that has a predicted label and can be explained.

        Note:
            Runs on: executor. Cost: `nodes` forward and backward passes a text.
        """
        sampled: list[SampledPath] = []
        for rows in self._first_windows(documents):
            rows = [row for row in rows if row.target is row.document.targets[0]]
            evaluate = self._place(rows)[0]
            alphas = torch.linspace(0, 1, nodes, dtype=torch.float64).repeat(len(rows))
            derivatives = evaluate.directional(torch.arange(len(rows)).repeat_interleave(nodes), alphas)[1]
            found = derivatives.view(len(rows), nodes, -1).cpu().numpy()
            for number, row in enumerate(rows):
                if number not in evaluate.unfit:
                    keys = [None if word < 0 else row.document.words[word].key for word in row.find_words()]
                    label = self._classifier.labels[row.target.label]
                    sampled.append(SampledPath(label, tuple(keys), found[number, :, : len(keys)]))
        return sampled

    def sample_references(self, documents: Documents, layer: int | None) -> list[Reference]:
        """Return what neighbours are found by, and base scores, for the first window and predicted labels of each text.

        Args:
            documents: References that `read_texts` has read.
            layer: Hidden layer of the vectors; None: all of them, without base scores, by the most probable label.

        Note:
            Runs on: executor. Cost: as `lexplain.methods.neighbours.make_references`, and the prediction.
        """
        sampled: list[Reference] = []
        for rows in self._first_windows(documents):
            rows = [row for row in rows if layer is not None or row.target is row.document.targets[0]]
            evaluate, inputs = self._place(rows)
            for number, reference in enumerate(make_references(evaluate, inputs, layer, self._options)):
                finite = np.isfinite(reference.vectors).all() and np.isfinite(reference.scores).all()
                if finite and number not in evaluate.unfit:
                    sampled.append(reference)
        return sampled

    def _first_windows(self, documents: Documents) -> Iterator[list[_Row]]:
        """Yield the rows of each text's first window, those of one window together, in batches."""
        self._predict(documents.readable)
        for batch in self._batches(documents.readable):
            rows = [row for row in batch if row.number == 0]
            if rows:
                yield rows

    def _place(self, rows: Sequence[_Row]) -> tuple[Evaluation, Inputs]:
        """Return a batch of rows as a method sees them."""
        classifier = self._classifier
        batch = classifier.collate([row.window for row in rows])
        baseline_ids = classifier.baseline_ids(batch.ids, batch.special, batch.mask, self._baseline)
        words = np.full(batch.ids.shape, -1, dtype=np.int64)
        for number, row in enumerate(rows):
            words[number, : len(row.window.ids)] = row.find_words()
        inputs = Inputs(
            x=classifier.embed(batch.ids),
            baseline=classifier.embed(baseline_ids),
            ids=batch.ids,
            mask=batch.mask,
            special=batch.special | ~batch.mask,
            words=torch.from_numpy(words).to(batch.ids.device),
            seeds=torch.tensor([row.seed(self._method.id) for row in rows]),
            target_score=torch.tensor(
                [self._score(row.document, row.target)[row.number] for row in rows],
                dtype=torch.float64,
                device=batch.ids.device,
            ),
            baseline_id=self._baseline_id,
            prepared=self._prepared,
            identity=self._identify(rows, batch.ids, words) if self._compares else None,
        )
        evaluate = Evaluation(
            classifier, inputs, batch.token_types, self._budget,
            windows=np.array([row.window_number for row in rows], dtype=np.int64),
            targets=torch.tensor([row.target.label for row in rows], device=batch.ids.device), against=self._against,
        )  # fmt: skip
        return evaluate, inputs

    def _identify(self, rows: Sequence[_Row], ids: Tensor, words: NDArray[np.int64]) -> Identity:
        """Return what rows are compared with other documents by; `words` are (B, S) numbers within the text."""
        hashes = -1 - ids.cpu().numpy()
        for number, row in enumerate(rows):
            inside = words[number] >= 0
            hashes[number, inside] = row.document.word_hashes[words[number, inside]]
        return Identity(
            texts=torch.tensor([row.document.text_hash for row in rows]),
            labels=torch.tensor([row.target.label for row in rows]),
            words=torch.from_numpy(hashes),
        )

    def _attribute(self, rows: Sequence[_Row]) -> None:
        """Run the method on one batch and add its scores to the texts."""
        evaluate, inputs = self._place(rows)
        attribution: Attribution = self._method.function(evaluate, inputs, **self._options)
        attribution.check(self._method, tuple(inputs.mask.shape))
        scores = attribution.scores.cpu().numpy()
        baseline_score = attribution.baseline_score.tolist()
        gap = attribution.completeness_gap.tolist()
        evaluations = attribution.evaluations.tolist()
        converged = attribution.converged.tolist()
        for number, row in enumerate(rows):
            if number in evaluate.unfit:
                row.document.rejection = _no_memory(f"One point of a window of {len(row.window.ids)} tokens does")
                continue
            target, window = row.target, row.window
            content = ~np.asarray(window.special, dtype=bool)
            weight = row.document.weights[row.number]
            part = weight * scores[number, : len(window.ids)][content]
            target.token_scores[window.start : window.stop] += part
            target.token_sizes[window.start : window.stop] += abs(part)
            target.baseline_score += baseline_score[number]
            target.gap += gap[number]
            target.evaluations += evaluations[number]
            target.converged &= converged[number]

    def _weigh(self, windows: Sequence[Window]) -> Sequence[NDArray[np.float64] | float]:
        """Return what each window counts for its tokens.

        Parts of a logit are averaged, as the logits of the windows are. Masks and sizes are blended where windows overlap:
        a token that two windows see has no more of them.
        """
        if self._method.mask or not self._method.signed:
            return weigh_windows([(window.start, window.stop) for window in windows])
        return [1 / len(windows)] * len(windows)

    def _close(self, document: _Document) -> Outcome:
        """Merge the windows and tokens of a text into word scores."""
        if document.rejection is None and not all(target.is_finite() for target in document.targets):
            document.rejection = _not_finite("scores")
        if document.rejection is not None:
            return document.rejection
        if self._options.get("unconverged") == "reject" and not all(target.converged for target in document.targets):
            return Rejection("not_converged", "The scores are not within the tolerance after the most points allowed.")
        return [self._merge_words(document, target) for target in document.targets]

    def _score(self, document: _Document, target: _Target) -> NDArray[np.float64]:
        """Return F(x) of each window."""
        other = 0.0 if self._against is None else document.logits[:, self._against]
        return np.asarray(document.logits[:, target.label] - other)

    def _merge_words(self, document: _Document, target: _Target) -> Explanation:
        windows, offsets = document.encoding.windows, document.encoding.offsets
        seen_until = int(offsets[:, 1].max(initial=0))
        words = [word for word in document.words if word.start < seen_until]
        token_scores = target.token_scores
        if self._method.mask:  # a word has the mean of its tokens, by the characters that they share
            counts = merge_tokens(words, offsets, np.ones_like(token_scores), document.text, rule="sum")[0]
            # windows may differ in the sign of a token, and their masks must not fade each other
            token_scores = np.copysign(target.token_sizes, token_scores)
            sums, other = merge_tokens(words, offsets, token_scores, document.text, rule="sum")
            sizes = merge_tokens(words, offsets, target.token_sizes, document.text, rule="sum")[0]
            masks = sizes / np.maximum(counts, 1e-9)
            word_scores = np.copysign(masks, sums)
            found = find_spans(masks, word_scores)
            spans = [(words[span.start : span.stop], span.score) for span in found]
        else:
            spans = []
            word_scores, other = merge_tokens(words, offsets, token_scores, document.text, rule=self._merge)
        target_score = float(self._score(document, target).mean())
        baseline_score = target.baseline_score / len(windows)
        gap = target.gap / len(windows) if self._method.mask or self._method.signed else None
        difference = abs(target_score - baseline_score)
        return Explanation(
            label=self._classifier.labels[target.label],
            label_rank=target.rank,
            probability=target.probability,
            target_score=target_score,
            baseline_score=baseline_score,
            completeness_gap=gap,
            completeness_gap_relative=None if gap is None or not difference else abs(gap) / difference,
            evaluations=target.evaluations,
            converged=target.converged,
            token_norm=float(np.linalg.norm(token_scores)),
            n_tokens=len(offsets),
            n_windows=len(windows),
            other_score=other,
            spans=spans,
            words=sorted(zip(words, word_scores.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0].start)),
        )


@dataclass(eq=False, slots=True)
class _Target:
    """A label of a text that is explained, and the sums over its windows so far."""

    label: int
    rank: int
    probability: float | None
    token_scores: NDArray[np.float64]  # (T,)
    token_sizes: NDArray[np.float64]  # (T,) without their signs: of a mask, the mask itself
    baseline_score: float = 0.0
    gap: float = 0.0
    evaluations: int = 0
    converged: bool = True

    def is_finite(self) -> bool:
        sums = (self.baseline_score, self.gap, self.token_scores.sum())
        return all(map(math.isfinite, sums))


@dataclass(eq=False, slots=True)
class _Document:
    """A text on its way through the engine."""

    text: str
    asked: frozenset[int]  # labels to explain besides the predicted ones
    words: list[Word] = field(default_factory=list)
    encoding: Encoding = field(init=False)
    weights: Sequence[NDArray[np.float64] | float] = field(init=False)  # of each window
    logits: NDArray[np.float64] = field(init=False)  # (windows, C)
    text_hash: int = field(init=False)  # these two only for methods that compare documents
    word_hashes: NDArray[np.int64] = field(init=False)  # of each word's key
    targets: list[_Target] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    rejection: Rejection | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Documents:
    """Texts that were read and are not explained yet.

    Attributes:
        in_order: One a text; equal texts are one object.
        distinct: Each object once, by length.
    """

    in_order: list[_Document]
    distinct: list[_Document]

    @property
    def readable(self) -> list[_Document]:
        """The distinct texts that nothing was found against so far."""
        return [document for document in self.distinct if document.rejection is None]

    @property
    def settled(self) -> list[list[Settled]]:
        """The predicted labels of each text that were not to be explained, in the order of the texts; known once they are."""
        return [document.settled for document in self.in_order]


@dataclass(frozen=True, eq=False, slots=True)
class _Row:
    """One (window, target) pair; rows of one window have the same `window_number`."""

    document: _Document
    number: int
    target: _Target
    window_number: int

    @property
    def window(self) -> Window:
        return self.document.encoding.windows[self.number]

    def find_words(self) -> NDArray[np.int64]:
        """Return the word number of each token of the window, -1 for none."""
        window, document = self.window, self.document
        numbers = np.full(len(window.ids), -1, dtype=np.int64)
        content = ~np.asarray(window.special, dtype=bool)
        numbers[content] = number_tokens(document.words, document.encoding.offsets[window.start : window.stop])
        return numbers

    def seed(self, method_id: str) -> int:
        """Return where the row's random numbers start: targets of a window draw the same ones."""
        return _hash(f"{method_id}/{self.number}/{self.document.text}")


def _hash(text: str) -> int:
    """Return 63 bits of SHA-256, which a signed tensor holds."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def _no_memory(what: str) -> Rejection:
    advice = "Write a smaller max_tokens or max_characters, or use a device with more memory."
    return Rejection("out_of_memory", f"{what} not fit the memory. {advice}")


def _not_finite(what: str) -> Rejection:
    return Rejection("not_finite", f"The model's {what} are NaN or infinite here; often an overflow of float16.")
