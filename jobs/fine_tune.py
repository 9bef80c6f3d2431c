"""The stage `fine-tune` of a plan as a job of its own: spark-submit jobs/fine_tune.py PLAN.yaml."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["fine-tune", *sys.argv[1:]])
