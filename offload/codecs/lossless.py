"""Weights of 16 bits at three quarters of their bytes, and bit for bit what they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.offload.codecs import on_cuda, on_host
from crossdock.offload.codecs.codec import IDENTITY, Codec
from crossdock.offload.codecs.part_format import PartFormat, part_formats
from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, TensorEntry, round_up

WORTH_ENCODING = 0.95
"""A block is encoded where what travels is at most this share of it."""


@dataclass(frozen=True)
class Lossless:
    """bf16 and fp16 at a fixed rate (see `part_format`); all else as it is.

    `plain`: names of tensors in the block that are not encoded: it would not make them smaller.
    """

    plain: frozenset[str] = frozenset()
    in_place: bool = False

    @property
    def name(self) -> str:
        return " ".join(["lossless 1", *sorted(self.plain)])

    def held_bytes(self, layout: BlockLayout, parts: int) -> int:
        return self.travel_bytes(layout, parts)

    def travel_bytes(self, layout: BlockLayout, parts: int) -> int:
        """The most that any part needs: they are gathered, and are of one size."""
        return round_up(max(form.nbytes for form in self._forms(layout, parts)), ALIGNMENT)

    def encode(self, layout: BlockLayout, parts: int, index: int, raw: Tensor) -> Tensor:
        """
        Raises:
            IncompressibleError: too many values have exponents of their own; it names their tensors.
        """
        form = self._forms(layout, parts)[index]
        out = raw.new_zeros(self.travel_bytes(layout, parts))
        if raw.device.type == "cpu":
            on_host.encode(form, raw.numpy(), out.numpy(), torch.get_num_threads())
        else:
            on_cuda.encode(form, raw, out)
        return out

    def decode(self, layout: BlockLayout, parts: int, index: int, travelled: Tensor, raw: Tensor) -> None:
        form = self._forms(layout, parts)[index]
        if raw.device.type == "cpu":
            on_host.decode(form, travelled.numpy(), raw.numpy())
        else:
            on_cuda.decode(form, travelled, raw)

    def tensor_bytes(self, layout: BlockLayout, entry: TensorEntry, held: Tensor) -> Tensor:
        (form,) = self._forms(layout, 1)
        out = torch.empty(round_up(entry.nbytes, ALIGNMENT), dtype=torch.uint8)
        for span in form.spans:
            if span.name == entry.name:
                on_host.decode_span(form, span, held.numpy(), out.numpy())
        return out[: entry.nbytes]

    def tables(self, layout: BlockLayout, parts: int, index: int, held: Tensor) -> Tensor:
        """The windows and the escapes."""
        form = self._forms(layout, parts)[index]
        return torch.cat([held[: form.windows_end], held[form.escapes_at : form.nbytes]])

    def _forms(self, layout: BlockLayout, parts: int) -> tuple[PartFormat, ...]:
        return part_formats(layout, parts, self.plain)


def lossless(layout: BlockLayout, parts: int = 1, plain: frozenset[str] = frozenset()) -> Codec:
    """For a block: `Lossless`, where that is worth it."""
    codec = Lossless(plain)
    worth = codec.travel_bytes(layout, parts) <= WORTH_ENCODING * layout.shard_bytes(parts)
    return codec if worth else IDENTITY
