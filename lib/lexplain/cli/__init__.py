"""The command line, `lexplain`: each command opens what it needs, runs a stage, and says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import typer

from lexplain.cli import plans, queries, stages
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

_COMMANDS: dict[str, Callable[..., None]] = {
    "run": stages.run_command,
    "fine-tune": stages.fine_tune_command,
    "attribute": stages.attribute_command,
    "aggregate": stages.aggregate_command,
    "evaluate": stages.evaluate_command,
    "sweep": stages.sweep_command,
    "demo": stages.demo_command,
    "sql": queries.sql_command,
    "compare": queries.compare_command,
    "methods": queries.methods_command,
    "explain": queries.explain_command,
    "textcnn": plans.textcnn_command,
    "fetch-jars": plans.fetch_jars_command,
}
_PLAN_COMMANDS: dict[str, Callable[..., None]] = {
    "new": plans.plan_new_command,
    "check": plans.plan_check_command,
    "show": plans.plan_show_command,
}
for _app, _commands in ((app, _COMMANDS), (plan_app, _PLAN_COMMANDS)):
    for _name, _command in _commands.items():
        _app.command(_name)(_command)


def main(argv: list[str] | None = None) -> Any:
    """Run the command line. Entry point of the `lexplain` script."""
    logging.getLogger("py4j").setLevel(logging.WARNING)
    return app(argv)
