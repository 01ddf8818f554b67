"""What whoever starts a run at a console is told, and how it ends: on stderr, and by Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import os
import sys
from types import FrameType

from rich.console import Console

from crossdock.runtime.config.bounded_files import printable

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def complain_on_stderr(message: str) -> None:
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print("crossdock:", style="bold red", end=" ")
    console.print("\n".join(map(printable, message.split("\n"))), markup=False)


def end(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the run like Ctrl-C: the gang is closed on the way out."""
    raise KeyboardInterrupt


def exit_now(code: int) -> None:
    """End this process without Python's own way out.

    That waits for collectives that nobody will finish, and where a thread, such as the watch's, is inside of torch's
    store it aborts the process: the thread is unwound through C++ that does not allow it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
