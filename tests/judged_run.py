"""A load and its requests, which a coordinator judges, with faults planted on a rank meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from faults_in_weights import Plant
from one_rank import rank_request

from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.result import CompositionError, Violation
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.request import RankRequest
from reference import PROMPT

STEPS = 4
REQUEST = rank_request(PROMPT, steps=STEPS, height=64, width=64)
TIMEOUT_S = 120.0


def with_fault(plant: Plant | None, rank: int, at: int) -> Callable[[RankWorker, RankRequest], RankResult]:
    """A request with the fault planted on one rank meanwhile."""

    def run(worker: Any, request: RankRequest, *resume: Any) -> RankResult:
        import pytest

        worker.undo = []
        with pytest.MonkeyPatch.context() as patch:
            if plant is not None and worker.rank == rank:
                plant(worker, patch, at)
            return worker.generate(request, *resume)

    return run


def _undo(worker: Any) -> None:
    """When all ranks are done: some may look at memory that they share."""
    for undo in reversed(worker.undo):
        undo()


class HereGang:
    """One rank, in this process."""

    def __init__(self) -> None:
        self.worker = RankWorker(0, 1, torch.device("cpu"))

    def collective_rpc(self, work: Any, *args: Any, timeout_s: float) -> list[Any]:
        return [work(self.worker, *args)]


class Run:
    """A load, and requests that are judged."""

    def __init__(self, plan: RunPlan, gang: Any, all_rows: bool = False) -> None:
        self.gang, self.coordinator = gang, Coordinator(plan)
        self.coordinator.admit(self.ask(RankWorker.setup, plan, False, False, all_rows), rehearsed=False)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:  # else the ranks may be anywhere, and the error is what is to be seen
            self.ask(RankWorker.teardown)

    def ask(self, *work: Any) -> list[Any]:
        found: list[Any] = self.gang.collective_rpc(*work, timeout_s=TIMEOUT_S)
        return found

    def judged(
        self, plant: Plant | None = None, rank: int = 0, at: int = 0, request: RankRequest = REQUEST
    ) -> tuple[list[Violation], int]:
        """The violations of a request, and how many steps it had."""
        results: Sequence[RankResult] = self.ask(with_fault(plant, rank, at), request)
        self.ask(_undo)
        steps = {len(result.seen.steps) for result in results}
        assert len(steps) == 1
        try:
            self.coordinator.review(results)
        except CompositionError as error:
            return list(error.violations), steps.pop()
        assert any(result.media for result in results)
        return [], steps.pop()
