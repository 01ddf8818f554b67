"""The lossless code on the CPU, in numpy: torch would start a team of threads beside those that compute."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from crossdock.offload.codecs.part_format import (
    BF16,
    NUMBER_BITS,
    WINDOW,
    FloatFormat,
    PartFormat,
    Span,
    least_of_window,
)

_AT_ONCE = 1 << 16
"""Values that are encoded or decoded at once: what a core's cache holds."""
_Bytes = NDArray[np.uint8]
_Words = NDArray[np.uint16]
_Places = NDArray[np.int32]


def encode(form: PartFormat, raw: _Bytes, out: _Bytes, threads: int = 1) -> None:
    """`raw`: a part as it computes. `out`: at least `form.nbytes`, zeros.

    Raises:
        IncompressibleError: there are more escapes than room for them.
    """
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_encode_span, span, number, raw, out) for number, span in enumerate(form.coded)]
        found = [job.result() for job in jobs]
    form.check_room([len(places) for places in found])
    for span in form.plain:
        out[span.places[0] :][: span.stop - span.start] = raw[span.start : span.stop]
    places = np.concatenate([np.empty(0, np.int32), *found])
    put_escapes(form, out, places, raw.view(np.uint16)[places])


def decode(form: PartFormat, part: _Bytes, target: _Bytes) -> None:
    """`target`: the part as it computes, all of it but what belongs to no tensor."""
    for span in form.spans:
        _decode_span(form, span, part, target[span.start : span.stop])
    places, values = escapes(form, part)
    target.view(np.uint16)[places] = values


def decode_span(form: PartFormat, span: Span, part: _Bytes, target: _Bytes) -> None:
    """`target`: the span alone, as it computes."""
    _decode_span(form, span, part, target)
    if span.format is not None:
        places, values = escapes(form, part)
        mine = slice(*np.searchsorted(places, (span.start // 2, span.stop // 2)))
        target.view(np.uint16)[places[mine] - span.start // 2] = values[mine]


def escapes(form: PartFormat, part: _Bytes) -> tuple[_Places, _Words]:
    """Their places, in ascending order, and their values."""
    count = int(part[:4].view(np.int32)[0])
    places = part[form.escapes_at :][: 4 * count].view(np.int32)
    return places, part[form.values_at :][: 2 * count].view(np.uint16)


def put_escapes(form: PartFormat, part: _Bytes, places: _Places, values: _Words) -> None:
    """There is room for them."""
    part[:4].view(np.int32)[0] = len(places)
    part[form.escapes_at :][: 4 * len(places)].view(np.int32)[:] = places
    part[form.values_at :][: 2 * len(places)].view(np.uint16)[:] = values


# -- encoding --------------------------------------------------------------------------------------------------------


def _encode_span(span: Span, number: int, raw: _Bytes, out: _Bytes) -> _Places:
    """All of it but its escapes, whose places in the part are returned."""
    format_ = span.format
    assert format_ is not None
    words = raw[span.start : span.stop].view(np.uint16)
    out[4 + number] = least = least_of_window(torch.from_numpy(words.view(np.int16)), format_)
    lows, *folds = (out[at:] for at in span.places)
    for start in range(0, span.values, _AT_ONCE):
        word, low = words[start : start + _AT_ONCE], lows[start : min(start + _AT_ONCE, span.values)]
        np.copyto(low, word, casting="unsafe")
        if format_ is BF16:
            np.bitwise_and(low, 0x7F, out=low)
            np.bitwise_or(low, (word >> 8).astype(np.uint8) & np.uint8(0x80), out=low)
    escapes = [np.empty(0, np.int32)]
    for here, target, shift in _folding(words, folds[0], NUMBER_BITS):
        numbers, misses = _numbers(words[here], least, format_)
        escapes.append((np.flatnonzero(misses) + (span.start // 2 + here.start)).astype(np.int32))
        np.bitwise_or(target, np.left_shift(numbers, shift, out=numbers), out=target)
    for fold, (bits, lowest) in zip(folds[1:], format_.high, strict=True):
        for here, target, shift in _folding(words, fold, bits):
            high = (words[here] >> lowest).astype(np.uint8) & np.uint8((1 << bits) - 1)
            np.bitwise_or(target, np.left_shift(high, shift, out=high), out=target)
    return np.sort(np.concatenate(escapes))


def _numbers(words: _Words, least: int, format_: FloatFormat) -> tuple[_Bytes, NDArray[np.bool_]]:
    """Of each value: its exponent's number in the window, else 0; whether it is an escape."""
    exponents = (words >> format_.mantissa).astype(np.uint8)
    if format_ is not BF16:
        np.bitwise_and(exponents, format_.exponents - 1, out=exponents)
    numbers = exponents - np.uint8(least)
    fits = numbers < WINDOW  # below the window it has wrapped
    np.add(numbers, np.uint8(1), out=numbers)
    np.multiply(numbers, fits, out=numbers)
    return numbers, fits < (exponents != 0)


def _folding(words: _Words, fold: _Bytes, bits: int) -> Iterator[tuple[slice, _Bytes, int]]:
    """Some of the values, the bytes that they are folded into, and how far to the left."""
    rows, length = 8 // bits, len(words) * bits // 8
    for start in range(0, length, _AT_ONCE):
        stop = min(start + _AT_ONCE, length)
        for row in range(rows):
            yield slice(row * length + start, row * length + stop), fold[start:stop], bits * row


# -- decoding --------------------------------------------------------------------------------------------------------


def _decode_span(form: PartFormat, span: Span, part: _Bytes, target: _Bytes) -> None:
    """All of it but its escapes."""
    if span.format is None:
        np.copyto(target, part[span.places[0] :][: len(target)])
        return
    words = target.view(np.uint16)
    lows, numbers, *folds = (part[at:] for at in span.places)
    below = np.uint8((int(part[4 + form.number_of[span]]) - 1) & 0xFF)
    if span.format is BF16:
        _decode_bf16(lows, numbers, below, words)
    else:
        _decode_with_high_bits(span.format, lows, numbers, folds, below, words)


def _decode_bf16(lows: _Bytes, numbers: _Bytes, below: np.uint8, words: _Words) -> None:
    number = np.empty(min(len(words), _AT_ONCE), np.uint8)
    for here, folded, shift in _folding(words, numbers, NUMBER_BITS):
        word = words[here]
        exponent = _exponents(folded, shift, below, number[: len(word)])
        np.copyto(word.view(np.int16), lows[here].view(np.int8))  # the sign fills all that is above the mantissa
        np.bitwise_and(word, 0x807F, out=word)
        np.bitwise_or(word, np.left_shift(exponent, 7, out=exponent), out=word)


def _decode_with_high_bits(
    format_: FloatFormat, lows: _Bytes, numbers: _Bytes, folds: list[_Bytes], below: np.uint8, words: _Words
) -> None:
    np.copyto(words, lows[: len(words)])
    number = np.empty(min(len(words), _AT_ONCE), np.uint8)
    for here, folded, shift in _folding(words, numbers, NUMBER_BITS):
        words[here] |= _exponents(folded, shift, below, number[: len(folded)]) << format_.mantissa
    for fold, (bits, lowest) in zip(folds, format_.high, strict=True):
        for here, folded, shift in _folding(words, fold, bits):
            words[here] |= (folded >> shift & np.uint8((1 << bits) - 1)).astype(np.uint16) << lowest


def _exponents(folded: _Bytes, shift: int, below: np.uint8, number: _Bytes) -> _Words:
    """Number 0 is exponent 0, number n the n-th of the window. `number`: memory to work in."""
    np.right_shift(folded, shift, out=number)
    np.bitwise_and(number, WINDOW, out=number)
    there = number != 0
    np.add(number, below, out=number)
    np.multiply(number, there, out=number)
    return number.astype(np.uint16)
