"""Anchors of discretized paths: the words that lie on the way from a word of the vocabulary to the baseline word.

They depend on the word embeddings and on the rule alone, never on a text, so each word's are searched once.

Shape letters: V words of the vocabulary, D embedding, n words asked for, m anchors a word, C candidates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn

from lexplain.prepared_files import open_prepared, write_prepared

Strategy = Literal["greedy", "maxcount"]

# Approximate distances to look at together; numbers of candidates' embeddings to look at together, which a cache holds.
_BLOCK_DISTANCES = 2**23
_BLOCK_NUMBERS = 2**19


@dataclass(frozen=True, slots=True)
class AnchorRule:
    """What a word's anchors depend on, besides the word embeddings.

    Attributes:
        baseline_id: The word where each path ends.
        steps: m, anchors a path.
        neighbours: Candidates for each anchor: so many nearest words by Euclidean distance.
        strategy: `greedy`: the candidate that moves least to become monotone. `maxcount`: the one with most
            dimensions between the anchor before and the baseline.
        uniform: Candidates are the words next to equally spaced points of the straight line (UDIG); False: the words
            next to the anchor before (DIG).
    """

    baseline_id: int
    steps: int
    neighbours: int
    strategy: Strategy
    uniform: bool


@dataclass(frozen=True, eq=False, slots=True)
class Anchors:
    """A table of paths, made once for a vocabulary and read by every task.

    Attributes:
        rule: What they follow.
        token_ids: (n,) int32, ascending.
        anchors: (n, m) int32, from the word's side to the baseline's.
    """

    rule: AnchorRule
    token_ids: NDArray[np.int32]
    anchors: NDArray[np.int32]

    def save(self, folder: Path) -> Path:
        """Write the table into `folder` under the digest of its content; return the file."""
        tensors = {"token_ids": np.ascontiguousarray(self.token_ids), "anchors": np.ascontiguousarray(self.anchors)}
        data = save(tensors, {"rule": json.dumps(asdict(self.rule), sort_keys=True)})
        return write_prepared(data, folder, "anchors")

    @classmethod
    def load(cls, path: str) -> Anchors:
        """Read a table; once a process.

        Raises:
            MethodError: The file cannot be read.
        """
        return _load(path)


# a worker opens the same file for every batch; a table has megabytes
@lru_cache(maxsize=8)
def _load(path: str) -> Anchors:
    with open_prepared(path, "np") as file:
        rule = AnchorRule(**json.loads(file.metadata()["rule"]))
        return Anchors(rule, file.get_tensor("token_ids"), file.get_tensor("anchors"))


def read_vocabulary(model: nn.Module) -> Tensor:
    """Return the word embeddings of a model as its first layer gives them, (V, D).

    Some layers scale their rows, so the layer is asked, not its weight. Where the layers above are wider (ALBERT,
    ELECTRA), D is that of the embeddings, as everywhere.
    """
    layer = _embedding_layer(model)
    with torch.no_grad():
        embeddings: Tensor = layer(torch.arange(layer.num_embeddings, device=layer.weight.device))
    return embeddings


def digest_vocabulary(model: nn.Module) -> str:
    """Return the SHA-256 of a model's word embeddings: models that share them share their paths."""
    vocabulary = read_vocabulary(model).float().cpu().contiguous()
    digest = hashlib.sha256(repr(tuple(vocabulary.shape)).encode())
    digest.update(vocabulary.numpy().tobytes())
    return digest.hexdigest()


def _embedding_layer(model: nn.Module) -> nn.Embedding:
    return cast(nn.Embedding, cast(Callable[[], nn.Module], model.get_input_embeddings)())


def monotonize(end: Tensor, point: Tensor, word: Tensor, steps: int) -> Tensor:
    """Return the next point of a path: `word` where it lies between `point` and `end`, elsewhere a step towards `end`.

    Args:
        end: Where the path ends.
        point: Where it is.
        word: Embedding of the next anchor.
        steps: The step is 1/steps of what is left.
    """
    towards = torch.lerp(point, end, 1 / steps)
    return torch.where(torch.clamp(word, torch.minimum(point, end), torch.maximum(point, end)) == word, word, towards)


_FINDERS: WeakKeyDictionary[nn.Module, dict[AnchorRule, AnchorFinder]] = WeakKeyDictionary()


def open_finder(model: nn.Module, rule: AnchorRule, table: Anchors | None = None) -> AnchorFinder:
    """Return what finds paths in a model's vocabulary; a process has one for each model and rule.

    Args:
        model: The network.
        rule: What paths follow.
        table: Paths that are known; of another rule, they are not taken.
    """
    layer = _embedding_layer(model)
    finders = _FINDERS.setdefault(layer, {})
    if rule not in finders:
        finders[rule] = AnchorFinder(rule, layer.num_embeddings)
    if table is not None and table.rule == rule:
        finders[rule].add(table)
    return finders[rule]


class AnchorFinder:
    """Paths of one vocabulary: those that were searched are remembered."""

    def __init__(self, rule: AnchorRule, n_words: int) -> None:
        self._rule = rule
        self._paths = np.zeros((n_words, rule.steps), dtype=np.int32)  # pages that are not written take no memory
        self._known = np.zeros(n_words, dtype=bool)
        # special tokens are looked up as the baseline word, which no table holds, and whose path stays where it is
        self._paths[rule.baseline_id], self._known[rule.baseline_id] = rule.baseline_id, True
        # DIG: a word's candidates, best first. All paths through a word choose among them; the m best are enough, as
        # at most m - 1 of them are on the path already.
        self._ranked = np.zeros((0, 0), dtype=np.int32)
        self._is_ranked = np.zeros(n_words, dtype=bool)
        self._table: Anchors | None = None

    def add(self, table: Anchors) -> None:
        """Take paths that are known."""
        if table is not self._table:
            self._paths[table.token_ids] = table.anchors
            self._known[table.token_ids] = True
            self._table = table

    def find(self, token_ids: NDArray[np.int64], vocabulary: Callable[[], Tensor]) -> NDArray[np.int32]:
        """Return the anchors of words, (n, m), from the word's side to the baseline's.

        Where no candidate is left the path goes to the baseline word and stays. Special tokens are words like any
        other, as published: paths may pass through them. No path passes through a word whose embedding is NaN or
        infinite; its own goes to the baseline word at once.

        Args:
            token_ids: (n,), in any order.
            vocabulary: Returns the word embeddings, (V, D); asked only where some path is not known.

        Note:
            Runs on: executor, on the device of the embeddings. Cost: nothing for what is known. DIG: one product of
            (V, D) with each word that any path meets, and its neighbours' embeddings. UDIG: the same, m times the
            neighbours, for each new word. Exact: distances are rounded only to choose whom to look at closely.
        """
        lacking = np.unique(token_ids[~self._known[token_ids]])
        if len(lacking):
            words = _Words(vocabulary(), self._rule)
            able = words.have_paths(lacking)
            self._paths[lacking[~able]] = self._rule.baseline_id
            if able.any():
                walked = lacking[able]
                self._paths[walked] = words.walk(walked) if self._rule.uniform else self._walk(walked, words)
            self._known[lacking] = True
        return self._paths[token_ids]

    def _walk(self, token_ids: NDArray[np.int64], words: _Words) -> NDArray[np.int32]:
        """Take hop after hop from the best candidate of a word to the best of that."""
        steps, baseline = self._rule.steps, self._rule.baseline_id
        path = np.empty((len(token_ids), steps + 1), dtype=np.int64)
        path[:, 0] = token_ids
        for hop in range(steps):
            current = path[:, hop]
            met = np.unique(current[current != baseline])
            self._rank(met[~self._is_ranked[met]], words)
            path[:, hop + 1] = baseline
            open_paths = np.flatnonzero(current != baseline)
            for place in range(self._ranked.shape[1]):
                candidate = self._ranked[current[open_paths], place]
                path[open_paths, hop + 1] = np.where(candidate < 0, baseline, candidate)
                used = (path[open_paths, : hop + 1] == candidate[:, None]).any(1)
                open_paths = open_paths[used & (candidate >= 0)]
                if not len(open_paths):
                    break
            path[open_paths, hop + 1] = baseline  # all of its candidates are on the path already
        return path[:, 1:].astype(np.int32)

    def _rank(self, token_ids: NDArray[np.int64], words: _Words) -> None:
        if not len(token_ids):
            return
        if not self._ranked.size:
            self._ranked = np.empty((len(self._known), min(self._rule.steps, words.count)), dtype=np.int32)
        for start in range(0, len(token_ids), words.together):
            part = token_ids[start : start + words.together]
            self._ranked[part] = words.rank_neighbours(part)[:, : self._ranked.shape[1]]
        self._is_ranked[token_ids] = True


class _Words:
    """The vocabulary during one search.

    Attributes:
        count: Candidates of an anchor.
        together: Words whose distances to all words are computed together.
    """

    def __init__(self, vocabulary: Tensor, rule: AnchorRule) -> None:
        self._rule = rule
        self._embeddings = vocabulary
        self._rough = vocabulary.float()
        self._norms = self._rough.square().sum(-1)
        self._finite = self._norms.isfinite()
        (size, width), finite = vocabulary.shape, int(self._finite.sum())
        if finite < size:  # such words are infinitely far from all: 0 in products, as NaN would spread
            self._rough = self._rough.masked_fill(~self._finite[:, None], 0.0)
            self._norms = self._norms.masked_fill(~self._finite, torch.inf)
        # a word is no neighbour of its own, but may be of a point
        self._others = finite if rule.uniform else finite - 1
        self.count = min(rule.neighbours, self._others)
        self.together = max(1, _BLOCK_DISTANCES // size)
        # twice the bound of a float32 dot product's error, for both of the distances that are compared
        self._rounding = float(self._norms[self._finite].max()) * (width + 8) * 2.0**-22 if finite else 0.0
        self._end = vocabulary[rule.baseline_id].double()

    def have_paths(self, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell between which words and the baseline word distances are finite, (n,)."""
        finite: NDArray[np.bool_] = self._finite.cpu().numpy()
        found: NDArray[np.bool_] = finite[token_ids] & finite[self._rule.baseline_id]
        return found

    def rank_neighbours(self, token_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the neighbours of words, best next anchor first, (n, count); -1 for the baseline word."""
        ids = torch.from_numpy(token_ids).to(self._embeddings.device)
        distances = torch.addmm(self._norms, self._rough[ids], self._rough.T, alpha=-2)
        distances[torch.arange(len(ids)), ids] = torch.inf
        own = self._embeddings[ids].double()
        ranked = self._order(self._choose(distances), own, own)
        return ranked.cpu().numpy().astype(np.int32)

    def walk(self, token_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the UDIG anchors of words, (n, m): at each point of the line the best word next to it."""
        found = [
            self._walk(torch.from_numpy(token_ids[start : start + self.together]).to(self._embeddings.device))
            for start in range(0, len(token_ids), self.together)
        ]
        return torch.cat(found).cpu().numpy().astype(np.int32)

    def _walk(self, ids: Tensor) -> Tensor:
        steps, baseline = self._rule.steps, self._rule.baseline_id
        start = self._embeddings[ids].double()
        # a point's distances are a mixture of those of the line's ends: one product serves all points
        from_start, from_end = self._rough[ids] @ self._rough.T, self._rough @ self._rough[baseline]
        path = torch.empty((len(ids), steps + 1), dtype=torch.long, device=ids.device)
        path[:, 0] = ids
        for hop in range(steps):
            share = (steps - hop) / (steps + 1)
            points = self._end + share * (start - self._end)
            distances = self._norms - 2 * (share * from_start + (1 - share) * from_end)
            current = self._embeddings[path[:, hop]].double()
            ranked = self._order(self._choose(distances), points, current)
            unused = (ranked[:, :, None] != path[:, None, : hop + 1]).all(-1) & (ranked >= 0)
            first = unused.byte().argmax(1)
            chosen = ranked.gather(1, first[:, None])[:, 0]
            stays = ~unused.any(1) | (path[:, hop] == baseline)
            path[:, hop + 1] = torch.where(stays, baseline, chosen)
        return path[:, 1:]

    def _choose(self, distances: Tensor) -> Tensor:
        """Return the words that may be among the nearest, (n, C), by id; `distances` (n, V) are rounded."""
        wanted, most = self.count, self._others
        slack = 8 + wanted // 8  # those that rounding might have kept out
        while True:
            size = min(wanted + slack, most)
            nearest = distances.topk(size, largest=False)
            beyond = nearest.values[:, -1] - nearest.values[:, wanted - 1]
            if size == most or bool((beyond > self._rounding).all()):
                return nearest.indices.sort(dim=1).values
            slack *= 2  # words at almost or exactly the same distance: some vocabularies repeat rows

    def _order(self, candidates: Tensor, points: Tensor, current: Tensor) -> Tensor:
        """Return the nearest candidates, best next anchor first, (n, count); -1, at the end, for the baseline word.

        Equally good ones come by distance to the point, equally distant ones by id.

        Args:
            candidates: (n, C), each row ascending.
            points: (n, D) float64, whom candidates must be near to.
            current: (n, D) float64, the anchor before.
        """
        together = max(1, _BLOCK_NUMBERS // (candidates.shape[1] * points.shape[1]))
        parts = [slice(start, start + together) for start in range(0, len(points), together)]
        return torch.cat([self._order_some(candidates[part], points[part], current[part]) for part in parts])

    def _order_some(self, candidates: Tensor, points: Tensor, current: Tensor) -> Tensor:
        words = self._embeddings[candidates].double()  # (n, C, D)
        distances = (words - points[:, None]).square_().sum(-1)
        nearest = distances.sort(dim=1, stable=True).indices[:, : self.count]
        low, high = torch.minimum(current, self._end)[:, None], torch.maximum(current, self._end)[:, None]
        beyond = torch.clamp(words, low, high).ne_(words)  # 1.0 in the dimensions that are not monotone
        if self._rule.strategy == "maxcount":
            costs = beyond.sum(-1)
        else:
            moved = current - (current - self._end) / self._rule.steps
            costs = words.sub_(moved[:, None]).mul_(beyond).square_().sum(-1)
        ids = candidates.masked_fill(candidates == self._rule.baseline_id, -1).gather(1, nearest)
        costs = costs.gather(1, nearest).masked_fill_(ids < 0, torch.inf)
        return ids.gather(1, costs.sort(dim=1, stable=True).indices)
