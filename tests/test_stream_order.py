"""When a block stream loads: ahead of the pass, in the order that was seen, and out of the way of collectives."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crossdock.offload.memory.copy_engine import CpuCopyEngine, Event
from crossdock.offload.memory.layout import ALIGNMENT, aligned_bytes, round_up
from crossdock.offload.schedule.slots import assign_slots
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.loader import BlockLoader, EventLog
from crossdock.offload.stream.trace import block_times, step_times
from toy_blocks import STREAMED, BlockError, FailingEngine, build, nothing


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_no_misses_in_steady_state(prefetch: int, poison: bool, home: Home) -> None:
    """Pitfall 18: the wrap to the next step and the first step after the rehearsal must be prefetched too."""
    for count in (1, 2, 3, 4, 5, 7, 9, 13):
        case = build([home] * count, prefetch, count, poison=poison)
        case.stream.rehearse()
        alone = poison and count == 1  # nothing can be ahead of the only block
        found = [case.misses(range(count)) for _ in range(3)]
        assert found == [int(alone)] * 3, f"{count} blocks, prefetch {prefetch}"
        case.finish()


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_the_next_blocks_are_on_their_way(prefetch: int) -> None:
    """Pitfall 18: while a block computes, the `prefetch` next ones, over the wrap too, are on their way."""
    count = 13
    case = build([Home.HOST] * count, prefetch)
    case.check(range(count))
    for index, module in enumerate(case.modules):
        ahead: list[Tensor] = []

        def look(index: int = index, ahead: list[Tensor] = ahead) -> None:
            if ahead:
                return
            case.stream.engine.drain()
            for step in range(1, prefetch + 1):
                following = (index + step) % count
                whole = case.wholes[following]
                slot = case.stream.slot_of(f"blocks.{following}")
                assert slot is not None
                ahead.append(case.stream.slot_memory[slot][: whole.nbytes])
                assert torch.equal(ahead[-1], whole), f"block {following} is not there while {index} computes"

        module.pause = look
    case.check(range(count))
    case.finish()


def test_skips_and_reversal_are_misses_and_heal() -> None:
    """Pitfall 15: a cache skips a block, the next one's weights were never fetched. Right, counted, over."""
    count = 12
    case = build([Home.HOST] * count, 1)
    case.check(range(count))
    assert case.misses(range(count)) == 0
    assert case.misses([index for index in range(count) if index != 5]) == 1
    assert case.misses(range(count)) == 0
    assert case.misses(range(count - 1, -1, -1)) >= count - 2
    case.misses(range(count))
    assert case.misses(range(count)) == 0
    case.finish()


def test_misses_are_told_per_block_and_step() -> None:
    """A total alone does not say which block was not foreseen, nor when."""
    case = build([Home.HOST] * 9, 1)
    orders = [[*range(9)], [*range(9)], [0, 1, 2, 3, 5, 6, 7, 8], [8, *range(8)], [*range(9)]]
    ends, expected = [], []
    for order in orders:
        expected.append(case.misses(order))
        ends.append(case.stream.upcoming)
    case.stream.engine.drain()
    trace = case.stream.trace()
    assert [times.misses for times in step_times(trace, ends)] == expected
    assert expected[1:3] == [0, 1]
    of_blocks = {name: times.misses for name, times in block_times(trace).items()}
    assert sum(of_blocks.values()) == case.stream.counters.misses
    assert of_blocks["blocks.5"] == 1, "it ran when block 4 was foreseen"
    assert of_blocks["blocks.4"] == 0
    case.finish()


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4])
@pytest.mark.parametrize("each", [1, 2, 3, 5, 8])
def test_interleaved_stacks_are_prefetched_as_they_run(each: int, prefetch: int) -> None:
    """Some models alternate two block lists. Once that is recorded, only neighbours in one slot miss."""
    case = build([Home.HOST] * (2 * each), prefetch, poison=True)
    case.stream.rehearse()
    order = [stack * each + index for index in range(each) for stack in (0, 1)]
    first = case.misses(order)
    names = tuple(f"blocks.{index}" for index in order)
    slots = [case.stream.slot_of(name) for name in names]
    least = sum(slot == slots[place - 1] for place, slot in enumerate(slots))
    case.check(order)  # closes the recording: from here on the real order is prefetched
    assert case.stream.order == names
    assert [case.misses(order), case.misses(order)] == [least, least], f"{first} in the first pass"
    case.finish()


def test_a_rehearsal_is_not_taken_for_the_real_order() -> None:
    """The rehearsal runs the blocks as listed; if it were recorded, the model's own order never would be."""
    case = build([Home.HOST] * 8, 1)
    case.stream.rehearse()
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    case.check(order)
    case.check(order)
    assert case.stream.order[:2] in {("blocks.0", "blocks.7"), ("blocks.7", "blocks.6")}
    assert case.misses(order) == 0
    case.finish()


def test_copies_yield_to_collectives() -> None:
    """Pitfall 32: on a shared link, a prefetch runs between the collectives of a block, not through them."""
    case = build([Home.HOST] * 6, 1, seed=2)
    stream, pieces = case.stream, []
    stream._loader.yield_to_collectives = True
    move = stream.engine.move

    def spy(target: Tensor, source: Tensor) -> None:
        pieces.append(target.nbytes)
        move(target, source)

    stream.engine.move = spy  # type: ignore[method-assign]
    enqueued: list[list[int]] = []

    def collective() -> None:
        stream.engine.drain()
        enqueued[-1].append(sum(pieces))
        stream.collective_issued()

    for module in case.modules:
        module.collectives, module.on_collective = 3, collective
        module.register_forward_pre_hook(lambda *_: enqueued.append([]))
    for _ in range(3):
        case.check(range(6))
    for before in enqueued[-6:]:
        assert before[0] < before[1] < before[2], "nothing was held back"
        assert before[1] - before[0] < case.stream.blocks[0].layout.slot_bytes // 2 + ALIGNMENT
    case.finish()


def test_a_held_chunk_waits_for_the_collective() -> None:
    """Pitfall 32: a chunk that only the host sees behind the collective would run beside it on the device."""
    case = build([Home.HOST], 1)
    engine, (block,), done = CpuCopyEngine(60), case.stream.blocks, list[Event]()
    memory, late = aligned_bytes(block.layout.slot_bytes, torch.device("cpu")), threading.Event()
    collective = engine.submit("gather", lambda: late.wait(60) and None, ())
    engine.record = lambda: collective  # type: ignore[method-assign]
    loader = BlockLoader(engine, None, EventLog(engine, 100), yield_to_collectives=True)
    loader.load(block, memory, (), None, done.append, chunks=2)
    engine.wait(engine.submit("copy", nothing, ()))
    before = memory.clone()
    loader.release()
    time.sleep(0.05)
    assert torch.equal(memory, before)
    late.set()
    engine.wait(done[0])
    assert torch.equal(memory[: block.held_bytes], case.wholes[0])
    engine.close()
    case.finish()


def test_a_copy_fails_with_any_of_its_chunks() -> None:
    """A block whose first half did not arrive would compute with what was there before."""
    case = build([Home.HOST], 1)
    engine, (block,) = FailingEngine(), case.stream.blocks
    memory = aligned_bytes(block.layout.slot_bytes, torch.device("cpu"))
    for chunk in range(3):
        done: list[Event] = []
        loader = BlockLoader(engine, None, EventLog(engine, 100), yield_to_collectives=True)
        size = round_up(-(-block.layout.slot_bytes // 3), ALIGNMENT)
        engine.fail.add(case.wholes[0].data_ptr() + chunk * size)
        loader.load(block, memory, (), None, done.append, chunks=3)
        loader.flush()
        with pytest.raises(BlockError):
            engine.wait(done[0])
        assert not engine.fail
    engine.close()
    case.finish()


def test_other_slots_wait_for_loads_under_way() -> None:
    """A gather that is late would land in a block that came to that memory by the new schedule."""
    late = 5e-3

    def delay() -> None:
        if threading.current_thread().name == "crossdock-gather":
            time.sleep(late)

    case = build([Home.HOST_SHARD] * 6, 2, engine=CpuCopyEngine(60, delay))
    order = list(range(6))
    for _ in range(2):
        case.check(order)
        order = order[::-1]
        case.stream.reschedule(assign_slots(6, 2), [], order)
        late = 0.0 if late else 5e-3
        case.check(order)
        late = 5e-3
    case.finish()


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_no_copy_runs_further_ahead_than_asked(prefetch: int) -> None:
    """The schedule is chosen for `prefetch` blocks ahead; more of them would queue before what is needed first."""
    count = 13
    case = build([Home.HOST] * count, prefetch)
    for _ in range(3):
        case.check(range(count))
    case.stream.engine.drain()
    running = -1
    for event in case.stream.trace():
        running += event.kind == "wait_begin"
        if event.kind == "load_begin":
            ahead = (int(event.block.removeprefix("blocks.")) - running) % count
            assert ahead <= prefetch, f"{event.block} is loaded while {running % count} runs"
    case.finish()


def test_a_new_schedule_is_prefetched_in_its_own_order() -> None:
    """Pitfall 18: slots and look-ahead follow the order that was measured, at once and without another recording."""
    case = build([Home.HOST] * 9, 2)
    case.check(range(9))
    order = [0, 5, 1, 6, 2, 7, 3, 8, 4]
    case.stream.arena.resize(2 * case.stream.arena.nbytes)
    case.stream.reschedule(assign_slots(7, 2), [5, 2], order)
    names = [f"blocks.{index}" for index in order if index not in (5, 2)]
    assert case.stream.order == tuple(names)
    assert tuple(case.stream.slot_of(name) for name in names) == assign_slots(7, 2).slots
    assert set(case.stream.resident_memory) == {"blocks.5", "blocks.2"}
    case.stream.prepare()
    assert [case.misses(order) for _ in range(3)] == [0, 0, 0]
    case.finish()


def test_residents_are_asked_for_ahead() -> None:
    """After another component's turn a resident is loaded again: before it is needed, and only a few at a time."""
    case = build([Home.HOST] * 12, 1, resident=range(1, 10))
    case.check(range(12))
    case.stream.arena.evict(case.stream.arena.nbytes)
    case.stream.prepare()
    assert case.misses(range(12)) == 0
    case.stream.arena.evict(case.stream.arena.nbytes)
    before = case.stream.counters.h2d_bytes
    case.stream.prepare()
    asked = case.stream.counters.h2d_bytes - before
    assert asked > case.stream.blocks[0].layout.slot_bytes, "the first block alone"
    assert asked <= 4 * max(block.layout.slot_bytes for block in case.stream.blocks), "not the whole model at once"
    case.check(range(12))
    case.finish()


def test_copies_yield_to_gathers() -> None:
    """Pitfall 32: a gather has the shared link to itself; the next shard is copied behind it."""
    case = build([Home.HOST_SHARD] * 6, 2)
    loader = case.stream._loader
    loader.yield_to_collectives = True
    gather = case.group.gather()

    def slow(out: Tensor, shard: Tensor) -> None:
        time.sleep(2e-3)
        gather.all_gather(out, shard)

    loader._gather = replace(gather, all_gather=slow)
    for _ in range(3):
        case.check(range(6))
    case.stream.engine.drain()
    kinds = [event.kind for event in case.stream.trace() if event.kind.startswith(("load", "gather"))]
    assert kinds.count("gather_begin") >= 12
    assert kinds == ["load_begin", "load_end", "gather_begin", "gather_end"] * (len(kinds) // 4)
    case.finish()


def test_only_a_whole_pass_tells_the_order() -> None:
    """A pass that skips blocks, or is not over, must not be taken for the order of the run: slots depend on it."""
    whole, skipping = build([Home.HOST] * 5, 1), build([Home.HOST] * 5, 1)
    order = [0, 2, 1, 4, 3]
    for case, first in ((whole, order), (skipping, [0, 1, 3, 4])):
        case.stream.rehearse()
        assert case.stream.recorded_order is None
        case.check(first)
        assert case.stream.recorded_order is None
        case.check(order)
    assert whole.stream.recorded_order == tuple(order)
    assert skipping.stream.recorded_order is None
    whole.finish()
    skipping.finish()
