"""Collectives whose names differ between the versions of torch that are supported (2.11 to 2.13)."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_gather_single(output: Tensor, input: Tensor, group: dist.ProcessGroup | None) -> None:
    """Fill `output` with the `input` of every rank, one after the other in group order. Collective."""
    newer = getattr(dist, "all_gather_single", None)  # torch 2.13 deprecates the older name
    (newer or dist.all_gather_into_tensor)(output, input, group=group)
