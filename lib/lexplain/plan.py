"""The plan: what to explain, with which models and method, into where.

A plan is a YAML file read into frozen dataclasses. Everything wrong with it is found in one pass, before
Spark starts, and reported together (`PlanError`). The keys that name rows of the tables are made here too:
each is a digest of exactly what changes that stage's numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

import yaml

from lexplain.errors import MethodError, PlanError, Problem

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
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SCHEMA = re.compile(r"[A-Za-z_]\w{0,127}(\.[A-Za-z_]\w{0,127}){0,1}")
_TABLE = re.compile(r"[A-Za-z_]\w{0,127}(\.[A-Za-z_]\w{0,127}){0,2}")


def _key(
    default: object = dataclasses.MISSING,
    *,
    says: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    silently: str = "The job would have run with a value that has no meaning",
) -> Any:  
    """Declare a key of the plan: its default, its comment in `plan new`, its range."""
    metadata = {"says": says, "low": low, "high": high, "above": above, "silently": silently}
    if default is dataclasses.MISSING:
        return field(metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a source holds what."""

    text: str = _key("text", says="the document's text")
    doc_id: str | None = _key(None, says="unique id of a document; made from the text when left out")
    labels: str | None = _key(None, says="gold labels: a string, a separated string, or an array")
    split: str | None = _key(
        None, says="numbers of the models (0 is the first) that have seen the document: integer, '0 2' or array"
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents to read: one table or one path."""

    table: str | None = _key(None, says="table name, as catalog.schema.table")
    path: str | None = _key(None, says="Delta, Parquet, JSON lines, CSV or TSV file or folder")
    format: Format | None = _key(None, says="delta, parquet, json, csv or tsv; told from the path when left out")
    columns: Columns = _key(Columns, says="which column holds what")
    label_separator: str | None = _key(None, says="splits a string of several labels, as ' '")
    header: bool = _key(True, says="csv and tsv: the first line names the columns; otherwise they are _c0, _c1, ...")
    where: str | None = _key(None, says="SQL condition on the source's own columns")
    sample: float | None = _key(
        None, above=0.0, high=1.0, says="share of the documents, the same ones each time",
        silently="No document, or every document, would have been read",
    )  # fmt: skip
    limit: int | None = _key(
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
        return "delta" if (Path(self.path) / "_delta_log").is_dir() else None

    @property
    def origin(self) -> str:
        """The table's name or the path, for messages."""
        return self.table or self.path or "?"


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models to explain: one base model to fine-tune on random splits, or one ready model a split."""

    base: str | None = _key(None, says="model to fine-tune: Hugging Face folder or MLflow URI")
    uris: tuple[str, ...] = _key((), says="or ready models, one a split: folders or MLflow URIs")
    corpus: Literal["unseen"] | None = _key(None, says="'unseen': no ready model has seen a document of the corpus")
    splits: int = _key(
        5, low=1, high=1000, says="random train/test splits, one fine-tuned model each",
        silently="Without a split there is no model to explain",
    )  # fmt: skip
    seed: int = _key(1, low=0, high=2**31 - 1, says="seed of the splits and of the fine-tuning")
    test_share: float = _key(
        0.33, above=0.0, high=0.9, says="share of the training documents held out of each split",
        silently="No document would have been held out to explain, or none kept to train on",
    )  # fmt: skip
    multi_label: bool = _key(False, says="true: several labels a document (sigmoid, threshold 0.5)")
    train: Literal["full", "head"] = _key("full", says="full, or head: frozen encoder with cached features")
    epochs: int = _key(3, low=1, high=1000, says="at most so many passes over the training half")
    learning_rate: float | None = _key(
        None, above=0.0, high=1.0, says="peak learning rate; 5e-5 (full) or 1e-3 (head) when left out",
        silently="The weights would not have moved, or would have diverged",
    )  # fmt: skip
    batch_size: int = _key(16, low=1, high=4096, says="documents a training batch")
    accumulate: int = _key(1, low=1, high=4096, says="batches a step (gradient accumulation)")
    patience: int = _key(1, low=1, high=1000, says="epochs without a better loss before the training stops early")
    folder: str | None = _key(None, says="where fine-tuned models go; SINK/models when left out")
    register_as: str | None = _key(None, says="MLflow model name; lexplain-NAME when left out")


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """The attribution method and its options, as the registry of methods knows them."""

    id: str = _key("integrated_gradients", says="see `lexplain methods`")
    options: Mapping[str, Any] = _key(dict, says="options of the method")


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a text becomes model inputs, and token scores become word scores."""

    max_tokens: int = _key(
        512, low=8, high=1_000_000, says="tokens a window, special tokens included",
        silently="The model would have been given no text",
    )  # fmt: skip
    overlap: int = _key(64, low=0, says="tokens that two windows of a long text share")
    max_windows: int | None = _key(
        None, low=1, says="windows a text at most (1: its head); all of the text when left out",
        silently="No part of the text would have been read",
    )  # fmt: skip
    max_characters: int = _key(1_000_000, low=1, says="a longer text is rejected as too_long")
    merge: Literal["sum", "absmax"] = _key("sum", says="token scores to word scores: sum keeps completeness")


@dataclass(frozen=True, kw_only=True)
class Keywords:
    """Which explanations count, and which words stay."""

    evidence: Evidence = _key(
        "auto", says="true_positives (labelled corpus), predicted (unlabelled), or auto: whichever fits"
    )
    probability: float = _key(
        0.5, low=0.0, high=0.999999, says="a prediction counts above this probability",
        silently="No explanation would have counted as evidence",
    )  # fmt: skip
    top_n: int = _key(
        20, low=1, high=10_000, says="words a document that count",
        silently="No word would have been counted",
    )  # fmt: skip
    word_rule: WordRule = _key("unicode", says="unicode (UAX 29 words) or sacx-2022 (the published token rule)")
    theta: float = _key(
        0.6, low=0.0, high=1.0, says="a word stays if selected in this share of the splits",
        silently="Every word, or no word, would have stayed",
    )  # fmt: skip
    min_df: int = _key(5, low=0, says="a word stays if more documents of its class hold it")
    max_classes: int | None = _key(2, low=1, says="a word stays if at most so many classes keep it; null: any number")
    top: int | None = _key(100, low=1, says="keywords a class at most; null: all")
    labels: tuple[str, ...] = _key((), says="classes to make keywords for; all when left out")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Past a limit the run stops with what it has, clearly marked."""

    device_hours: float | None = _key(None, above=0.0, says="hours of attribution, summed over devices")
    rejected_share: float | None = _key(
        0.1, low=0.0, high=1.0, says="stop when more than this share of the documents is rejected"
    )


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is laid on the machine or cluster. Changes speed, never a number."""

    device: Literal["auto", "cpu", "gpu"] = _key("auto", says="auto: the task's GPU where Spark assigns one, else CPU")
    threads: int | None = _key(None, low=1, says="torch threads a task; cores / tasks when left out")
    budget_tokens: int = _key(
        16_384, low=16, says="tokens x path points a pass of the model",
        silently="Not even one token would have fitted a pass",
    )  # fmt: skip
    chunk_documents: int = _key(2_000, low=1, says="documents a chunk: the unit that is committed and resumed")
    models_in_memory: int = _key(4, low=1, says="models that a worker holds at once")
    allow_pickle: bool = _key(False, says="true: load pickled weights, which can run code of whoever made them")


@dataclass(frozen=True, kw_only=True)
class Sink:
    """Where the tables live: a folder, or a schema of the platform's catalog."""

    path: str | None = _key(None, says="folder of the Delta tables (no metastore needed)")
    schema: str | None = _key(None, says="or catalog.schema on a platform")


@dataclass(frozen=True, kw_only=True)
class Mlflow:
    """Where runs and models are recorded."""

    enabled: bool = _key(True, says="false: no MLflow")
    tracking_uri: str | None = _key(None, says="SQLite file under the sink's path when left out")
    experiment: str = _key("lexplain", says="experiment of the runs")


class Method(Protocol):
    """What a plan needs of a registered method (`lexplain.methods.Method`)."""

    @property
    def id(self) -> str:
        """Versioned id, as `integrated_gradients.v1`."""

    def check(self, options: Mapping[str, object]) -> Sequence[Problem]:
        """Return what is wrong with the options."""

    def complete_options(self, options: Mapping[str, object]) -> Mapping[str, object]:
        """Return the options with the defaults filled in."""


FindMethod = Callable[[str], Method]
"""Looks a method up by name or versioned id; raises MethodError. `lexplain.methods.find_method` is one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked plan. Load one with `Plan.load`."""

    name: str = _key(says="names the run and its views")
    preset: Preset = _key("default", says="default, or sacx-2022: the published class explanation")
    corpus: Source = _key(says="documents to explain")
    training: Source | None = _key(None, says="labelled documents to fine-tune on; may be the corpus's own source")
    models: Models = _key(says="models to explain")
    method: MethodChoice = _key(MethodChoice, says="attribution method")
    text: Text = _key(Text, says="windows and words")
    keywords: Keywords = _key(Keywords, says="evidence and keyword rules")
    limits: Limits = _key(Limits, says="when to stop early")
    execution: Execution = _key(Execution, says="speed, never a number")
    sink: Sink = _key(says="where the tables live")
    mlflow: Mlflow = _key(Mlflow, says="where runs and models are recorded")

    @classmethod
    def load(cls, path: str | Path, find_method: FindMethod) -> Plan:
        """Read a YAML plan and check all of it. Runs on the driver, before Spark.

        Raises:
            PlanError: With every problem found, or that the file is no YAML mapping.
        """
        origin = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(origin, [_unreadable(origin, str(error))]) from error
        return cls.parse(text, find_method, origin=origin, folder=Path(path).resolve().parent)

    @classmethod
    def parse(cls, text: str, find_method: FindMethod, *, origin: str = "plan", folder: Path | None = None) -> Plan:
        """Check a plan given as YAML text; relative paths count from `folder`."""
        try:
            document = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that refuses twice-written keys
        except yaml.YAMLError as error:
            raise PlanError(origin, [_unreadable(origin, " ".join(str(error).split()))]) from error
        if not isinstance(document, Mapping):
            raise PlanError(origin, [_unreadable(origin, f"holds a {type(document).__name__}, not a mapping")])
        problems: list[Problem] = []
        document = _apply_preset(document)
        plan = _read(cls, document, "", problems)
        if folder is not None:
            plan = _absolute(plan, folder)
        # What could not be read stands at its default, so that the rules across keys are checked all the same.
        said = [problem.field for problem in problems]
        problems += [problem for problem in _check_across(plan, find_method) if not _touches(problem.field, said)]
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
        """The source whose labels count for class document frequencies, if there is one."""
        if self.training is not None:
            return self.training
        return self.corpus if self.corpus.columns.labels else None

    def to_yaml(self) -> str:
        """Return the plan with every default written out, credentials in URIs masked."""
        return re.sub(r"://[^/@\s'\"]+@", "://***@", yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True))


# --- keys: each a digest of exactly what changes that stage's numbers -------------------------------------


def digest(*parts: object) -> str:
    """Return 20 hex digits (80 bits) of SHA-256 over the canonical JSON of `parts`."""
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def corpus_key(source: Source) -> str:
    """Key of a source: its origin, filter, sample and column mapping; no version, so that increments join."""
    return digest("corpus", source)


def model_key(plan: Plan, base_digest: str, split: int, training_snapshot: str) -> str:
    """Key of one fine-tuned model, known before it is trained: a killed fine-tuning finds its own."""
    models = plan.models
    recipe = {
        name: getattr(models, name)
        for name in ("seed", "test_share", "multi_label", "train", "epochs", "learning_rate", "batch_size",
                     "accumulate", "patience")
    }  # fmt: skip
    assert plan.training is not None
    return digest("model", base_digest, recipe, split, plan.text.max_tokens, corpus_key(plan.training), training_snapshot)


def _method(plan: Plan, find_method: FindMethod) -> tuple[str, Mapping[str, object]]:
    method = find_method(plan.method.id)
    return method.id, method.complete_options(plan.method.options)


def explain_key(plan: Plan, find_method: FindMethod, model_digest: str) -> str:
    """Key of one model's explanations; holds no input version and no threshold."""
    return digest("explain", model_digest, *_method(plan, find_method), plan.text)


def evidence_key(plan: Plan) -> str:
    """Key of the word sums: everything that decides which scores are added up."""
    rules = plan.keywords
    return digest("evidence", plan.evidence, rules.probability, rules.top_n, rules.word_rule)


def keyword_key(plan: Plan, explain_keys: Sequence[str], corpus_snapshot: str, labelled_snapshot: str | None) -> str:
    """Key of one keyword table: explanations, evidence, thresholds and the snapshots it was made from."""
    return digest(
        "keywords", sorted(explain_keys), corpus_key(plan.corpus), evidence_key(plan), plan.keywords,
        corpus_snapshot, labelled_snapshot,
    )  # fmt: skip


def run_id(plan: Plan, find_method: FindMethod, model_digests: Sequence[str]) -> str:
    """Name of a run: the plan's name and what its keys are made of. Known before anything is trained."""
    training = None if plan.training is None else corpus_key(plan.training)
    return digest("run", plan.name, corpus_key(plan.corpus), training, plan.models, sorted(model_digests), _method(plan, find_method),
                  plan.text, plan.keywords)  # fmt: skip


# --- presets ------------------------------------------------------------------------------------------------

_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    # Roennqvist et al. 2022: the published aggregation, thresholds and quadrature.
    "sacx-2022": {
        "method": {"options": {"rule": "gauss_legendre", "nodes": 30, "baseline": "-"}},
        "text": {"merge": "absmax"},
        "keywords": {
            "probability": 0.7,
            "top_n": 20,
            "word_rule": "sacx-2022",
            "theta": 0.7,
            "min_df": 5,
            "max_classes": None,
            "top": 100,
        },
    },
}


def _apply_preset(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Lay the plan's own keys over its preset's."""
    preset = document.get("preset", "default")
    if not isinstance(preset, str) or preset not in _PRESETS:
        return document  # reported by the reader, as any wrong choice is
    return _overlay(_PRESETS[preset], document)


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if nested else value
    return merged


# --- reading ------------------------------------------------------------------------------------------------

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key written twice: the first value would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice, the first value would be lost", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(cls: type[T], document: Mapping[Any, Any], path: str, problems: list[Problem]) -> T:
    """Build a plan dataclass from a mapping; what breaks a rule goes to `problems` and is left at its default."""
    keys = {key.name: key for key in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in document.items():
        where = f"{path}{name}"
        if name not in keys:
            problems.append(_unknown_key(where, value, str(name), keys))
            continue
        required = keys[name].default is dataclasses.MISSING and keys[name].default_factory is dataclasses.MISSING
        if value is None and _optional(hints[name]):
            values[name] = None
        elif value is None and _nested(hints[name]) is not None:  # a section without keys
            if required:
                problems.append(_missing(where, keys[name]))
        else:
            before = len(problems)
            read = _read_value(hints[name], value, where, keys[name], problems)
            if len(problems) == before or _nested(hints[name]) is not None:
                values[name] = read
    for name, key in keys.items():
        if name in values or key.default is not dataclasses.MISSING or key.default_factory is not dataclasses.MISSING:
            continue
        misspelt = any(difflib.get_close_matches(str(other), [name], cutoff=0.6) for other in document if other not in keys)
        if name not in document and not misspelt:
            problems.append(_missing(f"{path}{name}", key))
        nested = _nested(hints[name])
        values[name] = "unnamed" if nested is None else nested()
    return cls(**values)


def _touches(field: str, said: Sequence[str]) -> bool:
    """Tell whether a problem of this field, or of a part of it or a whole that holds it, was reported already."""
    return any(field == one or field.startswith(f"{one}.") or one.startswith(f"{field}.") for one in said)


def _read_value(hint: Any, value: Any, where: str, key: dataclasses.Field[Any], problems: list[Problem]) -> Any:  
    nested = _nested(hint)
    if nested is not None:
        if isinstance(value, Mapping):
            return _read(nested, value, f"{where}.", problems)
        problems.append(_wrong_type(where, value, "must be a mapping of keys", f"Write `{where}:` and its keys below"))
        return nested()
    hint = _strip_optional(hint)
    if get_origin(hint) is Literal:
        if value in get_args(hint) and not isinstance(value, bool):
            return value
        choices = ", ".join(map(str, get_args(hint)))
        remedy = f"Write one of: {choices}{_suggestion(value, get_args(hint))}"
        problems.append(Problem(where, value, "is not one of the choices", key.metadata["silently"], remedy))
        return None
    if get_origin(hint) is tuple:
        return _read_strings(value, where, problems)
    if get_origin(hint) is Mapping or hint is Mapping:
        if isinstance(value, Mapping):
            return {str(name): option for name, option in value.items()}
        problems.append(_wrong_type(where, value, "must be a mapping of options", "Write `name: value` lines below it"))
        return None
    return _read_scalar(hint, value, where, key, problems)


def _read_strings(value: Any, where: str, problems: list[Problem]) -> tuple[str, ...] | None:  
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(part, str) for part in value):
        return tuple(value)
    remedy = 'Write [a, b]; put quotes round words that YAML reads as something else, as "no"'
    problems.append(_wrong_type(where, value, "must be a list of strings", remedy))
    return None


_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    str: ("must be a string", lambda value: isinstance(value, str)),
    bool: ("must be true or false", lambda value: isinstance(value, bool)),
    int: ("must be a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("must be a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
}


def _read_scalar(hint: type, value: Any, where: str, key: dataclasses.Field[Any], problems: list[Problem]) -> Any:  
    rule, fits = _KINDS[hint]
    if hint is float and isinstance(value, str) and re.fullmatch(r"\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 5e-5 as a string
    if not fits(value):
        default = "" if key.default in (dataclasses.MISSING, None) else f", as {key.default!r}"
        problems.append(_wrong_type(where, value, rule, f"Write a value of that kind{default}"))
        return None
    if hint is str and not value.strip() and where.rsplit(".", 1)[-1] != "label_separator":
        problems.append(_wrong_type(where, value, "must not be empty", "Write a value, or leave the key out"))
        return None
    low, high, above = (key.metadata[bound] for bound in ("low", "high", "above"))
    broken = (low is not None and value < low) or (high is not None and value > high)
    broken |= above is not None and value <= above
    if hint in (int, float) and (broken or value != value):
        parts = [f">= {low:g}" if low is not None else "", f"> {above:g}" if above is not None else "",
                 f"<= {high:g}" if high is not None else ""]  # fmt: skip
        rule = "must be " + " and ".join(filter(None, parts))
        default = " or leave it out" if key.default is not dataclasses.MISSING else ""
        problems.append(Problem(where, value, rule, key.metadata["silently"], f"Write a number in that range{default}"))
        return None
    return float(value) if hint is float else value


def _optional(hint: Any) -> bool:  
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _strip_optional(hint: Any) -> Any:  
    if _optional(hint):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return inner[0]
    return hint


def _nested(hint: Any) -> Any | None:  
    inner = _strip_optional(hint)
    return inner if dataclasses.is_dataclass(inner) else None


def _suggestion(value: object, known: Iterable[object]) -> str:
    close = difflib.get_close_matches(str(value), [str(name) for name in known], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown_key(where: str, value: object, name: str, keys: Mapping[str, object]) -> Problem:
    close = difflib.get_close_matches(name, list(keys), n=1, cutoff=0.6)
    remedy = f"Write {close[0]!r}" if close else f"Known here: {', '.join(keys)}"
    shown = value if isinstance(value, str | int | float | bool | None) else "..."
    return Problem(where, shown, "is no key of a plan", "It would have been ignored", remedy)


def _missing(where: str, key: dataclasses.Field[Any]) -> Problem:
    says = key.metadata["says"]
    return Problem(where, None, "is required", f"Without it the job does not know: {says}", f"Write `{where}: ...`")


def _wrong_type(where: str, value: object, rule: str, remedy: str) -> Problem:
    return Problem(where, value, rule, "It would have been misread", remedy)


def _unreadable(origin: str, what: str) -> Problem:
    return Problem("plan", origin, f"cannot be read ({what})", "Nothing can be planned from it",
                   "Write a YAML file; `lexplain plan new` prints one to start from")  # fmt: skip


# --- rules across keys ----------------------------------------------------------------------------------------


def _check_across(plan: Plan, find_method: FindMethod) -> list[Problem]:
    problems = [*_check_source(plan.corpus, "corpus")]
    if plan.training is not None:
        problems += _check_source(plan.training, "training")
    problems += _check_models(plan)
    problems += _check_method(plan, find_method)
    problems += _check_keywords(plan)
    problems += _check_sink(plan)
    problems += _check_files(plan)
    if not _NAME.fullmatch(plan.name):
        problems.append(Problem("name", plan.name, "must be letters, digits, '.', '_' or '-', 100 at most",
                                "Folders and model names made from it would break", "Write a name such as news-topics"))  # fmt: skip
    if plan.text.overlap * 2 > plan.text.max_tokens:
        problems.append(Problem("text.overlap", plan.text.overlap, f"must be at most half of text.max_tokens={plan.text.max_tokens}",
                                "Each window would have advanced by a few tokens, at many times the cost",
                                f"Write overlap: {plan.text.max_tokens // 8}"))  # fmt: skip
    return problems


def _check_source(source: Source, where: str) -> list[Problem]:
    problems: list[Problem] = []
    if (source.table is None) == (source.path is None):
        value = f"{source.table!r} and {source.path!r}" if source.table else None
        problems.append(Problem(where, value, "must have either a table or a path",
                                "It would not be clear what to read", f"Write `{where}: {{path: ...}}` or `{{table: ...}}`"))  # fmt: skip
    elif source.table is not None and not _TABLE.fullmatch(source.table):
        problems.append(Problem(f"{where}.table", source.table, "is no table name",
                                "It would have been taken for SQL", "Write catalog.schema.table"))  # fmt: skip
    elif source.kind is None:
        problems.append(Problem(f"{where}.path", source.path, "does not tell its format",
                                "It might have been read as the wrong one", f"Add {where}.format: delta, parquet, json, csv or tsv"))  # fmt: skip
    if source.label_separator is not None and source.columns.labels is None:
        problems.append(Problem(f"{where}.label_separator", source.label_separator, "needs columns.labels",
                                "The corpus would have counted as unlabelled", f"Write {where}.columns.labels"))  # fmt: skip
    return problems


def _check_models(plan: Plan) -> list[Problem]:
    problems: list[Problem] = []
    models = plan.models
    if (models.base is None) == (not models.uris):
        problems.append(Problem("models", None if models.base is None else "base and uris", "must have either base or uris",
                                "It would not be clear which models to explain",
                                "Write models.base to fine-tune one, or models.uris for ready ones"))  # fmt: skip
    if models.base is not None and plan.training is None:
        problems.append(Problem("training", None, "is required with models.base", "There would be nothing to fine-tune on",
                                "Write training: {path: ..., columns: {labels: ...}}"))  # fmt: skip
    if models.base is not None and plan.training is not None and plan.training.columns.labels is None:
        problems.append(Problem("training.columns.labels", None, "is required with models.base",
                                "There would be no labels to learn", "Write the name of the label column"))  # fmt: skip
    if models.uris and models.corpus is None and plan.corpus.columns.split is None:
        problems.append(Problem("models.corpus", None, "must say what the models have seen",
                                "Documents that a model was trained on would be explained as if held out",
                                "Write models.corpus: unseen, or corpus.columns.split"))  # fmt: skip
    if models.base is not None and plan.corpus.columns.split is not None:
        problems.append(Problem("corpus.columns.split", plan.corpus.columns.split, "goes with models.uris only",
                                "lexplain draws the splits of models.base itself; the column would have been ignored",
                                "Leave it out"))  # fmt: skip
    return problems


def _check_method(plan: Plan, find_method: FindMethod) -> list[Problem]:
    try:
        method = find_method(plan.method.id)
    except MethodError as error:
        return [Problem("method.id", plan.method.id, "is no known method", "Nothing would have been explained",
                        str(error).rsplit(". ", 1)[-1].rstrip("."))]  # fmt: skip
    return [
        dataclasses.replace(problem, field=f"method.options.{problem.field.rsplit('.', 1)[-1]}")
        for problem in method.check(plan.method.options)
    ]


def _check_keywords(plan: Plan) -> list[Problem]:
    problems: list[Problem] = []
    rules = plan.keywords
    if rules.evidence == "true_positives" and plan.corpus.columns.labels is None:
        problems.append(Problem("keywords.evidence", rules.evidence, "needs corpus.columns.labels",
                                "No document would have counted as evidence",
                                "Write corpus.columns.labels, or evidence: predicted"))  # fmt: skip
    if plan.models.multi_label and rules.probability < 0.5:
        problems.append(Problem("keywords.probability", rules.probability, "must be >= 0.5 with multi_label",
                                "Labels are explained where predicted above 0.5: the table would look as if none were between",
                                "Write probability: 0.5"))  # fmt: skip
    return problems


def _check_sink(plan: Plan) -> list[Problem]:
    problems: list[Problem] = []
    sink, models = plan.sink, plan.models
    if (sink.path is None) == (sink.schema is None):
        problems.append(Problem("sink", None if sink.path is None else "path and schema", "must have either path or schema",
                                "There would be no one place for the tables", "Write sink: {path: ./tables}"))  # fmt: skip
    if sink.schema is not None and not _SCHEMA.fullmatch(sink.schema):
        problems.append(Problem("sink.schema", sink.schema, "is no schema name", "It would have been taken for SQL",
                                "Write catalog.schema"))  # fmt: skip
    if sink.schema is not None and models.base is not None and models.folder is None:
        problems.append(Problem("models.folder", None, "is required with sink.schema and models.base",
                                "Fine-tuned models would have gone to the driver's own disk, out of the executors' reach",
                                "Write a shared path"))  # fmt: skip
    if sink.schema is not None and plan.mlflow.enabled and plan.mlflow.tracking_uri is None:
        problems.append(Problem("mlflow.tracking_uri", None, "is required with sink.schema",
                                "Runs would have gone to a file on the driver's own disk",
                                "Write the tracking server's URI (databricks on Databricks), or enabled: false"))  # fmt: skip
    return problems


def _check_files(plan: Plan) -> list[Problem]:
    """Check that local files are there; a schema's plan may be written on another machine than it runs on."""
    if plan.sink.path is None:
        return []
    named = [("corpus.path", plan.corpus.path), ("training.path", plan.training.path if plan.training else None),
             ("models.base", plan.models.base)]  # fmt: skip
    named += [(f"models.uris[{number}]", uri) for number, uri in enumerate(plan.models.uris)]
    return [
        Problem(where, path, "is not there", "The job would have failed after Spark had started",
                "Write a path that exists; relative ones count from the plan's folder")
        for where, path in named
        if path is not None and _is_local(path) and not glob.glob(path)
    ]  # fmt: skip


def _is_local(path: str) -> bool:
    return "://" not in path and re.match(r"(models|runs|dbfs|file):", path) is None


def _absolute(plan: Plan, folder: Path) -> Plan:
    """Make local paths absolute, counted from the plan's own folder: executors have another working folder."""

    def local(path: str | None) -> str | None:
        if path is None or not _is_local(path):
            return path
        return str((folder / Path(path).expanduser()).resolve())

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


# --- writing ------------------------------------------------------------------------------------------------


def _plain(value: object) -> Any:  
    """Return `value` as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key.name: _plain(getattr(value, key.name)) for key in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value


def write_template(full: bool = False) -> str:
    """Return a commented plan to start from: the ten lines that suffice, and with `full` every key."""
    lines = [
        "# A plan of lexplain. Run it with: lexplain run PLAN.yaml",
        "name: my-classes",
        "corpus:                       # documents to explain",
        "  path: documents.csv         # .csv .tsv .jsonl .parquet, a Delta folder; or table: catalog.schema.table",
        "  columns: {text: text, labels: label}",
        "training:                     # labelled documents to fine-tune on; here the same file",
        "  path: documents.csv",
        "  columns: {text: text, labels: label}",
        "models: {base: ./my-model, splits: 5}   # a Hugging Face folder or MLflow URI",
        "sink: {path: ./lexplain-tables}",
    ]
    if full:
        lines += ["", "# Every other key, with its default. Uncomment what you change.", *_template_keys(Plan, 0)]
    return "\n".join(lines) + "\n"


def _template_keys(cls: Any, depth: int) -> list[str]:  
    lines: list[str] = []
    hints = typing.get_type_hints(cls)
    for key in dataclasses.fields(cls):
        indent = "# " + "  " * depth
        nested = _nested(hints[key.name])
        if nested is not None:
            lines.append(f"{indent}{key.name}:".ljust(34) + f"# {key.metadata['says']}")
            lines += _template_keys(nested, depth + 1)
            continue
        default = None if key.default is dataclasses.MISSING else key.default
        shown = "{}" if key.default_factory is dict else json.dumps(_plain(default), ensure_ascii=False)
        lines.append(f"{indent}{key.name}: {shown}".ljust(34) + f"# {key.metadata['says']}")
    return lines
