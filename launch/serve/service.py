"""What answers a server's requests: an engine that is started beside it, and started again when it is lost."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Notify, Preview, Progress
from crossdock.launch.serve.batch_limit import BatchLimit
from crossdock.launch.serve.scheduler import DrainingError, Running
from crossdock.runtime.errors import UserError
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import check_request
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import GenerateRequest

State = Literal["starting", "ready", "recovering", "failed", "closed"]
STARTS = 3
"""How often an engine that does not come up is started before it is given up."""
AGAIN_S = 5.0
"""Between two such starts."""


class Service(ABC):
    """
    Args:
        most: pictures that a replica of the layout computes at once, at most.

    Attributes:
        failed: why nothing is answered any more; None: it is, or will be.
        lanes: how many batches run at a time.
    """

    lanes = 1

    def __init__(self, plan: RunPlan, most: int) -> None:
        self.plan = plan
        self.failed: Exception | None = None
        self._ended = threading.Event()
        self._limit = BatchLimit(most if plan.layout.spec.batches else 1, plan.layout.device == "cuda")
        self._held: dict[str, list[Mapping[str, Any]]] = {}  # by engine: its ranks' rows of the last report

    @property
    def state(self) -> State:
        """ "ready": requests are answered at once."""
        if self._ended.is_set():
            return "closed"
        return "failed" if self.failed is not None else self._state()

    @abstractmethod
    def _state(self) -> State:
        """While it is neither closed nor given up."""

    @abstractmethod
    def begin(self, request: GenerateRequest, progress: Progress, preview: Preview | None) -> Running:
        """Submit it; waits until somebody can take it.

        Raises:
            DrainingError: nobody will.
        """

    @abstractmethod
    def close(self, timeout_s: float = 60.0) -> None:
        """End all ranks."""

    @abstractmethod
    def statuses(self) -> Mapping[str, Mapping[int, RankStatus]]:
        """By engine, what was heard last of the ranks of those that work."""

    def check(self, request: GenerateRequest) -> None:
        """
        Raises:
            RequestError: the model cannot do this.
        """
        check_request(self.plan, replace(request, batch_size=1))

    def fits(self, request: GenerateRequest) -> int:
        """How many pictures like these are computed at once, on all replicas of the layout together."""
        return self._limit.of(request) * self.plan.layout.mesh.dp

    def batched(self, request: GenerateRequest) -> GenerateRequest:
        """The same, with as many pictures at once as one replica of the layout computes."""
        at_once = min(-(-len(request.items) // self.plan.layout.mesh.dp), self._limit.of(request))
        return replace(request, batch_size=at_once)

    def learn_from(self, asked: GenerateRequest, made: Generation) -> None:
        """What it took."""
        rows = made.report["ranks"]
        self._held[made.report.get("replica", "")] = rows
        self._limit.learn(self.batched(asked), rows)

    def ranks(self) -> list[dict[str, Any]]:
        """What each does, as it was heard last, and what it held in the last request; `replica`: whose it is."""
        heard, held = self.statuses(), dict(self._held)
        return [
            _row(replica, rank, heard.get(replica, {}).get(rank), _of_rank(held.get(replica, ()), rank))
            for replica in sorted({*heard, *held} or {""})
            for rank in range(self.plan.layout.mesh.world_size)
        ]


def _of_rank(rows: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any]:
    return next((row for row in rows if row["rank"] == rank), {})


def _row(replica: str, rank: int, heard: RankStatus | None, held: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "replica": replica,
        "rank": rank,
        "phase": "idle" if heard is None else heard.phase,
        "step": None if heard is None else heard.step,
        "weight_bytes": held.get("peak_weight_bytes"),
        "slot_bytes": held.get("slot_bytes"),
        "shard_bytes": held.get("shard_bytes"),
        "device_bytes": held.get("peak_device_bytes"),
        "host_bytes": held.get("host_pss_bytes"),
    }


class OwnEngine(Service):
    """One engine, in this process.

    Args:
        start: a new engine; it may raise.
    """

    def __init__(self, plan: RunPlan, start: Callable[[Notify], Engine], most: int, notify: Notify) -> None:
        super().__init__(plan, most)
        self._start, self._notify = start, notify
        self._engine: Engine | None = None
        self._starts = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep, name="crossdock engine", daemon=True)
        self._thread.start()

    def _state(self) -> State:
        engine = self._engine
        if engine is None:
            return "starting" if self._starts < 1 else "recovering"
        return "recovering" if engine.recovering else "ready"

    def begin(self, request: GenerateRequest, progress: Progress, preview: Preview | None) -> Running:
        return self._ready_engine().submit(self.batched(request), progress, preview)

    def statuses(self) -> Mapping[str, Mapping[int, RankStatus]]:
        engine = self._engine
        return {} if engine is None or not engine.working else {"": engine.statuses}

    def close(self, timeout_s: float = 60.0) -> None:
        """On the thread that started it."""
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
                raise DrainingError
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
