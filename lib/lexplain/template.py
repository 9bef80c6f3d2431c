"""The plan that a newcomer starts from."""

from __future__ import annotations

import yaml

from lexplain.plan import Plan
from lexplain.settings import write_commented

_TEMPLATE = """\
# A plan of lexplain. Run it with: lexplain run PLAN.yaml
name: my-classes
corpus:                       # documents to explain
  path: documents.csv         # .csv .tsv .jsonl .parquet, a Delta folder; or table: catalog.schema.table
  columns: {text: text, labels: label}
training:                     # labelled documents to fine-tune on; here the same file
  path: documents.csv
  columns: {text: text, labels: label}
models: {base: ./my-model, splits: 5}   # a Hugging Face folder or MLflow URI
sink: {path: ./lexplain-tables}
"""


def write_template(full: bool = False) -> str:
    """Return a commented plan to start from: the ten lines that suffice, or with `full` every key."""
    if not full:
        return _TEMPLATE
    says = "# Every key of a plan of lexplain. What stands behind a '#' is its default: uncomment what you change."
    return "\n".join([says, *write_commented(Plan, yaml.safe_load(_TEMPLATE))]) + "\n"
