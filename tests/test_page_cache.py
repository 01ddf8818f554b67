"""Blocks straight from the checkpoint's files: every byte of every cut, nothing copied before it is streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossdock.launch.engine.engine import Engine
from crossdock.offload.memory.layout import BlockLayout, TensorEntry
from crossdock.offload.stream.block import Home
from crossdock.parallel.hsdp import shard_range
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.models.checkpoint import StoredTensor, stored_tensors
from crossdock.runtime.plan.checks import check_pages
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.memory_plan import PlannedBlock
from crossdock.runtime.rank.weights.mmap_pages import CheckpointPages
from crossdock.runtime.rank.weights.source import WeightSource
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from reference import ODD_SIZE, PROMPT, TOLERANCE, max_error, reference_latents
from tiers import pairs, some

TENSORS = {
    "b.matrix": torch.randn(37, 24),
    "b.halves": torch.randn(40, 36).bfloat16(),
    "b.cube": torch.arange(5 * 8 * 3).view(5, 8, 3),
    "b.fp8": torch.randn(300, 12).to(torch.float8_e4m3fn),
    "b.flags": torch.arange(1000) % 3 == 0,
    "b.scalar": torch.tensor(2.5),
    "b.empty": torch.zeros(0, 4),
    "b.bytes": torch.arange(700).to(torch.uint8),
    "other": torch.randn(1000),
}
CUTS: list[dict[str, TensorSlice]] = [
    {},
    {"b.matrix": TensorSlice(0, ((3, 19),), 37), "b.halves": TensorSlice(1, ((9, 27),), 36)},
    {
        "b.matrix": TensorSlice(1, ((0, 5), (7, 8), (20, 24)), 24),
        "b.halves": TensorSlice(0, ((0, 10), (30, 35)), 40),
        "b.cube": TensorSlice(1, ((1, 2), (4, 8)), 8),
        "b.fp8": TensorSlice(1, ((1, 4), (10, 12)), 12),
        "b.bytes": TensorSlice(0, ((600, 700), (0, 3)), 700),
    },
]


def _cut(tensor: Tensor, part: TensorSlice | None) -> Tensor:
    if part is None:
        return tensor
    return torch.cat([tensor.narrow(part.dim, start, stop - start) for start, stop in part.ranges], part.dim)


class _Block(nn.Module):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two files, with odd lengths of headers."""
    names, weight_map = list(TENSORS), dict[str, str]()
    for number, part in enumerate((names[:4], names[4:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / f"model-{number}.safetensors", {"x": "y" * number})
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_pieces_fill_every_byte(cut: int, shards: int, checkpoint: Path) -> None:
    """Slices along both dims, several ranges, shards that cut rows anywhere, any dtype; a buffer that no file holds."""
    stored, slices = stored_tensors(checkpoint), CUTS[cut]
    whole = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    table = torch.randn(77)
    parts = {n.removeprefix("b."): _cut(t, slices.get(n)) for n, t in whole.items() if n.startswith("b.")}
    layout = BlockLayout.of(_Block(parts | {"table": table}), multiple=shards)
    block = PlannedBlock("b", layout, Home.HOST, 0)
    pages, size = _pages(stored), layout.shard_bytes(shards)
    memory = torch.full((layout.slot_bytes,), 0xEE, dtype=torch.uint8)
    for shard in range(shards):
        target = memory[shard * size : (shard + 1) * size]
        for piece in pages.pieces(block, slices, {"b.table": table}, shard * size, (shard + 1) * size):
            assert torch.equal(piece.target(target), torch.full_like(piece.source, 0xEE)), "written twice"
            piece.target(target).copy_(piece.source)
    for entry in layout.entries:
        expected = (parts | {"table": table})[entry.name]
        found, wanted = (t.contiguous().reshape(-1).view(torch.uint8) for t in (entry.view(memory), expected))
        assert torch.equal(found, wanted), entry.name
    used = sum(entry.nbytes for entry in layout.entries)
    assert int((memory == 0xEE).sum()) >= layout.slot_bytes - used, "padding was written to"


def _pages(stored: Mapping[str, StoredTensor]) -> CheckpointPages:
    return CheckpointPages(WeightSource(stored), stored)


def _filled(pages: CheckpointPages, block: PlannedBlock, slices: Mapping[str, TensorSlice], shards: int) -> Tensor:
    """The whole block, put together from the pieces of every shard."""
    memory = torch.full((block.layout.slot_bytes,), 0xEE, dtype=torch.uint8)
    for shard in range(shards):
        start, stop = shard_range(block.layout.slot_bytes, shards, shard)
        for piece in pages.pieces(block, slices, {}, start, stop):
            piece.target(memory[start:stop]).copy_(piece.source)
    return memory


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize(("family", "tp"), [("flux2-klein", 1), ("flux2-klein", 3), ("z-image", 1), ("z-image", 2)])
def test_every_rank_of_a_model(family: str, tp: int, shards: int, checkpoints: dict[str, Path]) -> None:
    """The planned slices (packed projections have up to five ranges) and shards, on every TP rank."""
    sharding = {"ring_degree": shards, "hsdp": {"shard": shards}} if shards > 1 else {}
    offload = {"layerwise": True, "host": "mmap"}
    config = RunConfig.parse({"parallel": {"tp_degree": tp, **sharding}, "offload": offload})
    plan = make_plan(config, checkpoints[family], "cpu")
    files = (plan.layout.model_dir / "transformer").glob("*.safetensors")
    whole = {name: tensor for file in files for name, tensor in load_file(file).items()}
    pages = _pages(plan.layout.stored)
    for slices in plan.layout.slices:
        for block in plan.memory.blocks:
            memory = _filled(pages, block, slices, shards)
            for entry in block.layout.entries:
                fqn = f"{block.name}.{entry.name}"
                assert torch.equal(entry.view(memory), _cut(whole[fqn], slices.get(fqn))), fqn


def test_a_tied_tensor_is_found_under_any_name(tmp_path: Path) -> None:
    """Pitfall 11: a checkpoint stores a tied tensor once, and not always under the name that comes first."""
    save_file({"b.second": torch.arange(5.0)}, tmp_path / "model.safetensors")
    entry = TensorEntry(("first", "second"), "parameter", torch.float32, (5,), (1,), 0, 20)
    block = PlannedBlock("b", BlockLayout((entry,), 256), Home.HOST, 0)
    memory = _filled(_pages(stored_tensors(tmp_path)), block, {}, 1)
    assert torch.equal(entry.view(memory), torch.arange(5.0))


def test_a_slice_without_elements(tmp_path: Path) -> None:
    """No stretch of no bytes: neither where all is empty, nor for one range of several."""
    save_file({"b.none": torch.ones(3, 4), "b.some": torch.ones(3, 4)}, tmp_path / "model.safetensors")
    slices = {"b.none": TensorSlice(1, ((2, 2),), 4), "b.some": TensorSlice(1, ((1, 1), (2, 4)), 4)}
    layout = BlockLayout.of(_Block({"some": torch.ones(3, 2), "none": torch.ones(3, 0), "more": torch.ones(1)}))
    pages = _pages(stored_tensors(tmp_path))
    (piece, _) = pages.pieces(PlannedBlock("b", layout, Home.HOST, 0), slices, {"b.more": torch.ones(1)}, 0, 768)
    assert piece.source.shape == (3, 8)


def test_a_leftover_in_the_file_does_not_replace_a_buffer(tmp_path: Path) -> None:
    """Pitfall 14: a table that the model computes, in an old checkpoint: with another length, other tensors' bytes."""
    save_file({"b.table": torch.zeros(3)}, tmp_path / "model.safetensors")
    layout = BlockLayout.of(_Block({"table": torch.empty(5)}))
    pages = _pages(stored_tensors(tmp_path))
    (piece,) = pages.pieces(PlannedBlock("b", layout, Home.HOST, 0), {}, {"b.table": torch.arange(5.0)}, 0, 256)
    assert torch.equal(piece.source.view(torch.float32).reshape(-1), torch.arange(5.0))


def test_nothing_is_copied_before_it_is_streamed(tmp_path: Path) -> None:
    """Pitfall 29: the bytes are the page cache's. Anonymous memory does not grow, and pieces point into one mapping."""
    save_file({"b.large": torch.ones(2**24)}, tmp_path / "model.safetensors")
    layout = BlockLayout.of(_Block({"large": torch.empty(2**24, device="meta")}))
    before = _anonymous_bytes()
    pages = _pages(stored_tensors(tmp_path))
    (piece,) = pages.pieces(PlannedBlock("b", layout, Home.HOST, 0), {}, {}, 0, layout.slot_bytes)
    assert int(piece.source.sum(dtype=torch.int64)) == 2**24 * (0x80 + 0x3F)
    assert _anonymous_bytes() - before < 2**24
    assert piece.source.shape == (2**26,), "a copy of one dimension can be cut into chunks"


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_bytes_that_would_have_to_be_converted_are_refused(flux2_dir: Path) -> None:
    """The message names the tensor and the way out."""
    config = RunConfig.parse({"dtype": "bfloat16", "offload": {"layerwise": True, "host": "mmap"}})
    with pytest.raises(ConfigError, match=r"found mmap, but transformer_blocks\.0\.\S+ is stored as torch.float32"):
        make_plan(config, flux2_dir, "cpu")


@pytest.mark.parametrize("stored_as", ["a", "b"])
def test_a_tied_tensor_is_not_converted_under_any_name(stored_as: str, tmp_path: Path) -> None:
    module = nn.Module()
    module.a, module.b = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16), nn.Linear(4, 4, bias=False)
    module.b.weight = module.a.weight
    layout = BlockLayout.of(module)
    save_file({f"x.{stored_as}.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"x\.a\.weight is stored as torch.float32 and held as torch.bfloat16"):
        check_pages([PlannedBlock("x", layout, Home.HOST, 0)], stored_tensors(tmp_path))


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp_degree": 2},
    "hsdp2_tp2": {"dp_degree": 2, "tp_degree": 2, "hsdp": {"shard": 2}},
    "ulysses2_ring2": {"ulysses_degree": 2, "ring_degree": 2},
}


@pytest.mark.parametrize(("name", "family"), some(pairs(LAYOUTS, FAMILIES), 1))
def test_streaming_from_the_page_cache(
    name: str, family: str, gang_of: Callable[[int], Gang], checkpoints: dict[str, Path]
) -> None:
    """The same bits as from the host store, and no host store."""
    found = []
    for host in ("shared", "mmap"):
        config = RunConfig.parse({"parallel": LAYOUTS[name], "offload": {"layerwise": True, "host": host}})
        with Engine.start(config, checkpoints[family], gang_of(config.world_size)) as engine:
            prompts = [PROMPT] * config.parallel.dp_degree
            generation = engine.generate(prompts, height=ODD_SIZE[0], width=ODD_SIZE[1])
        found.append(generation.latents[0])
        held = {row["host_bytes"] for row in generation.report["ranks"]}
        assert (held == {0}) == (host == "mmap")
        assert all(row["h2d_bytes_per_step"] > 0 for row in generation.report["ranks"])
    error = max_error(found[1], reference_latents(checkpoints[family], size=ODD_SIZE))
    print(f"{name} {family}: max error {error:.2e}")
    assert torch.equal(found[0], found[1])
    assert error <= TOLERANCE
