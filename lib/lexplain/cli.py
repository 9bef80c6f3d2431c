"""The command line, `lexplain`: each command opens what it needs, runs a stage, and says what came of it."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lexplain.errors import DocumentError, ExplainError, LimitError, MethodError, ModelError, PlanError, TableError
from lexplain.outcome import show_keywords, show_leaderboard, show_place, show_quality
from lexplain.plan import Columns, Plan, Sink, Source
from lexplain.plan import Text as TextSettings
from lexplain.template import write_template
from lexplain.terminal import (
    StageProgress,
    divert_chatter,
    format_seconds,
    print_error,
    print_explanation,
    print_methods,
    print_rows,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from lexplain.engine import Explanation
    from lexplain.methods import Method
    from lexplain.pipeline import Run
    from lexplain.tables import Tables

DONE, FAILED, BAD_PLAN, PARTLY_DONE = 0, 1, 2, 3

# Of the text whose cost `lexplain methods` tells.
_LISTED_TOKENS = 128

app = typer.Typer(
    help="Which words make a text classifier see each class: attributions of fine-tuned models as a Spark job.\n\n"
    "Exit codes: 0 done, 1 failure, 2 bad plan, 3 partly done (a limit of the plan was passed).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Write and check plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

PlanPath = Annotated[Path, typer.Argument(help="The plan, a YAML file.", metavar="PLAN.yaml")]
TablesFolder = Annotated[Path, typer.Option("--tables", help="Folder of the tables: a plan's sink.path.")]


@dataclass
class _Terminal:
    console: Console
    log_file: Path
    exit_code: int = DONE
    spark: SparkSession | None = None

    def open_session(self, name: str) -> SparkSession:
        from lexplain.session import has_session, open_session

        ours = not has_session()
        session = open_session(name)
        self.spark = session if ours else None  # a platform's own session outlives the command
        return session

    def fail(self, error: BaseException, exit_code: int) -> None:
        print_error(self.console, error, self.log_file)
        self.exit_code = exit_code


@contextmanager
def _terminal(command: str, folder: Path | None) -> Iterator[_Terminal]:
    """Divert chatter to a log, turn errors into messages and exit codes, stop the session at the end."""
    logs = (folder or Path(tempfile.gettempdir()) / f"lexplain-{os.getuid()}") / "logs"
    log_file = logs / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    with ExitStack() as stack:
        try:
            console = stack.enter_context(divert_chatter(log_file))
        except OSError as error:
            raise _refuse(_cannot_make(logs, error), FAILED) from None
        state = _Terminal(console, log_file)
        try:
            yield state
        except PlanError as error:
            state.fail(error, BAD_PLAN)
        except LimitError as error:
            state.fail(error, PARTLY_DONE)
        except KeyboardInterrupt:
            console.print("stopped. The same command goes on where it was.")
            state.exit_code = FAILED
        except Exception as error:
            state.fail(error, FAILED)
        finally:
            if state.spark is not None:
                from lexplain.session import stop_session

                # After the message: an error of the JVM is read from the JVM.
                stop_session(state.spark)
    if state.exit_code:
        raise typer.Exit(state.exit_code)


def _cannot_make(folder: Path, error: OSError) -> TableError:
    return TableError(
        f"folder={str(folder)!r} cannot be made ({error.strerror}). Tables and log would have had no place. Write a folder "
        "that you may write to."
    )


def _refuse(error: ExplainError, exit_code: int) -> typer.Exit:
    """Say on stderr why nothing was started, and return the exit to raise."""
    _say(str(error))
    return typer.Exit(exit_code)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False, emoji=False)


def load_plan(path: Path) -> Plan:
    """Return a checked plan; every problem of it is raised at once."""
    from lexplain.methods import find_method

    return Plan.load(path, find_method)


def run_stages(path: Path, command: str, stages: Callable[[Run], str | None]) -> None:
    """Open a plan's run, do some of its stages, and show the keywords if a table came of it."""
    from lexplain.methods import find_method
    from lexplain.pipeline import open_run

    try:
        plan = load_plan(path)
    except PlanError as error:
        raise _refuse(error, BAD_PLAN) from None
    sink = None if plan.sink.path is None else Path(plan.sink.path)
    with _terminal(command, sink) as terminal:
        console = terminal.console
        console.print(f"[bold]lexplain[/bold] {escape(command)} {escape(plan.name)}")
        console.print(f"[dim]log: {escape(str(terminal.log_file))}[/dim]")
        started = time.monotonic()
        progress = StageProgress(console)
        try:
            spark = terminal.open_session(f"lexplain {plan.name}")
            seconds = format_seconds(time.monotonic() - started)
            console.print(f"[green]✓[/green] {'start Spark':<14} {spark.version} with Delta [dim]({seconds})[/dim]")
            with open_run(spark, plan, find_method, progress) as run:
                key = stages(run)
                run.finish("finished")
            progress.close()
            # After the run is closed: a reader that goes away must not turn it into a failed one.
            if key is not None:
                show_keywords(console, run, key)
                show_place(console, run)
        finally:
            progress.close()


def _run(run: Run) -> str | None:
    run.read_sources()
    run.fine_tune()
    run.attribute()
    return run.aggregate()


@app.command("run")
def run_command(plan: PlanPath) -> None:
    """Run a plan: fine-tune, attribute, aggregate. Skips what is there already.

    Example: lexplain run plan.yaml
    """
    run_stages(plan, "run", _run)


@app.command("fine-tune")
def fine_tune_command(plan: PlanPath) -> None:
    """Fine-tune the plan's base model on its random splits."""
    run_stages(plan, "fine-tune", lambda run: run.fine_tune())


@app.command("attribute")
def attribute_command(plan: PlanPath) -> None:
    """Explain the corpus with the fine-tuned models."""
    run_stages(plan, "attribute", lambda run: run.attribute())


@app.command("aggregate")
def aggregate_command(plan: PlanPath) -> None:
    """Make the keyword table from the explanations."""
    run_stages(plan, "aggregate", lambda run: run.aggregate())


@app.command("evaluate")
def evaluate_command(
    plan: PlanPath,
    methods: Annotated[str, typer.Option(help="Ids or names, with commas between; NAME:PRESET for a preset.")],
    documents: Annotated[int, typer.Option(help="Explain so many documents of the corpus at most.", min=2)] = 200,
) -> None:
    """Compare methods on the same documents: what predictions lose without the words that each of them names.

    Example: lexplain evaluate plan.yaml --methods integrated_gradients,lrp,lafa:lafa-sst2
    """
    from lexplain.evaluation import evaluate, list_contestants
    from lexplain.methods import find_method

    try:
        loaded = load_plan(plan)
        contestants = list_contestants(loaded, split_list(methods), documents, find_method)
    except PlanError as error:
        raise _refuse(error, BAD_PLAN) from None
    with _terminal("evaluate", None if loaded.sink.path is None else Path(loaded.sink.path)) as terminal:
        progress = StageProgress(terminal.console)
        try:
            spark = terminal.open_session(f"lexplain evaluate {loaded.name}")
            found = evaluate(spark, loaded, contestants, find_method, progress)
        finally:
            progress.close()
        show_leaderboard(terminal.console, found.faithfulness)
        show_quality(terminal.console, found.quality)


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Option(help="Where corpus, models and tables go.")] = Path("lexplain-demo"),
) -> None:
    """Keywords of BBC News topics from a fine-tuned MiniLM: about 5 minutes on 2 cores."""
    from lexplain.demo import write_demo

    try:
        plan = write_demo(folder)
    except OSError as error:
        raise _refuse(_cannot_make(folder, error), FAILED) from None
    except ExplainError as error:
        raise _refuse(error, FAILED) from None
    run_stages(plan, "demo", _run)


def _open_tables(terminal: _Terminal, folder: Path) -> Tables:
    from lexplain.methods import find_method
    from lexplain.pipeline import open_tables

    if not (folder / "catalog.sql").is_file():  # before Spark starts
        raise TableError(
            f"--tables={str(folder)!r} holds no tables of lexplain. The query would have failed. Write a plan's sink.path."
        )
    return open_tables(terminal.open_session("lexplain"), Sink(path=str(folder.resolve())), find_method)


@app.command("sql")
def sql_command(query: str, tables: TablesFolder = Path("lexplain-demo/tables")) -> None:
    """Query the tables of a folder with Spark SQL.

    Example: lexplain sql "SELECT label, word, rank FROM keywords_current ORDER BY label, rank"
    """
    with _terminal("sql", None) as terminal:
        spark = _open_tables(terminal, tables).spark
        result = spark.sql(query)
        print_rows(terminal.console, result.columns, (tuple(row) for row in result.collect()))


@app.command("compare")
def compare_command(
    first: Annotated[str, typer.Argument(help="Name of a plan, or a keyword_key.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    tables: TablesFolder = Path("lexplain-demo/tables"),
) -> None:
    """Compare two keyword tables class by class: rank-biased overlap (p = 0.9) and Jaccard."""
    from lexplain.keywords import ListOverlap, compare_lists
    from lexplain.tables import quote_text

    with _terminal("compare", None) as terminal:
        opened = _open_tables(terminal, tables)
        keys = []
        for name in (first, second):
            found = opened.spark.sql(
                f"SELECT keyword_key FROM {opened.name('runs')} WHERE name = {quote_text(name)} AND keyword_key IS NOT NULL"
                " ORDER BY finished_at DESC LIMIT 1"
            ).collect()
            found += opened.read("keywords").where(f"keyword_key = {quote_text(name)}").select("keyword_key").head(1)
            if not found:
                raise ExplainError(
                    f"{name!r} names no keyword table in {str(tables)!r}. Nothing could be compared. Write a plan's name, or "
                    "a keyword_key of the table keywords."
                )
            keys.append(found[0]["keyword_key"])
        rows = compare_lists(opened, keys[0], keys[1])
        print_rows(terminal.console, ListOverlap._fields, rows)


@app.command("methods")
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
            raise _refuse(error, BAD_PLAN) from None
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
        _say(reason)


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


@app.command("explain")
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
    with _terminal("explain", None) as terminal:
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
    from lexplain.engine import Explainer, Rejection
    from lexplain.executor import choose_budget, choose_device, decode_document

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


def split_list(listed: str) -> list[str]:
    """Return the parts of a list with commas between, each once."""
    return list(dict.fromkeys(part.strip() for part in listed.split(",") if part.strip()))


def _choose_methods(listed: str) -> list[tuple[Method, Mapping[str, object], str]]:
    """Return method, options and title of each `NAME` or `NAME:PRESET`."""
    from lexplain.methods import find_method

    chosen, refused = [], []
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
                f"explained nothing. Write smoothgrad, or a plan with {method.name}."
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


@app.command("textcnn")
def textcnn_command(
    folder: Annotated[Path, typer.Argument(help="Where the model goes.")],
    texts: Annotated[Path, typer.Option(help="Documents whose words it knows: .csv .tsv .jsonl .parquet, a Delta folder.")],
    column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    vectors: Annotated[
        Path | None, typer.Option(help="Word vectors, a line a word, which stay as they are; else they are drawn, and trained.")
    ] = None,
) -> None:  # fmt: skip
    """Make a TextCNN to fine-tune, the convolutional network of Arras et al. 2016 over whole words.

    Example: lexplain textcnn my-cnn --texts documents.csv; in a plan: models: {base: my-cnn, learning_rate: 1.0e-2}
    """
    with _terminal("textcnn", None) as terminal:
        from lexplain.textcnn import read_vectors, save_textcnn

        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ModelError(
                f"folder={str(folder)!r} is there already. What it holds would have been overwritten. Write another one."
            )
        found = None if vectors is None else read_vectors(vectors)
        documents = _read_texts(
            terminal.open_session("lexplain textcnn"), Source(path=str(texts), columns=Columns(text=column))
        )
        save_textcnn(folder, documents, vectors=found, train_embeddings=found is None)
        kind = "drawn vectors" if found is None else f"the vectors of {vectors}"
        terminal.console.print(f"{folder}: a TextCNN over the words of {texts}, {kind}", markup=False)


def _read_texts(spark: SparkSession, source: Source) -> Iterator[str]:
    """Yield the documents of a source that are texts."""
    from lexplain.executor import decode_document
    from lexplain.sources import read_documents

    settings = TextSettings()
    for row in read_documents(spark, source, "texts").where("defect IS NULL").select("text").toLocalIterator():
        try:
            yield decode_document(row["text"], settings.max_characters)
        except DocumentError:
            continue  # no document of the plan either


@app.command("fetch-jars")
def fetch_jars_command() -> None:
    """Fetch the Delta JARs once; later starts need no network."""
    from lexplain.session import fetch_jars

    console = Console(highlight=False, soft_wrap=True)
    try:
        console.print(f"Delta JARs: {escape(str(fetch_jars()))}")
    except ExplainError as error:
        raise _refuse(error, FAILED) from None


@plan_app.command("new")
def plan_new_command(full: Annotated[bool, typer.Option(help="Every key, with its default.")] = False) -> None:
    """Print a commented plan to start from.

    Example: lexplain plan new > plan.yaml
    """
    sys.stdout.write(write_template(full))


@plan_app.command("check")
def plan_check_command(plan: PlanPath) -> None:
    """Check a plan and report everything that is wrong with it; starts nothing."""
    try:
        checked = load_plan(plan)
    except PlanError as error:
        raise _refuse(error, BAD_PLAN) from None
    from lexplain.methods import find_method

    method, text = find_method(checked.method.id), checked.text
    console = Console(highlight=False)
    console.print(f"{escape(checked.name)}: no problem found")
    cost = method.tell_cost(checked.method.asked, text.max_tokens)
    if cost is not None:
        console.print(
            f"{escape(method.id)}: about {cost:.0f} forward-equivalents for each model, predicted label and window of"
            f" {text.max_tokens} tokens"
        )


@plan_app.command("show")
def plan_show_command(plan: PlanPath) -> None:
    """Print a plan with its preset and every default written out."""
    try:
        sys.stdout.write(load_plan(plan).to_yaml())
    except PlanError as error:
        raise _refuse(error, BAD_PLAN) from None


def main(argv: list[str] | None = None) -> Any:
    """Run the command line. Entry point of the `lexplain` script."""
    logging.getLogger("py4j").setLevel(logging.WARNING)
    return app(argv)
