"""What a user sees meanwhile: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crossdock.launch.engine.progress import Waiting

_EVERY_S = 1.0
"""So often at most a plain line tells how far something is."""


@contextmanager
def waiting_line(console: Console) -> Iterator[Waiting]:
    """For `Engine.start`."""
    if console.is_terminal and not console.quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
        return
    said, at = "", 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal said, at
        line = f"{what}: {decimal(done)} of {decimal(total)}" if total else what
        is_new = line.partition(":")[0] != said.partition(":")[0]
        if is_new or (line != said and time.monotonic() - at >= _EVERY_S):
            said, at = line, time.monotonic()
            console.print(line, markup=False)

    yield tell


@contextmanager
def step_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a plain line per step elsewhere."""
    if not console.is_terminal or console.quiet:
        yield lambda done, total: console.print(f"step {done}/{total}", markup=False)
        return
    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("denoising", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
