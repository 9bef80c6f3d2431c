"""Fine-tunes the splits as Spark tasks, one a task; or takes the models that the user brought.

A killed run resumes: a model whose row is committed, or whose folder is complete, is not trained again.
Driver only, apart from the closure that it sends to the executors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexplain.attribution import ExplainedModel, Progress
from lexplain.corpus import Staged, is_trainable, list_labelled
from lexplain.devices import DeviceWork, map_on_devices
from lexplain.errors import CorpusError, ModelError, redact_uris
from lexplain.executor import decode_document
from lexplain.keys import digest, explain_key, model_key
from lexplain.model_store import ProblemType, digest_folder, fetch_model, read_outputs
from lexplain.plan import FindMethod, Plan
from lexplain.schema import TABLES
from lexplain.session import count_devices, is_local
from lexplain.splits import Split, draw_split
from lexplain.tables import Tables, quote_list, quote_text

if TYPE_CHECKING:
    import pyarrow as pa

    from lexplain.finetune import Recipe
    from lexplain.tracking import ModelLocation, RunTracker

_TRAINED = (
    "split INT, digest STRING, macro_f1 DOUBLE, micro_f1 DOUBLE, label_f1 MAP<STRING, DOUBLE>, "
    "n_train INT, n_test INT, seconds DOUBLE"
)


def model_folder(plan: Plan) -> str:
    """Return where fine-tuned models go: a path that executors reach."""
    return plan.models.folder or f"{plan.sink.path}/models"


def draw_splits(tables: Tables, plan: Plan, training: Staged) -> tuple[list[Split], list[str]]:
    """Draw every split of the plan over the labelled documents.

    Returns:
        The splits, and all labels in order.

    Raises:
        CorpusError: No document has a label, several labels stand where the plan says one, or no draw serves.
    """
    labelled = list_labelled(tables, training, plan.text.max_characters)
    several = sum(len(labels) > 1 for _, labels in labelled)
    if several and not plan.models.multi_label:
        raise CorpusError(
            f"models.multi_label=False, but {several} training documents have several labels. All but one label of "
            "each would have been lost. Write multi_label: true."
        )
    models = plan.models
    splits = [draw_split(models.seed, number, models.test_share, labelled) for number in range(models.splits)]
    return splits, sorted({label for _, labels in labelled for label in labels})


def find_models(
    tables: Tables, plan: Plan, find_method: FindMethod, base: ModelLocation, training: Staged
) -> list[ExplainedModel]:
    """Return the fine-tuned models of a plan; None is trained here.

    Raises:
        ModelError: Some are missing.
    """
    keys = [model_key(plan, base.digest, split, training.version) for split in range(plan.models.splits)]
    rows = tables.read("models").where(f"model_key IN ({quote_list(keys)})").collect()
    if len(rows) < len(keys):
        raise ModelError(
            f"models.splits={plan.models.splits}, but only {len(rows)} models are fine-tuned. Keywords would have come "
            "from fewer splits than the plan says. Run `lexplain fine-tune PLAN` first."
        )
    return [read_model(plan, find_method, row.asDict()) for row in sorted(rows, key=lambda row: int(row["split"]))]


def read_model(plan: Plan, find_method: FindMethod, row: Mapping[str, Any]) -> ExplainedModel:
    """Return the model of a row of `models`, with the key of what this plan makes of it."""
    drawn = None
    held_out: object = plan.models.corpus or row["split"]
    if row["seed"] is not None:
        drawn = Split(row["seed"], row["split"], row["draw"], row["test_share"])
        held_out = (row["seed"], row["split"], row["draw"], row["test_share"], row["training_snapshot"])
    key = explain_key(plan, find_method, row["digest"], held_out)
    return ExplainedModel(
        row["split"], key, row["folder"], row["digest"], tuple(row["labels"]), row["problem"], drawn
    )  # fmt: skip


def fine_tune_splits(
    tables: Tables, plan: Plan, base: ModelLocation, training: Staged, tracker: RunTracker | None, progress: Progress
) -> None:
    """Fine-tune one model a split and commit a row for each; those that are there already are left alone.

    Raises:
        CorpusError: The labels cannot be split or learnt.
        ModelError: The base model cannot be fine-tuned.
    """
    splits, label_names = draw_splits(tables, plan, training)
    keys = {split.number: model_key(plan, base.digest, split.number, training.version) for split in splits}
    ours = f"model_key IN ({quote_list(list(keys.values()))})"
    done = {row["model_key"] for row in tables.read("models").where(ours).select("model_key").collect()}
    pending = [split for split in splits if keys[split.number] not in done]
    progress.start("fine-tune", len(splits), "models", len(splits) - len(pending))
    # One machine trains one model at a time, on all of its cores; a cluster trains a model a task.
    wave = count_devices(tables.spark, plan.execution.device)
    for start in range(0, len(pending), wave):
        together = pending[start : start + wave]
        rows = _train_wave(tables, plan, base, training, together, label_names, keys)
        for row in rows:
            split = next(split for split in together if split.number == row["split"])
            folder = f"{model_folder(plan)}/{keys[split.number]}"
            uri = folder if tracker is None else _log_model(tracker, plan, split, folder, row)
            _commit_model(tables, plan, training, split, keys[split.number], folder, uri, label_names, row)
            progress.advance(1)
    quality = tables.read("models").where(ours).selectExpr("min(macro_f1) AS low", "max(macro_f1) AS high").collect()[0]
    progress.finish(
        f"{len(splits)} models, {len(pending)} trained now, macro F1 {quality['low']:.2f} to {quality['high']:.2f}"
    )


def _train_wave(
    tables: Tables, plan: Plan, base: ModelLocation, training: Staged, splits: Sequence[Split],
    label_names: Sequence[str], keys: dict[int, str],
) -> list[dict[str, Any]]:  # fmt: skip
    documents = tables.read("staged").where(f"{training.where} AND {is_trainable(plan.text.max_characters)}").selectExpr(
        "text", "labels", "text_digest", "doc_id", f"explode(array({', '.join(str(split.number) for split in splits)})) AS split"
    )  # fmt: skip
    place = " ".join(f"WHEN {split.number} THEN {position}" for position, split in enumerate(splits))
    placed = documents.selectExpr("*", f"CAST(CASE split {place} END AS INT) AS place")
    train = _training(plan, base, splits, list(label_names), keys, local=is_local(tables.spark))
    # Partition ids are assigned, not hashed: two splits in one task would be trained one after the other.
    spread = placed.repartitionById(len(splits), "place").sortWithinPartitions("split", "text_digest", "doc_id")
    return [row.asDict() for row in map_on_devices(spread, train, _TRAINED, plan.execution.device).collect()]


def _training(
    plan: Plan,
    base: ModelLocation,
    splits: Sequence[Split],
    label_names: list[str],
    keys: dict[int, str],
    *,
    local: bool,
) -> DeviceWork:
    """Return the function that executors run; it closes over plain values only."""
    from lexplain.finetune import Recipe

    models = plan.models
    recipe = Recipe(
        train=models.train, epochs=models.epochs, learning_rate=models.learning_rate, batch_size=models.batch_size,
        accumulate=models.accumulate, max_tokens=plan.text.max_tokens, patience=models.patience,
    )  # fmt: skip
    threads = plan.execution.threads or ((os.cpu_count() or 1) if local else 1)
    folders = model_folder(plan)
    place, place_digest = base.folder, base.digest
    drawn = {split.number: split for split in splits}
    multi_label, seed, most = models.multi_label, models.seed, plan.text.max_characters

    def train(batches: Iterator[pa.RecordBatch], /, *, device: str) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        documents = [
            row for batch in batches for row in batch.select(["text", "labels", "text_digest", "split"]).to_pylist()
        ]
        if not documents:
            return
        split = drawn[documents[0]["split"]]
        row = train_split(
            documents, split, fetch_model(place, place_digest), Path(folders), keys[split.number], recipe,
            label_names=label_names, multi_label=multi_label, seed=seed, max_characters=most, threads=threads,
            device=device,
        )  # fmt: skip
        schema = pa.schema(
            [("split", pa.int32()), ("digest", pa.string()), ("macro_f1", pa.float64()), ("micro_f1", pa.float64()),
             ("label_f1", pa.map_(pa.string(), pa.float64())), ("n_train", pa.int32()), ("n_test", pa.int32()),
             ("seconds", pa.float64())]
        )  # fmt: skip
        yield pa.RecordBatch.from_pylist([row], schema=schema)

    return train


def train_split(
    documents: Sequence[dict[str, Any]], split: Split, base: Path, folders: Path, key: str, recipe: Recipe, *,
    label_names: Sequence[str], multi_label: bool, seed: int, max_characters: int, threads: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune one split's model in this process. Runs on an executor.

    Args:
        documents: Rows with text (bytes), labels and text_digest, both halves.
        split: Says which half a document is in.
        base: Local folder of the base model.
        folders: Parent of the model folders; the model goes to `folders / key`.
        key: The model's key.
        recipe: How to train.
        label_names: All labels, in the model's order.
        multi_label: Several labels a document.
        seed: Of the plan; each split draws its own from it.
        max_characters: Longer texts are left out, as unreadable ones are.
        threads: Torch threads.
        device: Torch device.

    Returns:
        The row of `_TRAINED`.
    """
    import torch

    from lexplain.finetune import fine_tune

    torch.set_num_threads(threads)
    texts, labels, in_training = [], [], []
    for document in documents:
        texts.append(decode_document(document["text"], max_characters))
        labels.append(document["labels"])
        in_training.append(split.trains_on(document["text_digest"]))
    scores = fine_tune(
        base, texts, labels, in_training, label_names=label_names, multi_label=multi_label, recipe=recipe,
        seed=seed + split.number, folder=folders / key, features=folders / "features", device=device,
    )  # fmt: skip
    return {
        "split": split.number,
        "digest": digest_folder(folders / key),
        "macro_f1": scores.macro_f1,
        "micro_f1": scores.micro_f1,
        "label_f1": sorted(scores.label_f1.items()),
        "n_train": scores.n_train,
        "n_test": scores.n_test,
        "seconds": scores.seconds,
    }


def _log_model(tracker: RunTracker, plan: Plan, split: Split, folder: str, row: dict[str, Any]) -> str:
    metrics = {"macro_f1": row["macro_f1"], "micro_f1": row["micro_f1"], "seconds": row["seconds"]}
    metrics |= {f"f1/{label}": value for label, value in row["label_f1"].items()}
    parameters = {name: value for name, value in asdict(plan.models).items() if value not in (None, ())}
    parameters |= {"split": split.number, "draw": split.draw, "n_train": row["n_train"], "n_test": row["n_test"]}
    name = plan.models.register_as or f"lexplain-{plan.name}"
    return tracker.log_split(split.number, Path(folder), parameters=parameters, metrics=metrics, register_as=name)


def _commit_model(
    tables: Tables, plan: Plan, training: Staged, split: Split, key: str, folder: str, uri: str,
    label_names: Sequence[str], row: dict[str, Any],
) -> None:  # fmt: skip
    values = {
        "model_key": key, "split": split.number, "seed": split.seed, "draw": split.draw, "test_share": split.test_share,
        "uri": folder, "folder": folder, "digest": row["digest"], "training_key": training.key,
        "training_snapshot": training.version, "labels": list(label_names),
        "problem": "multi_label" if plan.models.multi_label else "single_label", "macro_f1": row["macro_f1"],
        "micro_f1": row["micro_f1"], "label_f1": row["label_f1"], "n_train": row["n_train"], "n_test": row["n_test"],
        "seconds": row["seconds"], "mlflow_uri": None if uri == folder else uri,
    }  # fmt: skip
    rows = tables.spark.createDataFrame([values], TABLES["models"].schema)
    tables.replace(rows, "models", where=f"model_key = {quote_text(key)}")


def take_models(
    tables: Tables, plan: Plan, find_method: FindMethod, locations: Sequence[ModelLocation]
) -> list[ExplainedModel]:
    """Return the models that the user brought, and commit a row for each.

    Raises:
        ModelError: Two of them are the same, their labels differ, or one is a regression of several outputs.
    """
    twice = {location.digest for location in locations}
    if len(twice) < len(locations):
        raise ModelError(
            f"models.uris={[location.uri for location in locations]!r} must be different models; some have the same "
            "content. A word would have been selected twice by one model. Write one URI a split."
        )
    outputs = [_read_outputs(location) for location in locations]
    first, first_names = outputs[0]
    for location, (problem, names) in zip(locations, outputs, strict=True):
        if set(names) != set(first_names) or (problem == "regression") != (first == "regression"):
            raise ModelError(
                f"models.uris={location.uri!r} ({problem}) has the labels {list(names)}, the first model ({first}) has "
                f"{list(first_names)}. Words of different classes would have been compared. Bring models of one label set."
            )
    rows: dict[str, dict[str, Any]] = {}
    for split, (location, (problem, names)) in enumerate(zip(locations, outputs, strict=True)):
        # Executors are told the folder as it is; a table must not keep a password that an address may hold.
        kept = redact_uris(location.folder)
        key = digest("given", location.digest, kept, split)
        rows[key] = {name: None for name, _, _ in TABLES["models"].columns} | {
            "model_key": key, "split": split, "uri": redact_uris(location.uri), "folder": kept,
            "digest": location.digest, "labels": list(names), "problem": problem,
        }  # fmt: skip
    # an older lexplain did not write the problem, and of a one-logit model one label only
    there = tables.read("models").where(f"model_key IN ({quote_list(list(rows))}) AND problem IS NOT NULL")
    missing = rows.keys() - {row["model_key"] for row in there.select("model_key").collect()}
    if missing:
        added = tables.spark.createDataFrame([rows[key] for key in sorted(missing)], TABLES["models"].schema)
        tables.replace(added, "models", where=f"model_key IN ({quote_list(sorted(missing))})")
    return [
        replace(read_model(plan, find_method, row), folder=location.folder)
        for row, location in zip(rows.values(), locations, strict=True)
    ]


def _read_outputs(location: ModelLocation) -> tuple[ProblemType, tuple[str, ...]]:
    folder = fetch_model(location.folder, location.digest)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("id2label") or {str(number): f"LABEL_{number}" for number in range(config.get("num_labels", 2))}
    return read_outputs([str(names[number]) for number in sorted(names, key=int)], config.get("problem_type"))
