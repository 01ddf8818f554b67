"""Improving the residency schedule once, between two steps, when the first steps have shown what blocks cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.schedule.residency import WORTHWHILE, Costs, plan_residency, steady_step_s
from crossdock.offload.schedule.shared_slots import usable_bytes
from crossdock.offload.stream.measured_costs import measured_costs, slowest
from crossdock.offload.stream.trace import TraceEvent
from crossdock.runtime.config.schema import OffloadConfig
from crossdock.runtime.plan.memory_plan import MemoryPlan

MEASURED_STEPS = 2
"""After this many steps of the first request the schedule is looked at again."""


@dataclass(frozen=True)
class RankObservation:
    """What one rank saw in the first steps.

    Attributes:
        order: indices of the blocks as they ran: of one transformer.
        costs: in that order.
        spare_bytes: device memory that is still free, with the activations at their peak.
    """

    order: tuple[int, ...]
    costs: Costs
    spare_bytes: int


@dataclass(frozen=True)
class Rescheduling:
    """A better schedule, or the reason why there is none."""

    memory: MemoryPlan | None
    schedule_note: str


def observe(
    memory: MemoryPlan, order: tuple[int, ...] | None, trace: Sequence[TraceEvent], spare: int
) -> RankObservation | None:
    """None when the blocks cannot be told an order or a cost: some did not run, or nothing was copied."""
    if order is None:
        return None
    names = [memory.blocks[index].name for index in order]
    costs = measured_costs(trace, names, memory.travel_sizes_of(order))
    return None if costs is None else RankObservation(order, costs, spare)


def reschedule(
    memory: MemoryPlan, offload: OffloadConfig, observations: Sequence[RankObservation | None], step: int
) -> Rescheduling:
    """The same decision on every rank, from what all of them saw."""
    seen = [observation for observation in observations if observation is not None]
    if len(seen) < len(observations) or len({observation.order for observation in seen}) > 1:
        return Rescheduling(None, f"kept after step {step}: the blocks did not all run in one order")
    order, costs = seen[0].order, slowest([observation.costs for observation in seen])
    pass_ = next(pass_ for pass_ in memory.passes if set(pass_) == set(order))
    if any(memory.slot_sizes_of(other) != memory.slot_sizes_of(pass_) for other in memory.passes):
        return Rescheduling(None, f"kept after step {step}: the transformers' blocks differ in size")
    wider = _with_spare(memory, offload, min(observation.spare_bytes for observation in seen))
    sizes = memory.slot_sizes_of(order)
    places = [pass_.index(index) for index in order]  # the transformers are of one class, and run alike
    passes = tuple(tuple(other[place] for place in places) for other in memory.passes)
    travel_sizes = memory.travel_sizes_of(order)
    better = plan_residency(sizes, costs, wider.blocks_budget_bytes, offload.depths, travel_sizes)
    changed = wider.scheduled(better, passes)
    if order != pass_:
        return Rescheduling(changed, f"improved after step {step}: slots in the order of the run")
    current_s = steady_step_s(costs, memory.residency.resident, memory.residency.schedule)
    change = f"{current_s * 1e3:.1f} -> {better.step_s * 1e3:.1f} ms of blocks per step"
    frees_the_link = wider is not memory and better.step_s <= current_s
    if better.step_s > current_s * (1 - WORTHWHILE) and not frees_the_link:
        return Rescheduling(None, f"kept after step {step}: {change} does not pay")
    return Rescheduling(changed, f"improved after step {step}: {change}")


def _with_spare(memory: MemoryPlan, offload: OffloadConfig, spare_bytes: int) -> MemoryPlan:
    """`auto`: the blocks may also take what the first steps left free."""
    if offload.device_budget != "auto" or memory.arena_bytes is None or spare_bytes == 0:
        return memory
    passes = [memory.slot_sizes_of(pass_) for pass_ in memory.passes]
    room = memory.arena_bytes - memory.staging_bytes + spare_bytes
    arena = max(memory.arena_bytes, usable_bytes(passes, room) + memory.staging_bytes)
    return replace(memory, arena_bytes=arena, budget_bytes=memory.outside_bytes + ALIGNMENT + arena)
