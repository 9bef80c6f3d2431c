"""What all commands share: a log, messages, exit codes, and the session that is stopped at the end."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from lexplain.errors import ExplainError, LimitError, PlanError, TableError
from lexplain.plan import Plan, Sink
from lexplain.terminal import StageProgress, divert_chatter, format_seconds, print_error

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


DONE, FAILED, BAD_PLAN, PARTLY_DONE = 0, 1, 2, 3

Number = TypeVar("Number", int, float)

DEMO_TABLES = "lexplain-demo/tables"

TablesPlace = Annotated[
    str,
    typer.Option(
        "--tables", help="Folder or schema of the tables: a plan's sink.path or sink.schema.", metavar="PLACE"
    ),
]

PlanPath = Annotated[Path, typer.Argument(help="The plan, a YAML file.", metavar="PLAN.yaml")]


@dataclass
class Terminal:
    """What a command works with: where it prints, where chatter goes, and the exit code that comes of it."""

    console: Console
    log_file: Path
    exit_code: int = DONE
    spark: SparkSession | None = None

    def open_session(self, name: str) -> SparkSession:
        """Return a session; one that was not there before is stopped with the command."""
        from lexplain.session import has_session, open_session

        ours = not has_session()
        session = open_session(name)
        self.spark = session if ours else None  # a platform's own session outlives the command
        return session

    def fail(self, error: BaseException, exit_code: int) -> None:
        """Say what went wrong, and leave with this exit code."""
        print_error(self.console, error, self.log_file)
        self.exit_code = exit_code


@contextmanager
def open_terminal(command: str, folder: Path | None) -> Iterator[Terminal]:
    """Divert chatter to a log, turn errors into messages and exit codes, stop the session at the end."""
    logs = (folder or Path(tempfile.gettempdir()) / f"lexplain-{os.getuid()}") / "logs"
    log_file = logs / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    with ExitStack() as stack:
        try:
            console = stack.enter_context(divert_chatter(log_file))
        except OSError as error:
            raise refuse(name_unwritable(logs, error), FAILED) from None
        state = Terminal(console, log_file)
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


@contextmanager
def open_job(command: str, plan: Plan) -> Iterator[tuple[Terminal, SparkSession, StageProgress]]:
    """Open what a command with a plan works with: a terminal that logs into the sink, a session, progress of stages."""
    with open_terminal(command, None if plan.sink.path is None else Path(plan.sink.path)) as terminal:
        console, started = terminal.console, time.monotonic()
        console.print(f"[bold]lexplain[/bold] {escape(command)} {escape(plan.name)}")
        console.print(f"[dim]log: {escape(str(terminal.log_file))}[/dim]")
        progress = StageProgress(console)
        try:
            spark = terminal.open_session(f"lexplain {command} {plan.name}")
            seconds = format_seconds(time.monotonic() - started)
            console.print(f"[green]✓[/green] {'start Spark':<14} {spark.version} with Delta [dim]({seconds})[/dim]")
            yield terminal, spark, progress
        finally:
            progress.close()


def name_unwritable(folder: Path, error: OSError) -> TableError:
    """Return the refusal of a folder that cannot be written."""
    return TableError(
        f"folder={str(folder)!r} cannot be made ({error.strerror}). Tables and log would have had no place. Write a folder "
        "that you may write to."
    )


def refuse(error: ExplainError, exit_code: int) -> typer.Exit:
    """Say on stderr why nothing was started, and return the exit to raise."""
    say(str(error))
    return typer.Exit(exit_code)


def say(text: str) -> None:
    """Print a text on stderr as it is."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False, emoji=False)


def find_sink(tables: str) -> Sink:
    """Return the sink that a folder of tables is, or a schema of a catalogue.

    Raises:
        TableError: It is neither.
    """
    folder = Path(tables)
    if (folder / "catalog.sql").is_file():  # before Spark starts
        return Sink(path=str(folder.resolve()))
    if not folder.exists() and re.fullmatch(r"\w+(\.\w+)?", tables):
        return Sink(schema=tables)
    raise TableError(
        f"--tables={tables!r} holds no tables of lexplain. The query would have failed. Write a plan's sink.path or sink.schema."
    )


def load_plan(path: Path, *, check_files: bool = True) -> Plan:
    """Return a checked plan; every problem of it is raised at once."""
    from lexplain.methods import find_method

    return Plan.load(path, find_method, check_files=check_files)


def split_list(listed: str) -> list[str]:
    """Return the parts of a list with commas between, each once."""
    return list(dict.fromkeys(part.strip() for part in listed.split(",") if part.strip()))


def split_numbers(listed: str, kind: type[Number]) -> list[Number]:
    """Return the numbers of a list with commas between, each once."""
    try:
        return [kind(part) for part in split_list(listed)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{listed!r} must be {what} with commas between, as 1,2.") from None
