"""The Dockerfile against hadolint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)


def test_the_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    dockerfile = REPOSITORY / "deploy" / "docker" / "Dockerfile"
    done = lint(dockerfile)
    assert (done.returncode, done.stdout) == (0, "")
    broken = tmp_path / "Dockerfile"
    broken.write_text(dockerfile.read_text(encoding="utf-8").replace("--no-install-recommends", ""), encoding="utf-8")
    assert "DL3015" in lint(broken).stdout
