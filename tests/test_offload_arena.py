"""Components that take turns in one arena: whatever they overwrite of each other, every run is bit-identical."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from typing import cast

import pytest
import torch

from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine, CpuCopyEngine
from crossdock.offload.stream.block import Home
from toy_blocks import WIDTH, Case, FailingEngine, QueuedEngine, Toy, build, nothing, run, stalls

CPU = torch.device("cpu")


def _tenants(homes: list[list[Home]], engine: CopyEngine, arena: Arena, residents: int = 0) -> list[Case]:
    return [
        build(each, 1 + number, number, engine, resident=range(residents), arena=arena)
        for number, each in enumerate(homes)
    ]


def _space(homes: list[list[Home]], residents: int = 0) -> int:
    """Bytes of the largest tenant alone."""
    sizes = []
    for number, each in enumerate(homes):
        alone = build(each, 1 + number, number, resident=range(residents))
        sizes.append(alone.stream.arena.nbytes)
        alone.finish()
    return max(sizes)


def _finish(cases: list[Case]) -> None:
    for case in cases:
        case.stream.remove()
    cases[0].stream.engine.close()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_tenants_take_turns(seed: int, queued: bool) -> None:
    """Pitfalls 16, 18, 19: a second transformer, an encoder and a VAE in the memory of the first; stale blocks."""
    choice = random.Random(seed)
    homes = [choice.choices([Home.HOST, Home.HOST_SHARD], k=choice.randint(2, 9)) for _ in range(3)]
    residents = choice.choice((0, 0, 2))
    arena = Arena(_space(homes, residents), CPU)
    delay = stalls(seed, 0.2)
    engine = cast(CopyEngine, QueuedEngine(delay)) if queued else CpuCopyEngine(60, delay)
    cases = _tenants(homes, engine, arena, residents)
    for _ in range(12):
        case = choice.choice(cases)
        if choice.random() < 0.3:
            case.stream.prepare()
        case.check(range(len(case.modules)))
        if choice.random() < 0.2 and not queued:
            victim = choice.choice(case.modules)
            victim.fail_at, victim.error = 1, KeyboardInterrupt
            with pytest.raises(KeyboardInterrupt):
                run(case.modules, range(len(case.modules)))
            victim.fail_at = None
    _finish(cases)


def test_a_turn_costs_only_what_was_overwritten() -> None:
    """A small component sits on the slots: the resident blocks behind them are still there afterwards."""
    large, small = [Home.HOST] * 12, [Home.HOST] * 2
    arena = Arena(10 * _space([small]), CPU)
    engine = CpuCopyEngine(60)
    transformer = build(large, 1, 5, engine, resident=range(4, 8), arena=arena)
    encoder = build(small, 1, 6, engine, arena=arena)
    transformer.check(range(12))
    steady = transformer.stream.counters.h2d_bytes
    transformer.check(range(12))
    per_pass = transformer.stream.counters.h2d_bytes - steady
    encoder.check(range(2))
    before = transformer.stream.counters.h2d_bytes
    transformer.check(range(12))
    again = transformer.stream.counters.h2d_bytes - before
    kept = sum(transformer.stream.blocks[index].layout.slot_bytes for index in range(4, 8))
    assert again < per_pass + kept, "the residents were loaded again"
    _finish([transformer, encoder])


def test_a_prepared_turn_has_no_misses() -> None:
    """Pitfall 18: at the boundary the second transformer's first blocks are asked for before they are needed."""
    homes = [[Home.HOST] * 6, [Home.HOST] * 5]
    cases = _tenants(homes, CpuCopyEngine(60), Arena(_space(homes), CPU))
    for case in cases * 3:
        case.stream.prepare()
        assert case.misses(range(len(case.modules))) == 0
    assert cases[0].misses(range(6)) == 1, "unprepared, its first block is gone"
    _finish(cases)


def test_bytes_in_use_are_not_taken() -> None:
    """Pitfall 19: a component that comes while another computes is refused, not corrupted."""
    homes = [[Home.HOST] * 3, [Home.HOST] * 3]
    cases = _tenants(homes, CpuCopyEngine(60), Arena(_space(homes), CPU))

    def intrude() -> None:
        run(cases[1].modules, range(3))

    cases[0].modules[1].pause = intrude
    with pytest.raises(RuntimeError, match="another component is computing"):
        run(cases[0].modules, range(3))
    cases[0].modules[1].pause = nothing
    for case in cases:
        case.check(range(3))
    _finish(cases)


def test_an_interrupted_block_keeps_no_activation() -> None:
    homes = [[Home.HOST] * 3]
    (case,) = _tenants(homes, CpuCopyEngine(60), Arena(_space(homes), CPU))
    case.modules[0].fail_at, case.modules[0].error = 1, KeyboardInterrupt
    activation = torch.ones(2, WIDTH)
    gone = weakref.ref(activation)
    with pytest.raises(KeyboardInterrupt):
        case.modules[0](activation)
    del activation
    gc.collect()
    assert gone() is None
    _finish([case])


def test_a_turn_begins_while_the_last_one_still_computes() -> None:
    """On CUDA the host enters the next component while the device is still in the one before: its bytes are in use."""
    homes = [[Home.HOST] * 5, [Home.HOST_SHARD] * 4]
    engine = QueuedEngine(nothing)
    cases = _tenants(homes, cast(CopyEngine, engine), Arena(_space(homes), CPU))
    turns = []
    for case in cases * 3:
        for module in case.modules:
            module.pause = lambda: time.sleep(1e-3)
        box = [torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)]
        turns.append((case, box))
        for module in case.modules:
            module(box)
    engine.synchronize()
    for case, box in turns:
        assert torch.equal(box[0], run(case.twins, range(len(case.modules))))
    _finish(cases)


class _Idle:
    """A tenant of which nothing is asked."""

    def settle_interrupted(self) -> None: ...

    def flush(self) -> None: ...

    def vacate(self) -> None: ...

    def move_in(self) -> None: ...


def test_what_a_claim_waits_for() -> None:
    """Loads and readers of a rival since one's own last use, those that were never read included; own ones always."""
    arena = Arena(512, CPU)
    (slot,), (rival,) = (arena.lease(_Idle(), [512], object()) for _ in range(2))
    slot.claim(0)
    slot.ready = own_load = object()
    slot.begin_reading()
    slot.end_reading(own_reader := object())
    rival.claim(0)
    rival.ready = load = object()
    waits = slot.claim(1)
    assert {own_load, own_reader, load} <= set(waits), "a load that nobody read may still be under way"
    slot.ready = own_load = object()
    assert own_load in rival.claim(1)
    rival.ready = load = object()
    rival.begin_reading()
    rival.end_reading(reader := object())
    assert {load, reader} <= set(slot.claim(2))
    assert (slot.holder, rival.holder) == (2, None)
    slot.begin_reading()
    with pytest.raises(RuntimeError, match="being read while block 3"):
        slot.claim(3)


def test_a_prepared_turn_is_taken_by_another() -> None:
    """Portions that were held back for one component must not arrive in the blocks of the next."""
    homes = [[Home.HOST] * 5, [Home.HOST] * 5]
    cases = _tenants(homes, CpuCopyEngine(60), Arena(_space(homes), CPU))
    first, second = cases
    first.stream._loader.yield_to_collectives = True
    for module in first.modules:
        module.collectives = 3  # so that the next copies are cut into four
    first.check(range(5))
    second.check(range(5))
    first.stream.prepare()
    second.check(range(5))
    with first.stream.gathered("blocks.0") as tensors:
        assert torch.equal(tensors["up.weight"], first.twins[0].up.weight)
    assert second.misses(range(5)) == 0
    first.check(range(5))
    _finish(cases)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_failed_load_does_not_fail_the_next_component(noticed: bool) -> None:
    """Pitfall 21: what the one could not load, before or after the other asked, is no reason not to load over it."""
    homes = [[Home.HOST] * 3, [Home.HOST] * 3]
    engine = FailingEngine()
    cases = _tenants(homes, engine, Arena(_space(homes), CPU))
    cases[1].check(range(3))
    engine.fail.add(cases[0].wholes[0].data_ptr())
    held_up = threading.Event()
    if not noticed:
        engine.submit("copy", lambda: held_up.wait(60) and None, ())
        cases[1].modules[0].register_forward_pre_hook(lambda *_: held_up.set(), prepend=True)
    cases[0].stream.prepare()
    if noticed:
        engine.wait(engine.submit("copy", nothing, ()))
        assert not engine.fail, "nothing failed"
    cases[1].check(range(3))
    assert not engine.fail, "nothing failed"
    for case in cases:
        case.check(range(3))
    _finish(cases)


def test_eviction_forgets_what_lies_before_its_end() -> None:
    """Ranks that do not run a component must lose the same blocks as the one that does: gathers are collective."""
    case = build([Home.HOST] * 6, 1, resident=range(6))
    case.check(range(6))
    sizes = [block.layout.slot_bytes for block in case.stream.blocks]
    for blocks, inside in [(0, 0), (3, 0), (2, 1), (6, 0)]:
        before = case.stream.counters.h2d_bytes
        case.stream.arena.evict(sum(sizes[:blocks]) + inside)
        case.check(range(6))
        assert case.stream.counters.h2d_bytes - before == sum(sizes[: blocks + inside])
    case.finish()


def test_the_arena_is_all_the_memory_there_is() -> None:
    """Every parameter of every tenant lies in the one allocation, at a fixed address."""
    homes = [[Home.HOST] * 7, [Home.HOST] * 4]
    arena = Arena(_space(homes), CPU)
    cases = _tenants(homes, CpuCopyEngine(60), arena)
    storage = arena.memory.untyped_storage().data_ptr()
    addresses = [_addresses(case.modules) for case in cases]
    for case in cases * 2:
        case.check(range(len(case.modules)))
    assert [_addresses(case.modules) for case in cases] == addresses
    for case in cases:
        for module in case.modules:
            assert {t.untyped_storage().data_ptr() for t in module.parameters()} == {storage}
    _finish(cases)


def test_resizing_moves_every_tenant() -> None:
    """`device_budget: auto` widens the arena once the activations are known."""
    homes = [[Home.HOST] * 6, [Home.HOST] * 4]
    arena = Arena(_space(homes), CPU)
    cases = _tenants(homes, CpuCopyEngine(60), arena)
    for case in cases:
        case.check(range(len(case.modules)))
    arena.resize(2 * arena.nbytes)
    storage = arena.memory.untyped_storage().data_ptr()
    for case in cases * 2:
        case.check(range(len(case.modules)))
        assert all(p.untyped_storage().data_ptr() == storage for m in case.modules for p in m.parameters())
    _finish(cases)


def test_slots_that_were_given_back_are_gone() -> None:
    """A slot that somebody still knows keeps the whole former allocation on the device."""
    homes = [[Home.HOST] * 6, [Home.HOST] * 4]
    cases = _tenants(homes, CpuCopyEngine(60), Arena(_space(homes), CPU))
    arena, stream = cases[0].stream.arena, cases[0].stream
    for case in cases:
        case.check(range(len(case.modules)))
    former = [weakref.ref(slot) for slot in stream._table.of.values()]
    stream.reschedule(stream.schedule, [], range(5, -1, -1))
    for case in cases:
        case.check(range(len(case.modules)))
    gc.collect()
    assert not [slot for slot in former if slot() is not None], "after a reschedule"
    former = [weakref.ref(slot) for case in cases for slot in case.stream._table.of.values()]
    arena.resize(2 * arena.nbytes)
    for case in cases:
        case.check(range(len(case.modules)))
    gc.collect()
    assert not [slot for slot in former if slot() is not None], "after a resize"
    _finish(cases)
    assert not arena._slots
    assert not arena._tenants


def test_too_small_an_arena_is_refused() -> None:
    homes = [[Home.HOST] * 3]
    with pytest.raises(ValueError, match=r"\d+ bytes of slots do not fit into an arena of \d+ bytes"):
        _tenants(homes, CpuCopyEngine(60), Arena(_space(homes) - 256, CPU))


def _addresses(modules: list[Toy]) -> list[int]:
    return [tensor.data_ptr() for module in modules for tensor in module.parameters()]
