"""Hooks that change what a network gives, for one thread and a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def replaced_logits(network: nn.Module, make: Callable[[Mapping[str, Any], Tensor], Tensor]) -> Iterator[None]:
    """Let the network's logits be others, for calls of this thread: another explainer may be using it.

    Args:
        network: Takes its inputs by name.
        make: Takes these and the network's own logits, returns the logits that it is to give.
    """
    thread = threading.get_ident()

    def replace(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        if threading.get_ident() == thread:
            output.logits = make(inputs, output.logits)
        return output

    handle = network.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
