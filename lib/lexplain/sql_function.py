"""The SQL function `explain(text)`: the kernel of the attribution stage for anyone who can write a query.

Driver only, apart from the closure that it sends to the executors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from lexplain.attribution import make_task
from lexplain.devices import task_device
from lexplain.executor import ModelTask, explain_texts, word_rows
from lexplain.plan import FindMethod, Plan
from lexplain.session import is_local

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

EXPLAIN_TYPE = (
    "STRUCT<status: STRING, reason: STRING, explanations: ARRAY<STRUCT<label: STRING, probability: DOUBLE, "
    "target_score: DOUBLE, baseline_score: DOUBLE, completeness_gap: DOUBLE, "
    "words: ARRAY<STRUCT<word: STRING, start: INT, end: INT, score: DOUBLE>>>>>"
)


def register_explain(
    spark: SparkSession, plan: Plan, find_method: FindMethod, model: ModelTask, *, name: str = "explain"
) -> None:
    """Register the SQL function `explain(text)`: the attribution stage's kernel as an iterator pandas UDF.

    Whatever the plan's accuracy, each explanation is made at document accuracy: it is made to be read. It takes a string or
    binary column and returns `EXPLAIN_TYPE`: status, reason, and for each predicted label the
    words with their scores. Device, model cache, batching and rejection rules are the stage's own.

    Args:
        spark: The session to register in.
        plan: Method, options, windows and words.
        find_method: Registry lookup.
        model: Which model explains.
        name: Name of the function.
    """
    import pandas as pd
    from pyspark.sql.pandas.functions import pandas_udf

    local = is_local(spark)
    plan = dataclasses.replace(plan, method=dataclasses.replace(plan.method, accuracy="document"))
    task = make_task(spark, plan, find_method, [model])
    requested = plan.execution.device

    def explain(batches: Iterator[pd.Series[Any]]) -> Iterator[pd.DataFrame]:
        device = task_device(requested, local)
        for texts in batches:
            outcomes = explain_texts(list(texts), task, model, device)
            yield pd.DataFrame([_outcome_row(outcome) for outcome in outcomes])

    # Spark tells the kind of UDF by its type hints, and cannot read postponed ones.
    explain.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.DataFrame]}
    spark.udf.register(name, cast(Any, pandas_udf)(explain, EXPLAIN_TYPE))


def _outcome_row(outcome: Any) -> dict[str, Any]:
    if not isinstance(outcome, list):
        return {"status": "rejected", "reason": outcome.reason, "explanations": None}
    names = ("label", "probability", "target_score", "baseline_score", "completeness_gap")
    explanations = [
        {name: getattr(explanation, name) for name in names} | {"words": word_rows(explanation)}
        for explanation in outcome
    ]
    return {"status": "explained" if outcome else "no_label", "reason": None, "explanations": explanations}
