"""Reading a checkpoint: every rank gets exactly its bytes, from the rows that hold them, and buffers survive meta.

The ranks are threads of this process; what they exchange meets in a barrier. What is expected is computed from whole
tensors as `safetensors.torch.load_file` returns them.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossdock.offload.stream.block import Home
from crossdock.parallel.group import Group
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.tensor import TensorParallelism, TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.models import checkpoint
from crossdock.runtime.models.checkpoint import stored_tensors
from crossdock.runtime.models.meta import build_config_on_meta, build_on_meta, non_persistent_buffers
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.weights import load as weights
from crossdock.runtime.rank.weights.load import RankWeights, WeightLoader
from crossdock.runtime.rank.weights.source import WeightSource
from tiers import not_quick

# -- the reader ----------------------------------------------------------------------------------------------------

TENSORS = {
    "matrix": torch.arange(42, dtype=torch.float32).reshape(7, 6),
    "half": torch.arange(42).reshape(7, 6).bfloat16(),
    "cube": torch.arange(120, dtype=torch.int64).reshape(5, 6, 4),
    "row": torch.arange(12, dtype=torch.float64).reshape(1, 12),
    "flags": torch.arange(10) % 3 == 0,
    "vector": torch.arange(11, dtype=torch.float16),
    "scalar": torch.tensor(3.5),
}
CUTS = [
    ("matrix", None),
    ("matrix", TensorSlice(0, ((2, 5),), 7)),
    ("matrix", TensorSlice(0, ((0, 2), (3, 4), (5, 7)), 7)),
    ("matrix", TensorSlice(1, ((2, 4),), 6)),
    ("matrix", TensorSlice(1, ((0, 1), (3, 5)), 6)),
    ("half", TensorSlice(0, ((1, 3), (4, 6)), 7)),
    ("cube", TensorSlice(0, ((1, 2), (3, 5)), 5)),
    ("cube", TensorSlice(1, ((0, 2), (4, 6)), 6)),
    ("row", TensorSlice(1, ((6, 12),), 12)),
    ("flags", TensorSlice(0, ((5, 10),), 10)),
    ("vector", None),
    ("vector", TensorSlice(0, ((1, 4), (7, 11)), 11)),
    ("scalar", None),
]


def _take(part: TensorSlice | None, tensor: Tensor) -> Tensor:
    if part is None:
        return tensor
    return torch.cat([tensor.narrow(part.dim, start, stop - start) for start, stop in part.ranges], part.dim)


@dataclass
class Reads:
    """Elements read of each tensor, counted where the file is opened."""

    elements: dict[str, int] = field(default_factory=dict)

    def add(self, fqn: str, tensor: Tensor) -> Tensor:
        self.elements[fqn] = self.elements.get(fqn, 0) + tensor.numel()
        return tensor


class _CountedSlice:
    def __init__(self, fqn: str, inner: Any, reads: Reads) -> None:
        self._fqn, self._inner, self._reads = fqn, inner, reads

    def __getitem__(self, index: Any) -> Tensor:
        return self._reads.add(self._fqn, self._inner[index])


class _CountedFile:
    def __init__(self, inner: Any, reads: Reads) -> None:
        self._inner, self._reads = inner, reads

    def get_slice(self, fqn: str) -> _CountedSlice:
        return _CountedSlice(fqn, self._inner.get_slice(fqn), self._reads)

    def get_tensor(self, fqn: str) -> Tensor:
        return self._reads.add(fqn, self._inner.get_tensor(fqn))


def _count(reader: WeightSource) -> Reads:
    """What `reader` reads from now on."""
    reads, plain = Reads(), reader._open
    reader._open = lambda fqn: _CountedFile(plain(fqn), reads)  # type: ignore[method-assign]
    return reads


@pytest.fixture
def reader(tmp_path: Path) -> WeightSource:
    """Of `TENSORS`, spread over two files."""
    names, weight_map = sorted(TENSORS), dict[str, str]()
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return WeightSource(stored_tensors(tmp_path))


@pytest.mark.parametrize(("fqn", "part"), CUTS)
def test_every_range_of_every_slice(fqn: str, part: TensorSlice | None, reader: WeightSource) -> None:
    """An off-by-one at the border of two parts or rows: all ranges, against the whole tensor sliced by torch."""
    expected = _take(part, TENSORS[fqn])
    found = reader.rows(fqn, part)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    flat = expected.reshape(-1)
    for start, stop in itertools.combinations(range(flat.numel() + 1), 2):
        assert torch.equal(reader.flat(fqn, part, start, stop), flat[start:stop]), (start, stop)


@pytest.mark.parametrize(("fqn", "part"), [cut for cut in CUTS if TENSORS[cut[0]].ndim])
def test_only_touched_rows_are_read(fqn: str, part: TensorSlice | None, reader: WeightSource) -> None:
    """Pitfall 6, in small: a rank that reads the whole tensor and throws most of it away."""
    expected = _take(part, TENSORS[fqn])
    width = max(math.prod(expected.shape[1:]), 1)
    reads = _count(reader)
    for start, stop in itertools.combinations(range(expected.numel() + 1), 2):
        reads.elements.clear()
        reader.flat(fqn, part, start, stop)
        assert reads.elements == {fqn: (-(-stop // width) - start // width) * width}
    reads.elements.clear()
    reader.rows(fqn, part)
    assert reads.elements == {fqn: expected.numel()}


def test_the_index_decides_which_files_count(tmp_path: Path) -> None:
    """A leftover file of an earlier download must not win over the one that the index names."""
    save_file({"a": torch.zeros(2)}, tmp_path / "new.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "old.safetensors")
    index = {"weight_map": {"a": "new.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = stored_tensors(tmp_path)["a"]
    assert (found.file.name, found.shape, found.dtype) == ("new.safetensors", (2,), torch.float32)


# -- the loader: ranks as threads ----------------------------------------------------------------------------------


class World:
    """`size` ranks, each a thread; `exchange` stands for the one that needs a process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._values: list[Any] = [None] * size
        self._here = threading.local()

    def exchange(self, value: Any, group: Group | None) -> list[Any]:
        assert group is None
        self._values[self._here.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, act: Callable[[int], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            self._here.rank = rank
            try:
                return act(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(on, range(self.size)))


@dataclass
class Rank:
    """One rank after loading."""

    mesh: Mesh
    model: nn.Module
    loader: WeightLoader
    weights: RankWeights
    reads: Reads


@contextmanager
def _loaded(plan: RunPlan) -> Iterator[list[Rank]]:
    """Every rank of `plan` with its blocks loaded; stores are closed at the end."""
    world = World(plan.layout.mesh.world_size)
    ready = []
    for rank in range(world.size):
        groups = plan.layout.mesh.groups(rank)
        mesh = Mesh(plan.layout.mesh, rank, groups, dict.fromkeys(groups))
        model = build_on_meta(plan.layout.spec.transformer, plan.layout.model_dir / "transformer")
        at = plan.layout.mesh.coordinates(rank)["tp"]
        TensorParallelism.apply(model, plan.layout.spec.tensor_plan, at, plan.layout.mesh.tp, group=None)
        loader = WeightLoader(plan, mesh, model, torch.device("cpu"))
        ready.append((mesh, model, loader, _count(loader._files)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "exchange", world.exchange)
        held: list[RankWeights] = world.run(lambda rank: ready[rank][2].load_blocks())
    ranks = [Rank(m, model, loader, w, reads) for (m, model, loader, reads), w in zip(ready, held, strict=True)]
    stores = [rank.weights.store for rank in ranks]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.weights.blocks.clear()
            rank.loader.close()
        for store in stores:
            if store is not None:
                store.close()


def _whole(plan: RunPlan) -> dict[str, Tensor]:
    files = (plan.layout.model_dir / "transformer").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _packed(plan: RunPlan, number: int, tp: int, whole: Mapping[str, Tensor]) -> Tensor:
    """The bytes of block `number` on TP rank `tp`, put together from whole tensors."""
    block = plan.memory.blocks[number]
    memory = torch.zeros(block.layout.slot_bytes, dtype=torch.uint8)
    for entry in block.layout.entries:
        fqn = f"{block.name}.{entry.name}"
        value = _take(plan.layout.slices[tp].get(fqn), whole[fqn]).to(plan.layout.dtypes[fqn]).contiguous()
        assert tuple(value.shape) == entry.shape
        memory[entry.offset : entry.offset + value.nbytes] = value.reshape(-1).view(torch.uint8)
    return memory


LAYERWISE = {"offload": {"layerwise": True}}
CONFIGS: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "tp2": {"parallel": {"tp_degree": 2}},
    "layerwise-tp2": {"parallel": {"tp_degree": 2}, **LAYERWISE},
    "hsdp-2x2": {"parallel": {"dp_degree": 4, "hsdp": {"replicate": 2, "shard": 2}}},
    "layerwise-hsdp-2x2": {"parallel": {"dp_degree": 4, "hsdp": {"replicate": 2, "shard": 2}}, **LAYERWISE},
    "layerwise-hsdp-of-3": {"parallel": {"ring_degree": 3, "hsdp": {"replicate": 1, "shard": 3}}, **LAYERWISE},
    "tp2-hsdp-of-2": {
        "parallel": {"ulysses_degree": 2, "tp_degree": 2, "hsdp": {"replicate": 1, "shard": 2}},
        **LAYERWISE,
    },
    "layerwise-ulysses2-ring2": {"parallel": {"ulysses_degree": 2, "ring_degree": 2}, **LAYERWISE},
    "budget": {"parallel": {"ulysses_degree": 2}, "offload": {"layerwise": True, "device_budget": "5MiB"}},
    "bfloat16": {"parallel": {"tp_degree": 2}, "dtype": "bfloat16", **LAYERWISE},
}


def _plan(name: str, directory: Path) -> RunPlan:
    return make_plan(RunConfig.parse(CONFIGS[name]), directory, "cpu")


@not_quick
@pytest.mark.parametrize("family", ["flux2-klein", "z-image"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_rank_holds_exactly_its_bytes(name: str, family: str, checkpoints: dict[str, Path]) -> None:
    """A wrong TP slice, a shard cut at the wrong byte, a block at the wrong place of the store: any wrong byte."""
    plan = _plan(name, checkpoints[family])
    whole = _whole(plan)
    with _loaded(plan) as ranks:
        for rank in ranks:
            tp, index = rank.mesh.index_in("tp"), rank.mesh.index_in("weights")
            assert [block.name for block in rank.weights.blocks] == [block.name for block in plan.memory.blocks]
            for number, block in enumerate(rank.weights.blocks):
                expected, start = _packed(plan, number, tp, whole), 0
                if block.home.sharded:
                    expected = expected.chunk(plan.layout.mesh.hsdp_shard)[index]
                    start = index * len(expected)
                assert rank.weights.ranges[block.name][0] == start
                assert torch.equal(block.source, expected), f"rank {rank.mesh.rank}: {block.name}"


@pytest.mark.parametrize("family", ["flux2-klein", "z-image"])
@pytest.mark.parametrize("name", ["tp2", "layerwise-hsdp-2x2", "bfloat16"])
def test_what_is_outside_the_blocks(name: str, family: str, checkpoints: dict[str, Path]) -> None:
    """Pitfalls 9 and 10: top-level parameters and tensors kept as plain attributes left on meta, or read wrongly."""
    plan = _plan(name, checkpoints[family])
    whole = _whole(plan)
    with _loaded(plan) as ranks:
        for rank in ranks:
            rank.loader.load_outside()
            live = dict(rank.model.named_parameters()) | dict(rank.model.named_buffers())
            for fqn in plan.memory.outside:
                expected = _take(plan.layout.slices[rank.mesh.index_in("tp")].get(fqn), whole[fqn])
                assert torch.equal(live[fqn], expected.to(plan.layout.dtypes[fqn])), fqn
            loose = [v for module in rank.model.modules() for v in vars(module).values() if isinstance(v, Tensor)]
            assert not any(value.is_meta for value in loose)


@pytest.mark.parametrize("name", ["layerwise-hsdp-2x2", "layerwise-hsdp-of-3", "tp2", "tp2-hsdp-of-2"])
def test_a_rank_reads_its_share_and_no_more(name: str, flux2_dir: Path) -> None:
    """Pitfall 6: the whole model read on every rank before it is cut. Slack: the rows at a shard's two ends."""
    plan = _plan(name, flux2_dir)
    sizes = {fqn: math.prod(stored.shape) for fqn, stored in plan.layout.stored.items()}
    inside = {fqn: size for fqn, size in sizes.items() if plan.memory.owner_of(fqn)}
    with _loaded(plan) as ranks:
        for rank in ranks:
            slices = plan.layout.slices[rank.mesh.index_in("tp")]
            filled = [block for block in plan.memory.blocks if block.name in rank.weights.filled]
            rows = sum(2 * max((math.prod(e.shape[1:]) for e in block.layout.entries), default=0) for block in filled)
            share = sum(
                size * (slices[fqn].size / slices[fqn].full_size if fqn in slices else 1)
                for fqn, size in inside.items()
                if any(fqn.startswith(f"{block.name}.") for block in filled)
            )
            assert share / plan.layout.mesh.hsdp_shard * 0.5 < sum(rank.reads.elements.values())
            padding = sum(block.layout.slot_bytes for block in filled) / 4 - share
            assert sum(rank.reads.elements.values()) <= (share + padding) / plan.layout.mesh.hsdp_shard + rows
            assert rank.reads.elements.keys() <= inside.keys()


def test_sharers_divide_the_reading_and_map_one_store(flux2_dir: Path) -> None:
    """Pitfall 29: four ranks that each read and hold the whole model; here it is read once and held once."""
    plan = _plan("layerwise-ulysses2-ring2", flux2_dir)
    with _loaded(plan) as ranks:
        filled = [name for rank in ranks for name in rank.weights.filled]
        assert sorted(filled) == sorted(block.name for block in plan.memory.blocks)
        assert {rank.weights.shares_store_with for rank in ranks} == {(0, 1, 2, 3)}
        stores = [rank.weights.store for rank in ranks]
        everything = sum(block.held_bytes for block in plan.memory.blocks)
        assert all(store is not None and store.nbytes == everything for store in stores)
        first, last = ranks[0].weights.blocks[0].source, ranks[3].weights.blocks[0].source
        first[5] ^= 0xFF
        assert first[5] == last[5], "two stores, not one"


def test_stores_are_apart_by_slice_and_by_shard(flux2_dir: Path) -> None:
    """A store shared by ranks of two TP slices, or of two shards, would give one of them the other's bytes."""
    with _loaded(_plan("tp2-hsdp-of-2", flux2_dir)) as ranks:
        assert [rank.weights.shares_store_with for rank in ranks] == [(0,), (1,), (2,), (3,)]
    with _loaded(_plan("layerwise-hsdp-2x2", flux2_dir)) as ranks:
        assert [rank.weights.shares_store_with for rank in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]


def test_a_budget_keeps_some_blocks_resident(flux2_dir: Path) -> None:
    """The "budget" row above is what it is meant to be: some blocks stay on the device, and all have a host copy."""
    blocks = _plan("budget", flux2_dir).memory.blocks
    assert {block.slot is None for block in blocks} == {True, False}
    assert {block.home for block in blocks} == {Home.HOST}


def test_a_failing_read_is_not_swallowed(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that goes bad between planning and loading stops the rank instead of leaving zeros in its place."""
    plan = _plan("tp2", flux2_dir)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("planted")

    monkeypatch.setattr(checkpoint, "safe_open", fails)
    with pytest.raises(OSError, match="planted"), _loaded(plan):
        pass


# -- dtypes --------------------------------------------------------------------------------------------------------


def test_dtype_of_the_config(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype: bfloat16` halves the blocks; `_keep_in_fp32_modules` and tensors that are no floats stay as they are."""
    auto, half = _plan("layerwise-tp2", flux2_dir), _plan("bfloat16", flux2_dir)
    assert set(auto.layout.dtypes.values()) == {torch.float32}
    assert set(half.layout.dtypes.values()) == {torch.bfloat16}
    for before, after in zip(auto.memory.blocks, half.memory.blocks, strict=True):
        big = [(a.nbytes, b.nbytes) for a, b in zip(before.layout.entries, after.layout.entries, strict=True)]
        assert all(a == 2 * b for a, b in big)
    assert half.layout.pipeline_dtype == torch.bfloat16
    cls = diffusers.Flux2Transformer2DModel
    monkeypatch.setattr(cls, "_keep_in_fp32_modules", ["norm_q", "time_guidance_embed"], raising=False)
    for fqn, dtype in _plan("bfloat16", flux2_dir).layout.dtypes.items():
        kept = {"norm_q", "time_guidance_embed"} & set(fqn.split("."))
        assert dtype == (torch.float32 if kept else torch.bfloat16), fqn


# -- models on meta ------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    },
    "PriorTransformer": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "embedding_dim": 16,
        "num_embeddings": 5,
        "additional_embeddings": 4,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
    },
}


@pytest.fixture(params=MODELS)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """(built normally, built on meta)."""
    normal: nn.Module = getattr(diffusers, request.param)(**MODELS[request.param])
    normal.save_config(tmp_path)  # type: ignore[operator]
    return normal, build_on_meta(request.param, tmp_path)


def test_buffers_that_no_checkpoint_holds_survive(built: tuple[nn.Module, nn.Module]) -> None:
    """Pitfall 14: rotary and position tables lost with the meta device give wrong positions."""
    normal, meta = built
    names = non_persistent_buffers(normal)
    assert names, "this model tests nothing"
    assert non_persistent_buffers(meta) == names
    for name in names:
        buffer = meta.get_buffer(name)
        assert not buffer.is_meta, name
        assert buffer.dtype == normal.get_buffer(name).dtype
        assert torch.equal(buffer, normal.get_buffer(name)), name


def test_parameters_hold_no_memory(built: tuple[nn.Module, nn.Module]) -> None:
    """Pitfall 6: made by `torch.ones`, `zeros` or `randn` (norms, tables), they are not caught with `torch.empty`."""
    normal, meta = built
    expected = {name: (p.shape, p.dtype) for name, p in normal.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in meta.named_parameters()} == expected
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert not any(parameter.requires_grad for parameter in meta.parameters())
    assert not any(module.training for module in meta.modules())


def test_nothing_is_sent_to_meta_afterwards(built: tuple[nn.Module, nn.Module]) -> None:
    """The mode that builds on meta ends with the build."""
    assert not torch.empty(1).is_meta
    assert not nn.Linear(1, 1).weight.is_meta


class _Ways(nn.Module):
    """Parameters made in every way, a tied one, and both kinds of buffers."""

    def __init__(self, ways: Sequence[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.made = nn.ParameterList(nn.Parameter(way(2, 3)) for way in ways)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.absent = None
        self.register_parameter("none", None)


def test_ties_and_missing_parameters_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 11: a tied weight that becomes two is loaded twice, and one copy is stranded."""
    ways = (torch.empty, torch.ones, torch.zeros, torch.rand, torch.randn)

    class Model(_Ways):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Model:
            return cls(ways)

    monkeypatch.setattr(diffusers, "Model", Model, raising=False)
    (tmp_path / "config.json").write_text('{"_class_name": "Model"}')
    meta = build_on_meta("Model", tmp_path)
    assert isinstance(meta, Model)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta.first.weight is meta.second.weight
    assert meta.first.bias is not meta.second.bias
    assert torch.equal(meta.get_buffer("table"), torch.arange(4.0))


@pytest.mark.parametrize(("persistent", "needed"), [(True, False), (False, True), (True, True)])
def test_a_table_that_the_checkpoint_holds_is_not_computed(
    persistent: bool, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that computes nothing else: 9 s for the 150,000 positions of Stable Diffusion 3.5 medium."""
    computed: list[bool] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.arange(4.0) * 2
            computed.append(not table.is_meta)
            self.register_buffer("table", table, persistent=persistent)
            self.beside = [torch.ones(2)] if needed and persistent else []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Model:
            return cls()

    monkeypatch.setattr(diffusers, "Model", Model, raising=False)
    model = build_config_on_meta("Model", {})
    assert any(computed) == needed
    assert model.get_buffer("table").is_meta == (not needed)
    assert not any(tensor.is_meta for tensor in cast(Any, model).beside)


def test_tensors_kept_in_lists_and_mappings_go_to_the_device() -> None:
    """Pitfall 10: neither parameter nor buffer, and not even an attribute of the module."""
    model = nn.Module()
    own = torch.ones(2)
    copied = own.clone()
    own.to = lambda *_: copied  # type: ignore[method-assign, assignment]  # as on another device
    model.kept, model.named, model.direct = [own], {"table": own}, own
    loader = object.__new__(WeightLoader)
    loader._memory = cast(MemoryPlan, SimpleNamespace(outside=()))
    loader._model, loader._device = model, torch.device("cpu")
    loader.load_outside()
    assert all(found is copied for found in (model.kept[0], model.named["table"], model.direct))
