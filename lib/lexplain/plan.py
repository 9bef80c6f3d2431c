"""The plan: what to explain, with which models and method, into where.

A plan is a YAML file read into frozen dataclasses. Everything wrong with it is found in one pass, before
Spark starts, and reported together (`PlanError`).
"""

# ruff: noqa: RUF009 - setting() declares a field of a dataclass

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from lexplain import local_files
from lexplain.errors import MethodError, PlanError, Problem, redact
from lexplain.local_files import BELOW_HALF, is_local
from lexplain.presets import DEFAULT_METHOD, apply_presets
from lexplain.settings import (
    Reading,
    check_condition,
    check_variables,
    read_mapping,
    read_text,
    setting,
    shorten,
    write_yaml,
)

Format = Literal["delta", "parquet", "json", "csv", "tsv"]
Evidence = Literal["auto", "true_positives", "predicted"]
WordRule = Literal["unicode", "sacx-2022"]
Preset = Literal["default", "sacx-2022"]

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
}
LEARNING_RATES = {"full": 5e-5, "head": 1e-3}
"""Peak learning rate where none is written. A head starts from nothing, and no pretrained weight can be harmed."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SCHEMA = re.compile(r"[A-Za-z_]\w{0,127}(\.[A-Za-z_]\w{0,127}){0,1}")
_TABLE = re.compile(r"[A-Za-z_]\w{0,127}(\.[A-Za-z_]\w{0,127}){0,2}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a source holds what."""

    text: str = setting("text", says="the document's text")
    doc_id: str | None = setting(None, says="unique id of a document; made from the text when left out")
    labels: str | None = setting(None, says="gold labels: a string, a separated string, or an array")
    split: str | None = setting(
        None, says="numbers of the models (0 is the first) that have seen the document: integer, '0 2' or array"
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents to read: one table or one path."""

    one_of: ClassVar = ("table", "path")

    table: str | None = setting(None, says="table name, as catalog.schema.table")
    path: str | None = setting(None, says="Delta, Parquet, JSON lines, CSV or TSV file or folder")
    format: Format | None = setting(None, says="delta, parquet, json, csv or tsv; told from the path when left out")
    columns: Columns = setting(Columns, says="which column holds what")
    label_separator: str | None = setting(None, says="splits a string of several labels, as ' '")
    header: bool = setting(True, says="csv and tsv: the first line names the columns; otherwise they are _c0, _c1, ...")
    where: str | None = setting(None, says="SQL condition on the source's own columns")
    watermark: str | None = setting(
        None,
        says="column that grows with every new row (number, date, timestamp, text): later readings take only rows above it",
    )
    sample: float | None = setting(
        None, above=0.0, high=1.0, says="share of the documents, the same ones each time",
        silently="No document, or every document, would have been read",
    )  # fmt: skip
    limit: int | None = setting(
        None, low=1, says="at most so many documents, the same ones each time",
        silently="No document would have been explained",
    )  # fmt: skip

    @property
    def kind(self) -> Format | Literal["table"] | None:
        """How to read it: `table`, the format said, or the one that the path's suffix tells."""
        if self.table is not None:
            return "table"
        if self.format is not None or self.path is None:
            return self.format
        suffixes = [suffix.lower() for suffix in Path(self.path).suffixes if suffix.lower() not in (".gz", ".bz2")]
        if suffixes and suffixes[-1] in _SUFFIXES:
            return _SUFFIXES[suffixes[-1]]
        return "delta" if os.path.isdir(os.path.join(self.path, "_delta_log")) else None

    @property
    def origin(self) -> str:
        """The table's name or the path, secrets masked, for messages and tables."""
        return redact(self.table or self.path or "?")


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models to explain: one base model to fine-tune on random splits, or one ready model a split."""

    one_of: ClassVar = ("base", "uris")

    base: str | None = setting(None, says="model to fine-tune: Hugging Face folder or MLflow URI")
    uris: tuple[str, ...] = setting((), says="or ready models, one a split: folders or MLflow URIs")
    corpus: Literal["unseen"] | None = setting(None, says="'unseen': no ready model has seen a document of the corpus")
    splits: int = setting(
        5, low=1, high=1000, says="random train/test splits, one fine-tuned model each",
        silently="Without a split there is no model to explain",
    )  # fmt: skip
    seed: int = setting(1, low=0, high=2**31 - 1, says="seed of the splits and of the fine-tuning")
    test_share: float = setting(
        0.33, above=0.0, high=0.9, says="share of the training documents held out of each split",
        silently="No document would have been held out to explain, or none kept to train on",
    )  # fmt: skip
    multi_label: bool = setting(False, says="true: several labels a document (sigmoid, threshold 0.5)")
    train: Literal["full", "head"] = setting("full", says="full, or head: frozen encoder with cached features")
    epochs: int = setting(3, low=1, high=1000, says="at most so many passes over the training half")
    learning_rate: float | None = setting(
        None, above=0.0, high=1.0, says="peak learning rate; 5e-5 (full) or 1e-3 (head) when left out",
        silently="The weights would not have moved, or would have diverged",
    )  # fmt: skip
    batch_size: int = setting(16, low=1, high=4096, says="documents a training batch")
    accumulate: int = setting(1, low=1, high=4096, says="batches a step (gradient accumulation)")
    patience: int = setting(1, low=1, high=1000, says="epochs without a better loss before the training stops early")
    folder: str | None = setting(None, says="where fine-tuned models go; SINK/models when left out")
    register_as: str | None = setting(None, says="MLflow model name; lexplain-NAME when left out")


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """The attribution method and its options, as the registry of methods knows them."""

    id: str = setting(DEFAULT_METHOD, says="see `lexplain methods`")
    preset: str | None = setting(None, says="a named set of options of the method; options written out win")
    options: Mapping[str, Any] = setting(dict, says="options of the method")
    accuracy: Literal["document", "keywords"] = setting(
        "document", says="document: points until an explanation is within its tolerance; keywords: a few calibrated ones, for class"
        " tables over large corpora",
    )  # fmt: skip
    top_k: int | None = setting(
        None, low=1, says="explain so many of a document's most probable labels; the predicted ones when left out",
        silently="No label would have been explained",
    )  # fmt: skip
    against: str | None = setting(
        None, says="explain why a label and not this one: the difference of their logits, for every other label"
    )
    gold: bool = setting(False, says="true: explain a document's gold labels too, predicted or not")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", says="of the model's body; paths and sums are float32 or longer"
    )

    @property
    def asked(self) -> Mapping[str, Any]:
        """The options that the method is called with: the plan's, and what its accuracy means."""
        return {**self.options, "rule": "calibrated"} if self.accuracy == "keywords" else self.options


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a text becomes model inputs, and token scores become word scores."""

    max_tokens: int = setting(
        512, low=8, high=1_000_000, says="tokens a window, special tokens included",
        silently="The model would have been given no text",
    )  # fmt: skip
    overlap: int = setting(64, low=0, says="tokens that two windows of a long text share")
    max_windows: int | None = setting(
        None, low=1, says="windows a text at most (1: its head); all of the text when left out",
        silently="No part of the text would have been read",
    )  # fmt: skip
    max_characters: int = setting(1_000_000, low=1, says="a longer text is rejected as too_long")
    merge: Literal["sum", "absmax"] = setting("sum", says="token scores to word scores: sum keeps completeness")


@dataclass(frozen=True, kw_only=True)
class Keywords:
    """Which explanations count, and which words stay."""

    evidence: Evidence = setting(
        "auto", says="true_positives (labelled corpus), predicted (unlabelled), or auto: whichever fits"
    )
    probability: float = setting(
        0.5, low=0.0, high=0.999999, says="a prediction counts above this probability",
        silently="No explanation would have counted as evidence",
    )  # fmt: skip
    top_n: int = setting(
        20, low=1, high=10_000, says="words a document that count",
        silently="No word would have been counted",
    )  # fmt: skip
    word_rule: WordRule = setting("unicode", says="unicode (UAX 29 words) or sacx-2022 (the published token rule)")
    theta: float = setting(
        0.6, low=0.0, high=1.0, says="a word stays if selected in this share of the splits",
        silently="Every word, or no word, would have stayed",
    )  # fmt: skip
    min_df: int = setting(5, low=0, says="a word stays if more documents of its class hold it")
    max_classes: int | None = setting(
        2, low=1, says="a word stays if at most so many classes keep it; null: any number"
    )
    top: int | None = setting(100, low=1, says="keywords a class at most; null: all")
    labels: tuple[str, ...] = setting((), says="classes to make keywords for; all when left out")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Past a limit the run stops with what it has, clearly marked."""

    device_hours: float | None = setting(None, above=0.0, says="hours of attribution, summed over devices")
    rejected_share: float | None = setting(
        0.1, low=0.0, high=1.0, says="stop when more than this share of the documents is rejected"
    )


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is laid on the machine or cluster. Changes speed, and of the numbers their rounding."""

    device: Literal["auto", "cpu", "gpu"] = setting(
        "auto", says="auto: the task's GPU where Spark assigns one, else CPU"
    )
    threads: int | None = setting(None, low=1, says="torch threads a task; cores / tasks when left out")
    budget_tokens: int | None = setting(
        None, low=16, says="tokens x path points a pass of the model; 2048 on a CPU, 32768 on a GPU when left out",
        silently="Not even one token would have fitted a pass",
    )  # fmt: skip
    chunk_documents: int | None = setting(
        None,
        low=1,
        says="documents a chunk, the unit that is committed and resumed; as many as chunk_minutes take when left out",
    )
    chunk_minutes: float = setting(
        10.0,
        above=0.0,
        says="how long a chunk takes at the rate of the plan's last run; 2000 documents where there is none",
    )
    models_in_memory: int = setting(4, low=1, says="models that a worker holds at once")
    allow_pickle: bool = setting(False, says="true: load pickled weights, which can run code of whoever made them")
    compile: bool = setting(False, says="true: torch.compile the models; pays on GPUs and long runs")
    idle_timeout_seconds: int | None = setting(
        600, low=30, says="stop a worker in which no model has moved for so long, and try its task again; null: never",
        silently="Healthy workers would have been stopped while they load a model or make one long pass",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sink:
    """Where the tables live: a folder, or a schema of the platform's catalog."""

    one_of: ClassVar = ("path", "schema")

    path: str | None = setting(None, says="folder of the Delta tables (no metastore needed)")
    schema: str | None = setting(None, says="or catalog.schema on a platform")


@dataclass(frozen=True, kw_only=True)
class Mlflow:
    """Where runs and models are recorded."""

    enabled: bool = setting(True, says="false: no MLflow")
    tracking_uri: str | None = setting(None, says="SQLite file under the sink's path when left out")
    experiment: str = setting("lexplain", says="experiment of the runs")


class Method(Protocol):
    """What a plan needs of a registered method (`lexplain.methods.Method`)."""

    @property
    def id(self) -> str:
        """Versioned id, as `integrated_gradients.v1`."""

    @property
    def presets(self) -> Mapping[str, Mapping[str, object]]:
        """Named sets of options."""

    def check(self, options: Mapping[str, object]) -> Sequence[Problem]:
        """Return what is wrong with the options."""

    def check_network(self, config: Any, options: Mapping[str, object]) -> None:
        """Raise ModelError where the method cannot explain a network of this config."""

    def complete_options(self, options: Mapping[str, object]) -> Mapping[str, object]:
        """Return the options with the defaults filled in."""

    @property
    def mask(self) -> bool:
        """Whether scores are a mask, so that explanations have spans."""

    def is_signed(self, options: Mapping[str, object]) -> bool:
        """Tell whether scores tell evidence for a label from evidence against it."""

    @property
    def foremost(self) -> Callable[[Mapping[str, object]], bool]:
        """Takes all options, tells whether only a text's most probable label can be explained with them."""

    @property
    def prepares(self) -> Callable[[Mapping[str, object]], str | None]:
        """Takes all options, returns the kind of preparation that the method needs, or None."""


FindMethod = Callable[[str], Method]
"""Looks a method up by name or versioned id; raises MethodError. `lexplain.methods.find_method` is one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked plan. Load one with `Plan.load`."""

    name: str = setting(says="names the run and its views")
    preset: Preset = setting("default", says="default, or sacx-2022: the published class explanation")
    corpus: Source = setting(says="documents to explain")
    training: Source | None = setting(None, says="labelled documents to fine-tune on; may be the corpus's own source")
    models: Models = setting(says="models to explain")
    method: MethodChoice = setting(MethodChoice, says="attribution method")
    text: Text = setting(Text, says="windows and words")
    keywords: Keywords = setting(Keywords, says="evidence and keyword rules")
    limits: Limits = setting(Limits, says="when to stop early")
    execution: Execution = setting(Execution, says="how the work is laid out; of the numbers their rounding only")
    sink: Sink = setting(says="where the tables live")
    mlflow: Mlflow = setting(Mlflow, says="where runs and models are recorded")

    @classmethod
    def load(cls, path: str | Path, find_method: FindMethod, *, check_files: bool = True) -> Plan:
        """Read a YAML plan and check all of it, `check_files` as in `parse`. Runs on the driver, before Spark.

        Raises:
            PlanError: With every problem found, or that the file is no YAML mapping.
        """
        text = read_text(path)
        return cls.parse(
            text, find_method, origin=str(path), folder=Path(path).resolve().parent, check_files=check_files
        )

    @classmethod
    def parse(
        cls, text: str, find_method: FindMethod, *, origin: str = "plan", folder: Path | None = None,
        check_files: bool = True,
    ) -> Plan:  # fmt: skip
        """Check a plan given as YAML text; relative paths count from `folder`.

        A stored plan is read with `check_files=False`: its inputs may be gone, its tables are not.

        Raises:
            PlanError: As `load`.
        """
        reading = Reading()
        plan = reading.read(cls, apply_presets(read_mapping(text, origin), find_method))
        problems = reading.problems
        if folder is not None:
            plan = _absolute(plan, folder)
        problems += [one for one in _check_across(plan, find_method, reading.sure) if reading.sure(one.field)]
        if check_files:
            problems += [one for one in local_files.check_files(plan, find_method) if reading.sure(one.field)]
        if problems:
            raise PlanError(origin, problems)
        return plan

    @property
    def evidence(self) -> Literal["true_positives", "predicted"]:
        """The evidence policy with `auto` decided: gold labels where the corpus has them."""
        if self.keywords.evidence != "auto":
            return self.keywords.evidence
        return "true_positives" if self.corpus.columns.labels else "predicted"

    @property
    def labelled(self) -> Source | None:
        """The source whose labels count for class document frequencies; None where predictions count instead."""
        if self.evidence == "predicted":
            return None
        if self.training is not None:
            return self.training
        return self.corpus if self.corpus.columns.labels else None

    def to_yaml(self) -> str:
        """Return the plan with every default written out, credentials in URIs masked."""
        return write_yaml(self)


# --- rules across keys ----------------------------------------------------------------------------------------

Sure = Callable[..., bool]
"""Tells whether settings are what the plan says: rules are not judged by the defaults of misspelt ones."""


def _check_across(plan: Plan, find_method: FindMethod, sure: Sure) -> Iterator[Problem]:
    yield from _check_source(plan.corpus, "corpus", sure)
    if plan.training is not None:
        yield from _check_source(plan.training, "training", sure)
    yield from _check_models(plan, sure)
    yield from _check_method(plan, find_method)
    yield from _check_keywords(plan, sure)
    yield from _check_sink(plan, sure)
    text = plan.text
    if not _NAME.fullmatch(plan.name):
        yield Problem("name", plan.name, "must be letters, digits, '.', '_' or '-', 100 at most",
                      "Folders and model names made from it would break", "Write a name such as news-topics")  # fmt: skip
    if text.overlap * 2 > text.max_tokens and sure("text.max_tokens"):
        default = ", and is so much by default" if text.overlap == Text().overlap else ""
        yield Problem("text.overlap", text.overlap, f"must be at most half of text.max_tokens={text.max_tokens}{default}",
                      "Each window would have advanced by a few tokens, at many times the cost",
                      f"Write overlap: {text.max_tokens // 8}")  # fmt: skip


def _check_source(source: Source, where: str, sure: Sure) -> Iterator[Problem]:
    if source.table is not None and not _TABLE.fullmatch(source.table):
        yield Problem(f"{where}.table", source.table, "is no table name",
                      "It would have been taken for SQL", "Write catalog.schema.table")  # fmt: skip
    if source.table is None and source.path is not None and source.kind is None and sure(f"{where}.format"):
        yield Problem(f"{where}.path", source.path, "does not tell its format", "It might have been read as the wrong one",
                      f"Add {where}.format: delta, parquet, json, csv or tsv")  # fmt: skip
    if source.watermark is not None and source.columns.doc_id is None and sure(f"{where}.columns.doc_id"):
        yield Problem(f"{where}.watermark", source.watermark, "needs columns.doc_id",
                      "A copy of a text that was read before would have got its id", f"Write {where}.columns.doc_id")  # fmt: skip
    if source.watermark is not None and source.limit is not None:
        yield Problem(f"{where}.watermark", source.watermark, f"contradicts {where}.limit",
                      "New rows would have come on top of the limit", "Leave one of them out")  # fmt: skip
    if source.watermark is not None and source.kind in ("csv", "tsv", "json"):
        yield Problem(f"{where}.watermark", source.watermark, "is for tables, delta and parquet",
                      "A broken line has no value there: new ones would never have been counted",
                      "Leave it out, or write the source as Parquet or Delta")  # fmt: skip
    columns = {f"{where}.columns.{key}": name for key, name in dataclasses.asdict(source.columns).items()}
    path = source.path if source.kind == "delta" else None
    yield from check_variables(columns | {f"{where}.watermark": source.watermark, f"{where}.path": path})
    yield from check_condition(f"{where}.where", source.where)
    if source.label_separator is not None and source.columns.labels is None and sure(f"{where}.columns.labels"):
        yield Problem(f"{where}.label_separator", source.label_separator, "needs columns.labels",
                      "The corpus would have counted as unlabelled", f"Write {where}.columns.labels")  # fmt: skip


_FINE_TUNING = ("splits", "seed", "test_share", "multi_label", "train", "epochs", "learning_rate", "batch_size", "accumulate",
                "patience", "folder", "register_as")  # fmt: skip


def _check_models(plan: Plan, sure: Sure) -> Iterator[Problem]:
    models, seen = plan.models, plan.corpus.columns.split
    if models.base is not None and plan.training is None:
        yield Problem("training", None, "is required with models.base", "There would be nothing to fine-tune on",
                      "Write training: {path: ..., columns: {labels: ...}}")  # fmt: skip
    if plan.training is not None and plan.training.columns.labels is None:
        yield Problem("training.columns.labels", None, "is required with training", "There would be no labels to learn",
                      "Write the name of the label column")  # fmt: skip
    if models.uris and models.corpus is None and seen is None and sure("corpus.columns.split"):
        yield Problem("models.corpus", None, "must say what the models have seen",
                      "Documents that a model was trained on would be explained as if held out",
                      "Write models.corpus: unseen, or corpus.columns.split")  # fmt: skip
    if models.uris and models.corpus is not None and seen is not None:
        yield Problem("models.corpus", models.corpus, "contradicts corpus.columns.split",
                      "Documents that a model was trained on would be explained as if held out",
                      "Leave one of them out")  # fmt: skip
    tuned = [name for name in _FINE_TUNING if getattr(models, name) != getattr(Models(), name)] if models.uris else []
    for name in tuned:
        yield Problem(f"models.{name}", getattr(models, name), "goes with models.base only",
                      "Ready models are not fine-tuned; the key would have been ignored", "Leave it out")  # fmt: skip
    if models.base is not None and models.corpus is not None:
        yield Problem("models.corpus", models.corpus, "goes with models.uris only",
                      "lexplain knows which documents it fine-tuned on; the key would have been ignored",
                      "Leave it out")  # fmt: skip
    if models.base is not None and seen is not None:
        yield Problem("corpus.columns.split", seen, "goes with models.uris only",
                      "lexplain draws the splits of models.base itself; the column would have been ignored",
                      "Leave it out")  # fmt: skip


def _check_method(plan: Plan, find_method: FindMethod) -> Iterator[Problem]:
    try:
        method = find_method(plan.method.id)
    except MethodError as error:
        rule, _, rest = str(error).removeprefix(f"method={plan.method.id!r} ").partition(". ")
        yield Problem("method.id", plan.method.id, rule, *rest.rstrip(".").rsplit(". ", 1))
        return
    if plan.method.preset is not None and plan.method.preset not in method.presets:
        known = ", ".join(method.presets)
        yield Problem("method.preset", plan.method.preset, f"is no preset of {method.id}",
                      "The method would have run with its defaults",
                      f"Write one of: {known}" if known else "Leave it out: the method has none")  # fmt: skip
    if plan.method.accuracy == "keywords" and (
        not method.id.startswith("integrated_gradients.") or "rule" in plan.method.options
    ):
        yield Problem("method.accuracy", "keywords", "is of integrated_gradients, without a rule of the plan's own",
                      "Scores would not have been those of the method",
                      "Write accuracy: document, or leave out the rule, or the preset that brings one")  # fmt: skip
    if plan.method.gold and plan.corpus.columns.labels is None:
        yield Problem("method.gold", True, "needs corpus.columns.labels", "Only predicted labels would have been explained",
                      "Write corpus.columns.labels, or leave it out")  # fmt: skip
    for field, value in {"method.gold": plan.method.gold, "method.against": plan.method.against}.items():
        if value and plan.method.accuracy == "keywords":
            yield Problem(field, value, "is of accuracy: document",
                          "Targets would have got points that were fitted to the logits of predicted labels",
                          "Write accuracy: document, or leave it out")  # fmt: skip
    if plan.method.options.get("rule") == "calibrated":
        yield Problem("method.options.rule", "calibrated", "is what accuracy: keywords means",
                      "The explanations would have counted as accurate for each document", "Write accuracy: keywords")  # fmt: skip
    # without what accuracy: keywords brings along: where that does not fit, it was told above
    wrong = method.check(plan.method.options if plan.method.accuracy == "keywords" else plan.method.asked)
    for problem in wrong:
        field = f"method.options.{problem.field.rsplit('.', 1)[-1]}"
        yield dataclasses.replace(problem, field=field, value=shorten(problem.value))
    if not wrong and method.foremost(method.complete_options(plan.method.asked)):
        several: dict[str, object] = {
            "method.top_k": (plan.method.top_k or 1) > 1 and plan.method.top_k,
            "method.gold": plan.method.gold,
            "method.against": plan.method.against,
            "models.multi_label": plan.models.multi_label,
        }
        for field, chosen in several.items():
            if chosen:
                yield Problem(field, chosen, f"asks for other targets than a text's greatest logit, all that {method.id} explains with these options",
                              "Every target would have got the words of the most probable label",
                              "Leave it out, or write other options")  # fmt: skip
    # Only fine-tuned models have a folder of their own; what a sink without one misses is told elsewhere.
    homeless = plan.sink.schema is not None and plan.models.base is None and not wrong
    if homeless and method.prepares(method.complete_options(plan.method.asked)) == "neighbours":
        yield Problem("method.id", plan.method.id, "has no folder for its index of documents with sink.schema and models.uris",
                      "It would have lain on the driver's own disk, out of the executors' reach",
                      "Write sink.path, a folder that driver and executors mount")  # fmt: skip


def _check_keywords(plan: Plan, sure: Sure) -> Iterator[Problem]:
    rules = plan.keywords
    if rules.evidence == "true_positives" and plan.corpus.columns.labels is None and sure("corpus.columns.labels"):
        yield Problem("keywords.evidence", rules.evidence, "needs corpus.columns.labels",
                      "No document would have counted as evidence",
                      "Write corpus.columns.labels, or evidence: predicted")  # fmt: skip
    unpredicted = {"method.top_k": plan.method.top_k is not None, "method.gold": plan.method.gold}
    for field in (field for field, chosen in unpredicted.items() if chosen and rules.probability < 0.5):
        yield Problem("keywords.probability", rules.probability, f"must be >= 0.5 with {field}",
                      "Labels that the model did not predict would have counted as evidence",
                      "Write probability: 0.5")  # fmt: skip
    if plan.models.multi_label and rules.probability < 0.5:
        yield Problem("keywords.probability", rules.probability, "must be >= 0.5 with multi_label",
                      BELOW_HALF,
                      "Write probability: 0.5")  # fmt: skip


def _check_sink(plan: Plan, sure: Sure) -> Iterator[Problem]:
    sink, models = plan.sink, plan.models
    yield from check_variables({"sink.path": sink.path})
    if sink.path is not None:
        there = next((place for place in (Path(sink.path), *Path(sink.path).parents) if place.exists()), None)
        if there is not None and not there.is_dir():
            rule = "is a file" if there == Path(sink.path) else f"would lie in {str(there)!r}, which is a file"
            yield Problem("sink.path", sink.path, rule, "There would be no room for the tables", "Write a folder")
    for field, path in (("sink.path", sink.path), ("models.folder", models.folder)):
        if path is not None and not is_local(path):
            yield Problem(field, path, "must be a path that driver and executors mount, not a URI",
                          "It would have been taken for a folder on each machine's own disk",
                          "Write a mounted path such as /Volumes/..., /dbfs/... or /mnt/..., or sink.schema")  # fmt: skip
    if sink.schema is None:
        return
    if not _SCHEMA.fullmatch(sink.schema):
        yield Problem("sink.schema", sink.schema, "is no schema name", "It would have been taken for SQL",
                      "Write catalog.schema")  # fmt: skip
    if models.base is not None and models.folder is None:
        yield Problem("models.folder", None, "is required with sink.schema and models.base",
                      "Fine-tuned models would have gone to the driver's own disk, out of the executors' reach",
                      "Write a shared path")  # fmt: skip
    if plan.mlflow.enabled and plan.mlflow.tracking_uri is None and sure("mlflow.enabled"):
        yield Problem("mlflow.tracking_uri", None, "is required with sink.schema",
                      "Runs would have gone to a file on the driver's own disk",
                      "Write the tracking server's URI (databricks on Databricks), or enabled: false")  # fmt: skip


def _absolute(plan: Plan, folder: Path) -> Plan:
    """Make local paths absolute, counted from the plan's own folder: executors have another working folder."""

    def local(path: str | None) -> str | None:
        if path is None or not is_local(path):
            return path
        # not Path.resolve: it fails on a loop of links, and a link's own name is what the user said
        return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))

    def source(one: Source) -> Source:
        return dataclasses.replace(one, path=local(one.path))

    models = dataclasses.replace(
        plan.models,
        base=local(plan.models.base),
        uris=tuple(str(local(uri)) for uri in plan.models.uris),
        folder=local(plan.models.folder),
    )
    return dataclasses.replace(
        plan,
        corpus=source(plan.corpus),
        training=None if plan.training is None else source(plan.training),
        models=models,
        sink=dataclasses.replace(plan.sink, path=local(plan.sink.path)),
    )
