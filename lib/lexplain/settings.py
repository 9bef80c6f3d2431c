"""Settings: frozen dataclasses that are read from YAML with every problem found at once, and written with comments.

A setting is declared once, with its default, its range and the words that explain it; reading, messages and the
commented template come from that declaration. A section is a dataclass of settings and sections. A section may
say `one_of: ClassVar = ("table", "path")`: exactly one of these must be given.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from lexplain.errors import PlanError, Problem, redact_uris

Section = TypeVar("Section")

# Settings are carried to SQL, Java and C, where a larger whole number would overflow.
_LARGEST_INT = 2**31 - 1
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
# A NUL ends every path in C; half of a surrogate pair cannot be written to any file or table.
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
# Past these, reading a plan would take as long as somebody wishes.
_MOST_CHARACTERS = 1_000_000
_LONGEST_NUMBER = 1_000


def setting(
    default: object = dataclasses.MISSING,
    *,
    says: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    silently: str = "The job would have run with a value that has no meaning",
) -> Any:
    """Declare one setting of a section.

    Args:
        default: Its default, or the class of a section; left out, the setting is required.
        says: What it is, for the template and the messages.
        low: Smallest value, allowed.
        high: Largest value, allowed.
        above: Largest value that is not allowed.
        silently: What would have happened with a value out of range.
    """
    metadata = {"says": says, "low": low, "high": high, "above": above, "silently": silently}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# --- reading ------------------------------------------------------------------------------------------------


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key written twice: the first value would be lost without a word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"'{node.value[:60]}...' has no value: a number of {len(node.value)} characters",
                node.start_mark,
            )
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Values that only look like a date or a number ("2024-13-01") leave PyYAML's own tree of errors.
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:60]!r} has no value: {error}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # refused below; written out, aliases would fill the memory
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice, the first value would be lost", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Each `<<` would copy what it merges, doubled keys too: nine lines of ten merges of one another fill the memory.
        super().flatten_mapping(node)
        last = {key.value if isinstance(key, yaml.ScalarNode) else id(key): (key, value) for key, value in node.value}
        node.value = list(last.values())


def read_text(path: str | Path) -> str:
    """Return the text of a file.

    Raises:
        PlanError: There is no such file, or it is no UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), str(error)) from error


def read_mapping(text: str, origin: str) -> Mapping[Any, Any]:
    """Return the mapping that a YAML text holds.

    Raises:
        PlanError: It is no YAML, empty, or no mapping; a key is written twice.
    """
    if len(text) > _MOST_CHARACTERS:
        raise _unreadable(origin, f"it has {len(text)} characters, more than {_MOST_CHARACTERS}")
    try:
        document = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that refuses twice-written keys
    except RecursionError as error:
        raise _unreadable(origin, "it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise _unreadable(origin, " ".join(str(error).split())) from error
    if document is None:
        raise _unreadable(origin, "it is empty")
    if not isinstance(document, Mapping):
        raise _unreadable(origin, f"it holds a {type(document).__name__}, not a mapping of keys")
    return document


def _unreadable(origin: str, why: str) -> PlanError:
    problem = Problem("plan", origin, f"cannot be read ({why})", "Nothing can be planned from it",
                      "Write a YAML file; `lexplain plan new` prints one to start from")  # fmt: skip
    return PlanError(origin, [problem])


def overlay(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the settings of `below` with those of `above` laid over them, section by section."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(merged.get(name), Mapping) and (value is None or isinstance(value, Mapping)):
            merged[name] = overlay(merged[name], value or {})  # an empty section says nothing against what is below
        else:
            merged[name] = value
    return merged


class Reading:
    """One pass over a mapping: what breaks a rule becomes a Problem, and stands at its default.

    Attributes:
        problems: Found so far, in the order of the mapping.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._unsure: set[str] = set()

    def sure(self, *fields: str) -> bool:
        """Tell whether these settings are what the mapping says, or their defaults where it says nothing.

        A rule across settings must not be judged by a default that stands for something misspelt.
        """
        return not any(field == one or field.startswith(f"{one}.") for field in fields for one in self._unsure)

    def read(self, cls: type[Section], document: Mapping[Any, Any], path: str = "") -> Section:
        """Build a section from a mapping; `path` is what stands before its fields in messages, as `corpus.`."""
        settings = {one.name: one for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, value in document.items():
            if name not in settings:
                self._refuse_key(f"{path}{_printable(str(name))}", value, str(name), settings, path)
            elif value is None and _is_optional(hints[name]):
                values[name] = None
            elif value is None and (_is_section(hints[name]) or _is_required(settings[name])):
                pass  # a section without keys; what is required is missed below
            else:
                values[name] = self._read_value(hints[name], value, f"{path}{name}", settings[name])
                if values[name] is None:  # broken, and reported: the default stands in
                    del values[name]
        self._require(cls, values, document, settings, path)
        for name, one in settings.items():
            if name not in values and _is_required(one):
                nested = _nested(hints[name])
                values[name] = "unnamed" if nested is None else nested()
        return cls(**values)

    def _require(
        self, cls: Any, values: Mapping[str, Any], document: Mapping[Any, Any], settings: Mapping[str, Any], path: str
    ) -> None:
        """Report required settings that are missing, unless they are only misspelt or broken."""
        for name, one in settings.items():
            where = f"{path}{name}"
            if _is_required(one) and name not in values and self.sure(where):
                self._report(
                    where, document.get(name), "is required", f"Without it the job does not know: {one.metadata['says']}",
                    f"Write `{where}: ...`",
                )  # fmt: skip
        choices: tuple[str, ...] = getattr(cls, "one_of", ())
        given = [name for name in choices if values.get(name) not in (None, ())]
        if choices and len(given) != 1 and self.sure(*(f"{path}{name}" for name in choices)):
            where = path.removesuffix(".")
            remedy = " or ".join(f"`{where}: {{{name}: ...}}`" for name in choices)
            self.problems.append(
                Problem(where, " and ".join(given) or None, f"must have either {' or '.join(choices)}",
                        "It would not be clear which one is meant" if given else "There would be none to use",
                        f"Write {remedy}")
            )  # fmt: skip

    def _refuse_key(self, where: str, value: object, name: str, settings: Mapping[str, object], path: str) -> None:
        close = _closest(name, settings)
        self._unsure.update(f"{path}{meant}" for meant in close)
        remedy = f"Write {close[0]!r}" if close else f"Known here: {', '.join(settings)}"
        self._report(where, value, "is no key of a plan", "It would have been ignored", remedy)

    def _report(self, where: str, value: object, rule: str, consequence: str, remedy: str) -> None:
        self._unsure.add(where)
        self.problems.append(Problem(where, shorten(value), rule, consequence, remedy))

    def _refuse_type(self, where: str, value: object, rule: str, remedy: str) -> None:
        self._report(where, value, rule, "It would have been misread", remedy)

    def _read_value(self, hint: Any, value: Any, where: str, one: dataclasses.Field[Any]) -> Any:
        """Return the value in its type; None when it is broken."""
        hint = _strip_optional(hint)
        if dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                return self.read(typing.cast(type, hint), value, f"{where}.")
            self._refuse_type(where, value, "must be a mapping of keys", f"Write `{where}:` and its keys below")
            return None
        if get_origin(hint) is Literal:
            return self._read_choice(get_args(hint), value, where, one)
        if get_origin(hint) is tuple:
            return self._read_strings(value, where)
        if get_origin(hint) is Mapping:
            return self._read_options(value, where)
        if hint is str:
            return self._read_string(value, where)
        return self._read_number(hint, value, where, one)

    def _read_choice(self, choices: Sequence[str], value: Any, where: str, one: dataclasses.Field[Any]) -> Any:
        if isinstance(value, str) and value in choices:
            return value
        close = _closest(value, choices) if isinstance(value, str) else []
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        remedy = f"Write one of: {', '.join(choices)}{hint}"
        self._report(where, value, "is not one of the choices", one.metadata["silently"], remedy)
        return None

    def _read_strings(self, value: Any, where: str) -> tuple[str, ...] | None:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            found = [self._read_string(part, f"{where}[{number}]") for number, part in enumerate(value)]
            if None not in found:
                return tuple(value)
            self._unsure.add(where)
            return None
        remedy = 'Write [a, b]; put quotes round words that YAML reads as something else, as "no"'
        self._refuse_type(where, value, "must be a list of strings", remedy)
        return None

    def _read_options(self, value: Any, where: str) -> Mapping[str, Any] | None:
        if isinstance(value, Mapping) and all(isinstance(name, str) and name.isidentifier() for name in value):
            return dict(value)
        self._refuse_type(where, value, "must be a mapping of options", "Write `name: value` lines below it")
        return None

    def _read_string(self, value: Any, where: str) -> str | None:
        if isinstance(value, int | float | date) and not isinstance(value, bool):
            self._refuse_type(where, value, "must be a string", f'Write it in quotes: "{shorten(value)}"')
        elif not isinstance(value, str):
            self._refuse_type(
                where, value, "must be a string", 'Write one, in quotes if YAML reads it otherwise, as "no"'
            )
        elif not value or (value.isspace() and not where.endswith("separator")):
            self._refuse_type(where, value, "must not be empty", "Write a value, or leave the key out")
        elif _UNWRITABLE.search(value):
            self._refuse_type(where, value, "must hold neither NUL nor half of a surrogate pair",
                              "Write the characters themselves instead of their escapes")  # fmt: skip
        else:
            return value
        return None

    def _read_number(self, hint: type, value: Any, where: str, one: dataclasses.Field[Any]) -> Any:
        rule, fits = _KINDS[hint]
        if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
            value = float(value)  # YAML 1.1 reads 5e-5 as a string
        if not fits(value):
            default = "" if one.default in (dataclasses.MISSING, None) else f", as {_write_inline(one.default)}"
            self._refuse_type(where, value, rule, f"Write a value of that kind{default}")
            return None
        if hint is bool:
            return value
        low, above, high = (one.metadata[bound] for bound in ("low", "above", "high"))
        if hint is int and high is None and value > _LARGEST_INT:
            high = _LARGEST_INT
        if math.isfinite(value if isinstance(value, float) else 0) and (
            (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        ):
            try:
                return hint(value)
            except OverflowError:
                pass  # a whole number past the largest float; reported below as any number out of range
        bounds = [f"{sign} {_format_bound(bound)}" for sign, bound in ((">=", low), (">", above), ("<=", high))
                  if bound is not None]  # fmt: skip
        if hint is float and high is None:
            bounds.append("finite")
        default = ", or leave it out" if not _is_required(one) else ""
        self._report(where, value, f"must be {' and '.join(bounds)}", one.metadata["silently"],
                     f"Write a number in that range{default}")  # fmt: skip
        return None


_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("must be true or false", lambda value: isinstance(value, bool)),
    int: ("must be a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("must be a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
}


def _closest(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)


def _is_required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _strip_optional(hint: Any) -> Any:
    return next(part for part in get_args(hint) if part is not type(None)) if _is_optional(hint) else hint


def _nested(hint: Any) -> Any | None:
    """Return the dataclass of a section, None for a setting."""
    inner = _strip_optional(hint)
    return inner if dataclasses.is_dataclass(inner) else None


def _is_section(hint: Any) -> bool:
    return _nested(hint) is not None or get_origin(hint) is Mapping


def _format_bound(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else repr(bound)


def shorten(value: object) -> object:
    """Return a value as messages show it: YAML aliases can make one of a few lines fill the memory when written out."""
    if isinstance(value, str):
        value = redact_uris(value)  # before the cut, which might take what tells a secret
        return value if len(value) <= 200 else value[:199] + "…"
    if isinstance(value, int) and abs(value) >= 10**30:
        return math.inf if value > 0 else -math.inf
    if (
        isinstance(value, list)
        and len(value) <= 10
        and not any(isinstance(part, Mapping | list | tuple | set) for part in value)
    ):
        return [shorten(part) for part in value]
    if isinstance(value, Collection):
        return _Summary(f"<{type(value).__name__} of {len(value)}>")
    return value


class _Summary(str):
    """Stands in a message for a value that is too long for one."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _printable(name: str) -> str:
    return name if name.isprintable() and len(name) <= 100 else repr(name[:100])


# --- writing ------------------------------------------------------------------------------------------------


def plain(value: object) -> Any:
    """Return a section, or anything in it, as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return value


def write_yaml(section: object) -> str:
    """Return a section as YAML, every default written out, passwords and tokens in URIs masked."""
    text: str = yaml.safe_dump(_mask(plain(section)), sort_keys=False, allow_unicode=True)
    return text


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mask(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_mask(part) for part in value]
    if isinstance(value, str):
        return redact_uris(value)
    return value


def _write_inline(value: object) -> str:
    """Return a value as YAML on one line."""
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def write_commented(cls: Any, example: Mapping[str, Any], depth: int = 0) -> Iterable[str]:
    """Yield every setting of a section as a line of YAML with its comment.

    Those of `example` stand with its values, all others as comments with their defaults; sections stand
    always, so that any single line can be uncommented.
    """
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        indent, says = "  " * depth, f"# {one.metadata['says']}"
        nested = _nested(hints[one.name])
        if nested is not None:
            yield f"{indent}{one.name}:".ljust(36) + f" {says}"
            yield from write_commented(nested, example.get(one.name, {}), depth + 1)
            continue
        default = {} if one.default_factory is not dataclasses.MISSING else one.default
        value = _write_inline(example.get(one.name, default))
        mark = "" if one.name in example else "# "
        yield f"{indent}{mark}{one.name}: {value}".ljust(36) + f" {says}"


def check_variables(names: Mapping[str, str | None]) -> Iterator[Problem]:
    """Refuse what becomes an identifier of SQL and looks like a variable: there is no way to escape it."""
    for field, name in names.items():
        if name is not None and "${" in name:
            yield Problem(field, name, "must not hold '${'", "Spark would have put the value of a setting or environment variable there",
                          "Rename the column or folder")  # fmt: skip


# Names of columns may be as these: those that are functions with parentheses only count with them.
_FLEETING = re.compile(
    r"\(\s*select\b|\b(?:current_(?:date|time|timestamp|user)|localtimestamp|session_user|(?:now|curdate|unix_timestamp|rand|randn|random|randstr|"
    r"uniform|uuid|shuffle|user|monotonically_increasing_id|spark_partition_id|input_file_\w+)\s*\()",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`[^`]*`", re.DOTALL)


def check_condition(field: str, condition: str | None) -> Iterator[Problem]:
    """Refuse a SQL condition that may select other rows of the same source tomorrow: nothing would tell that it does."""
    if condition is None:
        return
    if "${" in condition:
        yield Problem(field, condition, "must not hold '${'", "Spark would have put the value of a setting or environment variable there",
                      "Write the value")  # fmt: skip
    fleeting = _FLEETING.search(_QUOTED.sub("''", condition))
    if fleeting is not None:
        yield Problem(field, condition, f"depends on more than the row: {fleeting.group()!r}",
                      "Another day it would have selected other documents of the same source, and nobody would have noticed",
                      "Write a value, as published <= '2026-01-31'; or name a view, which is compared as a whole")  # fmt: skip
