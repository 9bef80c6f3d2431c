"""All stages of a plan as one job: spark-submit jobs/run.py PLAN.yaml."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
