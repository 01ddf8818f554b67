"""How many bytes of weights are on the device while a model runs: observed, not taken from the plan.

On a GPU the allocator keeps the peak. On the CPU every live storage is counted when a block begins and when it has
ended; host stores are told by their mapping, so that what remains is what would be on a device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STORE = "memfd:crossdock"
"""How host stores are called in /proc/self/maps."""


class PeakObserver:
    """Make it before `model` is placed on the device: what is there by then, besides `model` itself, is left out.

    Args:
        blocks: of `model`; where the CPU looks.
        activations: what `bytes_during` found for the model as it is, resident; also left out.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], activations: list[int], device: torch.device) -> None:
        own = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device.type == device.type}
        self._others = bytes_now(device) - sum(_storages(own.values()).values())
        self._blocks = blocks
        self._activations = activations
        self._device = device

    def weights(self, step: Callable[[], Any]) -> int:
        """The most weight bytes while `step` runs."""
        found = bytes_during(step, self._blocks, self._device)
        return max(there - own for there, own in zip(found, self._activations, strict=True)) - self._others


def activations_of(step: Callable[[], Any], blocks: list[nn.Module], device: torch.device) -> list[int]:
    """What a resident model adds while it runs."""
    step()  # libraries take their working memory once
    before = bytes_now(device)
    return [there - before for there in bytes_during(step, blocks, device)]


def bytes_during(step: Callable[[], Any], blocks: list[nn.Module], device: torch.device) -> list[int]:
    """On the CPU, bytes at each beginning and end of a block; on a GPU, the peak alone."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return [torch.cuda.max_memory_allocated(device)]
    found: list[int] = []

    def look(*_: Any) -> None:
        found.append(bytes_now(device))

    handles = [block.register_forward_pre_hook(look) for block in blocks]
    handles += [block.register_forward_hook(look) for block in blocks]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return found


def bytes_now(device: torch.device) -> int:
    """Of all that lives on the device, or on the CPU outside host stores."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    live = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter) and found.device.type == "cpu"]
    stores = _store_spans()
    return sum(
        nbytes for start, nbytes in _storages(live).items() if not any(low <= start < high for low, high in stores)
    )


def _storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes, each storage once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _store_spans() -> list[tuple[int, int]]:
    spans = [
        line.split(" ", 1)[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if STORE in line
    ]
    return [(int(low, 16), int(high, 16)) for low, high in spans]
