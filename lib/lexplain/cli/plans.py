"""Commands about plans and what they need: a template, checks, a TextCNN to fine-tune, the Delta JARs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lexplain.cli.console import BAD_PLAN, FAILED, PlanPath, load_plan, open_terminal, refuse
from lexplain.errors import DocumentError, ExplainError, ModelError, PlanError
from lexplain.plan import Columns, Source
from lexplain.plan import Text as TextSettings
from lexplain.template import write_template

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


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
    with open_terminal("textcnn", None) as terminal:
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


def fetch_jars_command() -> None:
    """Fetch the Delta JARs once; later starts need no network."""
    from lexplain.session import fetch_jars

    console = Console(highlight=False, soft_wrap=True)
    try:
        console.print(f"Delta JARs: {escape(str(fetch_jars()))}")
    except ExplainError as error:
        raise refuse(error, FAILED) from None


def plan_new_command(full: Annotated[bool, typer.Option(help="Every key, with its default.")] = False) -> None:
    """Print a commented plan to start from.

    Example: lexplain plan new > plan.yaml
    """
    sys.stdout.write(write_template(full))


def plan_check_command(plan: PlanPath) -> None:
    """Check a plan and report everything that is wrong with it; starts nothing."""
    try:
        checked = load_plan(plan)
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
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


def plan_show_command(plan: PlanPath) -> None:
    """Print a plan with its preset and every default written out."""
    try:
        sys.stdout.write(load_plan(plan).to_yaml())
    except PlanError as error:
        raise refuse(error, BAD_PLAN) from None
