"""What a plan says of files on this machine, checked before Spark starts: sources with their columns, model folders."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import glob
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lexplain.errors import MethodError, ModelError, Problem
from lexplain.model_store import check_folder, has_token, read_config, read_outputs

if TYPE_CHECKING:
    from lexplain.plan import FindMethod, Plan, Source

BELOW_HALF = "Labels are explained where predicted above 0.5: the table would look as if none were between"
_HEAD_BYTES = 65_536  # of a file of documents: its first line, in all likelihood
_SHOWN_COLUMNS = 10  # in a message


def check_files(plan: Plan, find_method: FindMethod) -> Iterator[Problem]:
    """Yield what is wrong with local files: sources that are not there or lack a column, models that cannot be explained.

    A plan with `sink.schema` may be written on another machine than it runs on: its files are not looked at.
    """
    if plan.sink.path is None:
        return
    read = {"corpus": plan.corpus} | ({"training": plan.training} if plan.training else {})
    sources = [(f"{name}.path", source.path) for name, source in read.items()]
    models = [("models.base", plan.models.base)]
    models += [(f"models.uris[{number}]", uri) for number, uri in enumerate(plan.models.uris)]
    for where, path in sources + models:
        if path is None or not is_local(path):
            continue
        if os.path.exists(path):
            if (where, path) in models:
                yield from check_folder(where, path, max_tokens=plan.text.max_tokens, explained=where != "models.base",
                                        allow_pickle=plan.execution.allow_pickle)  # fmt: skip
                yield from _check_network(plan, find_method, where, path)
            elif os.path.isfile(path):
                name = where.partition(".")[0]
                yield from _check_content(read[name], name, path)
        elif (where, path) in models or not glob.glob(path):  # Spark expands patterns, model folders have none
            yield Problem(where, path, "is not there", "The job would have failed after Spark had started",
                          "Write a path that exists; relative ones count from the plan's folder")  # fmt: skip


def _check_content(source: Source, name: str, path: str) -> Iterator[Problem]:
    """Check that a local file has documents and, of comma- or tab-separated values, the mapped columns."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return  # the reader says why
    if not head:
        yield Problem(f"{name}.path", path, "is empty", "The job would have failed after Spark had started",
                      "Write a file with documents")  # fmt: skip
    there = _read_columns(source, head) if source.kind in ("csv", "tsv") else None
    if there is None:
        return
    mapped = dataclasses.asdict(source.columns)
    for key, column in mapped.items():
        if column is not None and column not in there:
            close = difflib.get_close_matches(column, there, n=1)
            remedy = f"Write {close[0]!r}" if close else f"Write one of {', '.join(map(repr, there[:_SHOWN_COLUMNS]))}"
            if source.header:
                remedy += ", or header: false if the first line is a document"
            yield Problem(f"{name}.columns.{key}", column, f"is no column of {path!r}",
                          "The job would have failed after Spark had started", remedy)  # fmt: skip


def _read_columns(source: Source, head: bytes) -> list[str] | None:
    """Return the columns that Spark will find in a file that begins so; None where that is for the reader to tell.

    So of a first line that is longer than `head`, is no UTF-8 (compressed, UTF-16, ISO-8859-1), or names a column twice,
    which Spark renames.
    """
    # \n alone ends a line, as for the reader; blank lines are passed over
    lines = [line + b"\n" for line in head.split(b"\n")[: None if len(head) < _HEAD_BYTES else -1] if line.strip()]
    try:
        if source.kind == "csv":
            records = csv.reader(line.decode("utf-8-sig") for line in lines)
            first = next(records)
            whole = len(head) < _HEAD_BYTES or records.line_num < len(lines)
        else:
            first, whole = lines[0].decode("utf-8-sig").rstrip("\r\n").split("\t"), True
    except (csv.Error, UnicodeDecodeError, StopIteration, IndexError):
        return None
    if not whole or any("\0" in field for field in first):
        return None
    if not source.header:
        return [f"_c{number}" for number in range(len(first))]
    named = [field or f"_c{number}" for number, field in enumerate(first)]
    return named if len({field.casefold() for field in named}) == len(named) else None


def _check_network(plan: Plan, find_method: FindMethod, where: str, path: str) -> Iterator[Problem]:
    """Check that the method can explain a local model, and that a network without weights of its own will learn."""
    config = read_config(path, explained=where != "models.base")
    if config is None:
        return  # reported with the folder
    if where == "models.base" and config.model_type == "textcnn" and plan.models.learning_rate is None:
        yield Problem("models.learning_rate", None, f"must be written for a TextCNN, as {where}={path!r}",
                      "At the rate that suits a pretrained encoder its drawn filters would have learned nothing",
                      "Write learning_rate: 1.0e-2")  # fmt: skip
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    if several and plan.keywords.probability < 0.5:
        yield Problem("keywords.probability", plan.keywords.probability, f"must be >= 0.5 with the multi-label model {where}={path!r}",
                      BELOW_HALF, "Write probability: 0.5")  # fmt: skip
    try:
        names = getattr(config, "id2label", None)
        if plan.method.against is not None and where != "models.base" and names:
            labels = read_outputs(list(names.values()), getattr(config, "problem_type", None))[1]
            if plan.method.against not in labels:
                yield Problem("method.against", plan.method.against, f"is no label of {where}={path!r}",
                              "The job would have failed after Spark had started", f"Write one of: {', '.join(labels)}")  # fmt: skip
        method = find_method(plan.method.id)
        if not method.check(plan.method.asked):
            options = method.complete_options(plan.method.asked)
            method.check_network(config, options)
            baseline = options.get("baseline", "pad")
            if baseline not in ("mask", "pad") and not has_token(path, str(baseline)):
                yield Problem("method.options.baseline", baseline, f"is no token of {where}={path!r}",
                              "The job would have failed when the model was explained", "Write mask, pad, or a token of its vocabulary")  # fmt: skip
    except MethodError:
        return  # reported with the method
    except ModelError as error:
        rule, *silently, remedy = str(error).rstrip(".").split(". ")
        yield Problem(
            "method.id", plan.method.id, f"cannot explain {where}={path!r}: {rule}", ". ".join(silently), remedy
        )


def is_local(path: str) -> bool:
    """Return whether a path is one of this machine, and no URI."""
    return "://" not in path and re.match(r"(models|runs|dbfs|file):", path) is None
