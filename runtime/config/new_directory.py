"""A directory that is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossdock.runtime.errors import CheckpointError


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A sibling to write into, renamed to `directory` at the end; removed when the body raises.

    Raises:
        CheckpointError: there is something in its place, or nothing can be written there.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is not empty; give a new directory, or empty this one")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give a directory")
    staging = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    try:
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"{directory.parent}: cannot write here: {error.strerror}") from None
    try:
        yield staging
        staging.rename(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
