"""Benchmark of attribution on a CPU: lexplain's rules beside captum and SHAP, in one run, on the same documents.

`make bench` runs it, `make bench BENCH=--help` lists the settings; it needs Linux. Every contender goes from text to word
scores with the same model and threads. They take turns, so that a noisy machine hurts all alike, and the quickest round
counts. Passes of the model are counted by hooks, for all in the same way.

Without --model, MiniLM is fine-tuned on BBC News as the demo does; --model takes the folder of any other fine-tuned
classifier, as a DistilBERT, with one label a document.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.util
import json
import os
import platform
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.contenders import BUDGET_TOKENS, TOLERANCE, Contender, Scores, list_contenders, make_explainer, run_lexplain
from bench.machine import describe_machine
from lexplain.calibration import MOST_REFERENCE_ERROR, SAMPLE_DOCUMENTS, SAMPLE_NODES, Calibration, fit_calibration
from lexplain.classifier import Classifier
from lexplain.demo import find_minilm, read_bbc_news
from lexplain.finetune import Recipe, fine_tune, quiet_transformers
from lexplain.model_store import digest_folder

TRAINING_DOCUMENTS, HELD_OUT_DOCUMENTS = 640, 320
RECIPE = Recipe(epochs=1, learning_rate=2e-4, batch_size=8, max_tokens=128)

LENGTH_OF_PEAK = 2048
"""Rows of the square matrices whose product tells the machine's peak."""


# --- what is measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixCost:
    """Floating point operations of a model's matrix products, for a sequence.

    Those of all linear layers that see every token, and of full attention. Backward to the embeddings, each linear
    layer has one product as in the forward pass, and attention four where it had two.
    """

    per_token: float
    per_token_pair: float

    @classmethod
    def of(cls, classifier: Classifier) -> MatrixCost:
        length, found = 16, 0.0

        def see(layer: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            nonlocal found
            assert isinstance(layer, nn.Linear)
            if inputs[0].numel() == length * inputs[0].shape[-1]:
                found += 2 * layer.weight.numel()

        handles = [m.register_forward_hook(see) for m in classifier.model.modules() if isinstance(m, nn.Linear)]
        ids = torch.full((1, length), classifier.find_token("mask"))
        with torch.no_grad():
            classifier.logits(classifier.embed(ids), torch.ones_like(ids, dtype=torch.bool), None)
        for handle in handles:
            handle.remove()
        config = classifier.model.config
        return cls(found, 4.0 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0))

    def forward(self, length: int) -> float:
        return self.per_token * length + self.per_token_pair * length**2

    def backward(self, length: int) -> float:
        return self.per_token * length + 2 * self.per_token_pair * length**2


@dataclass
class Work:
    """What a model was made to do: sequences forward and backward, and operations of its matrix products."""

    forward: int = 0
    backward: int = 0
    operations: float = 0.0


@contextmanager
def count_work(model: nn.Module, cost: MatrixCost) -> Iterator[Work]:
    """Count passes from outside: by the model's inputs, and by autograd's visits of its logits."""
    work = Work()

    def see(_: nn.Module, __: Any, inputs: dict[str, Tensor], output: Any) -> None:
        given = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        rows, length = given.shape[:2]
        work.forward += rows
        work.operations += rows * cost.forward(length)

        def see_gradient(_: Tensor) -> None:
            work.backward += rows
            work.operations += rows * cost.backward(length)

        if output.logits.requires_grad:
            output.logits.register_hook(see_gradient)

    handle = model.register_forward_hook(see, with_kwargs=True)
    try:
        yield work
    finally:
        handle.remove()


class PeakMemory:
    """Largest resident memory of this process while a block runs, in bytes, sampled 50 times a second.

    Attributes:
        before: At the start of the block: libraries, the model, and whatever stays of earlier contenders.
        peak: The largest.
    """

    def __init__(self) -> None:
        self.before = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if platform.libc_ver()[0] == "glibc":  # it keeps what the contender before has freed
            ctypes.CDLL(None).malloc_trim(0)
        self.before = self.peak = self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._read())

    def _read(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def best_seconds(compute: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest of some runs, after one that does not count."""
    compute()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure_peak() -> float:
    """Return operations a second of a large float32 matrix product."""
    matrix = torch.randn(LENGTH_OF_PEAK, LENGTH_OF_PEAK)
    return 2.0 * LENGTH_OF_PEAK**3 / best_seconds(lambda: matrix @ matrix, repeats=10)


def measure_autograd(classifier: Classifier, cost: MatrixCost, length: int) -> dict[str, float]:
    """Measure a plain loop, embeddings in and gradient of a logit out, in passes of the same size as everyone's."""
    rows = max(1, BUDGET_TOKENS // length)
    ids = torch.randint(classifier.model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    embeddings, mask = classifier.embed(ids), torch.ones_like(ids, dtype=torch.bool)

    def forward() -> Tensor:
        with torch.no_grad():
            return classifier.logits(embeddings, mask, None)

    def gradient() -> Tensor:
        leaf = embeddings.detach().requires_grad_()
        return torch.autograd.grad(classifier.logits(leaf, mask, None)[:, 0].sum(), leaf)[0]

    forward_seconds, gradient_seconds = best_seconds(forward), best_seconds(gradient)
    return {
        "rows": rows,
        "forward_seconds": forward_seconds,
        "gradient_seconds": gradient_seconds,
        "backward_over_forward": (gradient_seconds - forward_seconds) / forward_seconds,
        "operations_per_second": rows * (cost.forward(length) + cost.backward(length)) / gradient_seconds,
    }


# --- figures ----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was found of a contender; errors are relative to the reference's L2 norm, over the top label's words."""

    contender: str
    max_tokens: int
    targets: int
    documents: int
    seconds: list[float] = field(default_factory=list)
    documents_per_second: float = 0.0
    evaluations: float = 0.0
    forward_equivalents: float = 0.0
    operations_per_second: float = 0.0
    share_of_peak: float = 0.0
    peak_memory_bytes: int = 0
    added_memory_bytes: int = 0
    error_median: float | None = None
    error_p90: float | None = None
    error_p99: float | None = None
    error_max: float | None = None
    converged: float | None = None
    converged_but_off: float | None = None

    def add_round(self, seconds: float, work: Work, memory: PeakMemory, backward_cost: float, peak: float) -> None:
        """Take a round's figures; the quicker round tells the rates."""
        self.seconds.append(seconds)
        self.documents_per_second = self.documents / min(self.seconds)
        self.evaluations = work.backward / (self.documents * self.targets)
        self.forward_equivalents = (work.forward + backward_cost * work.backward) / (self.documents * self.targets)
        self.operations_per_second = work.operations / min(self.seconds)
        self.share_of_peak = self.operations_per_second / peak
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory.peak)
        self.added_memory_bytes = max(self.added_memory_bytes, memory.peak - memory.before)

    def add_accuracy(self, found: Sequence[Sequence[Scores]], references: Sequence[Scores]) -> None:
        """Compare with the references; convergence is judged over the same rows."""
        if not found:
            return
        told = [rows[0].converged for rows in found]
        errors = np.array([relative_error(rows[0], right) for rows, right in zip(found, references, strict=True)])
        self.error_median, self.error_p90, self.error_p99 = np.quantile(errors, (0.5, 0.9, 0.99)).tolist()
        self.error_max = float(errors.max())
        if told[0] is not None:
            sure = np.array(told, dtype=bool)
            self.converged = float(sure.mean())
            self.converged_but_off = float((sure & (errors > 2 * TOLERANCE)).mean())


def relative_error(found: Scores, right: Scores) -> float:
    if found.label != right.label:
        raise RuntimeError(f"label={found.label!r} must be {right.label!r}, as in the reference")
    return float(np.linalg.norm(found.values - right.values) / np.linalg.norm(right.values))


def find_references(
    classifier: Classifier, digest: str, texts: Sequence[str], max_tokens: int, nodes: int, cache: Path
) -> list[Scores]:
    """Return scores of the midpoint rule with many nodes, one text after the other, each kept on disk."""
    run = run_lexplain(classifier, max_tokens, {"rule": "midpoint", "nodes": nodes})
    found = []
    for number, text in enumerate(texts, 1):
        key = hashlib.sha256(f"{digest}/{max_tokens}/{nodes}/mask/{text}".encode()).hexdigest()
        path = cache / "references" / f"{key}.json"
        if not path.is_file():
            (reference,) = run([text], 1)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"label": reference.label, "values": reference.values.tolist()}))
            part.rename(path)
            print(f"reference {number}/{len(texts)} at {max_tokens} tokens", flush=True)
        kept = json.loads(path.read_text())
        found.append(Scores(kept["label"], np.array(kept["values"])))
    return found


def calibrate(
    classifier: Classifier, texts: Sequence[str], max_tokens: int, corpus_documents: int
) -> tuple[Calibration, dict[str, Any]]:
    """Return a calibration made as a job makes it, and what it took."""
    started = time.perf_counter()
    explainer = make_explainer(classifier, max_tokens, {"rule": "adaptive"}, 1)
    for nodes in SAMPLE_NODES:
        sample = explainer.sample_paths(explainer.read_texts(texts), nodes)
        random.Random(0).shuffle(sample)  # they come by length, and rules are fitted to the first ones
        sampled = time.perf_counter()
        calibration = fit_calibration(sample, n_documents=corpus_documents)
        fit_seconds = time.perf_counter() - sampled
        if calibration.reference_error <= MOST_REFERENCE_ERROR:
            break
    record = {
        "documents": calibration.n_documents, "sample_nodes": nodes, "seconds": time.perf_counter() - started,
        "fit_seconds": fit_seconds, "reference_error": calibration.reference_error,
        "keywords": asdict(calibration.keywords),
    }  # fmt: skip
    return calibration, record


def find_equal_fixed_rules(figures: Sequence[Figures], max_tokens: int) -> dict[str, dict[str, int | None]]:
    """Return, for each lexplain rule that chooses its points, the fewest points of a fixed rule at least as accurate.

    Accuracy is the 99th percentile of the error; None where no fixed rule that was run reaches it.
    """
    mine = [
        each for each in figures if each.max_tokens == max_tokens and each.targets == 1 and each.error_p99 is not None
    ]
    found: dict[str, dict[str, int | None]] = {}
    for each in mine:
        if not each.contender.startswith(("lexplain adaptive", "lexplain calibrated")):
            continue
        found[each.contender] = {}
        for rule in ("midpoint", "gauss_legendre"):
            sizes = [
                round(other.evaluations) for other in mine
                if other.contender.startswith(f"lexplain {rule}") and (other.error_p99 or 0) <= (each.error_p99 or 0)
            ]  # fmt: skip
            found[each.contender][rule] = min(sizes, default=None)
    return found


# --- the run ----------------------------------------------------------------------------------------------------


def find_model(cache: Path, documents: Sequence[dict[str, str]]) -> Path:
    """Return MiniLM fine-tuned on the first documents; a folder that is there is taken if it was made so."""
    folder = cache / "minilm-bbc"
    used = documents[: TRAINING_DOCUMENTS + HELD_OUT_DOCUMENTS]
    folder.parent.mkdir(parents=True, exist_ok=True)
    scores = fine_tune(
        find_minilm(), [each["text"] for each in used], [[each["topic"]] for each in used],
        [number < TRAINING_DOCUMENTS for number in range(len(used))],
        label_names=sorted({each["topic"] for each in used}), multi_label=False, recipe=RECIPE, seed=1, folder=folder,
        report=lambda step, steps: None if step % 20 else print(f"fine-tuning: step {step} of {steps}", flush=True),
    )  # fmt: skip
    print(f"model: MiniLM fine-tuned on BBC News, macro F1 {scores.macro_f1:.3f}, {folder}", flush=True)
    return folder


def describe_run(
    arguments: argparse.Namespace, digest: str, peak: float, packages: Sequence[str], settings: dict[str, Any]
) -> dict[str, Any]:
    record = describe_machine(arguments, packages)
    record["machine"] |= {
        "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_product_operations_per_second": peak,
    }  # fmt: skip
    record["settings"] |= settings
    return record | {"model_digest": digest}


def run_rounds(
    contenders: Sequence[Contender], classifier: Classifier, texts: Sequence[str], references: Sequence[Scores],
    max_tokens: int, targets: int, rounds: int, backward_cost: float, peak: float,
) -> list[Figures]:  # fmt: skip
    """Let the contenders take turns; those that run once do so first, for one target."""
    cost, figures = MatrixCost.of(classifier), dict[str, Figures]()
    for number in range(rounds):
        for each in contenders:
            if each.once and (number > 0 or targets > 1):
                continue
            mine = texts[: each.documents]
            with PeakMemory() as memory, count_work(classifier.model, cost) as work:
                started = time.perf_counter()
                found = each.run(mine, targets)
                seconds = time.perf_counter() - started
            known = figures.setdefault(each.name, Figures(each.name, max_tokens, targets, len(mine)))
            known.add_round(seconds, work, memory, backward_cost, peak)
            known.add_accuracy(found, references)
            print(
                f"{max_tokens} tokens, {targets} target(s), round {number + 1}: {each.name}, {seconds:.1f} s",
                flush=True,
            )
    return list(figures.values())


def write_table(figures: Sequence[Figures]) -> str:
    """Return Markdown, one table a window size and number of targets."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f}"

    lines: list[str] = []
    for size, targets in dict.fromkeys((each.max_tokens, each.targets) for each in figures):
        lines += [
            f"\n{size} tokens, {targets} target{'s' if targets > 1 else ''} a document\n",
            "| contender | documents/s | gradient evaluations | forward-equivalents | error median % | p90 % | p99 % "
            "| max % | converged % | converged but off % | share of peak % | peak memory MB | of it added MB |",
            "|---|" + "---:|" * 12,
        ]
        for each in figures:
            if (each.max_tokens, each.targets) != (size, targets):
                continue
            shares = [each.error_median, each.error_p90, each.error_p99, each.error_max, each.converged]
            cells = [
                each.contender, f"{each.documents_per_second:.3f}", f"{each.evaluations:.1f}",
                f"{each.forward_equivalents:.1f}", *map(percent, shares), percent(each.converged_but_off),
                percent(each.share_of_peak), f"{each.peak_memory_bytes / 2**20:.0f}", f"{each.added_memory_bytes / 2**20:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_notes(record: dict[str, Any]) -> str:
    """Return Markdown: what the tables' figures were measured on, and what they cost beside."""
    machine = record["machine"]
    peak = machine["matrix_product_operations_per_second"] / 1e9
    lines = [
        f"- {machine['cpu']}, {machine['threads']} threads, matrix products {peak:.0f} GFLOP/s; {record['versions']}"
    ]
    for size, found in record["sizes"].items():
        autograd, calibration = found["autograd"], found["calibration"]
        lines += [
            f"- {size} tokens: a plain autograd loop reaches {100 * autograd['share_of_peak']:.0f} % of that, a backward "
            f"pass takes {autograd['backward_over_forward']:.2f} forward ones; the calibration took "
            f"{calibration['seconds']:.0f} s ({calibration['documents']} documents, {calibration['sample_nodes']} points)",
            f"- {size} tokens, fewest points of a fixed rule with as small a p99 error: "
            f"{found['fixed_evaluations_at_equal_p99']}",
        ]
    return "\n".join(lines)


def add_cache(parser: argparse.ArgumentParser) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lexplain" / "bench"
    parser.add_argument("--cache", type=Path, default=cache, help="where models, corpora and references are kept")


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="folder of a fine-tuned classifier (default: MiniLM, fine-tuned here)"
    )
    parser.add_argument("--documents", type=int, default=24, help="BBC News articles to explain (default: 24)")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[128, 512], help="window sizes (default: 128 512)")
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 3], help="labels a document (default: 1 3)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="turns of each contender; the quickest counts (default: 2)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--reference-nodes", type=int, default=1000, help="midpoints of the reference (default: 1000)")
    parser.add_argument("--corpus-documents", type=int, default=670, help="for which a calibration chooses its nodes")
    parser.add_argument(
        "--shap-documents", type=int, default=8, help="documents for SHAP; 0: leave it out (default: 8)"
    )
    add_cache(parser)
    parser.add_argument("--out", type=Path, default=Path("bench-attribution.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    for package in ("captum", *(["shap"] if arguments.shap_documents else [])):
        if importlib.util.find_spec(package) is None:
            parser.error(
                f"the package {package} is not installed. Run `make bench`, or `pip install 'lexplain[bench]'`."
            )
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, and print the tables."""
    arguments = read_arguments(words)
    torch.set_num_threads(arguments.threads)
    documents = read_bbc_news()
    random.Random(0).shuffle(documents)
    folder = arguments.model or find_model(arguments.cache, documents)
    with quiet_transformers():
        classifier = Classifier.load(folder)
    digest, peak = digest_folder(folder), measure_peak()
    if classifier.problem != "single_label":
        raise SystemExit(f"problem={classifier.problem!r} must be single_label: captum's loops explain plain logits.")
    unseen = [each["text"] for each in documents[TRAINING_DOCUMENTS + HELD_OUT_DOCUMENTS :]]
    texts, sample = unseen[: arguments.documents], unseen[arguments.documents :][:SAMPLE_DOCUMENTS]
    packages = ["torch", "transformers", "captum", "numpy", *(["shap"] if arguments.shap_documents else [])]
    settings = {"budget_tokens": BUDGET_TOKENS, "tolerance": TOLERANCE, "calibration_documents": SAMPLE_DOCUMENTS}
    record: dict[str, Any] = describe_run(arguments, digest, peak, packages, settings) | {"sizes": {}}
    figures: list[Figures] = []
    for max_tokens in arguments.max_tokens:
        autograd = measure_autograd(classifier, MatrixCost.of(classifier), max_tokens)
        calibration, calibrated = calibrate(classifier, sample, max_tokens, arguments.corpus_documents)
        print(f"{max_tokens} tokens: autograd {autograd}, calibration {calibrated}", flush=True)
        references = find_references(classifier, digest, texts, max_tokens, arguments.reference_nodes, arguments.cache)
        contenders = list_contenders(classifier, folder, max_tokens, calibration, arguments.shap_documents)
        for targets in arguments.targets:
            figures += run_rounds(
                contenders, classifier, texts, references, max_tokens, targets, arguments.rounds,
                autograd["backward_over_forward"], peak,
            )  # fmt: skip
        record["sizes"][max_tokens] = {
            "autograd": autograd | {"share_of_peak": autograd["operations_per_second"] / peak},
            "calibration": calibrated, "fixed_evaluations_at_equal_p99": find_equal_fixed_rules(figures, max_tokens),
        }  # fmt: skip
        record["figures"] = [asdict(each) for each in figures]
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")  # after each size: an hour's work is not lost
    print(write_table(figures) + "\n\n" + write_notes(record))


if __name__ == "__main__":
    main()
