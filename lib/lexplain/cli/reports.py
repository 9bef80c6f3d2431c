"""The command that writes a report."""

from __future__ import annotations

from errno import EISDIR
from os import strerror
from pathlib import Path
from typing import Annotated

import typer

from lexplain.cli.console import BAD_PLAN, FAILED, PlanPath, load_plan, open_terminal, refuse
from lexplain.errors import PlanError, TableError
from lexplain.terminal import StageProgress


def report_command(
    plan: PlanPath,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write one HTML file about a plan's latest run: keywords, stability, methods, documents. It needs no network.

    Example: lexplain report plan.yaml --out report.html
    """
    from lexplain.methods import find_method
    from lexplain.pipeline import tracking_uri

    try:
        loaded = load_plan(plan)
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
    part = out.with_name(f"{out.name}.part")
    try:
        if out.is_dir():
            raise IsADirectoryError(EISDIR, strerror(EISDIR))
        out.parent.mkdir(parents=True, exist_ok=True)
        part.touch()  # before Spark starts
    except OSError as error:
        raise refuse(_name_unwritable(out, error), FAILED) from None
    with open_terminal("report", None) as terminal:
        from lexplain.report.reading import read_report
        from lexplain.report.rendering import render
        from lexplain.tables import Tables
        from lexplain.tracking import log_file

        progress = StageProgress(terminal.console)
        try:
            progress.start("read tables", 1, "run")
            tables = Tables(terminal.open_session(f"lexplain report {loaded.name}"), loaded.sink)
            tables.open()
            report = read_report(tables, loaded.name, find_method)
            progress.finish(f"{len(report.keywords)} keywords, {len(report.documents)} documents")
            progress.start("write report", 1, "file")
            part.write_text(render(report, str(plan)), encoding="utf-8")
            part.rename(out)
            progress.finish(f"{out}, {out.stat().st_size / 1e6:.1f} MB")
            uri = tracking_uri(loaded)
            if uri is not None and report.mlflow_run_id is not None:
                progress.start("log report", 1, "artefact")
                log_file(uri, report.mlflow_run_id, out, "report")
                progress.finish(f"MLflow run {report.mlflow_run_id}")
        finally:
            progress.close()
            part.unlink(missing_ok=True)
        if report.plan != loaded.to_yaml():
            terminal.console.print("The plan's file has changed since this run: the report shows the plan of the run.")


def _name_unwritable(out: Path, error: OSError) -> TableError:
    return TableError(
        f"--out={str(out)!r} cannot be written ({error.strerror}). The report would have been made and lost. Write a file in "
        "a folder that you may write to."
    )
