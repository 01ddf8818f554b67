"""Small files that a user or a checkpoint's publisher wrote: read whole, but never more than fits; JSON without tricks.

What is refused is a ValueError that says why. A device or a FIFO is never read: it may have no end, or block.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
"""Of lists and objects in each other. Files of published models have about six."""
MAX_DIGITS = 100
MAX_VALUES = 300_000
"""The largest index of weights that is published has 92,000, Gemma's tokenizer_config.json 45,000."""


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most `limit_bytes`.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is something else than a file, or larger.
    """
    check_regular(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # exchanged meanwhile
            raise ValueError("is no longer a regular file")
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"has more than {limit_bytes} bytes; such a file has a few thousand")
    return content


def check_regular(path: Path) -> None:
    """
    Raises:
        OSError: there is nothing.
        ValueError: it is neither a regular file nor a directory.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
        raise ValueError(f"is a {kinds.get(stat.S_IFMT(mode), 'special file')}, expected a regular file")


def parse_json(text: str) -> Any:
    """
    Raises:
        ValueError: not JSON, nested too deeply, a key given twice, or a number with too many digits.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    _check_shape(value)
    return value


def printable(text: str) -> str:
    """`text` for a message: one line, with nothing in it that a terminal obeys."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _check_shape(value: object) -> None:
    """Not too deep, and not too many values."""
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise ValueError(f"holds more than {MAX_VALUES} values")
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [each for values in inside for each in values]


def walk(value: object) -> Iterator[tuple[int, str, Any]]:
    """(depth, dotted key, value) of `value` and of everything in it; items of a list have their index as key."""
    pending: list[tuple[int, str, Any]] = [(0, "", value)]
    while pending:
        depth, path, item = pending.pop()
        yield depth, path, item
        inside = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        pending.extend((depth + 1, f"{path}.{key}" if path else str(key), each) for key, each in inside)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"has the key {key!r} twice")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"has a number with {len(digits)} digits")
    return int(digits)
