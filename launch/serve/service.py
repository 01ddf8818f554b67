"""The engine behind a server: started beside it, started again when it is lost, and what it can do at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.progress import Notify, Preview, Progress
from crossdock.launch.engine.request_run import RequestHandle
from crossdock.runtime.errors import EngineClosedError, UserError
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import check_request
from crossdock.runtime.request import GenerateRequest

State = Literal["starting", "ready", "recovering", "failed", "closed"]
STARTS = 3
"""How often an engine that does not come up is started before it is given up."""
AGAIN_S = 5.0
"""Between two such starts."""


class Service:
    """
    Args:
        start: a new engine; it may raise.
        most: pictures that a replica computes at once, at most.

    Attributes:
        failed: why there is no engine any more; None: there is one, or will be.
    """

    def __init__(self, plan: RunPlan, start: Callable[[Notify], Engine], most: int, notify: Notify) -> None:
        self.plan = plan
        self.failed: Exception | None = None
        self._start, self._most, self._notify = start, most if plan.layout.spec.batches else 1, notify
        self._engine: Engine | None = None
        self._starts = 0
        self._ended = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep, name="crossdock engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        if self._ended.is_set():
            return "closed"
        if self.failed is not None:
            return "failed"
        engine = self._engine
        if engine is None:
            return "starting" if self._starts < 1 else "recovering"
        return "recovering" if engine.recovering else "ready"

    @property
    def engine(self) -> Engine | None:
        """None: there is none at present."""
        return self._engine

    def check(self, request: GenerateRequest) -> None:
        """
        Raises:
            RequestError: the model cannot do this.
        """
        check_request(self.plan, replace(request, batch_size=1))

    def fits(self, request: GenerateRequest) -> int:
        """How many pictures like these are computed at once, on all replicas of the layout together."""
        return self._most * self.plan.layout.mesh.dp

    def begin(self, request: GenerateRequest, progress: Progress, preview: Preview | None) -> RequestHandle:
        """Submit it to the engine; waits for one.

        Raises:
            EngineClosedError: there will be none.
        """
        at_once = min(-(-len(request.items) // self.plan.layout.mesh.dp), self._most)
        return self._ready_engine().submit(replace(request, batch_size=at_once), progress, preview)

    def close(self, timeout_s: float = 60.0) -> None:
        """End the engine, on the thread that started it."""
        self._ended.set()
        with self._changed:
            self._engine = None
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _ready_engine(self) -> Engine:
        with self._changed:
            if self._engine is not None and self._engine.closed:
                self._engine = None
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._engine or self.failed or self._ended.is_set())
            if self._engine is None:
                raise EngineClosedError(str(self.failed or "the server was shut down"))
            return self._engine

    def _keep(self) -> None:
        """Bring an engine up, and another one whenever that is gone."""
        failures = 0
        while not self._ended.is_set():
            try:
                engine = self._start(self._notify)
            except Exception as error:
                failures += 1
                self._notify(f"the engine did not come up: {error}")
                if isinstance(error, UserError) or failures >= STARTS:
                    self._fail(error)
                    return
                self._ended.wait(AGAIN_S)
                continue
            failures = 0
            with self._changed:
                self._engine, self._starts = engine, self._starts + 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._engine is None or self._ended.is_set())
            engine.close()

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self.failed = error
            self._changed.notify_all()
