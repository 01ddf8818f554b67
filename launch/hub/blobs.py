"""Large files of a repository, fetched into the hub's cache; a file that was cut off goes on where it was.

huggingface_hub goes on only within a process: what a killed one had of a file is lost, and files have up to 10 GB.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from crossdock.launch.hub.progress import Tell
from crossdock.runtime.errors import CheckpointError

_AT_ONCE = 8
_LEAVE_S = 0.2


@dataclass(frozen=True)
class Blob:
    """A file by its content: `sha256` in hex, which is its name in the cache, too."""

    url: str
    sha256: str
    size: int
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / self.sha256

    @property
    def part(self) -> Path:
        """What there is of it, up to where it was cut off; the cache's tools know the suffix."""
        return self.folder / f"{self.sha256}.incomplete"

    @property
    def part_bytes(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0


class _Counter:
    """A progress bar, as huggingface_hub wants one, that only counts."""

    def __init__(self, count: Callable[[int], None], **options: Any) -> None:
        self.update = count

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was opened."""


def fetch_blobs(blobs: Sequence[Blob], tell: Tell) -> None:
    """Several at once. `tell` gets the bytes that are there and all; it is called on one thread after the other.

    Raises:
        CheckpointError: what came is not what the repository lists.
        OSError, httpx's errors: the disk or the network.
    """
    done, total = sum(blob.part_bytes for blob in blobs), sum(blob.size for blob in blobs)
    turn, stopped = threading.Lock(), threading.Event()

    def count(nbytes: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise InterruptedError
        with turn:
            done += nbytes
            tell(done, total)

    def work() -> None:
        try:
            while not stopped.is_set():
                _fetch(todo.get_nowait(), count)
        except Empty:
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    todo, ended = SimpleQueue[Blob](), SimpleQueue[BaseException | None]()
    for blob in blobs:
        todo.put(blob)
    if blobs:
        tell(done, total)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(len(blobs), _AT_ONCE))]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            if (error := ended.get()) is not None:
                raise error
    finally:
        stopped.set()
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(_LEAVE_S)  # one that waits for the network may be left behind


def _fetch(blob: Blob, count: Callable[[int], None]) -> None:
    blob.folder.mkdir(parents=True, exist_ok=True)
    had = blob.part_bytes
    if had <= blob.size:
        with blob.part.open("ab") as file:
            options: dict[str, Any] = {"tqdm_class": partial(_Counter, count), "headers": build_hf_headers()}
            http_get(blob.url, file, resume_size=had, expected_size=blob.size, **options)
        with blob.part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == blob.sha256:
            blob.part.replace(blob.path)
            return
        if not had:
            blob.part.unlink()
            raise CheckpointError(f"{blob.url}: what came has the sha256 {found}, not {blob.sha256}; fetch it again")
    count(-blob.part_bytes)  # what was here was damaged
    blob.part.unlink()
    _fetch(blob, count)
