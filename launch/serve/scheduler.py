"""Requests of many clients, answered in order; those that fit together share a batch.

A thread for each batch that runs at a time: one, or one for each replica. A client's request is a `Work`: it is
cancelled, retried and answered by itself, whoever shares its batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from torch import Tensor

from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Preview, Progress
from crossdock.runtime.errors import CrossdockError, RequestCancelled, RequestError
from crossdock.runtime.reports.media import Media
from crossdock.runtime.request import GenerateRequest

TRIES = 2
"""A request that fails so often fails for good; from the second time on it runs alone."""
FIRST_STEP_S = 1.0
"""What a step is taken to last before one was measured."""
_NEWEST = 0.5
"""How much the newest measurement of a step's time counts."""


class QueueFullError(CrossdockError):
    """No more requests may wait. `retry_after_s`: when there may be room."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(limit, retry_after_s)
        self.limit = limit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.limit} requests wait already; try again in {self.retry_after_s:.0f} s"


class DrainingError(CrossdockError):
    """The server is on its way out."""

    def __str__(self) -> str:
        return "the server is shutting down and takes no more requests"


class Running(Protocol):
    """An engine's request under way."""

    def result(self) -> Generation: ...

    def cancel(self, reason: str = "cancelled") -> None: ...

    @property
    def progress(self) -> tuple[int, int]: ...


Begin = Callable[[GenerateRequest, Progress, Preview | None], Running]
"""Submits a request to an engine that is ready."""
Fits = Callable[[GenerateRequest], int]
"""How many pictures like these one batch may have on all replicas together."""


@dataclass(eq=False)
class Work:
    """What one client asked for.

    Attributes:
        request: one item for each picture or video.
        outcome: what was made, in the order of the items.
        progress: (finished steps, all steps) of the batch in which it runs.
        began: on `time.monotonic`; None: it waits.
        batch: the number of the last batch that it was in, and of its first picture there, from 0.
        previewed: somebody wants previews.
        preview: a finished step and its latents, of this work's pictures `[pictures, ...]`.
    """

    request: GenerateRequest
    outcome: Future[list[Media]] = field(default_factory=Future)
    progress: tuple[int, int] = (0, 0)
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None
    batch: tuple[int, int] | None = None
    tries: int = 0
    cancelled: str | None = None
    previewed: bool = False
    preview: tuple[int, Tensor] | None = None

    @property
    def kind(self) -> GenerateRequest:
        """Works of one kind may share a batch: all is alike but prompts, negative prompts and seeds."""
        first = self.request.items[0]
        negative = None if first.negative_prompt is None else ""
        return replace(self.request, items=(replace(first, prompt="", negative_prompt=negative, seed=0),))

    @property
    def queued_s(self) -> float:
        return (self.began or time.monotonic()) - self.arrived


@dataclass(eq=False)
class _Batch:
    """Works that run together. `running`: None until the engine has taken them."""

    works: list[Work]
    running: Running | None = None


class Scheduler:
    """
    Args:
        begin: starts a batch; where it raises, or its result does, the batch has failed.
        limit: how many works may wait.
        wait_s: how long the first of a batch waits for others to join.
        observe: gets every work that has ended.
        learn: gets what a batch was asked for, and what it has made.
        lanes: how many batches run at a time.
    """

    def __init__(
        self,
        begin: Begin,
        fits: Fits,
        limit: int,
        wait_s: float = 0.0,
        observe: Callable[[Work], None] = lambda work: None,
        learn: Callable[[GenerateRequest, Generation], None] = lambda asked, made: None,
        lanes: int = 1,
    ) -> None:
        self._learn = learn
        self._begin, self._fits, self._limit, self._wait_s, self._observe = begin, fits, limit, wait_s, observe
        self._waiting: deque[Work] = deque()
        self._batches: list[_Batch] = []
        self._number = 0  # of the last batch
        self._step_s: dict[GenerateRequest, float] = {}  # of a kind of work, per step
        self._changed = threading.Condition()
        self._draining = self._closed = False
        lane = partial(threading.Thread, target=self._serve, daemon=True)
        self._lanes = [lane(name=f"crossdock serve {number}") for number in range(lanes)]
        for thread in self._lanes:
            thread.start()

    # -- for any thread ------------------------------------------------------------------------------------------

    def submit(self, work: Work) -> Work:
        """
        Raises:
            QueueFullError, DrainingError.
        """
        with self._changed:
            if self._draining:
                raise DrainingError
            if len(self._waiting) >= self._limit:
                raise QueueFullError(self._limit, max(1.0, self._next_s() or self._step_time(work)))
            self._waiting.append(work)
            self._changed.notify_all()
        return work

    def put_back(self, works: Sequence[Work]) -> None:
        """Those that were taken before wait again, before all others; there is always room for them."""
        with self._changed:
            self._waiting.extendleft(reversed(works))
            self._changed.notify_all()

    def cancel(self, work: Work, reason: str) -> None:
        """End this work at the end of the step that runs; others of its batch go on."""
        with self._changed:
            work.cancelled = work.cancelled or reason
            batch = next((batch for batch in self._batches if work in batch.works), None)
            alone = batch is not None and all(other.cancelled for other in batch.works)
            running = batch.running if batch is not None and alone else None
            if work in self._waiting:
                self._waiting.remove(work)
            self._changed.notify_all()
        if running is not None:
            running.cancel(reason)
        elif not alone:
            self._end(work, RequestCancelled(reason, work.progress[0]))

    def position(self, work: Work) -> int:
        """How many works are before it; 0: it runs, or is done."""
        with self._changed:
            return self._waiting.index(work) + 1 if work in self._waiting else 0

    def expected_s(self, work: Work) -> float:
        """Until it is done, from what steps took so far."""
        with self._changed:
            before = list(self._waiting)
            own = next((batch for batch in self._batches if work in batch.works), None)
            if own is not None:
                return self._left_s(own)
            before = before[: before.index(work)] if work in before else []
            return self._next_s() + sum(map(self._work_s, before)) / len(self._lanes) + self._work_s(work)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many works are in the batches that run."""
        with self._changed:
            return sum(len(batch.works) for batch in self._batches)

    @property
    def draining(self) -> bool:
        """It takes no more."""
        return self._draining

    def drain(self) -> None:
        """Take no more; what waits is still answered."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._batches, timeout_s)

    def close(self, timeout_s: float) -> None:
        """End everything with the step that runs."""
        with self._changed:
            self._draining = self._closed = True
            works = [*self._waiting, *(work for batch in self._batches for work in batch.works)]
            self._changed.notify_all()
        for work in works:
            self.cancel(work, "the server was shut down")
        until = time.monotonic() + timeout_s
        for lane in self._lanes:
            lane.join(max(until - time.monotonic(), 0))

    # -- the lanes' threads --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            if (batch := self._gather()) is not None:
                self._run(batch)

    def _gather(self) -> _Batch | None:
        """The first that waits, and those that fit in its batch; None: another lane has taken it."""
        with self._changed:
            if not self._waiting:
                return None
            first = self._waiting[0]
            most = max(1, self._fits(first.request)) if first.tries == 0 else 0
            until = first.arrived + self._wait_s
            while self._pictures(self._alike(first, most)) < most and first in self._waiting and not self._draining:
                if not self._changed.wait(max(until - time.monotonic(), 0)):
                    break
            if first not in self._waiting:
                return None
            batch = _Batch(self._alike(first, most))
            self._number, first_picture = self._number + 1, 0
            for work in batch.works:
                self._waiting.remove(work)
                work.began, work.batch = time.monotonic(), (self._number, first_picture)
                work.tries += 1
                first_picture += len(work.request.items)
            self._batches.append(batch)
            return batch

    def _alike(self, first: Work, most: int) -> list[Work]:
        batch, kind = [first], first.kind
        for work in self._waiting:
            fits = self._pictures([*batch, work]) <= most
            if work is not first and work.tries == 0 and work.kind == kind and fits:
                batch.append(work)
        return batch

    @staticmethod
    def _pictures(works: Iterable[Work]) -> int:
        return sum(len(work.request.items) for work in works)

    def _run(self, batch: _Batch) -> None:
        try:
            made = self._answer(batch)
        except Exception as error:
            self._leave(batch)
            self._failed(batch.works, error)
        else:
            self._leave(batch)
            for work in batch.works:
                self._end(work, made[: len(work.request.items)])
                made = made[len(work.request.items) :]

    def _leave(self, batch: _Batch) -> None:
        with self._changed:
            self._batches.remove(batch)
            self._changed.notify_all()

    def _answer(self, batch: _Batch) -> list[Media]:
        works, last = batch.works, time.perf_counter()
        kind = works[0].kind

        def end_step(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            for work in works:
                work.progress = (done, total) if batch.running is None else batch.running.progress
            with self._changed:
                known = self._step_s.get(kind, now - last)
                self._step_s[kind] = (1 - _NEWEST) * known + _NEWEST * (now - last)
            last = now

        asked = replace(works[0].request, items=tuple(item for work in works for item in work.request.items))
        preview = partial(_show, works) if any(work.previewed for work in works) else None
        running = self._begin(asked, end_step, preview)
        with self._changed:
            batch.running = running
            cancelled = all(work.cancelled for work in works)
        if cancelled:
            running.cancel(works[0].cancelled or "cancelled")
        made = running.result()
        self._learn(asked, made)
        return made.images

    def _failed(self, batch: list[Work], error: Exception) -> None:
        """What may have been another's fault, or the machine's, is tried once more, alone."""
        own = isinstance(error, (RequestCancelled, DrainingError)) or (
            isinstance(error, RequestError) and len(batch) == 1
        )
        ended = [work for work in batch if own or work.tries >= TRIES or work.cancelled or self._closed]
        again = [work for work in batch if work not in ended]
        for work in again:
            work.began, work.progress = None, (0, 0)
        self.put_back(again)
        for work in ended:
            self._end(work, error)

    def _end(self, work: Work, result: list[Media] | Exception) -> None:
        if work.cancelled and not isinstance(result, RequestCancelled):
            result = RequestCancelled(work.cancelled, work.progress[0])
        with suppress(InvalidStateError):  # it has ended before
            if isinstance(result, Exception):
                work.outcome.set_exception(result)
            else:
                work.outcome.set_result(result)
            self._observe(work)

    # -- times ---------------------------------------------------------------------------------------------------

    def _step_time(self, work: Work) -> float:
        known = self._step_s
        return known.get(work.kind, max(known.values(), default=FIRST_STEP_S))

    def _work_s(self, work: Work) -> float:
        return self._step_time(work) * work.request.steps

    def _next_s(self) -> float:
        """Until the next batch can begin."""
        busy = len(self._batches) >= len(self._lanes)
        return min(map(self._left_s, self._batches), default=0.0) if busy else 0.0

    def _left_s(self, batch: _Batch) -> float:
        first = batch.works[0]
        return self._step_time(first) * (first.request.steps - first.progress[0])


def _show(batch: Sequence[Work], step: int, latents: Tensor) -> None:
    """Of the one round that a batch is. A work alone that takes several rounds gets none of the later ones."""
    first = 0
    for work in batch:
        last = first + len(work.request.items)
        if last <= len(latents):
            work.preview = step, latents[first:last]
        first = last
