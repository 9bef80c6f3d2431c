"""By which methods the models of a run explained documents: the plan's own, and those of its evaluations. Driver only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lexplain.errors import PlanError, TableError
from lexplain.keys import evaluation_prefix
from lexplain.plan import FindMethod, Plan
from lexplain.report.contents import Method
from lexplain.tables import quote_text
from lexplain.training import read_model

if TYPE_CHECKING:
    from lexplain.tables import Tables


@dataclass(frozen=True)
class Contestant:
    """A method and the keys of the explanations that it made of the run's models.

    Attributes:
        method: Title and sign.
        explain_keys: One a split.
    """

    method: Method
    explain_keys: Sequence[str]


def read_plan(run: Mapping[str, Any], find_method: FindMethod) -> Plan:
    """Return the plan as a run recorded it.

    Raises:
        TableError: It is of a lexplain whose plans have other keys.
    """
    try:
        return Plan.parse(run["plan"], find_method, check_files=False)
    except PlanError as error:
        raise TableError(
            f"run_id={run['run_id']!r} was made from a plan that this lexplain cannot read: {error}. Methods and models would "
            "have been guessed. Run the plan again: lexplain run PLAN.yaml."
        ) from error


def find_models(tables: Tables, run: Mapping[str, Any], plan: Plan, find_method: FindMethod) -> list[dict[str, Any]]:
    """Return the rows of `models` that the run's explanations are of, by split."""
    rows = [row.asDict(recursive=True) for row in tables.read("models").orderBy("split").collect()]
    keys = set(run["explain_keys"])
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = read_model(plan, find_method, row).explain_key
        if key in keys:  # one content may lie in two folders, with a row each
            found.setdefault(key, row)
    return list(found.values())


def list_contestants(
    tables: Tables, plan: Plan, models: Sequence[Mapping[str, Any]], find_method: FindMethod
) -> list[Contestant]:
    """Return the plan's own method, and those that its evaluations explained documents of the same models with.

    Args:
        tables: Reads `runs`.
        plan: As `read_plan` returns it.
        models: As `find_models` returns them.
        find_method: Registry lookup.
    """
    rows = (
        tables.read("runs")
        .where(f"plan IS NOT NULL AND startswith(name, {quote_text(evaluation_prefix(plan.name))})")
        .orderBy("started_at", ascending=False)
        .select("plan")
        .collect()
    )
    others = []
    for row in rows:
        try:
            others.append(Plan.parse(row["plan"], find_method, check_files=False))
        except PlanError:  # of an older lexplain: what it explained cannot be told apart
            continue
    found: dict[str, Contestant] = {}
    for one in [plan, *others]:
        method = find_method(one.method.id)
        name = method.id.rpartition(".v")[0]
        title = f"{name}:{one.method.preset}" if one.method.preset else name
        # A key knows model, method and options: what an evaluation made of other models has none of these.
        keys = [read_model(one, find_method, row).explain_key for row in models]
        if title not in found and all(keys != known.explain_keys for known in found.values()):
            found[title] = Contestant(Method(title, method.is_signed(one.method.asked), own=one is plan), keys)
    return list(found.values())
