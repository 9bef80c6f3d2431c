"""The upkeep of a sink as a job of its own: spark-submit jobs/maintain.py --tables PLACE."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["maintain", *sys.argv[1:]])
