"""Streaming is real: device bytes stay within the window, host bytes are the ones computed with, one copy per node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES, LAYOUTS
from reference import ODD_SIZE, PROMPT
from tiers import pairs, some, thorough

GangOf = Callable[[int], Gang]
Checkpoints = dict[str, Path]
STREAMED = ["layerwise_tp2", "hsdp", "layerwise", "layerwise_hsdp", "layerwise_ulysses2_ring2"]
SLACK = 256
"""Bytes: a slot's start is rounded up to its alignment."""


def _config(layout: str, **offload: Any) -> RunConfig:
    config = load_config(next(entry for entry in LAYOUTS if entry.name == layout).config)
    return config.model_copy(update={"offload": config.offload.model_copy(update=offload)})


def _latents(engine: Engine) -> torch.Tensor:
    return engine.generate(PROMPT, steps=2, height=ODD_SIZE[0], width=ODD_SIZE[1]).latents[0]


def _block_bytes(engine: Engine) -> list[int]:
    """Per rank: distinct bytes of memory behind all block parameters and buffers, read off the live model."""

    def measure(worker: Any) -> int:
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            for block in worker.loaded.plan.memory.blocks
            for group in ("parameters", "buffers")
            for tensor in getattr(worker.loaded.model.get_submodule(block.name), group)()
        )
        total, end = 0, 0
        for start, stop in spans:
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        return total

    return engine.gang.collective_rpc(measure, timeout_s=60)


@pytest.mark.parametrize("family", some(FAMILIES, 1))
@pytest.mark.parametrize(
    ("layout", "prefetch"), some(pairs(["layerwise_tp2", "layerwise", "layerwise_hsdp"], (1, 3)), 1)
)
def test_device_bytes_stay_within_the_window(
    layout: str, prefetch: int, family: str, gang_of: GangOf, checkpoints: Checkpoints
) -> None:
    """Pitfall 1: a no-op offload gives the right picture and saves nothing. Bytes are read off the live model."""
    config = _config(layout, prefetch=prefetch)
    with Engine.start(config, checkpoints[family], gang_of(config.world_size)) as engine:
        sizes = [block.layout.slot_bytes for block in engine.plan.memory.blocks]
        held = _block_bytes(engine)
        _latents(engine)
        after = _block_bytes(engine)
    limit = (prefetch + 2) * (max(sizes) + SLACK)
    print(f"{layout} {family} prefetch {prefetch}: {held} of at most {limit} bytes; all blocks are {sum(sizes)}")
    assert held == after
    assert all(bytes_held <= limit for bytes_held in held)
    assert sum(sizes) > limit or prefetch > 1, "the model is too small for this test to mean anything"


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallelism_halves_the_largest_block(family: str, checkpoints: Checkpoints) -> None:
    """The window's bound is divided by tp: nearly all of a block is cut, only norms and modulation are not."""
    from crossdock.runtime.plan.make_plan import make_plan

    whole = make_plan(_config("layerwise"), checkpoints[family], "cpu")
    halves = make_plan(_config("layerwise_tp2"), checkpoints[family], "cpu")
    ratio = max(b.layout.slot_bytes for b in halves.memory.blocks) / max(
        b.layout.slot_bytes for b in whole.memory.blocks
    )
    assert ratio < 0.65


@thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_hsdp_holds_its_share_and_the_window(family: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """HSDP without offload: 1/S of all blocks plus the window, and the report says the same as the live model."""
    config = _config("hsdp")
    with Engine.start(config, checkpoints[family], gang_of(config.world_size)) as engine:
        sizes = [block.layout.slot_bytes for block in engine.plan.memory.blocks]
        window = _block_bytes(engine)
        report = engine.generate(PROMPT, steps=2).report
        shards = engine.gang.collective_rpc(
            lambda worker: sum(b.source.nbytes for b in worker.loaded.weights.blocks), timeout_s=60
        )
    for row, in_slots, in_shards in zip(report["ranks"], window, shards, strict=True):
        assert in_shards == row["shard_bytes"] == sum(sizes) // 2
        assert in_slots <= 3 * (max(sizes) + SLACK)
        assert row["peak_weight_bytes"] >= in_shards + row["slot_bytes"] + row["resident_weight_bytes"]
        assert row["host_bytes"] == row["h2d_bytes_per_step"] == 0
        assert row["gathered_bytes_per_step"] > 0


@pytest.mark.parametrize("layout", some(STREAMED, 2))
def test_where_blocks_rest_is_what_is_computed_with(layout: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Pitfall 1: the host copy (or the shard) is really read: overwriting it on one rank changes the picture."""

    def poison(worker: Any) -> None:
        if worker.rank == worker.world_size - 1:  # its node's store is shared: nobody else needs to
            for block in worker.loaded.weights.blocks:
                block.source.view(torch.float32).mul_(1.5)

    config = _config(layout)  # by default, no picture would leave
    config = config.model_copy(update={"verify": config.verify.model_copy(update={"arrivals": "first"})})
    with Engine.start(config, checkpoints["flux2-klein"], gang_of(config.world_size)) as engine:
        prompts = [PROMPT] * config.parallel.dp_degree
        before = engine.generate(prompts, steps=2, height=ODD_SIZE[0], width=ODD_SIZE[1]).latents[-1]
        engine.gang.collective_rpc(poison, timeout_s=60)
        after = engine.generate(prompts, steps=2, height=ODD_SIZE[0], width=ODD_SIZE[1]).latents[-1]
    print(f"{layout}: poisoned weights move the latents by {float((after - before).abs().max()):.2f}")
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize(("layout", "family"), some(pairs(STREAMED, FAMILIES), 2))
def test_freed_slots_are_not_read(layout: str, family: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """NaN written into every slot as soon as its block has computed changes nothing: nobody reads freed weights."""

    def poison_freed(worker: Any) -> None:
        worker.loaded.stream.poison_freed = True

    def freed_are_nan(worker: Any) -> bool:
        worker.loaded.stream.rehearse()  # on the first rank, the VAE had the memory last
        free = [slot for slot in worker.loaded.stream._table.shared if slot.holder is None]
        for slot in free:
            worker.loaded.copy_engine.wait(slot.ready)
        return bool(free) and all(bool((slot.memory == 0xFF).all()) for slot in free)

    config = _config(layout)
    with Engine.start(config, checkpoints[family], gang_of(config.world_size)) as engine:
        before = _latents(engine)
        engine.gang.collective_rpc(poison_freed, timeout_s=60)
        after = _latents(engine)
        assert torch.equal(before, after)
        assert all(engine.gang.collective_rpc(freed_are_nan, timeout_s=60)), (
            "nothing was poisoned: this test proves nothing"
        )


@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_one_host_copy_per_node(family: str, gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Pitfall 29: four ranks hold the block weights once per node (proportional set size, all ranks together)."""
    config = _config("layerwise_ulysses2_ring2")
    with Engine.start(config, checkpoints[family], gang_of(config.world_size)) as engine:
        total = sum(block.layout.slot_bytes for block in engine.plan.memory.blocks)
        ranks = engine.generate(PROMPT, steps=2).report["ranks"]
    shares = [row["host_pss_bytes"] for row in ranks]
    print(f"{family}: blocks {total} bytes; proportional shares {shares}, together {sum(shares) / total:.3f} of it")
    assert [row["host_bytes"] for row in ranks] == [total] * 4
    assert 0.95 * total < sum(shares) < 1.05 * total


def test_a_rank_reads_only_its_own_bytes(gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """Pitfall 6: under HSDP no rank ever has all block bytes; what it read is its shard."""
    config = _config("layerwise_hsdp")
    with Engine.start(config, checkpoints["z-image"], gang_of(config.world_size)) as engine:
        total = sum(block.layout.slot_bytes for block in engine.plan.memory.blocks)
        stores = engine.gang.collective_rpc(lambda worker: worker.loaded.weights.store.nbytes, timeout_s=60)
        sharers = engine.gang.collective_rpc(lambda worker: worker.loaded.weights.shares_store_with, timeout_s=60)
    assert stores == [total // 2] * 4
    assert sharers == [(0, 2), (1, 3), (0, 2), (1, 3)]
