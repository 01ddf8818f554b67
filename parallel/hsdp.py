"""HSDP: each block's bytes are cut evenly over a shard group and gathered into a slot just in time.

After PyTorch FSDP's hybrid sharding (arXiv 2304.11277), with the packed byte range of a block in place of a flat
parameter: the all-gather writes straight into the slot, without a copy in or out.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crossdock.parallel.group import Group


def shard_range(nbytes: int, parts: int, index: int) -> tuple[int, int]:
    """The bytes [start, stop) of a block of `nbytes` that shard `index` of `parts` holds."""
    if nbytes % parts:
        raise ValueError(f"{nbytes} bytes do not divide into {parts} shards")
    size = nbytes // parts
    return index * size, (index + 1) * size


def all_gather_bytes(whole: Tensor, shard: Tensor, group: Group) -> None:
    """Fill `whole` (uint8 `[parts * size]`) with every rank's `shard` (uint8 `[size]`), in group order. Collective.

    `shard` may be this rank's own range of `whole`. Blocks the calling thread (CPU) or stream (CUDA) until done.
    """
    if whole.device.type == "cpu":
        _all_gather_by_broadcasts(whole, shard, group)
    else:
        group.all_gather(whole, shard)


def _all_gather_by_broadcasts(whole: Tensor, shard: Tensor, group: Group) -> None:
    """gloo's all-gather takes 2 to 3 times as long as one broadcast per rank, all under way at once."""
    parts = list(whole.chunk(group.size))
    mine, parts[group.index] = parts[group.index], shard

    def keep() -> None:
        if mine.data_ptr() != shard.data_ptr():
            np.copyto(mine.numpy(), shard.numpy())  # on this thread alone, while the others send

    group.all_gather_by_broadcasts(parts, meanwhile=keep)
