"""Triton kernels that decode; imported where there is a GPU. Triton reads the annotations: only its own are there."""

import triton
import triton.language as tl


@triton.jit
def decode_bf16(part, words, tiles, TILE: tl.constexpr):  # noqa: N803
    """A tile of a span. `part`: uint8; `words`: int16, the part that computes; `tiles`: int64 `[programs, 6]`: where
    the low bytes lie, the folded numbers, the values; half of their count; from where on; where the window lies.
    """
    tile = tiles + tl.program_id(0) * 6
    low_at, fold_at, word_at = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    half, start, window = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    below = tl.load(part + window).to(tl.int32) - 1
    here = start + tl.arange(0, TILE)
    inside = here < half
    folded = tl.load(part + fold_at + here, mask=inside, other=0).to(tl.int32)
    for row in tl.static_range(2):
        number = (folded >> (4 * row)) & 15
        exponent = tl.where(number == 0, 0, number + below)
        low = tl.load(part + low_at + row * half + here, mask=inside, other=0).to(tl.int32)
        word = ((low & 0x80) << 8) | (exponent << 7) | (low & 0x7F)
        tl.store(words + word_at + row * half + here, word.to(tl.int16), mask=inside)


@triton.jit
def copy_bytes(part, target, tiles, TILE: tl.constexpr):  # noqa: N803
    """A tile of what is not coded. Both uint8; `tiles`: int64 `[programs, 3]`: from, to, how many."""
    tile = tiles + tl.program_id(0) * 3
    source, at, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    here = tl.arange(0, TILE)
    tl.store(target + at + here, tl.load(part + source + here, mask=here < count), mask=here < count)


@triton.jit
def write_escapes(count, places, values, words, capacity, length, TILE: tl.constexpr):  # noqa: N803
    """`count`: int32 `[1]`; `places`: int32, `values`: int16, both `[capacity]`; `words`: int16 `[length]`."""
    here = tl.program_id(0) * TILE + tl.arange(0, TILE)
    used = here < tl.minimum(tl.load(count), capacity)
    place = tl.load(places + here, mask=used, other=0)
    inside = used & (place >= 0) & (place < length)
    tl.store(words + place, tl.load(values + here, mask=used, other=0), mask=inside)
