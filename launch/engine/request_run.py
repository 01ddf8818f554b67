"""A request from `submit` to its end: all that is known of it, and what its caller has in hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Preview, Progress
from crossdock.launch.engine.recovery import Survived
from crossdock.runtime.request import GenerateRequest


class RequestRun:
    """
    Attributes:
        id: by order of submission, from 1; the queue gives it.
        number: of the round under way, by which the ranks know it; 0: none has begun.
        told: the number of the round that a rank was asked to stop.
        preview: gets the latents of steps that are done.
        steps: of all rounds. `finished_steps`: how many of them are done.
    """

    def __init__(
        self, request: GenerateRequest, steps: int, progress: Progress | None, preview: Preview | None = None
    ) -> None:
        self.id = 0
        self.request = request
        self.steps = steps
        self.finished_steps = 0
        self.number = self.told = 0
        self.survived = Survived()
        self.preview = preview
        self.outcome: Future[Generation] = Future()
        self._progress = progress
        self._lock = threading.Lock()
        self._stop_reason: str | None = None

    @property
    def stop_reason(self) -> str | None:
        """Why it is to be stopped; whoever has written `number` before it looks misses no cancel of that round."""
        with self._lock:
            return self._stop_reason

    def ask_to_stop(self, reason: str) -> None:
        """The first reason counts."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason

    def end_step(self, step: int, of: int) -> None:
        """Of the round under way; every step once."""
        self.finished_steps += 1
        if self._progress is not None:
            self._progress(step, of)


class RequestHandle:
    """A request that was submitted. For any thread, but where torchrun starts the ranks: see `Engine.submit`."""

    def __init__(
        self,
        run: RequestRun,
        wait: Callable[[RequestRun, float | None], Generation],
        cancel: Callable[[RequestRun, str], None],
    ) -> None:
        self._run = run
        self._wait = wait
        self._cancel = cancel

    @property
    def id(self) -> int:
        return self._run.id

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._run.outcome.done()

    @property
    def progress(self) -> tuple[int, int]:
        """Finished steps, and all steps."""
        return self._run.finished_steps, self._run.steps

    def result(self, timeout_s: float | None = None) -> Generation:
        """
        Raises:
            TimeoutError: there is none after `timeout_s`; the request goes on.
            CrossdockError: what `generate` raises.
        """
        return self._wait(self._run, timeout_s)

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop this request at the end of its step, or before it begins; its result is then RequestCancelled.

        One that is done stays as it is.
        """
        self._cancel(self._run, reason)
