"""Presets: named sets of a plan's keys, and of a method's options, laid below what the plan itself says."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lexplain.errors import MethodError
from lexplain.settings import overlay

if TYPE_CHECKING:
    from lexplain.plan import FindMethod

DEFAULT_METHOD = "integrated_gradients"

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


def apply_presets(document: Mapping[str, Any], find_method: FindMethod) -> Mapping[str, Any]:
    """Lay the plan's own keys over its method's preset's, and those over its own preset's.

    Args:
        document: The plan as it was written; what is wrong with it is reported later.
        find_method: Registry lookup.
    """
    method = document.get("method")
    named = method if isinstance(method, Mapping) else {}
    name = named.get("id", DEFAULT_METHOD)
    options = None
    if isinstance(name, str) and isinstance(named.get("preset"), str):
        with contextlib.suppress(MethodError):  # reported by the checks that follow, as any wrong choice is
            options = find_method(name).presets.get(named["preset"])
    if options is not None:
        document = overlay({"method": {"options": options}}, document)
    preset = document.get("preset", "default")
    if not isinstance(preset, str) or preset not in _PRESETS:
        return document  # reported by the reader
    below = _PRESETS[preset]
    if isinstance(name, str) and name.partition(".")[0] != DEFAULT_METHOD:
        below = {
            section: values for section, values in below.items() if section != "method"
        }  # another method's options
    return overlay(below, document)
