"""What runs in a Python worker: Arrow batches in, Arrow batches out.

Knows neither Spark nor MLflow: it is told its device, and can be tested on a bare machine. The models of a
worker are cached by digest, so that each is loaded once a process however many tasks it runs.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from lexplain.errors import DeviceError, DocumentError
from lexplain.model_store import fetch_model
from lexplain.words import segment

if TYPE_CHECKING:
    from lexplain.classifier import Classifier
    from lexplain.engine import Explainer, Explanation, Outcome

# Documents that are explained together: enough to sort by length and fill passes, few enough to stay in memory.
LOOK_AHEAD_DOCUMENTS = 256

# What a pass holds where the plan does not say: a CPU's caches are full early, a GPU idles on small passes.
_BUDGET_TOKENS = {"cpu": 2048, "cuda": 32_768}

WORD = pa.struct([("word", pa.string()), ("start", pa.int32()), ("end", pa.int32()), ("score", pa.float64())])
SPAN = pa.struct(
    [("start", pa.int32()), ("end", pa.int32()), ("words", pa.list_(pa.string())), ("score", pa.float64())]
)
EXPLANATIONS = pa.schema(
    [
        ("explain_key", pa.string()),
        ("corpus_key", pa.string()),
        ("increment", pa.int32()),
        ("bucket", pa.int32()),
        ("split", pa.int32()),
        ("doc_id", pa.string()),
        ("text_digest", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("method", pa.string()),
        ("label", pa.string()),
        ("label_rank", pa.int32()),
        ("target", pa.string()),
        ("probability", pa.float64()),
        ("is_gold", pa.bool_()),
        ("target_score", pa.float64()),
        ("baseline_score", pa.float64()),
        ("completeness_gap", pa.float64()),
        ("completeness_gap_relative", pa.float64()),
        ("evaluations", pa.int32()),
        ("accuracy", pa.string()),
        ("converged", pa.bool_()),
        ("token_norm", pa.float64()),
        ("n_tokens", pa.int32()),
        ("n_windows", pa.int32()),
        ("other_score", pa.float64()),
        ("words", pa.list_(WORD)),
        ("spans", pa.list_(SPAN)),
    ]
)
"""One row a (model, document, predicted label), in the column order of the `explanations` table."""


@dataclass(frozen=True)
class ModelTask:
    """One model of a task.

    Attributes:
        split: Number of the split, from 0.
        explain_key: Key of its explanations; None for the SQL function, which stores none.
        folder: Local path or storage URI that this node can read.
        digest: What `digest_folder` gave for it on the driver.
    """

    split: int
    explain_key: str | None
    folder: str
    digest: str


@dataclass(frozen=True)
class ExplainTask:
    """Everything a worker is told besides the documents. Pickled into the task: plain values only."""

    models: tuple[ModelTask, ...]
    method: str
    options: Mapping[str, object]
    max_tokens: int
    overlap: int
    max_windows: int | None
    max_characters: int
    merge: Literal["sum", "absmax"]
    budget_tokens: int | None
    threads: int
    models_in_memory: int
    allow_pickle: bool


class ModelCache:
    """The models a process holds, by (digest, device), the least recently used dropped first.

    Attributes:
        loads: How many loads there were; one a digest and device as long as the capacity suffices.
        budgets: Tokens x points that a pass was found to have memory for, by (digest, device), where memory ran out.
    """

    def __init__(self) -> None:
        self.budgets: dict[tuple[str, str], int] = {}
        self._held: OrderedDict[tuple[str, str], Classifier] = OrderedDict()
        self.loads = 0

    def load(self, model: ModelTask, device: str, *, capacity: int, allow_pickle: bool) -> Classifier:
        """Return the model, loaded from its folder unless it is held."""
        key = (model.digest, device)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        while len(self._held) >= capacity:
            self._held.popitem(last=False)
            _free_device_memory()
        from lexplain.classifier import Classifier

        classifier = Classifier.load(fetch_model(model.folder, model.digest), device=device, allow_pickle=allow_pickle)
        self.loads += 1
        self._held[key] = classifier
        return classifier


MODELS = ModelCache()


def choose_device(
    requested: Literal["auto", "cpu", "gpu"], addresses: Sequence[str], *, local_partition: int | None
) -> str:
    """Return the torch device of a task.

    Args:
        requested: What the plan says.
        addresses: GPU addresses that Spark assigned to the task.
        local_partition: Number of the task's partition where Spark assigns no GPUs (local mode); else None.

    Raises:
        DeviceError: A GPU was asked for or assigned, and there is none. Never silently the CPU.
    """
    if requested == "cpu":
        return "cpu"
    if addresses and not addresses[0].isdecimal():
        # A UUID (MIG) can only be chosen by the environment, and only before torch is imported; a worker that
        # Spark uses again finds its own choice there.
        if "torch" not in sys.modules:
            os.environ["CUDA_VISIBLE_DEVICES"] = addresses[0]
        if os.environ.get("CUDA_VISIBLE_DEVICES") == addresses[0]:
            addresses = ["0"]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if addresses:
        number = int(addresses[0]) if addresses[0].isdecimal() else -1
        if not 0 <= number < count:
            raise DeviceError(
                f"the task's GPU address {addresses[0]!r} is none of the {count} GPUs that torch sees here. The models "
                "would have run on another device. Check the discovery script and the CUDA build of torch."
            )
        return f"cuda:{number}"
    if count and local_partition is not None:
        return f"cuda:{local_partition % count}"
    if requested == "gpu":
        raise DeviceError(
            f"execution.device='gpu', but Spark assigned none to the task and torch sees {count} here. The models would "
            "have run on the CPU, many times slower. Set spark.executor.resource.gpu.amount, its discoveryScript and "
            "spark.task.resource.gpu.amount; or write device: cpu."
        )
    return "cpu"


def describe_device(device: str) -> str:
    """Return a torch device by the name that people know: `cpu`, or the GPU's."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def decode_document(data: bytes | str | None, max_characters: int) -> str:
    """Return a document's text.

    Raises:
        DocumentError: `null_text`, `invalid_utf8`, `empty_text` or `too_long`.
    """
    if data is None:
        raise DocumentError("null_text", "the text is null")
    if isinstance(data, bytes):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DocumentError(
                "invalid_utf8", f"byte {error.start} of {len(data)} starts no UTF-8 character"
            ) from error
    else:
        text = data
    if not text.strip():
        raise DocumentError("empty_text", "the text is empty, or white space only")
    if len(text) > max_characters:
        raise DocumentError("too_long", f"{len(text)} characters are more than text.max_characters={max_characters}")
    return text


def explain_texts(
    texts: Sequence[bytes | str | None], task: ExplainTask, model: ModelTask, device: str
) -> list[Outcome]:
    """Return one outcome a text, in their order; what cannot be explained is a Rejection."""
    from lexplain.engine import Rejection

    outcomes: list[Outcome | None] = []
    readable: list[str] = []
    for data in texts:
        try:
            readable.append(decode_document(data, task.max_characters))
            outcomes.append(None)
        except DocumentError as error:
            outcomes.append(Rejection(error.reason, error.message))
    explained = iter(_explain(readable, task, model, device) if readable else [])
    return [next(explained) if outcome is None else outcome for outcome in outcomes]


def open_explainer(task: ExplainTask, model: ModelTask, device: str) -> Explainer:
    """Return what explains with a model, loaded unless this process holds it.

    Raises:
        ModelError: The model cannot be fetched, loaded or explained as the task says.
    """
    import torch

    from lexplain.engine import Explainer
    from lexplain.methods import find_method

    _quieten_libraries()
    torch.set_num_threads(task.threads)
    budget_tokens = task.budget_tokens or _BUDGET_TOKENS[device.partition(":")[0]]
    return Explainer(
        MODELS.load(model, device, capacity=task.models_in_memory, allow_pickle=task.allow_pickle),
        find_method(task.method),
        task.options,
        max_tokens=task.max_tokens,
        overlap=task.overlap,
        max_windows=task.max_windows,
        merge=task.merge,
        budget_tokens=min(budget_tokens, MODELS.budgets.get((model.digest, device), budget_tokens)),
    )


def _explain(texts: Sequence[str], task: ExplainTask, model: ModelTask, device: str) -> list[Outcome]:
    explainer = open_explainer(task, model, device)
    before = explainer.budget_tokens
    outcomes = explainer.explain(texts)
    if explainer.budget_tokens < before:
        MODELS.budgets[model.digest, device] = explainer.budget_tokens
    return outcomes


def explain_batches(batches: Iterator[pa.RecordBatch], task: ExplainTask, device: str) -> Iterator[pa.RecordBatch]:
    """Explain documents with each model that must: the attribution stage's task.

    Args:
        batches: Columns corpus_key, increment, bucket, doc_id, text BINARY, text_digest, labels, `defect`, the reason to
            reject it, and `splits`, the numbers of the models that explain the document; in a fixed order.
        task: Models, method and options.
        device: As `choose_device` returns it.

    Yields:
        Batches of `EXPLANATIONS`: for each document and model one row a predicted label, or one that says why not.

    Raises:
        ModelError: A model cannot be fetched or loaded.
    """
    waiting: list[dict[str, Any]] = []
    for batch in batches:
        waiting += batch.to_pylist()
        while len(waiting) >= LOOK_AHEAD_DOCUMENTS:
            yield from _explain_window(waiting[:LOOK_AHEAD_DOCUMENTS], task, device)
            del waiting[:LOOK_AHEAD_DOCUMENTS]
    if waiting:
        yield from _explain_window(waiting, task, device)


def _explain_window(documents: list[dict[str, Any]], task: ExplainTask, device: str) -> Iterator[pa.RecordBatch]:
    from lexplain.engine import Rejection

    for model in task.models:
        owed = [document for document in documents if model.split in document["splits"]]
        if not owed:
            continue
        sound = [document for document in owed if document["defect"] is None]
        explained = iter(explain_texts([document["text"] for document in sound], task, model, device))
        rows: list[dict[str, Any]] = []
        for document in owed:
            defect = document["defect"]
            outcome = next(explained) if defect is None else Rejection(defect, "the source's row is no document")
            rows += _rows(document, outcome, task, model)
        yield pa.RecordBatch.from_pylist(rows, schema=EXPLANATIONS)


def _rows(document: dict[str, Any], outcome: Outcome, task: ExplainTask, model: ModelTask) -> list[dict[str, Any]]:
    row = {name: document[name] for name in ("corpus_key", "increment", "bucket", "doc_id", "text_digest")}
    row |= {"explain_key": model.explain_key, "split": model.split, "method": task.method, "label_rank": 0}
    if not isinstance(outcome, list):
        return [row | {"status": "rejected", "reason": outcome.reason}]
    if not outcome:
        return [row | {"status": "no_label"}]
    gold = document["labels"]
    return [
        row
        | _explanation_columns(explanation)
        | {"status": "explained", "label_rank": rank, "is_gold": None if gold is None else explanation.label in gold}
        for rank, explanation in enumerate(outcome)
    ]


def _explanation_columns(explanation: Explanation) -> dict[str, Any]:
    copied = (
        "label", "probability", "target_score", "baseline_score", "completeness_gap", "completeness_gap_relative",
        "evaluations", "converged", "token_norm", "n_tokens", "n_windows", "other_score",
    )  # fmt: skip
    columns = {name: getattr(explanation, name) for name in copied}
    return columns | {"target": "logit", "accuracy": "document", "words": word_rows(explanation)}


def word_rows(explanation: Explanation) -> list[dict[str, Any]]:
    """Return an explanation's words as rows of `WORD`, by descending score."""
    return [
        {"word": word.key, "start": word.start, "end": word.end, "score": score} for word, score in explanation.words
    ]


def add_word_keys(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Fill the column `words` of labelled documents with their distinct word keys; empty for unreadable texts."""
    for batch in batches:
        keys = [
            _word_keys(text) if labels else None
            for text, labels in zip(batch["text"].to_pylist(), batch["labels"].to_pylist(), strict=True)
        ]
        place = batch.schema.get_field_index("words")
        yield batch.set_column(place, batch.schema.field(place), pa.array(keys, pa.list_(pa.string())))


def _word_keys(data: bytes | None) -> list[str]:
    try:
        return sorted({word.key for word in segment(decode_document(data, sys.maxsize))})
    except DocumentError:
        return []


def _free_device_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _quieten_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
