"""The lossless code on a GPU: encoding in torch, at load; decoding in Triton, once for every block that arrives."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from crossdock.offload.codecs.part_format import (
    BF16,
    NUMBER_BITS,
    WINDOW,
    FloatFormat,
    PartFormat,
    Span,
    least_of_window,
)

_TILE = 4096
"""Bytes that one program of a kernel reads of what is folded, or copies."""
_ESCAPES = 256
"""That one program writes."""


def encode(form: PartFormat, raw: Tensor, out: Tensor) -> None:
    """`raw`: a part as it computes, uint8. `out`: at least `form.nbytes`, zeros, on the same device.

    Raises:
        IncompressibleError: there are more escapes than room for them.
    """
    found = [_encode_span(span, number, raw, out) for number, span in enumerate(form.coded)]
    form.check_room([len(places) for places in found])
    for span in form.plain:
        out[span.places[0] :][: span.stop - span.start] = raw[span.start : span.stop]
    places = torch.cat([raw.new_zeros(0, dtype=torch.int64), *found])
    out[:4].view(torch.int32).fill_(len(places))
    out[form.escapes_at :][: 4 * len(places)].view(torch.int32).copy_(places)
    out[form.values_at :][: 2 * len(places)].view(torch.int16).copy_(raw.view(torch.int16)[places])


def _encode_span(span: Span, number: int, raw: Tensor, out: Tensor) -> Tensor:
    """All of it but its escapes, whose places in the part are returned; int64."""
    format_ = span.format
    assert format_ is not None
    words = raw[span.start : span.stop].view(torch.int16)
    out[4 + number] = least = least_of_window(words, format_)
    lows, *folds = span.places
    low = words & 0xFF if format_ is not BF16 else words >> 8 & 0x80 | words & 0x7F
    out[lows : lows + span.values] = low.to(torch.uint8)
    numbers, misses = _numbers(words, least, format_)
    high = [(bits, (words >> lowest & ((1 << bits) - 1)).to(torch.uint8)) for bits, lowest in format_.high]
    for at, (bits, content) in zip(folds, [(NUMBER_BITS, numbers), *high], strict=True):
        rows = content.view(8 // bits, -1)
        for place, row in enumerate(rows):
            out[at : at + len(row)] |= row << (bits * place)
    return misses.nonzero().reshape(-1) + span.start // 2


def _numbers(words: Tensor, least: int, format_: FloatFormat) -> tuple[Tensor, Tensor]:
    """Of each value: its exponent's number in the window, else 0, uint8; whether it is an escape."""
    exponents = words >> format_.mantissa & (format_.exponents - 1)
    fits = (exponents >= least) & (exponents < least + WINDOW)
    numbers = torch.where(fits, exponents - (least - 1), 0).to(torch.uint8)
    return numbers, ~fits & (exponents != 0)


def decode(form: PartFormat, part: Tensor, target: Tensor) -> None:
    """`target`: the part as it computes, uint8, all of it but what belongs to no tensor; on the stream of now."""
    from crossdock.offload.codecs.triton_kernels import copy_bytes, decode_bf16, write_escapes

    folded, copied = _tiles(form, part.device)
    words = target.view(torch.int16)
    if len(folded):
        decode_bf16[(len(folded),)](part, words, folded, TILE=_TILE)
    if len(copied):
        copy_bytes[(len(copied),)](part, target, copied, TILE=_TILE)
    for number, span in enumerate(form.coded):
        if span.format is not BF16:
            _decode_with_high_bits(span, part, words[span.start // 2 : span.stop // 2], part[4 + number])
    if form.capacity:
        places = part[form.escapes_at : form.values_at].view(torch.int32)
        values = part[form.values_at : form.nbytes].view(torch.int16)
        counts = part[:4].view(torch.int32), places, values, words, form.capacity, len(words)
        write_escapes[(-(-form.capacity // _ESCAPES),)](*counts, TILE=_ESCAPES)


@lru_cache(maxsize=1024)
def _tiles(form: PartFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 `[programs, 6]` and `[programs, 3]`: what each program of a kernel does."""
    folded = [
        (*span.places, span.start // 2, span.values // 2, start, 4 + number)
        for number, span in enumerate(form.coded)
        if span.format is BF16
        for start in range(0, span.values // 2, _TILE)
    ]
    copied = [
        (span.places[0] + start, span.start + start, min(_TILE, span.stop - span.start - start))
        for span in form.plain
        for start in range(0, span.stop - span.start, _TILE)
    ]
    return (
        torch.tensor(folded, dtype=torch.int64).reshape(-1, 6).to(device),
        torch.tensor(copied, dtype=torch.int64).reshape(-1, 3).to(device),
    )


def _decode_with_high_bits(span: Span, part: Tensor, words: Tensor, least: Tensor) -> None:
    assert span.format is not None
    lows, numbers, *folds = span.places
    words.copy_(part[lows : lows + span.values])
    number = _unfolded(part[numbers:], span.values, NUMBER_BITS)
    exponent = torch.where(number == 0, 0, number + (least.to(torch.int16) - 1))
    words |= exponent << span.format.mantissa
    for at, (bits, lowest) in zip(folds, span.format.high, strict=True):
        words |= _unfolded(part[at:], span.values, bits) << lowest


def _unfolded(fold: Tensor, values: int, bits: int) -> Tensor:
    """int16 `[values]`."""
    wide = fold[: values * bits // 8].to(torch.int16)
    return torch.cat([wide >> (bits * row) & ((1 << bits) - 1) for row in range(8 // bits)])
