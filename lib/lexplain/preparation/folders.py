"""Where prepared files lie. Driver only."""

from __future__ import annotations

from pathlib import Path

from lexplain.plan import Plan
from lexplain.tables import Tables

PREPARED = "prepared"
"""Its name, beside the models or in the sink."""


def prepared_folder(tables: Tables, plan: Plan) -> Path | None:
    """Return the folder of what is prepared, which driver and executors mount; None where the sink has none.

    Args:
        tables: The sink, wherever it was opened: it may have been moved since the plan was written.
        plan: Names the folder of the models, if they have one.
    """
    parent = tables.folder if plan.models.folder is None else Path(plan.models.folder)
    return None if parent is None else parent / PREPARED
