"""Sequence-parallel attention: Ulysses inside, ring outside.

Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509) trades tokens for heads: one all-to-all gives every rank all
tokens of its Ulysses group for a share of the heads, another one takes the output back. Ring (Ring Attention,
arXiv 2310.01889) keeps the queries and passes keys and values on from rank to rank. With both, what a Ulysses
group holds together is one station of the ring.

Nothing needs to divide: a rank may own more heads or tokens than its neighbour, or none, and it takes part in
every exchange all the same, so that all ranks issue the same ones in the same order. Queries may also attend to the
keys of another sequence that is spread over the same ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.parallel.group import Group
from crossdock.parallel.kernels import attention, attention_with_lse, merge
from crossdock.parallel.sequence import SequenceLayout, shard_lengths


def nothing() -> None:
    """Nobody wants to know."""


class SequenceParallelAttention:
    """Attention over a sequence spread over `ring_degree * ulysses_degree` ranks. No gradients."""

    def __init__(
        self,
        *,
        ulysses_group: Group | None,
        ulysses_rank: int,
        ulysses_degree: int,
        ring_group: Group | None,
        ring_rank: int,
        ring_degree: int,
        after_collective: Callable[[], None] = nothing,
    ) -> None:
        """
        Args:
            after_collective: called whenever exchanges have been given to the compute stream.

        Raises:
            ValueError: a degree above 1 without a group.
        """
        self._after_collective = after_collective
        if ulysses_degree > 1 and ulysses_group is None:
            raise ValueError(f"ulysses_degree is {ulysses_degree}, but ulysses_group is None")
        if ring_degree > 1 and ring_group is None:
            raise ValueError(f"ring_degree is {ring_degree}, but ring_group is None")
        self._index = ring_rank * ulysses_degree + ulysses_rank
        self._parts = ring_degree * ulysses_degree
        self._ring_rank = ring_rank
        self._ulysses_degree = ulysses_degree
        self._ulysses = Ulysses(ulysses_group, ulysses_rank, ulysses_degree) if ulysses_group else None
        self._ring = _Ring(ring_group, ring_rank, ring_degree) if ring_group else None

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        key_layout: SequenceLayout | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention of this rank's tokens to all tokens of a sequence. Collective over both groups.

        Args:
            query: `[batch, local tokens, heads, head_dim]`.
            key, value: `[batch, local tokens, kv_heads, head_dim]`; `kv_heads` is `heads`, or divides it with
                `enable_gqa`.
            layout: the joint sequence of the queries; its parts are the ranks, in the order of their part index
                `ring_rank * ulysses_degree + ulysses_rank`.
            key_layout: the joint sequence of the keys; None: it is the queries' own.
            mask: which keys are padding, over the whole sequence in the model's order: `[batch, total]` or
                `[batch, 1, 1, total]`; or who attends to whom, `[batch, 1 or heads, total queries, total]` (batch 1
                serves all); bool (True = attend) or float (added to scores).
            scale: of the scores; None is `head_dim ** -0.5`.

        Returns:
            `[batch, local tokens, heads, head_dim]`; 0 for a query whose keys are all masked.

        Raises:
            ValueError: shapes, mask or options that this attention does not have.
        """
        keys = layout if key_layout is None else key_layout
        check_layout("query", query, layout, self._parts, self._index)
        check_layout("key", key, keys, self._parts, self._index)
        check_inputs(query, key, value, is_causal, enable_gqa)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        starts = keys.bounds[:: self._ulysses_degree]  # one Ulysses group's tokens after the other's
        first = self._ring_rank * self._ulysses_degree
        station = slice(first, first + self._ulysses_degree)
        heads, tokens = query.shape[2], layout.lengths[station]
        bias = score_bias(mask, layout, keys, query, station)
        if self._ulysses is None:
            return self._over_keys(query, key, value, bias, scale, starts)
        query, key, value = self._ulysses.to_heads(query, key, value, tokens, keys.lengths[station])
        self._after_collective()
        out = self._over_keys(query, key, value, self._ulysses.own_heads(bias, heads), scale, starts)
        out = self._ulysses.to_tokens(out, tokens, heads)
        self._after_collective()
        return out

    def _over_keys(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        starts: tuple[int, ...],
    ) -> Tensor:
        if self._ring is None:
            return attention(query, key, value, bias, scale)
        out = self._ring.attend(query, key, value, bias, scale, starts)
        self._after_collective()
        return out


class Ulysses:
    """The two all-to-alls.

    Messages are token-major, `[tokens, batch, heads, head_dim]`: what arrives from all ranks is the joined
    sequence, without another copy.
    """

    def __init__(self, group: Group, rank: int, degree: int) -> None:
        self._group = group
        self._rank = rank
        self._degree = degree

    def to_heads(
        self, query: Tensor, key: Tensor, value: Tensor, tokens: tuple[int, ...], key_tokens: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[batch, own tokens, all heads, head_dim]` -> `[batch, group's tokens, own heads, head_dim]`.

        One all-to-all for all three where they are of one sequence. Key heads that cannot be scattered evenly are
        repeated first.
        """
        if key.shape[2] % self._degree and key.shape[2] != query.shape[2]:
            groups = query.shape[2] // key.shape[2]
            key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        if tokens == key_tokens:
            q, k, v = self.scatter_heads((query, key, value), tokens)
        else:
            (q,), (k, v) = self.scatter_heads((query,), tokens), self.scatter_heads((key, value), key_tokens)
        return q, k, v

    def own_heads(self, bias: Tensor | None, heads: int) -> Tensor | None:
        """Of a bias that differs from head to head, `[batch, heads, seq, keys]`, those that this rank gets."""
        if bias is None or bias.ndim == 2 or bias.shape[1] == 1:
            return bias
        return bias.split_with_sizes(shard_lengths(heads, self._degree), dim=1)[self._rank]

    def scatter_heads(self, tensors: tuple[Tensor, ...], tokens: tuple[int, ...]) -> tuple[Tensor, ...]:
        """`to_heads` of tensors of one sequence: one all-to-all."""
        counts = [shard_lengths(tensor.shape[2], self._degree) for tensor in tensors]
        together = [sum(of_rank) for of_rank in zip(*counts, strict=True)]
        batch, own_tokens, _, head_dim = tensors[0].shape
        sizes = [own_tokens * batch * heads * head_dim for heads in together]
        message = tensors[0].new_empty(sum(sizes))
        # what one rank gets: its heads of q, of k and of v, side by side
        cuts = [
            tensor.transpose(0, 1).split_with_sizes(cut, dim=2) for tensor, cut in zip(tensors, counts, strict=True)
        ]
        slots = message.split_with_sizes(sizes)
        for slot, heads, *shares in zip(slots, together, *cuts, strict=True):
            torch.cat(shares, dim=2, out=slot.view(own_tokens, batch, heads, head_dim))
        row = batch * together[self._rank] * head_dim
        agreed = (tokens, together, batch, head_dim)
        arrived = self._exchange(message, sizes, [count * row for count in tokens], agreed)
        joined = arrived.view(sum(tokens), batch, together[self._rank], head_dim).transpose(0, 1)
        return joined.split_with_sizes([cut[self._rank] for cut in counts], dim=2)

    def to_tokens(self, out: Tensor, tokens: tuple[int, ...], heads: int) -> Tensor:
        """`[batch, group's tokens, own heads, head_dim]` -> `[batch, own tokens, all heads, head_dim]`."""
        batch, _, own_heads, head_dim = out.shape
        own_tokens, row = tokens[self._rank], batch * head_dim
        counts = shard_lengths(heads, self._degree)
        sizes = [own_tokens * row * count for count in counts]
        message = out.transpose(0, 1).contiguous().view(-1)
        agreed = (tokens, counts, batch, head_dim)
        arrived = self._exchange(message, [count * row * own_heads for count in tokens], sizes, agreed)
        shares = [
            share.view(own_tokens, batch, count, head_dim)
            for share, count in zip(arrived.split_with_sizes(sizes), counts, strict=True)
        ]
        return torch.cat(shares, dim=2).transpose(0, 1)

    def _exchange(
        self, message: Tensor, send_sizes: list[int], receive_sizes: list[int], agreed: tuple[object, ...]
    ) -> Tensor:
        arrived = message.new_empty(sum(receive_sizes))
        self._group.all_to_all(arrived, message, receive_sizes, send_sizes, agreed)
        return arrived


class _Ring:
    """Keys and values go round; the next ones are on their way while the present ones are worked on."""

    def __init__(self, group: Group, rank: int, degree: int) -> None:
        self._group = group
        self._rank = rank
        self._degree = degree

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        starts: tuple[int, ...],
    ) -> Tensor:
        """Ring rank r has the keys `[starts[r], starts[r + 1])` of the gathered order, the columns of `bias`.

        The parts are merged in one fixed order: this rank's, the previous rank's, and so on round the ring.
        """
        pair, source = torch.stack([key, value]), self._rank
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(self._degree):
            before = (source - 1) % self._degree
            more = step + 1 < self._degree
            hop = self._pass_on(pair, starts[before + 1] - starts[before], (starts, step)) if more else None
            columns = None if bias is None else bias[..., starts[source] : starts[source + 1]]
            out, lse = attention_with_lse(query, pair[0], pair[1], columns, scale)
            merged = (out.float(), lse) if merged is None else merge(*merged, out, lse)
            if hop is not None:
                pair, source = hop.arrive(), before
        assert merged is not None
        return merged[0].to(query.dtype)

    def _pass_on(self, pair: Tensor, tokens: int, agreed: tuple[object, ...]) -> _Hop:
        """Start sending `pair` `[2, batch, its tokens, kv_heads, head_dim]` and receiving one of `tokens`."""
        shape = (*pair.shape[:2], tokens, *pair.shape[3:])
        # an empty message still is one: every rank has a send and a receive in every hop
        sent = pair.view(-1) if pair.numel() else pair.new_zeros(1)
        received = pair.new_empty(max(1, math.prod(shape)))
        agreed = (*agreed, pair.shape[1], *pair.shape[3:])
        return _Hop(received[: math.prod(shape)].view(shape), self._group.pass_on(sent, received, agreed))


@dataclass(frozen=True)
class _Hop:
    received: Tensor
    wait: Callable[[], None]

    def arrive(self) -> Tensor:
        self.wait()
        return self.received


def check_layout(name: str, tensor: Tensor, layout: SequenceLayout, parts: int, index: int) -> None:
    """Whether `tensor` holds the tokens of part `index` of `parts`.

    Raises:
        ValueError: it does not; says what was found and what was expected.
    """
    if layout.parts != parts:
        raise ValueError(f"the layout has {layout.parts} parts, but its tokens are spread over {parts} ranks")
    if tensor.shape[1] != layout.lengths[index]:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} has {tensor.shape[1]} tokens, but part {index} of segments "
            f"{layout.segments} over {parts} ranks has {layout.lengths[index]}; attention to a sequence that every "
            "rank holds whole must be named in the region's cross"
        )


def check_inputs(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool) -> None:
    """Whether sequence-parallel attention has what is asked of it.

    Raises:
        ValueError: it has not; says what was found and what is possible.
    """
    if is_causal:
        raise ValueError("is_causal=True is not possible: sequence-parallel attention is bidirectional")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or key.shape != value.shape or query.shape[::3] != key.shape[::3]:
        raise ValueError(f"{shapes}: possible is one batch size, one head_dim, one shape for key and value")
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads != kv_heads and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        raise ValueError(f"{shapes}: possible are {heads} key heads, or a divisor of it with enable_gqa=True")


def score_bias(
    mask: Tensor | None, layout: SequenceLayout, key_layout: SequenceLayout, query: Tensor, station: slice
) -> Tensor | None:
    """A mask in the model's order -> what is added to the scores, in gathered order and the query's dtype.

    Args:
        query: `[batch, any tokens, heads, head_dim]`, before heads are scattered.
        station: the parts whose queries meet the keys on this rank; a mask with rows keeps theirs.

    Returns:
        `[batch, total keys]`, or for a mask with rows `[batch, 1 or heads, the station's tokens, total keys]`.

    Raises:
        ValueError: another shape or dtype than `attend` takes.
    """
    if mask is None:
        return None
    batch, heads = query.shape[0], query.shape[2]
    mask = mask[:, 0, 0] if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else mask
    per_key = mask.ndim == 2 and mask.shape[1] == key_layout.total
    per_row = mask.ndim == 4 and mask.shape[1] in (1, heads) and mask.shape[2:] == (layout.total, key_layout.total)
    if not (per_key or per_row) or mask.shape[0] not in (1, batch):
        rows, keys = layout.total, key_layout.total
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} does not mask the keys of the whole sequence; "
            f"possible: [{batch}, {keys}], [{batch}, 1, 1, {keys}] and [{batch}, 1 or {heads}, {rows}, {keys}]"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"an attention mask of {mask.dtype}; possible: bool (True = attend), float (added)")
    if per_row:
        first, last = layout.bounds[station.start], layout.bounds[station.stop]
        mask = mask.index_select(2, layout.order(mask.device)[first:last])
    if len(key_layout.segments) > 1:
        mask = mask.index_select(-1, key_layout.order(mask.device))
    if mask.dtype == torch.bool:
        mask = mask.new_zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return mask.to(query).expand(batch, *mask.shape[1:])


def has_rows(mask: Tensor | None) -> bool:
    """Whether a mask differs from query to query."""
    return mask is not None and mask.ndim == 4 and mask.shape[1:3] != (1, 1)
