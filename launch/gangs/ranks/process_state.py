"""Whether a process of this machine runs."""

from __future__ import annotations

from typing import Literal

import psutil

ProcessState = Literal["runs", "stopped", "gone"]


def process_state(pid: int) -> ProcessState:
    """Of a process of this machine; one that nobody has waited for yet is gone, too."""
    try:
        state = psutil.Process(pid).status()
    except (psutil.Error, ValueError, OverflowError):  # a number that no process has
        return "gone"
    if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
        return "gone"
    return "stopped" if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP) else "runs"
