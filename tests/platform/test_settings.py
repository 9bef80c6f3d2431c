"""What all platforms share: plans that lexplain accepts, Spark settings that exist, no secret."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pyspark
import pytest

from lexplain.methods import find_method
from lexplain.plan import Plan
from lexplain.session import DELTA_PACKAGE, DELTA_SETTINGS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
SUBMITTING = [DEPLOY / name for name in ("kubernetes/kubeflow.yaml", "kubernetes/apache.yaml", "airflow/lexplain_dag.py",
                                         "spark-submit.md")]  # fmt: skip

# Put together from parts in Spark's code, and so nowhere in it as a whole.
COMPOSED = re.compile(
    r"spark\.(worker|executor|task)\.resource\.gpu\.(amount|vendor|discoveryScript)"
    r"|spark\.kubernetes\.authenticate\.driver\.serviceAccountName"
)
# Spark adds the user's own name behind these.
PREFIXES = ("spark.yarn.appMasterEnv.", "spark.executorEnv.")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every name of a setting in the classes of Spark's JARs."""
    jars = Path(pyspark.__file__).parent / "jars"
    names = ("spark-core_*", "spark-catalyst_*", "spark-sql-api_*", "spark-kubernetes_*", "spark-common-utils_*")
    found: set[str] = set()
    for jar in (path for name in names for path in jars.glob(f"{name}.jar")):
        with zipfile.ZipFile(jar) as archive:
            for member in archive.namelist():
                if member.endswith(".class"):
                    found.update(re.findall(rb"spark\.[A-Za-z][\w.]*\w", archive.read(member)))  # type: ignore[arg-type]
    return {name.decode() for name in found}  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [*SUBMITTING, DEPLOY / "databricks" / "databricks.yml"], ids=lambda path: path.name)
def test_every_setting_is_one_of_spark(path: Path, known: set[str]) -> None:
    """A misspelt setting is no error to Spark: it would have been passed over."""
    text = path.read_text(encoding="utf-8")
    written = set(re.findall(r"(?<![\w.-])spark\.(?!apache|resource)[a-z][\w.]*\w(?=[\"`: =])", text))
    assert len(written) >= 3
    unknown = written - known - set(DELTA_SETTINGS)  # which name themselves to Spark's catalogues
    assert sorted(name for name in unknown if not COMPOSED.fullmatch(name) and not name.startswith(PREFIXES)) == []


@pytest.mark.parametrize("path", SUBMITTING, ids=lambda path: path.name)
def test_delta_and_gpus_are_set_where_the_platform_does_not(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, value in DELTA_SETTINGS.items():
        assert re.search(rf"{re.escape(name)}\W+{re.escape(value)}", text), name
    for name in ("spark.executor.resource.gpu.amount", "spark.task.resource.gpu.amount"):
        assert re.search(rf"{re.escape(name)}\W+1\b", text), name
    assert "spark.executor.resource.gpu.discoveryScript" in text
    assert "discover-gpus.sh" in text


def test_the_page_names_the_delta_that_is_tested() -> None:
    named = set(re.findall(r"io\.delta:[\w.:-]+\d", (DEPLOY / "spark-submit.md").read_text(encoding="utf-8")))
    assert named == {DELTA_PACKAGE}


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("plan.yaml")), ids=lambda path: path.parent.name)
def test_every_plan_is_one(path: Path) -> None:
    plan = Plan.parse(path.read_text(encoding="utf-8"), find_method, check_files=False)
    assert plan.execution.device == "gpu"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?i)(?:password|token|secret|api_?key)\s*[:=]\s*[\"']?[A-Za-z0-9+/_-]{8,}", text) == []
    assert re.findall(r"://[^/\s:@\"]+:[^/\s@\"]+@", text) == []
