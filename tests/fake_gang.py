"""A gang of one rank that draws nothing, on the thread that calls; at a step's end it agrees as real ranks do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from crossdock.runtime.errors import RankError
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.stop import Stopping
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import GenerateRequest, RankRequest, RequestItem
from crossdock.runtime.watch.gang import Notice

LIMIT_S = 30.0
"""The longest wait of a test."""


@dataclass
class _Measurements:
    rank: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)


class FakeRank:
    """Its latents are the seeds, and its pictures the prompts; it stops as real ranks do."""

    def __init__(self, gang: FakeGang) -> None:
        self._gang = gang
        self._stopping = Stopping()

    def cancel(self, reason: str, number: int) -> None:
        self._stopping.cancel(reason, number)

    def generate(self, request: RankRequest, notice: Notice | None) -> Any:
        self._stopping.begin(request)
        steps = request.asked.steps
        for step in range(1, steps + 1):
            if notice is not None and not self._gang.quiet:
                notice({0: RankStatus(0, "", 0, "denoise", step)})
            self._gang.at_step(request, step)
            self._stopping.agree(step, steps)
        self._stopping.end()
        items = request.asked.items
        latents = torch.tensor([[float(item.seed)] for item in items])
        media = [self._gang.draw(item, request.asked) for item in items]
        return SimpleNamespace(
            rank=0,
            measurements=_Measurements(),
            timeline=None,
            schedule_note="",
            latents=latents,
            returned_latents=latents,
            media=media,
            refused=None,
        )


class FakeGang:
    """One rank, on the thread that calls."""

    world_size = 1
    can_restart = True
    own_rank: int | None = None

    def __init__(self) -> None:
        self.starts = 0
        self.closed = False
        self.ran: list[tuple[str, int]] = []  # prompt and seed of the first item of each round
        self.threads: set[int] = set()
        self.told: list[int] = []  # the ranks that were asked to stop
        self.gate = threading.Event()  # what a step waits for
        self.gate.set()
        self.entered = threading.Semaphore(0)  # released when a step begins
        self.faults: list[BaseException] = []  # raised by the next steps, one each
        self.deaf = False
        self.quiet = False  # nothing is heard of it meanwhile
        self.draw: Callable[[RequestItem, GenerateRequest], Any] = lambda item, asked: item.prompt
        self._rank = FakeRank(self)

    def begin(self, classes: object = ()) -> None:
        pass

    def start(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.starts += 1
        self.closed = False
        self._rank = FakeRank(self)

    def at_step(self, request: RankRequest, step: int) -> None:
        self.entered.release()
        deadline = time.monotonic() + LIMIT_S
        while not self.gate.wait(0.005) and not self.closed:
            assert time.monotonic() < deadline
        if self.closed:
            raise RankError(0, "its process died", "died")
        if self.faults:
            raise self.faults.pop()
        if step == 1:
            self.ran.append((request.asked.items[0].prompt, request.asked.items[0].seed))

    def collective_rpc(
        self, work: Callable[..., Any], *args: Any, timeout_s: float, notice: Notice | None = None
    ) -> list[Any]:
        self.threads.add(threading.get_ident())
        if self.closed:
            raise RankError(0, "this gang is closed; start a new engine", "died")
        return [self._rank.generate(args[0], notice)] if work is RankWorker.generate else []

    def rpc(self, rank: int, work: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        if self.deaf:
            raise RankError(rank, "does not answer", "silent")
        assert work is RankWorker.cancel
        self.told.append(rank)
        return self._rank.cancel(*args)

    def close(self) -> None:
        self.closed = True


class TrustingCoordinator:
    """A coordinator that finds nothing wrong."""

    composition: tuple[Any, ...] = ()

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan

    def admit(self, *_: Any) -> None:
        pass

    def review(self, results: list[Any]) -> None:
        pass
