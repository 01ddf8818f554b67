"""What whoever starts a run at a console is told, and how it ends: on stderr, and by Ctrl-C or SIGTERM."""

from __future__ import annotations

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
