"""On what a benchmark ran."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def read_load() -> float:
    """Return the mean number of processes that wanted a core in the last minute; more than the cores, and all waited."""
    return os.getloadavg()[0]


def read_cpu_seconds(process: int) -> float:
    """Return the seconds that a process has had a core, all of its threads together: what others do hardly counts."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe_machine(arguments: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """Return machine, versions, commit and settings."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = {line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")}
    return {
        "machine": {"cores": os.cpu_count(), "cpu": ", ".join(sorted(names)), "memory_bytes": _count_memory()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": _ask_git("rev-parse", "HEAD") + (" with changes" if _ask_git("status", "--porcelain") else ""),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
    }


def _count_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _ask_git(*words: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
