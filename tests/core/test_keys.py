"""Keys: each changes with exactly what changes its stage's numbers."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
import yaml

from core.test_plan import FINE_TUNED, READY, all_keys, leaves, parse
from lexplain import keys
from lexplain.methods import find_method
from lexplain.plan import Plan

SOURCE = {"corpus", "keyword", "run", "calibration"}
TRAINING = {"model", "keyword", "run", "neighbours"}  # keyword: its labels give the document frequencies
RECIPE = {"model", "run"}
TEXT = {"explain", "run"}
RULES = {"keyword", "run"}

# Path, other value, the keys that must change. Whatever makes other models or explanations makes other digests, from
# which keyword_key is made, so it changes there without being named.
CHANGES: list[tuple[str, Any, set[str]]] = [
    ("name", "other", {"run"}),
    ("preset", "sacx-2022", {"explain", "evidence", "keyword", "run", "calibration"}),  # another baseline
    ("corpus__table", "a.b", SOURCE),
    ("corpus__path", "s3://bucket/other.csv", SOURCE),
    ("corpus__format", "json", SOURCE),
    ("corpus__columns__text", "body", SOURCE),
    ("corpus__columns__doc_id", "id", SOURCE),
    ("corpus__columns__labels", "class", SOURCE),
    ("corpus__label_separator", "|", SOURCE),
    ("corpus__header", False, SOURCE),
    ("corpus__where", "x > 1", SOURCE),
    ("corpus__watermark", "seen_at", set()),
    ("corpus__sample", 0.5, SOURCE),
    ("corpus__limit", 5, SOURCE),
    ("training__table", "a.b", TRAINING),
    ("training__path", "s3://bucket/other.csv", TRAINING),
    ("training__format", "json", TRAINING),
    ("training__columns__text", "body", TRAINING),
    ("training__columns__doc_id", "id", TRAINING),
    ("training__columns__labels", "class", TRAINING),
    ("training__columns__split", "seen", TRAINING),
    ("training__label_separator", "|", TRAINING),
    ("training__header", False, TRAINING),
    ("training__where", "x > 1", TRAINING),
    ("training__watermark", "seen_at", set()),
    ("training__sample", 0.5, TRAINING),
    ("training__limit", 5, TRAINING),
    ("models__base", "models:/other/1", set()),  # its digest counts
    ("models__splits", 7, {"run"}),
    ("models__seed", 2, RECIPE),
    ("models__test_share", 0.5, {"model", "keyword", "run"}),
    ("models__multi_label", True, RECIPE),
    ("models__train", "head", RECIPE),
    ("models__epochs", 4, RECIPE),
    ("models__learning_rate", 1e-4, RECIPE),
    ("models__learning_rate", 5e-5, set()),  # what it is where none is written
    ("models__batch_size", 8, RECIPE),
    ("models__accumulate", 2, RECIPE),
    ("models__patience", 2, RECIPE),
    ("models__folder", "/elsewhere", set()),
    ("models__register_as", "other", set()),
    ("method__id", "integrated_gradients.v1", set()),  # the newest version by name
    ("method__preset", "any", set()),  # its options count
    ("method__options", {"rule": "midpoint", "nodes": 20}, TEXT),
    ("method__accuracy", "keywords", TEXT),
    ("method__top_k", 3, TEXT | {"calibration"}),
    ("method__gold", True, TEXT),
    ("method__against", "b", TEXT | {"neighbours"}),
    ("method__precision", "bfloat16", TEXT | {"calibration", "neighbours"}),
    ("execution__compile", True, set()),
    ("text__max_tokens", 256, TEXT | {"model", "calibration", "neighbours"}),
    ("text__overlap", 32, TEXT | {"calibration", "neighbours"}),
    ("text__max_windows", 1, TEXT | {"calibration", "neighbours"}),
    ("text__max_characters", 1000, TEXT | {"model", "calibration", "neighbours"}),
    ("text__merge", "absmax", TEXT),
    ("keywords__evidence", "predicted", {"evidence", "keyword", "run"}),
    ("keywords__probability", 0.6, {"evidence", "keyword", "run"}),
    ("keywords__top_n", 10, {"evidence", "keyword", "run"}),
    ("keywords__word_rule", "sacx-2022", {"evidence", "keyword", "run"}),
    ("keywords__theta", 0.5, RULES),
    ("keywords__min_df", 4, RULES),
    ("keywords__max_classes", 1, RULES),
    ("keywords__top", 50, RULES),
    ("keywords__labels", ["a", "b"], RULES),
    *[(path, value, set()) for path, value in [
        ("limits__device_hours", 5.0), ("limits__rejected_share", 0.5), ("execution__device", "cpu"),
        ("execution__threads", 2), ("execution__budget_tokens", 1000), ("execution__chunk_documents", 10), ("execution__chunk_minutes", 5.0),
        ("execution__idle_timeout_seconds", 100),
        ("execution__models_in_memory", 1), ("execution__allow_pickle", True), ("sink__path", "elsewhere"),
        ("sink__schema", "a.b"), ("mlflow__enabled", False), ("mlflow__tracking_uri", "http://host"),
        ("mlflow__experiment", "other"),
    ]],
]  # fmt: skip
READY_CHANGES: list[tuple[str, Any, set[str]]] = [
    ("models__uris", ["models:/c/1", "models:/d/1"], set()),  # their digests count
    ("models__corpus", None, {"run"}),
    ("corpus__columns__split", "seen", SOURCE | {"neighbours"}),
]


def change(text: str, path: str, value: object) -> Plan:
    """The plan with one key changed, unchecked: a change alone may break a rule across keys."""
    plan: Any = parse(text, corpus__label_separator=" ", corpus__columns__labels="topic")
    return replace(plan, path.split("__"), tuple(value) if isinstance(value, list) else value)


def replace(section: Any, path: list[str], value: object) -> Any:
    if path == ["preset"] and isinstance(section, Plan):
        return parse(FINE_TUNED, corpus__label_separator=" ", preset=value)
    inner = value if len(path) == 1 else replace(getattr(section, path[0]), path[1:], value)
    return dataclasses.replace(section, **{path[0]: inner})


@pytest.mark.parametrize(("path", "value", "expected"), CHANGES, ids=[path for path, _, _ in CHANGES])
def test_each_key_changes_with_what_it_should(path: str, value: object, expected: set[str]):
    before, after = all_keys(parse(FINE_TUNED, corpus__label_separator=" ")), all_keys(change(FINE_TUNED, path, value))
    assert {name for name in before if before[name] != after[name]} == expected


@pytest.mark.parametrize(("path", "value", "expected"), READY_CHANGES, ids=[path for path, _, _ in READY_CHANGES])
def test_each_key_changes_with_what_it_should_for_ready_models(path: str, value: object, expected: set[str]):
    before = all_keys(parse(READY, corpus__label_separator=" ", corpus__columns__labels="topic"))
    after = all_keys(change(READY, path, value))
    assert {name for name in before if before[name] != after[name]} == expected


def test_table_of_changes_names_every_key_of_a_plan():
    assert {path for path, _, _ in CHANGES + READY_CHANGES} == {path for path, _ in leaves()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"corpus__format": "csv"}),
        ({}, {"training__format": "csv"}),
        ({}, {"keywords__evidence": "true_positives"}),
        ({"keywords__labels": ["a", "b"]}, {"keywords__labels": ["b", "a", "a"]}),
        ({}, {"method__options": {"rule": "adaptive", "tolerance": 0.05, "baseline": "mask"}}),
        ({"keywords__theta": 1}, {"keywords__theta": 1.0}),
        (
            {"corpus__path": "s3://b/a.parquet"},
            {"corpus__path": "s3://b/a.parquet", "corpus__header": False},
        ),
    ],
)
def test_plans_that_mean_the_same_share_their_keys(first: dict[str, Any], second: dict[str, Any]):
    assert all_keys(parse(FINE_TUNED, **first)) == all_keys(parse(FINE_TUNED, **second))


def test_keys_change_with_what_is_no_part_of_the_plan():
    plan = parse(FINE_TUNED)
    models = {keys.model_key(plan, *of) for of in [("d", 0, "s"), ("e", 0, "s"), ("d", 1, "s"), ("d", 0, "t")]}
    assert len(models) == 4
    assert keys.explain_key(plan, find_method, "d", 0) != keys.explain_key(plan, find_method, "e", 0)
    tables = [(["a", "b"], "s", "t"), (["a"], "s", "t"), (["a", "b"], "t", "t"), (["a", "b"], "s", None)]
    assert len({keys.keyword_key(plan, *of, {}) for of in tables}) == 4
    assert keys.keyword_key(plan, ["a", "b"], "s", None, {}) == keys.keyword_key(plan, ["b", "a"], "s", None, {})
    counts: list[dict[str, int]] = [
        {"explained": 9, "rejected": 0},
        {"explained": 8, "rejected": 0},
        {"rejected": 1},
        {"settled": 1},
    ]
    same, fewer, *others = [keys.keyword_key(plan, ["a", "b"], "s", None, each) for each in counts]
    assert same == fewer == keys.keyword_key(plan, ["a", "b"], "s", None, {})
    assert len({same, *others}) == 3  # what is rejected or settled may be explained yet
    runs = {keys.run_id(plan, find_method, digests) for digests in (["a", "b"], ["b", "a"], ["a"])}
    assert len(runs) == 3  # the place of a ready model is the number that corpus.columns.split means


def test_references_are_training_documents_only_where_models_are_fine_tuned() -> None:
    """Ready models that come with training documents, for their labels, are compared with the corpus all the same."""
    ready, tuned = parse(READY, method={"id": "lafa"}), parse(FINE_TUNED, method={"id": "lafa"})
    labelled = parse(READY, method={"id": "lafa"}, training=yaml.safe_load(FINE_TUNED)["training"])
    other = parse(FINE_TUNED, method={"id": "lafa"}, training__path="s3://bucket/other.csv")
    names = [keys.neighbours_key(plan, find_method, "digest") for plan in (ready, labelled, tuned, other)]
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"weight": 9.0}, True), ({"quantile": 0.3}, True), ({"neighbours": 3}, True),
        ({"samples": 7}, False), ({"noise": 0.3}, False), ({"base": "saliency"}, False), ({"layer": 2}, False),
    ],
)  # fmt: skip
def test_references_change_with_what_their_scores_are_made_with(options: dict[str, Any], same: bool) -> None:
    before, after = (
        keys.neighbours_key(parse(READY, method={"id": "lafa", "options": each}), find_method, "digest")
        for each in ({}, options)
    )
    assert (before == after) is same


def test_digest_is_stable_and_tells_types_apart():
    assert keys.digest("corpus", {"b": 1, "a": [None, "ö"]}) == keys.digest("corpus", {"a": (None, "ö"), "b": 1})
    assert keys.digest("corpus", "ö") == hashlib.sha256('["corpus","ö"]'.encode()).hexdigest()[:20]
    assert len({keys.digest(*parts) for parts in [("1",), (1,), (None,), ("",), (), ("1", ""), (["1"],)]}) == 7
