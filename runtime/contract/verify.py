"""The composition contract, judged. Pure functions of the plan and the ranks' reports.

Every check has a function in a module beside this one; see the README for what each one promises.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from crossdock.offload.stream.trace import TraceEvent
from crossdock.runtime.contract.aliasing import no_alias
from crossdock.runtime.contract.collectives import Issued, same_collectives
from crossdock.runtime.contract.coverage import all_compared, all_equal, arrives, complete, same_bits
from crossdock.runtime.contract.ordering import (
    all_rehearsed,
    in_order,
    in_order_by_the_clock,
    same_schedule,
    trace_in_order,
)
from crossdock.runtime.contract.ownership import all_read, read_at_rest, single_owner
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.contract.steps import Saw, finite, same_order, same_state
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import MemorySpan, RankReport, RankTrace

CHECKS: dict[str, Callable[[RunPlan, Sequence[RankReport]], Iterable[Violation]]] = {
    "same-schedule": same_schedule,
    "single-owner": single_owner,
    "complete": complete,
    "same-bits": same_bits,
    "no-alias": no_alias,
    "in-order": in_order,
    "same-collectives": lambda plan, reports: same_collectives(plan.layout, reports),
}

STEP_CHECKS: dict[str, Callable[[RunPlan, Sequence[Saw]], Iterable[Violation]]] = {
    "arrives": arrives,
    "finite": lambda plan, results: finite(plan.layout, results),
    "same-state": lambda plan, results: same_state(plan.layout, results),
    "same-order": lambda plan, results: same_order(plan.layout, results),
}
"""What only steps can show."""

_REHEARSAL: tuple[Callable[[RunPlan, Sequence[RankReport]], Iterable[Violation]], ...] = (
    all_rehearsed,
    all_read,
    all_compared,
)
"""What a rehearsal must have shown, of in-order, single-owner and complete."""


def verify_composition(plan: RunPlan, reports: Sequence[RankReport], rehearsed: bool = True) -> list[Violation]:
    """Every violation of the contract before the first step; empty when offloading and sharding compose.

    Args:
        rehearsed: all blocks were streamed once; else `verify_arrivals` judges what arrives in the first request.
    """
    missing = set(range(plan.layout.mesh.world_size)) - {report.rank for report in reports}
    if missing:
        return [Violation("same-schedule", min(missing), "report", "one", "none", "a rank is missing; start again")]
    checks = (*CHECKS.values(), *(_REHEARSAL if rehearsed else ()))
    return [violation for check in checks for violation in check(plan, reports)]


def verify_arrivals(plan: RunPlan, reports: Sequence[RankReport]) -> list[Violation]:
    """Of `complete`, what a first request must have shown: all that arrived was compared with the file, and equal."""
    return [*all_compared(plan, reports), *all_equal(plan, reports)]


class Did(Issued, Saw, Protocol):
    """What a rank tells of a request."""

    @property
    def timeline(self) -> RankTrace: ...

    @property
    def scheduled_at(self) -> int: ...

    @property
    def read(self) -> Mapping[str, Sequence[MemorySpan]]: ...


def verify_request(
    plan: RunPlan, reports: Sequence[RankReport], results: Sequence[Did], before: MemoryPlan | None = None
) -> list[Violation]:
    """What the ranks did in a request: its steps, in-order, same-collectives, and of single-owner what was read.

    Args:
        reports: what the ranks held when they were admitted.
        before: what held until the schedule was changed in this request, where it was.
    """
    memory = plan.memory
    ordered = [violation for result in results for violation in _in_order(memory, before or memory, result)]
    homes = {report.rank: report.homes for report in reports}
    read = [v for result in results for v in read_at_rest(memory, result.rank, homes.get(result.rank, ()), result.read)]
    steps = [violation for check in STEP_CHECKS.values() for violation in check(plan, results)]
    return [*steps, *ordered, *read, *same_collectives(plan.layout, results)]


def _in_order(memory: MemoryPlan, before: MemoryPlan, result: Did) -> Iterator[Violation]:
    """Every step, under the schedule that held at the time. What was in the slots before has happened long ago, and may
    have been timed by another clock.
    """
    trace, timed = _at(result.trace, result.scheduled_at), _at(result.timeline.events, result.scheduled_at)
    for held, issued, happened in zip((before, memory), trace, timed, strict=True):
        yield from trace_in_order(held, result.rank, issued)
        yield from in_order_by_the_clock(held, result.rank, happened)


def _at(trace: Sequence[TraceEvent], scheduled_at: int) -> tuple[Sequence[TraceEvent], Sequence[TraceEvent]]:
    """The part under the schedule before, and that under the present one."""
    changed = bisect_left(trace, scheduled_at, key=lambda event: event.sequence)
    return trace[:changed], trace[changed:]
