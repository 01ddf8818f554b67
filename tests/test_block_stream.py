"""The block stream against the resident run, bit for bit, in hundreds of random cases on two copy engines.

`CpuCopyEngine` computes synchronously. `QueuedEngine` also queues the compute, as CUDA does: the host runs
ahead, and a load that does not wait for the last reader of its slot overwrites weights still to be read.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from toy_codec import PACKED

from crossdock.offload.codecs.codec import IDENTITY
from crossdock.offload.memory.copy_engine import CopyEngine, CpuCopyEngine, Event
from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, aligned_bytes
from crossdock.offload.schedule.residency import assumed_costs, minimum_bytes, plan_residency
from crossdock.offload.schedule.slots import assign_slots
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from tiers import how_many, not_quick
from toy_blocks import (
    STREAMED,
    BlockError,
    Case,
    FailingEngine,
    ImmediateEngine,
    QueuedEngine,
    Toy,
    build,
    nothing,
    run,
    stalls,
)


def _random_homes(choice: random.Random, most: int) -> list[Home]:
    kinds = choice.sample(list(Home), choice.randint(1, 3))
    return choice.choices(kinds, k=choice.randint(1, most))


def _random_order(choice: random.Random, count: int) -> list[int]:
    """A pass: mostly all blocks in order; else with skips, repeats, reversed, shuffled or one half."""
    order = list(range(count))
    match choice.randrange(8):
        case 0:
            return [index for index in order if choice.random() < 0.7] or order[:1]
        case 1:
            return [index for index in order for _ in range(choice.choice((1, 1, 1, 2, 3)))]
        case 2:
            return order[::-1]
        case 3:
            return choice.sample(order, count)
        case 4:
            return order[: count // 2 + 1] if choice.random() < 0.5 else order[count // 2 :]
        case _:
            return order


def _tensors(modules: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    """Every name's tensor, tied ones under each name."""
    model = nn.ModuleList(modules)
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _addresses(modules: Sequence[nn.Module]) -> list[tuple[str, int, int]]:
    return [(name, id(tensor), tensor.data_ptr()) for name, tensor in _tensors(modules)]


# -- random cases ------------------------------------------------------------------------------------------


def _stress(seed: int) -> None:
    choice = random.Random(seed)
    homes = _random_homes(choice, choice.choice((3, 8, 8, 40)))
    delay = stalls(seed, choice.choice((0, 0, 0.2)))
    engine: Any = ImmediateEngine(delay) if choice.random() < 0.3 else FailingEngine(delay)
    budget = choice.random() if len(homes) <= 8 and choice.random() < 0.3 else None
    resident = _random_residents(choice, homes) if budget is None else []
    prefetch, poison, codec = choice.randint(1, 4), choice.random() < 0.5, (IDENTITY, PACKED)[seed % 2]
    case = build(homes, prefetch, seed, engine, poison, resident, budget=budget, codec=codec)
    for module in case.modules:
        module.pause = stalls(seed, choice.choice((0, 0, 0.2)))
    if choice.random() < 0.5:
        case.stream.rehearse()
    addresses = _addresses(case.modules)
    fails = choice.random() < 0.2 and any(home.streamed for home in homes)
    if fails:
        _lose(case.stream)
        victim_index = choice.choice([index for index, home in enumerate(homes) if home.streamed])
        _arm(engine, case, victim_index, choice.random())
    errors = 0

    def check(order: Sequence[int]) -> None:
        """Right, or once the error of the load that was made to fail; then right."""
        nonlocal errors
        try:
            case.check(order)
        except BlockError:
            errors += 1
            assert fails
            assert errors == 1
            case.check(order)

    for _ in range(choice.randint(2, 4)):
        order = _random_order(choice, len(homes))
        if choice.random() < 0.3:
            victim = case.modules[choice.choice(order)]
            victim.fail_at, victim.error = choice.randrange(3), choice.choice((BlockError, KeyboardInterrupt))
            with pytest.raises((victim.error, BlockError)) as caught:
                run(case.modules, order)
            victim.fail_at = None
            errors += "at point" not in str(caught.value)
            assert errors <= fails
        else:
            check(order)
        if choice.random() < 0.2:
            _reschedule_at_random(choice, case.stream, homes)
            addresses = _addresses(case.modules)
    check(range(len(homes)))
    assert _addresses(case.modules) == addresses, "a parameter was rebound"
    case.finish(in_order=not fails)


def _random_residents(choice: random.Random, homes: Sequence[Home]) -> list[int]:
    streamable = [index for index, home in enumerate(homes) if home.streamed]
    return sorted(choice.sample(streamable, choice.choice((0, len(streamable) // 3, len(streamable)))))


def _reschedule_at_random(choice: random.Random, stream: BlockStream, homes: Sequence[Home]) -> None:
    """Other residents, another order, another depth: what rescheduling between two steps may ask for."""
    order = [index for index, home in enumerate(homes) if home.streamed]
    choice.shuffle(order)
    budget = choice.randint(0, stream.arena.nbytes - stream._table.staging_bytes)
    sizes = [stream.blocks[index].layout.slot_bytes for index in order]
    depth = choice.randint(1, 3)
    if budget >= minimum_bytes(sizes, (depth,)):
        residency = plan_residency(sizes, assumed_costs(sizes), budget, (depth,))
        stream.reschedule(residency.schedule, [order[place] for place in residency.resident], order)


@pytest.mark.parametrize("chunk", range(how_many(1, 1, 20)))
def test_random_cases_equal_the_resident_run(chunk: int) -> None:
    """Pitfalls 3, 15, 16, 17 and 21, in up to 2,000 cases: sizes, skipped blocks, odd counts, exceptions anywhere."""
    for seed in range(chunk * 100, chunk * 100 + 100):
        try:
            _stress(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")


@not_quick
@pytest.mark.parametrize("chunk", range(how_many(1, 1, 10)))
def test_random_cases_with_queued_compute(chunk: int) -> None:
    """On CUDA the host runs ahead of the compute: a load must wait for the slot's last reader. 600 cases."""
    for seed in range(10_000 + chunk * 60, 10_060 + chunk * 60):
        choice = random.Random(seed)
        homes = _random_homes(choice, choice.choice((4, 20)))
        engine = QueuedEngine(stalls(seed, choice.choice((0.05, 0.3))))
        resident = _random_residents(choice, homes)
        prefetch, poison, codec = choice.randint(1, 4), choice.random() < 0.5, (IDENTITY, PACKED)[seed % 2]
        case = build(homes, prefetch, seed, cast(CopyEngine, engine), poison, resident, codec=codec)
        order = [index for _ in range(2) for index in _random_order(choice, len(homes))]
        if choice.random() < 0.2:  # as on CUDA: it cannot be enqueued, while compute is still under way
            engine.submits_to_failure = choice.randrange(2 * len(homes))
            with suppress(BlockError):
                run(case.modules, order)
            engine.submits_to_failure = None
        try:
            case.check(order)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")
        case.finish()


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("count", range(1, 10))
def test_slow_compute_with_queued_engine(count: int, home: Home) -> None:
    """Every reader later than every load: what is overwritten too early is always seen, not by chance."""
    engine = QueuedEngine(nothing)
    case = build([home] * count, 1 + count % 2, count, cast(CopyEngine, engine))
    for module in case.modules:
        module.pause = lambda: time.sleep(3e-4)
    case.check([*range(count)] * 2)
    case.finish()


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_device_bytes_stay_within_the_window(prefetch: int, home: Home) -> None:
    """Pitfall 1: an offload that frees nothing. Distinct storages behind all parameters and buffers count."""
    case = build([home] * 25, prefetch)
    case.check(range(25))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for _, t in _tensors(case.modules)}
    held = sum(storage.nbytes() for storage in storages.values())
    largest = max(block.layout.slot_bytes for block in case.stream.blocks)
    assert held <= (prefetch + 2) * largest + ALIGNMENT
    assert len(storages) == 1
    case.finish()


@pytest.mark.parametrize("home", STREAMED)
def test_a_changed_source_changes_the_output(home: Home) -> None:
    """Pitfall 1: weights that come from somewhere else than the bytes that are said to be streamed."""
    case = build([home] * 9, 2)
    case.check(range(9))
    before = run(case.modules, range(9))
    case.wholes[4].fill_(0xFF)
    if home.sharded:
        case.stream.blocks[4].source.copy_(case.group.shard_of(case.wholes[4]))
    after = run(case.modules, range(9))
    assert bool(before.isfinite().all())
    assert bool(after.isnan().any())
    case.finish()


@pytest.mark.parametrize("home", STREAMED)
def test_freed_slots_are_poisoned(home: Home) -> None:
    """`poison_freed` makes a read of freed memory visible: without it the old weights are still there."""
    case = build([home] * 11, 2, poison=True)
    case.check(range(11))
    case.stream.engine.drain()
    next_ones = {case.stream.slot_of("blocks.0"), case.stream.slot_of("blocks.1")}
    freed = [slot for slot in range(case.stream.schedule.n_slots) if slot not in next_ones]
    assert freed
    for slot in freed:
        assert bool((case.stream.slot_memory[slot] == 0xFF).all())
    for index, module in enumerate(case.modules):
        if case.stream.slot_of(f"blocks.{index}") in freed:
            for tensor in (module.up.weight, module.down.bias, module.fp8.float(), module.scale):
                assert bool(cast(Tensor, tensor).isnan().all())
    case.check(range(11))
    case.finish()


def test_residents_are_not_poisoned() -> None:
    """A block with a slot of its own is loaded once, whatever happens to the slots that are shared."""
    case = build([Home.HOST] * 8, 1, poison=True, resident=range(2, 6))
    for _ in range(3):
        case.check(range(8))
    case.stream.engine.drain()
    loads = [event.block for event in case.stream.trace() if event.kind == "load_begin"]
    assert [loads.count(f"blocks.{index}") for index in range(2, 6)] == [1] * 4
    assert loads.count("blocks.0") >= 3
    case.finish()


def test_counters_tell_the_bytes() -> None:
    """A report of the traffic that was computed from the plan, not from what happened, proves nothing."""
    homes = [Home.HOST, Home.HOST_SHARD, Home.DEVICE_SHARD, Home.RESIDENT] * 3
    case = build(homes, 1)
    case.check(range(12))
    case.check(range(12))
    case.stream.engine.drain()
    events = [(event.kind, event.block) for event in case.stream.trace()]
    h2d = gathered = 0
    for block in case.stream.blocks:
        h2d += events.count(("load_end", block.name)) * block.source.nbytes
        gathered += events.count(("gather_end", block.name)) * (block.layout.slot_bytes - block.source.nbytes)
    assert (case.stream.counters.h2d_bytes, case.stream.counters.gathered_bytes) == (h2d, gathered)
    assert h2d > 0
    case.finish()


# -- attach and remove -------------------------------------------------------------------------------------


def _hooks(modules: Sequence[nn.Module]) -> list[dict[str, list[int]]]:
    """Keys of every hook dict of every module."""
    return [
        {name: list(value) for name, value in vars(module).items() if "_hooks" in name and value is not None}
        for root in modules
        for module in root.modules()
    ]


def test_remove_restores_the_model_exactly() -> None:
    """A handle undoes itself: the same tensor objects under every name, the same hooks, the same bits."""
    choice = random.Random(3)
    modules = [Toy(choice) for _ in range(7)]
    modules[2].register_forward_hook(lambda *_: None)
    twins = copy.deepcopy(modules)
    before = (_addresses(modules), _hooks(modules), [list(module.state_dict()) for module in modules])
    layouts = [BlockLayout.of(module) for module in modules]
    blocks = []
    for index, (module, layout) in enumerate(zip(modules, layouts, strict=True)):
        source = aligned_bytes(layout.slot_bytes, torch.device("cpu"))
        layout.pack(module, source)
        home = Home.RESIDENT if index == 3 else Home.HOST
        blocks.append(StreamedBlock(str(index), module, layout, home, source))
    stream = BlockStream(blocks, assign_slots(6, 1), torch.device("cpu"), CpuCopyEngine(60))
    stream.attach()
    assert {a[2] for a in _addresses(modules)}.isdisjoint(a[2] for a in before[0]), "nothing was bound"
    assert [list(module.state_dict()) for module in modules] == before[2]
    expected = run(twins, range(7))
    assert torch.equal(run(modules, range(7)), expected)
    stream.remove()
    after = (_addresses(modules), _hooks(modules), [list(module.state_dict()) for module in modules])
    assert after == before
    assert torch.equal(run(modules, range(7)), expected)


@pytest.mark.parametrize("home", Home)
def test_attach_twice_raises(home: Home) -> None:
    """Pitfall 4: two mechanisms on one parameter. A second attach would forget the original tensors."""
    case = build([home] * 3, 1)
    with pytest.raises(RuntimeError, match="attached already"):
        case.stream.attach()
    case.check(range(3))
    case.finish()


def test_tied_names_stay_tied() -> None:
    """Pitfall 11: two names bound to two tensors would drift apart where somebody writes to one of them."""
    case = build([Home.HOST] * 12, 1)
    tied = [module for module in case.modules if hasattr(module, "alias")]
    assert tied
    for module in tied:
        assert module.alias.weight is module.down.weight
    case.finish()


def test_a_wrong_composition_is_refused() -> None:
    """A sharded home without a group, or slots for another number of blocks, is refused at once."""
    case = build([Home.DEVICE_SHARD] * 3, 1)
    with pytest.raises(ValueError, match="shard group"):
        BlockStream(case.stream.blocks, assign_slots(3, 1), torch.device("cpu"), case.stream.engine)
    with pytest.raises(ValueError, match="3 streamed blocks, but slots for 4"):
        BlockStream(
            case.stream.blocks, assign_slots(4, 1), torch.device("cpu"), case.stream.engine, case.group.gather()
        )
    case.finish()


@pytest.mark.parametrize("home", Home)
def test_written_back_to_where_it_rests(home: Home) -> None:
    """Pitfall 26: a rank writes its own shard, from its own part of the block; the slot's copy is out of date."""
    seed = next(seed for seed in range(99) if (found := _group_of(seed))[0] > 1 and found[1] > 0)
    for index in range(4):
        case = build([home] * 4, 1, seed)
        case.check(range(4))
        with case.stream.gathered(f"blocks.{index}") as tensors:
            persistent = set(case.modules[index].state_dict())
            assert set(tensors) == persistent | {"mask"}
            tensors["up.bias"].fill_(99.0)
        case.check(range(4))
        with case.stream.gathered(f"blocks.{index}", write_back=True) as tensors:
            tensors["up.bias"].add_(1.0)
            tensors["scale"].mul_(2.0)
        case.twins[index].up.bias.add_(1.0)
        cast(Tensor, case.twins[index].scale).mul_(2.0)
        block, changed = case.stream.blocks[index], case.wholes[index].clone()
        block.layout.pack(case.twins[index], changed)
        expected = case.group.shard_of(changed) if home.sharded else changed
        assert torch.equal(cast(Tensor, block.source), expected)
        case.check(range(4))
        case.finish()


def _group_of(seed: int) -> tuple[int, int]:
    """(ranks, rank) of the shard group that `build` makes of four blocks."""
    case = build([Home.DEVICE_SHARD] * 4, 1, seed)
    case.finish()
    return case.group.parts, case.group.index


# -- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("residents", ["none", "the victim", "all"])
@pytest.mark.parametrize("kind", ["a lane", "a slow lane", "submit"])
def test_a_failing_load_is_raised_and_heals(kind: str, residents: str, home: Home) -> None:
    """Pitfall 21: an exception leaves a slot half filled; the next request must not be stale or dead. On a lane the
    error comes to whoever waits for the load; on CUDA to the caller that enqueues it.
    """
    for seed, (count, victim) in enumerate([(1, 0), (2, 1), (5, 0), (5, 4), (8, 3)]):
        engine: Any = ImmediateEngine() if kind == "submit" else FailingEngine(stalls(seed, 0.5 * (kind != "a lane")))
        resident = {"none": [], "the victim": [victim], "all": list(range(count))}[residents]
        case = build([home] * count, 2, seed, engine, poison=True, resident=resident)
        case.check(range(count))
        case.stream.engine.drain()
        _lose(case.stream)  # residents, too, are loaded once more
        _arm(engine, case, victim, 0.0)
        raised = 0
        for _ in range(3):
            try:
                case.check(range(count))
            except BlockError:
                raised += 1
        assert raised == 1
        assert not engine.fail
        assert not case.group.fail
        case.finish(in_order=False)


def _lose(stream: BlockStream) -> None:
    """Another component takes all the memory and leaves it poisoned."""
    stream.arena.evict(stream.arena.nbytes)
    stream.arena.memory.fill_(0xFF)


def _arm(engine: Any, case: Case, victim: int, where: float) -> None:
    """The next load of block `victim` fails, a copy at this share of its bytes."""
    source = cast(Tensor, case.stream.blocks[victim].source)
    if case.stream.blocks[victim].home is Home.DEVICE_SHARD:
        case.group.fail.add(case.wholes[victim].data_ptr())
    else:
        engine.fail.add(source.data_ptr() + int(where * source.nbytes))


@pytest.mark.parametrize("stops", [BlockError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", range(4))
def test_a_chunk_that_fails_to_be_enqueued_is_not_taken_for_loaded(nth: int, stops: type[BaseException]) -> None:
    """Nobody learns that the last chunk of a copy never came: the block would compute with half of its bytes."""
    engine = ImmediateEngine()
    case = build([Home.HOST] * 4, 1, 2, cast(CopyEngine, engine), resident=[2])
    case.stream._loader.yield_to_collectives = True
    for module in case.modules:
        module.collectives = 3
    case.check(range(4))
    case.check(range(4))
    _lose(case.stream)
    submit, count = engine.submit, -1

    def fail(*args: Any) -> Event:
        nonlocal count
        count += 1
        if count == nth + 2:
            raise stops
        return submit(*args)

    engine.submit = fail  # type: ignore[method-assign]
    with pytest.raises(stops):
        case.check(range(4))
    for _ in range(2):
        case.check(range(4))
    case.finish()


def test_a_slot_waits_for_what_a_broken_load_had_enqueued() -> None:
    """The copy of a shard is under way, its gather cannot be enqueued: the next block in the slot comes later."""
    late, armed = threading.Event(), [True]

    class Engine(CpuCopyEngine):
        def submit(self, lane: Any, work: Any, after: Any, needs: Any = ()) -> Event:
            if lane == "gather" and needs and armed:
                armed.clear()
                super().submit("copy", lambda: late.wait(0.05) and None, ())
                super().submit("copy", lambda: case.stream.slot_memory[0].fill_(0xFF) and None, ())
                raise BlockError
            return super().submit(lane, work, after, needs)

    case = build([Home.HOST_SHARD, Home.DEVICE_SHARD], 0, engine=Engine(60))
    with pytest.raises(BlockError):
        run(case.modules, range(2))
    case.modules[1].pause = lambda: time.sleep(0.08)
    case.check([1])
    case.check(range(2))
    case.finish(in_order=False)


@pytest.mark.parametrize("point", range(3))
def test_an_exception_in_a_block_frees_its_slot(point: int) -> None:
    """Pitfall 21: a slot that counts as being read for ever refuses its next block, or deadlocks."""
    case = build([Home.HOST] * 6, 1)
    for victim in case.modules:
        victim.fail_at = point
        with pytest.raises(BlockError):
            run(case.modules, range(6))
        victim.fail_at = None
        case.check(range(6))
    case.check(range(5, -1, -1))
    case.finish()


def test_a_load_that_never_ends_is_a_timeout() -> None:
    """No waiting without a limit: a hung copy ends the request with an error, and the next one is right."""
    hung = threading.Event()
    engine = CpuCopyEngine(0.1, lambda: nothing() if not armed else _hang(hung))
    armed: list[bool] = []
    case = build([Home.HOST] * 4, 1, engine=engine, poison=True)
    case.check(range(4))
    case.stream.engine.drain()
    armed.append(True)
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        run(case.modules, range(4))
    armed.clear()
    hung.set()
    time.sleep(0.2)
    try:
        case.check(range(4))
    except TimeoutError:  # a load that was queued behind the hung one may have given up as well
        case.check(range(4))
    case.check(range(4))
    case.stream.remove()


def _hang(until: threading.Event) -> None:
    until.wait(10)


@pytest.mark.parametrize("kind", ["a lane", "submit"])
def test_a_part_that_failed_to_be_held_is_loaded_again(kind: str) -> None:
    """Pitfall 21: what is outside a text encoder's blocks comes in by `hold`, and by nothing else."""
    engine: Any = ImmediateEngine() if kind == "submit" else FailingEngine()
    case = build([Home.HOST] * 3, 1, engine=engine, resident=[1])
    _arm(engine, case, 1, 0.0)
    with pytest.raises(BlockError), case.stream.hold("blocks.1"):
        pass
    for _ in range(2):
        with case.stream.hold("blocks.1"):
            held = case.stream.resident_memory["blocks.1"]
            assert torch.equal(held[: len(case.wholes[1])], case.wholes[1])
    case.check(range(3))
    case.finish(in_order=False)
