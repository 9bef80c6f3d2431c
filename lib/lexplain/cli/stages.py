"""Commands that run the stages of a plan: fine-tune, attribute, aggregate, evaluate; and the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lexplain.cli.console import (
    BAD_PLAN,
    FAILED,
    PlanPath,
    load_plan,
    name_unwritable,
    open_job,
    refuse,
    split_list,
    split_numbers,
)
from lexplain.errors import ExplainError, PlanError
from lexplain.outcome import show_keywords, show_leaderboard, show_place, show_quality, show_sweep

if TYPE_CHECKING:
    from lexplain.pipeline import Run


def run_stages(path: Path, command: str, stages: Callable[[Run], str | None], *, pinned: bool = False) -> None:
    """Open a plan's run, do some of its stages, and show the keywords if a table came of it.

    Args:
        path: The plan.
        command: What the terminal says is done.
        stages: Does them; returns the keyword_key of a table that it made.
        pinned: The run must be there, and goes on with the documents that it has.
    """
    from lexplain.methods import find_method
    from lexplain.pipeline import open_run

    try:
        plan = load_plan(path)
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
    with open_job(command, plan) as (terminal, spark, progress):
        with open_run(spark, plan, find_method, progress, pinned=pinned, skip_unchanged=not pinned) as run:
            key = run.record["keyword_key"] if run.unchanged else stages(run)
            run.finish("finished")
        progress.close()
        # After the run is closed: a reader that goes away must not turn it into a failed one.
        if key is not None:
            show_keywords(terminal.console, run, key)
            show_place(terminal.console, run)


def _run(run: Run) -> str | None:
    run.read_sources()
    run.fine_tune()
    run.attribute()
    return run.aggregate()


def run_command(plan: PlanPath) -> None:
    """Run a plan: fine-tune, attribute, aggregate. Skips what is there already.

    Example: lexplain run plan.yaml
    """
    run_stages(plan, "run", _run)


def fine_tune_command(plan: PlanPath) -> None:
    """Fine-tune the plan's base model on its random splits."""
    run_stages(plan, "fine-tune", lambda run: run.fine_tune())


def attribute_command(plan: PlanPath) -> None:
    """Explain the corpus with the fine-tuned models."""
    run_stages(plan, "attribute", lambda run: run.attribute())


def aggregate_command(plan: PlanPath) -> None:
    """Make the keyword table from the explanations."""
    run_stages(plan, "aggregate", lambda run: run.aggregate())


def retry_command(
    plan: PlanPath,
    rejected: Annotated[bool, typer.Option("--rejected", help="Documents that were rejected.")] = False,
) -> None:
    """Explain documents of a run again, finish it, and make its keyword table anew. Documents that came since are for `run`.

    Example: lexplain retry plan.yaml --rejected
    """
    if not rejected:
        raise typer.BadParameter("say what to try again: lexplain retry PLAN.yaml --rejected")

    def retry(run: Run) -> str | None:
        run.retry_rejected()  # first: a run that stopped for its many rejections goes on after them
        run.attribute()
        return run.aggregate()

    run_stages(plan, "retry", retry, pinned=True)


def evaluate_command(
    plan: PlanPath,
    methods: Annotated[str, typer.Option(help="Ids or names, with commas between; NAME:PRESET for a preset.")],
    documents: Annotated[int, typer.Option(help="Explain so many documents of the corpus at most.", min=2)] = 200,
    protocols: Annotated[
        str, typer.Option(help="How words are taken away: dig-2021, eraser-2020, marc-2023, arras-2016.")
    ] = "dig-2021,eraser-2020,marc-2023",
) -> None:
    """Compare methods on the same documents: what predictions lose without the words that each of them names.

    Example: lexplain evaluate plan.yaml --methods integrated_gradients,lrp,lafa:lafa-sst2
    """
    from lexplain.evaluation import evaluate, list_contestants
    from lexplain.methods import find_method

    try:
        loaded = load_plan(plan)
        presets = split_list(protocols)
        contestants = list_contestants(loaded, split_list(methods), documents, find_method, presets)
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
    with open_job("evaluate", loaded) as (terminal, spark, progress):
        found = evaluate(spark, loaded, contestants, find_method, progress, presets)
        progress.close()
        show_leaderboard(terminal.console, found.faithfulness, found.differences)
        show_quality(terminal.console, found.quality)


def sweep_command(
    plan: PlanPath,
    top_n: Annotated[str, typer.Option(help="Words a document that count, with commas between.")] = "10,20,40",
    theta: Annotated[str, typer.Option(help="Shares of the splits that must select a word.")] = "0.4,0.6,0.8",
    probability: Annotated[str, typer.Option(help="Predictions count above these; the plan's when left out.")] = "",
) -> None:
    """Compare settings of the keyword rules on the explanations that are there, and rank them. Runs no model.

    Example: lexplain sweep plan.yaml --top-n 10,20 --theta 0.5,0.7
    """
    from lexplain.methods import find_method
    from lexplain.sweep import list_settings, sweep

    try:
        loaded = load_plan(plan)
        settings = list_settings(
            loaded,
            split_numbers(top_n, int),
            split_numbers(theta, float),
            split_numbers(probability, float),
            find_method,
        )
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
    with open_job("sweep", loaded) as (terminal, spark, progress):
        found = sweep(spark, loaded, settings, find_method, progress)
        progress.close()
        show_sweep(terminal.console, found)


def demo_command(
    folder: Annotated[Path, typer.Option(help="Where corpus, models and tables go.")] = Path("lexplain-demo"),
) -> None:
    """Keywords of BBC News topics from a fine-tuned MiniLM: about 5 minutes on 2 cores."""
    from lexplain.demo import write_demo

    try:
        plan = write_demo(folder)
    except OSError as error:
        raise refuse(name_unwritable(folder, error), FAILED) from None
    except ExplainError as error:
        raise refuse(error, FAILED) from None
    run_stages(plan, "demo", _run)
