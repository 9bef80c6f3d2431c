"""Options of attribution methods: the keyword-only parameters of their functions, in types that a plan can write."""

from __future__ import annotations

import difflib
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from lexplain.errors import MethodError

_TYPES: dict[object, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method.

    Attributes:
        type: A type hint: str, int, float, bool, a Literal, or a union of these with None.
        default: Its value when the plan leaves it out.
        range: Smallest and largest value, both allowed; None when any is.
    """

    type: object
    default: object
    range: tuple[float, float] | None = None

    def accepts(self, value: object, *, exact: bool = False) -> bool:
        """Tell whether a value is of the option's type; a whole number fits a float, unless `exact`."""
        return _accepts(self.type, value, exact)

    def describe(self) -> str:
        """Return which values it takes, as a plan's reader would say it."""
        return _describe(self.type)


def read_options(
    function: Callable[..., Any], identity: str, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, Option]:
    """Return the options of a method's function by name, in the order of its signature.

    Args:
        function: The method's.
        identity: Its id, for messages.
        ranges: Smallest and largest value of an option.

    Raises:
        MethodError: An option has no default, or a type that no plan can write; or a range names no option.
    """
    hints, options = get_type_hints(function), dict[str, Option]()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        name, hint = parameter.name, hints.get(parameter.name)
        if parameter.default is parameter.empty or not _is_known(hint):
            raise MethodError(
                f"option {name!r} of {identity} must have a default, and a type made of str, int, float, bool, None and "
                f"Literal. No plan could have left it out, or been checked. Write {name}: int = 1, for instance."
            )
        options[name] = Option(hint, parameter.default, ranges.get(name))
    if unknown := sorted(set(ranges) - set(options)):
        raise MethodError(
            f"ranges={unknown!r} of {identity} must name options. They would never have been checked. "
            f"Write names out of {', '.join(options) or 'none'}."
        )
    return options


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one is most like; None where none is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _is_known(hint: object) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return all(map(_is_known, get_args(hint)))
    return get_origin(hint) is Literal or (isinstance(hint, type) and hint in _TYPES)


def _accepts(hint: object, value: object, exact: bool) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == member and type(value) is type(member) for member in get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_accepts(member, value, exact) for member in get_args(hint))
    if hint is float:
        number = isinstance(value, float) or (type(value) is int and not exact)  # a bool is an int to Python
        return number and math.isfinite(cast(float, value))
    return type(value) is hint


def _describe(hint: object) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(str(member) for member in get_args(hint))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in get_args(hint))
    return _TYPES[hint]
