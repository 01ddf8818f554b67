"""The layout of a block: all its parameters and buffers packed into one byte range.

Bytes, not dtypes: whatever mixture of dtypes a block holds (bf16 weights, fp32 norms, fp8 with scales), moving it
is one copy and gathering it is one collective. Every tensor starts at a multiple of `ALIGNMENT` bytes and keeps its
dtype, shape and stride, so that column-major weights stay column-major.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes. CUDA's vector loads, fp8 kernels (32) and TMA descriptors (128) are all satisfied by it."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def aligned_bytes(nbytes: int, device: torch.device) -> Tensor:
    """Fresh device memory: a uint8 tensor of `nbytes` whose address is a multiple of `ALIGNMENT`."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a block. `names` are its names relative to the block (several where tensors are tied)."""

    names: tuple[str, ...]
    kind: Literal["parameter", "buffer"]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def name(self) -> str:
        return self.names[0]

    def view(self, memory: Tensor) -> Tensor:
        """This tensor inside `memory` (uint8, the block's whole byte range); no copy."""
        raw = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return raw.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class BlockLayout:
    """Where each tensor of a block lies in its byte range of `nbytes` bytes."""

    entries: tuple[TensorEntry, ...]
    nbytes: int

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
            shape, stride = tuple(tensor.shape), tuple(tensor.stride())
            nbytes = _span(shape, stride) * dtype.itemsize
            entries.append(TensorEntry(names, kind, dtype, shape, stride, offset, nbytes))
            offset = round_up(offset + nbytes, ALIGNMENT)
        return cls(tuple(entries), round_up(offset, ALIGNMENT * multiple))

    def shard_nbytes(self, parts: int) -> int:
        if self.nbytes % (parts * ALIGNMENT):
            raise ValueError(f"a layout of {self.nbytes} bytes was not laid out for {parts} shards")
        return self.nbytes // parts

    def pack(self, block: nn.Module, memory: Tensor) -> None:
        """Copy the block's live tensors into `memory` (uint8, `nbytes` long)."""
        for entry in self.entries:
            entry.view(memory).copy_(
                block.get_parameter(entry.name) if entry.kind == "parameter" else block.get_buffer(entry.name)
            )


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
