"""Benchmark of the methods as Spark jobs: each from plan to keyword table, on the same documents and model.

`make bench-methods` runs it. A pilot of a few documents times each method; then it gets as many documents as fit its minutes,
at most --documents. Rates are those of the attribution stage, warm: starting Spark and loading the model are not in them.

Without --model, MiniLM is fine-tuned on BBC News as for the benchmark of attribution, and explains articles that it has not
seen. --model and --corpus take any other fine-tuned classifier and JSON lines (text, label, doc_id), as a TextCNN's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pyspark.sql import SparkSession
from rich.console import Console

from bench.attribution import HELD_OUT_DOCUMENTS, TRAINING_DOCUMENTS, describe_run, find_model, measure_peak
from lexplain.demo import read_bbc_news
from lexplain.errors import ExplainError
from lexplain.methods import METHODS, find_method
from lexplain.model_store import digest_folder
from lexplain.pipeline import Run, open_run
from lexplain.plan import Plan
from lexplain.session import open_session, stop_session
from lexplain.terminal import StageProgress


@dataclass
class Figures:
    """What a method's job came to.

    Attributes:
        method: Its id.
        documents: Documents of the job; those that were rejected among them.
        seconds: Of the attribution stage, without its preparation.
        documents_per_second: Of the attribution stage, without its preparation.
        days_per_million: For a million such documents and one model, on this machine, without the preparation.
        preparation_seconds: Of the job, beside that: calibrations, anchor paths, reference documents, the ledger.
        rejected: Documents that could not be explained.
        keywords: The first keywords of each class.
        refusal: Why the job did not run; None if it did.
    """

    method: str
    documents: int = 0
    seconds: float = 0.0
    documents_per_second: float = 0.0
    days_per_million: float = 0.0
    preparation_seconds: float = 0.0
    rejected: int = 0
    keywords: dict[str, list[str]] | None = None
    refusal: str | None = None


def make_plan(method: str, model: Path, corpus: Path, sink: Path, arguments: argparse.Namespace, limit: int) -> Plan:
    name, _, preset = method.partition(":")
    plan = {
        "name": method.replace(":", "-"),
        "corpus": {"path": str(corpus), "columns": {"doc_id": "doc_id", "labels": "label"}, "limit": limit},
        "models": {"uris": [str(model)], "corpus": "unseen"},
        "method": {"id": name} | ({"preset": preset} if preset else {}),
        "text": {"max_tokens": arguments.max_tokens, "overlap": 0, "max_windows": 1},
        "keywords": {"min_df": 2, "top": 20},
        "execution": {"device": "cpu", "chunk_documents": 100_000},
        "limits": {"rejected_share": None},
        "mlflow": {"enabled": False},
        "sink": {"path": str(sink)},
    }
    return Plan.parse(yaml.safe_dump(plan), find_method)


def run_job(spark: SparkSession, plan: Plan) -> tuple[Run, float]:
    """Run a plan to its keyword table; returns the run and the seconds of its attribution stage."""
    with open_run(spark, plan, find_method, StageProgress(Console(quiet=True))) as run:
        run.read_sources()
        started = time.perf_counter()
        run.attribute()
        seconds = time.perf_counter() - started
        run.aggregate()
        run.finish("finished")
    return run, seconds


def measure_method(
    spark: SparkSession, method: str, model: Path, corpus: Path, folder: Path, arguments: argparse.Namespace
) -> Figures:
    """Pilot, then the job itself, in sinks of their own; the workers are warm by then."""
    figures = Figures(method)
    try:
        run_job(spark, make_plan(method, model, corpus, folder / "cold", arguments, arguments.pilot))
        pilot = run_job(spark, make_plan(method, model, corpus, folder / "pilot", arguments, arguments.pilot))[0]
        rate = pilot.record["documents_per_second"] or 1.0
        limit = max(arguments.pilot, min(arguments.documents, int(rate * 60 * arguments.minutes)))
        run, seconds = run_job(spark, make_plan(method, model, corpus, folder / "job", arguments, limit))
    except ExplainError as error:
        figures.refusal = str(error)
        return figures
    counts = run.record["documents_by_status"]
    rows = run.tables.read("keywords").where("kept").orderBy("label", "rank").collect()
    keywords: dict[str, list[str]] = {}
    for row in rows:
        keywords.setdefault(row["label"], []).append(row["word"])
    rate = run.record["documents_per_second"]
    figures.documents, figures.rejected = sum(counts.values()), counts.get("rejected", 0)
    figures.documents_per_second, figures.days_per_million = rate, 1e6 / rate / 86_400
    figures.seconds = counts["explained"] / rate
    figures.preparation_seconds = max(0.0, seconds - figures.seconds)
    figures.keywords = {label: words[:5] for label, words in keywords.items()}
    return figures


def write_table(figures: Sequence[Figures]) -> str:
    """Return Markdown, a row a method."""
    lines = [
        "| method | documents | documents/s | days for a million | rejected | keywords of the first class |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for each in figures:
        if each.refusal is not None:
            lines.append(f"| {each.method} | | | | | refused: {each.refusal.splitlines()[0][:120]} |")
            continue
        first = next(iter((each.keywords or {}).values()), [])
        lines.append(
            f"| {each.method} | {each.documents} | {each.documents_per_second:.2f} | {each.days_per_million:.1f} "
            f"| {each.rejected} | {', '.join(first)} |"
        )
    return "\n".join(lines)


def write_bbc(path: Path) -> list[dict[str, str]]:
    """Write the articles that `find_model` does not train on, and return all in its order."""
    documents = read_bbc_news()
    random.Random(0).shuffle(documents)
    unseen = documents[TRAINING_DOCUMENTS + HELD_OUT_DOCUMENTS :]
    lines = (
        json.dumps({"doc_id": each["doc_id"], "text": each["text"], "label": each["topic"]}, ensure_ascii=False)
        for each in unseen
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return documents


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lexplain" / "bench"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a fine-tuned classifier (default: MiniLM, BBC News)")
    parser.add_argument("--corpus", type=Path, help="JSON lines: doc_id, text, label (default: BBC News, unseen)")
    parser.add_argument("--methods", nargs="+", help="ids, or id:preset (default: all)")
    parser.add_argument("--documents", type=int, default=500, help="at most so many a method (default: 500)")
    parser.add_argument("--minutes", type=float, default=15, help="at most so long a method, about (default: 15)")
    parser.add_argument("--pilot", type=int, default=8, help="documents of the pilot (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a text's window (default: 128)")
    parser.add_argument("--cache", type=Path, default=cache, help="where the model is kept")
    parser.add_argument("--out", type=Path, default=Path("bench-methods.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    if (arguments.model is None) != (arguments.corpus is None):
        parser.error("--model and --corpus go together")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file after each method, and print the table."""
    arguments = read_arguments(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, corpus = arguments.model, arguments.corpus
        if model is None:
            corpus = folder / "bbc.jsonl"
            model = find_model(arguments.cache, write_bbc(corpus))
        packages = ["torch", "transformers", "numpy", "pyspark", "delta-spark"]
        record: dict[str, Any] = describe_run(arguments, digest_folder(model), measure_peak(), packages, {})
        spark = open_session("lexplain benchmark of the methods")
        try:
            figures: list[Figures] = []
            for method in arguments.methods or list(METHODS):
                place = folder / method.replace(":", "-")
                figures.append(measure_method(spark, method, model, corpus, place, arguments))
                record["figures"] = [asdict(each) for each in figures]
                arguments.out.write_text(json.dumps(record, indent=2) + "\n")
                print(write_table(figures[-1:]).splitlines()[-1], flush=True)
        finally:
            stop_session(spark)
    print(write_table(figures))


if __name__ == "__main__":
    main()
