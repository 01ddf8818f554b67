"""Waiting for what all ranks return, while they are asked what they are doing: the same for every gang of processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from crossdock.runtime.errors import CrossdockError, RankError
from crossdock.runtime.watch.faults import AGREED, first_cause, is_conclusive
from crossdock.runtime.watch.gang import Notice
from crossdock.runtime.watch.watch import EXPLAIN_S, SILENT_S, SUSPECT_S, Watch, different_collective

POLL_S = 0.1
ASK_EVERY_S = 0.25
LAST_WORDS_S = 1.0
"""How long those that are left may take to say what a rank that died had issued."""


F = TypeVar("F")


class Ranks(Protocol[F]):
    """How a gang reaches its ranks. A future, `F`, is whatever it makes of a question to one."""

    world_size: int

    def wait(self, futures: Sequence[F], timeout_s: float) -> Sequence[F]:
        """Those that are done, as soon as all are, or when the time is up."""

    def result(self, future: F, rank: int) -> Any:
        """Of a future that is done. Raises a CrossdockError: what the rank raised, or that it died."""

    def ask_status(self, rank: int) -> F:
        """A future `RankStatus`."""

    def stopped(self, rank: int, silent: set[int]) -> str | None:
        """Where its process is, if that is stopped; ranks that are not `silent` may be asked."""


def await_results(
    ranks: Ranks[F], futures: Sequence[F], deadline: float, watcher: Watcher[F] | None = None
) -> list[Any]:
    """All results, of ranks 0, 1, ... The first failure that explains itself ends the wait: others may hang in a
    collective. `deadline` of `time.monotonic`.
    """
    results: dict[int, Any] = {}
    errors: dict[int, CrossdockError] = {}
    pending = {future: rank for rank, future in enumerate(futures)}
    while pending and not any(map(is_conclusive, errors.values())) and time.monotonic() < deadline:
        for future in ranks.wait(list(pending), POLL_S):
            rank = pending.pop(future)
            try:
                results[rank] = ranks.result(future, rank)
            except CrossdockError as error:
                errors[rank] = error
                deadline = min(deadline, time.monotonic() + EXPLAIN_S)
            else:
                if watcher is not None:
                    watcher.end(rank)
        if watcher is not None and pending:
            watcher.poll()
            if not errors and (fault := watcher.fault()) is not None:
                errors[fault.rank] = fault
    if pending and all(isinstance(error, AGREED) for error in errors.values()):
        late = min(pending.values())
        errors = {late: RankError(late, "was not done in time; see launch.timeouts", "late")}
    if errors:
        raise first_cause(errors) if watcher is None else watcher.explain(first_cause(errors))
    if watcher is not None:
        watcher.poll(patience_s=POLL_S)  # the steps since the last question
    return [results[rank] for rank in range(len(futures))]


class Watcher(Generic[F]):
    """Asks every rank what it is doing, one question at a time each."""

    def __init__(self, ranks: Ranks[F], notice: Notice | None = None) -> None:
        self.watch = Watch()
        self._ranks = ranks
        self._notice = notice
        self._questions: dict[F, int] = {}
        self._asked_at: dict[int, float] = {}
        self._over: set[int] = set()  # their results are in
        self._final: set[F] = set()  # questions that were asked since
        self._next = 0.0

    def end(self, rank: int) -> None:
        """Its result is in; the watch is told when it has also been heard since."""
        self._over.add(rank)

    def poll(self, patience_s: float = 0) -> None:
        now = time.monotonic()
        if now >= self._next or patience_s:
            self._next = now + ASK_EVERY_S
            for rank in range(self._ranks.world_size):
                if rank not in self._questions.values():
                    question = self._ranks.ask_status(rank)
                    self._questions[question] = rank
                    self._asked_at[rank] = now
                    if rank in self._over:
                        self._final.add(question)
        done = self._ranks.wait(list(self._questions), patience_s)
        for question in done:
            rank = self._questions.pop(question)
            with contextlib.suppress(Exception):  # a dead rank's call says so
                self.watch.hear(self._ranks.result(question, rank))
                if question in self._final:
                    self.watch.end(rank)
        if done and self._notice is not None:
            self._notice(self.watch.statuses)

    def fault(self) -> RankError | None:
        """A rank that is stopped or silent, or what the collectives tell."""
        now = time.monotonic()
        for rank in self._questions.values():
            silent_s = now - self._asked_at[rank]
            if silent_s > SUSPECT_S and (where := self._ranks.stopped(rank, set(self._questions.values()))):
                return RankError(rank, f"its process {where} is stopped", "stopped")
            if rank in self.watch.statuses and silent_s > SILENT_S:
                return RankError(rank, f"has not answered for {silent_s:.0f} s", "silent")
        fault = self.watch.fault()
        return None if fault is None else RankError(fault.rank, fault.what, "collectives")

    def explain(self, error: CrossdockError) -> CrossdockError:
        """With where the rank was, and what the others wait for."""
        if not isinstance(error, RankError) or error.kind == "collectives":
            return error
        with contextlib.suppress(Exception):
            for _ in range(2):  # the answers to open questions may be from before
                self.poll(patience_s=ASK_EVERY_S if error.kind == "cut off" else LAST_WORDS_S)
        if error.kind in ("cut off", "died") and (fault := different_collective(self.watch.statuses)) is not None:
            return RankError(fault.rank, fault.what, "collectives")
        return self.watch.explain(error)
