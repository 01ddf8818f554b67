"""Costs read off a trace, and what the ranks make of them: figures that can be told in advance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from crossdock.offload.schedule.residency import Costs
from crossdock.offload.schedule.slots import slot_sizes
from crossdock.offload.stream.measured_costs import measured_costs, slowest
from crossdock.offload.stream.trace import EventKind, TraceEvent
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.reschedule import RankObservation, observe, reschedule

Fact = tuple[float, EventKind, str, int]


def _trace(facts: Iterable[Fact]) -> list[TraceEvent]:
    return [
        TraceEvent(number, kind, name, None, at_s, nbytes) for number, (at_s, kind, name, nbytes) in enumerate(facts)
    ]


def _passes(*lasting: tuple[float, float], wait_s: float = 0.5, between_s: float = 0.25) -> list[Fact]:
    """Passes over blocks a and b, which compute for so long; every block waits, and something runs behind it."""
    facts: list[Fact] = []
    now = 0.0
    for seconds in lasting:
        for name, compute_s in zip("ab", seconds, strict=True):
            facts += [(now, "wait_begin", name, 0), (now + wait_s, "compute_begin", name, 0)]
            facts += [(now + wait_s + compute_s, "compute_end", name, 0)]
            now += wait_s + compute_s + between_s
    return facts


LOADS: list[Fact] = [(0.0, "load_begin", "a", 100), (2.0, "load_end", "a", 0)]


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_the_quickest_pass_counts(slow: int) -> None:
    """A pass that warms up, or is disturbed, first, in the middle or last, would make every copy look hidden."""
    lasting = [(1.0, 2.0)] * 4
    lasting[slow] = (50.0, 60.0)
    costs = measured_costs(_trace([*LOADS, *_passes(*lasting)]), ["b", "a"], [30, 10])
    assert costs is not None
    assert costs.compute_s == pytest.approx((2.25, 1.25)), "up to the next block's wait, its own wait left out"


def test_what_runs_between_steps_hides_copies() -> None:
    """The last block of a step lasts until the first of the next asks: a scheduler, a collective, a decoder."""
    costs = measured_costs(_trace([*LOADS, *_passes((1.0, 1.0), (1.0, 1.0), between_s=7.0)]), ["a", "b"], [1, 1])
    assert costs is not None
    assert costs.compute_s == pytest.approx((8.0, 8.0))


def test_gathering_is_part_of_a_copy() -> None:
    """Pitfall 32: half of a block by copy, half by gather; the second half takes time on the link as well."""
    loads: list[Fact] = [
        (0.0, "load_begin", "a", 50),
        (1.0, "load_end", "a", 0),
        (1.0, "load_begin", "b", 150),  # on its own lane meanwhile
        (1.5, "gather_begin", "a", 50),
        (4.0, "load_end", "b", 0),
        (5.5, "gather_end", "a", 0),
        (6.0, "gather_begin", "b", 150),
        (18.0, "gather_end", "b", 0),
        (18.0, "load_begin", "a", 1_000_000),  # still under way: nobody knows how long it takes
    ]
    costs = measured_costs(_trace([*loads, *_passes((1.0, 1.0), (1.0, 1.0))]), ["a", "b"], [100, 300])
    assert costs is not None
    assert costs.copy_s == pytest.approx((5.0, 15.0))


def test_costs_that_were_not_seen_are_not_made_up() -> None:
    """A block that never ran, a last one that nothing followed, a run without copies: no costs, not zeros."""
    both = _passes((1.0, 1.0), (1.0, 1.0))
    assert measured_costs(_trace([*LOADS, *both]), ["a", "b"], [1, 1]) is not None
    assert measured_costs(_trace([*LOADS, *both]), ["a", "c"], [1, 1]) is None
    assert measured_costs(_trace([*LOADS, *_passes((1.0, 1.0))]), ["a", "b"], [1, 1]) is None
    assert measured_costs(_trace(both), ["a", "b"], [1, 1]) is None
    assert measured_costs(_trace([*LOADS[:1], *both]), ["a", "b"], [1, 1]) is None


def test_a_step_waits_for_the_slowest_rank() -> None:
    """Block by block and lane by lane: no one rank is the slowest in all."""
    ranks = [Costs((1.0, 5.0), (4.0, 2.0)), Costs((3.0, 2.0), (1.0, 6.0)), Costs((2.0, 2.0), (2.0, 2.0))]
    assert slowest(ranks) == Costs((3.0, 5.0), (4.0, 6.0))


# -- what is made of them -------------------------------------------------------------------------------------------


def _plan(directory: Path, budget: str | None = None, prefetch: int = 1) -> RunPlan:
    config = RunConfig.parse({"offload": {"layerwise": True, "prefetch": prefetch, "device_budget": budget}})
    return make_plan(config, directory, "cpu", device_bytes=2**33)


def _seen(plan: RunPlan, spare: int, copy_s: float = 2.0) -> RankObservation:
    count = len(plan.memory.order)
    return RankObservation(plan.memory.order, Costs((1.0,) * count, (copy_s,) * count), spare)


def test_auto_takes_what_is_spare_on_every_rank(flux2_dir: Path) -> None:
    """The memory of the fullest rank bounds all: the others would have room for blocks that it has not."""
    plan = _plan(flux2_dir, "auto")
    assert plan.memory.arena_bytes is not None
    small, large = 2**20, 2**30
    alone = reschedule(plan.memory, plan.config.offload, [_seen(plan, small)], 2).memory
    both = reschedule(plan.memory, plan.config.offload, [_seen(plan, large), _seen(plan, small)], 2).memory
    assert alone is not None
    assert both is not None
    assert both == alone
    assert alone.arena_bytes == plan.memory.arena_bytes + small
    assert alone.residency.device_bytes <= alone.arena_bytes
    assert alone.budget_bytes is not None
    assert alone.blocks_budget_bytes == alone.arena_bytes
    everything = reschedule(plan.memory, plan.config.offload, [_seen(plan, large)], 2).memory
    assert everything is not None
    assert len(everything.resident) == len(everything.blocks), "and it takes no more than all blocks"
    all_blocks = sum(block.layout.slot_bytes for block in plan.memory.blocks)
    assert everything.arena_bytes == max(plan.memory.arena_bytes, all_blocks)


def test_ranks_that_disagree_change_nothing(flux2_dir: Path) -> None:
    """What would pay on one rank is left when another ran the blocks in another order, or could not tell."""
    plan = _plan(flux2_dir, "auto")
    seen = _seen(plan, 2**20)
    assert reschedule(plan.memory, plan.config.offload, [seen, seen], 2).memory is not None
    for other in (None, replace(seen, order=seen.order[::-1])):
        for ranks in ([seen, other], [other, seen]):
            found = reschedule(plan.memory, plan.config.offload, ranks, 2)
            assert found.memory is None
            assert "one order" in found.schedule_note


def test_slots_of_another_order_fit_its_blocks(flux2_dir: Path) -> None:
    """Sizes in the order of the plan, costs in the order of the run: the slots would not be as planned."""
    plan = _plan(flux2_dir, prefetch=2)
    seen = _seen(plan, 0)
    sizes = [block.layout.slot_bytes for block in plan.memory.blocks]
    slots = plan.memory.schedule.slots
    largest_first = sorted(plan.memory.order, key=lambda index: -sizes[index])
    by_slot = sorted(range(len(slots)), key=lambda place: slots[place])
    sharing = tuple(index for _, index in sorted(zip(by_slot, largest_first, strict=True)))  # large ones share slots
    assert sum(slot_sizes([sizes[index] for index in sharing], slots)) < sum(slot_sizes(sizes, slots))
    for order in (plan.memory.order[::-1], sharing):
        found = reschedule(plan.memory, plan.config.offload, [replace(seen, order=order)], 2).memory
        assert found is not None
        assert found.order == order
        places = [block.slot for block in found.streamed if block.slot is not None]
        held = sum(slot_sizes([block.layout.slot_bytes for block in found.streamed], places))
        held += sum(found.blocks[index].layout.slot_bytes for index in found.resident)
        assert held == found.residency.device_bytes


def test_only_auto_takes_spare_memory(flux2_dir: Path) -> None:
    """A budget that somebody has set is a promise, however much the device has left."""
    for budget in (None, "100MiB", 0.5):
        plan = _plan(flux2_dir, budget)  # type: ignore[arg-type]
        found = reschedule(plan.memory, plan.config.offload, [_seen(plan, 2**40)], 2).memory
        for after in [found] if found is not None else []:
            assert (after.arena_bytes, after.budget_bytes) == (plan.memory.arena_bytes, plan.memory.budget_bytes)


def test_auto_uses_spare_memory_even_where_nothing_is_exposed(flux2_dir: Path) -> None:
    """Copies that compute hides still load the link; memory that lies idle costs nothing."""
    plan = _plan(flux2_dir, "auto")
    found = reschedule(plan.memory, plan.config.offload, [_seen(plan, 2**20, copy_s=0.001)], 2)
    assert found.memory is not None
    assert len(found.memory.resident) > len(plan.memory.resident)
    assert reschedule(plan.memory, plan.config.offload, [_seen(plan, 0, copy_s=0.001)], 2).memory is None


def test_the_blocks_are_observed_in_the_order_of_the_run(flux2_dir: Path) -> None:
    """Costs that are read in another order than the slots are given in belong to other blocks."""
    plan = _plan(flux2_dir)
    order = plan.memory.order[::-1]
    names = [block.name for block in plan.memory.blocks]
    facts: list[Fact] = [(0.0, "load_begin", names[0], 1000), (1.0, "load_end", names[0], 0)]
    now = 1.0
    for index in (*order, order[0]):
        facts += [(now, "wait_begin", names[index], 0), (now, "compute_begin", names[index], 0)]
        now += 1.0 + index
    seen = observe(plan.memory, order, _trace(facts), 77)
    assert seen is not None
    assert (seen.order, seen.spare_bytes) == (order, 77)
    assert seen.costs.compute_s == pytest.approx([1.0 + index for index in order])
    assert seen.costs.copy_s == pytest.approx([plan.memory.blocks[index].layout.slot_bytes * 1e-3 for index in order])
    assert observe(plan.memory, None, _trace(facts), 77) is None
