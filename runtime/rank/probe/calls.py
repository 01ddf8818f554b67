"""What the transformers of a step are called with and what their blocks return, kept on the host."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from crossdock.offload.stream.block import StreamedBlock
from crossdock.runtime.contract.numbers import RETURNED, SHARED_OUT
from crossdock.runtime.models.transformers import transformers_in

_PLAIN = (int, float, complex, str, bytes, slice, torch.dtype, torch.device)


@dataclass(frozen=True)
class Parked:
    """A tensor on the host, and where it was."""

    value: Tensor
    device: torch.device

    def back(self) -> Tensor:
        """A copy of it, where it was."""
        return self.value.to(self.device, copy=True)


@dataclass(frozen=True)
class Pristine:
    """An object, such as a cache that calls fill, as it was when a call was first given it."""

    value: Any


@dataclass
class Call:
    """One call of a transformer.

    Attributes:
        prefix: of the transformer's names in the model.
        arguments: args and kwargs, from before tokens are cut; tensors are `Parked`, objects `Pristine`.
        outputs: (block, tensors that it returned) as they ran; the last is `RETURNED`, of the transformer itself.
    """

    prefix: str
    arguments: Any
    outputs: list[tuple[str, list[Tensor]]] = field(default_factory=list)


class CallRecorder:
    """Of each transformer, the calls in the first step in which it has any."""

    def __init__(self, model: nn.Module, blocks: Sequence[StreamedBlock], called: Sequence[nn.Module]) -> None:
        """`called`: what the pipeline calls for each transformer; others, where calls are shared out."""
        self.calls: list[Call] = []
        self._asked: list[Call] = []
        self._answers: list[Any] = []
        self._open: Call | None = None
        self._step = 0
        self._first: dict[str, int] = {}
        self._objects: dict[int, tuple[Any, Pristine]] = {}
        self._hooks = ExitStack()
        for block in blocks:
            self._hook(block.module.register_forward_hook(partial(self._returned, block.name)))
        for (prefix, transformer), stand_in in zip(transformers_in(model).items(), called, strict=True):
            if stand_in is not transformer:
                self._hook(stand_in.register_forward_pre_hook(partial(self._ask, prefix), with_kwargs=True))
                self._hook(stand_in.register_forward_hook(self._answer))
            # before what cuts the tokens, and behind what puts them together
            self._hook(
                transformer.register_forward_pre_hook(partial(self._begin, prefix), prepend=True, with_kwargs=True)
            )
            self._hook(transformer.register_forward_hook(partial(self._returned, RETURNED)))

    def _hook(self, handle: RemovableHandle) -> None:
        self._hooks.callback(handle.remove)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def shared_out(self) -> list[Call]:
        """The pipeline's own calls, with what it got. Waits for what is on its way, on all ranks alike."""
        for call, answer in zip(self._asked, self._answers, strict=True):
            output = answer if isinstance(answer, Tensor | Sequence) else list(answer)
            call.outputs = [(SHARED_OUT, [on_host(tensor) for tensor in tensors_in(output)])]
        return self._asked

    def end_step(self, *_: Any) -> None:
        self._step += 1

    def _ask(self, prefix: str, stand_in: nn.Module, args: Any, kwargs: Any) -> None:
        if self._first.setdefault(prefix, self._step) == self._step:
            self._asked.append(self._call(prefix, args, kwargs))

    def _answer(self, stand_in: nn.Module, args: Any, output: Any) -> None:
        if len(self._answers) < len(self._asked):
            self._answers.append(output)

    def _begin(self, prefix: str, transformer: nn.Module, args: Any, kwargs: Any) -> None:
        self._open = None
        if self._first.setdefault(prefix, self._step) == self._step:
            self._open = self._call(prefix, args, kwargs)
            self.calls.append(self._open)

    def _call(self, prefix: str, args: Any, kwargs: Any) -> Call:
        return Call(prefix, pytree.tree_map(self._parked, (args, kwargs)))

    def _returned(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._open is not None:
            self._open.outputs.append((name, [on_host(tensor) for tensor in tensors_in(output)]))

    def _parked(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return Parked(on_host(leaf), leaf.device)
        if leaf is None or isinstance(leaf, _PLAIN):
            return leaf
        if id(leaf) not in self._objects:  # which is kept, so that nothing else gets its id
            self._objects[id(leaf)] = leaf, Pristine(copy.deepcopy(leaf))
        return self._objects[id(leaf)][1]


def on_host(tensor: Tensor) -> Tensor:
    """A copy that nobody changes."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in what a module returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | Sequence) and not isinstance(output, str):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)
