"""The transformers as their library has them: nothing cut, nothing streamed, no attention but the library's own.

The weights come from the checkpoint's files: what lies outside the blocks for as long as a call takes, a block's for as
long as it runs. No more than that is on the device at a time.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from crossdock.offload.live.discovery import move_plain_tensors
from crossdock.parallel.arguments import Arguments, hook_arguments
from crossdock.parallel.regions import TOKEN_DIM
from crossdock.parallel.tensor import matching_modules
from crossdock.runtime.contract.numbers import RETURNED
from crossdock.runtime.models.transformers import build_transformers, transformers_in
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.probe.calls import Call, Parked, Pristine, on_host, tensors_in
from crossdock.runtime.rank.weights.source import WeightSource


@dataclass(frozen=True)
class Segment:
    """Tokens that are cut over the sequence group. `real`: which are no padding, bool `[batch, tokens]`; None: all."""

    tokens: int
    real: Tensor | None = None


Tell = Callable[[str, list[Tensor], tuple[Segment, ...]], None]
"""Takes a block's name, the tensors it returned, and the segments where tokens are cut."""


@dataclass(frozen=True)
class _Weight:
    """A parameter or a buffer: `table[leaf]` of its module.

    Attributes:
        value: brings it to the device.
        nothing: NaN without memory of its own, of its shape; stands there as long as it is away.
    """

    table: dict[str, Any]
    leaf: str
    value: Callable[[], Tensor]
    nothing: Tensor

    def put(self, tensor: Tensor) -> None:
        is_parameter = isinstance(self.table[self.leaf], nn.Parameter)
        self.table[self.leaf] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


class UnshardedModel:
    """Built and read anew: it shares nothing with the model that is loaded."""

    def __init__(self, plan: RunPlan, device: torch.device, exact: bool = False) -> None:
        """`exact`: with float32 in place of shorter numbers."""
        self._plan, self._device, self._exact = plan, device, exact
        self._source = WeightSource(plan.layout.stored, plan.layout.loras)
        model = build_transformers(plan.layout.spec.transformer, plan.layout.model_dir, plan.layout.transformers)
        self._transformers = transformers_in(model)
        self._weights = self._take_away(model)
        move_plain_tensors(model, device)
        self._tell: Tell = lambda name, tensors, segments: None
        self._segments: dict[str, Segment] = {}
        self._objects: dict[int, Any] = {}
        self._running = ExitStack()
        for transformer in self._transformers.values():
            for region in plan.layout.spec.regions if plan.layout.mesh.sequence > 1 else ():
                enter = transformer.get_submodule(region.enter)
                hook_arguments(enter, region.segments, partial(self._enter, region.segments))
                for path in matching_modules(transformer, region.within) if region.padding else ():
                    note = partial(self._note_padding, region.padding)
                    hook_arguments(transformer.get_submodule(path), tuple(region.padding), note)
        for block in plan.memory.blocks:
            module = model.get_submodule(block.name)
            module.register_forward_pre_hook(partial(self._before, block.name))
            module.register_forward_hook(partial(self._after, block.name))

    def call(self, call: Call, tell: Tell) -> None:
        """As the sharded one was called; `tell` hears of each block when it is done, and at last of `RETURNED`."""
        self._tell, self._segments = tell, {}
        args, kwargs = pytree.tree_map(self._own, call.arguments)
        with torch.no_grad(), self._present(call.prefix), self._running:
            output = self._transformers[call.prefix](*args, **kwargs)
        tell(RETURNED, list(tensors_in(output)), ())

    def close(self) -> None:
        self._source.close()

    def _own(self, leaf: Any) -> Any:
        """An argument for this model's own use."""
        if isinstance(leaf, Parked):
            return leaf.back().to(self._computed_in(leaf.value.dtype))
        if isinstance(leaf, Pristine):
            return self._objects.setdefault(id(leaf), copy.deepcopy(leaf.value))
        return leaf

    def _computed_in(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._exact and dtype.is_floating_point and dtype.itemsize < 4 else dtype

    def _before(self, name: str, *_: Any) -> None:
        self._running.enter_context(self._present(name))

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._running.close()
        self._tell(name, list(tensors_in(output)), tuple(self._segments.values()))

    def _enter(self, names: tuple[str, ...], arguments: Arguments) -> None:
        """Note how many tokens there are; an int says how many of the last of the argument before it."""
        self._segments, before = {}, ""
        for name in names:
            value = arguments.get(name)
            if isinstance(value, Tensor):
                self._segments[name], before = Segment(value.shape[TOKEN_DIM]), name
            elif isinstance(value, int):
                self._segments[before] = Segment(self._segments[before].tokens - value)
                self._segments[name] = Segment(value)

    def _note_padding(self, padding: Mapping[str, str], arguments: Arguments) -> None:
        for name, segment in padding.items():
            real = arguments.get(name)
            if isinstance(real, Tensor) and segment in self._segments:
                self._segments[segment] = Segment(self._segments[segment].tokens, on_host(real).bool())

    # -- weights -------------------------------------------------------------------------------------------------

    @contextmanager
    def _present(self, owner: str) -> Iterator[None]:
        try:
            for weight in self._weights[owner]:
                weight.put(weight.value())
            yield
        finally:
            for weight in self._weights[owner]:
                weight.put(weight.nothing)

    def _take_away(self, model: nn.Module) -> dict[str, list[_Weight]]:
        """All weights, by block, or by transformer outside of them."""
        blocks, names = {block.name for block in self._plan.memory.blocks}, defaultdict[int, list[str]](list)
        found = list(_tensors_of(model))
        for _, fqn, _, _, tensor in found:  # tied ones have several, and one of them in the checkpoint
            names[id(tensor)].append(fqn)
        weights = defaultdict[str, list[_Weight]](list)
        for above, fqn, table, leaf, tensor in found:
            dtype = self._computed_in(self._plan.layout.dtypes[fqn])
            stored = next((name for name in names[id(tensor)] if name in self._plan.layout.stored), None)
            value = partial(self._read, stored, dtype) if stored else partial(self._copied, tensor, dtype)
            fill = torch.nan if dtype.is_floating_point else 0
            nothing = torch.full((), fill, dtype=dtype, device=self._device).expand(tensor.shape)
            owner = next(name for name in above if name in blocks or name in self._transformers)
            weights[owner].append(_Weight(table, leaf, value, nothing))
        for weight in (weight for each in weights.values() for weight in each):
            weight.put(weight.nothing)
        return weights

    def _read(self, fqn: str, dtype: torch.dtype) -> Tensor:
        return self._source.rows(fqn).to(self._device, dtype, copy=True)

    def _copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self._device, dtype, copy=True)


def _tensors_of(model: nn.Module) -> Iterator[tuple[list[str], str, dict[str, Any], str, Tensor]]:
    """Whom it may belong to, from the inside out (paths, then prefixes of transformers); its name; where it stands."""
    for path, module in model.named_modules():
        parts = path.split(".")
        above = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for leaf, tensor in table.items():
                if tensor is not None:
                    yield [*above, f"{parts[0]}.", ""], f"{path}.{leaf}" if path else leaf, table, leaf, tensor
