"""The HTML report of a run as a job of its own: spark-submit jobs/report.py PLAN.yaml --out report.html."""

from __future__ import annotations

import sys

from lexplain.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
