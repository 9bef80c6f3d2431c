"""Commands that answer questions: SQL, two keyword tables beside each other, the methods, one text explained."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lexplain.cli.console import (
    BAD_PLAN,
    DEMO_TABLES,
    TablesPlace,
    Terminal,
    find_sink,
    open_terminal,
    refuse,
    say,
    split_list,
)
from lexplain.errors import DocumentError, MethodError, ModelError
from lexplain.plan import Text as TextSettings
from lexplain.terminal import print_explanation, print_methods, print_rows

if TYPE_CHECKING:
    from lexplain.explanation import Explanation
    from lexplain.methods import Method
    from lexplain.tables import Tables

# Of the text whose cost `lexplain methods` tells.
_LISTED_TOKENS = 128


def _open_tables(terminal: Terminal, place: str) -> Tables:
    from lexplain.methods import find_method
    from lexplain.pipeline import open_tables

    sink = find_sink(place)
    return open_tables(terminal.open_session("lexplain"), sink, find_method)


def sql_command(query: str, tables: TablesPlace = DEMO_TABLES) -> None:
    """Query the tables of a folder with Spark SQL.

    Example: lexplain sql "SELECT label, word, rank FROM keywords_current ORDER BY label, rank"
    """
    with open_terminal("sql", None) as terminal:
        spark = _open_tables(terminal, tables).spark
        result = spark.sql(query)
        print_rows(terminal.console, result.columns, (tuple(row) for row in result.collect()))


def compare_command(
    first: Annotated[str, typer.Argument(help="Name of a plan, or the keyword_key of a run.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    tables: TablesPlace = DEMO_TABLES,
    words: Annotated[int, typer.Option(help="Show so many of the words that changed most surely.", min=0)] = 20,
) -> None:
    """Compare the keywords of two runs: overlap of each class's lists, and the words that changed.

    Example: lexplain compare may june --tables lexplain-tables
    """
    from lexplain.drift import ListOverlap, WordChange, compare_lists, compare_words, find_table
    from lexplain.methods import find_method

    with open_terminal("compare", None) as terminal:
        opened = _open_tables(terminal, tables)
        one, other = (find_table(opened, name, find_method) for name in (first, second))
        print_rows(terminal.console, ListOverlap._fields, compare_lists(opened, one.keyword_key, other.keyword_key))
        changes = compare_words(opened, one, other)[:words]
        if changes:
            print_rows(terminal.console, WordChange._fields, changes)
            terminal.console.print(
                "score: what an evidence document has of the word on average; q_value: share of the words up to here that is "
                "expected to have changed by chance.", soft_wrap=True,
            )  # fmt: skip


def methods_command(
    name: Annotated[
        str | None, typer.Argument(help="Show this one with its options and presets.", metavar="NAME")
    ] = None,
) -> None:
    """List the attribution methods: paper, cost, what they guarantee, which models they explain.

    Example: lexplain methods integrated_gradients
    """
    from lexplain.methods import METHODS, find_method, list_refused
    from lexplain.methods.papers import name_paper

    console = Console(highlight=False, emoji=False)
    if name is not None:
        try:
            _show_method(console, find_method(name))
        except MethodError as error:
            raise refuse(error, BAD_PLAN) from None
        return
    methods = sorted(METHODS.values(), key=lambda method: (method.package or "", method.id))
    rows = [
        (one.id, name_paper(one.cite), _format_cost(one), ", ".join(one.guarantees), _list_models(one))
        for one in methods
    ]
    if console.is_terminal:
        notes = [
            f"cost: forward-equivalents of a text of {_LISTED_TOKENS} tokens at the defaults, a gradient counts 2; a "
            "typical cost where the method decides when to stop."
        ]
        notes += [f"{one.id}: {one.note}." for one in methods if one.note]
        notes += [f"{one.id}: pip install {' '.join(one.missing)}" for one in methods if one.missing]
        notes += [f"{one.id}: from the package {one.package}." for one in methods if one.package]
        print_methods(console, ("id", "paper", "cost", "guarantees", "models"), rows, notes)
    else:
        columns = ("id", "paper", "cost", "guarantees", "models", "note", "package")
        print_rows(
            console, columns, ((*row, one.note, one.package or "") for row, one in zip(rows, methods, strict=True))
        )
    for reason in list_refused():
        say(reason)


def _show_method(console: Console, method: Method) -> None:
    from lexplain.methods.papers import name_paper

    paper = name_paper(method.cite)
    console.print(f"[bold]{escape(method.id)}[/bold]  {escape(paper)}")
    about = (inspect.getdoc(method.function) or "").partition("\n\n")[0]
    console.print(escape(" ".join(about.split())), soft_wrap=not console.is_terminal)
    facts = {
        "cost": f"{_format_cost(method)} forward-equivalents for {_LISTED_TOKENS} tokens at the defaults; a gradient counts 2",
        "guarantees": ", ".join(method.guarantees), "models": _list_models(method), "needs": ", ".join(method.requires),
        "package": method.package or "", "note": method.note,
    }  # fmt: skip
    console.print()
    _print_pairs(console, {name: fact for name, fact in facts.items() if fact})
    options = {}
    for name, option in method.options.items():
        limits = "" if option.range is None else f"; {option.range[0]:g} to {option.range[1]:g}"
        options[name] = f"{json.dumps(option.default)}; {option.describe()}{limits}"
    presets = {
        name: ", ".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
        for name, values in method.presets.items()
    }
    for title, lines in (("options (default; what it takes; range)", options), ("presets", presets)):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            _print_pairs(console, lines)


def _print_pairs(console: Console, pairs: Mapping[str, str]) -> None:
    width = max(map(len, pairs))
    for name, value in pairs.items():
        console.print(f"  {escape(name):<{width}}  {escape(value)}", soft_wrap=not console.is_terminal)


def _format_cost(method: Method) -> str:
    cost = method.tell_cost({}, _LISTED_TOKENS)
    return "unknown" if cost is None else f"{cost:.0f}"


def _list_models(method: Method) -> str:
    return ", ".join(method.models) or "any"


def explain_command(
    text: Annotated[str, typer.Argument(help="The text to explain.")],
    model: Annotated[Path, typer.Option(help="Folder of the classifier, as save_pretrained() makes it.")],
    methods: Annotated[
        str, typer.Option(help="Ids or names, with commas between; NAME:PRESET for a preset.")
    ] = "integrated_gradients",
    label: Annotated[str | None, typer.Option(help="Explain this label, predicted or not.")] = None,
    top: Annotated[int, typer.Option(help="Explain so many of the most probable labels.", min=1)] = 1,
) -> None:
    """Show which words make a classifier see a text as its label; starts no Spark.

    Example: lexplain explain "The striker scored twice" --model my-model --methods integrated_gradients,lrp
    """
    with open_terminal("explain", None) as terminal:
        try:
            for title, signed, explanation in _explain_text(text, model, methods, label, top):
                words = [(word.start, word.end, score) for word, score in explanation.words]
                sure = explanation.probability
                said = f"{title}  {explanation.label}  " + (
                    f"output {explanation.target_score:.3f}" if sure is None else f"probability {sure:.3f}"
                )
                print_explanation(terminal.console, said, text, words, signed=signed)
        except (MethodError, ModelError, DocumentError) as error:
            terminal.fail(error, BAD_PLAN)


def _explain_text(
    text: str, folder: Path, methods: str, label: str | None, top: int
) -> Iterator[tuple[str, bool, Explanation]]:
    """Yield a title, whether scores have a sign, and an explanation for each method and label.

    Every refusal is raised at once, before the first.
    """
    from lexplain.classifier import Classifier
    from lexplain.engine import Explainer
    from lexplain.executor import choose_budget, choose_device, decode_document
    from lexplain.explanation import Rejection

    if label is not None and top > 1:
        raise ModelError(
            f"label={label!r} and top={top} exclude each other. The one label would have been shown. Leave out one of them."
        )
    settings = TextSettings()
    decode_document(text, settings.max_characters)
    chosen = _choose_methods(methods)
    device = choose_device("auto", [], local_partition=0)
    classifier = Classifier.load(folder, device=device)
    max_tokens = min(settings.max_tokens, classifier.max_tokens)
    explainers, refused = [], []
    for method, options, title in chosen:
        try:
            explainers.append((title, method.is_signed(options), Explainer(
                classifier, method, options, max_tokens=max_tokens, overlap=min(settings.overlap, max_tokens // 8),
                max_windows=settings.max_windows, merge=settings.merge, budget_tokens=choose_budget(device), top_k=top, label=label,
            )))  # fmt: skip
        except ModelError as error:
            refused.append(str(error))
    if refused:
        raise ModelError("\n".join(dict.fromkeys(refused)))
    for title, signed, explainer in explainers:
        outcome = explainer.explain([text])[0]
        if isinstance(outcome, Rejection):
            raise DocumentError(outcome.reason, outcome.message)
        yield from ((title, signed, explanation) for explanation in outcome)


def _choose_methods(listed: str) -> list[tuple[Method, Mapping[str, object], str]]:
    """Return method, options and title of each `NAME` or `NAME:PRESET`."""
    from lexplain.methods import find_method

    chosen, refused = [], []
    if not split_list(listed):
        raise MethodError(
            f"--methods={listed!r} names no method. Nothing would have been shown. Write some of `lexplain methods`."
        )
    for asked in split_list(listed):
        name, _, preset = asked.partition(":")
        try:
            method = find_method(name)
        except MethodError as error:
            refused.append(str(error))
            continue
        if preset and preset not in method.presets:
            known = ", ".join(method.presets)
            refused.append(
                f"preset={preset!r} is no preset of {method.id}. It would have run with its defaults. "
                f"Write {f'one of {known}' if known else name}."
            )
            continue
        if method.prepares(method.complete_options(method.presets.get(preset, {}))) == "neighbours":
            refused.append(
                f"method={method.id!r} compares a text with other documents, and there are none here. It would have "
                f"explained nothing. Write smoothgrad; or a plan with {method.name}, for a transformer."
            )
            continue
        promises = (
            "" if method.is_signed(method.presets.get(preset, {})) else "  (no sign: how much, not for or against)"
        )
        chosen.append(
            (method, method.presets.get(preset, {}), f"{method.id}{f' {preset}' if preset else ''}{promises}")
        )
    if refused:
        raise MethodError("\n".join(refused))
    return chosen
