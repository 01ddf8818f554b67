"""Taking a rank's part of a block over from a packed checkpoint: nothing is encoded, and all of it is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from crossdock.offload.codecs.codec import decoded
from crossdock.offload.codecs.lossless import Lossless
from crossdock.offload.codecs.packed import Piece, put_together
from crossdock.offload.codecs.part_format import PartFormat, Span, part_formats
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import StoredTensor
from crossdock.runtime.plan.memory_plan import PlannedBlock
from crossdock.runtime.rank.weights.source import WeightSource


def packed_digest(raw: Tensor) -> str:
    """Of a tensor's bytes before it is packed. `raw`: uint8, on the host."""
    return xxh3_128_hexdigest(raw.numpy().data)


@dataclass(frozen=True)
class _Range:
    """Values [first, last) of what this rank has of the tensor `fqn`, in a span."""

    fqn: str
    first: int
    last: int
    is_whole: bool


class PackedParts:
    """Of a rank whose TP slices are `slices`."""

    def __init__(
        self, stored: Mapping[str, StoredTensor], slices: Mapping[str, TensorSlice], source: WeightSource
    ) -> None:
        self._stored, self._slices, self._source = stored, slices, source

    def of(self, block: PlannedBlock, place: int, start: int, stop: int) -> TakenOver | None:
        """Bytes [start, stop) of `block`, its part number `place`. None: not all that it encodes is stored packed."""
        if not isinstance(block.codec, Lossless):
            return None
        form = part_formats(block.layout, block.parts, block.codec.plain)[place]
        entries = {entry.name: entry for entry in block.layout.entries}
        ranges: dict[Span, _Range] = {}
        for span in form.coded:
            entry = entries[span.name]
            full = [f"{block.name}.{name}" for name in entry.names]
            fqn = next((name for name in full if self._source.is_packed(name)), None)
            if fqn is None or self._stored[fqn].dtype != entry.dtype:
                return None
            first, count = (start + span.start - entry.offset) // 2, entry.nbytes // 2
            last = min(first + span.values, count)
            whole = (first, last) == (0, count) and fqn not in self._slices
            ranges[span] = _Range(fqn, first, last, whole)
        return TakenOver(self, block, place, form, ranges)

    def piece(self, of: _Range) -> Piece:
        return self._source.fields(of.fqn, self._slices.get(of.fqn), of.first, of.last)

    def check(self, of: _Range, raw: Tensor) -> None:
        """`raw`: uint8, what the piece has become.

        Raises:
            CheckpointError: it is not what was packed.
        """
        stored = self._stored[of.fqn]
        if of.is_whole:
            same = packed_digest(raw) == stored.packed
        else:  # whose digest nobody knows: read on another way
            right = self._source.flat(of.fqn, self._slices.get(of.fqn), of.first, of.last)
            same = torch.equal(raw, right.contiguous().view(torch.uint8))
        if not same:
            raise CheckpointError(f"{stored.file}: {of.fqn} does not decode to what was packed; pack it again")


@dataclass(frozen=True)
class TakenOver:
    """A part whose coded spans come from packed tensors."""

    _parts: PackedParts
    _block: PlannedBlock
    _place: int
    _form: PartFormat
    _ranges: Mapping[Span, _Range]

    @property
    def names(self) -> frozenset[str]:
        """The tensors that need not be read for it."""
        return frozenset(span.name for span in self._ranges)

    def part(self, raw: Tensor) -> Tensor:
        """The encoded part. `raw`: uint8, as it computes, without what is in `names`.

        Raises:
            IncompressibleError: together its tensors have more escapes than there is room for.
            CheckpointError: what was packed is not what it was.
        """
        block, codec = self._block, self._block.codec
        held = raw.new_zeros(codec.travel_bytes(block.layout, block.parts))
        put_together(self._form, {span: self._parts.piece(each) for span, each in self._ranges.items()}, raw, held)
        found = decoded(codec, block.layout, block.parts, self._place, held)
        for span, each in self._ranges.items():
            self._parts.check(each, found[span.start :][: 2 * (each.last - each.first)])
        return held
