"""How far fetching is: a bar in a terminal, plain lines elsewhere. And how long others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

FETCH_S = 6 * 3600.0
"""The longest wait for whoever fetches a model: another process of this node, or the other nodes."""
Tell = Callable[[int, int], None]
"""Called with (bytes that are there, all bytes)."""
Notify = Callable[[str], None]
"""Gets a line for the user."""


def fetch_lines(name: str, notify: Notify) -> Tell:
    """A line for each tenth."""
    said = -1

    def tell(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // max(total, 1)
        if tenth != said:
            said = tenth
            notify(f"{name}: fetching: {decimal(done)} of {decimal(total)}")

    return tell


@contextmanager
def fetch_bar(name: str, console: Console) -> Iterator[Tell]:
    """Nothing is shown before there is something to fetch."""
    if not console.is_terminal or console.quiet:
        yield fetch_lines(name, lambda line: console.print(line, markup=False))
        return
    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)

    def tell(done: int, total: int) -> None:
        if not bar.tasks:
            bar.add_task(name)
            bar.start()
        bar.update(bar.tasks[0].id, completed=done, total=total)

    try:
        yield tell
    finally:
        if bar.tasks:
            bar.stop()
