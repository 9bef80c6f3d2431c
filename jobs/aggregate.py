"""The stage `aggregate` of a plan as a job of its own: spark-submit jobs/aggregate.py PLAN.yaml."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["aggregate", *sys.argv[1:]])
