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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from lexplain.errors import DeviceError, DocumentError
from lexplain.explanation import Explanation, Outcome, Rejection, Settled
from lexplain.model_store import fetch_model
from lexplain.words import segment

if TYPE_CHECKING:
    from lexplain.classifier import Classifier
    from lexplain.engine import Documents, Explainer
    from lexplain.neighbours import ReferenceIndex

# Documents that are explained together: enough to sort by length and fill passes, few enough to stay in memory.
LOOK_AHEAD_DOCUMENTS = 256

# A task that has nothing to yield for so long gives a sign of life, provided that its model gets on.
SIGN_SECONDS = 5.0

# Past so many times as many, copies of one text no longer keep a look-ahead together.
_COPIES = 4

# What a pass holds where the plan does not say: a CPU's caches are full early, a GPU idles on small passes.
_BUDGET_TOKENS = {"cpu": 2048, "cuda": 32_768}

Precision = Literal["float32", "bfloat16"]

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
        prepared: What `lexplain.preparation` made for it, as its kind says; None for nothing.
    """

    split: int
    explain_key: str | None
    folder: str
    digest: str
    prepared: str | None = None


@dataclass(frozen=True)
class ExplainTask:
    """Everything a worker is told besides the documents. Pickled into the task: plain values only."""

    models: tuple[ModelTask, ...]
    method: str
    options: Mapping[str, object]
    precision: Precision
    top_k: int | None
    gold: bool
    against: str | None
    max_tokens: int
    overlap: int
    max_windows: int | None
    max_characters: int
    merge: Literal["sum", "absmax"]
    budget_tokens: int | None
    threads: int
    models_in_memory: int
    allow_pickle: bool
    compile: bool
    settled: tuple[str, ...] = ()

    @property
    def accuracy(self) -> Literal["document", "keywords"]:
        """Whether each explanation stands for itself, or only many of them together do."""
        calibrated = self.method.startswith("integrated_gradients.") and self.options.get("rule") == "calibrated"
        return "keywords" if calibrated else "document"


class ModelCache:
    """The models a process holds, by (digest, device, precision), the least recently used dropped first.

    Attributes:
        loads: How many loads there were; one a key as long as the capacity suffices.
        budgets: Tokens x points that a pass was found to have memory for, by the same key, where memory ran out.
    """

    def __init__(self) -> None:
        self.budgets: dict[tuple[str, str, str], int] = {}
        self._held: OrderedDict[tuple[str, str, str], Classifier] = OrderedDict()
        self.loads = 0

    def load(self, model: ModelTask, task: ExplainTask, device: str) -> Classifier:
        """Return the model, loaded from its folder unless it is held."""
        import torch

        key = (model.digest, device, task.precision)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        while len(self._held) >= task.models_in_memory:
            self._held.popitem(last=False)
            _free_device_memory()
        from lexplain.classifier import Classifier

        classifier = Classifier.load(
            fetch_model(model.folder, model.digest), device=device, dtype=getattr(torch, task.precision),
            allow_pickle=task.allow_pickle,
        )  # fmt: skip
        if task.compile:
            classifier.model.compile(dynamic=True)
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


def choose_budget(device: str) -> int:
    """Return how many tokens x points a pass holds on a torch device where nobody says."""
    return _BUDGET_TOKENS[device.partition(":")[0]]


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
    explainer = open_explainer(task, model, device)
    read = _read([(text, ()) for text in texts], task, explainer)
    return _explain(read, task, model, explainer, device)


def _read(
    documents: Sequence[tuple[bytes | str | Rejection | None, Sequence[str]]], task: ExplainTask, explainer: Explainer
) -> tuple[list[Rejection | None], Documents]:
    """Decode, segment and tokenize texts, each with labels to explain besides those that will be predicted.

    Returns:
        Why texts were unreadable, None for those that were not; and these.
    """
    unreadable: list[Rejection | None] = []
    readable: list[str] = []
    asked: list[Sequence[str]] = []
    for data, labels in documents:
        if isinstance(data, Rejection):
            unreadable.append(data)
            continue
        try:
            readable.append(decode_document(data, task.max_characters))
            asked.append(labels)
            unreadable.append(None)
        except DocumentError as error:
            unreadable.append(Rejection(error.reason, error.message))
    return unreadable, explainer.read_texts(readable, asked)


def _explain(
    read: tuple[list[Rejection | None], Documents], task: ExplainTask, model: ModelTask, explainer: Explainer, device: str
) -> list[Outcome]:  # fmt: skip
    import torch

    unreadable, documents = read
    key = (model.digest, device, task.precision)
    # Memory may have run out since the explainer was opened: its texts were read while others were explained.
    explainer.limit_budget(MODELS.budgets.get(key, sys.maxsize))
    before = explainer.budget_tokens
    # Several targets go backward through one forward part; compiled code would free it after the first. Said here: torch
    # keeps such settings by thread.
    with torch._functorch.config.patch(donated_buffer=False):
        explained = iter(explainer.explain_documents(documents))
    if explainer.budget_tokens < before:
        MODELS.budgets[key] = explainer.budget_tokens
    return [next(explained) if rejection is None else rejection for rejection in unreadable]


def open_explainer(task: ExplainTask, model: ModelTask, device: str) -> Explainer:
    """Return what explains with a model, loaded unless this process holds it.

    Raises:
        ModelError: The model cannot be fetched, loaded or explained as the task says.
    """
    from lexplain.engine import Explainer
    from lexplain.methods import find_method

    return Explainer(
        open_model(task, model, device),
        find_method(task.method),
        task.options,
        max_tokens=task.max_tokens,
        overlap=task.overlap,
        max_windows=task.max_windows,
        merge=task.merge,
        budget_tokens=task.budget_tokens or choose_budget(device),
        top_k=task.top_k,
        against=task.against,
        settled=frozenset(task.settled),
        prepared=_open_prepared(task, model),
    )


def open_model(task: ExplainTask, model: ModelTask, device: str) -> Classifier:
    """Return a model, loaded unless this process holds it.

    Raises:
        ModelError: It cannot be fetched or loaded.
    """
    import torch

    _quieten_libraries()
    torch.set_num_threads(task.threads)
    # A GPU's convolutions would round float32 to 10 bits; its matrix products do not.
    torch.backends.cudnn.allow_tf32 = False
    return MODELS.load(model, task, device)


def _open_prepared(task: ExplainTask, model: ModelTask) -> object:
    """Return what was prepared for a model as its method takes it; None where nothing was."""
    from lexplain.methods import find_method

    if model.prepared is None:
        return None
    kind = find_method(task.method).prepares(task.options)
    if kind == "neighbours":
        return _load_index(model.prepared)
    if kind == "anchors":
        from lexplain.anchors import Anchors

        return Anchors.load(model.prepared)
    if kind == "calibration":
        from lexplain.calibration import Calibration

        return Calibration.from_json(model.prepared)
    return None


@lru_cache(maxsize=16)
def _load_index(path: str) -> ReferenceIndex:
    """Return the index in a file, which is written once and never changes."""
    from lexplain.neighbours import ReferenceIndex

    return ReferenceIndex.load(path)


def explain_batches(batches: Iterator[pa.RecordBatch], task: ExplainTask, device: str) -> Iterator[pa.RecordBatch]:
    """Explain documents with each model that must: the attribution stage's task.

    Args:
        batches: Columns corpus_key, increment, bucket, doc_id, text BINARY, text_digest, labels, `defect`, the reason to
            reject it, and `splits`, the numbers of the models that explain the document; in a fixed order.
        task: Models, method and options.
        device: As `choose_device` returns it.

    Yields:
        Batches of `EXPLANATIONS`: for each document and model one row a predicted label, or one that says why not.
        An empty one is a sign of life: since the last batch, the model has made another pass. Who watches the task may
        stop it when it gives none for longer than a model takes to load, and a pass.

    Raises:
        ModelError: A model cannot be fetched or loaded.
    """
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as beside:
        under_way: _Job | None = None
        for documents, model in _pair(batches, task):
            explainer, classifier = open_explainer(task, model, device), open_model(task, model, device)
            read = ahead.submit(_read, _texts(documents, task), task, explainer)
            job = _Job(documents, model, explainer, classifier, read)
            if under_way is not None:
                yield from _finish(under_way, task, device, beside)
            under_way = job
        if under_way is not None:
            yield from _finish(under_way, task, device, beside)


def read_batches(
    batches: Iterator[pa.RecordBatch], task: ExplainTask, device: str
) -> Iterator[tuple[ModelTask, Explainer, Documents]]:
    """Read documents as their explanation will see them.

    Args:
        batches: As `explain_batches` takes them.
        task: Models and windows.
        device: As `choose_device` returns it.

    Yields:
        Some documents at a time with each model that owes them, without those that cannot be read.
    """
    for documents, model in _pair(batches, task):
        explainer = open_explainer(task, model, device)
        yield model, explainer, _read(_texts(documents, task), task, explainer)[1]


@dataclass(frozen=True)
class _Job:
    """Documents of one model whose texts are being read while the job before computes."""

    documents: list[dict[str, Any]]
    model: ModelTask
    explainer: Explainer
    classifier: Classifier
    read: Future[tuple[list[Rejection | None], Documents]]


def _pair(batches: Iterator[pa.RecordBatch], task: ExplainTask) -> Iterator[tuple[list[dict[str, Any]], ModelTask]]:
    """Yield some documents at a time with each model that owes them."""
    for documents in _look_ahead(batches):
        for model in task.models:
            owed = [document for document in documents if model.split in document["splits"]]
            if owed:
                yield owed, model


def _look_ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[list[dict[str, Any]]]:
    """Yield documents in their order; copies of a text, which follow each other, stay together."""
    waiting: list[dict[str, Any]] = []
    for batch in batches:
        for document in batch.to_pylist():
            full = len(waiting) >= LOOK_AHEAD_DOCUMENTS and document["text_digest"] != waiting[-1]["text_digest"]
            if full or len(waiting) >= _COPIES * LOOK_AHEAD_DOCUMENTS:
                yield waiting
                waiting = []
            waiting.append(document)
    if waiting:
        yield waiting


def _texts(
    documents: Sequence[Mapping[str, Any]], task: ExplainTask
) -> list[tuple[bytes | Rejection | None, Sequence[str]]]:
    broken = "the source's row is no document"
    return [
        (
            doc["text"] if doc["defect"] is None else Rejection(doc["defect"], broken),
            (task.gold and doc["labels"]) or (),
        )
        for doc in documents
    ]


def _finish(job: _Job, task: ExplainTask, device: str, beside: ThreadPoolExecutor) -> Iterator[pa.RecordBatch]:
    """Explain in a thread beside this one, which goes on giving signs of life; then yield the rows."""
    explaining = beside.submit(lambda: _explain(job.read.result(), task, job.model, job.explainer, device))
    seen = job.classifier.n_passes
    while wait([explaining], timeout=SIGN_SECONDS).not_done:
        if seen != job.classifier.n_passes:
            seen = job.classifier.n_passes
            yield pa.RecordBatch.from_pylist([], schema=EXPLANATIONS)
    outcomes = explaining.result()
    unreadable, readable = job.read.result()
    settled = iter(readable.settled)
    rows: list[dict[str, Any]] = []
    for document, rejection, outcome in zip(job.documents, unreadable, outcomes, strict=True):
        rows += _rows(document, outcome, next(settled) if rejection is None else [], task, job.model)
    yield pa.RecordBatch.from_pylist(rows, schema=EXPLANATIONS)


def _rows(
    document: dict[str, Any], outcome: Outcome, settled: Sequence[Settled], task: ExplainTask, model: ModelTask
) -> list[dict[str, Any]]:
    row = {name: document[name] for name in ("corpus_key", "increment", "bucket", "doc_id", "text_digest")}
    row |= {"explain_key": model.explain_key, "split": model.split, "method": task.method, "label_rank": 0}
    if not isinstance(outcome, list):
        return [row | {"status": "rejected", "reason": outcome.reason}]
    if not outcome and not settled:
        return [row | {"status": "no_label"}]
    labels = document["labels"]
    return [
        row | _explanation_columns(each, task) | {"status": "explained"} | _label_columns(each, labels)
        for each in outcome
    ] + [row | {"status": "settled"} | _label_columns(each, labels) for each in settled]


def _label_columns(found: Explanation | Settled, labels: Sequence[str] | None) -> dict[str, Any]:
    """Return what is told of a label. Whether it is gold, is unknown without gold labels, and of a regression, which has none."""
    is_gold = None if labels is None or found.probability is None else found.label in labels
    columns = {name: getattr(found, name) for name in ("label", "label_rank", "probability")}
    return columns | {"is_gold": is_gold}


def _explanation_columns(explanation: Explanation, task: ExplainTask) -> dict[str, Any]:
    copied = (
        "target_score", "baseline_score", "completeness_gap", "completeness_gap_relative",
        "evaluations", "converged", "token_norm", "n_tokens", "n_windows", "other_score",
    )  # fmt: skip
    columns = {name: getattr(explanation, name) for name in copied}
    spans = [
        {"start": words[0].start, "end": words[-1].end, "words": [word.key for word in words], "score": score}
        for words, score in explanation.spans
    ]
    target = "logit" if task.against is None else f"logit less that of {task.against}"
    target = "output" if explanation.probability is None else target
    return columns | {
        "target": target,
        "accuracy": task.accuracy,
        "words": word_rows(explanation),
        "spans": spans or None,
    }


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
