"""What `accuracy: keywords` costs a keyword list: nothing that could be told from other documents' lists.

A plan's corpus is explained twice with the same models, at document accuracy within a hundredth and at keyword
accuracy. Then the documents are halved at random, time and again: a list of one half at keyword accuracy is compared with
the converged list of the other half, beside what the converged list of the first half has in common with that. Lists are
made by the tests' own statistics in pandas, from the explanations in the tables.

    PYTHONPATH=tests .venv/bin/python -m bench.agreement lexplain-demo/plan.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyspark.sql import SparkSession

from bench.methods import run_job
from lexplain.methods import find_method
from lexplain.plan import Plan
from lexplain.session import open_session, stop_session
from lexplain.tables import quote_list
from pandas_oracle import Rules, make_keywords

CONVERGED = {"tolerance": 0.01, "max_nodes": 256}
PERSISTENCE = 0.95  # of rank-biased overlap


def explain(spark: SparkSession, plan: Plan, accuracy: str) -> tuple[pd.DataFrame, float]:
    """Run a plan at an accuracy; returns its explanations and (model, document) pairs a second."""
    options = CONVERGED if accuracy == "document" else {}
    method = dataclasses.replace(plan.method, id="integrated_gradients", options=options, accuracy=accuracy)
    run, _ = run_job(spark, dataclasses.replace(plan, name=f"{plan.name}-{accuracy}", method=method))
    keys = quote_list(run.record["explain_keys"])
    columns = (
        "split",
        "doc_id",
        "label",
        "status",
        "probability",
        "is_gold",
        "token_norm",
        "text_digest",
        "evaluations",
        "words",
    )
    rows = run.tables.read("explanations").where(f"status = 'explained' AND explain_key IN ({keys})").select(*columns)
    return rows.toArrow().to_pandas(), float(run.record["documents_per_second"] or np.nan)


def list_keywords(explanations: pd.DataFrame, digests: set[str], plan: Plan) -> dict[str, list[str]]:
    """Return the ranked keywords of each label from the documents of some digests."""
    rules = plan.keywords
    table = make_keywords(
        explanations[explanations.text_digest.isin(digests)], None, explanations.split.nunique(),
        Rules(
            true_positives=plan.evidence == "true_positives", probability=rules.probability, top_n=rules.top_n,
            published_words=False, theta=str(rules.theta), min_df=rules.min_df, max_classes=rules.max_classes,
            top=rules.top, labels=tuple(rules.labels), test_share_ratio=None,
        ),
    )  # fmt: skip
    kept = table[table.drop_reason.isna()].sort_values("rank")
    return {str(label): group.word.tolist() for label, group in kept.groupby("label")}


def overlap(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the rank-biased overlap of two lists down to the shorter one's end, extrapolated (Webber et al. 2010, eq. 32)."""
    depth = min(len(first), len(second))
    if not depth:
        return 0.0
    shared = np.array([len(set(first[:place]) & set(second[:place])) for place in range(1, depth + 1)])
    places = np.arange(1, depth + 1)
    decay = PERSISTENCE**places
    return float(shared[-1] / depth * decay[-1] + (1 - PERSISTENCE) / PERSISTENCE * (shared / places * decay).sum())


def compare(first: dict[str, list[str]], second: dict[str, list[str]]) -> float:
    """Return the mean overlap of the labels that either has a list for."""
    return float(
        np.mean([overlap(first.get(label, []), second.get(label, [])) for label in first.keys() | second.keys()])
    )


def measure(converged: pd.DataFrame, cheap: pd.DataFrame, plan: Plan, draws: int) -> dict[str, Any]:
    """Halve the documents time and again, and compare the lists."""
    digests = np.array(sorted(converged.text_digest.unique()))
    rows = []
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(digests))
        mine, others = (set(digests[part]) for part in np.array_split(order, 2))
        reference, right, found = (
            list_keywords(table, part, plan) for table, part in ((converged, others), (converged, mine), (cheap, mine))
        )
        rows.append(
            {
                "converged": compare(right, reference),
                "keywords": compare(found, reference),
                "same": compare(found, right),
            }
        )
        print(f"draw {draw + 1}: {json.dumps(rows[-1])}", flush=True)
    table = pd.DataFrame(rows)
    error = float(table.converged.std(ddof=1) / np.sqrt(draws))
    lost = float((table.converged - table.keywords).mean())
    return {
        "draws": draws, "documents": len(digests), "labels": int(converged.label.nunique()),
        "converged_across": float(table.converged.mean()), "standard_error": error,
        "keywords_across": float(table.keywords.mean()), "lost": lost, "within_one_standard_error": lost <= error,
        "same_documents": float(table.same.mean()), "evaluations_converged": float(converged.evaluations.mean()),
        "evaluations_keywords": float(cheap.evaluations.mean()),
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Explain, compare, write the JSON file and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="a plan; its method is replaced, its sink is written to")
    parser.add_argument("--draws", type=int, default=8, help="halvings of the documents (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("bench-agreement.json"), help="the figures, as JSON")
    arguments = parser.parse_args(words)
    plan = Plan.load(arguments.plan, find_method)
    spark = open_session("lexplain benchmark of keyword accuracy")
    try:
        converged, slow_rate = explain(spark, plan, "document")
        cheap, rate = explain(spark, plan, "keywords")
    finally:
        stop_session(spark)
    record = measure(converged, cheap, plan, arguments.draws)
    record |= {"pairs_a_second_converged": slow_rate, "pairs_a_second_keywords": rate}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
