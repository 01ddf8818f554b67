"""Where a model's tokens are cut over the sequence group, and where they are put together again.

A model family names its regions as data (`SequenceRegion`). Between `enter` and `leave` every rank holds its own
tokens only: of every segment of the joint sequence its share, so replicated text does not exist and cannot count
twice. Attention in between sees the whole sequence through Ulysses, Ring or both; attention to what every rank holds
whole, as cross-attention to text, needs no exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crossdock.parallel.arguments import Arguments, beside, hook_arguments, map_tensors
from crossdock.parallel.attention import Ulysses, nothing
from crossdock.parallel.group import Group
from crossdock.parallel.sequence import SequenceLayout, gather_shards, shard_lengths, take_shard
from crossdock.parallel.tensor import matching_modules

TOKEN_DIM = 1
"""The token dim of a segment: `[batch, tokens, ...]`."""
SHARD_LIKE_DIM = -2
"""The token dim of most that follows: position ids `[..., tokens, axes]`, rotary tables `[..., tokens, dim]`."""


@dataclass(frozen=True)
class ShardLike:
    """How an argument, or every tensor of a tuple, is cut along with segments.

    Attributes:
        segments: whose tokens it counts, one or several side by side. Those that are not there count none.
        dim: where it counts them. A tensor with one entry there serves all tokens, and is not cut.
        ndim: only tensors of so many dims count tokens; None: all do.
    """

    segments: str | tuple[str, ...]
    dim: int = SHARD_LIKE_DIM
    ndim: int | None = None


@dataclass(frozen=True)
class AttentionScope:
    """What an attention module joins, where it is not all segments of the region.

    Attributes:
        queries: segments, in the order in which they lie side by side.
        keys: the same of the keys; None: the queries' own.
    """

    queries: tuple[str, ...]
    keys: tuple[str, ...] | None = None


@dataclass(frozen=True)
class HeadScatter:
    """Attention that cannot be told of local tokens, as a causal one with a cache.

    It runs over all tokens, with some of the heads, as under tensor parallelism. What lies before and behind it trades
    one for the other (Ulysses), over the whole sequence group.

    Attributes:
        before: paths below the attention module, of linears whose output is scattered by heads.
        behind: of linears whose input comes back.
        features, heads: attributes of the attention module whose quotient is head_dim.
    """

    before: tuple[str, ...]
    behind: tuple[str, ...]
    features: str = "inner_dim"
    heads: str = "heads"


@dataclass(frozen=True)
class SequenceRegion:
    """One stretch of a model that runs on local tokens.

    In a pattern of paths, `*` stands for one path component; a pattern that ends in `?` may match nothing.

    Attributes:
        enter: path of the module at whose entry the segments are cut; "" is the model itself.
        segments: arguments of `enter` that are cut, in the order in which attention joins them. One that is None is
            not there. One that is an int says how many of the last tokens of the argument before it are a segment of
            their own; every module that matches `within` is given the number of those that are local.
        leave: path of the module whose output is put together; a number as the last component may be negative.
        gathers: the segment that comes out there; several are the elements of a tuple, or lie side by side in a tensor.
        shard_like: argument -> what it is cut along with (the name of a segment: along `SHARD_LIKE_DIM`), at each
            module that matches `within`; a tuple: element by element of a tuple.
        within: pattern of those modules; "" is the model itself.
        cross: patterns of attention modules whose keys are a sequence that every rank holds whole.
        scopes: pattern of attention modules -> what they join.
        head_scatters: pattern of attention modules that are not told of local tokens -> where theirs are traded for
            heads; what they are given beside tokens stays whole. In regions of one segment.
        padding: argument of the modules `within`, `[batch, tokens]`, -> the segment of which it says which tokens are
            real. Attention then takes its mask from here, not the one that a processor makes of local tokens.
    """

    enter: str
    segments: tuple[str, ...]
    leave: str
    gathers: str | tuple[str, ...]
    shard_like: Mapping[str, str | ShardLike | tuple[ShardLike, ...]] = field(default_factory=dict)
    within: str = ""
    cross: tuple[str, ...] = ()
    scopes: Mapping[str, AttentionScope] = field(default_factory=dict)
    padding: Mapping[str, str] = field(default_factory=dict)
    head_scatters: Mapping[str, HeadScatter] = field(default_factory=dict)


class Attend(Protocol):
    """Attention over local tokens, `[batch, local tokens, heads, head_dim]`; see `SequenceParallelAttention.attend`."""

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
    ) -> Tensor: ...


class SequenceParallelism:
    """What `apply` did to a model; `remove` undoes it. Knows the region that is being run, and its tokens."""

    def __init__(
        self, attention: Attend, index: int, parts: int, group: Group, after_collective: Callable[[], None] = nothing
    ) -> None:
        """`after_collective`: called whenever heads have been scattered, or are together again."""
        self._attention, self._after_collective = attention, after_collective
        self._index, self._parts, self._group = index, parts, group
        self._region: SequenceRegion | None = None
        self._lengths: dict[str, int] = {}
        self._real: dict[str, Tensor] = {}
        self._cross: set[str] = set()
        self._scopes: dict[str, AttentionScope] = {}
        self._head_scattered: set[str] = set()
        self._handles: list[RemovableHandle] = []

    @property
    def running(self) -> bool:
        """Whether tokens are local now."""
        return self._region is not None

    def apply(self, model: nn.Module, regions: tuple[SequenceRegion, ...]) -> None:
        """Hook the regions of `model`. Not twice.

        Raises:
            ValueError: a region names a module or an argument that the model does not have.
        """
        if self._handles:
            raise RuntimeError("sequence parallelism is applied already")
        try:
            for region in regions:
                self._hook_region(model, region)
        except ValueError:
            self.remove()
            raise
        # an exception in the middle of a region leaves nothing behind
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._cross.clear()
        self._scopes.clear()
        self._head_scattered.clear()
        self._end()

    def is_cross(self, path: str) -> bool:
        """Whether the attention module at `path` needs no exchange."""
        return path in self._cross

    def scatters_heads(self, path: str) -> bool:
        """Whether the attention module at `path` runs over all tokens, with some of the heads."""
        return path in self._head_scattered

    def attention_of(self, path: str) -> ModuleAttention:
        """What the attention module at `path` does with its local tokens."""
        return ModuleAttention(self, self._scopes.get(path))

    def attend(self, scope: AttentionScope | None, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """`Attend.attend` for what `scope` says; None: all segments of the region that is being run."""
        scope = scope or AttentionScope(tuple(self._lengths))
        layout = self._layout(scope.queries)
        keys = scope.queries if scope.keys is None else scope.keys
        if scope.keys is not None:
            options["key_layout"] = self._layout(keys)
        options["mask"] = self._padding_mask(keys, query) if self._real.keys() & set(keys) else options.get("mask")
        query = self._without_copies(query, scope.queries)
        key, value = self._without_copies(key, keys), self._without_copies(value, keys)
        output = self._attention.attend(query, key, value, layout=layout, **options)
        return self._with_copies(output, scope.queries)

    def _hook_region(self, model: nn.Module, region: SequenceRegion) -> None:
        enter = model.get_submodule(region.enter)
        self._handles.append(hook_arguments(enter, region.segments, partial(self._enter, region)))
        if region.shard_like or region.padding or region.within:
            for path in matching_modules(model, region.within):
                names = (*region.shard_like, *region.padding)
                act = partial(self._cut_along, region)
                self._handles.append(hook_arguments(model.get_submodule(path), names, act, region.segments))
        leave = _submodule(model, region.leave)
        self._handles.append(leave.register_forward_hook(beside(lambda _m, _a, output: self._leave(region, output))))
        for pattern in region.cross:
            self._cross.update(matching_modules(model, pattern))
        for pattern, scope in region.scopes.items():
            self._scopes.update(dict.fromkeys(matching_modules(model, pattern), scope))
        for pattern, scatter in region.head_scatters.items():
            for path in matching_modules(model, pattern):
                self._hook_head_scatter(model.get_submodule(path), path, scatter)

    def _hook_head_scatter(self, module: nn.Module, path: str, scatter: HeadScatter) -> None:
        head_dim = getattr(module, scatter.features) // getattr(module, scatter.heads)
        ulysses = Ulysses(self._group, self._index, self._parts)

        def begin(_: nn.Module, __: object, output: Tensor) -> Tensor:
            if not self.running:
                return output
            own = self._without_copies(output.view(*output.shape[:2], -1, head_dim), tuple(self._lengths))
            scattered = ulysses.scatter_heads((own,), self._layout(tuple(self._lengths)).lengths)[0].flatten(2)
            self._after_collective()
            return scattered

        def end(linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if not self.running:
                return args
            heads = linear.get_parameter("weight").shape[1] // head_dim
            own = args[0].view(*args[0].shape[:2], -1, head_dim)
            tokens = ulysses.to_tokens(own, self._layout(tuple(self._lengths)).lengths, heads)
            self._after_collective()
            return (self._with_copies(tokens.flatten(2), tuple(self._lengths)), *args[1:])

        for name in scatter.before:
            linear = module.get_submodule(name)
            heads = linear.get_parameter("weight").shape[0] // head_dim
            if heads < self._parts:
                raise ValueError(f"{path}.{name}: {heads} heads cannot be scattered over {self._parts} ranks")
            self._handles.append(linear.register_forward_hook(begin))
        self._handles += [module.get_submodule(name).register_forward_pre_hook(end) for name in scatter.behind]
        self._head_scattered.add(path)

    def _enter(self, region: SequenceRegion, arguments: Arguments) -> None:
        self._region, self._lengths, self._real = region, {}, {}
        owner = ""  # of the tokens that an int counts the last of
        together: dict[str, list[str]] = {}
        for name in region.segments:
            value = arguments.get(name)
            if isinstance(value, Tensor):
                self._lengths[name] = value.shape[TOKEN_DIM]
                owner, together[name] = name, [name]
            elif isinstance(value, int):
                self._lengths[owner] -= value
                self._lengths[name] = value
                together[owner].append(name)
        for name, segments in together.items():
            arguments.change(name, partial(self._cut, ShardLike(tuple(segments), TOKEN_DIM)))

    def _cut_along(self, region: SequenceRegion, arguments: Arguments) -> None:
        if self._region is not region:
            return
        for name, like in region.shard_like.items():
            arguments.change(name, partial(self._cut_like, like))
        for name, segment in region.padding.items():
            self._note_padding(segment, arguments.get(name))
            arguments.change(name, partial(map_tensors, partial(self._cut, ShardLike(segment, TOKEN_DIM))))
        for name in region.segments:
            if name in arguments.names and isinstance(arguments.get(name), int):
                arguments.change(name, self._held)

    def _cut_like(self, like: str | ShardLike | tuple[ShardLike, ...], value: Any) -> Any:
        if isinstance(like, tuple):
            return value and tuple(self._cut_like(each, part) for each, part in zip(like, value, strict=True))
        return map_tensors(partial(self._cut, ShardLike(like) if isinstance(like, str) else like), value)

    def _cut(self, like: ShardLike, tensor: Tensor) -> Tensor:
        """This rank's tokens of a tensor that counts those of one or several segments."""
        segments = (like.segments,) if isinstance(like.segments, str) else like.segments
        lengths = {name: self._lengths[name] for name in segments if name in self._lengths}
        if tensor.shape[like.dim] == 1 or like.ndim not in (None, tensor.ndim):
            return tensor
        if tensor.shape[like.dim] != sum(lengths.values()):
            tokens = " and ".join(f"{length} tokens of {name}" for name, length in lengths.items())
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not follow the {tokens or 'no tokens'}")
        pieces = tensor.split_with_sizes(list(lengths.values()), like.dim)
        shares = [self._share(piece, like.dim) for piece in pieces]
        return shares[0] if len(shares) == 1 else torch.cat(shares, like.dim)

    def _share(self, piece: Tensor, dim: int) -> Tensor:
        """Where none of a segment's tokens are this rank's, it computes a copy of the first, which nobody sees: models
        cannot reshape what has none.
        """
        own = take_shard(piece, dim, self._parts, self._index)
        return own if own.shape[dim] or not piece.shape[dim] else piece.narrow(dim, 0, 1)

    def _own(self, length: int) -> int:
        return shard_lengths(length, self._parts)[self._index]

    def _held(self, length: int) -> int:
        return max(self._own(length), min(length, 1))

    def _without_copies(self, tensor: Tensor, segments: tuple[str, ...]) -> Tensor:
        """Only this rank's own tokens, of `[batch, local tokens, ...]`."""
        lengths = [self._lengths[name] for name in segments if name in self._lengths]
        held, own = list(map(self._held, lengths)), list(map(self._own, lengths))
        if held == own:
            return tensor
        pieces = tensor.split_with_sizes(held, TOKEN_DIM)
        return torch.cat([piece[:, :size] for piece, size in zip(pieces, own, strict=True)], TOKEN_DIM)

    def _with_copies(self, tensor: Tensor, segments: tuple[str, ...]) -> Tensor:
        lengths = [self._lengths[name] for name in segments if name in self._lengths]
        held, own = list(map(self._held, lengths)), list(map(self._own, lengths))
        if held == own:
            return tensor
        empty = tensor.new_zeros(tensor.shape[0], 1, *tensor.shape[2:])
        pieces = tensor.split_with_sizes(own, TOKEN_DIM)
        return torch.cat(
            [piece if size == more else empty for piece, size, more in zip(pieces, own, held, strict=True)], TOKEN_DIM
        )

    def _note_padding(self, segment: str, real: Tensor | None) -> None:
        self._real.pop(segment, None)
        if real is not None:
            self._real[segment] = real.bool()

    def _padding_mask(self, segments: tuple[str, ...], query: Tensor) -> Tensor:
        """Which keys of the joint sequence are real: bool `[batch, total]`."""
        batch = next(iter(self._real.values())).shape[0]
        ones = query.new_ones(batch, 1, dtype=torch.bool)
        present = [name for name in segments if name in self._lengths]
        return torch.cat([self._real.get(name, ones.expand(-1, self._lengths[name])) for name in present], 1)

    def _layout(self, segments: tuple[str, ...]) -> SequenceLayout:
        present = [self._lengths[name] for name in segments if name in self._lengths]
        return SequenceLayout(tuple(present), self._parts)

    def _leave(self, region: SequenceRegion, output: object) -> Any:
        names = (region.gathers,) if isinstance(region.gathers, str) else region.gathers
        if isinstance(output, Tensor):
            gathered: Any = self._gather(output, names)
        elif isinstance(output, tuple) and len(output) == len(names):
            gathered = tuple(self._gather(part, (name,)) for part, name in zip(output, names, strict=True))
        else:
            raise ValueError(
                f"{region.leave} gives a {type(output).__name__}, which is not one tensor of each of {names}"
            )
        self._end()
        return gathered

    def _gather(self, output: Tensor, segments: tuple[str, ...]) -> Tensor:
        lengths = [self._lengths[name] for name in segments]
        output = self._without_copies(output, segments)
        pieces = output.split_with_sizes(list(map(self._own, lengths)), TOKEN_DIM) if len(segments) > 1 else (output,)
        gathered = [
            gather_shards(piece, TOKEN_DIM, length, self._parts, self._index, self._group)
            for piece, length in zip(pieces, lengths, strict=True)
        ]
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered, TOKEN_DIM)

    def _end(self, *_: object) -> None:
        self._region, self._lengths, self._real = None, {}, {}


@dataclass(frozen=True)
class ModuleAttention:
    """What one attention module does, where its calls are sent here."""

    sequence: SequenceParallelism
    scope: AttentionScope | None

    @property
    def running(self) -> bool:
        """Whether the module's tokens are local now."""
        return self.sequence.running

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        """Over this rank's tokens, `[batch, local tokens, heads, head_dim]`; only while a region is being run."""
        return self.sequence.attend(self.scope, query, key, value, **options)


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """Like `get_submodule`, with negative numbers for the last entries of a module list."""
    parent, _, leaf = path.rpartition(".")
    if leaf.startswith("-"):
        children = list(model.get_submodule(parent).children())
        return children[int(leaf)]
    return model.get_submodule(path)
