"""What is told while a request runs: its steps, and a rank that the others wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.watch import Watch

Progress = Callable[[int, int], None]
"""Called with (finished steps, all steps)."""
Tell = Callable[[str], None]
"""Gets a line for the user."""


class Steps:
    """Tells every finished step of a request once, however often it is resumed."""

    def __init__(self, progress: Progress | None, steps: int) -> None:
        self._progress = progress
        self._steps = steps
        self._told = 0

    def notice(self, statuses: Mapping[int, RankStatus]) -> None:
        if 0 in statuses and (step := statuses[0].step) is not None:
            self._tell(step - 1)

    def finish(self) -> None:
        self._tell(self._steps)

    def _tell(self, finished: int) -> None:
        while self._told < min(finished, self._steps):
            self._told += 1
            if self._progress is not None:
                self._progress(self._told, self._steps)


class Delays:
    """Tells, once per step, which rank the others have been waiting for: it is slow, or hangs."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told: set[tuple[int, int | None]] = set()

    def notice(self, statuses: Mapping[int, RankStatus]) -> None:
        watch = Watch()
        for status in statuses.values():
            watch.hear(status)
        if (fault := watch.awaited()) is None:
            return
        place = fault.rank, statuses[fault.rank].step
        if place not in self._told:
            self._told.add(place)
            self._tell(f"rank {fault.rank} is awaited: {fault.what}")
