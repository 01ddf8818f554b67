"""A tensor that is encoded alone, as `crossdock pack` stores it: read by ranges, and taken over into encoded parts.

It is the one part of a block that has nothing else, so that what was packed does not hang on a layout. A rank's part
of a block, whatever it is cut from, is put together of the packed tensors' fields: bits that are moved, not encoded
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdock.offload.codecs import on_host
from crossdock.offload.codecs.codec import encoded
from crossdock.offload.codecs.lossless import Lossless, lossless
from crossdock.offload.codecs.part_format import BF16, NUMBER_BITS, PartFormat, Span, part_formats
from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout, TensorEntry, round_up

_Bytes = NDArray[np.uint8]
_Words = NDArray[np.uint16]


PACKED = "crossdock.packed"
"""What of a safetensors file's metadata says which of its tensors are packed: name -> dtype, shape and digest."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PackedAs(NamedTuple):
    """What a packed tensor decodes to; `digest` is of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str


def metadata_of(packed: Mapping[str, PackedAs]) -> dict[str, object]:
    """For `packed_in`, as JSON."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return {name: {"dtype": names[a.dtype], "shape": [*a.shape], "digest": a.digest} for name, a in packed.items()}


def packed_in(metadata: object, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PackedAs]:
    """What a file's packed tensors are.

    Args:
        metadata: what lies under `PACKED`, from JSON.
        shapes: of what the file has, as it is stored.

    Raises:
        ValueError: it is nothing that `metadata_of` makes, or of other bytes than the file has.
    """
    found = {}
    for name, told in metadata.items() if isinstance(metadata, dict) else ():
        match told:
            case {"dtype": "bfloat16" | "float16" as dtype, "shape": [*shape], "digest": str(digest)}:
                pass
            case _:
                raise ValueError(f"{name}: {told}")
        if not digest or not all(type(size) is int and 0 < size < 2**40 for size in shape):
            raise ValueError(f"{name}: {told}")
        nbytes = packed_bytes(_DTYPES[dtype], math.prod(shape))
        if shapes.get(name) != (nbytes,):
            raise ValueError(f"{name}: {shapes.get(name)} bytes, and {shape} of {dtype} takes {nbytes}")
        found[name] = PackedAs(_DTYPES[dtype], tuple(shape), digest)
    if not found:
        raise ValueError(f"{PACKED}: names no tensor")
    return found


def packed_layout(dtype: torch.dtype, values: int) -> BlockLayout:
    """Of a tensor alone."""
    nbytes = values * dtype.itemsize
    entry = TensorEntry(("tensor",), "parameter", dtype, (values,), (1,), 0, nbytes)
    return BlockLayout((entry,), round_up(nbytes, ALIGNMENT))


def packed_bytes(dtype: torch.dtype, values: int) -> int | None:
    """How many a tensor takes; None: it is not packed, as that would not make it smaller."""
    layout = packed_layout(dtype, values)
    codec = lossless(layout)
    return None if codec.in_place else codec.travel_bytes(layout, 1)


def pack(tensor: Tensor) -> Tensor:
    """Its `packed_bytes`; uint8.

    Args:
        tensor: contiguous, on the host.

    Raises:
        IncompressibleError: too many values have exponents of their own.
        WrongCodeError: it does not decode to what it was.
    """
    layout = packed_layout(tensor.dtype, tensor.numel())
    raw = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    raw[: tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return encoded(Lossless(), layout, 1, 0, raw)


@dataclass(frozen=True)
class Fields:
    """Some values, each in its fields; uint8 arrays of one shape.

    Attributes:
        low: bf16's sign and mantissa, fp16's lower mantissa.
        numbers: of the exponents in the window; 0 of an escape.
        high: fp16's upper mantissa, and its sign.
        escaped: the exponents of escapes, else 0; None: there are none.
    """

    low: _Bytes
    numbers: _Bytes
    high: tuple[_Bytes, ...]
    escaped: _Bytes | None

    def each(self, change: Callable[[_Bytes], _Bytes]) -> Self:
        escaped = None if self.escaped is None else change(self.escaped)
        return replace(
            self,
            low=change(self.low),
            numbers=change(self.numbers),
            high=tuple(map(change, self.high)),
            escaped=escaped,
        )


class PackedTensor:
    """
    Args:
        held: its bytes, uint8; those that are not asked for are not touched.
    """

    def __init__(self, dtype: torch.dtype, values: int, held: Tensor) -> None:
        self.dtype = dtype
        self._part: _Bytes = held.numpy()
        (self._form,) = part_formats(packed_layout(dtype, values), 1, frozenset())
        (self._span,) = self._form.coded
        assert self._span.format is not None
        self.format = self._span.format

    @cached_property
    def least(self) -> int:
        """The least exponent of its window."""
        return int(self._part[4])

    @property
    def escapes(self) -> tuple[NDArray[np.int32], _Words]:
        """Their places, and their values."""
        return on_host.escapes(self._form, self._part)

    def copy_rows(self, span: Span, part: _Bytes) -> None:
        """All but the window and the escapes, to where the rows of `span`, of the same length, lie in `part`."""
        bounds = [*self._span.places, self._form.escapes_at]
        for at, (start, stop) in zip(span.places, pairwise(bounds), strict=True):
            part[at : at + stop - start] = self._part[start:stop]

    def fields(self, start: int, stop: int) -> Fields:
        """Of values [start, stop)."""
        lows, numbers, *highs = self._span.places
        places, values = self.escapes
        mine = slice(*np.searchsorted(places, (start, stop)))
        escaped = None
        if mine.start < mine.stop:
            escaped = np.zeros(stop - start, np.uint8)
            exponents = values[mine] >> np.uint16(self.format.mantissa) & np.uint16(self.format.exponents - 1)
            escaped[places[mine] - start] = exponents
        return Fields(
            self._part[lows + start : lows + stop],
            self._unfolded(numbers, NUMBER_BITS, start, stop),
            tuple(self._unfolded(at, bits, start, stop) for at, (bits, _) in zip(highs, self.format.high, strict=True)),
            escaped,
        )

    def read(self, start: int, stop: int) -> Tensor:
        """Values [start, stop), as they were."""
        words = self.composed(self.fields(start, stop))
        return torch.from_numpy(words.view(np.int16)).view(self.dtype)

    def composed(self, fields: Fields) -> _Words:
        """The values that have these fields."""
        exponent = fields.numbers.astype(np.uint16)
        np.add(exponent, np.uint16(self.least - 1), out=exponent, where=fields.numbers != 0)
        if fields.escaped is not None:
            np.bitwise_or(exponent, fields.escaped, out=exponent)  # of which the number is 0
        words = np.left_shift(exponent, np.uint16(self.format.mantissa), out=exponent)
        if self.format is BF16:
            words |= fields.low & np.uint8(0x7F)
            words |= (fields.low & np.uint8(0x80)).astype(np.uint16) << np.uint16(8)
        else:
            words |= fields.low
            for (_, lowest), bits in zip(self.format.high, fields.high, strict=True):
                words |= bits.astype(np.uint16) << np.uint16(lowest)
        return words

    def _unfolded(self, at: int, bits: int, start: int, stop: int) -> _Bytes:
        """A field of values [start, stop), which lie in up to `8 // bits` rows."""
        length = self._span.values * bits // 8
        found = []
        for row in range(start // length, -(-stop // length)):
            first, last = max(start - row * length, 0), min(stop - row * length, length)
            folded = self._part[at + first : at + last]
            found.append(folded >> np.uint8(bits * row) & np.uint8((1 << bits) - 1))
        return np.concatenate(found) if len(found) != 1 else found[0]


Piece = tuple[PackedTensor, Fields | None]
"""What a packed tensor has of a span's values, None: all, as it lies; after them, the span has zeros."""


def put_together(form: PartFormat, pieces: Mapping[Span, Piece], raw: Tensor, out: Tensor) -> None:
    """An encoded part, as `on_host.encode` makes it, but for the windows, which are the packed tensors'.

    Args:
        pieces: of each coded span.
        raw: uint8, the part as it computes; only what is not coded is read.
        out: at least `form.nbytes`, zeros.

    Raises:
        IncompressibleError: there are more escapes than room for them.
    """
    part, found = out.numpy(), [np.empty(0, np.int32)]
    values = [np.empty(0, np.uint16)]
    for number, span in enumerate(form.coded):
        packed, fields = pieces[span]
        part[4 + number] = packed.least
        if fields is None:
            packed.copy_rows(span, part)
            escapes, of_escapes = packed.escapes
            found.append((escapes + span.start // 2).astype(np.int32))
            values.append(of_escapes)
            continue
        at, numbers, *highs = span.places
        part[at : at + len(fields.low)] = fields.low
        _fold(fields.numbers, part[numbers:], span.values, NUMBER_BITS)
        for fold, bits, (width, _) in zip(highs, fields.high, packed.format.high, strict=True):
            _fold(bits, part[fold:], span.values, width)
        places = np.flatnonzero(fields.escaped) if fields.escaped is not None else np.empty(0, np.int64)
        found.append((places + span.start // 2).astype(np.int32))
        values.append(packed.composed(fields.each(lambda field, places=places: field[places])))  # type: ignore[misc]
    form.check_room([len(places) for places in found[1:]])
    on_host.put_escapes(form, part, np.concatenate(found), np.concatenate(values))
    for span in form.plain:
        part[span.places[0] :][: span.stop - span.start] = raw[span.start : span.stop]


def _fold(values: _Bytes, target: _Bytes, count: int, bits: int) -> None:
    """`count`: of the values, with the zeros that follow them."""
    length = count * bits // 8
    for row in range(8 // bits):
        piece = values[row * length : (row + 1) * length]
        target[: len(piece)] |= piece << np.uint8(bits * row)
