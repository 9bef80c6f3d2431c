"""`lexplain doctor`: everything it looks for is made to be missing for once, and mended as it says where that is a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from core.models import Shelf
from lexplain.diagnosis import (
    Finding,
    check_disk,
    check_gpu,
    check_jars,
    check_java,
    check_memory,
    check_models,
    check_packages,
    check_plan,
    check_tables,
    read_memory_limit,
)
from lexplain.methods import find_method
from lexplain.model_store import digest_folder
from lexplain.plan import Plan
from lexplain.schema import SCHEMA_VERSION
from lexplain.session import DELTA_JARS, jar_folder

GIB = 2**30


def write_script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return path


def write_plan(folder: Path, model: Path | str, **changes: Any) -> Path:
    """A plan of one ready model over a corpus of two documents."""
    (folder / "corpus.csv").write_text("text\nThe party said\nThe team scored\n", encoding="utf-8")
    plan = {
        "name": "tiny", "corpus": {"path": "corpus.csv"}, "models": {"uris": [str(model)], "corpus": "unseen"},
        "text": {"max_tokens": 32, "overlap": 0}, "sink": {"path": "tables"}, "mlflow": {"enabled": False},
    }  # fmt: skip
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | changes), encoding="utf-8")
    return path


def load_plan(path: Path) -> Plan:
    return Plan.load(path, find_method)


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lexplain", "doctor", *arguments],
        env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


# --- Java and JARs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "holds no bin/java"),
        ("echo 'openjdk version \"1.8.0_402\"' >&2", "has version 1, not 17 or 21"),
        ("echo 'openjdk version \"25\" 2025-09-16' >&2", "has version 25, not 17 or 21"),
        ("echo 'The operation couldn’t be completed.' >&2; exit 1", "no version"),
    ],
)
def test_a_java_that_spark_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str | None, said: str
) -> None:
    if answer is not None:
        write_script(tmp_path / "bin" / "java", answer)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    found = check_java()
    assert not found.is_fit
    assert said in found.said
    assert "sudo apt install openjdk-17-jre-headless" in str(found.remedy)


def test_no_java_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "java was not found" in check_java().said
    write_script(tmp_path / "java", "echo 'openjdk version \"21.0.4\"' >&2")
    assert check_java() == Finding("Java", str(tmp_path / "java"))


def test_a_cache_without_one_of_the_jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for missing in reversed(DELTA_JARS):
        (found,) = check_jars()
        assert f"{DELTA_JARS[0]} is missing" in found.said
        assert "lexplain fetch-jars" in str(found.remedy)
        jar_folder().mkdir(parents=True, exist_ok=True)
        (jar_folder() / missing).touch()
    (found,) = check_jars()
    assert found.is_fit
    assert found.said.startswith(f"{len(DELTA_JARS)} in {tmp_path}")


def test_poms_without_jars_in_the_maven_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    repository = tmp_path / "my home" / ".m2" / "repository"
    poms = [
        repository / "io" / group / jar.rsplit("-", 1)[0] / jar.rsplit("-", 1)[1].removesuffix(".jar") / jar.replace(".jar", ".pom")
        for group, jar in (("delta", DELTA_JARS[0]), ("delta", DELTA_JARS[1]), ("unitycatalog", DELTA_JARS[5]))
    ]  # fmt: skip
    others = [repository / name for name in ("io/delta/delta-core/1.0/delta-core-1.0.pom", "org/a/b/1/b-1.pom")]
    for pom in poms + others:
        pom.parent.mkdir(parents=True)
        pom.touch()
    poms[2].with_suffix(".jar").touch()
    _, found = check_jars()
    assert found.subject == "Maven cache"
    assert "has no JAR beside it, nor have 1 more" in found.said
    subprocess.run(["sh", "-ec", str(found.remedy)], check=True)
    assert len(list(check_jars())) == 1
    assert [pom.is_file() for pom in poms + others] == [False, False, True, True, True]


# --- packages -----------------------------------------------------------------------------------------------------


def write_distribution(folder: Path, name: str, version: str, *requirements: str) -> None:
    home = folder / f"{name}-{version}.dist-info"
    home.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += ["Provides-Extra: local", "Provides-Extra: report"] if requirements else []
    lines += [f"Requires-Dist: {one}" for one in requirements]
    (home / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_packages_here_are_as_asked_for() -> None:
    findings = list(check_packages(("local", "mlflow")))
    assert [finding for finding in findings if not finding.is_fit] == []
    assert "pyspark 4.2.0" in findings[0].said


@pytest.mark.parametrize("name", ["pyspark", "delta_spark", "pandas", "pyarrow", "mlflow", "torch", "transformers"])
def test_a_package_of_another_version(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, name, "0.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = (finding for finding in check_packages(("local", "mlflow")) if not finding.is_fit)
    assert found.subject == name.replace("_", "-")
    assert found.said.startswith("0.1 is installed, lexplain asks for ")
    assert str(found.remedy).startswith(f"pip install '{found.subject}")


def test_packages_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(
        tmp_path, "lexplain", "9", "no-such-words>=1", "no-such-spark>=4,<5; extra == 'local'", "numpy>=1",
        "no-such-page>=3; extra == 'report'", "no-such-bench; extra == 'bench'",
    )  # fmt: skip
    write_distribution(tmp_path, "no_such_page", "2.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    words, spark, page, rest = check_packages(("local",))
    assert (words.said, words.remedy) == ("not installed; lexplain asks for >=1", "pip install 'no-such-words>=1'")
    assert (spark.subject, spark.remedy) == ("no-such-spark", "pip install 'no-such-spark<5,>=4'")
    assert page.said.startswith("2.9 is installed")  # an extra that is optional, and yet installed
    assert rest.is_fit
    assert "no-such-spark" not in {finding.subject for finding in check_packages(())}


# --- GPU, memory, disk --------------------------------------------------------------------------------------------

LISTED = "echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'"
ASK = "from lexplain.diagnosis import check_gpu; found = check_gpu(wanted=False); print(found.said, found.remedy, sep='\\n')"


def test_a_gpu_that_is_hidden_from_torch(tmp_path: Path) -> None:
    write_script(tmp_path / "nvidia-smi", LISTED)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    said, remedy = done.stdout.splitlines()
    assert said.startswith("CUDA_VISIBLE_DEVICES hides GPU 0: NVIDIA L4. The models would have run on the CPU")
    assert remedy == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here: none can be missing")
def test_a_gpu_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpu(wanted=False) == Finding("GPU", "none; the models run on the CPU")
    assert "there is no NVIDIA driver here" in check_gpu(wanted=True).said
    smi = write_script(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed' >&2; exit 9")
    found = check_gpu(wanted=False)
    assert "does not answer" in found.said
    assert "NVIDIA-SMI has failed" in found.said
    assert str(found.remedy).startswith("sudo modprobe nvidia")
    write_script(smi, LISTED)
    found = check_gpu(wanted=False)
    assert found.said.startswith("GPU 0: NVIDIA L4 is here, and torch")
    built = torch.version.cuda is not None
    assert str(found.remedy).startswith("sudo apt install nvidia-driver" if built else "pip install --force-reinstall")


def test_memory_that_the_models_do_not_fit_into(tmp_path: Path, shelf: Shelf) -> None:
    assert check_memory(None, 2**50).is_fit
    found = check_memory(None, 2 * GIB)
    assert found.said.startswith("2.0 GiB; Spark and ")
    assert str(found.remedy).startswith("taskset -c 0")
    models = []
    for number in range(3):
        models.append(str(shutil.copytree(shelf.folder("bert"), tmp_path / f"model{number}")))
        os.truncate(Path(models[-1]) / "model.safetensors", 8 * GIB)  # sparse: takes no room
    plan = load_plan(write_plan(tmp_path, models[0], models={"uris": models, "corpus": "unseen"}))
    assert check_memory(plan, 2**50).is_fit
    found = check_memory(plan, 20 * GIB)
    assert "in the middle of its work" in found.said
    assert str(found.remedy).startswith("write execution: {models_in_memory: 1}")


def test_the_memory_of_a_container(tmp_path: Path) -> None:
    machine = read_memory_limit(tmp_path)
    assert machine > GIB
    (tmp_path / "memory.max").write_text("max\n")
    assert read_memory_limit(tmp_path) == machine
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert read_memory_limit(tmp_path) == GIB
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{GIB // 2}\n")
    assert read_memory_limit(tmp_path) == GIB // 2


def test_a_disk_without_room(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert check_disk(tmp_path / "not" / "there", free // 2, "export TMPDIR=FOLDER").is_fit
    found = check_disk(tmp_path / "not" / "there", free + 100 * GIB, "export TMPDIR=FOLDER")
    assert "The run would have failed half way" in found.said
    assert str(found.remedy).startswith("export TMPDIR=FOLDER")


# --- a plan -------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_read(tmp_path: Path, shelf: Shelf) -> None:
    (found,) = check_models(load_plan(write_plan(tmp_path, shelf.folder("bert"))))
    assert found.said == f"{shelf.folder('bert')}: digest {digest_folder(shelf.folder('bert'))[:12]}"
    (found,) = check_models(load_plan(write_plan(tmp_path, f"file://{tmp_path}/gone")))
    assert "gone' cannot be read" in found.said
    assert str(found.remedy).startswith("Write a path or a storage URI")


def test_tables_of_another_version(tmp_path: Path) -> None:
    assert check_tables(tmp_path, "lexplain run plan.yaml").said == f"none yet in {tmp_path}"
    for version, remedy in ((3, "run its plan again, which adds them"), (99, "run the plan into a new folder")):
        (tmp_path / "catalog.sql").write_text(f"-- Tables of lexplain, schema version {version}. Run it first\n")
        found = check_tables(tmp_path, "lexplain run plan.yaml")
        assert f"schema version {version}, this lexplain reads {SCHEMA_VERSION}" in found.said
        assert str(found.remedy).startswith("lexplain run plan.yaml")
        assert remedy in str(found.remedy)
    (tmp_path / "catalog.sql").write_text(f"-- Tables of lexplain, schema version {SCHEMA_VERSION}. Run it first\n")
    assert check_tables(tmp_path, "").is_fit


def test_a_sink_that_another_job_writes_to(tmp_path: Path, shelf: Shelf) -> None:
    plan = load_plan(write_plan(tmp_path, shelf.folder("bert")))
    holder = (
        "import sys\nfrom lexplain.plan import Sink\nfrom lexplain.tables import Tables\n"
        f"with Tables(None, Sink(path={plan.sink.path!r})).lock():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        (found,) = (finding for finding in check_plan(plan, "lexplain run plan.yaml") if finding.subject == "writer")
        assert f"is being written by process {process.pid} on " in found.said
    finally:
        process.communicate("")
    assert all(finding.is_fit for finding in check_plan(plan, "lexplain run plan.yaml"))


# --- the command --------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_and_the_exit_code_tells(tmp_path: Path, shelf: Shelf) -> None:
    here = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAVA_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = run_doctor(str(write_plan(tmp_path, shelf.folder("bert"))), **here)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert any(line.startswith("✗ Java ") for line in lines)
    place = next(number for number, line in enumerate(lines) if line.startswith("✗ Delta JARs "))
    assert lines[place + 1].strip() == "Run `lexplain fetch-jars` once, with a network."
    assert any(line.startswith("✓ model ") for line in lines)
    assert f"✓ tables       none yet in {tmp_path / 'tables'}" in lines
    assert lines[-1] == "2 to mend"
    assert not (tmp_path / "tables").exists()


def test_a_bad_plan_is_2_whatever_else_is_missing(tmp_path: Path, shelf: Shelf) -> None:
    path = write_plan(tmp_path, shelf.folder("bert"), keywords={"theta": 2})
    done = run_doctor(str(path), TMPDIR=str(tmp_path), JAVA_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "✗ Java" in done.stdout
    assert "keywords.theta=2 must be" in done.stdout
