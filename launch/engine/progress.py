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
Notify = Callable[[str], None]
"""Gets a line for the user."""


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
