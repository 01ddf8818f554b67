"""What whoever waits for a request is notified of: its steps, and a rank that the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.watch import Watch

Progress = Callable[[int, int], None]
"""Called with (finished steps, all steps)."""
Preview = Callable[[int, Tensor], None]
"""Called with a finished step and its latents `[pictures, ...]`, on the CPU: as the pipeline's loop holds them."""
Waiting = Callable[[str, int, int], None]
"""Called a few times a second while ranks start: with what they do, and how many bytes they have read, of how many.
Where nothing is read, 0 of 0.
"""
Notify = Callable[[str], None]
"""Gets a line for the user."""


_LOADING = {"connect": "meeting", "load": "reading weights", "verify": "verifying", "rehearsal": "comparing weights"}


def loading(statuses: Mapping[int, RankStatus]) -> tuple[str, int, int] | None:
    """For `Waiting`: what the last of the ranks does; None: no one loads."""
    phases = [phase for phase in _LOADING if any(status.phase == phase for status in statuses.values())]
    if not phases:
        return None
    ranks = statuses.values() if phases[0] == "load" else ()
    return _LOADING[phases[0]], sum(rank.read_bytes for rank in ranks), sum(rank.all_bytes for rank in ranks)


class Steps:
    """Reports the progress of a request: every finished step once, however often it is resumed."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._reported = 0

    def notice(self, statuses: Mapping[int, RankStatus]) -> None:
        if 0 in statuses and (step := statuses[0].step) is not None:
            self._notify(step - 1)

    def finish(self) -> None:
        self._notify(self._steps)

    def _notify(self, finished: int) -> None:
        while self._reported < min(finished, self._steps):
            self._reported += 1
            self._progress(self._reported, self._steps)


class Delays:
    """Notifies, once per step, which rank the others have been waiting for: it is slow, or hangs."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._reported: set[tuple[int, int | None]] = set()

    def notice(self, statuses: Mapping[int, RankStatus]) -> None:
        watch = Watch()
        for status in statuses.values():
            watch.hear(status)
        if (fault := watch.awaited()) is None:
            return
        place = fault.rank, statuses[fault.rank].step
        if place not in self._reported:
            self._reported.add(place)
            self._notify(f"rank {fault.rank} is awaited: {fault.what}")
