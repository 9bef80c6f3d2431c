"""Settings of the keyword rules side by side, from one set of explanations: no model is run. Driver only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING

from lexplain.errors import PlanError, Problem
from lexplain.keys import digest
from lexplain.keyword_quality import measure_quality
from lexplain.pipeline import open_run
from lexplain.schema import TABLES
from lexplain.tables import quote_text

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from lexplain.attribution import Progress
    from lexplain.keyword_quality import QualityFigure
    from lexplain.plan import FindMethod, Plan

METRICS = (
    "coverage", "coverage_micro", "cross_coverage", "coverage_distinctiveness", "keyword_distinctiveness",
    "halves_of_documents", "halves_of_splits",
)  # fmt: skip
"""Of `lexplain.keyword_quality`, means over classes, that a setting is told by."""


@dataclass(frozen=True)
class Setting:
    """What the keyword lists of one setting of the rules are worth.

    Attributes:
        rank: 1 for the largest product of coverage and coverage_micro, by which the published settings were chosen.
        top_n: `keywords.top_n`.
        theta: `keywords.theta`.
        probability: `keywords.probability`.
        keyword_key: Its lists, in `keywords`.
        n_classes: Classes that have a keyword.
        metrics: By name, see `METRICS`; a figure that there is not is left out.
    """

    rank: int
    top_n: int
    theta: float
    probability: float
    keyword_key: str
    n_classes: int
    metrics: dict[str, float]

    @property
    def score(self) -> float:
        """Product of coverage and coverage_micro; 0 without them."""
        return self.metrics.get("coverage", 0.0) * self.metrics.get("coverage_micro", 0.0)


def list_settings(
    plan: Plan, top_n: Sequence[int], theta: Sequence[float], probability: Sequence[float], find_method: FindMethod
) -> list[Plan]:
    """Return the plan with every combination of the values; where a list is empty, with its own value.

    Raises:
        PlanError: Some combinations break the plan's rules; all of them at once.
    """
    rules = plan.keywords
    found: list[Plan] = []
    problems: list[Problem] = []
    values = product(top_n or [rules.top_n], theta or [rules.theta], probability or [rules.probability])
    for one, other, third in dict.fromkeys(values):
        mine = replace(plan, keywords=replace(rules, top_n=one, theta=other, probability=third))
        try:
            found.append(type(plan).parse(mine.to_yaml(), find_method))
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError("sweep", list(dict.fromkeys(problems)))
    return found


def sweep(
    spark: SparkSession, plan: Plan, settings: Sequence[Plan], find_method: FindMethod, progress: Progress
) -> list[Setting]:
    """Make the keyword lists of each setting and rank the settings by what the lists cover; written to `sweeps`.

    Args:
        spark: The session.
        plan: Its corpus is explained.
        settings: As `list_settings` returns them.
        find_method: Registry lookup.
        progress: Told of each setting.

    Returns:
        The settings, the best first.

    Raises:
        AccountingError: Attribution is not finished.
        ModelError: The models are regressions.

    Note:
        Runs on: Spark. Cost: for each pair of top_n and probability one pass over the explanations, for each setting one over
        the sums and the staged words. Lists that are there are not made again: choosing a setting later costs nothing.
        Source: Rönnqvist et al. 2022, whose code sorts its grid by macro x micro coverage.
    """
    found: list[Setting] = []
    with open_run(spark, plan, find_method, progress) as run:
        run.check_classes()
        for mine in settings:
            keyword_key = replace(run, plan=mine).rank_words()
            figures = measure_quality(run.tables, mine, run.corpus, run.explain_keys, keyword_key)
            found.append(_describe(mine, keyword_key, figures))
        ranked = [
            replace(setting, rank=place)
            for place, setting in enumerate(sorted(found, key=lambda setting: -setting.score), start=1)
        ]
        same = {
            "sweep_key": digest("sweep", plan.name, sorted(setting.keyword_key for setting in ranked)),
            "name": plan.name, "measured_at": datetime.now(UTC),
        }  # fmt: skip
        rows = [same | vars(setting) for setting in ranked]
        frame = run.tables.spark.createDataFrame(rows, TABLES["sweeps"].schema)
        run.tables.replace(frame, "sweeps", where=f"sweep_key = {quote_text(str(same['sweep_key']))}")
        run.finish("finished")
    return ranked


def _describe(plan: Plan, keyword_key: str, figures: Sequence[QualityFigure]) -> Setting:
    subset = "TP" if any(each.subset == "TP" for each in figures) else "P"
    means = {each.metric: each.value for each in figures if each.label is None and each.subset in (None, subset)}
    metrics = {metric: means[metric] for metric in METRICS if metric in means}
    classes = {each.label for each in figures if each.metric == "keyword_distinctiveness" and each.label is not None}
    rules = plan.keywords
    return Setting(0, rules.top_n, rules.theta, rules.probability, keyword_key, len(classes), metrics)
