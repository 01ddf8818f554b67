"""How a token sequence is cut over the ranks of a sequence group: no padding, and lengths need not divide.

Every segment of the joint sequence (text, image) is cut over all parts by itself, so part r holds
`[text_r, image_r]`. Putting the parts' tokens side by side therefore gives another order than the model's:
the gathered order. `SequenceLayout.order` leads from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from crossdock.parallel.group import Group


def shard_lengths(total: int, parts: int) -> tuple[int, ...]:
    """Tokens (or heads) per part: the first `total % parts` parts get one more; a part may get none.

    Raises:
        ValueError: `parts` is below 1 or `total` below 0.
    """
    if parts < 1 or total < 0:
        raise ValueError(f"cannot cut {total} into {parts} parts")
    share, rest = total // parts, total % parts  # no divmod: these may be symbols of `torch.compile`
    return tuple(share + (part < rest) for part in range(parts))


@dataclass(frozen=True)
class SequenceLayout:
    """The joint sequence and its parts.

    Attributes:
        segments: global lengths, in the order in which attention sees them: (text, image), or (unified,).
        parts: ranks that the sequence is cut over.
        lengths: tokens per part, all segments together.
        bounds: where the parts begin and end in gathered order: part r is `[bounds[r], bounds[r + 1])`.
    """

    segments: tuple[int, ...]
    parts: int
    lengths: tuple[int, ...] = field(init=False, compare=False)
    bounds: tuple[int, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:  # no cached properties: `torch.compile` does not see through them
        per_segment = [shard_lengths(segment, self.parts) for segment in self.segments]
        lengths = tuple(sum(lengths[part] for lengths in per_segment) for part in range(self.parts))
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "bounds", (0, *accumulate(lengths)))

    @property
    def total(self) -> int:
        return sum(self.segments)

    def order(self, device: torch.device | str = "cpu") -> Tensor:
        """The model's index of every token, in gathered order: int64 `[total]`.

        `mask.index_select(-1, layout.order(mask.device))` brings a mask into gathered order.
        """
        made = _order if is_dynamo_compiling() else _kept_order
        return made(self.segments, self.parts, torch.device(device))


def _order(segments: tuple[int, ...], parts: int, device: torch.device) -> Tensor:
    ends = accumulate(segments)
    indices = [torch.arange(end - size, end, device=device) for size, end in zip(segments, ends, strict=True)]
    shards = [index.split_with_sizes(shard_lengths(len(index), parts)) for index in indices]
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([empty, *(shard[part] for part in range(parts) for shard in shards)])


_kept_order = lru_cache(maxsize=64)(_order)


def take_shard(tensor: Tensor, dim: int, parts: int, index: int) -> Tensor:
    """Part `index` of `tensor` along `dim`: a view, in general not contiguous."""
    lengths = shard_lengths(tensor.shape[dim], parts)
    return tensor.narrow(dim, sum(lengths[:index]), lengths[index])


def gather_shards(tensor: Tensor, dim: int, total: int, parts: int, index: int, group: Group | None) -> Tensor:
    """The inverse of `take_shard`; collective over `group`, also for a part without tokens.

    Shorter parts travel with one row of padding, which is dropped on arrival, so that one all-gather does.

    Args:
        tensor: part `index`, `[..., shard_lengths(total, parts)[index], ...]`.
        group: the ranks, in the order of their parts; not used when `parts` is 1.

    Returns:
        `[..., total, ...]`, contiguous, equal on all ranks.

    Raises:
        ValueError: `tensor` does not have the length of its part.
    """
    lengths = shard_lengths(total, parts)
    if tensor.shape[dim] != lengths[index]:
        raise ValueError(
            f"part {index} of {total} tokens over {parts} ranks has {lengths[index]}, but dim {dim} of "
            f"{tuple(tensor.shape)} has {tensor.shape[dim]}"
        )
    if parts == 1 or total == 0:
        return tensor.contiguous()
    rows = tensor.movedim(dim, 0)
    if len(rows) < lengths[0]:
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    gathered = rows.new_empty(parts * lengths[0], *rows.shape[1:])
    assert group is not None
    group.all_gather(gathered, rows.contiguous())
    if total < len(gathered):
        padded = gathered.chunk(parts)
        gathered = torch.cat([part[:length] for part, length in zip(padded, lengths, strict=True)])
    return gathered.movedim(0, dim).contiguous()
