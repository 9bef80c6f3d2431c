"""The plan: every error at once, presets, templates, and what each key is made of."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lexplain import keys
from lexplain.errors import PlanError, Problem
from lexplain.methods import find_method
from lexplain.plan import Plan, Source
from lexplain.template import write_template

FINE_TUNED = """
name: topics
corpus: {path: "s3://bucket/corpus.csv", columns: {labels: topic}}
training: {path: "s3://bucket/training.csv", columns: {labels: topic}}
models: {base: "models:/base/1"}
sink: {path: tables}
"""

READY = """
name: topics
corpus: {path: "s3://bucket/corpus.csv"}
models: {uris: ["models:/a/1", "models:/b/1"], corpus: unseen}
sink: {path: tables}
"""


def parse(text: str, /, **changes: Any) -> Plan:
    """Parse a plan with some of its keys changed, as `parse(READY, text__overlap=8)`."""
    document = yaml.safe_load(text)
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = document
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return Plan.parse(json.dumps(document), find_method)


def problems(text: str, /, **changes: Any) -> dict[str, Problem]:
    """The problems of a plan by field."""
    with pytest.raises(PlanError) as raised:
        parse(text, **changes)
    return {problem.field: problem for problem in raised.value.problems}


def problems_of(text: str) -> dict[str, Problem]:
    """The problems of YAML as it stands."""
    with pytest.raises(PlanError) as raised:
        Plan.parse(text, find_method)
    return {problem.field: problem for problem in raised.value.problems}


def leaves(cls: Any = Plan, path: str = "") -> list[tuple[str, dataclasses.Field[Any]]]:
    """Every key of a plan that is no section, as (path with `__`, field)."""
    found: list[tuple[str, dataclasses.Field[Any]]] = []
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        inner = [
            part for part in (hints[one.name], *typing.get_args(hints[one.name])) if dataclasses.is_dataclass(part)
        ]
        found += leaves(inner[0], f"{path}{one.name}__") if inner else [(f"{path}{one.name}", one)]
    return found


def all_keys(plan: Plan) -> dict[str, str]:
    """Every key of a plan, all else equal."""
    found = {
        "run": keys.run_id(plan, find_method, ["digest 1", "digest 2"]),
        "explain": keys.explain_key(plan, find_method, "digest 1", 0),
        "corpus": keys.corpus_key(plan.corpus),
        "evidence": keys.evidence_key(plan),
        "keyword": keys.keyword_key(plan, ["explain 1", "explain 2"], "snapshot", "labelled", {}),
        "calibration": keys.calibration_key(plan, find_method, "digest 1"),
        "neighbours": keys.neighbours_key(plan, find_method, "digest 1"),
    }
    if plan.training is not None:
        found["model"] = keys.model_key(plan, "digest", 0, "snapshot")
    return found


CONFIG = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"},
    "max_position_embeddings": 512,
}  # fmt: skip


def make_model(folder: Path, *files: str, **config: Any) -> Path:
    """A model as far as names and JSON tell: its config with some keys changed, and files of a byte."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for name in files or ("tokenizer.json", "model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


# --- errors ---------------------------------------------------------------------------------------------------


def test_all_errors_come_at_once():
    found = problems_of("""
nmae: topics
corpus: {pth: a.csv, limit: 0, columns: {lables: topic}, sample: 1.5}
training: {path: a.csv, table: a.b}
models: {uris: [a, b], splits: 2000, train: heads, epochs: three}
method: {id: integrated_gradients, options: {nods: 5}}
text: {max_tokens: 100, overlap: 60}
keywords: {theta: 2, labels: [yes, NA]}
execution: {device: gqu}
sink: 5
mlfow: {}
""")
    assert set(found) == {
        "nmae", "corpus.pth", "corpus.limit", "corpus.columns.lables", "corpus.sample", "training", "training.columns.labels", "models.splits",
        "models.train", "models.epochs", "models.corpus", "method.options.nods", "text.overlap", "keywords.theta",
        "keywords.labels", "execution.device", "sink", "mlfow",
    }  # fmt: skip


def test_message_has_field_value_rule_consequence_remedy():
    with pytest.raises(PlanError) as raised:
        parse(READY, corpus__limit=0, text__overlap=400)
    first, second = str(raised.value).splitlines()[1:]
    assert str(raised.value).startswith("plan: 2 problems, nothing was started.\n")
    assert first == (
        "  1. corpus.limit=0 must be >= 1. No document would have been explained. "
        "Write a number in that range, or leave it out."
    )
    assert second == (
        "  2. text.overlap=400 must be at most half of text.max_tokens=512. "
        "Each window would have advanced by a few tokens, at many times the cost. Write overlap: 64."
    )


@pytest.mark.parametrize("text", [FINE_TUNED, READY])
def test_every_problem_says_all_its_parts(text: str):
    """Break each key in turn: by a wrong type, and where it has a range by a value out of it."""
    for path, one in leaves():
        for value in ({"a": {"b": 1}}, one.metadata["high"] and one.metadata["high"] + 1):
            if value is None or path == "method__options":
                continue
            found = problems(text, **{path: value})
            problem = found[path.replace("__", ".")]
            assert all(part and not part.endswith(".") for part in (problem.rule, problem.consequence, problem.remedy))
            assert problem.remedy[0].isupper()
            assert problem.consequence[0].isupper()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"modles": {}}, "models"),
        ({"keyword": {}}, "keywords"),
        ({"corpus__columns__label": "x"}, "labels"),
        ({"corpus__columns__docid": "x"}, "doc_id"),
        ({"corpus__seperator": " "}, "label_separator"),
        ({"models__split": 3}, "splits"),
        ({"models__learningrate": 0.1}, "learning_rate"),
        ({"keywords__thetha": 0.5}, "theta"),
        ({"sink__shema": "a.b"}, "schema"),
        ({"execution__budget_token": 5}, "budget_tokens"),
    ],
)
def test_misspelt_key_suggests_the_right_one(written: dict[str, Any], meant: str):
    (name,) = written
    assert problems(READY, **written)[name.replace("__", ".")].remedy == f"Write {meant!r}"


def test_key_like_no_other_lists_the_known_ones():
    assert problems(READY, sink__zzz=1)["sink.zzz"].remedy == "Known here: path, schema"


def test_misspelt_required_key_is_said_once():
    assert set(problems_of(READY.replace("name:", "nmae:"))) == {"nmae"}
    assert set(problems_of(READY.replace("path: tables", "pth: tables"))) == {"sink.pth"}


def test_broken_key_does_not_hide_others_of_its_section():
    """A wrong `splits` used to hide that the models were not named at all."""
    assert set(problems_of("name: a\ncorpus: {limit: 0}\nmodels: {splits: 0}\nsink: {}")) == {
        "corpus", "corpus.limit", "models", "models.splits", "sink",
    }  # fmt: skip


def test_default_of_a_broken_key_is_not_judged():
    """1024 windows misspelt must not read as "overlap 300 is too much for 512"."""
    assert set(problems(READY, text={"max_tokens": "1O24", "overlap": 300})) == {"text.max_tokens"}
    columns = {"lables": "topic"}
    assert set(problems(READY, corpus__columns=columns, corpus__label_separator=" ")) == {"corpus.columns.lables"}


@pytest.mark.parametrize(
    "text",
    [
        "name: a\nname: b",
        "name: a\ncorpus: {path: a.csv, path: b.csv}",
        "name: a\ncorpus:\n  columns:\n    text: a\n    text: b",
        "method: {options: {nodes: 5, nodes: 6}}",
    ],
)
def test_key_written_twice_is_refused(text: str):
    assert "written twice" in problems_of(text)["plan"].rule


BOUNDS = [
    ("corpus__sample", [0.000001, 1, 1.0], [0, 0.0, -1, 1.01, float("nan"), float("inf")]),
    ("corpus__limit", [1, 2**31 - 1], [0, -1, 2**31, 10**400]),
    ("models__splits", [1, 1000], [0, 1001]),
    ("models__seed", [0, 2**31 - 1], [-1, 2**31]),
    ("models__test_share", [0.01, 0.9], [0.0, 0.91]),
    ("models__learning_rate", [1e-9, 1.0, "5e-5", "2.5E-05"], [0.0, 1.1, "-5e-5", "1e400"]),
    ("text__max_tokens", [128, 1_000_000], [7, 1_000_001]),
    ("text__max_windows", [1, None], [0]),
    ("keywords__probability", [0.0, 0.999999], [-0.1, 1, 1.0]),
    ("keywords__theta", [0, 0.0, 1, 1.0], [-0.01, 1.01]),
    ("keywords__min_df", [0], [-1]),
    ("keywords__max_classes", [1, None], [0]),
    ("keywords__top", [1, None], [0]),
    ("limits__device_hours", [1e-9, 10**6, None], [0, float("inf"), float("nan"), 10**400]),
    ("limits__rejected_share", [0, 1, None], [-0.1, 1.1]),
    ("execution__budget_tokens", [16, None], [15]),
    ("execution__threads", [1, None], [0]),
]


@pytest.mark.parametrize(("path", "fits", "breaks"), BOUNDS, ids=[path for path, _, _ in BOUNDS])
def test_ranges_end_where_they_say(path: str, fits: list[Any], breaks: list[Any]):
    for value in fits:
        parse(FINE_TUNED, **{path: value})
    for value in breaks:
        assert set(problems(FINE_TUNED, **{path: value})) == {path.replace("__", ".")}


def test_ranges_are_written_out_to_the_last_digit():
    assert problems(READY, models__seed=-1)["models.seed"].rule == "must be >= 0 and <= 2147483647"
    assert problems(READY, keywords__probability=1)["keywords.probability"].rule == "must be >= 0 and <= 0.999999"
    assert problems(READY, corpus__sample=0)["corpus.sample"].rule == "must be > 0 and <= 1"


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("name", 2024, "must be a string"),
        ("corpus__path", [], "must be a string"),
        ("corpus__path", " ", "must not be empty"),
        ("corpus__header", "yes", "must be true or false"),
        ("corpus__header", 1, "must be true or false"),
        ("corpus__columns", "text", "must be a mapping of keys"),
        ("corpus__columns__labels", {}, "must be a string"),
        ("corpus__label_separator", "", "must not be empty"),
        ("models__uris", "one", "must be a list of strings"),
        ("models__uris", [1], "must be a list of strings"),
        ("models__splits", True, "must be a whole number"),
        ("models__splits", 2.0, "must be a whole number"),
        ("models__splits", None, "must be a whole number"),
        ("models__test_share", "many", "must be a number"),
        ("models__train", False, "is not one of the choices"),
        ("models__train", ["full"], "is not one of the choices"),
        ("method__options", [5], "must be a mapping of options"),
        ("method__options", {"no way": 5}, "must be a mapping of options"),
        ("method__id", "lime", "is no known method"),
        ("method__options", {"nodes": "many"}, "must be a whole number or null"),
        ("sink__path", "a\0b", "must hold neither NUL nor half of a surrogate pair"),
        ("sink__path", "a\ud800b", "must hold neither NUL nor half of a surrogate pair"),
    ],
)
def test_wrong_types(path: str, value: object, rule: str):
    found = problems(READY, **{path: value}).values()
    assert rule in {problem.rule for problem in found}


def test_white_space_may_separate_labels():
    plan = parse(READY, corpus__label_separator=" ", corpus__columns={"labels": "topics"})
    assert plan.corpus.label_separator == " "


@pytest.mark.parametrize("path", ["keywords__evidence", "text__merge", "execution__device", "corpus__format", "preset"])
def test_choices_are_listed(path: str):
    problem = problems(READY, **{path: "nothing like it"})[path.replace("__", ".")]
    assert problem.remedy.startswith("Write one of: ")
    assert problem.remedy.count(",") >= 1


def test_null_sections_are_sections_without_keys():
    assert Plan.parse(
        READY + "keywords:\ntext:\nmethod:\nlimits:\nexecution:\nmlflow:\ntraining:\n", find_method
    ) == parse(READY)
    assert parse(READY, method={"options": None}) == parse(READY)
    assert set(problems_of("name:\ncorpus:\nmodels:\nsink:\n")) == {"name", "corpus", "models", "sink"}


def test_problems_of_values_that_would_fill_the_memory_stay_short():
    """Written out, this alias bomb has 10 to the power of 9 members."""
    bomb = "a: &a [x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    text = f"{bomb}name: *i\nmodels: {{train: *i, uris: *i}}\npreset: *i\nmethod: {{options: {{nodes: [*i]}}}}"
    with pytest.raises(PlanError) as raised:
        Plan.parse(text, find_method)
    assert len(str(raised.value)) < 10_000
    assert "name=<list of 10> must be a string" in str(raised.value)


# --- YAML -----------------------------------------------------------------------------------------------------


def test_exponents_without_a_dot_are_numbers():
    assert (
        Plan.parse(FINE_TUNED.replace("models: {", "models: {learning_rate: 5e-5, "), find_method).models.learning_rate
        == 5e-5
    )


@pytest.mark.parametrize("labels", ["[yes, no]", "[on, business]", "[2024-01-01]", "[1, 2]", "[null]", "[NA, ~]", "no"])
def test_labels_that_yaml_reads_otherwise_are_refused(labels: str):
    assert 'as "no"' in problems_of(READY + f"keywords: {{labels: {labels}}}")["keywords.labels"].remedy


def test_quoted_labels_are_kept():
    text = READY + 'keywords: {labels: ["no", "on", NA, "2024-01-01", n, y]}'
    assert Plan.parse(text, find_method).keywords.labels == ("no", "on", "NA", "2024-01-01", "n", "y")


def test_unquoted_date_as_name():
    assert problems_of(READY.replace("topics", "2024-01-01"))["name"].remedy == 'Write it in quotes: "2024-01-01"'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("# nothing but a comment\n", "it is empty"),
        ("- a\n- b", "it holds a list"),
        ("just words", "it holds a str"),
        ("name:\n\tcorpus: 1", "cannot start any token"),
        ("name: a\n---\nname: b", "expected a single document"),
        ("name: 2024-13-01", "'2024-13-01' has no value: month must be in 1..12"),
        ("name: !!int x", "has no value"),
        ("name: !!bool x", "has no value"),
        ("name: 0x_", "has no value"),
        ("name: " + "9" * 5000, "has no value"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [a]\n: b", "unhashable"),
        ("[" * 3000, "nested too deeply"),
        ("name: \x00", "special characters are not allowed"),
        ("a: *unknown", "undefined alias"),
    ],
)
def test_what_is_no_mapping_is_one_problem(text: str, says: str):
    (problem,) = problems_of(text).values()
    assert problem.field == "plan"
    assert says in problem.rule


def test_files_that_cannot_be_read(tmp_path: Path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    for path in (binary, tmp_path / "missing.yaml", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(PlanError) as raised:
            Plan.load(path, find_method)
        (problem,) = raised.value.problems
        assert problem.field == "plan"
        assert problem.value == str(path)


def test_byte_order_mark_is_no_key(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text(READY, encoding="utf-8-sig")
    assert Plan.load(path, find_method).name == "topics"


TEXTS = st.text(st.sampled_from("nameCORPUS: {}[],&*!|>-?#'\"\n\t~<%@`0x1e.5_é\u0000"), max_size=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def parse_or_refuse(text: str) -> Plan | None:
    """The plan, or None where it has problems; every other error fails the test."""
    try:
        return Plan.parse(text, find_method, folder=Path("/tmp"))
    except PlanError as error:
        return None if error.problems and str(error) else pytest.fail("an error without a problem")


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_no_text_raises_anything_but_a_plan_error(before: str, after: str):
    for text in (before, READY + before, before + READY, READY[: len(before)] + after + READY[len(before) :]):
        parse_or_refuse(text)


@settings(max_examples=300)
@given(st.data())
def test_no_value_raises_anything_but_a_plan_error(data: st.DataObject):
    path, _ = data.draw(st.sampled_from(list(leaves())))
    *sections, last = path.split("__")
    document = yaml.safe_load(READY)
    inner: Any = document
    for section in sections[: data.draw(st.integers(0, len(sections)))]:
        inner = inner.setdefault(section, {})
    inner[data.draw(st.just(last) | st.text(max_size=10))] = data.draw(VALUES)
    plan = parse_or_refuse(yaml.safe_dump(document, allow_unicode=True))
    if plan is not None:
        assert parse_or_refuse(plan.to_yaml()) == plan
        assert all_keys(copy.deepcopy(plan)) == all_keys(plan)


# --- rules across keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "changes", "field"),
    [
        (READY, {"corpus__table": "a.b"}, "corpus"),
        (READY, {"corpus__path": "s3://bucket/folder"}, "corpus.path"),
        (READY, {"corpus": {"table": "a.b; DROP TABLE c"}}, "corpus.table"),
        (READY, {"corpus": {"table": "a.b.c.d"}}, "corpus.table"),
        (READY, {"corpus__label_separator": " "}, "corpus.label_separator"),
        (READY, {"models": {}}, "models"),
        (READY, {"models__base": "models:/c/1", "models__corpus": None, "training": yaml.safe_load(FINE_TUNED)["training"]}, "models"),
        (READY, {"models__corpus": None}, "models.corpus"),
        (READY, {"corpus__columns": {"split": "seen"}}, "models.corpus"),
        (READY, {"keywords__evidence": "true_positives"}, "keywords.evidence"),
        (READY, {"models__splits": 7}, "models.splits"),
        (FINE_TUNED, {"models__multi_label": True, "keywords__probability": 0.4}, "keywords.probability"),
        (READY, {"sink__schema": "a.b", "mlflow__enabled": False}, "sink"),
        (READY, {"sink": {"schema": "a.b"}}, "mlflow.tracking_uri"),
        (READY, {"sink": {"schema": "a b"}, "mlflow__enabled": False}, "sink.schema"),
        (READY, {"sink": {"path": "a/${env:HOME}"}}, "sink.path"),
        (READY, {"corpus__columns": {"text": "${spark.app.name}"}}, "corpus.columns.text"),
        (READY, {"corpus": {"path": "s3://b/${x}", "format": "delta"}}, "corpus.path"),
        (READY, {"name": "a/b"}, "name"),
        (READY, {"name": "x" * 101}, "name"),
        (READY, {"name": ".hidden"}, "name"),
        (FINE_TUNED, {"training": None}, "training"),
        (FINE_TUNED, {"training__columns": {}}, "training.columns.labels"),
        (FINE_TUNED, {"corpus__columns": {"split": "seen"}}, "corpus.columns.split"),
        (FINE_TUNED, {"models__corpus": "unseen"}, "models.corpus"),
        (FINE_TUNED, {"sink": {"schema": "a.b"}, "mlflow__enabled": False}, "models.folder"),
        (READY, {"sink": {"schema": "a.b"}, "mlflow__enabled": False, "method__id": "lafa"}, "method.id"),
    ],
)  # fmt: skip
def test_rules_across_keys(text: str, changes: dict[str, Any], field: str):
    found = problems(text, **changes)
    assert field in found
    assert all(name == field or name.startswith("models.corpus") for name in found)


def test_what_lafa_needs_a_folder_for_has_one_wherever_there_can_be_one():
    place: dict[str, Any] = {"sink": {"schema": "a.b"}, "mlflow__enabled": False}
    assert parse(READY, method__id="lafa")
    assert parse(FINE_TUNED, **place, method__id="lafa", models__folder="/mnt/models")
    assert parse(READY, **place, method__id="discretized_integrated_gradients"), "executors search for themselves"
    found = problems(READY, **place, method={"id": "lafa", "options": {"base": "none"}})
    assert set(found) == {"method.options.base"}, "what is wrong with the options comes first"


def test_evidence_fits_the_corpus():
    assert parse(READY).evidence == "predicted"
    assert parse(FINE_TUNED).evidence == "true_positives"
    assert parse(FINE_TUNED, keywords__evidence="predicted").evidence == "predicted"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a.csv", "csv"), ("a.TSV", "tsv"), ("a.csv.gz", "csv"), ("a.jsonl", "json"), ("a/*.parquet", "parquet"),
        ("s3://b/a.ndjson.bz2", "json"), ("a.v2", None), ("folder", None), ("x" * 5000, None),
    ],
)  # fmt: skip
def test_format_is_told_from_the_path(path: str, kind: str | None):
    assert Source(path=path).kind == kind
    assert Source(path=path, format="delta").kind == "delta"


def test_delta_folder_is_found_by_its_log(tmp_path: Path):
    (tmp_path / "_delta_log").mkdir()
    assert Source(path=str(tmp_path)).kind == "delta"


# --- presets ----------------------------------------------------------------------------------------------------


def test_preset_sacx_2022_is_the_published_aggregation():
    plan = parse(READY, preset="sacx-2022")
    rules = plan.keywords
    assert plan.method.id == "integrated_gradients"
    assert plan.method.options == {"rule": "gauss_legendre", "nodes": 30, "baseline": "-"}
    assert plan.text.merge == "absmax"
    assert (rules.theta, rules.probability, rules.top_n, rules.min_df) == (0.7, 0.7, 20, 5)
    assert (rules.max_classes, rules.word_rule, rules.top) == (None, "sacx-2022", 100)


def test_a_preset_leaves_the_options_of_other_methods_alone():
    for name in ("gradient_x_input", "saliency.v1"):
        plan = parse(READY, preset="sacx-2022", method={"id": name})
        assert plan.method.options == {}
        assert plan.text.merge == "absmax"
    versioned = parse(READY, preset="sacx-2022", method={"id": "integrated_gradients.v1"})
    assert versioned.method.options["nodes"] == 30


def test_plan_overrides_its_preset_key_by_key():
    plan = parse(READY, preset="sacx-2022", keywords__theta=0.5, method={"options": {"nodes": 10}})
    assert plan.keywords == dataclasses.replace(parse(READY, preset="sacx-2022").keywords, theta=0.5)
    assert plan.method.options == {"rule": "gauss_legendre", "nodes": 10, "baseline": "-"}


def test_empty_section_leaves_the_preset_alone():
    """`keywords:` with nothing below used to set every threshold back to the default."""
    plan = parse(READY, preset="sacx-2022")
    assert Plan.parse(READY + "preset: sacx-2022\nkeywords:\ntext:\nmethod: {options: }\n", find_method) == plan


def test_preset_and_the_same_plan_written_out_share_their_keys():
    preset = parse(READY, preset="sacx-2022")
    written = Plan.parse(preset.to_yaml().replace("preset: sacx-2022", "preset: default"), find_method)
    assert written != preset
    assert all_keys(written) == all_keys(preset)


@pytest.mark.parametrize(
    ("condition", "rule"),
    [
        ("day < '${env:DAY}'", "must not hold '${'"),
        ("day <= current_date", "depends on more than the row: 'current_date'"),
        ("day <= date_sub(NOW( ), 1)", "depends on more than the row: 'NOW('"),
        ("rand() < 0.1", "depends on more than the row: 'rand('"),
        ("id IN (SELECT id FROM others)", "depends on more than the row: '(SELECT'"),
    ],
)
def test_conditions_select_the_same_rows_tomorrow(condition: str, rule: str):
    assert problems(READY, corpus__where=condition)["corpus.where"].rule == rule


def test_conditions_may_name_what_functions_are_called():
    parse(
        READY,
        corpus__where="user = 'rand()' AND `current_date` < '2026-01-31' AND brand(x) AND word = 'it\\'s now(' AND now > 3",
    )


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        parse(FINE_TUNED), parse(READY), parse(READY, preset="sacx-2022"),
        parse(READY, corpus={"table": "a.b.c", "where": "x = 'no' AND y < 5e-5", "sample": 5e-5}),
        parse(READY, keywords__labels=["no", "NA", "2024-01-01", "på", "a: b", "#", "5e-5"]),
        parse(READY, corpus__label_separator=" ", corpus__columns={"labels": "l"}),
        parse(FINE_TUNED, models__learning_rate=5e-5, method={"options": {"rule": "midpoint", "nodes": 7}}, limits__device_hours=0.1),
    ],
)  # fmt: skip
def test_written_plan_is_the_plan(plan: Plan):
    assert Plan.parse(plan.to_yaml(), find_method) == plan


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:secret@host:5000/x", "https://***@host:5000/x"),
        ("https://me:p@ss'word@host/x", "https://***@host/x"),
        ("https://secret@host", "https://***@host"),
        ("https://host/x?sas_token=secret&page=2", "https://host/x?sas_token=***&page=2"),
        ("https://host/x?sv=1&sig=secret", "https://host/x?sv=1&sig=***"),
        ("mysql://me:secret@host/x?ssl=1", "mysql://***@host/x?ssl=1"),
        ("abfss://container@account.dfs.core.windows.net/x", "abfss://container@account.dfs.core.windows.net/x"),
        ("models:/name@champion", "models:/name@champion"),
    ],
)
def test_credentials_are_not_written(uri: str, shown: str):
    written = parse(
        READY, mlflow__tracking_uri=uri, models__uris=[uri], corpus={"path": uri, "format": "csv"}
    ).to_yaml()
    assert "secret" not in written
    assert "ss'word" not in written
    document = yaml.safe_load(written)
    assert (document["mlflow"]["tracking_uri"], document["models"]["uris"], document["corpus"]["path"]) == (
        shown,
        [shown],
        shown,
    )


def make_template_files(folder: Path) -> Path:
    make_model(folder / "my-model")
    (folder / "documents.csv").write_text("text,label\n")
    return folder


def test_short_template_is_short_and_loads(tmp_path: Path):
    template = write_template()
    assert len([line for line in template.splitlines() if not line.startswith("#")]) <= 10
    plan = Plan.parse(template, find_method, folder=make_template_files(tmp_path))
    assert plan.models.base == str(tmp_path / "my-model")


def test_full_template_loads_with_any_line_uncommented(tmp_path: Path):
    folder = make_template_files(tmp_path)
    short = Plan.parse(write_template(), find_method, folder=folder)
    full = write_template(full=True)
    assert Plan.parse(full, find_method, folder=folder) == short
    lines = full.splitlines()
    commented = [number for number, line in enumerate(lines) if re.match(r" *# \w+: ", line)]
    assert len(commented) > 50
    for number in commented:
        text = "\n".join([*lines[:number], lines[number].replace("# ", "", 1), *lines[number + 1 :]])
        assert Plan.parse(text, find_method, folder=folder) == short, lines[number]
    everything = "\n".join(re.sub(r"^( *)# (\w+: )", r"\1\2", line) for line in lines)
    assert Plan.parse(everything, find_method, folder=folder) == short


def test_full_template_names_every_key():
    document = yaml.safe_load(re.sub(r"(?m)^( *)# (\w+: )", r"\1\2", write_template(full=True)))
    assert set(flatten(document)) == {path for path, _ in leaves()}


def flatten(document: Mapping[str, Any], path: str = "") -> list[str]:
    found: list[str] = []
    for name, value in document.items():
        nested = isinstance(value, Mapping) and name != "options"
        found += flatten(value, f"{path}{name}__") if nested else [f"{path}{name}"]
    return found


def test_a_method_preset_lays_its_options_below_the_plans_own() -> None:
    text = READY + "method: {id: marc, preset: marc-paper, options: {complement: one_minus_p}}\n"
    options = Plan.parse(text, find_method).method.options
    assert options == {**find_method("marc").presets["marc-paper"], "complement": "one_minus_p"}
    assert options["kernel"] == "sigma"
    stored = Plan.parse(text, find_method).to_yaml()
    assert Plan.parse(stored, find_method).method.options == options, "a stored plan reads the same"


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("{id: marc, preset: marc}", "Write one of: marc-2023, marc-paper"),
        ("{id: random, preset: marc-paper}", "Leave it out"),
    ],
)
def test_an_unknown_method_preset_is_told(method: str, remedy: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(READY + f"method: {method}\n", find_method)
    (problem,) = caught.value.problems
    assert problem.field == "method.preset"
    assert remedy in problem.remedy
