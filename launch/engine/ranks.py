"""The ranks with the model on them: started, admitted, asked, replaced when some are lost, and ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from crossdock.launch.engine.progress import Notify, Waiting, loading
from crossdock.launch.engine.recovery import (
    Fault,
    Survived,
    advice,
    brief,
    budget_text,
    restart,
    with_less_memory,
)
from crossdock.launch.hub.locate import fetch_here
from crossdock.launch.hub.names import name_of_snapshot
from crossdock.launch.hub.progress import FETCH_S
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.errors import CrossdockError, EncodingRefused, RankError, RequestRefused
from crossdock.runtime.pipeline.snapshot import Snapshot
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.probe.probe import probe_numbers, probe_request
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.reports.records import RankReport
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import RankRequest
from crossdock.runtime.watch.faults import AGREED
from crossdock.runtime.watch.gang import Gang, Notice


class Ranks:
    """For one thread at a time, but for `end`.

    Attributes:
        gone: why they were given up; None: they were not.
        ending: no more are to be started.
        replacing: others are being started in the place of some.
        phases: seconds of the last start.
    """

    def __init__(
        self,
        plan: RunPlan,
        gang: Gang,
        owns_gang: bool,
        notify: Notify,
        thorough: bool = False,
        rehearses: bool = False,
        waiting: Waiting | None = None,
    ) -> None:
        """
        Args:
            thorough: every byte that arrives is compared, not a sample.
            rehearses: what arrives is compared before the first step, not in it.
        """
        self.gang = gang
        self.notify = notify
        self.coordinator = Coordinator(plan)
        self.phases = {"launch": 0.0, "load": 0.0, "verify": 0.0}
        self.gone: str | None = None
        self.ending = self.replacing = False
        self._owns_gang = owns_gang
        self._how = thorough, rehearses
        self._waiting = waiting
        self._again = False  # after a fault: all that arrives is compared
        self._idle = False  # the ranks wait for work: nobody was interrupted in the middle of it

    @property
    def plan(self) -> RunPlan:
        """What the ranks hold now."""
        return self.coordinator.plan

    def start(self, survived: Survived) -> None:
        try:
            began = time.perf_counter()
            if self._owns_gang:
                self.gang.start()
            self.phases["launch"] = time.perf_counter() - began
            self._load()
        except RankError as error:
            self.replace(error, 1, survived)

    def generate(self, request: RankRequest, start: tuple[Snapshot, ...] | None, notice: Notice) -> list[RankResult]:
        """One attempt at a round of pictures.

        Raises:
            RequestCancelled: it was stopped; the ranks wait for work.
            RequestRefused: the pipeline does not take it; likewise.
            RankError: `replace` may be tried.
            CrossdockError: the ranks are given up.
        """
        timeouts = self.plan.config.launch.timeouts
        timeout_s = (request.asked.time_limit_s or timeouts.request_s) - request.spent_s + timeouts.collective_s
        self._idle = False
        try:
            results = self.gang.collective_rpc(RankWorker.generate, request, start, timeout_s=timeout_s, notice=notice)
            self.coordinator.review(results)
        except AGREED:
            self._idle = True
            raise
        except RankError:
            raise
        except CrossdockError as error:
            self._give_up(error)  # the other ranks may hang in a collective
            raise
        self._idle = True
        if refused := [result.refused for result in results if result.refused is not None]:
            raise RequestRefused(f"{self.plan.layout.spec.pipeline} refuses to decode this: {refused[0]}")
        return results

    def probe(self) -> None:
        """See `Engine.probe`."""
        request, timeout_s = probe_request(self.plan.layout), self.plan.config.launch.timeouts.request_s
        self._idle = False
        try:
            probes = self.gang.collective_rpc(probe_numbers, request, timeout_s=timeout_s)
        except CrossdockError as error:
            self._give_up(error)
            raise
        self._idle = True
        self.coordinator.compare(probes)

    def renew(self) -> None:
        """New ranks, where somebody was interrupted while these worked: they may still be at it."""
        if not self._idle and self.gang.can_restart:
            try:
                restart(self.gang, self._load, 1, lambda error: None)
            except BaseException as error:
                self._give_up(error)
                raise

    def replace(
        self, error: RankError, attempt: int, survived: Survived, resumed_after: int = 0, lost_s: float = 0.0
    ) -> None:
        """New ranks with the model, after `error` ended attempt number `attempt`.

        Raises:
            RankError: there have been enough attempts, or memory ran out and cannot be saved; they are given up.
        """
        self._idle, self.replacing = False, True
        began = time.perf_counter()
        remedy, meanwhile = "new ranks", list[RankError]()

        def lost_again(error: RankError) -> None:
            meanwhile.append(error)
            if error.kind == "memory":
                self._save_memory(error, survived)

        attempts = self.plan.config.launch.recovery.retries - attempt + 1
        try:
            if error.kind == "memory":
                remedy = self._save_memory(error, survived)
            if attempts < 1 or error.kind == "late" or not self.gang.can_restart or self.ending:
                raise error
            self.notify(f"{brief(error)}; remedy: {remedy}")
            self._again = True
            restart(self.gang, self._load, attempts, lost_again)
        except BaseException as fatal:
            self._give_up(fatal)
            raise
        finally:
            self.replacing = False
        recovery_s = time.perf_counter() - began
        again = tuple(map(str, meanwhile))
        fault = Fault(error.rank, error.kind, str(error), resumed_after, lost_s, recovery_s, remedy, again)
        survived.faults.append(fault)

    def end(self) -> None:
        """Give the model up, where the ranks can be asked to, and end those that are the engine's own."""
        self.ending = True
        if self._idle or not self._owns_gang:
            try:
                self.gang.collective_rpc(RankWorker.teardown, timeout_s=self.plan.config.launch.timeouts.launch_s)
            except CrossdockError:  # a rank hangs or is gone: the gang is of no use to its owner either
                self.gang.close()
        if self._owns_gang:
            self.gang.close()

    def _load(self) -> None:
        began = time.perf_counter()
        model_dir = self.plan.layout.model_dir
        if self.plan.config.launch.ray_address is not None and name_of_snapshot(model_dir):  # there may be other nodes
            self.gang.collective_rpc(fetch_here, model_dir, self.plan.config.single_files, timeout_s=FETCH_S)
        if self.plan.config.offload.is_relative:
            self._plan_again(self.plan.plain)
        try:
            reports = self._set_up()
        except EncodingRefused as found:
            self._plan_again(found.plain)
            reports = self._set_up()
        loaded = time.perf_counter()
        self._idle = True
        self.coordinator.admit(reports, self._how[1])
        self.phases |= {"load": loaded - began, "verify": time.perf_counter() - loaded}

    def _plan_again(self, plain: Mapping[str, frozenset[str]]) -> None:
        """With what only the ranks know: the memory of their devices, and what is not to be encoded."""
        config, layout, device_bytes = self.plan.config, self.plan.layout, None
        if config.offload.is_relative:
            timeout_s = config.launch.timeouts.launch_s
            device_bytes = min(self.gang.collective_rpc(RankWorker.device_bytes, timeout_s=timeout_s))
        self.coordinator = Coordinator(make_plan(config, layout.model_dir, layout.device, device_bytes, plain))

    def _set_up(self) -> list[RankReport]:
        setup = RankWorker.setup, self.plan, *self._how, self._again
        heard: dict[str, Any] = {"notice": self._hear} if self._waiting is not None else {}
        return self.gang.collective_rpc(*setup, timeout_s=self.plan.config.launch.timeouts.load_s, **heard)

    def _hear(self, statuses: Mapping[int, RankStatus]) -> None:
        if self._waiting is not None and (known := loading(statuses)) is not None:
            self._waiting(*known)

    def _give_up(self, error: BaseException) -> None:
        self.gone = self.gone or brief(str(error)) or type(error).__name__
        self.gang.close()

    def _save_memory(self, error: RankError, survived: Survived) -> str:
        """Lower the budget, once; says from what to what."""
        plan = None if survived.budget_lowered else with_less_memory(self.plan)
        if plan is None:
            raise RankError(error.rank, f"{error.message}; {advice(self.plan)}", "memory")
        survived.budget_lowered = True
        remedy = f"device budget lowered from {budget_text(self.plan)} to {budget_text(plan)}"
        self.coordinator = Coordinator(plan)
        return remedy
