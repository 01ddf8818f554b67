"""Where a model's tokens are cut over the sequence group, and where they are put together again.

A model family names its regions as data (`SequenceRegion`). Between `enter` and `leave` every rank holds its own
tokens only: of every segment of the joint sequence its share, so replicated text does not exist and cannot count
twice. Attention in between sees the whole sequence through Ulysses, Ring or both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crossdock.parallel.group import Group
from crossdock.parallel.sequence import SequenceLayout, gather_shards, take_shard
from crossdock.parallel.tensor import matching_modules

TOKEN_DIM = 1
"""The token dim of a segment: `[batch, tokens, ...]`."""
FOLLOW_DIM = -2
"""The token dim of what follows a segment: position ids `[..., tokens, axes]`, rotary tables `[..., tokens, dim]`."""


@dataclass(frozen=True)
class SequenceRegion:
    """One stretch of a model that runs on local tokens.

    Attributes:
        enter: path of the module at whose entry the segments are cut; "" is the model itself.
        segments: arguments of `enter` that are cut, in the order in which attention joins them.
        leave: path of the module whose output is put together; a number as the last component may be negative.
        gathers: the segment that comes out there.
        follow: argument -> segment, for what is cut along with a segment, at each module that matches `within`.
        within: pattern of those modules; "" is the model itself.
    """

    enter: str
    segments: tuple[str, ...]
    leave: str
    gathers: str
    follow: Mapping[str, str] = field(default_factory=dict)
    within: str = ""


class Attend(Protocol):
    """Attention over local tokens, `[batch, local tokens, heads, head_dim]`; see `SequenceParallelAttention.attend`."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor: ...


class SequenceParallelism:
    """What `apply` did to a model; `remove` undoes it. Holds the layout of the region that is being run."""

    def __init__(self, attention: Attend, index: int, parts: int, group: Group) -> None:
        self.attention = attention
        self.layout: SequenceLayout | None = None
        self._index = index
        self._parts = parts
        self._group = group
        self._lengths: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def apply(self, model: nn.Module, regions: tuple[SequenceRegion, ...]) -> None:
        """Hook the regions of `model`. Not twice.

        Raises:
            ValueError: a region names a module or an argument that the model does not have.
        """
        if self._handles:
            raise RuntimeError("sequence parallelism is applied already")
        for region in regions:
            self._hook_region(model, region)
        # an exception in the middle of a region leaves no layout behind
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.layout = None

    def _hook_region(self, model: nn.Module, region: SequenceRegion) -> None:
        enter = model.get_submodule(region.enter)
        self._pre_hook(enter, region.segments, lambda name, value: self._cut(region, name, value))
        if region.follow:
            for path in matching_modules(model, region.within):
                self._pre_hook(
                    model.get_submodule(path),
                    tuple(region.follow),
                    lambda name, value: self._cut_along(region.follow[name], value),
                )
        leave = _submodule(model, region.leave)
        self._handles.append(leave.register_forward_hook(lambda _m, _a, output: self._join(region, output)))

    def _pre_hook(self, module: nn.Module, names: tuple[str, ...], act: Callable[[str, Tensor], Tensor]) -> None:
        parameters = list(inspect.signature(module.forward).parameters)
        if missing := [name for name in names if name not in parameters]:
            raise ValueError(f"{type(module).__name__}.forward has no argument {missing[0]!r}")
        places = [(name, parameters.index(name)) for name in names]

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            positional, named = list(args), dict(kwargs)
            for name, place in places:
                if place < len(positional):
                    positional[place] = _apply(act, name, positional[place])
                elif name in named:
                    named[name] = _apply(act, name, named[name])
            return tuple(positional), named

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _cut(self, region: SequenceRegion, name: str, value: Tensor) -> Tensor:
        self._lengths[name] = value.shape[TOKEN_DIM]
        if name == region.segments[-1]:
            self.layout = SequenceLayout(tuple(self._lengths[s] for s in region.segments), self._parts)
        return take_shard(value, TOKEN_DIM, self._parts, self._index)

    def _cut_along(self, segment: str, value: Tensor) -> Tensor:
        if value.shape[FOLLOW_DIM] != self._lengths[segment]:
            tokens = f"{self._lengths[segment]} tokens of {segment}"
            raise ValueError(f"a tensor of shape {tuple(value.shape)} does not follow the {tokens}")
        return take_shard(value, FOLLOW_DIM, self._parts, self._index)

    def _join(self, region: SequenceRegion, output: Tensor) -> Tensor:
        self.layout = None
        total = self._lengths[region.gathers]
        return gather_shards(output, TOKEN_DIM, total, self._parts, self._index, self._group)

    def _end(self, *_: Any) -> None:
        self.layout = None


def _apply(act: Callable[[str, Tensor], Tensor], name: str, value: Any) -> Any:
    return act(name, value) if isinstance(value, Tensor) else value


def _submodule(model: nn.Module, path: str) -> nn.Module:
    """Like `get_submodule`, with negative numbers for the last entries of a module list."""
    parent, _, leaf = path.rpartition(".")
    if leaf.startswith("-"):
        children = list(model.get_submodule(parent).children())
        return children[int(leaf)]
    return model.get_submodule(path)
