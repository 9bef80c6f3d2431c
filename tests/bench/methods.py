"""Benchmark of the methods as Spark jobs: each from plan to keyword table, on the same documents and model.

`make bench-methods` runs it. A first job by SmoothGrad tells how many forward-equivalents a second the workers come to;
a method then gets as many documents as fit its minutes by what it says that it costs, at most --documents. Rates are those
of the attribution stage, warm: starting Spark and loading the model are not in them.

MiniLM is fine-tuned on BBC News as for the benchmark of attribution and explains articles that it has not seen; a TextCNN
does the same on 20 Newsgroups.
"""

from __future__ import annotations

import argparse
import json
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

from bench.attribution import HELD_OUT_DOCUMENTS, TRAINING_DOCUMENTS, add_cache, describe_run, find_model, measure_peak
from bench.newsgroups import fetch_newsgroups, find_textcnn
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
        forward_equivalents: What the method says that such a document costs, the steered ones a typical one.
        evaluations: Gradients taken for an explanation, on average.
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
    forward_equivalents: float = 0.0
    evaluations: float = 0.0
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


def tell_cost(plan: Plan, tokens: int) -> float:
    """Return what a method says that a document costs, in forward-equivalents."""
    cost = find_method(plan.method.id).tell_cost(plan.method.asked, tokens)
    if cost is None:
        raise SystemExit(
            f"method={plan.method.id!r} tells no cost. Its documents could not have been counted out. Leave it out."
        )
    return cost


def measure_method(
    spark: SparkSession,
    method: str,
    model: Path,
    corpus: Path,
    folder: Path,
    arguments: argparse.Namespace,
    rate: float,
) -> Figures:
    """Run a job in a sink of its own; the workers are warm, and come to `rate` forward-equivalents a second."""
    figures = Figures(method)
    try:
        plan = make_plan(method, model, corpus, folder, arguments, arguments.documents)
        fit = int(60 * arguments.minutes * rate / tell_cost(plan, arguments.max_tokens))
        limit = max(2, min(arguments.documents, fit))
        run, seconds = run_job(spark, make_plan(method, model, corpus, folder, arguments, limit))
    except ExplainError as error:
        figures.refusal = str(error)
        return figures
    counts = run.record["documents_by_status"]
    rows = run.tables.read("keywords").where("kept").orderBy("label", "rank").collect()
    explained = run.tables.read("explanations").where("status = 'explained'")
    means = explained.selectExpr("avg(n_tokens) AS tokens", "avg(evaluations) AS evaluations").first()
    keywords: dict[str, list[str]] = {}
    for row in rows:
        keywords.setdefault(row["label"], []).append(row["word"])
    figures.documents, figures.rejected = sum(counts.values()), counts.get("rejected", 0)
    figures.documents_per_second = run.record["documents_per_second"]
    figures.days_per_million = 1e6 / figures.documents_per_second / 86_400
    figures.seconds = counts["explained"] / figures.documents_per_second
    if means is not None and means["tokens"] is not None:
        figures.forward_equivalents = tell_cost(run.plan, round(means["tokens"]))
        figures.evaluations = means["evaluations"]
    figures.preparation_seconds = max(0.0, seconds - figures.seconds)
    figures.keywords = {label: words[:5] for label, words in keywords.items()}
    return figures


def measure_rate(spark: SparkSession, model: Path, corpus: Path, folder: Path, arguments: argparse.Namespace) -> float:
    """Start the workers, let them load the model, and return the forward-equivalents a second that they then come to."""
    rates = [
        run_job(spark, make_plan("smoothgrad", model, corpus, folder / name, arguments, documents))[0]
        for name, documents in (("cold", 4), ("warm", min(64, arguments.documents)))
    ]
    plan, rate = rates[-1].plan, rates[-1].record["documents_per_second"]
    return float(rate * tell_cost(plan, arguments.max_tokens))


def write_table(figures: Sequence[Figures]) -> str:
    """Return Markdown, a row a method."""
    lines = [
        "| method | documents | forward-equivalents | gradients | documents/s | days for a million | rejected "
        "| keywords of the first class |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for each in figures:
        if each.refusal is not None:
            lines.append(f"| {each.method} | | | | | | | refused: {each.refusal.splitlines()[0][:120]} |")
            continue
        first = next(iter((each.keywords or {}).values()), [])
        lines.append(
            f"| {each.method} | {each.documents} | {each.forward_equivalents:.0f} | {each.evaluations:.1f} "
            f"| {each.documents_per_second:.2f} | {each.days_per_million:.1f} "
            f"| {each.rejected} | {', '.join(first)} |"
        )
    return "\n".join(lines)


def find_bbc(cache: Path) -> tuple[Path, list[dict[str, str]]]:
    """Return MiniLM fine-tuned on BBC News, and articles that it has not seen."""
    documents = read_bbc_news()
    random.Random(0).shuffle(documents)
    unseen = documents[TRAINING_DOCUMENTS + HELD_OUT_DOCUMENTS :]
    return find_model(cache, documents), [
        {"doc_id": each["doc_id"], "text": each["text"], "label": each["topic"]} for each in unseen
    ]


def find_newsgroups(cache: Path) -> tuple[Path, list[dict[str, str]]]:
    """Return a TextCNN fine-tuned on 20 Newsgroups, and the test part."""
    found = fetch_newsgroups(cache)
    return find_textcnn(cache, found["train"]), found["test"]


MODELS = {"bbc": find_bbc, "newsgroups": find_newsgroups}


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=["bbc", "newsgroups"], default="bbc", help="model and corpus (default: bbc)")
    parser.add_argument("--methods", nargs="+", help="ids, or id:preset (default: all)")
    parser.add_argument("--documents", type=int, default=500, help="at most so many a method (default: 500)")
    parser.add_argument("--minutes", type=float, default=15, help="at most so long a method, about (default: 15)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a text's window (default: 128)")
    add_cache(parser)
    parser.add_argument("--out", type=Path, help="the figures, as JSON (default: bench-methods-ON.json)")
    arguments = parser.parse_args(words)
    arguments.out = arguments.out or Path(f"bench-methods-{arguments.on}.json")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file after each method, and print the table."""
    arguments = read_arguments(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, documents = MODELS[arguments.on](arguments.cache)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents), encoding="utf-8")
        packages = ["torch", "transformers", "numpy", "pyspark", "delta-spark"]
        record: dict[str, Any] = describe_run(arguments, digest_folder(model), measure_peak(), packages, {})
        spark = open_session("lexplain benchmark of the methods")
        try:
            rate = measure_rate(spark, model, corpus, folder, arguments)
            print(f"{rate:.1f} forward-equivalents a second", flush=True)
            record["forward_equivalents_per_second"] = rate
            figures: list[Figures] = []
            for method in arguments.methods or list(METHODS):
                place = folder / method.replace(":", "-")
                figures.append(measure_method(spark, method, model, corpus, place, arguments, rate))
                record["figures"] = [asdict(each) for each in figures]
                arguments.out.write_text(json.dumps(record, indent=2) + "\n")
                print(write_table(figures[-1:]).splitlines()[-1], flush=True)
        finally:
            stop_session(spark)
    print(write_table(figures))


if __name__ == "__main__":
    main()
