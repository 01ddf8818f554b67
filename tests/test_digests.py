"""Digests of weights: whatever changes, moves or is exchanged shows; on the host by hashes, on CUDA by sums, which are
looked at on the host here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import crossdock.runtime.rank.weights.digests as digests
from crossdock.runtime.rank.weights.digests import PHASES, phase_digest, phase_digests, phases_of, tensor_digest

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.int64, torch.complex64),
)


@pytest.fixture(params=["hashed", "summed"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "summed":
        monkeypatch.setattr(digests, "_is_hashed", lambda memory: False)
    return str(request.param)


def _random(length: int) -> Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))


def _exchanged(memory: Tensor, one: int, other: int, length: int) -> Tensor:
    found = memory.clone()
    found[one : one + length], found[other : other + length] = (
        memory[other : other + length],
        memory[one : one + length],
    )
    return found


@pytest.mark.parametrize("runs", [0, 1, 2, 3, 31, 33, 64, 129, 1000, 5000])
def test_a_phase_is_digested_alone_or_with_the_others(runs: int) -> None:
    memory = _random(256 * runs)
    whole = phase_digests(memory)
    assert len(whole) == phases_of(memory) <= PHASES
    assert all(phase_digest(memory, phase).equal(whole[phase : phase + 1]) for phase in range(len(whole)))
    assert phase_digests(memory.clone()).equal(whole)


@pytest.mark.parametrize(("length", "stride"), [(256, 1), (5 * 256, 7), (4096, 17)])
def test_every_single_bit_shows(length: int, stride: int) -> None:
    """In one phase, and in the digest of a tensor, wherever it ends; of long ones, each place of a bit in a word."""
    memory = _random(length)
    whole, of_tensor = phase_digests(memory), tensor_digest(memory[:-3])
    for bit in (*range(0, 8 * length, stride), 8 * length - 1):
        memory[bit // 8] ^= 1 << bit % 8
        assert (phase_digests(memory) != whole).sum() == 1
        assert tensor_digest(memory[:-3]).equal(of_tensor) == (bit // 8 >= length - 3)
        memory[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("length", [256 * 301, 2**20 + 512, 6 * 2**20 + 256])
def test_whatever_changes_shows(length: int) -> None:
    memory = _random(length)
    whole = phase_digests(memory)
    for place in (*range(0, length, length // 50 | 1), length - 1):
        memory[place] ^= 0x80
        assert (phase_digests(memory) != whole).sum() == 1, "one bit"
        memory[place] ^= 0x80
    signs = memory.view(torch.int64)
    for other in (1, 64, 64 * PHASES, 2048 * PHASES):
        if other < len(signs):
            signs[[0, other]] ^= -(2**63)
            assert not phase_digests(memory).equal(whole), "two signs"
            signs[[0, other]] ^= -(2**63)
    half = length // 512 * 256
    halves = memory[: 2 * half].view(2, -1).flip(0).reshape(-1)
    for changed in (halves, memory.roll(512 * PHASES), torch.cat([memory[:half], torch.zeros(length - half).byte()])):
        assert not phase_digests(changed)[: len(whole)].equal(whole)


def test_what_is_exchanged_shows() -> None:
    """Bytes, words or rows, near or far, within a run and across runs of one phase and of two; tensors too."""
    memory = _random(2**18)
    whole, first, tensor = phase_digests(memory), phase_digest(memory, 0), tensor_digest(memory)
    for size in (1, 2, 4, 8, 128, 512, 1024):
        for distance in (1, 2, 4, 8, 64, 128, 256, 512, 1024, 4096, 32 * 512, 32 * 1024, 2**17):
            if distance >= size:
                altered = _exchanged(memory, 0, distance, size)
                assert not phase_digests(altered).equal(whole), (size, distance)
                assert not phase_digest(altered, 0).equal(first), (size, distance)
                assert not tensor_digest(altered).equal(tensor), (size, distance)
    moved = torch.cat([memory[:256].roll(4), memory[256:]])  # in a ring, such as a bias by one
    assert not phase_digests(moved).equal(whole)
    assert not tensor_digest(moved).equal(tensor)


@pytest.mark.parametrize("length", [2**17, 2**20, 8 * 2**20])
def test_a_phase_has_something_of_every_stretch(length: int) -> None:
    """So that a copy that is half done, or in part another block's, shows in its step."""
    memory, other = _random(length), _random(length + 256)
    for start in range(0, length, length // 8):
        stretch = slice(start, start + length // 8)
        altered = memory.clone()
        altered[stretch] = other[stretch]
        assert (phase_digests(altered) != phase_digests(memory)).all()


@pytest.mark.parametrize("length", [0, 1, 7, 511, 512, 513, 5000])
def test_any_tensor_has_a_digest(length: int) -> None:
    """Wherever it lies."""
    raw = _random(length + 16)
    for start in (0, 1, 8):
        part = raw[start : start + length]
        assert tensor_digest(part).equal(tensor_digest(part.clone()))
        for place in {0, length // 2, length - 1} if length else ():
            changed = part.clone()
            changed[place] ^= 1
            assert not tensor_digest(changed).equal(tensor_digest(part))
    assert not tensor_digest(raw[:length]).equal(tensor_digest(raw[: length + 1]))


def _laid_out(values: Tensor) -> Iterator[Tensor]:
    """The same values in other strides."""
    yield values
    yield values.t().contiguous().t()
    yield torch.stack([values, values], dim=-1)[..., 0]
    yield torch.cat([values, values])[: len(values)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_in_any_layout(dtype: torch.dtype) -> None:
    """What counts are the values in C order, down to the last bit of the last one."""
    size = torch.empty(0, dtype=dtype).itemsize
    bits = _random(6 * 35 * size)
    values = (bits & 1 if dtype is torch.bool else bits).view(dtype).view(35, 6)
    right = tensor_digest(values)
    assert all(tensor_digest(laid_out).equal(right) for laid_out in _laid_out(values))
    assert not tensor_digest(values.t()).equal(right)
    assert not tensor_digest(values.flip(0)).equal(right)
    assert tensor_digest(values[0, 0]).equal(tensor_digest(values[:1, 0]))
    values.view(torch.uint8)[-1, -1] ^= 1
    assert not tensor_digest(values).equal(right)


def test_one_side_may_be_on_another_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file has is digested on the host as what arrived is on the device."""
    there = tensor_digest(_random(5000), kind="cuda")
    monkeypatch.setattr(digests, "_is_hashed", lambda memory: False)
    assert tensor_digest(_random(5000)).equal(there)
