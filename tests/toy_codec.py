"""A codec of which no two of the three sizes are equal: what rests, what travels, what computes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, TensorEntry, round_up

HEADER = 12
KEY = 0x5A


@dataclass(frozen=True)
class Packed:
    """A header of checksums, then all tensors without the gaps between them, every bit of `KEY` turned; behind them
    some bytes that rest and never travel. What is another part's, or stale, or was not all there, does not decode.
    """

    name: str = "packed"
    in_place: bool = False

    def held_bytes(self, layout: BlockLayout, parts: int) -> int:
        return _not(layout.shard_bytes(parts), self.travel_bytes(layout, parts) + ALIGNMENT)

    def travel_bytes(self, layout: BlockLayout, parts: int) -> int:
        fullest = max(sum(stop - start for start, stop in _used(layout, parts, index)) for index in range(parts))
        return _not(layout.shard_bytes(parts), round_up(HEADER + fullest, ALIGNMENT))

    def encode(self, layout: BlockLayout, parts: int, index: int, raw: Tensor) -> Tensor:
        assert len(raw) == layout.shard_bytes(parts)
        held = torch.full((self.held_bytes(layout, parts),), 0xEE, dtype=torch.uint8)
        pieces = [raw[start:stop] for start, stop in _used(layout, parts, index)]
        packed = torch.cat([raw[:0], *pieces]) ^ KEY
        held[HEADER : HEADER + len(packed)] = packed
        sums = [
            index,
            zlib.crc32(raw.numpy().tobytes()),
            zlib.crc32(packed.numpy().tobytes()),
        ]  # the first: no two alike
        held[:HEADER] = torch.tensor(sums, dtype=torch.int64).to(torch.int32).view(torch.uint8)
        return held

    def decode(self, layout: BlockLayout, parts: int, index: int, travelled: Tensor, raw: Tensor) -> None:
        assert len(travelled) == self.travel_bytes(layout, parts)
        assert len(raw) == layout.shard_bytes(parts)
        used = list(_used(layout, parts, index))
        packed = travelled[HEADER : HEADER + sum(stop - start for start, stop in used)]
        found, _, total = travelled[:HEADER].clone().view(torch.int32).tolist()
        if (found, total & 0xFFFFFFFF) != (index, zlib.crc32(packed.numpy().tobytes())):
            raise AssertionError(f"part {index} is not what was encoded")
        at = 0
        for start, stop in used:
            raw[start:stop] = packed[at : at + stop - start] ^ KEY
            at += stop - start

    def tensor_bytes(self, layout: BlockLayout, entry: TensorEntry, held: Tensor) -> Tensor:
        raw = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
        self.decode(layout, 1, 0, held[: self.travel_bytes(layout, 1)], raw)
        return raw[entry.offset : entry.offset + entry.nbytes]

    def tables(self, layout: BlockLayout, parts: int, index: int, held: Tensor) -> Tensor:
        return held[:HEADER]


PACKED = Packed()


def _not(other: int, size: int) -> int:
    return size + ALIGNMENT * (size == other)


def _used(layout: BlockLayout, parts: int, index: int) -> Iterator[tuple[int, int]]:
    """The bytes of part number `index`, from its start, that belong to tensors."""
    shard = layout.shard_bytes(parts)
    for entry in layout.entries:
        start, stop = max(entry.offset - index * shard, 0), min(entry.offset + entry.nbytes - index * shard, shard)
        if start < stop:
            yield start, stop
