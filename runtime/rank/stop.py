"""Stopping a request between two steps: somebody cancelled it, its time is up, its picture would be wrong, or its
pipeline does not take it.

No rank stops alone, for the others would wait for it in a collective. At every step's end the ranks tell each other
where they are and whether they were asked to stop, and all of them act on the same answer.
"""

from __future__ import annotations

import threading
import time
from enum import IntEnum
from typing import NoReturn

import torch

from crossdock.parallel.group import Group, exchange
from crossdock.runtime.errors import RankError, RequestCancelled, RequestRefused, RequestTimeout
from crossdock.runtime.request import RankRequest


class _StopReason(IntEnum):
    """Why a rank would stop; the greatest of all ranks' reasons is what happens."""

    NONE = 0
    TIMED_OUT = 1
    CANCEL = 2
    REFUSE = 3
    UNFIT = 4


class StepRefusedError(Exception):
    """What ranks report of this step will be refused: no other may follow. Never leaves a rank."""


class Stopping:
    """One rank's side of the agreement. `cancel` may be called from any thread, at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[int, str] = {}  # request number -> reason
        self._number = 0
        self._limit_s: float | None = None
        self._began = time.monotonic()
        self._group: Group | None = None

    def meet(self, world: Group | None) -> None:
        """The ranks that have to agree; None: this one is alone."""
        self._group = world

    def cancel(self, reason: str, number: int) -> None:
        """Ask request `number` to stop; one that is over is not affected, one to come ends with its first step."""
        with self._lock:
            self._asked.setdefault(number, reason)

    def begin(self, request: RankRequest) -> None:
        """A request begins: its time runs, and what was asked of earlier ones is forgotten."""
        self._limit_s, self._began = request.asked.time_limit_s, time.monotonic() - request.spent_s
        with self._lock:
            self._number = request.number
            self._asked = {number: reason for number, reason in self._asked.items() if number >= request.number}

    def end(self) -> None:
        """The request is over; a cancel for it that comes now is too late."""
        with self._lock:
            self._asked.pop(self._number, None)

    def refuse(self, text: str, replicas: int) -> NoReturn:
        """The pipeline does not take the request: `text` says why. The others hear it when their step ends, or before
        the first one begins. Collective over the world.

        Raises:
            RequestRefused: so, on all ranks.
            RankError: on others of its replica, the pipeline takes it. Likewise.
        """
        self._heed_refusals(self._gather([self._number, 0, 0, _StopReason.UNFIT, 0, 0]), text, replicas)
        raise AssertionError("this rank has refused")

    def begin_steps(self, replicas: int) -> None:
        """Before the first step: blocks may be shared with ranks that refuse. Collective; raises what `refuse` does."""
        self._heed_refusals(self._gather([self._number, 0, 0, _StopReason.NONE, 0, 0]), "", replicas)

    def agree(
        self,
        finished: int,
        total: int,
        refuse: bool = False,
        state: tuple[int, int] = (0, 0),
        parts: tuple[int, int] = (1, 1),
    ) -> None:
        """At the end of step `finished` of `total`. Collective over the world.

        Args:
            refuse: what this rank will report of the step is no good.
            state: checksums of what the ranks of a part have alike.
            parts: for each, how many parts the world has; their ranks are neighbours.

        Raises:
            StepRefusedError: some rank refuses, or those of a part differ. On all ranks, at the same step.
            RequestCancelled: a rank was asked to stop. On all ranks, at the same step.
            RequestTimeout: on some rank the request has taken longer than its time limit. Likewise.
            RequestRefused: the pipeline of some replica does not take the request. Likewise.
            RankError: the ranks are not at the same step of the same request. Likewise.
        """
        own = _StopReason.REFUSE if refuse else self._stop_reason()
        rows = self._gather([self._number, total, finished, own, *state])
        self._heed_refusals(rows, "", parts[0])
        _check_in_step([(row[0], row[1], row[2]) for row in rows])
        stop_reasons = [row[3] for row in rows]
        for column, count in enumerate(parts, 4):
            size = max(len(rows) // count, 1)
            if any(row[column] != rows[rank // size * size][column] for rank, row in enumerate(rows)):
                raise StepRefusedError
        if max(stop_reasons) == _StopReason.NONE:
            return
        if max(stop_reasons) == _StopReason.REFUSE:
            raise StepRefusedError
        texts = exchange(self._text(own), self._group)
        text = texts[stop_reasons.index(max(stop_reasons))]
        raise (RequestCancelled if max(stop_reasons) == _StopReason.CANCEL else RequestTimeout)(text, finished)

    def _heed_refusals(self, rows: list[list[int]], text: str, replicas: int) -> None:
        """End the request where a rank refuses it; what not all ranks of its replica refuse is a fault of that rank."""
        refusing = [rank for rank, row in enumerate(rows) if row[3] == _StopReason.UNFIT]
        if not refusing:
            return
        texts, size = exchange(text, self._group), len(rows) // replicas
        for rank in refusing:
            if not set(refusing).issuperset(range(rank // size * size, (rank // size + 1) * size)):
                raise RankError(rank, f"its pipeline alone refuses the request: {texts[rank]}")
        raise RequestRefused(texts[refusing[0]])

    def _stop_reason(self) -> _StopReason:
        with self._lock:
            if self._number in self._asked:
                return _StopReason.CANCEL
        late = self._limit_s is not None and time.monotonic() - self._began > self._limit_s
        return _StopReason.TIMED_OUT if late else _StopReason.NONE

    def _text(self, reason: _StopReason) -> str:
        with self._lock:
            asked = reason is _StopReason.CANCEL
            return self._asked[self._number] if asked else f"the time limit is {self._limit_s or 0:g} s"

    def _gather(self, row: list[int]) -> list[list[int]]:
        """Every rank's row, by rank. On the CPU and the world's own group, apart from the activations."""
        if self._group is None:
            return [row]
        rows = torch.empty(self._group.size * len(row), dtype=torch.int64)
        self._group.all_gather(rows, torch.tensor(row, dtype=torch.int64))
        found: list[list[int]] = rows.view(self._group.size, len(row)).tolist()
        return found


def _check_in_step(places: list[tuple[int, int, int]]) -> None:
    """`places`: by rank, request number, steps of the request, finished steps."""
    if len(set(places)) == 1:
        return
    usual = max(places, key=places.count)
    other = next(rank for rank, place in enumerate(places) if place != usual)
    where = "; ".join(
        f"rank {rank}: step {finished} of {total} of request {number}"
        for rank, (number, total, finished) in enumerate(places)
    )
    raise RankError(other, f"is not at the same step as the others ({where}); all ranks have to run the same request")
