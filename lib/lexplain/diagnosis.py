"""What a run needs of this machine and of its plan's places: each is found fit, or named with what mends it. Driver only.

Nothing is changed by looking. Spark is needed for `check_runs` alone.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lexplain.errors import ExplainError, SessionError, TableError
from lexplain.local_files import is_local
from lexplain.schema import SCHEMA_VERSION
from lexplain.session import find_jars, find_java, find_poms_without_jar, is_given
from lexplain.tables import Tables, check_version, find_writer, quote_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from pyspark.sql import SparkSession

    from lexplain.plan import Plan

_GIB = 2**30
_JVM_BYTES = 3 * _GIB  # 2 GiB of heap, and what a JVM takes beside it
_WORKER_BYTES = _GIB  # a Python worker that has imported torch and transformers, without a model
_ROOM_BYTES = _GIB  # for tables, or for what Spark writes while it sorts
_TRAINING_COPIES = 4  # weights, gradients and Adam's two moments
_OPTIONAL = ("report", "captum")  # extras that are judged only where they are installed
_SHOWN = ("pyspark", "delta-spark", "mlflow", "torch", "transformers", "pyarrow", "pandas")


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        subject: What was looked at, as `Java`.
        said: What there is; or what is wrong, and what would have come of it.
        remedy: What mends it, a command where there is one; None where all is well.
    """

    subject: str
    said: str
    remedy: str | None = None

    @property
    def is_fit(self) -> bool:
        """Whether all is well."""
        return self.remedy is None


def check_machine(plan: Plan | None) -> Iterator[Finding]:
    """Yield what is found of packages, Java, JARs, GPU, memory and disk. Starts no Spark; imports torch.

    Args:
        plan: Whose needs count; None for those of a small plan.
    """
    mlflow = ("mlflow",) if plan is None or plan.mlflow.enabled else ()
    yield from check_packages(mlflow if is_given() else ("local", *mlflow))
    if not is_given():  # what submits the job brings Java and Delta, and lays out memory
        yield check_java()
        yield from check_jars()
        if importlib.util.find_spec("torch") is not None and (plan is None or plan.execution.device != "cpu"):
            yield check_gpu(wanted=plan is not None and plan.execution.device == "gpu")
        yield check_memory(plan, read_memory_limit())
        yield check_disk(Path(tempfile.gettempdir()), _ROOM_BYTES, "export TMPDIR=FOLDER")
    home = None if plan is None else plan.models.folder or plan.sink.path
    if plan is not None and home is not None:
        copies = 0 if plan.models.base is None else plan.models.splits * (2 if plan.mlflow.enabled else 1)
        yield check_disk(Path(home), _ROOM_BYTES + copies * _weigh_models(plan), "write sink: {path: FOLDER}")


def check_plan(plan: Plan, command: str) -> Iterator[Finding]:
    """Yield what is found of a plan's models and tables. Starts no Spark.

    Args:
        plan: A checked plan.
        command: Runs the plan.
    """
    yield from check_models(plan)
    if plan.sink.path is not None:
        yield check_tables(Path(plan.sink.path), command)
        writer = find_writer(Path(plan.sink.path))
        if writer is not None:
            yield Finding(
                "writer", f"{plan.sink.path} is being written by {writer}. A second run would have been refused",
                "Wait for it to end, or write another sink.path.",
            )  # fmt: skip


def check_packages(extras: Sequence[str]) -> Iterator[Finding]:
    """Yield that all packages are of versions that lexplain asks for, or each that is not.

    Args:
        extras: Of these every package must be there, as of lexplain itself.
    """
    try:
        requirements = _list_requirements(extras)
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages", "lexplain is not installed as a package. Nobody could tell which versions it asks for",
            f"pip install 'lexplain[{','.join(extras)}]'",
        )  # fmt: skip
        return
    versions: dict[str, str] = {}
    for requirement, is_needed in requirements:
        name, asked = requirement.name, str(requirement.specifier)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if is_needed:
                yield Finding(name, f"not installed; lexplain asks for {asked}", f"pip install '{name}{asked}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                name, f"{version} is installed, lexplain asks for {asked}. Calls would have failed, or numbers differed",
                f"pip install '{name}{asked}'",
            )  # fmt: skip
        versions[name] = version
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    yield Finding("packages", f"{len(versions)} looked at: {shown}")


def _list_requirements(extras: Sequence[str]) -> list[tuple[Requirement, bool]]:
    """Return what lexplain asks for, and whether it must be there."""
    from packaging.requirements import Requirement

    found: dict[str, tuple[Requirement, bool]] = {}
    for requirement in map(Requirement, metadata.requires("lexplain") or ()):
        marker = requirement.marker
        is_needed = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if is_needed or (marker is not None and any(marker.evaluate({"extra": extra}) for extra in _OPTIONAL)):
            found.setdefault(requirement.name, (requirement, is_needed))
    return list(found.values())


def check_java() -> Finding:
    """Return whether Spark will find a Java that it runs on."""
    try:
        return Finding("Java", str(find_java().resolve()))
    except SessionError as error:
        return _refuse("Java", error)


def check_jars() -> Iterator[Finding]:
    """Yield whether the Delta JARs are there; where not, also what keeps them from being fetched."""
    try:
        jars = find_jars()
    except SessionError as error:
        yield _refuse("Delta JARs", error)
    else:
        yield Finding("Delta JARs", f"{len(jars)} in {jars[0].parent}")
        return
    poms = find_poms_without_jar()
    if poms:
        yield Finding(
            "Maven cache", f"{poms[0]} has no JAR beside it{f', nor have {len(poms) - 1} more' if poms[1:] else ''}. Spark's "
            "resolver would have looked for the JAR there and nowhere else", shlex.join(["rm", "-r", *map(str, sorted({pom.parent for pom in poms}))]),
        )  # fmt: skip


def check_gpu(*, wanted: bool) -> Finding:
    """Return what torch and the driver say of GPUs. Costs the import of torch.

    Args:
        wanted: The plan asks for one; False: a CPU will do where there is none.
    """
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Finding("GPU", f"{len(names)}: {', '.join(dict.fromkeys(names))}; torch {torch.__version__}")
    driver = shutil.which("nvidia-smi")
    if driver is None:
        if not wanted:
            return Finding("GPU", "none; the models run on the CPU")
        return Finding(
            "GPU", "execution.device='gpu', and there is no NVIDIA driver here. Every task would have stopped",
            "sudo apt install nvidia-driver (Ubuntu: sudo ubuntu-drivers install); or write execution: {device: cpu}",
        )  # fmt: skip
    silently = "The models would have run on the CPU, many times slower"
    try:
        asked = subprocess.run([driver, "-L"], capture_output=True, text=True, timeout=60, check=False)
        answer, is_well = (asked.stdout + asked.stderr).strip().partition("\n")[0], asked.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        answer, is_well = str(error), False
    if not is_well:
        return Finding(
            "GPU", f"the driver does not answer ({driver}: {answer}). {silently}",
            "sudo modprobe nvidia; or restart the machine, if the driver was updated",
        )  # fmt: skip
    gpu = answer.partition(" (UUID")[0]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("GPU", f"CUDA_VISIBLE_DEVICES hides {gpu}. {silently}", "unset CUDA_VISIBLE_DEVICES")
    version = str(torch.__version__).partition("+")[0]
    if torch.version.cuda is None:
        return Finding(
            "GPU", f"{gpu} is here, and torch {torch.__version__} was built without CUDA. {silently}",
            f"pip install --force-reinstall torch=={version}",
        )  # fmt: skip
    return Finding(
        "GPU", f"{gpu} is here, and torch {torch.__version__} cannot use it: the driver is older than CUDA {torch.version.cuda}. "
        f"{silently}", "sudo apt install nvidia-driver (Ubuntu: sudo ubuntu-drivers install), then restart the machine",
    )  # fmt: skip


def read_memory_limit(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes of memory there are: the machine's, or as many as its container was given.

    Args:
        control_group: Where Linux tells the limits of this process.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2 of control groups, version 1
        limit = control_group / name
        if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def check_memory(plan: Plan | None, limit: int) -> Finding:
    """Return whether Spark, its Python workers and the models that they hold fit into memory.

    Args:
        plan: Whose models count.
        limit: Bytes of memory that there are.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    models = held = 0
    if plan is not None:
        models = plan.models.splits if plan.models.base is not None else len(plan.models.uris)
        held = min(models, plan.execution.models_in_memory) * _weigh_models(plan)
        held = max(held, _TRAINING_COPIES * _weigh_models(plan) if plan.models.base is not None else 0)
    needed = _JVM_BYTES + workers * (_WORKER_BYTES + held)
    said = f"{limit / _GIB:.1f} GiB; Spark and {workers} workers need up to {needed / _GIB:.1f} GiB"
    if needed <= limit:
        return Finding("memory", said)
    remedy = "taskset -c 0 lexplain ..., which starts one worker"
    if models > 1 and plan is not None and plan.execution.models_in_memory > 1:
        remedy = f"write execution: {{models_in_memory: 1}}; or {remedy}"
    return Finding("memory", f"{said}. The system would have ended a worker in the middle of its work", remedy)


def check_disk(folder: Path, needed: int, remedy: str) -> Finding:
    """Return whether there is room for what will be written to a folder, which need not be there yet.

    Args:
        folder: Where.
        needed: Bytes.
        remedy: How another folder is chosen.
    """
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    said = f"{free / _GIB:.1f} GiB free for {folder}, up to {needed / _GIB:.1f} needed"
    if free >= needed:
        return Finding("disk", said)
    return Finding(
        "disk", f"{said}. The run would have failed half way", f"{remedy} with a folder of a larger disk: df -h"
    )


def _weigh_models(plan: Plan) -> int:
    """Return the bytes of the largest local model's weights; 0 where none is local."""
    folders = [Path(name) for name in (plan.models.base, *plan.models.uris) if name is not None and is_local(name)]
    return max((sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in folders), default=0)


def check_models(plan: Plan) -> Iterator[Finding]:
    """Yield of each model that a plan names its digest, or why it cannot be read. Reads its files once."""
    from lexplain.pipeline import tracking_uri
    from lexplain.tracking import locate_model

    for name in plan.models.uris or (str(plan.models.base),):
        try:
            yield Finding("model", f"{name}: digest {locate_model(name, tracking_uri(plan)).digest[:12]}")
        except ExplainError as error:
            yield _refuse("model", error)


def check_tables(folder: Path, command: str) -> Finding:
    """Return whether a sink's tables can be read and written by this lexplain.

    Args:
        folder: Of the sink.
        command: Runs the plan.
    """
    if not (folder / "catalog.sql").is_file():
        return Finding("tables", f"none yet in {folder}")
    try:
        check_version(folder)
    except TableError as error:
        found = _refuse("tables", error)
        return Finding("tables", found.said, f"{command}: {found.remedy}")
    return Finding("tables", f"schema version {SCHEMA_VERSION} in {folder}")


def check_runs(spark: SparkSession, plan: Plan, command: str) -> Finding:
    """Return how the latest run of a plan's name ended. Reads the table `runs`.

    Args:
        spark: Reads it.
        plan: A checked plan.
        command: Runs the plan.
    """
    tables = Tables(spark, plan.sink)
    if plan.sink.schema is not None and not spark.catalog.tableExists(tables.name("runs")):
        return Finding("runs", f"no tables yet in {plan.sink.schema}")
    rows = tables.read("runs").where(f"name = {quote_text(plan.name)}").orderBy("started_at", ascending=False).head(1)
    if not rows:
        return Finding("runs", f"none of {plan.name} yet")
    run = rows[0]
    if run["status"] == "finished":
        return Finding("runs", f"the latest of {plan.name} is finished, {run['run_id'][:12]}")
    how = {"running": "was begun and never ended", "stopped": "was stopped", "failed": "failed"}[run["status"]]
    detail = "" if run["detail"] is None else f" ({str(run['detail']).splitlines()[0].rstrip('.')})"
    return Finding(
        "runs", f"run {run['run_id'][:12]} of {plan.name} {how}{detail}. What it committed is there", f"{command}, which goes on where it was",
    )  # fmt: skip


def _refuse(subject: str, error: ExplainError) -> Finding:
    """Return a refusal of lexplain as a finding: the last sentence of its message mends it."""
    said, _, remedy = str(error).rpartition(". ")
    return Finding(subject, said, remedy)
