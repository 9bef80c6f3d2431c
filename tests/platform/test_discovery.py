"""The discovery script with an nvidia-smi that says what real ones say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "discover-gpus.sh"

TWO = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-2d1c4b5a-0000-1111-2222-333344445555)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-9f8e7d6c-0000-1111-2222-333344445555)
"""
CUT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-2d1c4b5a-0000-1111-2222-333344445555)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaa1111-0000-5555-8888-000000000001)
  MIG 2g.10gb     Device  1: (UUID: MIG-bbbb2222-0000-5555-8888-000000000002)
"""


def discover(folder: Path, listed: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    (folder / "listed.txt").write_text(listed)
    nvidia_smi = folder / "nvidia-smi"
    nvidia_smi.write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat "{folder}/listed.txt"\nexit {code}\n')
    nvidia_smi.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([str(SCRIPT)], env={"PATH": path}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("listed", "addresses"),
    [
        (TWO, ["0", "1"]),
        (TWO.splitlines()[0] + "\n", ["0"]),
        (CUT, ["MIG-aaaa1111-0000-5555-8888-000000000001", "MIG-bbbb2222-0000-5555-8888-000000000002"]),
    ],
)
def test_it_prints_what_spark_reads(tmp_path: Path, listed: str, addresses: list[str]) -> None:
    """Spark reads one JSON object of exactly these keys; the names are those that `choose_device` takes."""
    done = discover(tmp_path, listed)
    assert json.loads(done.stdout) == {"name": "gpu", "addresses": addresses}
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_gpu_it_fails_and_says_why(tmp_path: Path) -> None:
    done = discover(tmp_path, "No devices found.\n")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "No devices found." in done.stderr


def test_a_driver_that_does_not_answer_fails_it(tmp_path: Path) -> None:
    done = discover(tmp_path, TWO, code=9)
    assert done.returncode != 0
    assert done.stdout == ""
