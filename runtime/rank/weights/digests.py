"""Digests of weights where they lie, at memory speed: alike as long as no byte has changed, moved or been exchanged.

Memory is looked at as runs of 512 B, the rows of a table of words. The sums of its rows and those of its columns, each
folded and times an odd weight by its place, add up to the digest, wrapping, in int64. Run number r belongs to phase r
modulo `PHASES`, so that one phase, a small share of the memory, has something of every stretch of it. On CUDA nothing
waits: what is returned is on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

PHASES = 32
_RUN_WORDS = 64
_ALIGNED_WORDS = 32
"""What every layout is a multiple of."""


def phases_of(memory: Tensor) -> int:
    """Into how many phases a block's memory (uint8, a multiple of 256 B) falls: none is empty, unless all are."""
    return min(PHASES, _runs(memory).shape[0])


def phase_digest(memory: Tensor, phase: int) -> Tensor:
    """int64 `[1]`: the digest of one phase of a block's memory."""
    runs = _runs(memory)[phase :: phases_of(memory)]
    sums = torch.cat([runs.sum(0), runs.sum(1)])
    return (_folded(sums) * _weights(len(sums), sums.device)).sum(0, keepdim=True)


def phase_digests(memory: Tensor) -> Tensor:
    """int64 `[phases_of(memory)]`: the digest of each phase."""
    return _by_phase(_runs(memory), phases_of(memory))


def tensor_digest(tensor: Tensor) -> Tensor:
    """int64 `[1]`: the digest of a tensor's bytes in C order, whatever their number."""
    flat = tensor.detach().contiguous()
    flat = flat.reshape(()) if flat.numel() == 1 else flat  # which may have any stride
    raw = flat.reshape(-1).view(torch.uint8)
    whole = raw.numel() // (8 * _RUN_WORDS) * 8 * _RUN_WORDS
    body, tail = raw[:whole], raw[whole:]
    if body.data_ptr() % 8 or body.storage_offset() % 8:
        body = body.clone()
    last = torch.nn.functional.pad(tail, (0, 8 * _RUN_WORDS - len(tail)))
    phases = torch.cat([_by_phase(part.view(torch.int64).view(-1, _RUN_WORDS), PHASES) for part in (body, last)])
    return (_folded(phases) * _weights(len(phases), phases.device)).sum(0, keepdim=True) + raw.numel()


def _by_phase(runs: Tensor, phases: int) -> Tensor:
    """int64 `[phases]` of `runs`, `[runs, words]`."""
    if not phases:
        return runs.new_zeros(0)
    count, words = runs.shape
    whole = count // phases * phases
    columns = runs[:whole].view(-1, phases, words).sum(0)
    columns[: count - whole] += runs[whole:]
    rows = -(-count // phases)
    padded = torch.nn.functional.pad(runs.sum(1), (0, rows * phases - count)).view(rows, phases)
    weights = _weights(words + rows, runs.device)
    by_row = (_folded(padded) * weights[words:, None]).sum(0)
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
