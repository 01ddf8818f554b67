"""What stands between the bytes of a block that rest and travel and those that compute.

Three numbers, of one part of a block (all of it, or one of the equal shards it is cut into):

    held_bytes      what rests, in host memory or in a shard on the device
    travel_bytes    what is copied over the link and gathered: the first of the held bytes
    slot_bytes      what computes, in a slot: those of the layout

They follow from the layout alone: everybody knows them before a byte is read, and shards of equal size can be gathered.
All are multiples of `ALIGNMENT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crossdock.offload.memory.layout import BlockLayout, TensorEntry


class Codec(Protocol):
    """Stateless, and the same on all ranks, wherever it was made: it comes with the plan."""

    @property
    def name(self) -> str:
        """Of the code, its version included: what was encoded under another name is not read."""

    @property
    def in_place(self) -> bool:
        """What travels is what computes: it goes straight into the slot, and nothing is decoded."""

    def held_bytes(self, layout: BlockLayout, parts: int) -> int:
        """Of one of `parts` equal parts."""

    def travel_bytes(self, layout: BlockLayout, parts: int) -> int:
        """Of one of `parts` equal parts."""

    def encode(self, layout: BlockLayout, parts: int, index: int, raw: Tensor) -> Tensor:
        """The held bytes of part number `index`. `raw`: uint8 `[slot_bytes / parts]`, on any device."""

    def decode(self, layout: BlockLayout, parts: int, index: int, travelled: Tensor, raw: Tensor) -> None:
        """Part number `index` as it computes, into `raw`; on its device, on the lane that brought the last bytes.

        Args:
            travelled: uint8 `[travel_bytes]`.
            raw: uint8 `[slot_bytes / parts]`; bytes that belong to no tensor may stay what they are.
        """

    def tensor_bytes(self, layout: BlockLayout, entry: TensorEntry, held: Tensor) -> Tensor:
        """One tensor of a block of one part, which rests in `held` on the host: its bytes there, or a copy; uint8."""

    def tables(self, layout: BlockLayout, parts: int, index: int, held: Tensor) -> Tensor:
        """Of the held bytes of part number `index` those that say how the others are read; uint8."""


@dataclass(frozen=True)
class Identity:
    """One number: what rests is what travels is what computes."""

    name: str = "none"
    in_place: bool = True

    def held_bytes(self, layout: BlockLayout, parts: int) -> int:
        return layout.shard_bytes(parts)

    def travel_bytes(self, layout: BlockLayout, parts: int) -> int:
        return layout.shard_bytes(parts)

    def encode(self, layout: BlockLayout, parts: int, index: int, raw: Tensor) -> Tensor:
        return raw

    def decode(self, layout: BlockLayout, parts: int, index: int, travelled: Tensor, raw: Tensor) -> None:
        """Nothing to do: the bytes are there."""

    def tensor_bytes(self, layout: BlockLayout, entry: TensorEntry, held: Tensor) -> Tensor:
        return held[entry.offset : entry.offset + entry.nbytes]

    def tables(self, layout: BlockLayout, parts: int, index: int, held: Tensor) -> Tensor:
        return held[:0]


IDENTITY = Identity()


def staging_bytes(codec: Codec, layout: BlockLayout, parts: int = 1) -> int:
    """Device memory in which a block's travelled bytes wait to be decoded."""
    return 0 if codec.in_place else parts * codec.travel_bytes(layout, parts)


def decode_all(codec: Codec, layout: BlockLayout, parts: int, travelled: Tensor, slot: Tensor) -> None:
    """Fill `slot` (uint8 `[slot_bytes]`) from all parts, one after the other (uint8 `[parts * travel_bytes]`)."""
    size, shard = codec.travel_bytes(layout, parts), layout.shard_bytes(parts)
    for index in range(parts):
        codec.decode(layout, parts, index, travelled[index * size :][:size], slot[index * shard :][:shard])


class WrongCodeError(RuntimeError):
    """What was encoded does not decode to what it was; `byte` is the first that differs."""

    def __init__(self, codec: Codec, byte: int) -> None:
        super().__init__(f"codec {codec.name} does not decode to the bytes that it has encoded")
        self.byte = byte


def encoded(codec: Codec, layout: BlockLayout, parts: int, index: int, raw: Tensor) -> Tensor:
    """`Codec.encode`, and the check that it decodes to `raw`, all of it.

    Raises:
        WrongCodeError: it does not.
    """
    held = codec.encode(layout, parts, index, raw)
    found = decoded(codec, layout, parts, index, held)
    if not torch.equal(found, raw):
        raise WrongCodeError(codec, int((found != raw).nonzero()[0]))
    return held


def decoded(codec: Codec, layout: BlockLayout, parts: int, index: int, held: Tensor) -> Tensor:
    """Part number `index` as it computes, of the bytes that rest of it: those themselves, or fresh ones."""
    if codec.in_place:
        return held
    raw = held.new_zeros(layout.shard_bytes(parts))
    codec.decode(layout, parts, index, held[: codec.travel_bytes(layout, parts)], raw)
    return raw
