"""Commands that look after a sink: its runs, documents to forget, tables to compact."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from lexplain.cli.console import (
    BAD_PLAN,
    DEMO_TABLES,
    PlanPath,
    TablesPlace,
    Terminal,
    find_sink,
    load_plan,
    open_job,
    open_terminal,
    refuse,
)
from lexplain.errors import PlanError
from lexplain.tables import RETAIN_HOURS, Tables
from lexplain.terminal import StageProgress, print_rows

RunName = Annotated[str, typer.Argument(help="A run_id, or the name of a plan that one run has.", metavar="RUN")]


def _open(terminal: Terminal, place: str) -> Tables:
    sink = find_sink(place)
    tables = Tables(terminal.open_session("lexplain"), sink)
    tables.open()
    return tables


def runs_list_command(tables: TablesPlace = DEMO_TABLES) -> None:
    """List the runs of some tables, the latest first.

    Example: lexplain runs list --tables lexplain-tables
    """
    with open_terminal("runs", None) as terminal:
        opened = _open(terminal, tables)
        columns = (
            "run_id",
            "name",
            "status",
            "started_at",
            "finished_at",
            "documents_by_status",
            "keyword_key",
            "detail",
        )
        rows = opened.read("runs").orderBy("started_at", ascending=False).select(*columns).collect()
        print_rows(terminal.console, columns, (tuple(row) for row in rows))


def runs_show_command(run: RunName, tables: TablesPlace = DEMO_TABLES) -> None:
    """Show what is recorded of a run, its plan included.

    Example: lexplain runs show planted --tables lexplain-tables
    """
    with open_terminal("runs", None) as terminal:
        from lexplain.upkeep import find_run

        opened = _open(terminal, tables)
        row = find_run(opened, run)
        print_rows(terminal.console, ("what", "value"), [pair for pair in row.items() if pair[0] != "plan"])
        terminal.console.print(f"\n{escape(row['plan'])}", soft_wrap=True)


def runs_delete_command(
    run: RunName,
    tables: TablesPlace = DEMO_TABLES,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a run and what it alone has made: what another run reads stays.

    Example: lexplain runs delete 3f0c5a --tables lexplain-tables
    """
    if not yes:
        typer.confirm(f"Delete the run {run!r} of {tables} and what it alone has made?", abort=True)
    with open_terminal("runs", None) as terminal:
        from lexplain.upkeep import delete_run, find_run

        opened = _open(terminal, tables)
        with opened.lock():
            opened.sign_commits({"command": "runs delete"})
            row = find_run(opened, run)
            removed = delete_run(opened, row)
        print_rows(terminal.console, ("table", "rows deleted"), removed.items())


def forget_command(
    plan: PlanPath,
    doc_ids: Annotated[list[str], typer.Argument(help="Ids as the plan's source has them.", metavar="DOC_ID...")],
) -> None:
    """Remove documents of a plan's sources from every table, and leave them out for good.

    Keyword tables that they were in go too: the next `lexplain run` makes them again, without a model.

    Example: lexplain forget plan.yaml article-17
    """
    from lexplain.upkeep import forget_documents

    try:
        loaded = load_plan(plan, check_files=False)  # the source may be gone, its documents are not
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
    with open_job("forget", loaded) as (terminal, spark, progress):
        tables = Tables(spark, loaded.sink)
        with tables.lock():
            tables.create()
            tables.sign_commits({"command": "forget"})
            progress.start("forget", len(doc_ids), "documents")
            found = forget_documents(tables, loaded, doc_ids)
            progress.finish(f"{found.n_documents} documents and {found.n_explanations} rows of explanations removed")
        progress.close()
        if not found.n_documents:
            terminal.console.print("No source of the plan has them yet: they will be left out if they come.")
        if found.runs:
            terminal.console.print(
                f"Without a keyword table until `lexplain run` makes it again: {escape(', '.join(found.runs))}",
                soft_wrap=True,
            )
        terminal.console.print(
            "Older versions of the tables hold them until `lexplain maintain` deletes their files. Models that were fine-tuned on "
            "them, and reports, keep what they have.", soft_wrap=True,
        )  # fmt: skip


def maintain_command(
    tables: TablesPlace = DEMO_TABLES,
    retain_hours: Annotated[
        float, typer.Option(help="Keep files that versions of the last hours need.", min=RETAIN_HOURS)
    ] = RETAIN_HOURS,
) -> None:
    """Compact some tables, delete files that no version needs, and keyword tables that nothing names.

    Example: lexplain maintain --tables lexplain-tables
    """
    from lexplain.schema import TABLES
    from lexplain.upkeep import drop_orphans

    with open_terminal("maintain", None) as terminal:
        opened, progress = _open(terminal, tables), StageProgress(terminal.console)
        try:
            with opened.lock():
                opened.sign_commits({"command": "maintain"})
                orphans = drop_orphans(opened)
                progress.start("maintain", len(TABLES), "tables")
                rows = []
                for table in TABLES:
                    rows.append((table, *opened.compact(table, retain_hours)))
                    progress.advance(1)
                progress.finish(f"{orphans} keyword tables deleted that no run names")
        finally:
            progress.close()
        print_rows(terminal.console, ("table", "files before", "files after"), rows)
