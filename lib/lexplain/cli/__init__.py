"""The command line, `lexplain`: each command opens what it needs, runs a stage, and says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import typer

from lexplain.cli import doctor, plans, queries, reports, serving, stages, upkeep
from lexplain.cli.console import BAD_PLAN, DONE, FAILED, PARTLY_DONE

__all__ = ["BAD_PLAN", "DONE", "FAILED", "PARTLY_DONE", "app", "main"]

app = typer.Typer(
    help="Which words make a text classifier see each class: attributions of fine-tuned models as a Spark job.\n\n"
    "Exit codes: 0 done, 1 failure, 2 bad plan, 3 partly done (a limit of the plan was passed).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Write and check plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
runs_app = typer.Typer(help="List, show and delete runs.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")

_COMMANDS: dict[str, Callable[..., None]] = {
    "run": stages.run_command,
    "fine-tune": stages.fine_tune_command,
    "attribute": stages.attribute_command,
    "aggregate": stages.aggregate_command,
    "evaluate": stages.evaluate_command,
    "sweep": stages.sweep_command,
    "retry": stages.retry_command,
    "report": reports.report_command,
    "demo": stages.demo_command,
    "sql": queries.sql_command,
    "serve-sql": serving.serve_sql_command,
    "compare": queries.compare_command,
    "forget": upkeep.forget_command,
    "maintain": upkeep.maintain_command,
    "methods": queries.methods_command,
    "explain": queries.explain_command,
    "doctor": doctor.doctor_command,
    "textcnn": plans.textcnn_command,
    "fetch-jars": plans.fetch_jars_command,
}
_PLAN_COMMANDS: dict[str, Callable[..., None]] = {
    "new": plans.plan_new_command,
    "check": plans.plan_check_command,
    "show": plans.plan_show_command,
}
_RUNS_COMMANDS: dict[str, Callable[..., None]] = {
    "list": upkeep.runs_list_command,
    "show": upkeep.runs_show_command,
    "delete": upkeep.runs_delete_command,
}
for _app, _commands in ((app, _COMMANDS), (plan_app, _PLAN_COMMANDS), (runs_app, _RUNS_COMMANDS)):
    for _name, _command in _commands.items():
        _app.command(_name)(_command)


def main(argv: list[str] | None = None) -> None:
    """Run the command line, entry point of script and jobs; raises SystemExit where the command is not done.

    Not where it is: platforms that run jobs in a process of their own (Databricks) take every SystemExit for a failure.
    """
    logging.getLogger("py4j").setLevel(logging.WARNING)
    try:
        app(argv)
    except SystemExit as end:
        if end.code not in (None, DONE):
            raise
