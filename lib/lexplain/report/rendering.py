"""A report as one HTML file that needs no network: page, styles, scripts and data. Knows no Spark; runs on the driver.

Words and documents come from anywhere. They stand in the page once, as JSON that no HTML parser can take for markup, and
scripts write them as text. A Content-Security-Policy forbids everything but the scripts and styles of this package.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import Any

from lexplain.errors import SessionError
from lexplain.report.contents import Document, Evidence, Figure, Keyword, Report

try:
    import jinja2
except ImportError as error:  # when this is imported, before Spark starts
    raise SessionError(
        "lexplain report needs the package jinja2, which is not installed. No page could have been written. Install "
        "lexplain[report]."
    ) from error

_LIBRARIES = ("vendor/d3.min.js", "vendor/plot.umd.min.js")
_OWN = ("dom.js", "tables.js", "charts.js", "keywords.js", "evaluation.js", "documents.js", "page.js")
# Observable Plot puts a style element into each chart; of this very text.
_PLOT_STYLE = "sha256-zrfVyvY1E/5V+DXZunsRZW8XTqTsuIZzp8dBDThhSn8="
_SIGNIFICANT_DIGITS = 4
_UNSAFE_IN_HTML = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(report: Report, plan_file: str = "PLAN.yaml") -> str:
    """Return the report as HTML.

    Args:
        report: What it holds.
        plan_file: What the commands that it names call the plan.
    """
    # What the template marks as safe is the package's own files, and JSON without markup.
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_read("page.html"))
    own = "(() => {\n'use strict';\n" + "".join(map(_read, _OWN)) + "})();\n"
    scripts, style = [*map(_read, _LIBRARIES), own], _read("page.css")
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)} '{_PLOT_STYLE}';"
        " base-uri 'none'; form-action 'none'"
    )
    return template.render(
        report=report,
        policy=policy,
        style=style,
        scripts=scripts,
        licences=[_read(f"vendor/{name}.LICENSE") for name in ("d3", "plot")],
        data=write_json(_pack(report) | {"planFile": shlex.quote(plan_file)}),
    )


@cache
def _read(name: str) -> str:
    return resources.files("lexplain.report").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_json(value: object) -> str:
    """Return JSON that can stand in a script element: nothing in it can end the element or begin another.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_UNSAFE_IN_HTML)


# --- packing --------------------------------------------------------------------------------------------------------


def _pack(report: Report) -> dict[str, Any]:
    """Return the report as JSON types, rows as lists; offsets become UTF-16 units, which is how scripts count."""
    number = {one.label: place for place, one in enumerate(report.classes)}
    units = [_count_units(document.text) for document in report.documents]
    return {
        "name": report.name,
        "signed": report.signed,
        "models": len(report.models) or report.n_splits,
        "splits": report.n_splits,
        "classes": [
            {"label": one.label, "keywords": one.n_keywords, "dropped": list(one.dropped.items()), "f1": _round(one.f1)}
            for one in report.classes
        ],
        "keywords": [_pack_keyword(one, number) for one in report.keywords],
        "phrases": [_pack_keyword(one, number) for one in report.phrases],
        "methods": [asdict(one) for one in report.methods],
        "documents": [_pack_document(one, mine) for one, mine in zip(report.documents, units, strict=True)],
        "evidence": _pack_evidence(report.evidence, units, number),
        "evaluation": None if report.evaluation is None else {
            "measuredAt": report.evaluation.measured_at,
            "own": report.evaluation.own,
            "faithfulness": [_pack_figure(one) for one in report.evaluation.faithfulness],
            "quality": [_pack_figure(one) for one in report.evaluation.quality],
        },
    }  # fmt: skip


def _pack_keyword(one: Keyword, number: Mapping[str, int]) -> list[Any]:
    return [
        number[one.label], one.word, one.rank, _round(one.score), _round(one.low), _round(one.high), _round(one.frequency),
        one.n_evidence, one.document_frequency, _round(one.distinctiveness),
    ]  # fmt: skip


def _pack_document(document: Document, units: Sequence[int]) -> dict[str, Any]:
    spans, end = [], 0
    for start, stop in document.spans:
        spans += [units[start] - end, units[stop] - units[start]]  # small numbers: characters between, characters in
        end = units[stop]
    return {
        "id": document.doc_id,
        "text": document.text,
        "characters": document.n_characters,
        "cut": len(document.text) < document.n_characters,
        "gold": None if document.gold is None else list(document.gold),
        "split": document.split,
        "spans": spans,
        "explained": [
            [each.label, each.method, _round(each.probability), each.is_gold, each.converged, [*map(_round, each.scores)]]
            for each in document.explained
        ],
    }  # fmt: skip


def _pack_evidence(
    evidence: Sequence[Evidence], units: Sequence[Sequence[int]], number: Mapping[str, int]
) -> list[list[Any]]:
    """Return the occurrences that lie in the part of their document that is shown."""
    return [
        [number[one.label], one.word, one.document, units[one.document][one.start], _round(one.score)]
        for one in evidence
        if one.start < len(units[one.document])
    ]


def _pack_figure(figure: Figure) -> list[Any]:
    return [
        figure.method, *figure.kind, figure.label, _round(figure.value), _round(figure.low), _round(figure.high),
        figure.n_documents, figure.beats_random,
    ]  # fmt: skip


def _count_units(text: str) -> list[int]:
    """Return how many UTF-16 units stand before each character, and before the end."""
    return [0, *accumulate(2 if character > "\uffff" else 1 for character in text)]


def _round(value: float | None) -> float | None:
    """Return a number with as many digits as anybody reads; None for what is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
