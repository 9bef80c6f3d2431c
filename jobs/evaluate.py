"""Methods compared on a plan as a job of its own: spark-submit jobs/evaluate.py PLAN.yaml --methods lrp,lafa."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
