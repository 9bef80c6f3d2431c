"""The stage `attribute` of a plan as a job of its own: spark-submit jobs/attribute.py PLAN.yaml."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["attribute", *sys.argv[1:]])
