"""The command that looks for what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lexplain.cli.console import BAD_PLAN, DONE, FAILED, Terminal, load_plan, open_terminal
from lexplain.errors import PlanError
from lexplain.terminal import print_finding

if TYPE_CHECKING:
    from lexplain.diagnosis import Finding
    from lexplain.plan import Plan


def doctor_command(
    plan: Annotated[
        Path | None, typer.Argument(help="Look at its models and tables too.", metavar="[PLAN.yaml]")
    ] = None,
) -> None:
    """Name what is missing or unfit, each with what mends it: Java, JARs, packages, GPU, memory, disk; of a plan models and tables.

    Changes nothing. Spark is started only where a plan has tables already. Exit codes: 0 all is well, 1 something is not, 2 bad plan.

    Example: lexplain doctor plan.yaml
    """
    with open_terminal("doctor", None) as terminal:
        from lexplain.diagnosis import check_machine

        loaded: Plan | None = None
        refused: PlanError | ImportError | None = None
        try:
            loaded = None if plan is None else load_plan(plan)
        except (PlanError, ImportError) as error:
            refused = error
        findings = [_show(terminal, finding) for finding in check_machine(loaded)]
        if loaded is not None:
            findings += _look_at_plan(terminal, loaded, shlex.join(["lexplain", "run", str(plan)]), findings)
        unfit = sum(not finding.is_fit for finding in findings)
        terminal.console.print(f"{unfit} to mend" if unfit else "nothing to mend here" if refused else "all is well")
        terminal.exit_code = FAILED if unfit else DONE
        if refused is not None:
            terminal.fail(refused, BAD_PLAN if isinstance(refused, PlanError) else FAILED)


def _show(terminal: Terminal, finding: Finding) -> Finding:
    print_finding(terminal.console, finding.subject, finding.said, finding.remedy)
    return finding


def _look_at_plan(terminal: Terminal, plan: Plan, command: str, before: Sequence[Finding]) -> list[Finding]:
    """Look at models and tables; at the runs where there are tables, and Spark can be started to read them."""
    from lexplain.diagnosis import check_plan, check_runs

    findings = [_show(terminal, finding) for finding in check_plan(plan, command)]
    has_tables = plan.sink.path is None or (Path(plan.sink.path) / "catalog.sql").is_file()
    in_the_way = {"pyspark", "delta-spark", "Java", "Delta JARs", "tables", "writer"}
    if has_tables and all(finding.is_fit or finding.subject not in in_the_way for finding in [*before, *findings]):
        findings.append(_show(terminal, check_runs(terminal.open_session("lexplain doctor"), plan, command)))
    return findings
