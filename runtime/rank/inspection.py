"""Looking at a live model: where each tensor really lies, found by address and not by what was meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

from crossdock.offload.live.discovery import named_plain_tensors
from crossdock.offload.live.foreign import foreign_mechanisms
from crossdock.offload.live.resting import is_resting
from crossdock.offload.memory.layout import local_part
from crossdock.offload.stream.block import StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.plan.memory_plan import PlannedBlock
from crossdock.runtime.reports.records import DeviceBytes, HomeRecord, MemorySpan, TensorRecord

_CHUNK = 2**20
_MASK = 2**63 - 1
_LARGE = 2**20
"""Bytes from which on CUDA's allocator may leave as much unused behind what it hands out; below it, it rounds up to"""
_SMALL_ROUNDING = 512


def checksum(tensor: Tensor) -> int:
    """A checksum of the tensor's bytes that depends on their order; runs at memory speed, on the tensor's device."""
    return int(digest(tensor)) & _MASK


def digest(tensor: Tensor) -> Tensor:
    """The checksum as int64 `[]` on the tensor's device, for whoever must not wait for the device yet."""
    raw = _raw(tensor)
    whole = raw.numel() // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for start in range(0, whole, 8 * _CHUNK):
        words = raw[start : min(start + 8 * _CHUNK, whole)].view(torch.int64)
        weights = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=raw.device)
        # folded: times an odd weight, the top bit of every word would count alike, and two changed signs for nothing
        total = total * 1_000_003 + (words ^ (words >> 32)).mul_(weights).sum()
    tail = raw[whole:].to(torch.int64)
    places = torch.arange(1, len(tail) + 1, dtype=torch.int64, device=raw.device)
    return total * 1_000_003 + (tail * places).sum() + raw.numel()


def _raw(tensor: Tensor) -> Tensor:
    """Its bytes: uint8 `[n]`, a view where that can be."""
    flat = tensor.detach().contiguous()
    flat = flat.reshape(()) if flat.numel() == 1 else flat  # which may have any stride
    return flat.reshape(-1).view(torch.uint8)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer; of a DTensor, which is another mechanism's, this rank's part."""
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        yield from ((fqn, local_part(tensor)) for fqn, tensor in named)


def memory_span(tensor: Tensor) -> MemorySpan | None:
    """From the first element's bytes to the last one's; None where there are none."""
    if tensor.is_meta or not tensor.numel():
        return None
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return MemorySpan(tensor.data_ptr(), tensor.data_ptr() + (1 + steps) * tensor.element_size())


def memory_spans(tensors: Iterable[Tensor]) -> tuple[MemorySpan, ...]:
    """The spans of all, by address; what touches is one."""
    merged: list[MemorySpan] = []
    for span in sorted({span for tensor in tensors if (span := memory_span(tensor)) is not None}, key=_start):
        if merged and span.start <= merged[-1].stop:
            merged[-1] = MemorySpan(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return tuple(merged)


def _start(span: MemorySpan) -> int:
    return span.start


def record_reads(stream: BlockStream) -> dict[str, tuple[MemorySpan, ...]]:
    """Block -> what the copies of its loads really read, seen where they are made."""
    return {block: memory_spans(sources) for block, sources in stream.read.items()}


class Places:
    """Address ranges of slots and resident blocks."""

    def __init__(self, stream: BlockStream) -> None:
        slots = {f"slot {i}": memory for i, memory in enumerate(stream.slot_memory)}
        blocks = {f"block {name}": memory for name, memory in stream.resident_memory.items()}
        self._ranges = [(name, m.data_ptr(), m.data_ptr() + m.nbytes) for name, m in (slots | blocks).items()]

    def find(self, tensor: Tensor) -> tuple[str, int]:
        """(place, offset in bytes) of a tensor's first byte."""
        if tensor.is_meta:
            return "nowhere", 0
        address = tensor.data_ptr()
        for name, start, stop in self._ranges:
            if start <= address < stop:
                return name, address - start
        return "outside", 0


def record_tensors(
    model: nn.Module, stream: BlockStream, slices: Mapping[str, TensorSlice]
) -> tuple[TensorRecord, ...]:
    """
    Args:
        slices: what was read of the tensors that are cut.
    """
    places = Places(stream)
    return tuple(_record(fqn, tensor, places.find(tensor), slices.get(fqn)) for fqn, tensor in named_tensors(model))


def record_plain(model: nn.Module, stream: BlockStream) -> tuple[TensorRecord, ...]:
    """The tensors that the model keeps as plain attributes."""
    places = Places(stream)
    return tuple(_record(fqn, tensor, places.find(tensor), None) for fqn, tensor in named_plain_tensors(model))


def _record(fqn: str, tensor: Tensor, place: tuple[str, int], part: TensorSlice | None) -> TensorRecord:
    shape, span = tuple(tensor.shape), memory_span(tensor)
    return TensorRecord(fqn, *place, str(tensor.device), str(tensor.dtype), shape, part, span)


def record_homes(
    blocks: Sequence[PlannedBlock],
    stream: BlockStream,
    ranges: Mapping[str, tuple[int, int]],
) -> tuple[HomeRecord, ...]:
    """
    Args:
        ranges: block -> the bytes of it that this rank holds.
    """
    planned = {block.name: block for block in blocks}
    stays, reads = stream.resident_memory, record_reads(stream)
    return tuple(
        HomeRecord(
            block.name,
            block.home,
            stream.slot_of(block.name),
            planned[block.name].layout.slot_bytes,
            *ranges[block.name],
            memory_span(block.source) if isinstance(block.source, Tensor) else None,
            memory_span(stays[block.name]) if block.name in stays else None,
            () if isinstance(block.source, Tensor) else memory_spans(piece.source for piece in block.source),
            reads.get(block.name, ()),
            block.codec.name,
            _tables(planned[block.name], block, ranges[block.name][0]),
        )
        for block in stream.blocks
    )


def _tables(planned: PlannedBlock, block: StreamedBlock, start: int) -> int:
    """`start`: of the bytes of its slot that this rank holds."""
    if not isinstance(block.source, Tensor) or block.codec.in_place:
        return 0
    index = start // planned.layout.shard_bytes(planned.parts)
    tables = block.codec.tables(planned.layout, planned.parts, index, block.source)
    return xxh3_64_intdigest(tables.cpu().numpy().tobytes())


def device_weight_bytes(models: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes of all distinct storages on `device` that the models' parameters and buffers keep alive."""
    return sum(_storages((t for model in models for _, t in named_tensors(model)), device).values())


def measure_device(
    model: nn.Module,
    others: Iterable[nn.Module],
    shards: Iterable[Tensor],
    device: torch.device,
    allocated: int | None = None,
) -> DeviceBytes:
    """What lies on the device.

    Args:
        others: the pipeline's other components; what they share with the model counts once.
        shards: blocks' bytes at rest there.
        allocated: by how much the device's allocator grew meanwhile, where it is known.
    """
    weights = _storages((tensor for _, tensor in named_tensors(model)), device)
    resting = _storages(shards, device)
    more = [tensor for module in others for _, tensor in named_tensors(module)]
    more += [tensor for _, tensor in named_plain_tensors(model)]
    rest = {start: nbytes for start, nbytes in _storages(more, device).items() if start not in weights | resting}
    sizes = [*weights.values(), *resting.values(), *rest.values()]
    return DeviceBytes(
        sum(weights.values()),
        sum(resting.values()),
        sum(rest.values()),
        allocated,
        sum(_SMALL_ROUNDING if nbytes < _LARGE else _LARGE for nbytes in sizes),
    )


def _storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, int]:
    """Address -> bytes of the distinct storages on `device`; what rests on the host is not there, on a CPU, too."""
    there = (tensor for tensor in tensors if tensor.device.type == device.type and not is_resting(tensor))
    storages = (tensor.untyped_storage() for tensor in there)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def foreign_hooks(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """(path, what) of all that moves, casts or shards weights and is not ours: accelerate, diffusers, FSDP, DTensor."""
    return tuple((found.path, found.what) for found in foreign_mechanisms(model))
