"""Shared by all tests: one torch thread, so that suites side by side do not fight for the cores; no deadlines; models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from core.models import Shelf

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A property holds however busy the machine is; and CI tries the same examples each time, so that a failure is of the change.
# HYPOTHESIS_PROFILE=search looks further, at other examples each time: for a night.
settings.register_profile("lexplain", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "lexplain"))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Tiny classifiers, made when they are asked for. Who changes a folder copies it first."""
    from core.models import Shelf  # loads torch and transformers, which few of the Spark tests need

    return Shelf(tmp_path_factory.mktemp("classifiers"))
