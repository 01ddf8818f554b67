"""Where everything lies in an encoded part of a block.

The exponents of a layer's weights are nearly all the same few: of a normal distribution in bf16 the fifteen greatest
miss three values in 100,000. So each tensor has a window of fifteen exponents; a value is its sign and mantissa (8
bits in bf16, 11 in fp16) and a number of four bits: which exponent of the window, or that of zero. What has another
exponent is an escape, written in full into a list. The rate is fixed: the sizes follow from the layout, and any part
of a block is encoded and decoded alone. "DFloat11" (Zhang et al., 2025, arXiv:2504.11651) and "ZipNN" (Hershcovitch et
al., 2024, arXiv:2411.05239) code the same exponents with Huffman's code, to 0.70 and 0.67 of the bytes.

From the start of a part:

    escapes         int32, how many there are
    windows         uint8 for each coded span: the least exponent of its window
    spans           one after the other; of what is coded
                        low bytes   of each value: bf16's sign and mantissa, fp16's lower mantissa
                        numbers     4 bits of each value
                        high bits   of fp16 only: 2 bits of the mantissa of each value; its sign
                    and what is not coded as it is
    their places    int32, counted in values from the start of the part that computes
    their values    16 bits each

What has less than a byte a value is folded: of a span, the first half's bits are the lower ones of each byte, the
second half's the upper ones (of quarters and eighths likewise), so that few operations on long rows unfold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch

from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, round_up

NUMBER_BITS = 4
WINDOW = (1 << NUMBER_BITS) - 1
"""Exponents that a span's values have a number for; number 0 is the exponent of zero."""
_LEAST_VALUES = 256
"""A span of fewer is not worth a window."""
_PER_ESCAPE = 1024
"""There is room for one escape in so many values: ten times what normal weights need."""
_SAMPLE = 1 << 16
"""Values of a span that its window is chosen by."""


class IncompressibleError(Exception):
    """Of these tensors of a block (`tensors`: their names in it) too many values have exponents of their own."""

    def __init__(self, tensors: frozenset[str]) -> None:
        super().__init__(f"not to be encoded: {', '.join(sorted(tensors))}")
        self.tensors = tensors


@dataclass(frozen=True)
class FloatFormat:
    """Above the `mantissa` bits lie the exponent's `exponent` bits and the sign.

    `high`: what the low byte has no room for, besides the exponent: how many bits, and the lowest of them.
    """

    mantissa: int
    exponent: int
    high: tuple[tuple[int, int], ...] = ()

    @property
    def exponents(self) -> int:
        return 1 << self.exponent


BF16, FP16 = FloatFormat(7, 8), FloatFormat(10, 5, ((2, 8), (1, 15)))
_FORMATS = {torch.bfloat16: BF16, torch.float16: FP16}


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a part that computes, of one tensor.

    `format`: None where they are not coded. `places`: where its rows lie in the encoded part.
    """

    name: str
    start: int
    stop: int
    format: FloatFormat | None
    places: tuple[int, ...]

    @property
    def values(self) -> int:
        return (self.stop - self.start) // 2


@dataclass(frozen=True)
class PartFormat:
    """`escapes_at`: where the places of the escapes lie; there is room for `capacity` of them."""

    spans: tuple[Span, ...]
    escapes_at: int
    capacity: int

    @cached_property
    def coded(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.format is not None)

    @cached_property
    def number_of(self) -> dict[Span, int]:
        """Of each coded span."""
        return {span: number for number, span in enumerate(self.coded)}

    @cached_property
    def plain(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.format is None)

    @property
    def windows_end(self) -> int:
        return 4 + len(self.coded)

    @property
    def values_at(self) -> int:
        return self.escapes_at + 4 * self.capacity

    @property
    def nbytes(self) -> int:
        return self.values_at + 2 * self.capacity

    def check_room(self, escapes: Sequence[int]) -> None:
        """
        Args:
            escapes: how many there are in each coded span.

        Raises:
            IncompressibleError: they are too many; it names the tensors without which the others find room.
        """
        if sum(escapes) > self.capacity:
            spans = zip(self.coded, escapes, strict=True)
            raise IncompressibleError(
                frozenset(span.name for span, count in spans if count > span.values // _PER_ESCAPE)
            )


@lru_cache(maxsize=1024)
def part_formats(layout: BlockLayout, parts: int, plain: frozenset[str]) -> tuple[PartFormat, ...]:
    """Of each of `parts`; the tensors `plain` are not coded."""
    return tuple(_part_format(layout, parts, index, plain) for index in range(parts))


def _part_format(layout: BlockLayout, parts: int, index: int, plain: frozenset[str]) -> PartFormat:
    shard = layout.shard_bytes(parts)
    found: list[tuple[str, int, int, FloatFormat | None]] = []
    for entry in layout.entries:
        start = max(entry.offset - index * shard, 0)
        stop = min(round_up(entry.offset + entry.nbytes, ALIGNMENT) - index * shard, shard)
        if start < stop:
            worth = entry.name not in plain and stop - start >= 2 * _LEAST_VALUES
            found.append((entry.name, start, stop, _FORMATS.get(entry.dtype) if worth else None))
    coded = [(stop - start) // 2 for _, start, stop, format_ in found if format_ is not None]
    at = round_up(4 + len(coded), ALIGNMENT)
    spans = []
    for name, start, stop, format_ in found:
        places = list(accumulate(_row_bytes(stop - start, format_), initial=at))
        spans.append(Span(name, start, stop, format_, tuple(places[:-1])))
        at = places[-1]
    return PartFormat(tuple(spans), at, sum(coded) // _PER_ESCAPE + 16 * bool(coded))


def _row_bytes(nbytes: int, format_: FloatFormat | None) -> list[int]:
    """Of a span's low bytes and folded rows; all are multiples of 16."""
    if format_ is None:
        return [nbytes]
    values = nbytes // 2
    return [values, *(values * bits // 8 for bits in (NUMBER_BITS, *(bits for bits, _ in format_.high)))]


def least_of_window(words: torch.Tensor, format_: FloatFormat) -> int:
    """The least exponent of the window that holds most values of a sample; zero's has a number of its own.

    `words`: the values, int16.
    """
    stride = max(1, len(words) // _SAMPLE) | 1  # odd, so that it meets all columns of a matrix
    sampled = words[::stride].to(torch.int64) >> format_.mantissa & (format_.exponents - 1)
    counts = torch.bincount(sampled, minlength=format_.exponents)
    counts[0] = 0
    sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return int((sums[WINDOW:] - sums[:-WINDOW])[1:].argmax()) + 1
