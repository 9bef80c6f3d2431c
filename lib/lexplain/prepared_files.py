"""Files that a preparation writes once and executors read: safetensors, named by the digest of their content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lexplain.errors import MethodError


def write_prepared(data: bytes, folder: Path, kind: str) -> Path:
    """Write a file under a name of its own; one with the same content that is there already stays.

    Jobs may write at once, and readers never see a part of a file.

    Args:
        data: The file's content.
        folder: Where executors read; made if need be.
        kind: What its name begins with.

    Returns:
        The file.
    """
    path = folder / f"{kind}-{hashlib.sha256(data).hexdigest()[:20]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        part.write_bytes(data)
        os.replace(part, path)
    return path


@contextmanager
def open_prepared(path: str | Path, framework: str) -> Iterator[Any]:
    """Open a file for reading, as `safetensors.safe_open` does.

    Args:
        path: The file.
        framework: Whose tensors it gives: `np` or `pt`.

    Raises:
        MethodError: It cannot be read, or holds something else.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise MethodError(
            f"prepared={str(path)!r} cannot be read here ({error}). The model's texts would have been explained without "
            "it. Write a sink.path or models.folder that driver and executors share; a lost file is made again by the "
            "next run that has documents to explain."
        ) from error
