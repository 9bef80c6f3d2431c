"""Shared by all tests: one torch thread, so that suites side by side do not fight for the cores; no deadlines."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A property holds however busy the machine is.
settings.register_profile("lexplain", deadline=None)
settings.load_profile("lexplain")
