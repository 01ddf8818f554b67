"""The layout of a block: all its parameters and buffers packed into one byte range.

Bytes, not dtypes: whatever mixture of dtypes a block holds (bf16 weights, fp32 norms, fp8 with scales), moving it
is one copy and gathering it is one collective. Every tensor starts at a multiple of `ALIGNMENT` bytes and keeps its
dtype, shape and stride, so that column-major weights stay column-major. Of a DTensor, it is this rank's local tensor
that is laid out; what makes it a DTensor again is kept beside it, and no byte crosses ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.utils.dlpack import from_dlpack

ALIGNMENT = 256
"""Bytes. CUDA's vector loads, fp8 kernels (32) and TMA descriptors (128) are all satisfied by it."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def aligned_bytes(nbytes: int, device: torch.device) -> Tensor:
    """Fresh device memory: a uint8 tensor of `nbytes` whose address is a multiple of `ALIGNMENT`."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`: the very local tensor of a DTensor, which `to_local` would give as a view."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def set_local_part(tensor: Tensor, local: Tensor) -> None:
    """Let go of what this rank holds of `tensor` and hold `local` instead.

    A DTensor's local tensor is exchanged, not given other data: it may be a view whose base keeps the memory.
    """
    if isinstance(tensor, DTensor):
        tensor._local_tensor = local
    else:
        tensor.data = local


@dataclass(frozen=True)
class Distribution:
    """What makes the local tensors of the ranks one DTensor of `shape` and `stride` (those of the whole tensor)."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self | None:
        """None for a plain tensor."""
        if not isinstance(tensor, DTensor):
            return None
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tuple(tensor.stride()))

    def wrap(self, local: Tensor) -> Tensor:
        """The DTensor whose part on this rank is `local`: no copy, and not collective."""
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a block. `names` are its names relative to the block (several where tensors are tied).

    Of a DTensor, dtype, shape, stride and bytes are those of the local tensor; `distributed` has the rest.
    """

    names: tuple[str, ...]
    kind: Literal["parameter", "buffer"]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int
    distributed: Distribution | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    def of(self, raw: Tensor) -> Tensor:
        """This rank's part of the tensor, over its bytes (uint8, `nbytes`)."""
        return raw.view(self.dtype).as_strided(self.shape, self.stride)

    def view(self, memory: Tensor) -> Tensor:
        """This rank's part of the tensor inside `memory` (uint8, the block's whole byte range); no copy."""
        return self.of(memory[self.offset : self.offset + self.nbytes])

    def apart(self, memory: Tensor) -> Tensor:
        """`view` in a storage of its own: `torch.save` refuses tensors of two dtypes in one."""
        return self.of(from_dlpack(memory[self.offset : self.offset + self.nbytes]))

    def hollow(self) -> Tensor:
        """A tensor of that dtype, shape and stride without memory: not to be touched."""
        tensor = self.of(torch.empty(self.nbytes, dtype=torch.uint8))
        tensor.untyped_storage().resize_(0)
        return tensor

    def tensor(self, memory: Tensor) -> Tensor:
        """The tensor as the block holds it: `view`, made a DTensor where it is one."""
        return self.wrap(self.view(memory))

    def wrap(self, local: Tensor) -> Tensor:
        """What the block holds where this rank's part is `local`."""
        return local if self.distributed is None else self.distributed.wrap(local)


@dataclass(frozen=True)
class BlockLayout:
    """Where each tensor of a block lies in the `slot_bytes` that compute. What rests and travels, `codec` says."""

    entries: tuple[TensorEntry, ...]
    slot_bytes: int

    @classmethod
    def of(
        cls,
        block: nn.Module,
        dtypes: dict[str, torch.dtype] | None = None,
        multiple: int = 1,
        without: Collection[int] = (),
    ) -> BlockLayout:
        """Lay out `block` (meta tensors will do).

        Args:
            dtypes: name relative to the block -> dtype, where it differs from what the module has now.
            multiple: the block is cut into this many equal shards; each starts at a multiple of `ALIGNMENT`.
            without: `id`s of tensors that are placed elsewhere.
        """
        entries: list[TensorEntry] = []
        offset = 0
        for names, kind, tensor in _tensors_by_identity(block):
            if id(tensor) in without:
                continue
            dtype = (dtypes or {}).get(names[0], tensor.dtype)
            local = local_part(tensor)
            shape, stride = tuple(local.shape), tuple(local.stride())
            nbytes = _span(shape, stride) * dtype.itemsize
            whole = Distribution.of(tensor)
            entries.append(TensorEntry(names, kind, dtype, shape, stride, offset, nbytes, whole))
            offset = round_up(offset + nbytes, ALIGNMENT)
        return cls(tuple(entries), round_up(offset, ALIGNMENT * multiple))

    def shard_bytes(self, parts: int) -> int:
        """Of `slot_bytes`, those of one shard."""
        if self.slot_bytes % (parts * ALIGNMENT):
            raise ValueError(f"a layout of {self.slot_bytes} bytes was not laid out for {parts} shards")
        return self.slot_bytes // parts

    def pack(self, block: nn.Module, memory: Tensor) -> None:
        """Copy this rank's part of the block's live tensors into `memory` (uint8, `slot_bytes` long)."""
        for entry in self.entries:
            find = block.get_parameter if entry.kind == "parameter" else block.get_buffer
            entry.view(memory).copy_(local_part(find(entry.name)))


def _tensors_by_identity(
    block: nn.Module,
) -> Iterator[tuple[tuple[str, ...], Literal["parameter", "buffer"], Tensor]]:
    """Each distinct parameter and buffer once, with all its names: tied tensors are placed by identity."""
    for kind, named in (
        ("parameter", block.named_parameters(remove_duplicate=False)),
        ("buffer", block.named_buffers(remove_duplicate=False)),
    ):
        names: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in named:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
        for key, tensor in tensors.items():
            yield tuple(names[key]), kind, tensor  # type: ignore[misc]


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements between the first and the last one, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
