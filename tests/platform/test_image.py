"""The Dockerfile's steps, executed in a clean folder.

Not executed: the step of apt-get and what comes from Spark's image, which need a container. The dependencies that pip would
bring are those of the tests' own environment: gigabytes less.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pyspark
import pytest

from lexplain.session import DELTA_JARS, DELTA_SETTINGS, DELTA_VERSION

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "deploy" / "docker" / "Dockerfile"

WRITE_DELTA = """
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
spark.range(3).write.format("delta").save(sys.argv[1])
assert spark.read.format("delta").load(sys.argv[1]).count() == 3
"""


def instructions() -> Iterator[tuple[str, str]]:
    """Yield (name, arguments) of the last stage."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    stage = text.rpartition("\nFROM ")[2].partition("\n")[2].replace("\\\n", " ")
    for line in stage.splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            yield name, arguments.strip()


class Image:
    """What the steps made of a folder that stands for the root of the file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "SPARK_LOCAL_IP": "127.0.0.1"}
        for name in ("PIP_CONFIG_FILE", "PIP_INDEX_URL", "JAVA_HOME"):
            if name in os.environ:
                self.environment[name] = os.environ[name]
        self.skipped: list[str] = []
        for name, arguments in instructions():
            self.execute(name, self.move(arguments))

    def move(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/opt/", f"{self.root}/opt/", text)

    def expand(self, text: str) -> str:
        return Template(text).substitute(self.environment)

    def execute(self, name: str, arguments: str) -> None:
        if (name == "RUN" and "apt-get" in arguments) or (name == "COPY" and "--from=" in arguments):
            self.skipped.append(f"{name} {arguments}")
        elif name == "RUN":
            # Not by the environment variable: pip would build the wheel without the builder's own dependencies.
            self.run(arguments.replace('pip" install', 'pip" install --no-deps'))
            self.borrow_packages()
        elif name in ("ENV", "ARG"):
            self.environment |= dict(part.split("=", 1) for part in shlex.split(self.expand(arguments)))
        elif name == "WORKDIR":
            self.folder = Path(arguments)
            self.folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                self.copy(REPOSITORY / source, self.folder / target, into=target.endswith("/"))
        else:
            assert name in ("USER", "ENTRYPOINT", "CMD"), name

    def copy(self, source: Path, target: Path, *, into: bool) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / source.name if into else target)

    def run(self, script: str) -> str:
        done = subprocess.run(
            ["sh", "-ec", script],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout

    def borrow_packages(self) -> None:
        """Let the new environment see the packages that it was not given."""
        (packages,) = Path(self.environment["VIRTUAL_ENV"]).glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(str(Path(pyspark.__file__).parents[1]))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


def test_only_what_needs_a_container_was_left_out(image: Image) -> None:
    assert [re.findall(r"apt-get|/opt/entrypoint\.sh", step)[0] for step in image.skipped] == [
        "apt-get",
        "/opt/entrypoint.sh",
    ]


def test_lexplain_is_installed_and_not_borrowed(image: Image) -> None:
    where = image.run('python -c "import lexplain; print(lexplain.__file__)"').strip()
    assert Path(where).is_relative_to(image.root)
    assert "fine-tune" in image.run("lexplain --help")
    assert {path.name for path in (image.root / "opt/lexplain/jobs").glob("*.py")} >= {"run.py", "attribute.py"}
    assert os.access(image.root / "opt/lexplain/discover-gpus.sh", os.X_OK)


def test_spark_home_is_whole_and_its_conf_is_free_for_kubernetes(image: Image) -> None:
    home = Path(image.environment["SPARK_HOME"])
    assert not home.is_symlink()
    assert not (home / "conf").exists()
    assert (home / "jars" / f"spark-kubernetes_2.13-{pyspark.__version__}.jar").is_file()
    assert (home / "python" / "lib" / "pyspark.zip").is_file()


def test_the_class_path_holds_the_delta_jars(image: Image) -> None:
    assert DELTA_VERSION in image.environment["SPARK_DIST_CLASSPATH"]
    folder = Path(image.environment["SPARK_DIST_CLASSPATH"].removesuffix("/*"))
    assert {jar.name for jar in folder.glob("*.jar")} == set(DELTA_JARS)


def test_a_job_of_the_image_writes_delta_with_two_settings(image: Image, tmp_path: Path) -> None:
    """As the manifests: no JAR is named, the class path brings them."""
    job = tmp_path / "job.py"
    job.write_text(WRITE_DELTA)
    settings = " ".join(f"--conf {name}={value}" for name, value in DELTA_SETTINGS.items())
    image.run(f"spark-submit --master 'local[1]' {settings} {job} {tmp_path}/table")
    assert (tmp_path / "table" / "_delta_log").is_dir()


def test_the_build_context_holds_what_is_copied() -> None:
    lines = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "*"
    sources = [
        source for name, arguments in instructions() if name == "COPY" and "--from=" not in arguments
        for source in arguments.split()[:-1]
    ]  # fmt: skip
    assert sources
    assert {f"!{source}" for source in sources} <= set(lines)
    assert all((REPOSITORY / source).exists() for source in sources)


def test_the_image_runs_the_python_that_is_tested() -> None:
    (version,) = re.findall(
        r"^ARG PYTHON_IMAGE=python:(\d+\.\d+)-", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert version in ("3.11", "3.12")
    (spark,) = re.findall(r"^ARG SPARK_IMAGE=\S+:([\d.]+)", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert spark == pyspark.__version__
