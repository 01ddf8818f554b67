"""Requests one after the other, in the order in which they came.

One thread at a time drives the queue. It is the caller's own where it waits for its request and nobody else is at work:
a program with one thread stays one, its callbacks come on that thread, and Ctrl-C ends the wait for the ranks itself.
Otherwise it is a thread of the queue's, which then stays until the queue is closed: processes that it started may be
bound to it (Linux: prctl, PR_SET_PDEATHSIG).

Under torchrun there is no such thread. Every rank runs the same program, and what the ranks do has to come in the same
order on all of them; only the programs' own order is. Whoever waits for a result drives the queue up to it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.request_run import RequestRun
from crossdock.runtime.errors import EngineClosedError


class RequestQueue:
    """`execute` runs a request and sets its outcome; it raises only what interrupts the thread."""

    def __init__(self, execute: Callable[[RequestRun], None], threaded: bool) -> None:
        self._execute = execute
        self._threaded = threaded
        self._ids = count(1)
        self._changed = threading.Condition()
        self._waiting: deque[RequestRun] = deque()
        self._driver: threading.Thread | None = None
        self._server: threading.Thread | None = None
        self._current: RequestRun | None = None
        self._closed: str | None = None  # why

    @property
    def current(self) -> RequestRun | None:
        """The request under way."""
        return self._current

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def submit(self, run: RequestRun) -> None:
        with self._changed:
            self._enter(run)
            self._hand_over()

    def perform(self, run: RequestRun) -> Generation:
        """Submit and wait."""
        try:
            with self._changed:
                self._enter(run)
                first = not self._threaded or len(self._waiting) == 1  # Ctrl-C here is not for requests before it
                if drives := first and self._driver is None:
                    self._driver = threading.current_thread()
            if drives:
                self._drive(run)
        finally:
            self._leave()
        return self.wait(run)

    def wait(self, run: RequestRun, timeout_s: float | None = None) -> Generation:
        if self._driver is threading.current_thread() and not run.outcome.done():
            raise RuntimeError("a callback of a request waits for a request: it would wait for itself")
        while not self._threaded and not run.outcome.done():
            with self._changed:
                self._changed.wait_for(lambda: self._driver is None)
                self._driver = threading.current_thread()
            self._drive(run)
        return run.outcome.result(timeout_s)

    def withdraw(self, run: RequestRun) -> bool:
        """Whether it was still waiting; it then never begins. Not under torchrun, where the other ranks begin it."""
        with self._changed:
            if not self._threaded or run not in self._waiting:
                return False
            self._waiting.remove(run)
            return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No request is under way meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._driver is None)
            self._check_open()
            self._driver = threading.current_thread()
        try:
            yield
        finally:
            self._leave()

    def close(self, why: str) -> None:
        """End what waits, and refuse what comes; the request under way goes on. The first reason stays."""
        with self._changed:
            self._closed = self._closed or why
            ended, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for run in ended:
            run.outcome.set_exception(EngineClosedError(self._closed))

    def join(self, timeout_s: float) -> bool:
        """Wait until nobody else is at work; False: somebody still is."""
        others = (None, threading.current_thread())
        with self._changed:
            return self._changed.wait_for(lambda: self._driver in others, timeout_s)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineClosedError(self._closed)

    def _enter(self, run: RequestRun) -> None:
        self._check_open()
        run.id = next(self._ids)
        self._waiting.append(run)

    def _drive(self, until: RequestRun | None = None) -> None:
        try:
            while (run := self._next(until)) is not None:
                self._execute(run)
        finally:
            self._leave()

    def _next(self, until: RequestRun | None) -> RequestRun | None:
        with self._changed:
            over = until is not None and until.outcome.done()
            self._current = self._waiting.popleft() if self._waiting and not over else None
            return self._current

    def _leave(self) -> None:
        with self._changed:
            if self._driver is threading.current_thread():
                self._driver = self._current = None
                self._hand_over()

    def _hand_over(self) -> None:
        if self._threaded and self._waiting and self._server is None:
            server = threading.Thread(target=self._serve, name="crossdock requests", daemon=True)
            server.start()
            self._server = server
        self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._waiting and self._driver is None))
                if self._closed:
                    return
                self._driver = threading.current_thread()
            self._drive()
