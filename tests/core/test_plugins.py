"""Methods of other packages: the example of the documentation, installed by pip; and plug-ins that are broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import lexplain
from core.models import TEXTS, Shelf
from core.test_engine import only
from lexplain import methods
from lexplain.classifier import Classifier
from lexplain.engine import Explainer
from lexplain.errors import MethodError, PlanError
from lexplain.methods import METHODS, find_method, list_refused
from lexplain.plan import Plan

PAGE = Path(__file__).parents[2] / "docs" / "plugin-methods.md"
SETTINGS = {"max_tokens": 40, "overlap": 6, "max_windows": None, "merge": "sum", "budget_tokens": 600}

PLAN = """
name: leave-one-in
corpus: {path: documents.csv, columns: {labels: label}}
models: {uris: [models:/m/1], corpus: unseen}
sink: {path: tables}
method: {id: leave_one_in, options: {share: 7}}
"""


def write_example(folder: Path) -> Path:
    """The package of the page, each file from its block."""
    folder.mkdir()
    blocks = re.findall(
        r"^```\w+\n# (\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert [name for name, _ in blocks] == ["pyproject.toml", "leave_one_in.py"]
    for name, text in blocks:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def install_example(folder: Path, target: Path) -> Path:
    """Install the package into a folder, as pip does, without a network."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(write_example(folder))], check=True, timeout=300
    )
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    return install_example(folder / "leave-one-in", folder / "site")


def lay_package(site: Path, name: str, code: str) -> None:
    """A module and its metadata, as an installed package is; the entry point has the module's name."""
    metadata = site / f"{name}-3.1.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{name}.py").write_text(code, encoding="utf-8")
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.1\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[lexplain.methods]\n{name} = {name}\n", encoding="utf-8")


def run(
    installed: Path, *arguments: str, cwd: Path | None = None, more: Path | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), str(Path(lexplain.__file__).parents[1]), *([str(more)] if more else [])])
    return subprocess.run(
        [sys.executable, "-m", "lexplain", *arguments], capture_output=True, text=True, check=False, timeout=300, cwd=cwd,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


# --- the example --------------------------------------------------------------------------------------------------


def test_the_example_is_listed_with_its_package(installed: Path) -> None:
    done = run(installed, "methods")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("leave_one_in.v1\t")]
    assert line.split("\t") == ["leave_one_in.v1", "Nobody 2026", "130", "signed", "any", "", "leave-one-in 0.1.0"]
    shown = run(installed, "methods", "leave_one_in").stdout
    assert "what the target logit gains when one word is put into the baseline" in shown
    assert re.search(r"^  share +1\.0; a number; 0\.01 to 1$", shown, flags=re.MULTILINE)


def test_a_broken_plugin_is_told_beside_the_list(installed: Path, tmp_path: Path) -> None:
    lay_package(tmp_path, "plugged", "raise OSError('[red] no disk')")
    done = run(installed, "methods", more=tmp_path)
    assert done.returncode == 0
    assert {"leave_one_in.v1", "occlusion.v1"} <= {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert done.stderr == (
        "The plug-in 'plugged' of the package plugged 3.1 is refused: OSError: [red] no disk. Write another method, or "
        "mend that package.\n"
    )


def test_the_example_explains_a_text(installed: Path, shelf: Shelf) -> None:
    done = run(
        installed, "explain", TEXTS[0], "--model", str(shelf.folder("bert")), "--methods", "leave_one_in,occlusion"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^(\w+\.v1)  \w+  probability 0\.\d+$", done.stdout, flags=re.MULTILINE) == [
        "leave_one_in.v1", "occlusion.v1",
    ]  # fmt: skip


def test_the_examples_options_are_checked_with_the_plan(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    (tmp_path / "documents.csv").touch()
    done = run(installed, "plan", "check", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "method.options.share=7 must be between 0.01 and 1." in done.stderr


# --- in this process ----------------------------------------------------------------------------------------------


@pytest.fixture
def scratch() -> Iterator[None]:
    """Forget the plug-ins that a test installs."""
    registered, plugins, modules = dict(METHODS), dict(methods._plugins), set(sys.modules)
    yield
    for kept, now in ((registered, methods._registered), (plugins, methods._plugins)):
        now.clear()
        now.update(kept)  # type: ignore[arg-type]
    for name in set(sys.modules) - modules:
        if name.startswith("plugged"):
            del sys.modules[name]


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch: None) -> Install:
    """Lay a package on the path of this process."""

    def lay(name: str, code: str) -> None:
        lay_package(tmp_path / name, name, code)
        monkeypatch.syspath_prepend(str(tmp_path / name))

    return lay


def code(name: str, version: int = 1) -> str:
    return (
        "from lexplain.methods import Attribution, Evaluate, Inputs, method\n"
        f"@method(version={version}, cite='none')\n"
        f"def {name}(evaluate: Evaluate, inputs: Inputs, *, size: int = 1) -> Attribution:\n"
        "    raise NotImplementedError\n"
    )


def test_a_plugin_is_found_when_it_comes(install: Install) -> None:
    """In a notebook a package is installed while the session runs."""
    with pytest.raises(MethodError, match="is no known method"):
        find_method("plugged")
    install("plugged", code("plugged"))
    found = find_method("plugged")
    assert (found.id, found.package) == ("plugged.v1", "plugged 3.1")
    assert methods.METHODS["plugged.v1"].id == "plugged.v1"
    assert list_refused() == []


def test_a_broken_plugin_leaves_the_others_and_says_what_is_wrong(install: Install) -> None:
    install("plugged_a", code("plugged_a") + "import no_such_module\n")
    install("plugged_b", code("plugged_b"))
    assert find_method("plugged_b").id == "plugged_b.v1"
    with pytest.raises(
        MethodError, match=r"plugged_a 3\.1 is refused: ModuleNotFoundError: No module named 'no_such_module'"
    ):
        find_method("plugged_a.v1")
    assert "plugged_a.v1" not in methods.METHODS
    (reason,) = list_refused()
    with pytest.raises(
        PlanError, match=r"method\.id='plugged_a' cannot be had\. The plug-in .*no_such_module.*\. Write another"
    ):
        Plan.parse(PLAN.replace("leave_one_in, options: {share: 7}", "plugged_a"), find_method)
    assert find_method("occlusion").package is None
    assert "plugged_a" in reason


@pytest.mark.parametrize(
    ("version", "said"), [(1, "must be registered once"), (9, "has the name of a method of lexplain")]
)
def test_a_plugin_takes_no_name_of_ours(install: Install, version: int, said: str) -> None:
    before = find_method("occlusion")
    install("plugged", code("plugged") + code("occlusion", version))
    assert find_method("occlusion") is before
    with pytest.raises(MethodError, match=rf"package plugged 3\.1 is refused: MethodError: .*{said}"):
        find_method("plugged")
    assert find_method("occlusion") is before
    assert {name for name in methods.METHODS if name.startswith(("plugged", "occlusion"))} == {"occlusion.v1"}


def test_packages_that_a_method_needs_are_missed_when_it_is_looked_up(scratch: None) -> None:
    @methods.method(version=1, cite="none", name="needy.one", requires=("torch", "no-such-package"))
    def needy(evaluate: methods.Evaluate, inputs: methods.Inputs) -> methods.Attribution:
        raise NotImplementedError

    assert methods.METHODS["needy.one.v1"].name == "needy.one"
    with pytest.raises(MethodError, match=r"'needy\.one' needs no-such-package, .* Write pip install no-such-package,"):
        find_method("needy.one")
    with pytest.raises(PlanError, match=r"method\.id='needy\.one' needs no-such-package, not installed here\. No task"):
        Plan.parse(PLAN.replace("leave_one_in, options: {share: 7}", "needy.one"), find_method)


def test_the_examples_scores_are_what_it_says(
    installed: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, scratch: None
) -> None:
    """With all of a one-word text left in, its score is F(x) - F(baseline)."""
    monkeypatch.syspath_prepend(str(installed))
    classifier: Classifier = shelf.classifier("bert")
    explainer = Explainer(classifier, find_method("leave_one_in"), {}, **SETTINGS)
    found = only(explainer.explain(["phone"])[0])
    assert found.words[0][1] == pytest.approx(found.target_score - found.baseline_score, abs=1e-5)
    together = [only(one) for one in explainer.explain(list(TEXTS))]
    for text, outcome in zip(TEXTS, together, strict=True):
        alone = only(
            Explainer(classifier, find_method("leave_one_in"), {}, **SETTINGS | {"budget_tokens": 1}).explain([text])[0]
        )
        np.testing.assert_allclose(
            [score for _, score in outcome.words], [score for _, score in alone.words], atol=1e-5
        )


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("*, share: float", r"option 'share' of plugged\.v1 must have a default"),
        ("*, share=0.5", r"option 'share' of plugged\.v1 must have a default, and a type"),
        ("*, share: list[str] = []", r"option 'share' of plugged\.v1 must have a default, and a type"),
    ],
)
def test_options_that_no_plan_can_write_are_refused(install: Install, signature: str, said: str) -> None:
    install("plugged", code("plugged").replace("*, size: int = 1", signature))
    with pytest.raises(MethodError, match=said):
        find_method("plugged")


@pytest.mark.parametrize(
    ("decorated", "said"),
    [
        ("cost=lambda options, tokens: options['nope']", "KeyError: 'nope'"),
        ("prepares=lambda options: 'neighbours'", "has `prepares`, which serves lexplain's own methods alone"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(install: Install, decorated: str, said: str) -> None:
    install("plugged", code("plugged").replace("cite='none'", f"cite='none', {decorated}"))
    with pytest.raises(MethodError, match=re.escape(said)):
        find_method("plugged")


def test_a_broken_plugin_of_another_name_is_told_as_well(install: Install) -> None:
    install("plugged", "import no_such_module\n")
    with pytest.raises(MethodError, match=r"'leave_one_in' is no known method.*No module named 'no_such_module'"):
        find_method("leave_one_in")
