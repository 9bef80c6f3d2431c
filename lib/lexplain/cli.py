"""The command line, `lexplain`: each command opens what it needs, runs a stage, and says what came of it."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lexplain.errors import ExplainError, LimitError, PlanError, TableError
from lexplain.plan import Plan, Sink
from lexplain.template import write_template
from lexplain.terminal import StageProgress, divert_chatter, format_seconds, print_error, print_keywords, print_rows

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from lexplain.pipeline import Run
    from lexplain.tables import Tables as OpenTables

DONE, FAILED, BAD_PLAN, PARTLY_DONE = 0, 1, 2, 3

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
Tables = Annotated[Path, typer.Option("--tables", help="Folder of the tables: a plan's sink.path.")]


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
    with divert_chatter(log_file) as console:
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


def _refuse(error: ExplainError, exit_code: int) -> typer.Exit:
    """Say on stderr why nothing was started, and return the exit to raise."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), markup=False, emoji=False)
    return typer.Exit(exit_code)


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
                _show_where(console, plan, run)
        finally:
            progress.close()


def show_keywords(console: Console, run: Run, key: str) -> None:
    """Print a keyword table."""
    from lexplain.tables import quote_text

    rows = (
        run.tables.read("keywords")
        .where(f"keyword_key = {quote_text(key)} AND kept")
        .orderBy("label", "rank")
        .collect()
    )
    splits = rows[0]["n_splits"] if rows else 0
    counts = run.record["documents_by_status"] or {}
    console.print()
    console.print(
        ", ".join(f"{count} {status}" for status, count in counts.items() if count) + " (model, document) pairs"
    )
    console.print()
    print_keywords(console, [row.asDict() for row in rows], n_splits=splits)
    if rows and not run.signed:
        console.print(f"{escape(_describe_unsigned(run))}\n")
    bare = sorted(set(run.plan.keywords.labels or run.labels) - {row["label"] for row in rows})
    if rows and bare:
        console.print(
            f"Without keywords: {escape(', '.join(bare))}: no document counts as evidence, or no word held up.\n"
        )
    if not rows:
        dropped = run.tables.spark.sql(
            f"SELECT drop_reason, count(*) AS n FROM {run.tables.name('keywords')} WHERE keyword_key = {quote_text(key)}"
            " GROUP BY drop_reason ORDER BY n DESC"
        ).collect()
        if not dropped:
            console.print(
                f"No keyword: no prediction above keywords.probability={run.plan.keywords.probability} counted as evidence "
                f"({run.plan.evidence}). Look at the models' F1 in the table models: train longer, or lower the probability."
            )
            return
        why = ", ".join(f"{row['drop_reason']} {row['n']}" for row in dropped)
        console.print(
            f"No word was kept ({escape(why)}). Lower keywords.theta or keywords.min_df, or explain more documents."
        )


def _describe_unsigned(run: Run) -> str:
    method = run.find_method(run.plan.method.id)
    remedy = "Write a method whose scores have a sign, such as integrated_gradients."
    if "sign" in method.complete_options({}):
        remedy = "Write method.options.sign: gradient_x_input."
    return f"unsigned: scores of {method.id} have no sign, so words that speak against a class stand beside those for it. {remedy}"


def _show_where(console: Console, plan: Plan, run: Run) -> None:
    place = plan.sink.path or plan.sink.schema
    console.print(f"[bold]tables[/bold]   {escape(str(place))}", soft_wrap=True)
    if plan.sink.path is not None:
        console.print(
            f'[bold]query[/bold]    lexplain sql --tables {escape(str(place))} "SELECT label, word, rank FROM keywords_current'
            ' ORDER BY label, rank"', soft_wrap=True,
        )  # fmt: skip
    if run.tracker is not None:
        console.print(f"[bold]MLflow[/bold]   run {run.tracker.mlflow_run_id}", soft_wrap=True)


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


@app.command("demo")
def demo_command(
    folder: Annotated[Path, typer.Option(help="Where corpus, models and tables go.")] = Path("lexplain-demo"),
) -> None:
    """Keywords of BBC News topics from a fine-tuned MiniLM: about 5 minutes on 2 cores."""
    from lexplain.demo import write_demo

    try:
        plan = write_demo(folder)
    except ExplainError as error:
        raise _refuse(error, FAILED) from None
    run_stages(plan, "demo", _run)


def _open_tables(terminal: _Terminal, folder: Path) -> OpenTables:
    from lexplain.methods import find_method
    from lexplain.pipeline import open_tables

    if not (folder / "catalog.sql").is_file():  # before Spark starts
        raise TableError(
            f"--tables={str(folder)!r} holds no tables of lexplain. The query would have failed. Write a plan's sink.path."
        )
    return open_tables(terminal.open_session("lexplain"), Sink(path=str(folder.resolve())), find_method)


@app.command("sql")
def sql_command(query: str, tables: Tables = Path("lexplain-demo/tables")) -> None:
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
    tables: Tables = Path("lexplain-demo/tables"),
) -> None:
    """Compare two keyword tables class by class: rank-biased overlap (p = 0.9) and Jaccard."""
    from lexplain.keywords import compare_lists
    from lexplain.tables import quote_text

    with _terminal("compare", None) as terminal:
        opened = _open_tables(terminal, tables)
        keys = []
        for name in (first, second):
            found = opened.spark.sql(
                f"SELECT keyword_key FROM {opened.name('runs')} WHERE (name = {quote_text(name)} OR keyword_key ="
                f" {quote_text(name)}) AND keyword_key IS NOT NULL ORDER BY finished_at DESC LIMIT 1"
            ).collect()
            if not found:
                raise ExplainError(
                    f"{name!r} names no keyword table in {str(tables)!r}. Nothing could be compared. Write a plan's name."
                )
            keys.append(found[0]["keyword_key"])
        rows = compare_lists(opened, keys[0], keys[1])
        print_rows(terminal.console, list(rows[0].asDict()) if rows else ["label"], (tuple(row) for row in rows))


@app.command("methods")
def methods_command() -> None:
    """List the attribution methods and their options."""
    from lexplain.methods import METHODS

    console = Console(highlight=False, soft_wrap=True)
    for method in METHODS.values():
        promises = [name for name in ("complete", "signed", "stochastic") if getattr(method, name)]
        console.print(f"[bold]{method.id}[/bold]  {', '.join(promises)}  [dim]{method.cite}[/dim]")
        for name, option in method.options.items():
            console.print(f"  {name}: {escape(repr(option.default))}")


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
    Console(highlight=False).print(f"{escape(checked.name)}: no problem found")


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
