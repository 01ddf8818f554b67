"""Components that take turns in one arena: whatever they overwrite of each other, every run is bit-identical."""

from __future__ import annotations

import random
from typing import cast

import pytest
import torch

from crossdock.offload.arena import Arena
from crossdock.offload.block import Home
from crossdock.offload.copy_engine import CopyEngine, CpuCopyEngine
from toy_blocks import Case, QueuedEngine, Toy, build, nothing, run, stalls

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
    kept = sum(transformer.stream.blocks[index].layout.nbytes for index in range(4, 8))
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


def test_too_small_an_arena_is_refused() -> None:
    homes = [[Home.HOST] * 3]
    with pytest.raises(ValueError, match=r"\d+ bytes of slots do not fit into an arena of \d+ bytes"):
        _tenants(homes, CpuCopyEngine(60), Arena(_space(homes) - 256, CPU))


def _addresses(modules: list[Toy]) -> list[int]:
    return [tensor.data_ptr() for module in modules for tensor in module.parameters()]
