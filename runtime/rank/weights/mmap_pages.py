"""Blocks straight from the page cache: `offload.host: mmap`.

The checkpoint's files are mapped, and a block is copied into its slot tensor by tensor from where the files have it.
No anonymous host memory is used; the kernel keeps what fits of the files in memory, and reads the rest again from disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.offload.memory.layout import TensorEntry
from crossdock.offload.stream.block import Piece
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.models.checkpoint import StoredTensor
from crossdock.runtime.plan.memory_plan import PlannedBlock
from crossdock.runtime.rank.weights.source import WeightSource


@dataclass(frozen=True)
class _Rows:
    """`rows` rows of `row_bytes`: from byte `start` of the source, `source_step` apart; to byte `offset` of the block,
    `step` apart.
    """

    offset: int
    source: Tensor
    start: int
    rows: int
    row_bytes: int
    source_step: int
    step: int

    def clip(self, low: int, high: int) -> Iterator[Piece]:
        """The part within bytes [low, high) of the block, offsets from `low`: whole rows as one piece, and the ends.

        A row alone is a piece of one dimension: one that can be cut into chunks.
        """
        first = max(0, -(-(low - self.offset) // self.step))
        last = min(self.rows, (high - self.offset - self.row_bytes) // self.step + 1)
        alone = {first - 1, max(last, 0)}
        if last - first == 1:
            alone.add(first)
        elif first < last:
            rows = self.source[self.start + first * self.source_step :].as_strided(
                (last - first, self.row_bytes), (self.source_step, 1)
            )
            yield Piece(self.offset + first * self.step - low, rows, self.step)
        for row in sorted(alone):
            if 0 <= row < self.rows:
                yield from self._part(row, low, high)

    def _part(self, row: int, low: int, high: int) -> Iterator[Piece]:
        """What of one row lies within."""
        at = self.offset + row * self.step
        begin, end = max(low - at, 0), min(high - at, self.row_bytes)
        if begin < end:
            start = self.start + row * self.source_step
            yield Piece(at + begin - low, self.source[start + begin : start + end])


class CheckpointPages:
    """Blocks made of what `source` maps; `stored`: what it has."""

    def __init__(self, source: WeightSource, stored: Mapping[str, StoredTensor]) -> None:
        self._source = source
        self._stored = stored

    def pieces(
        self,
        block: PlannedBlock,
        slices: Mapping[str, TensorSlice],
        buffers: Mapping[str, Tensor],
        start: int,
        stop: int,
    ) -> tuple[Piece, ...]:
        """What fills bytes [start, stop) of the block's layout, offsets from `start`. Nothing is read yet.

        Args:
            slices: fqn -> the part of the stored tensor that is held; what is missing here is held whole.
            buffers: fqn -> value of what no checkpoint holds.
        """
        found: list[Piece] = []
        for entry in block.layout.entries:
            if entry.offset < stop and start < entry.offset + entry.nbytes:
                for rows in self._rows_of(block.name, entry, slices, buffers):
                    found += rows.clip(start, stop)
        return tuple(found)

    def _rows_of(
        self, block: str, entry: TensorEntry, slices: Mapping[str, TensorSlice], buffers: Mapping[str, Tensor]
    ) -> Iterator[_Rows]:
        names = [f"{block}.{name}" for name in entry.names]
        live = next((name for name in names if name in buffers), None)
        if live is not None:  # also where the file has a tensor of that name: a leftover, which nothing else reads
            value = buffers[live].contiguous().reshape(-1).view(torch.uint8)
            yield _stretch(entry.offset, value, 0, value.nbytes)
            return
        fqn = next((name for name in names if name in self._stored), names[0])
        source = self._source.mapped(fqn)
        shape, size = self._stored[fqn].shape, entry.dtype.itemsize
        part = slices.get(fqn)
        if part is None:
            yield _stretch(entry.offset, source, 0, entry.nbytes)
        else:
            yield from (_along_first if part.dim == 0 else _along_second)(entry.offset, source, part, shape, size)


def _stretch(offset: int, source: Tensor, start: int, nbytes: int) -> _Rows:
    return _Rows(offset, source, start, min(nbytes, 1), nbytes, nbytes, max(nbytes, 1))


def _along_first(offset: int, source: Tensor, part: TensorSlice, shape: tuple[int, ...], size: int) -> Iterator[_Rows]:
    """A cut along dim 0: one stretch for every range."""
    row_bytes = math.prod(shape[1:]) * size
    for first, last in part.ranges:
        yield _stretch(offset, source, first * row_bytes, (last - first) * row_bytes)
        offset += (last - first) * row_bytes


def _along_second(offset: int, source: Tensor, part: TensorSlice, shape: tuple[int, ...], size: int) -> Iterator[_Rows]:
    """A cut along dim 1: in every row, one stretch for every range."""
    inner = math.prod(shape[2:]) * size
    for first, last in part.ranges:
        width = (last - first) * inner
        if width:
            yield _Rows(offset, source, first * inner, shape[0], width, shape[1] * inner, part.size * inner)
        offset += width
