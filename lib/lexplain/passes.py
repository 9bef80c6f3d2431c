"""Passes of the model: which points of which rows go through it together, and how many it has memory for.

Shape letters: B rows, S tokens of the padded length, D embedding, C labels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lexplain.classifier import Classifier
from lexplain.methods import Inputs

if TYPE_CHECKING:
    from lexplain.methods import Objective, Place, Score, See

_NO_CPU_MEMORY = "can't allocate memory"


class Budget:
    """How many tokens a pass of the model may hold."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def spend(
        self, lengths: NDArray[np.int64], compute: Callable[[NDArray[np.int64]], None],
        groups: NDArray[np.int64] | None = None,
    ) -> list[int]:  # fmt: skip
        """Call `compute` on chunks of item numbers whose padded size fits the budget.

        Longest first, so that a chunk pads little and a lack of memory shows early.

        Args:
            lengths: Tokens of each item.
            compute: Gets the numbers of a chunk's items.
            groups: Items of different groups never share a chunk.

        Returns:
            The items that do not fit the memory even alone.
        """
        groups = np.zeros(len(lengths), dtype=np.int64) if groups is None else groups
        order = np.lexsort((-lengths, groups))
        unfit: list[int] = []
        position, too_long = 0, math.inf
        while position < len(order):
            chunk = order[position : position + max(1, self.tokens // int(lengths[order[position]]))]
            chunk = chunk[groups[chunk] == groups[chunk[0]]]
            longest = int(lengths[chunk[0]])
            if longest >= too_long:
                chunk = chunk[lengths[chunk] >= too_long]
                unfit += chunk.tolist()
            elif not _fits_memory(compute, chunk):
                if len(chunk) == 1:
                    too_long = longest
                else:
                    self.tokens = len(chunk) * longest // 2
                continue
            position += len(chunk)
        return unfit


class Evaluation:
    """The model, restricted to the targets of one batch's rows; a `lexplain.methods.Evaluate`.

    Attributes:
        unfit: Rows that do not fit the memory; what is returned for them means nothing.
        model: The network.
    """

    def __init__(
        self,
        classifier: Classifier,
        inputs: Inputs,
        token_types: Tensor | None,
        budget: Budget,
        *,
        windows: NDArray[np.int64],
        targets: Tensor,
        against: int | None = None,
    ) -> None:
        """Take a batch.

        Args:
            classifier: The model.
            inputs: B rows.
            token_types: (B, S), or None.
            budget: What a pass may hold.
            windows: (B,) number of each row's window; rows of one window differ in their target only.
            targets: (B,) number of each row's label.
            against: Label whose logit is taken from those of the targets; None for none.
        """
        self.unfit: set[int] = set()
        self.model: nn.Module = classifier.model
        self._classifier = classifier
        self._inputs = inputs
        self._token_types = token_types
        self._budget = budget
        self._windows = windows
        self._targets = targets
        self._against = against
        self._lengths = inputs.mask.sum(1).cpu().numpy()

    def logits(self, rows: Tensor, alphas: Tensor) -> Tensor:
        """Return F, (P,), without gradients."""
        values, owners, place_of = self._unknown(len(rows)), *self._merge_baselines(rows, alphas)

        def see(points: Tensor, seen: Tensor, gradients: Tensor | None) -> None:
            values[points] = seen

        self.visit(rows[owners], self._line(rows[owners], alphas[owners]), see, share=alphas[owners], gradients=False)
        self._mark_twins(rows, owners[place_of])
        return values[place_of]

    def directional(self, rows: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """Return F, (P,), and sum over D of (x - baseline) dF/dx, (P, S)."""
        inputs, values = self._inputs, self._unknown(len(rows))
        derivatives = torch.zeros((len(rows), inputs.x.shape[1]), dtype=torch.float64, device=values.device)
        owners, place_of = self._merge_baselines(rows, alphas)
        wanted = np.argsort(place_of, kind="stable")
        starts = np.searchsorted(place_of[wanted], np.arange(len(owners) + 1))

        def see(places: Tensor, seen: Tensor, gradients: Tensor | None) -> None:
            assert gradients is not None  # they were asked for
            length, numbers = gradients.shape[1], places.cpu().numpy()
            first, counts = starts[numbers], starts[numbers + 1] - starts[numbers]

            def take(points: NDArray[np.int64], gradient: Tensor, value: Tensor) -> None:
                point = torch.from_numpy(points).to(values.device)
                row = rows[points].to(values.device)
                line = inputs.x[row, :length] - inputs.baseline[row, :length]
                values[point] = value
                derivatives[point, :length] = (line * gradient).sum(-1, dtype=torch.float64)

            if (counts == 1).all():
                take(wanted[first], gradients, seen)
                return
            most = max(1, self._budget.tokens // length)
            for number, count in enumerate(counts):
                # a baseline's many rows in parts: together they may need more memory than a pass of the model
                for start in range(first[number], first[number] + count, most):
                    stop = min(start + most, first[number] + count)
                    take(wanted[start:stop], gradients[number], seen[number])

        self.visit(rows[owners], self._line(rows[owners], alphas[owners]), see, share=alphas[owners])
        self._mark_twins(rows, owners[place_of])
        return values, derivatives

    def visit(
        self, rows: Tensor, place: Place, see: See, *, share: Tensor | None = None, objective: Objective | None = None,
        gradients: bool = True,
    ) -> None:  # fmt: skip
        """Evaluate points anywhere, see `lexplain.methods.Evaluate`."""
        if not len(rows):
            return
        if share is None:
            order, sizes = np.arange(len(rows)), np.ones(len(rows), dtype=np.int64)
            starts = order
        else:
            order, starts, sizes = _share_points(self._windows[rows.numpy()], share.numpy())

        def compute(chunk: NDArray[np.int64]) -> None:
            sharing = torch.from_numpy(starts[chunk] + np.arange(sizes[chunk[0]])[:, None])  # (targets, chunk)
            points = torch.from_numpy(order)[sharing]
            self._pass(points, rows[points], place, see, objective or self._target_logits, gradients)

        first = rows.numpy()[order[starts]]
        for unfit in self._budget.spend(self._lengths[first], compute, groups=sizes):
            points = order[starts[unfit] : starts[unfit] + sizes[unfit]]
            self.unfit.update(rows.numpy()[points].tolist())

    def hidden(self) -> Tensor:
        """Return what each hidden layer holds of each row, (B, layers + 1, H), see `lexplain.methods.Evaluate`."""
        inputs, windows = self._inputs, self._windows
        first, window_of = np.unique(windows, return_index=True, return_inverse=True)[1:]
        shape = len(first), self._classifier.count_layers() + 1, self._classifier.model.config.hidden_size
        found = inputs.x.new_full(shape, math.nan, dtype=torch.float64)

        def compute(chunk: NDArray[np.int64]) -> None:
            rows = torch.from_numpy(first[chunk]).to(inputs.x.device)
            length = int(self._lengths[first[chunk]].max())
            types = None if self._token_types is None else self._token_types[rows, :length]
            pooled = self._classifier.pool_layers(inputs.x[rows, :length], inputs.mask[rows, :length], types)
            found[torch.from_numpy(chunk)] = pooled

        for unfit in self._budget.spend(self._lengths[first], compute):
            self.unfit.update(np.flatnonzero(window_of == unfit).tolist())
        return found[torch.from_numpy(window_of)]

    def probabilities(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the probability of each row's target, (N,); against another label, of the two of them."""
        # in float64: 1 - p of a sure prediction is a rounding error of float32
        if self._against is not None:
            return self._target_logits(logits.double(), rows).sigmoid()
        return self._classifier.probabilities(logits.double()).gather(1, self._targets[rows, None])[:, 0]

    def visit_alone(self, row: int, explain: Callable[[Score, int], None]) -> None:
        """Let somebody else's code have one row to itself, see `lexplain.methods.Evaluate`."""
        length = int(self._lengths[row])
        only = torch.tensor([row], device=self._inputs.x.device)
        types = None if self._token_types is None else self._token_types[only, :length]

        def score(embeddings: Tensor) -> Tensor:
            count = len(embeddings)
            mask = self._inputs.mask[only, :length].expand(count, -1)
            logits = self._classifier.logits(embeddings, mask, None if types is None else types.expand(count, -1))
            return self._target_logits(logits, only.expand(count))

        def compute(chunk: NDArray[np.int64]) -> None:
            explain(score, max(1, self._budget.tokens // length))

        before = self._budget.tokens
        while not _fits_memory(compute, np.array([row])):
            if self._budget.tokens < 2 * length:
                self.unfit.add(row)
                self._budget.tokens = before  # smaller passes were of no use
                return
            self._budget.tokens //= 2

    def _pass(
        self, points: Tensor, rows: Tensor, place: Place, see: See, objective: Objective, gradients: bool
    ) -> None:
        """Run the model forward once and, if wanted, backward once a target.

        Args:
            points: (K, N) numbers of the points: N places, each wanted for K targets.
            rows: (K, N) their rows; those of a column are rows of one window.
            place: As in `visit`.
            see: As in `visit`.
            objective: As in `visit`.
            gradients: As in `visit`.
        """
        inputs = self._inputs
        length = int(self._lengths[rows[0].numpy()].max())
        points, rows = points.to(inputs.x.device), rows.to(inputs.x.device)
        leaf = place(points[0], length).detach().requires_grad_(gradients)
        types = None if self._token_types is None else self._token_types[rows[0], :length]
        with torch.set_grad_enabled(gradients):
            logits = self._classifier.logits(leaf, inputs.mask[rows[0], :length], types)
            seen = []
            for target, (point, row) in enumerate(zip(points, rows, strict=True), 1):
                values, found = objective(logits, row), None
                if gradients:
                    (found,) = torch.autograd.grad(values.sum(), leaf, retain_graph=target < len(points))
                seen.append((point, values.detach().double(), found))
        # only now, so that a pass that ran out of memory between two targets shows no point twice
        for point, known, found in seen:
            see(point, known, found)

    def _merge_baselines(self, rows: Tensor, alphas: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the points that must be evaluated, and for each point the place of its own among them, (P,).

        Texts of equal length have one baseline: at alpha 0 rows with the same target share a point.
        """
        at_baseline = (alphas == 0).numpy()
        if not at_baseline.any():
            return np.arange(len(rows)), np.arange(len(rows))
        keys = np.where(at_baseline, -1 - self._twins[rows.numpy()], np.arange(len(rows)))
        return np.unique(keys, return_index=True, return_inverse=True)[1:]

    def _mark_twins(self, rows: Tensor, owners: NDArray[np.int64]) -> None:
        """Mark the rows of points whose own place belongs to a row that does not fit the memory."""
        lost = np.isin(rows.numpy()[owners], list(self.unfit))
        self.unfit.update(rows.numpy()[lost].tolist())

    @cached_property
    def _twins(self) -> NDArray[np.int64]:
        """The first row with the same baseline and target, (B,)."""
        inputs = self._inputs
        known = [torch.where(inputs.special, inputs.ids, -1), inputs.mask, self._targets[:, None]]
        if self._token_types is not None:
            known.append(self._token_types)
        told = torch.cat([each.long() for each in known], dim=1).cpu().numpy()
        _, first, twin_of = np.unique(told, axis=0, return_index=True, return_inverse=True)
        return first[twin_of]

    def _unknown(self, count: int) -> Tensor:
        return torch.full((count,), math.nan, dtype=torch.float64, device=self._inputs.x.device)

    def _target_logits(self, logits: Tensor, rows: Tensor) -> Tensor:
        values = logits.gather(1, self._targets[rows, None])[:, 0]
        return values if self._against is None else values - logits[:, self._against]

    def _line(self, rows: Tensor, alphas: Tensor) -> Place:
        """Return the places on the straight lines from baseline to x."""
        inputs = self._inputs

        def place(points: Tensor, length: int) -> Tensor:
            row, alpha = rows.to(points.device)[points], alphas.to(points.device)[points]
            x, baseline = inputs.x[row, :length], inputs.baseline[row, :length]
            # lerp gives both ends exactly; baseline + alpha (x - baseline) would miss x by a rounding
            return torch.lerp(baseline, x, alpha.to(x)[:, None, None])

        return place


def _share_points(
    windows: NDArray[np.int64], alphas: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Group the points that lie at one place, which differ in their target only.

    Args:
        windows: (P,) the window of each point.
        alphas: (P,).

    Returns:
        The points in the order of their places, where each place starts in that order, and its number of
        points.
    """
    order = np.lexsort((alphas, windows))
    moved = (np.diff(windows[order]) != 0) | (np.diff(alphas[order]) != 0)
    starts = np.concatenate(([0], np.flatnonzero(moved) + 1))
    return order, starts, np.diff(np.append(starts, len(order)))


def _fits_memory(compute: Callable[[NDArray[np.int64]], None], chunk: NDArray[np.int64]) -> bool:
    try:
        compute(chunk)
    except (torch.OutOfMemoryError, MemoryError):
        # the error holds the frames that hold the tensors: memory is free only after this block
        pass
    except RuntimeError as error:
        # torch has no class of its own for a CPU without memory
        if _NO_CPU_MEMORY not in str(error):
            raise
    else:
        return True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
