"""lexplain: which words make a text classifier see a text as each class, as a Spark job.

Public names are resolved when first used: `import lexplain` loads neither torch nor pyspark nor MLflow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexplain.classifier import Classifier
    from lexplain.engine import Explainer
    from lexplain.errors import ExplainError, PlanError
    from lexplain.explanation import Explanation, Rejection
    from lexplain.methods import find_method
    from lexplain.pipeline import Run, open_run
    from lexplain.plan import Plan
    from lexplain.session import open_session
    from lexplain.tables import Tables

_HOMES = {
    "Classifier": "lexplain.classifier",
    "ExplainError": "lexplain.errors",
    "Explainer": "lexplain.engine",
    "Explanation": "lexplain.explanation",
    "Plan": "lexplain.plan",
    "PlanError": "lexplain.errors",
    "Rejection": "lexplain.explanation",
    "Run": "lexplain.pipeline",
    "Tables": "lexplain.tables",
    "find_method": "lexplain.methods",
    "open_run": "lexplain.pipeline",
    "open_session": "lexplain.session",
}

__all__ = [
    "Classifier",
    "ExplainError",
    "Explainer",
    "Explanation",
    "Plan",
    "PlanError",
    "Rejection",
    "Run",
    "Tables",
    "find_method",
    "open_run",
    "open_session",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lexplain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
