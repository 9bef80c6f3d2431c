"""Paths of DIG and UDIG through the vocabularies of the models, kept in the table `dig_paths`.

Driver only, apart from the closures that it sends to the executors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from lexplain.anchors import Anchors
from lexplain.attribution import ExplainedModel, Progress, as_tasks, make_task, select_owed
from lexplain.corpus import Staged
from lexplain.devices import map_on_devices
from lexplain.executor import ExplainTask
from lexplain.keys import path_key
from lexplain.methods.discretized import make_rule
from lexplain.plan import FindMethod, Plan
from lexplain.preparation.folders import prepared_folder
from lexplain.sampling import PATHS_DDL, TOKENS_DDL, VOCABULARIES_DDL, path_batches, token_batches, vocabulary_batches
from lexplain.session import count_slots
from lexplain.tables import Tables, quote_text

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Below so many tokens a task costs more than it saves: tasks search many words of their paths twice.
_TASK_TOKENS = 256
# Documents of which a task lists the tokens.
_TASK_DOCUMENTS = 2048


def prepare_anchors(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel], corpus: Staged,
    training: Staged | None, progress: Progress,
) -> list[ExplainedModel]:  # fmt: skip
    """Return the models with the paths of the tokens that they are about to explain, in a file that executors read.

    The tokens of the chunks that are not explained yet are listed; those whose paths the table lacks are searched, and
    committed once for all models with the same word embeddings. What no table holds, as a text seen later, is searched
    where it is needed, with the same result: a sink that is no folder, so that no file could be shared, has no table.

    Args:
        tables: The sink.
        plan: Method, windows and device.
        find_method: Registry lookup.
        models: Models to explain.
        corpus: What they explain.
        training: What they were trained on; None where the models were brought.
        progress: Told of the vocabularies.

    Raises:
        MethodError: Executors cannot read what was prepared.

    Note:
        Cost: on executors each model is opened once, each text is tokenised once more for each vocabulary, and each
        new token's path is searched, see `lexplain.anchors.AnchorFinder.find`.
    """
    folder = prepared_folder(tables, plan)
    if folder is None:
        logging.getLogger(__name__).warning(
            "sink.schema has no folder that executors read: each of them searches the paths of its own tokens"
        )
        return list(models)
    task = make_task(tables.spark, plan, find_method, as_tasks(models))
    groups = _group_models(tables, plan, find_method, models, task)
    progress.start("search paths", len(groups), "vocabularies")
    paths: dict[int, str] = {}
    searched = 0
    for (key, baseline_id), members in groups.items():
        task = replace(task, models=tuple(as_tasks(members[:1])))
        tokens = _list_tokens(tables, plan, members, corpus, training, task)
        searched += _search(tables, plan, key, tokens, task)
        table = _read_table(tables, plan, find_method, key, baseline_id)
        if table is not None:
            paths |= dict.fromkeys((model.split for model in members), str(table.save(folder)))
        progress.advance(1)
    progress.finish(f"{searched} tokens searched now")
    return [replace(model, prepared=paths.get(model.split)) for model in models]


def _group_models(
    tables: Tables, plan: Plan, find_method: FindMethod, models: Sequence[ExplainedModel], task: ExplainTask
) -> dict[tuple[str, int], list[ExplainedModel]]:
    """Return the models by key of their paths and baseline token, in order."""
    spark = tables.spark
    numbers = spark.range(len(models), numPartitions=min(len(models), count_slots(spark, plan.execution.device)))
    describing = partial(vocabulary_batches, task=task)
    rows = map_on_devices(numbers, describing, VOCABULARIES_DDL, plan.execution.device).collect()
    known = {row["split"]: row for row in rows}
    groups: dict[tuple[str, int], list[ExplainedModel]] = {}
    for model in models:
        row = known[model.split]
        key = path_key(plan, find_method, row["embeddings"], row["baseline_id"])
        groups.setdefault((key, row["baseline_id"]), []).append(model)
    return groups


def _list_tokens(
    tables: Tables, plan: Plan, models: Sequence[ExplainedModel], corpus: Staged, training: Staged | None, task: ExplainTask
) -> DataFrame:  # fmt: skip
    """Return the distinct tokens of all documents in chunks that some of the models have not explained."""
    where = corpus.where_explained([model.explain_key for model in models])
    pending = tables.spark.sql(
        "SELECT DISTINCT c.increment, c.bucket"
        f" FROM (SELECT * FROM {tables.name('chunks')} WHERE {where} AND n_documents > 0) c LEFT ANTI JOIN"
        f" (SELECT DISTINCT explain_key, increment, bucket FROM {tables.name('explanations')} WHERE {where}) e"
        " ON c.explain_key = e.explain_key AND c.increment = e.increment AND c.bucket = e.bucket"
    )
    documents = select_owed(tables, plan, models, corpus, training, corpus.where)
    documents = documents.where("size(splits) > 0 AND defect IS NULL").join(
        pending, ["increment", "bucket"], "left_semi"
    )
    documents = documents.selectExpr("text", "text_digest", "defect", f"array({task.models[0].split}) AS splits")
    tasks = max(
        1, min(ceil(corpus.n_documents / _TASK_DOCUMENTS), 16 * count_slots(tables.spark, plan.execution.device))
    )
    documents = documents.repartition(tasks, "text_digest").dropDuplicates(["text_digest"])
    return map_on_devices(documents, partial(token_batches, task=task), TOKENS_DDL, plan.execution.device).distinct()


def _search(tables: Tables, plan: Plan, key: str, tokens: DataFrame, task: ExplainTask) -> int:
    """Commit the paths of tokens that the table lacks; return how many there were."""
    from pyspark import StorageLevel

    spark = tables.spark
    there = tables.read("dig_paths").where(f"path_key = {quote_text(key)}").select("token_id")
    missing = sorted(row["token_id"] for row in tokens.join(there, "token_id", "left_anti").collect())
    if not missing:
        return 0
    tasks = max(1, min(ceil(len(missing) / _TASK_TOKENS), count_slots(spark, plan.execution.device)))
    wanted = spark.createDataFrame([(token,) for token in missing], TOKENS_DDL).repartition(tasks, "token_id")
    found = map_on_devices(wanted, partial(path_batches, task=task), PATHS_DDL, plan.execution.device)
    found = found.selectExpr(f"{quote_text(key)} AS path_key", "token_id", "anchors")
    # Kept until they are committed: a commit that is tried again must not search again.
    found = found.persist(StorageLevel.DISK_ONLY)
    try:
        same = f"present.path_key = {quote_text(key)} AND present.token_id = added.token_id"
        tables.add_first(found, "dig_paths", unless=same)
    finally:
        found.unpersist()
    return len(missing)


def _read_table(tables: Tables, plan: Plan, find_method: FindMethod, key: str, baseline_id: int) -> Anchors | None:
    """Return all paths of a key; None where there are none."""
    method = find_method(plan.method.id)
    rule = make_rule(method.id, method.complete_options(plan.method.asked), baseline_id)
    rows = tables.read("dig_paths").where(f"path_key = {quote_text(key)}").orderBy("token_id")
    read = rows.select("token_id", "anchors").toArrow()
    if not read.num_rows:
        return None
    anchors = read["anchors"].combine_chunks().flatten().to_numpy().reshape(-1, rule.steps)
    return Anchors(rule, read["token_id"].to_numpy().astype(np.int32), anchors.astype(np.int32))
