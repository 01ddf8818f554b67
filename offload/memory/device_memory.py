"""How much memory a device has, and how much of it is left."""

from __future__ import annotations

import torch

from crossdock.offload.memory.host_memory import host_memory

MARGIN = 0.05
"""Share of the device that is never counted as spare: allocations differ a little from step to step."""


def total_bytes(device: torch.device) -> int:
    """Of the device; on the CPU, what this process may use of the host's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory().limit_bytes


def allocated_bytes(device: torch.device) -> int | None:
    """What this process has allocated on the device now; None for the CPU, where nobody counts it."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def spare_bytes(device: torch.device) -> int:
    """What is free even when the activations are at their peak so far; at least 0."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        return max(0, int(free + held_back - MARGIN * total))
    memory = host_memory()
    return max(0, int(memory.available_bytes - MARGIN * memory.limit_bytes))
