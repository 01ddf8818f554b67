"""Rings of blocks in the same memory: one of them runs, and of the others nothing is brought meanwhile."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest

from crossdock.offload.memory.copy_engine import CopyEngine, CpuCopyEngine
from crossdock.offload.schedule.residency import assumed_costs, minimum_bytes, plan_residency
from crossdock.offload.schedule.shared_slots import place_sizes, shared_slots, usable_bytes
from crossdock.offload.schedule.slots import slot_sizes
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.run_order import RunOrder
from toy_blocks import Case, QueuedEngine, build, stalls

MIB = 2**20


def _split(choice: random.Random, count: int, equal: bool) -> list[list[int]]:
    """Two or three passes of all of `count` blocks, of one length or of any."""
    if equal:
        parts = choice.choice([parts for parts in (2, 3) if count % parts == 0])
        size = count // parts
        return [list(range(start, start + size)) for start in range(0, count, size)]
    cuts = sorted(choice.sample(range(1, count), choice.choice((1, 2))))
    return [list(range(start, stop)) for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]


# -- what is planned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_every_ring_fits_in_the_same_memory(seed: int) -> None:
    """All slots together are no more than a pass alone may take, and no two blocks of a window share one."""
    choice = random.Random(seed)
    passes = _split(choice, 12, equal=seed % 2 == 0)
    nbytes = [choice.choice((3, 3, 5)) * MIB for _ in range(12)]
    sizes = place_sizes([[nbytes[index] for index in pass_] for pass_ in passes])
    prefetch = choice.randint(1, 3)
    least = minimum_bytes(sizes, (prefetch,))
    budget = least + int(choice.random() * (sum(sizes) - least))
    residency = plan_residency(sizes, assumed_costs(sizes), budget, (prefetch,))
    slots = shared_slots(residency, passes)
    assert sorted(slots) == list(range(12)), "a block without a slot would keep its memory"
    order = [index for pass_ in passes for index in pass_]
    held = slot_sizes([nbytes[index] for index in order], [slots[index] for index in order])
    assert sum(held) <= budget
    for pass_ in passes:
        staying = [index for place, index in enumerate(pass_) if place in residency.resident]
        passing = [index for index in pass_ if index not in staying]
        assert len({slots[index] for index in staying}) == len(staying)
        assert not {slots[index] for index in staying} & {slots[index] for index in passing}
        window = residency.schedule.prefetch + 1
        for start in range(len(passing) - window + 1):
            assert len({slots[index] for index in passing[start : start + window]}) == window


def test_memory_is_used_only_where_it_is_of_use() -> None:
    """One pass and a half: the half would lie idle; both at once: nothing has to come twice."""
    passes = [[3, 3, 3], [3, 4]]
    assert place_sizes(passes) == [3, 4, 3]
    assert [usable_bytes(passes, room) for room in (5, 10, 13, 15, 16, 99)] == [5, 10, 10, 10, 16, 16]
    assert [usable_bytes([[3, 3]], room) for room in (5, 6, 7)] == [5, 6, 6]


def test_each_ring_learns_its_own_order() -> None:
    """One pass says nothing of another, and prefetching never leaves a pass."""
    order = RunOrder(range(6), [[0, 1, 2], [3, 4, 5]])
    for index in (3, 5, 4):
        assert not order.learn(index)
    assert order.recorded is None
    assert order.learn(3), "the pass has closed, in another order"
    assert (order.recorded, order.order, order.rehearsal) == ((3, 5, 4), [0, 1, 2, 3, 5, 4], [0, 1, 2, 3, 5, 4])
    assert order.ahead(1, ()) == {0: (1,), 1: (2,), 2: (0,), 3: (5,), 5: (4,), 4: (3,)}
    order.learn(0)
    assert order.rehearsal == [3, 5, 4, 0, 1, 2], "what runs comes last"
    order.set([2, 1, 0, 5, 4, 3])
    assert [pass_.order for pass_ in order.passes] == [[2, 1, 0], [5, 4, 3]]


# -- what is streamed -----------------------------------------------------------------------------------------------


def _loaded(case: Case, since: int) -> list[str]:
    return [event.block for event in case.stream.trace() if event.sequence >= since and event.kind == "load_begin"]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_passes_take_turns(seed: int, queued: bool) -> None:
    """The same bits as without streaming, whoever's turn it is, and in order: also at the switch."""
    choice = random.Random(seed)
    homes = choice.choices([Home.HOST, Home.HOST_SHARD, Home.DEVICE_SHARD], k=12)
    passes = _split(choice, 12, equal=choice.random() < 0.5)
    delay = stalls(seed, 0.2)
    engine = cast(CopyEngine, QueuedEngine(delay)) if queued else CpuCopyEngine(60, delay)
    poison, budget = choice.random() < 0.5, choice.random()
    case = build(homes, choice.randint(1, 3), seed, engine, poison, budget=budget, passes=passes)
    for _ in range(12):
        number = choice.randrange(len(passes))
        if choice.random() < 0.7:
            case.stream.prepare(number)
        case.check(passes[number])
        if choice.random() < 0.2:
            case.stream.rehearse()
    case.finish()


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prefetch", [1, 2])
def test_of_a_ring_that_does_not_run_nothing_is_brought(prefetch: int, budget: float) -> None:
    """A pass brings what it streams itself, and what stays comes once in every turn."""
    passes = [list(range(8)), list(range(8, 16))]
    case = build([Home.HOST] * 16, prefetch, budget=budget, passes=passes)
    slots = [case.stream.slot_of(block.name) for block in case.stream.blocks]
    for turn in (0, 1, 0):
        names = [case.stream.blocks[index].name for index in passes[turn]]
        of_pass = [slots[index] for index in passes[turn]]
        passing = [name for name, slot in zip(names, of_pass, strict=True) if of_pass.count(slot) > 1]
        for number in range(3):
            case.stream.engine.drain()  # what is brought ahead is noted by the lanes
            since = case.stream.upcoming
            case.stream.prepare(turn)
            assert case.misses(passes[turn]) == 0, "known ahead, also at the switch"
            case.stream.engine.drain()
            found = _loaded(case, since)
            assert set(found) <= set(names), "of the other pass"
            if number == 0:
                assert set(found) == set(names)
            else:
                assert sorted(found) == sorted(passing), "each once, and nothing that stays"
    case.finish()


def test_what_comes_first_in_a_later_turn_is_looked_at_then() -> None:
    passes = [[0, 1, 2], [3, 4, 5]]
    case = build([Home.HOST] * 6, 1, budget=0.0, passes=passes)
    seen: list[Any] = []
    case.stream.observe_first_loads(lambda block, memory: seen.append(block.name))
    case.check(passes[0])
    case.check(passes[0])
    assert seen == ["blocks.0", "blocks.1", "blocks.2"]
    case.check(passes[1])
    assert seen[3:] == ["blocks.3", "blocks.4", "blocks.5"]
    case.finish()
