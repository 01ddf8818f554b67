"""The layout of a block: no tensor is lost, moved, doubled or misaligned when all become one byte range."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, aligned_bytes, round_up

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.bool)
CPU = torch.device("cpu")


def _random_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of random bits; any bits are legal, NaN payloads included (bool: 0 or 1)."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    elements = int(torch.Size(shape).numel())
    return torch.randint(0, 256, (elements * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)


def _raw(tensor: Tensor) -> bytes:
    """The bits of `tensor` in logical order, whatever its dtype and strides."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Mixed(nn.Module):
    """Every dtype as parameter and buffer, in odd sizes, and some column-major, empty or scalar ones."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            self.register_parameter(f"weight_{name}", _parameter(_random_bytes((5, 7), dtype)))
            self.register_parameter(f"column_major_{name}", _parameter(_random_bytes((7, 3), dtype).t()))
            self.register_buffer(f"buffer_{name}", _random_bytes((3,), dtype), persistent=dtype != torch.int8)
        self.empty = _parameter(torch.empty(0, 4, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.empty(3, 0))
        self.register_buffer("scalar", torch.tensor(3.5))
        self.register_buffer("sparse_rows", _random_bytes((6, 4), torch.float32)[::2, 1:3])
        self.inner = nn.ModuleDict({"norm": nn.BatchNorm1d(3)})


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)


def _check_layout(layout: BlockLayout, block: nn.Module, parts: int) -> None:
    """Every tensor is there once, in its place, apart from all others, aligned, and all shards are equal."""
    buffers = dict(block.named_buffers(remove_duplicate=False))
    placed = {name: entry for entry in layout.entries for name in entry.names}
    assert sorted(placed) == sorted(name for name, _ in _tensors(block))
    for name, tensor in _tensors(block):
        entry = placed[name]
        found = (entry.dtype, entry.shape, entry.stride)
        assert found == (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())), name
        assert entry.kind == ("buffer" if name in buffers else "parameter")
        assert entry.offset % ALIGNMENT == 0
    end = 0
    for entry in sorted(layout.entries, key=lambda entry: (entry.offset, entry.nbytes)):
        assert entry.offset >= end, f"{entry.name} lies over the tensor before it"
        end = entry.offset + entry.nbytes
    assert end <= layout.slot_bytes
    assert layout.shard_bytes(parts) % ALIGNMENT == 0
    assert layout.shard_bytes(parts) * parts == layout.slot_bytes
    assert layout.slot_bytes - end < ALIGNMENT * (parts + 1), "more padding than alignment needs"


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_every_tensor_is_placed_once_and_aligned(parts: int) -> None:
    """Pitfalls 9 and 23: a forgotten buffer stays on meta; off 256 bytes, fp8 kernels break."""
    block = Mixed()
    _check_layout(BlockLayout.of(block, multiple=parts), block, parts)


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_is_bit_exact(seed: int) -> None:
    """Pitfall 22: flattening through one dtype rounds, and flattening without strides transposes."""
    block = Mixed(seed)
    layout = BlockLayout.of(block)
    memory = aligned_bytes(layout.slot_bytes, CPU).random_(0, 256)
    layout.pack(block, memory)
    moved = aligned_bytes(layout.slot_bytes, CPU).copy_(memory)  # as a copy or a gather moves it: as bytes
    originals = dict(_tensors(block))
    for entry in layout.entries:
        view, original = entry.view(moved), originals[entry.name]
        assert view.dtype == original.dtype
        assert view.stride() == original.stride(), entry.name
        assert view.shape == original.shape
        assert _raw(view) == _raw(original), entry.name
        assert view.numel() == 0 or view.data_ptr() == moved.data_ptr() + entry.offset, "a copy, not a view"
        assert view.data_ptr() % ALIGNMENT == 0 or view.numel() == 0


def test_column_major_stays_column_major() -> None:
    """Pitfall 22: `_scaled_mm` wants a column-major fp8 weight; a row-major one is refused or wrong."""
    block = nn.Module()
    block.weight = _parameter(_random_bytes((16, 32), torch.float8_e4m3fn).t())
    layout = BlockLayout.of(block)
    memory = aligned_bytes(layout.slot_bytes, CPU)
    layout.pack(block, memory)
    view = layout.entries[0].view(memory)
    assert view.stride() == (1, 32)
    assert memory[: layout.entries[0].nbytes].numpy().tobytes() == _raw(block.weight.t()), "stored transposed"


def test_zero_size_tensors_take_no_bytes() -> None:
    """An empty tensor must neither crash the view nor make its neighbours overlap."""
    block = nn.Module()
    block.a, block.b, block.c = (_parameter(torch.ones(size)) for size in (0, 3, 0))
    block.register_buffer("d", torch.empty(0, 5, dtype=torch.int8))
    layout = BlockLayout.of(block)
    _check_layout(layout, block, 1)
    assert [entry.nbytes for entry in layout.entries] == [0, 12, 0, 0]
    assert layout.slot_bytes == ALIGNMENT
    memory = aligned_bytes(layout.slot_bytes, CPU)
    layout.pack(block, memory)
    assert [tuple(entry.view(memory).shape) for entry in layout.entries] == [(0,), (3,), (0,), (0, 5)]


@pytest.mark.parametrize("parts", [1, 3])
def test_a_block_without_bytes(parts: int) -> None:
    """A block of only empty tensors, or of none, has an empty range that can still be viewed and cut."""
    block = nn.Module()
    assert BlockLayout.of(block, multiple=parts).slot_bytes == 0
    block.empty = _parameter(torch.empty(0, 2, dtype=torch.bfloat16))
    layout = BlockLayout.of(block, multiple=parts)
    assert layout.shard_bytes(parts) == 0
    assert layout.entries[0].view(aligned_bytes(0, CPU)).shape == (0, 2)


def test_tied_tensors_are_placed_once_with_all_names() -> None:
    """Pitfall 11: placement by name leaves one of two tied names behind, and pays for the bytes twice."""
    block = nn.Module()
    block.first, block.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    block.second.weight = block.first.weight
    block.shared = block.first  # one module under two names
    table = torch.arange(4.0)
    block.register_buffer("table", table)
    block.second.register_buffer("table", table)
    layout = BlockLayout.of(block)
    _check_layout(layout, block, 1)
    assert [set(entry.names) for entry in layout.entries] == [
        {"first.weight", "second.weight", "shared.weight"},
        {"first.bias", "shared.bias"},
        {"table", "second.table"},
    ]
    assert layout.slot_bytes == 3 * ALIGNMENT


def test_equal_tensors_are_not_tied() -> None:
    """Placement by value would let a LoRA or a quantizer change two weights through one."""
    block = nn.Module()
    block.a, block.b = _parameter(torch.ones(4)), _parameter(torch.ones(4))
    assert [entry.names for entry in BlockLayout.of(block).entries] == [("a",), ("b",)]


def test_meta_block_and_planned_dtypes() -> None:
    """The plan is made from meta tensors: its offsets must be those of the loaded block, dtypes too."""
    with torch.device("meta"):
        planned = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    loaded = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    loaded[0].to(torch.bfloat16)
    dtypes = {"0.weight": torch.bfloat16, "0.bias": torch.bfloat16}
    assert BlockLayout.of(planned, dtypes, multiple=2) == BlockLayout.of(loaded, multiple=2)


def test_packing_leaves_other_bytes_alone() -> None:
    """`pack` into a window of a larger store must not write a byte outside the block's own range."""
    block = Mixed()
    layout = BlockLayout.of(block)
    store = torch.full((layout.slot_bytes + 2 * ALIGNMENT,), 0xA5, dtype=torch.uint8)
    layout.pack(block, store[ALIGNMENT : ALIGNMENT + layout.slot_bytes])
    assert bool((store[:ALIGNMENT] == 0xA5).all())
    assert bool((store[ALIGNMENT + layout.slot_bytes :] == 0xA5).all())


def test_a_layout_is_only_cut_as_it_was_laid_out() -> None:
    """A shard that starts between two alignments gathers misaligned tensors: refused, with both numbers."""
    block = nn.Module()
    block.weight = _parameter(torch.zeros(3 * ALIGNMENT, dtype=torch.uint8))
    layout = BlockLayout.of(block)
    assert layout.shard_bytes(3) == ALIGNMENT
    with pytest.raises(ValueError, match=f"{layout.slot_bytes} bytes .* 2 shards"):
        layout.shard_bytes(2)


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 257, 10_000])
def test_aligned_bytes(nbytes: int) -> None:
    """Slots start on an alignment, so that offsets within the block are alignments of addresses too."""
    for _ in range(10):
        memory = aligned_bytes(nbytes, CPU)
        assert memory.shape == (nbytes,)
        assert nbytes == 0 or memory.data_ptr() % ALIGNMENT == 0
        assert memory.untyped_storage().nbytes() <= nbytes + ALIGNMENT


@pytest.mark.parametrize(("value", "rounded"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_round_up(value: int, rounded: int) -> None:
    """Offsets depend on it: one too small overlaps two tensors."""
    assert round_up(value, ALIGNMENT) == rounded
