"""The plan loader, given anything: a plan, or one error that names every problem; in a bounded time."""

from __future__ import annotations

import dataclasses
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.test_plan import FINE_TUNED, READY, all_keys, leaves
from lexplain.errors import PlanError
from lexplain.methods import METHODS, find_method
from lexplain.plan import Plan
from lexplain.template import write_template

SECONDS = 5.0
"""A plan is read in milliseconds; this is for what is made to take long."""

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.datetimes() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers() | st.dates(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def parse(text: str, folder: Path | None = None) -> Plan | PlanError:
    """The plan or its error, within the time; every other error fails the test."""
    started = time.process_time()
    error: PlanError | None = None
    try:
        plan = Plan.parse(text, find_method, folder=folder)
    except PlanError as raised:
        error = raised
    assert time.process_time() - started < SECONDS
    if error is None:
        return plan
    assert error.problems
    for problem in error.problems:
        parts = (problem.rule, problem.consequence, problem.remedy)
        assert all(part.strip() and not part.endswith(".") for part in parts)
        assert problem.field in str(error)
    assert len(str(error)) < 3000 * len(error.problems)
    return error


def check_written(plan: Plan) -> None:
    assert parse(plan.to_yaml()) == plan
    assert all_keys(typing.cast(Plan, parse(plan.to_yaml()))) == all_keys(plan)


# --- nestings of types ------------------------------------------------------------------------------------------


def fitting(hint: Any, one: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Values that a setting takes, as far as it can be told alone."""
    options = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(options)
    if len(options) == 1 and typing.get_origin(hint) is not tuple:
        return st.none() | fitting(options[0], one)
    low, high, above = (one.metadata[bound] for bound in ("low", "high", "above"))
    if hint is bool:
        return st.booleans()
    if hint is int:
        return st.integers(low, min(high or 2**31 - 1, 2**31 - 1))
    if hint is float:
        return st.floats(above if low is None else low, high or 1e6, exclude_min=low is None)
    if typing.get_origin(hint) is tuple:
        return st.lists(WORDS, max_size=3)
    return WORDS


def sections(cls: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings of a section: mostly keys and values that fit, now and then anything."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, st.SearchStrategy[Any]] = {}
    for one in dataclasses.fields(cls):
        hint = hints[one.name]
        inner = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        fits = sections(inner[0]) if inner else st.just({}) if one.name == "options" else fitting(hint, one)
        keys[one.name] = st.integers(0, 29).flatmap(lambda draw, fits=fits: fits if draw else ANYTHING)
    return st.fixed_dictionaries({}, optional=keys)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(merged.get(name), dict) and isinstance(value, dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def test_sections_of_any_values() -> None:
    """Every accepted plan is written and read back the same; enough are accepted for that to say something."""
    found = Counter[bool]()
    alone = {"text", "keywords", "limits", "execution", "mlflow"}  # in others one wrong key is enough

    @given(st.sampled_from([READY, FINE_TUNED]), sections(Plan), st.booleans())
    def check(base: str, drawn: dict[str, Any], whole: bool) -> None:
        kept = drawn if whole else {name: value for name, value in drawn.items() if name in alone}
        plan = parse(yaml.safe_dump(merge(yaml.safe_load(base), kept), allow_unicode=True))
        found[isinstance(plan, Plan)] += 1
        if isinstance(plan, Plan):
            check_written(plan)

    check()
    assert found[True] > 5
    assert found[False] > 5


@given(ANYTHING)
def test_documents_of_any_types(document: Any) -> None:
    assert isinstance(parse(yaml.safe_dump(document, allow_unicode=True)), PlanError)


@given(st.data())
def test_every_broken_key_is_named(data: st.DataObject) -> None:
    """However many are broken at once."""
    text = data.draw(st.sampled_from([READY, FINE_TUNED]))
    document = yaml.safe_load(text)
    names = [
        path
        for path, _ in leaves()
        if path != "method__options" and (text is FINE_TUNED or not path.startswith("training"))
    ]
    broken = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12, unique=True))
    for path in broken:
        *outer, last = path.split("__")
        inner = document
        for section in outer:
            inner = inner.setdefault(section, {})
        inner[last] = {"no": {"such": "value"}}
    error = parse(yaml.safe_dump(document))
    assert isinstance(error, PlanError)
    assert {path.replace("__", ".") for path in broken} <= {problem.field for problem in error.problems}


@given(st.sampled_from(sorted(METHODS)), st.dictionaries(WORDS, ANYTHING, max_size=3), st.data())
def test_options_of_any_method(name: str, options: dict[str, Any], data: st.DataObject) -> None:
    known = METHODS[name].options
    if known:
        chosen = data.draw(st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True))
        options |= {key: data.draw(ANYTHING | st.just(known[key].default)) for key in chosen}
    document = yaml.safe_load(READY) | {"method": {"id": name, "options": options}}
    plan = parse(yaml.safe_dump(document, allow_unicode=True))
    if isinstance(plan, Plan):
        check_written(plan)


# --- texts ------------------------------------------------------------------------------------------------------


@given(st.sampled_from([READY, FINE_TUNED, write_template(full=True)]), st.data())
def test_plans_that_were_spoilt(text: str, data: st.DataObject) -> None:
    """Characters of YAML put anywhere, lines lost, doubled and moved."""
    for _ in range(data.draw(st.integers(1, 4))):
        lines = text.splitlines(keepends=True)
        change = data.draw(st.sampled_from(["insert", "delete", "double", "move"]))
        if change == "insert":
            place = data.draw(st.integers(0, len(text)))
            text = (
                text[:place]
                + data.draw(st.text(st.sampled_from("{}[],&*!|>-?#'\"\n\t~<%@`:= x0.\\\u0085\u2028\ufeff"), max_size=4))
                + text[place:]
            )
        elif lines:
            line = lines.pop(data.draw(st.integers(0, len(lines) - 1)))
            for _ in range(("delete", "move", "double").index(change)):
                lines.insert(data.draw(st.integers(0, len(lines))), line)
            text = "".join(lines)
    plan = parse(text, folder=Path("/"))
    if isinstance(plan, Plan):
        check_written(plan)


@given(st.binary(max_size=200) | st.text().map(lambda text: text.encode("utf-16")))
def test_files_of_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(PlanError):
        Plan.load(path, find_method)


def nest(open_: str, close: str, depth: int) -> str:
    return f"name: {open_ * depth}{close * depth}"


def bomb(make: Callable[[str], str]) -> str:
    """Nine levels, each ten times the one before."""
    levels = zip("abcdefgh", "bcdefghi", strict=True)
    return "a: &a {k0: v}\n" + "".join(f"{name}: &{name} {make(f'*{before}')}\n" for before, name in levels)


def bombs() -> Iterator[tuple[str, str]]:
    yield "aliases", bomb(lambda before: f"[{', '.join([before] * 10)}]") + "name: *i"
    yield "aliases as keys", bomb(lambda before: f"[{', '.join([before] * 10)}]") + "? *i\n: b"
    yield "merges", bomb(lambda before: f"{{<<: [{', '.join([before] * 10)}]}}") + "text: *i"
    yield (
        "merges of many keys",
        "".join(f"k{n}: &a{n} {{x{n}: 1{f', <<: *a{n - 1}' if n else ''}}}\n" for n in range(300)),
    )
    yield (
        "a mapping in itself",
        "&p\nname: a\ncorpus: *p\ntraining: {columns: *p}\nmodels: &m {uris: [*m], base: *p}\nsink: *p",
    )
    yield "a list in itself", "name: &n [*n]\nmethod: {options: {nodes: *n}}\nkeywords: {labels: *n}"
    yield "options in themselves", READY + "method: {options: &o {nodes: *o, rule: [*o]}}"
    for depth in (100, 300, 900, 30_000):
        yield f"lists, {depth} deep", nest("[", "]", depth)
        yield f"mappings, {depth} deep", nest("{a: ", "}", depth)
        yield f"options, {depth} deep", READY + f"method: {{options: {{nodes: {'[' * depth}{']' * depth}}}}}"
    yield "block sequences", "name:\n" + "".join(f"{' ' * depth}-\n" for depth in range(1, 2000))
    yield "a long number", "name: " + "9" * 4000
    yield "a longer number", "name: 0x" + "f" * 100_000
    yield "a long number as a key", "0x" + "f" * 100_000 + ": 1"
    yield "a number of a thousand digits as a key", "0x" + "f" * 900 + ": 1"
    yield "a longer number as a key", "? 0x" + "f" * 10_000 + "\n: 1"
    yield "many minutes", "name: 1" + ":59" * 20_000
    yield "many minutes and a point", "name: 1" + ":59" * 20_000 + ".5"
    yield "many digits and no number", "name: " + "1_" * 50_000 + "x"
    yield "many keys", "".join(f"key{n}: 1\n" for n in range(3000))
    yield "a long key", f"{'k' * 200_000}: 1"
    yield "a long value", f"preset: {'v' * 200_000}"
    yield "a long method", READY + f"method: {{id: {'v' * 100_000}}}"
    yield "a large file", READY + "#" * 2_000_000
    yield "many labels", READY + f"keywords: {{labels: [{', '.join(['a'] * 20_000)}]}}"


@pytest.mark.parametrize("name", [name for name, _ in bombs()])
def test_what_would_take_for_ever_does_not(name: str) -> None:
    assert name == "many labels" or isinstance(parse(dict(bombs())[name], folder=Path("/")), PlanError)


def test_merge_keys_are_those_of_yaml() -> None:
    """What a section says itself counts, and is no key written twice."""
    text = (
        READY.replace("corpus: {", "corpus: &c {where: a > 1, ")
        + "training: {<<: *c, where: b > 1, columns: {labels: a}}\n"
    )
    plan = parse(text)
    assert isinstance(plan, Plan)
    assert plan.training is not None
    assert (plan.training.path, plan.training.where) == (plan.corpus.path, "b > 1")
    check_written(plan)
