"""Reference documents: what a model makes of them, and which of them it sees as near to a text.

Torch only; made by `lexplain.preparation`, read by methods. Shape letters: N references, H hidden size, T content tokens
of a reference, K those of all, B rows, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lexplain.errors import MethodError
from lexplain.prepared_files import open_prepared, write_prepared

if TYPE_CHECKING:
    from torch import Tensor

PRECISION_AT = 10
"""Neighbours that a layer is judged by."""

# Pairs of references whose distances stand for those of all; always the same ones.
_SAMPLED_PAIRS = 10_000

# References beyond those asked for whose distances are computed exactly: the fast ones may swap near equals.
_SPARE = 16

_TENSORS = ("vectors", "texts", "labels", "foremost", "offsets", "ids", "words", "scores", "distances")


@dataclass(frozen=True, eq=False, slots=True)
class Reference:
    """A (document, predicted label) pair; of the document its first window.

    Attributes:
        text: Hash of the text, as `lexplain.methods.Identity` has it.
        label: Number of the label.
        foremost: It is the document's most probable label.
        vectors: (1, H) mean of a hidden layer over the window's tokens; (L + 1, H) where a layer is still to be chosen.
        ids: (T,) token ids, content only.
        words: (T,) hashes of words, as `lexplain.methods.Identity` has them.
        scores: (T,) base scores of the label.
    """

    text: int
    label: int
    foremost: bool
    vectors: NDArray[np.float32]
    ids: NDArray[np.int64]
    words: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class ReferenceIndex:
    """References of one model, searched exactly. CPU tensors.

    Attributes:
        layer: Hidden layer that the vectors are of.
        vectors: (N, H) float32.
        texts: (N,) long.
        labels: (N,) long.
        foremost: (N,) bool.
        offsets: (N + 1,) long: the tokens of reference n are those from offsets[n] to offsets[n + 1].
        ids: (K,) long.
        words: (K,) long.
        scores: (K,) float32.
        distances: Ascending: those of sampled pairs of documents; none where there is one document only.
    """

    layer: int
    vectors: Tensor
    texts: Tensor
    labels: Tensor
    foremost: Tensor
    offsets: Tensor
    ids: Tensor
    words: Tensor
    scores: Tensor
    distances: Tensor

    @classmethod
    def build(cls, references: Sequence[Reference], layer: int) -> ReferenceIndex:
        """Return the index of references, numbered in their order.

        Raises:
            MethodError: There are none.
        """
        import torch

        if not references:
            raise MethodError(
                "references=0 documents are too few to find neighbours among. Every text would have had its base scores "
                "alone. Write training documents, or a corpus, whose texts the model gives a label."
            )
        vectors = torch.from_numpy(np.concatenate([each.vectors for each in references]))
        foremost = torch.tensor([each.foremost for each in references])
        sizes = torch.tensor([0, *(len(each.ids) for each in references)])
        return cls(
            layer=layer,
            vectors=vectors,
            texts=torch.tensor([each.text for each in references]),
            labels=torch.tensor([each.label for each in references]),
            foremost=foremost,
            offsets=sizes.cumsum(0),
            ids=torch.from_numpy(np.concatenate([each.ids for each in references])),
            words=torch.from_numpy(np.concatenate([each.words for each in references])),
            scores=torch.from_numpy(np.concatenate([each.scores for each in references])),
            distances=_sample_distances(vectors[foremost]),
        )

    def save(self, folder: Path) -> Path:
        """Write it into `folder` under the digest of its content; return the file."""
        from safetensors.torch import save

        tensors = {name: getattr(self, name) for name in _TENSORS}
        return write_prepared(save(tensors, {"layer": str(self.layer)}), folder, "neighbours")

    @classmethod
    def load(cls, path: str | Path) -> ReferenceIndex:
        """Return what `save` wrote; processes of one machine share its pages.

        Raises:
            MethodError: It cannot be read.
        """
        with open_prepared(path, "pt") as file:
            layer = int(file.metadata()["layer"])
            return cls(layer, **{name: file.get_tensor(name) for name in _TENSORS})

    def cut_off(self, quantile: float) -> float:
        """Return the distance below which a share of all pairs of documents lies; 1 cuts nothing off."""
        if quantile == 1 or not len(self.distances):
            return float("inf")
        return float(self.distances.double().quantile(quantile))

    def search(
        self, vectors: Tensor, *, texts: Tensor, labels: Tensor | None, count: int, within: float
    ) -> list[Tensor]:
        """Return the nearest references of each row, nearest first, equal distances by number.

        Args:
            vectors: (B, H).
            texts: (B,) long; a row's own text is none of its neighbours. -1: none is left out.
            labels: (B,) long: only references of the row's label. None: each document by its most probable label.
            count: Neighbours a row at most.
            within: Neighbours are nearer than this, in L2.

        Returns:
            Their numbers, (0 to count,) long, for each row; none for a row whose vector is not finite.

        Note:
            Runs on: executor, on the CPU in float64. Cost: B N H multiplications.
        """
        import torch

        queries, references = vectors.detach().double().cpu(), self.vectors.double()
        fast = torch.cdist(queries, references)
        found = []
        for row, query in enumerate(queries):
            allowed = self.foremost if labels is None else self.labels == labels[row]
            allowed = allowed & (self.texts != texts[row])
            rough = fast[row].masked_fill(~allowed, torch.inf)
            near = rough.topk(min(count + _SPARE, len(rough)), largest=False).indices.sort().values
            exact = (references[near] - query).square().sum(-1).sqrt()
            kept = allowed[near] & (exact < within)  # not so for a vector that is not finite
            near, exact = near[kept], exact[kept]
            found.append(near[exact.sort(stable=True).indices[:count]])
        return found


def choose_layer(vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[int, list[float]]:
    """Return the hidden layer whose nearest neighbours are most often of a document's own class.

    Args:
        vectors: (N, L + 1, H): layer 0, which is what the first is given, is no candidate.
        labels: (N,).

    Returns:
        The layer, and the precision at 10 of layers 1 to L; equal ones: the lower layer. The middle layer where there
        is one class only, as of a regression, or one document.

    Note:
        Source: Zhang et al. 2022, eq. 8.
    """
    import torch

    layers = vectors.shape[1] - 1
    if len(np.unique(labels)) < 2:
        return (layers + 1) // 2, [1.0] * layers
    classes, count = torch.from_numpy(labels), min(PRECISION_AT, len(labels) - 1)
    precisions = []
    for layer in range(1, layers + 1):
        states = torch.from_numpy(vectors[:, layer]).double()
        distances = torch.cdist(states, states).fill_diagonal_(torch.inf)
        near = distances.sort(dim=1, stable=True).indices[:, :count]
        precisions.append(float((classes[near] == classes[:, None]).double().mean()))
    return 1 + int(np.argmax(precisions)), precisions


def _sample_distances(vectors: Tensor) -> Tensor:
    """Return the distances of random pairs of different documents, ascending."""
    import torch

    count = len(vectors)
    if count < 2:
        return torch.empty(0)
    random = np.random.default_rng(0)
    first = random.integers(count, size=_SAMPLED_PAIRS)
    second = (first + 1 + random.integers(count - 1, size=_SAMPLED_PAIRS)) % count
    distances = [
        (vectors[one].double() - vectors[other].double()).square().sum(-1).sqrt()
        for one, other in zip(*(torch.split(torch.from_numpy(each), 1000) for each in (first, second)), strict=True)
    ]
    return torch.cat(distances).sort().values.float()
