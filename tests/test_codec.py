"""What rests, what travels and what computes are three sizes: with a codec of which no two are equal, each figure is
the one that it says it is, and no bit of a result changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import toy_codec
from one_rank import rank_request
from toy_codec import HEADER, PACKED

from crossdock.launch.engine.engine import Engine
from crossdock.offload.codecs.codec import IDENTITY, Codec
from crossdock.offload.memory.arena import Arena
from crossdock.offload.schedule import residency
from crossdock.offload.schedule.residency import assumed_costs
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.measured_costs import measured_costs
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.verify import verify_composition
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.plan import make_plan as plan_module
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.inspection import memory_spans
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from reference import ODD_SIZE, PROMPT
from tiers import not_quick, some
from toy_blocks import STREAMED, build

pytestmark = not_quick

CPU = torch.device("cpu")
REQUEST = rank_request(PROMPT, height=ODD_SIZE[0], width=ODD_SIZE[1], steps=2)


# -- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [IDENTITY, PACKED], ids=lambda codec: codec.name)
@pytest.mark.parametrize("home", STREAMED)
def test_every_figure_is_the_one_it_says(home: Home, codec: Codec) -> None:
    """Host memory has held bytes, trace and counters tell travelling ones, slots have those that compute."""
    case = build([home] * 9, 2, seed=5, codec=codec)  # of four shards
    stream, parts = case.stream, case.group.parts if home.sharded else 1
    case.check(range(9))
    stream.rehearse()
    stream.engine.drain()
    travel = {block.name: codec.travel_bytes(block.layout, parts) for block in stream.blocks}
    for block in stream.blocks:
        assert block.held_bytes == codec.held_bytes(block.layout, parts)
        sizes = {block.held_bytes * parts, travel[block.name] * parts, block.layout.slot_bytes}
        assert len(sizes) == (1 if codec is IDENTITY else 3)
    moved = {"load_begin": 0, "gather_begin": 0}
    for event in stream.trace():
        if event.kind in moved:
            expected = travel[event.block] * (1 if event.kind == "load_begin" else parts - 1)
            assert event.travel_bytes == expected
            moved[event.kind] += expected
    assert (stream.counters.h2d_bytes, stream.counters.gathered_bytes) == tuple(moved.values())
    assert (moved["load_begin"] > 0, moved["gather_begin"] > 0) == (home.on_host, home.sharded)
    slots = [max(b.layout.slot_bytes for b in stream.blocks if stream.slot_of(b.name) == n) for n in range(3)]
    assert [memory.nbytes for memory in stream.slot_memory] == slots
    staging = 0 if codec is IDENTITY else parts * max(travel.values())
    assert stream.arena.nbytes == stream.slots_bytes == sum(slots) + staging
    for sources in stream.read.values():
        assert sum(span.nbytes for span in memory_spans(sources)) in travel.values()
    costs = measured_costs(stream.trace(), [b.name for b in stream.blocks], [travel[b.name] for b in stream.blocks])
    assert costs is not None
    rates = [seconds / travel[block.name] for seconds, block in zip(costs.copy_s, stream.blocks, strict=True)]
    assert rates == pytest.approx([rates[0]] * 9)
    case.finish()


def test_the_identity_needs_no_staging_and_no_copy() -> None:
    case = build([Home.HOST] * 4, 1)
    case.stream._loader.yield_to_collectives = False
    assert case.stream.slots_bytes == sum(memory.nbytes for memory in case.stream.slot_memory)
    assert all(block.source is whole for block, whole in zip(case.stream.blocks, case.wholes, strict=True))
    case.check(range(4))
    case.stream.engine.drain()
    (read,) = case.stream.read["blocks.2"]
    assert (read.data_ptr(), read.nbytes) == (case.wholes[2].data_ptr(), case.wholes[2].nbytes)
    case.finish()


@pytest.mark.parametrize("home", [home for home in STREAMED if home.on_host])
def test_chunks_of_two_loads_do_not_mix_in_the_staging(home: Home) -> None:
    """What was held back of a copy would be written over by the next block, which goes through the same memory."""
    case = build([home] * 7, 2, seed=3, codec=PACKED)
    case.stream._loader.yield_to_collectives = True
    for module in case.modules:
        module.collectives = 3
    for _ in range(3):
        case.check(range(7))
    case.finish()


@pytest.mark.parametrize("home", STREAMED)
def test_true_weights_are_decoded_and_encoded_again(home: Home) -> None:
    case = build([home] * 3, 1, seed=2, codec=PACKED)
    case.check(range(3))
    with case.stream.gathered("blocks.1") as weights:
        for name, tensor in case.twins[1].state_dict().items():
            assert torch.equal(*(each.contiguous().view(torch.uint8) for each in (weights[name], tensor))), name
    before = case.stream.blocks[1].source
    assert isinstance(before, torch.Tensor)
    kept = before.clone()
    with case.stream.gathered("blocks.1", write_back=True) as weights:
        pass
    assert torch.equal(before[HEADER:], kept[HEADER:])
    assert before[0] == kept[0], "another part"
    if home is Home.HOST:
        with case.stream.gathered("blocks.1", write_back=True) as weights:
            weights["down.weight"].mul_(2)
        assert not torch.equal(before, kept)
        case.twins[1].down.weight.mul_(2)
        case.check(range(3))
    case.finish()


def test_the_staging_is_taken_by_another_component() -> None:
    """It is memory like that of slots: who computes there is waited for, and what is there is forgotten."""
    arena = Arena(40_000, CPU)
    cases = [build([Home.HOST] * 5, 1, seed, arena=arena, codec=PACKED) for seed in (1, 2)]
    for _ in range(4):
        for case in cases:
            case.check(range(5))
            case.check((4, 2, 0))
    for case in cases:
        case.finish()


def test_a_block_that_never_leaves_is_not_encoded() -> None:
    case = build([Home.RESIDENT], 1)
    with pytest.raises(ValueError, match=r"blocks\.0 stays on the device"):
        replace(case.stream.blocks[0], codec=PACKED)
    block = replace(case.stream.blocks[0], home=Home.HOST, codec=PACKED)
    with pytest.raises(RuntimeError, match="codec packed"):
        block.at_rest(block.layout.entries[0])
    case.finish()


def test_a_wrong_part_does_not_pass() -> None:
    """Held bytes that were damaged reach whoever waits for the block, not the block."""
    case = build([Home.HOST_SHARD] * 3, 1, seed=5, codec=PACKED)
    source = case.stream.blocks[2].source
    assert isinstance(source, torch.Tensor)
    source[20] ^= 1
    with pytest.raises(AssertionError):
        case.check(range(3))
    case.finish(in_order=False)


# -- the schedule ----------------------------------------------------------------------------------------------------


def test_costs_and_traffic_are_of_what_travels() -> None:
    """Of two choices that are equally fast, the one with less on the link, whatever the blocks take in their slots."""
    assert assumed_costs([100, 100], [75, 100]).copy_s == tuple(2 * (size * 1e-9) for size in (75, 100))
    assert assumed_costs([100, 100], [75, 100]).compute_s == assumed_costs([100, 100]).compute_s
    for travel, better in (((), False), ((4, 4, 5, 5, 3, 3), True), ((3, 3, 5, 5, 4, 4), False)):
        search = residency._Search(residency._Problem((5,) * 6, (10,) * 6, (1,) * 6, 20, travel), (1,))
        search._work = 1_000
        assert search._offer(1, (0, 1, 2, 3))
        assert search._offer(1, (2, 3, 4, 5)) == better


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def packed() -> None:
        monkeypatch.setattr(plan_module, "_encodes", lambda config, device, home: home.streamed)
        monkeypatch.setattr(plan_module, "lossless", lambda *_: PACKED)

    return packed


def _plan(directory: Path, **offload: Any) -> RunPlan:
    config = RunConfig.parse({"offload": {"layerwise": True, **offload}})
    return make_plan(config, directory, "cpu", device_bytes=2**33)


def _run(plan: RunPlan, probe: bool) -> tuple[torch.Tensor, Any]:
    worker = RankWorker(0, 1, CPU)
    try:
        report = worker.setup(plan, probe, True)
        assert verify_composition(plan, [report]) == []
        result = worker.generate(REQUEST)
        assert result.latents is not None
        return result.latents, result.measurements
    finally:
        worker.teardown()


@pytest.mark.parametrize("budget", some(["more", None, "least"], 1))
def test_a_run_with_a_codec(budget: str | None, packed: Callable[[], None], flux2_dir: Path) -> None:
    """Planned, read, encoded, streamed, compared with the files after decoding, probed, reported: bits as without."""
    plain = _plan(flux2_dir)
    expected, figures = _run(plain, probe=False)
    packed()
    plan = _plan(flux2_dir)
    assert plan.memory.staging_bytes == max(PACKED.travel_bytes(b.layout, 1) for b in plan.memory.blocks) > 0
    assert plan.least_budget_bytes - plain.least_budget_bytes in (0, plan.memory.staging_bytes)
    assert plan.memory.arena_bytes is not None
    if budget is not None:
        bytes_ = plan.least_budget_bytes + (0 if budget == "least" else 2**20)
        with pytest.raises(ConfigError, match=f"at least {plan.least_budget_bytes} bytes"):
            _plan(flux2_dir, device_budget=f"{plan.least_budget_bytes - 1}B")
        plan = _plan(flux2_dir, device_budget=f"{bytes_}B")
    latents, measured = _run(plan, probe=True)
    assert torch.equal(latents, expected)
    held = sum(PACKED.held_bytes(block.layout, 1) for block in plan.memory.blocks)
    assert measured.host_bytes == held != figures.host_bytes
    if budget is None:
        assert measured.slot_bytes == figures.slot_bytes
        travel = sum(block.travel_bytes for block in plan.memory.blocks)
        slots = sum(block.layout.slot_bytes for block in plan.memory.blocks)
        assert measured.h2d_bytes_per_step * slots == figures.h2d_bytes_per_step * travel


@pytest.mark.parametrize("offload", some([{"layerwise": True}, {}], 1), ids=str)
def test_shards_of_several_ranks(
    offload: dict[str, Any], packed: Callable[[], None], gang_of: Callable[[int], Gang], flux2_dir: Path
) -> None:
    """Each rank encodes its own shard; gathered is what travels, and decoded on every rank."""
    parallel = {"ring_degree": 2, "hsdp": {"replicate": 1, "shard": 2}}
    config = RunConfig.parse({"parallel": parallel, "offload": offload})
    found = []
    for encoded in (False, True):
        if encoded:
            packed()
            cloudpickle.register_pickle_by_value(toy_codec)
        with Engine.start(config, flux2_dir, gang_of(2)) as engine:
            generation = engine.generate([PROMPT], height=ODD_SIZE[0], width=ODD_SIZE[1])
            found.append((engine.plan, generation.latents[0], generation.report["ranks"]))
    (_, expected, before), (plan, latents, after) = found
    assert torch.equal(latents, expected)
    for rank in after:
        held = sum(block.held_bytes for block in plan.memory.blocks)
        assert (rank["host_bytes"], rank["shard_bytes"]) == ((held, 0) if offload else (0, held))
    for one, other in zip(before, after, strict=True):
        assert other["slot_bytes"] == one["slot_bytes"]
        for block in plan.memory.blocks:
            plain, packed_ = (rank["blocks"][block.name]["gathered_bytes"] for rank in (one, other))
            assert (
                plain % (block.layout.slot_bytes // 2) == packed_ % (block.travel_bytes // 2) == 0 < min(plain, packed_)
            )
