"""Looking at a live model: where each tensor really lies, found by address and not by what was meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from crossdock.offload.block import Home
from crossdock.offload.block_stream import BlockStream
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import HomeRecord, TensorRecord

_CHUNK = 2**20
_MASK = 2**63 - 1


def checksum(tensor: Tensor) -> int:
    """A checksum of the tensor's bytes that depends on their order; runs at memory speed, on the tensor's device."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    total = 0
    for start in range(0, whole, 8 * _CHUNK):
        words = raw[start : min(start + 8 * _CHUNK, whole)].view(torch.int64)
        weights = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=raw.device)
        total = (total * 1_000_003 + int((words * weights).sum())) & _MASK
    tail = raw[whole:].to(torch.int64)
    places = torch.arange(1, len(tail) + 1, dtype=torch.int64, device=raw.device)
    return (total * 1_000_003 + int((tail * places).sum()) + raw.numel()) & _MASK


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


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
    model: nn.Module, stream: BlockStream, slices: Mapping[str, TensorSlice], filled: Collection[str]
) -> tuple[TensorRecord, ...]:
    """`slices`: what was read of the tensors that are cut; `filled`: the blocks that this rank answers for."""
    places = Places(stream)
    resting = _replicated_on_host(stream, slices, filled)
    records = []
    for fqn, tensor in named_tensors(model):
        place, offset = places.find(tensor)
        steady = tensor if place == "outside" or place.startswith("block ") else resting.get(fqn)
        records.append(
            TensorRecord(
                fqn,
                place,
                offset,
                str(tensor.device),
                str(tensor.dtype),
                tuple(tensor.shape),
                slices.get(fqn),
                None if steady is None else checksum(steady),
            )
        )
    return tuple(records)


def _replicated_on_host(
    stream: BlockStream, slices: Mapping[str, TensorSlice], filled: Collection[str]
) -> dict[str, Tensor]:
    """fqn -> its bytes in the host store, for what tensor parallelism leaves whole: it must be equal on all ranks."""
    if not slices:
        return {}
    return {
        f"{block.name}.{name}": entry.view(block.source)
        for block in stream.blocks
        if block.home is Home.HOST and block.name in filled and isinstance(block.source, Tensor)
        for entry in block.layout.entries
        for name in entry.names
        if f"{block.name}.{name}" not in slices
    }


def record_homes(
    plan: RunPlan, stream: BlockStream, ranges: Mapping[str, tuple[int, int]], filled: Collection[str]
) -> tuple[HomeRecord, ...]:
    """`ranges`: block -> the bytes of it that this rank holds; `filled`: the blocks that it answers for."""
    planned = {block.name: block for block in plan.blocks}
    return tuple(
        HomeRecord(
            block.name,
            block.home,
            stream.slot_of(block.name),
            planned[block.name].layout.nbytes,
            *ranges[block.name],
            checksum(block.source) if block.name in filled and isinstance(block.source, Tensor) else None,
        )
        for block in stream.blocks
    )


def device_weight_bytes(models: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes of all distinct storages on `device` that the models' parameters and buffers keep alive."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in models
        for _, tensor in named_tensors(model)
        if tensor.device.type == device.type
    }
    return sum(storages.values())


def foreign_hooks(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Hooks and wrappers that move weights and are not ours: accelerate, diffusers offloading, FSDP, DTensor."""
    found = []
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            found.append((path, f"an accelerate hook ({type(module._hf_hook).__name__})"))
        registry = getattr(module, "_diffusers_hook", None)
        found += [(path, f"a diffusers hook ({name})") for name in getattr(registry, "hooks", {})]
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
            found.append((path, "sharded by FSDP"))
        for name, parameter in module._parameters.items():
            if parameter is not None and type(parameter.data) is not Tensor:
                found.append((f"{path}.{name}".lstrip("."), f"a {type(parameter.data).__name__}"))
    return tuple(found)
