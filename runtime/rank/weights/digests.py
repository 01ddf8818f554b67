"""Digests of weights where they lie, at memory speed: alike as long as no byte has changed, moved or been exchanged.

Memory is looked at as runs. Run number r belongs to phase r modulo `PHASES`, so that one phase, a small share of the
memory, has something of every stretch of it. On the host the xxh3 of each run, times an odd weight by its place in its
phase, adds up to the digest of the phase, wrapping, in int64.

On CUDA runs are of 512 B, the rows of a table of words. The sums of its rows and those of its columns, each folded and
times an odd weight by its place, add up in the same way. Nothing waits: what is returned is on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

PHASES = 32
_RUN_WORDS = 64
_ALIGNED_WORDS = 32
"""What every layout is a multiple of."""
_HASHED_BYTES = 256, 16 * 1024
"""How long a run is on the host, at least and at most: the longer, the faster."""
_STRETCHES = 8
"""Of how many stretches of a block a phase has something at least, before runs become longer."""


def phases_of(memory: Tensor) -> int:
    """Into how many phases a block's memory (uint8, a multiple of 256 B) falls: none is empty, unless all are."""
    return min(PHASES, len(_hashed_runs(len(memory))) if _is_hashed(memory) else _runs(memory).shape[0])


def phase_digest(memory: Tensor, phase: int) -> Tensor:
    """int64 `[1]`: the digest of one phase of a block's memory."""
    if _is_hashed(memory):
        hashes = _hashes(memory, slice(phase, None, phases_of(memory)))
        return (hashes * _weights(len(hashes), hashes.device)).sum(0, keepdim=True)
    runs = _runs(memory)[phase :: phases_of(memory)]
    sums = torch.cat([runs.sum(0), runs.sum(1)])
    return (_folded(sums) * _weights(len(sums), sums.device)).sum(0, keepdim=True)


def phase_digests(memory: Tensor) -> Tensor:
    """int64 `[phases_of(memory)]`: the digest of each phase."""
    phases = phases_of(memory)
    if not _is_hashed(memory):
        return _by_phase(_runs(memory), phases)
    by_row = _in_rows(_hashes(memory), phases) if phases else memory.new_zeros(1, 0, dtype=torch.int64)
    return (by_row * _weights(len(by_row), by_row.device)[:, None]).sum(0)


def tensor_digest(tensor: Tensor, kind: str = "") -> Tensor:
    """int64 `[1]`: the digest of a tensor's bytes in C order, whatever their number.

    Args:
        kind: of the device of the tensor with which it is compared, if that is another than its own.
    """
    flat = tensor.detach().contiguous()
    flat = flat.reshape(()) if flat.numel() == 1 else flat  # which may have any stride
    raw = flat.reshape(-1).view(torch.uint8)
    if _is_hashed(raw) and kind in ("", "cpu"):
        return torch.from_numpy(np.array([xxh3_64_intdigest(raw.numpy().data)], np.uint64).view(np.int64))
    whole = raw.numel() // (8 * _RUN_WORDS) * 8 * _RUN_WORDS
    body, tail = raw[:whole], raw[whole:]
    if body.data_ptr() % 8 or body.storage_offset() % 8:
        body = body.clone()
    last = torch.nn.functional.pad(tail, (0, 8 * _RUN_WORDS - len(tail)))
    phases = torch.cat([_by_phase(part.view(torch.int64).view(-1, _RUN_WORDS), PHASES) for part in (body, last)])
    return (_folded(phases) * _weights(len(phases), phases.device)).sum(0, keepdim=True) + raw.numel()


def _is_hashed(memory: Tensor) -> bool:
    return memory.device.type == "cpu"


def _hashes(memory: Tensor, some: slice = slice(None)) -> Tensor:
    """int64 `[runs]`: of each run, or of some, on the host."""
    read = memory.numpy().data.__getitem__
    hashes = map(xxh3_64_intdigest, map(read, _hashed_runs(len(memory))[some]))
    return torch.from_numpy(np.fromiter(hashes, np.uint64).view(np.int64))


@lru_cache(maxsize=64)
def _hashed_runs(length: int) -> tuple[slice, ...]:
    shortest, longest = _HASHED_BYTES
    size = min(max(1 << (length // (PHASES * _STRETCHES)).bit_length() >> 1, shortest), longest)
    return tuple(slice(start, start + size) for start in range(0, length, size))


def _in_rows(values: Tensor, phases: int) -> Tensor:
    """`[rows, phases]` of what there is of each run, with zeros behind."""
    rows = -(-len(values) // phases)
    return torch.nn.functional.pad(values, (0, rows * phases - len(values))).view(rows, phases)


def _by_phase(runs: Tensor, phases: int) -> Tensor:
    """int64 `[phases]` of `runs`, `[runs, words]`."""
    if not phases:
        return runs.new_zeros(0)
    count, words = runs.shape
    whole = count // phases * phases
    columns = runs[:whole].view(-1, phases, words).sum(0)
    columns[: count - whole] += runs[whole:]
    rows = _in_rows(runs.sum(1), phases)
    weights = _weights(words + len(rows), runs.device)
    by_row = (_folded(rows) * weights[words:, None]).sum(0)
    return by_row + (_folded(columns) * weights[:words]).sum(1)


def _runs(memory: Tensor) -> Tensor:
    """int64 `[runs, words]`."""
    words = memory.view(torch.int64)
    width = _ALIGNED_WORDS if len(words) % _RUN_WORDS else _RUN_WORDS
    return words.view(len(words) // width, width)


def _folded(sums: Tensor) -> Tensor:
    """Times an odd weight, the top bit of every sum would count alike: two changed signs would be none."""
    return sums ^ (sums >> 32)


def _weights(length: int, device: torch.device) -> Tensor:
    return _odd(1 << max(length - 1, 0).bit_length(), device)[:length]


@lru_cache(maxsize=64)
def _odd(length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return 2 * torch.arange(length, dtype=torch.int64, device=device) + 1


def read_later(values: Tensor) -> Callable[[], list[int]]:
    """Send them to the host; what is returned waits for them, and for nothing that is enqueued later."""
    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return read
