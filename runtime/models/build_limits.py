"""Bounds on what a config may ask for, far above any real model, so that a wrong number is told and not built.

A model is built without its weights; so what a config asks for costs little as long as it is not asked for a billion
layers. What is counted is what `nn.Module` registers; what is sized is what a constructor computes.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils import _pytree as pytree

from crossdock.runtime.config.bounded_files import walk

MAX_NUMBER = 2**39
"""The largest whole number in a config. The largest that is published is the base of rotary frequencies: 10^11."""
MAX_COUNT = 10_000
_COUNTS = re.compile(r"(layers|blocks|layers_per_block|depth|num_train_timesteps|extra_ids)$")
MAX_TEXT = 2**12
"""Characters of a text in a config; they are names."""
MAX_ITEMS = 2**9
"""Of a list in a config; statistics of latents have up to 128, layers 128."""
MAX_PARTS = 20_000
"""Modules, parameters and buffers of a model; LTX-2's transformer, which has the most, has 7,200."""
MAX_ELEMENTS = 10**13
"""Of all parameters together: a thousand times FLUX.1-dev's."""
MAX_TABLE = 2**31
"""Elements of what a constructor computes. SD3.5's table of positions has 2^28."""


class TooLargeError(ValueError):
    """A config asks for more than any model has. `key`: the dotted key that does, where it is known."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def largest_number(config: Mapping[str, object]) -> tuple[str, int]:
    """(dotted key, value) of the whole number that is furthest from 0."""
    numbers = [(key, item) for _, key, item in walk(dict(config)) if isinstance(item, int)]
    return max(numbers, key=lambda number: abs(number[1]), default=("", 0))


def check_values(config: Mapping[str, object]) -> None:
    """
    Raises:
        TooLargeError: names the key.
    """
    check_counts(config)
    key, value = largest_number(config)
    if abs(value) > MAX_NUMBER:
        raise TooLargeError(f"found {value}; no model has a number above {MAX_NUMBER}", key)
    for _, path, item in walk(dict(config)):
        if isinstance(item, str) and len(item) > MAX_TEXT:
            raise TooLargeError(f"has {len(item)} characters; no model has a name of more than {MAX_TEXT}", path)
        if isinstance(item, list) and len(item) > MAX_ITEMS:
            raise TooLargeError(f"has {len(item)} items; no model has a list of more than {MAX_ITEMS}", path)


def check_counts(content: Mapping[str, object]) -> None:
    """Counts of what is made in a loop, whoever makes it: layers, and what schedulers and tokenizers lay out.

    Raises:
        TooLargeError: names the key.
    """
    for _, path, item in walk(dict(content)):
        if isinstance(item, int) and item > MAX_COUNT and _COUNTS.search(path):
            raise TooLargeError(f"found {item}; nothing has more than {MAX_COUNT} of these", path)


@contextmanager
def bounded(until_s: float = math.inf) -> Iterator[None]:
    """Models that this thread builds inside have at most so many parts and elements; raises `TooLargeError`.

    Args:
        until_s: of `time.thread_time`; a model that is not done by then is too large as well.
    """
    thread, parts, elements = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, part: object) -> None:
        nonlocal parts, elements
        if threading.get_ident() != thread:
            return
        parts += 1
        elements += part.numel() if isinstance(part, nn.Parameter) else 0
        if time.thread_time() > until_s:
            raise TooLargeError("takes too long to build")
        if parts > MAX_PARTS:
            raise TooLargeError(f"asks for more than {MAX_PARTS} modules and parameters")
        if elements > MAX_ELEMENTS:
            raise TooLargeError(f"asks for more than {MAX_ELEMENTS:.0e} parameters")

    hooks: list[Callable[..., Any]] = [
        register_module_parameter_registration_hook,
        register_module_module_registration_hook,
        register_module_buffer_registration_hook,
    ]
    handles = [register(count) for register in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_table(result: object) -> None:
    """
    Raises:
        TooLargeError: a tensor in `result` is larger than any that a constructor computes.
    """
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.numel() > MAX_TABLE:
            raise TooLargeError(f"asks for a table of {leaf.numel()} numbers")


def blame(config: Mapping[str, object], builds: Callable[[Mapping[str, object]], bool]) -> str | None:
    """The dotted key without which, or with 1 in whose place, `builds` says yes; None: there is no such key.

    Args:
        builds: whether a model can be made of a config.
    """
    for key, value in config.items():
        rest = {other: config[other] for other in config if other != key}
        if builds(rest) or (isinstance(value, int) and builds({**rest, key: 1})):
            inner = blame(value, partial(_builds_with, rest, key, builds)) if isinstance(value, dict) else None
            return f"{key}.{inner}" if inner else key
    return None


def _builds_with(
    rest: Mapping[str, object], key: str, builds: Callable[[Mapping[str, object]], bool], part: Mapping[str, object]
) -> bool:
    return builds({**rest, key: part})
