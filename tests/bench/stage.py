"""The attribution stage on Spark beside the bare kernel, and a worker's memory while its partition grows.

The kernel runs in as many processes as there are cores, one thread each, as Spark's workers do, on the same documents by the
same method, models loaded before. The stage is the second run of a session, its workers warm; of the first one, of a few
documents, is told what a start costs.

    PYTHONPATH=tests .venv/bin/python -m bench.stage
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from bench.attribution import add_cache, describe_run, measure_peak
from bench.methods import find_bbc, make_plan, run_job
from lexplain.executor import EXPLANATIONS, ExplainTask, ModelTask, explain_batches
from lexplain.methods import find_method
from lexplain.model_store import digest_folder
from lexplain.session import open_session, stop_session

STAGED = pa.schema(
    [
        ("corpus_key", pa.string()), ("increment", pa.int32()), ("bucket", pa.int32()), ("doc_id", pa.string()),
        ("text", pa.binary()), ("text_digest", pa.string()), ("labels", pa.list_(pa.string())),
        ("defect", pa.string()), ("splits", pa.list_(pa.int32())),
    ]
)  # fmt: skip

BATCH_DOCUMENTS = 64

METHOD = "integrated_gradients"


def make_task(model: Path, max_tokens: int, name: str) -> ExplainTask:
    """Return what the plan of `bench.methods` tells a worker."""
    method = find_method(name)
    return ExplainTask(
        models=(ModelTask(0, "key", str(model), digest_folder(model)),), method=method.id, options=method.complete_options({}),
        precision="float32", top_k=None, gold=False, against=None, max_tokens=max_tokens, overlap=0, max_windows=1, max_characters=1_000_000,
        merge="sum", budget_tokens=None, threads=1, models_in_memory=4, allow_pickle=False, compile=False,
    )  # fmt: skip


def stage(documents: Sequence[dict[str, str]]) -> Iterator[pa.RecordBatch]:
    """Yield batches of documents in the order that staging gives them, each made when it is asked for."""
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        rows = [
            {"corpus_key": "corpus", "increment": 0, "bucket": 0, "doc_id": each["doc_id"], "text": each["text"].encode(),
             "text_digest": digest(each["text"]), "labels": [each["label"]], "defect": None, "splits": [0]}
            for each in documents[start : start + BATCH_DOCUMENTS]
        ]  # fmt: skip
        yield pa.RecordBatch.from_pylist(rows, schema=STAGED)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def work(documents: Sequence[dict[str, str]], task: ExplainTask, ready: Any, found: Any) -> None:
    """Load the model, wait for the others, explain, and tell the seconds, the rows, and the largest memory."""
    for _ in explain_batches(stage(documents[:2]), task, "cpu"):
        pass
    ready.wait()
    started, rows = time.perf_counter(), 0
    for batch in explain_batches(stage(documents), task, "cpu"):
        rows += batch.num_rows
    found.put((time.perf_counter() - started, rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def run_kernel(documents: Sequence[dict[str, str]], task: ExplainTask, processes: int) -> tuple[float, int, int]:
    """Return the seconds of the slowest process, the rows of all, and the largest memory of one."""
    context = multiprocessing.get_context("spawn")
    ready, queue = context.Barrier(processes), context.Queue()
    parts = [documents[number::processes] for number in range(processes)]
    workers = [context.Process(target=work, args=(part, task, ready, queue)) for part in parts]
    for worker in workers:
        worker.start()
    found = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    seconds, rows, peaks = zip(*found, strict=True)
    return max(seconds), sum(rows), max(peaks)


def measure_arrow(documents: Sequence[dict[str, str]], task: ExplainTask) -> float:
    """Return the seconds that it takes to read the documents out of Arrow and their explanations into it."""
    made = [row for batch in explain_batches(stage(documents), task, "cpu") for row in batch.to_pylist()]
    batches = list(stage(documents))
    started = time.perf_counter()
    for batch in batches:
        batch.to_pylist()
    pa.RecordBatch.from_pylist(made, schema=EXPLANATIONS)
    return time.perf_counter() - started


def measure_stage(model: Path, documents: Sequence[dict[str, str]], arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a session's start, of a first run of few documents, and of the stage once workers are warm."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
        started = time.perf_counter()
        spark = open_session("lexplain benchmark of the stage")
        opened = time.perf_counter()
        try:
            plan = make_plan(METHOD, model, corpus, folder / "cold", arguments, 8)
            cold = run_job(spark, plan)[1]
            plan = make_plan(METHOD, model, corpus, folder / "few", arguments, 8)
            few = run_job(spark, plan)[1]
            plan = make_plan(METHOD, model, corpus, folder / "warm", arguments, len(documents))
            run, seconds = run_job(spark, plan)
            rows = run.tables.read("explanations").persist()
            count = rows.count()
            written = time.perf_counter()
            rows.write.format("delta").save(str(folder / "again"))
            write = time.perf_counter() - written
        finally:
            stop_session(spark)
    return {
        "start_seconds": opened - started, "first_run_seconds": cold, "few_documents_seconds": few,
        "stage_seconds": seconds, "explaining_seconds": count / run.record["documents_per_second"], "write_seconds": write,
        "rows": count,
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300, help="of the comparison (default: 300)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a text's window (default: 128)")
    parser.add_argument(
        "--few", type=int, default=100, help="documents of the small partition; the large has ten times as many"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-stage.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    model, documents = find_bbc(arguments.cache)
    ordered = sorted(documents, key=lambda each: digest(each["text"]))
    documents = ordered[: arguments.documents]
    task = make_task(model, arguments.max_tokens, METHOD)
    record: dict[str, Any] = describe_run(
        arguments, digest_folder(model), measure_peak(), ["torch", "pyspark", "pyarrow"], {}
    )
    kernel = min(run_kernel(documents, task, arguments.processes)[0] for _ in range(2))
    record["stage"] = measure_stage(model, documents, arguments)
    kernel = min(kernel, run_kernel(documents, task, arguments.processes)[0])
    record["kernel_seconds"] = kernel
    record["stage_over_kernel"] = record["stage"]["explaining_seconds"] / kernel
    record["arrow_seconds_a_process"] = measure_arrow(documents, task) / arguments.processes
    # a partition of other texts, not of copies, which would be explained once
    quick = make_task(model, arguments.max_tokens, "gradient_x_input")
    small, large = ordered[: arguments.few], ordered[: 10 * arguments.few]
    record["memory_bytes"] = {len(part): run_kernel(part, quick, 1)[2] for part in (small, large)}
    record["memory_growth"] = record["memory_bytes"][len(large)] / record["memory_bytes"][len(small)]
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
