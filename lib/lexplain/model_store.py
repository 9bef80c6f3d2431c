"""Where model folders come from: their digest, and a verified local copy on each node.

A model folder is a Hugging Face checkpoint (`config.json`, weights, tokenizer), or an MLflow
transformers artefact that holds one under `model/`. Both are read alike from a local path and from
any address that `pyarrow.fs` opens (`file://`, `s3://`, `gs://`, `hdfs://`, `abfss://`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from lexplain.errors import ModelError, Problem

if TYPE_CHECKING:
    from pyarrow import fs

ProblemType = Literal["single_label", "multi_label", "binary", "regression"]
"""What a model's outputs are: a softmax, sigmoids, one logit, or a number."""

# What DistilBERT's config calls otherwise.
_ATTRIBUTES = {"n_layers": "num_hidden_layers", "dim": "hidden_size"}

_READ_BYTES = 4 * 2**20

# The files that change a model's numbers. A checkpoint of a trainer also holds optimizer states and
# logs, one from the Hub a README and weights in other formats: none of those belong to the digest.
_CHECKPOINT_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "bpe.codes",
    "*.model",
)
# Where a checkpoint lies in a folder: in it, or as MLflow lays it out.
_PARTS = ("", "model/", "components/tokenizer/")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "bpe.codes", "*.model")
# These families count positions from the one after the padding token's.
_POSITIONS_AFTER_PADDING = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "longformer",
}
_PICKLE_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")

# Folders whose digest this process has verified, by (path, digest): hashing gigabytes once is enough.
_VERIFIED: set[tuple[str, str]] = set()


def digest_folder(folder: str | Path) -> str:
    """Return the SHA-256 that names the model in `folder`, as 64 hexadecimal digits.

    It covers the names and contents of the files that change numbers: configuration, weights,
    tokenizer and vocabulary. Where it lies and what lies beside it (README, training logs, optimizer
    states, `fine_tuning.json`) do not matter. Pickled weights count only where there is no
    safetensors file, as in loading. An MLflow artefact has the digest of the checkpoint in it.

    Args:
        folder: A local path or a storage URI.

    Raises:
        ModelError: The folder cannot be read, or holds no checkpoint.

    Note:
        Runs on: driver and executors. Cost: reads every file once.
    """
    filesystem, files = _checkpoint(str(folder))
    total = hashlib.sha256()
    for name in sorted(files):
        content = hashlib.sha256()
        with filesystem.open_input_stream(files[name]) as stream:
            while chunk := stream.read(_READ_BYTES):
                content.update(chunk)
        total.update(f"{name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def fetch_model(folder: str | Path, digest: str, cache: Path | None = None) -> Path:
    """Return a local Hugging Face folder that holds exactly the model named by `digest`.

    A local checkpoint is used where it lies. Everything else is copied once for each node into
    `<cache>/lexplain-models/<digest>`, under a file lock and renamed when complete, so that
    tasks of one node share one copy and a killed copy is never taken for a whole one. A copy that
    was damaged since (a cleaner of temporary files) is made again. The digest is verified once for
    each process.

    Args:
        folder: A local path or a storage URI that this node can read.
        digest: What `digest_folder` gave for it on the driver.
        cache: Parent of the copies. None: a folder of this user under the temporary folder.

    Raises:
        ModelError: The folder cannot be read, or its content has another digest.

    Note:
        Runs on: driver and executors. Cost: one read, and one copy for each node.
    """
    source = str(folder)
    if "://" not in source and (Path(source) / "config.json").is_file():
        _verify(source, digest)
        return Path(source)
    if cache is None:
        # Named by user: another user's folder could not be written to.
        cache = Path(tempfile.gettempdir()) / f"lexplain-{os.getuid()}"
    target = cache / "lexplain-models" / digest
    if (str(target), digest) in _VERIFIED and target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir() and _is(target, digest):
            _VERIFIED.add((str(target), digest))
            return target
        shutil.rmtree(target, ignore_errors=True)
        partial = target.with_name(f".{digest}.{uuid.uuid4().hex}")
        try:
            _copy(source, partial)
            _verify(str(partial), digest, origin=source)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _VERIFIED.add((str(target), digest))
    return target


def read_outputs(names: Sequence[str], problem_type: str | None) -> tuple[ProblemType, tuple[str, ...]]:
    """Return what a model's outputs are, and its labels: what each explanation is of.

    Args:
        names: What the config's `id2label` calls the outputs, in their order.
        problem_type: Of the config; a model of one output is a classifier unless it says `regression`.

    Returns:
        One label an output; of a one-logit classifier two, "not X" and "X".

    Raises:
        ModelError: The model is a regression of several outputs.
    """
    labels = tuple(names)
    if problem_type == "regression":
        if len(labels) != 1:
            raise ModelError(
                f"problem_type='regression' with the outputs {list(labels)} must have one output. Numbers would have been "
                "taken for classes. Write a regression of one output, or a classifier."
            )
        return "regression", labels
    if problem_type == "multi_label_classification":
        return "multi_label", labels
    if len(labels) == 1:
        return "binary", (f"not {labels[0]}", labels[0])
    return "single_label", labels


def has_token(folder: str, token: str) -> bool:
    """Tell whether the tokenizer of a local model folder knows a token; True where it cannot be read, which is told elsewhere.

    Args:
        folder: A local path.
        token: As it stands in the vocabulary.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).token_to_id(token) is not None
    except Exception:  # the library raises nothing narrower
        return True


def read_config(folder: str, *, explained: bool) -> SimpleNamespace | None:
    """Return the config of a local model folder, as far as methods ask for it; None where it cannot be read.

    Args:
        folder: A local path.
        explained: As in `check_folder`.
    """
    try:
        config = _open_folder(folder)[1]
    except (ModelError, OSError, ValueError):
        return None
    named = {_ATTRIBUTES.get(str(name), str(name)): value for name, value in config.items()}
    return SimpleNamespace(**(named if explained else named | {"problem_type": None}))


def check_index(folder: Path) -> None:
    """Refuse an index of weights by which transformers would read other files: it unpickles what is no safetensors file.

    Args:
        folder: Local folder of a model, whose index there may be.

    Raises:
        ModelError: The index names other files.
    """
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
        sound = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise ModelError(
            f"model={str(folder)!r}: model.safetensors.index.json must name safetensors files of its own folder. Files from "
            "elsewhere would have been read, and pickles opened. Save the model anew with save_pretrained()."
        )


def check_folder(field: str, folder: str, *, max_tokens: int, explained: bool, allow_pickle: bool) -> Iterator[Problem]:
    """Yield what is wrong with a local model folder, as far as its file names and JSON files tell.

    Loading the model is the proof; this finds in milliseconds, on the driver, what need not wait for it.

    Args:
        field: The plan's key that names it.
        folder: An existing local path.
        max_tokens: Tokens of a window.
        explained: A ready classifier; False: a model to fine-tune, whose output layer will be replaced.
        allow_pickle: Whether a ready classifier may have pickled weights.
    """
    try:
        files, config = _open_folder(folder)
    except ModelError:
        yield Problem(field, folder, "has no config.json", "Every task would have failed while it loads the model",
                      "Write the folder that save_pretrained wrote")  # fmt: skip
        return
    except (OSError, ValueError) as error:
        yield Problem(field, folder, f"has a config.json that cannot be read ({error})",
                      "Every task would have failed while it loads the model", "Save the model with save_pretrained")  # fmt: skip
        return
    yield from _check_files(field, folder, files, allow_pickle=allow_pickle and explained)
    if explained:
        yield from _check_classifier(field, folder, config)
    most = _count_tokens(files, config)
    if most is not None and max_tokens > most:
        yield Problem("text.max_tokens", max_tokens, f"must be at most {most}, the tokens that {field}={folder!r} takes",
                      "Every longer text would have failed inside the model", f"Write max_tokens: {most}")  # fmt: skip


def _open_folder(folder: str) -> tuple[Mapping[str, str], dict[str, Any]]:
    """Return the files of a local checkpoint by name, and its config.

    Raises:
        ModelError: There is no config.json.
        ValueError: It is no config.
        OSError: It cannot be read.
    """
    paths = {
        part + path.name: str(path)
        for part in _PARTS if Path(folder, part).is_dir()
        for path in Path(folder, part).iterdir() if path.is_file()
    }  # fmt: skip
    files = _flatten(paths, folder)
    config = json.loads(Path(files["config.json"]).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError("it names no model_type")
    return files, config


def _check_files(field: str, folder: str, files: Mapping[str, str], *, allow_pickle: bool) -> Iterator[Problem]:
    if not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in _TOKENIZER_FILES):
        yield Problem(field, folder, "has no tokenizer", "No text could have been turned into tokens",
                      "Save the tokenizer beside the model, with tokenizer.save_pretrained")  # fmt: skip
    if any(name.endswith(".safetensors") for name in files):
        return
    if not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in _PICKLE_FILES):
        yield Problem(field, folder, "has no weights", "Every task would have failed while it loads the model",
                      "Save the model with save_pretrained, which writes *.safetensors")  # fmt: skip
    elif not allow_pickle:
        yield Problem(field, folder, "has pickled weights only",
                      "Pickled weights can run code of whoever made them, on every executor",
                      "Save the model anew with save_pretrained, which writes *.safetensors"
                      + (", or write execution.allow_pickle: true" if field.startswith("models.uris") else ""))  # fmt: skip


def _check_classifier(field: str, folder: str, config: Mapping[str, Any]) -> Iterator[Problem]:
    names = config.get("id2label")
    outputs = len(names) if isinstance(names, dict) else 2  # transformers names two classes
    if config.get("problem_type") == "regression" and outputs != 1:
        yield Problem(field, folder, f"is a regression of {outputs} outputs", "Numbers would have been taken for classes",
                      "Write a regression of one output, or a classifier")  # fmt: skip
    if config.get("problem_type") == "single_label_classification" and outputs == 1:
        yield Problem(field, folder, "has one class, and problem_type single_label_classification",
                      "transformers would have refused to load it, in every task",
                      "Write problem_type regression, or leave it out for a classifier of one logit, in its config.json")  # fmt: skip
    architectures = config.get("architectures") or []
    if architectures and not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        yield Problem(field, folder, f"is no sequence classifier but {', '.join(map(str, architectures))}",
                      "Its output layer would have been drawn at random, and explained",
                      "Write a fine-tuned classifier, or models.base to fine-tune this one")  # fmt: skip
    if names is None:
        return
    numbers = sorted(map(str, names)) if isinstance(names, dict) else []
    if (
        not numbers
        or set(numbers) != set(map(str, range(len(numbers))))
        or len(set(map(str, names.values()))) != len(names)
    ):
        yield Problem(field, folder, "has an id2label in config.json that does not name each class once",
                      "Two classes would have shared one keyword table, or one have had none",
                      "Write id2label with different names for 0, 1, ...")  # fmt: skip


def _count_tokens(files: Mapping[str, str], config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model can take; None where neither its config nor its tokenizer's says."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        try:
            most = json.loads(Path(files["tokenizer_config.json"]).read_bytes()).get("model_max_length")
        except (KeyError, OSError, ValueError, AttributeError):  # loading the model tells more
            return None
        return most if isinstance(most, int) and 0 < most < 10**9 else None  # transformers writes 10^30 for no limit
    padding = config.get("pad_token_id", 1)
    offset = padding + 1 if config["model_type"] in _POSITIONS_AFTER_PADDING and isinstance(padding, int) else 0
    return positions - offset


def _verify(folder: str, digest: str, origin: str | None = None) -> None:
    """Raise unless `folder` has the digest; `origin` is what the message names."""
    if (folder, digest) in _VERIFIED:
        return
    found = digest_folder(folder)
    if found != digest:
        raise ModelError(
            f"model folder={(origin or folder)!r} must have the digest {digest[:12]}, but has {found[:12]}. "
            "The files changed since the run recorded them: explanations of two models would have been "
            "stored under one name. Start a new run, which records the new digest, or put the old files back."
        )
    if origin is None:
        _VERIFIED.add((folder, digest))


def _is(folder: Path, digest: str) -> bool:
    try:
        return digest_folder(folder) == digest
    except ModelError:
        return False


def _copy(source: str, target: Path) -> None:
    filesystem, files = _checkpoint(source)
    target.mkdir(parents=True)
    for name, path in files.items():
        with filesystem.open_input_stream(path) as stream, (target / name).open("wb") as copy:
            shutil.copyfileobj(stream, copy, _READ_BYTES)


def _checkpoint(source: str) -> tuple[fs.FileSystem, dict[str, str]]:
    """Return the file system and the checkpoint's files, {name in a flat folder: path}."""
    import pyarrow  # checking a plan needs none of it
    from pyarrow import fs

    try:
        if "://" in source:
            filesystem, root = fs.FileSystem.from_uri(source)
        else:
            filesystem, root = fs.LocalFileSystem(), str(Path(source).absolute())
        listing = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise ModelError(
            f"model folder={source!r} cannot be read: {error}. "
            "Every task would have failed while it loads the model. "
            "Write a path or a storage URI (file://, s3://, gs://, hdfs://, abfss://) that driver and "
            "executors can read."
        ) from None  # its message may hold the secrets of the URI
    prefix = root.rstrip("/") + "/"
    names = {info.path.removeprefix(prefix): info.path for info in listing if info.type == fs.FileType.File}
    return filesystem, _flatten(names, source)


def _flatten(names: Mapping[str, str], source: str) -> dict[str, str]:
    """Choose the checkpoint's files among relative `names` and give them names of one flat folder."""
    if "config.json" in names:
        parts = [""]
    elif "model/config.json" in names:
        # MLflow saves the tokenizer apart, unless it was given a checkpoint folder that has one.
        parts = ["model/"] if "model/tokenizer_config.json" in names else ["components/tokenizer/", "model/"]
    else:
        raise ModelError(
            f"model folder={source!r} must hold a config.json, or an MLflow transformers model. "
            "Without one there is nothing to load. "
            "Write the folder that save_pretrained or `lexplain run` wrote, or a transformers model of MLflow."
        )
    flat = {
        name.removeprefix(part): path
        for part in parts
        for name, path in names.items()
        if name.startswith(part) and "/" not in name.removeprefix(part)
    }
    pickled = not any(name.endswith(".safetensors") for name in flat)
    patterns = _CHECKPOINT_FILES + (_PICKLE_FILES if pickled else ())
    return {
        name: path
        for name, path in flat.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and not name.endswith((".pkl", ".pickle"))
    }
