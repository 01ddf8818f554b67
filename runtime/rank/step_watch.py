"""What a rank looks at in every step: whether its latents are finite, and what its replica has to have alike.

All of it is put together on the device. On CUDA a step's results are read when the next one ends, so that the device
has work meanwhile; those of the last one when the request ends.
"""

from __future__ import annotations

import inspect
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.offload.stream.block import StreamedBlock
from crossdock.runtime.models.diffusers_api import Pipeline, guidance_scale
from crossdock.runtime.models.transformers import transformers_in
from crossdock.runtime.pipeline.denoise_loop import Observer, StepEnd
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.inspection import digest
from crossdock.runtime.rank.weights.digests import read_later
from crossdock.runtime.reports.records import RunRecord, StepRecord

_MASK = 2**63 - 1


@dataclass
class _Step:
    """What is noted of a step; checksums are on the device until they are read."""

    number: int = 0
    given: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    branch: dict[str, Any] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    sums: list[tuple[str, Tensor]] = field(default_factory=list)  # finite as long as all that is in them
    calls: int = 0
    finite: Tensor | None = None
    read: Callable[[], list[int]] = list


class StepWatch(Observer):
    """Of a model that is loaded: its hooks stay. Outside of `begin` and `end` it looks at nothing."""

    def __init__(self, plan: RunPlan, model: nn.Module, blocks: Sequence[StreamedBlock], device: torch.device) -> None:
        self._verify, self._spec, self._cuda = plan.config.verify, plan.layout.spec, device.type == "cuda"
        mesh = plan.layout.mesh
        self._compares = self._verify.state and mesh.world_size > mesh.dp  # with somebody
        self._regions = self._spec.regions if mesh.sequence > 1 else None
        self._step: _Step | None = None
        self._ended: list[_Step] = []  # not read yet
        self._steps: list[StepRecord] = []
        self._orders: dict[int, tuple[str, ...]] = {}
        self._last = ""  # the block that was called last in this pass
        self._stacks: set[str] = set()  # of which a block was called in it
        self._summed: dict[int, weakref.ref[Tensor]] = {}  # tensors of it, by id
        if self._verify.state or self._verify.finite:
            disabled: Any = torch.compiler.disable  # compiled callers call it, and do not trace it
            for transformer in transformers_in(model).values():
                transformer.register_forward_pre_hook(disabled(self._begin_pass))
                transformer.register_forward_hook(disabled(self._end_pass))
            for block in blocks:
                if block.is_called:
                    before = disabled(partial(self._before, block.name))
                    block.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        self._hooked = [(path, module, _hooks(module)) for path, module in model.named_modules() if _hooks(module)]

    # -- a request -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._step, self._ended, self._steps, self._orders = _Step(), [], [], {}

    def forget(self) -> None:
        self._step, self._ended = None, []

    def end(self) -> RunRecord:
        """What was seen. Waits for the device."""
        self._step = None
        while self._ended:
            self._read()
        if not self._verify.state:
            return RunRecord(tuple(self._steps), self._orders)
        unhooked = [path for path, module, before in self._hooked if not before <= _hooks(module)]
        return RunRecord(tuple(self._steps), self._orders, tuple(unhooked))

    def end_step(self, end: StepEnd) -> tuple[bool, tuple[int, int]]:
        """Whether the step that was read last is finite; checksums of what a replica, and a guidance branch, shares."""
        step = self._step
        if step is None:
            return True, (0, 0)
        step.number = end.finished
        if end.repeated:
            step.sums, step.computed = [], []
        if self._verify.finite:
            step.finite = torch.isfinite(end.latents).all()
        if self._compares:
            self._note(step.given, "timesteps", getattr(end.pipe.scheduler, "timesteps", None))
            self._note(step.given, "sigmas", getattr(end.pipe.scheduler, "sigmas", None))
            self._note(step.given, "the step's timestep", end.timestep)
            self._note(step.given, "the pipeline's guidance scale", self._guidance(end.pipe))
            self._note(step.latents, "the latents", end.latents)
        step.inputs = step.given | step.inputs
        step.read = self._on_host(step)
        self._step, self._ended = _Step(), [*self._ended, step]
        if len(self._ended) > self._cuda:
            self._read()
        if not self._steps:
            return True, (0, 0)
        read = self._steps[-1]
        state = _joined([*read.inputs.values(), *read.latents.values(), read.computed])
        return read.finite, (state, _joined([*read.branch.values()]))

    def _guidance(self, pipe: Pipeline) -> object:
        path = self._spec.guidance or ""
        return attrgetter(path)(pipe) if "." in path else guidance_scale(pipe)

    # -- what the pipeline and the blocks tell -------------------------------------------------------------------

    def given(self, name: str, value: Any) -> None:
        if self._step is not None and self._compares:
            self._note(self._step.given, name, value)

    def called(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step
        if step is None:
            return
        step.calls += 1
        for name, value in _named(transformer, args, kwargs):
            if self._compares:
                self._note(step.inputs, f"{name}, given to the transformer (call {step.calls})", value)
            if self._verify.finite:
                step.sums += [(f"{name}, given to the transformer", total) for total in self._sums(value)]

    def _begin_pass(self, *_: Any) -> None:
        self._last = ""
        self._stacks.clear()
        self._summed.clear()

    def _end_pass(self, transformer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._step is not None and self._verify.finite:
            self._step.sums += [(f"{self._last} or what follows it", total) for total in self._sums(output)]

    def _before(self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step
        if step is None:
            return
        if self._verify.finite:
            source = self._last or f"what comes before {name}"
            step.sums += [(source, total) for total in self._sums([args, kwargs])]
        self._last = name
        if self._verify.state:
            step.computed.append(name)
        stack = name.rpartition(".")[0]
        if stack in self._stacks or not self._compares:
            return
        self._stacks.add(stack)
        for argument, value in _named(block, args, kwargs):
            if self._is_whole(argument):
                self._note(step.branch, f"{argument}, given to {name} ({len(step.computed)})", value)

    def _is_whole(self, argument: str) -> bool:
        """A block's argument, as tables and masks, is all there: where sequences are cut, the hooks that do it come
        later. Activations are no such thing; they are large, and show in the latents.
        """
        if any(argument in region.segments for region in self._spec.regions):
            return False
        if self._regions is None:
            return True
        return any(argument in {**region.shard_like, **region.padding} for region in self._regions if region.within)

    def _sums(self, value: Any) -> Iterator[Tensor]:
        """float32 `[]` of every floating-point tensor in a structure; not finite where the tensor is not. What all
        blocks of a pass are given is summed once.
        """
        if isinstance(value, Tensor):
            known = self._summed.get(id(value))
            if value.is_floating_point() and (known is None or known() is not value):
                self._summed[id(value)] = weakref.ref(value)
                yield value.sum(dtype=torch.float32)
        elif isinstance(value, Mapping | list | tuple):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from self._sums(item)

    def _note(self, found: dict[str, Any], name: str, value: Any) -> None:
        """The checksum of a value: of tensors, and of plain ones; of structures, of what is in them."""
        if isinstance(value, Tensor):
            if not value.is_meta:
                found[name] = digest(value)
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                self._note(found, f"{name}[{place}]", item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._note(found, f"{name}[{key}]", item)
        elif isinstance(value, bool | int | float | str):
            found[name] = zlib.crc32(repr(value).encode())

    # -- reading -------------------------------------------------------------------------------------------------

    def _on_host(self, step: _Step) -> Callable[[], list[int]]:
        """Send the step's checksums to the host; what reads them there, in order, that of `finite` first."""
        tensors = [] if step.finite is None else [step.finite.long()]
        found = (*step.inputs.values(), *step.branch.values(), *step.latents.values())
        tensors += [value for value in found if isinstance(value, Tensor)]
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is None:
            return lambda: [int(tensor) for tensor in tensors]
        return read_later(torch.stack([tensor.to(device, non_blocking=True) for tensor in tensors]))

    def _read(self) -> None:
        step = self._ended.pop(0)
        values = iter(step.read())
        finite = step.finite is None or bool(next(values))
        inputs, branch, latents = (
            {
                sys.intern(name): (next(values) if isinstance(value, Tensor) else value) & _MASK
                for name, value in found.items()
            }
            for found in (step.inputs, step.branch, step.latents)
        )
        first, place = "", 0
        if not finite:
            faulty = (n for n, (_, total) in enumerate(step.sums) if not torch.isfinite(total))
            if (place := next(faulty, -1)) >= 0:
                first = step.sums[place][0]
        computed = _joined([zlib.crc32(name.encode()) for name in step.computed])
        self._orders.setdefault(computed, tuple(step.computed))
        self._steps.append(StepRecord(step.number, finite, first, place, inputs, branch, latents, computed))


def _hooks(module: nn.Module) -> frozenset[int]:
    return frozenset((*module._forward_pre_hooks, *module._forward_hooks))


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    names = inspect.signature(module.forward).parameters if args else ()
    yield from zip(names, args, strict=False)
    yield from kwargs.items()


def _joined(values: Sequence[int]) -> int:
    return zlib.crc32(repr(values).encode())
