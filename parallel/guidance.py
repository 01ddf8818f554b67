"""Guidance parallelism: the branches of classifier-free guidance (arXiv 2207.12598) on different ranks.

A pipeline calls its transformer once per branch, or once for all of them in one batch. Either way it is the pipeline's
own code that runs, on every rank; what stands there for its transformer computes this rank's share and gets the rest.

- A batch is cut along its first dim.
- Of calls that follow one another, the ranks take turns. Every call returns at once, with deferred tensors; who first
  uses one waits for all calls that are open. So branches run side by side as long as the pipeline makes its calls
  before it uses what they return, and where it does not, they run one after the other: slower, and right.

Every rank makes as many passes through the model as the others, also where a pipeline makes one call only: what a pass
has to do with other ranks (HSDP gathers) then comes in the same order everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossdock.parallel.group import Group

Branches = Literal["calls", "batch"]
"""How a pipeline runs its guidance branches: as calls that follow one another, or as one batch."""


class GuidanceParallelism:
    """What the ranks of a guidance group have to compute and to share, for all transformers of a pipeline."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._open: list[_Call] = []
        self._known: dict[object, list[tuple[torch.Size, torch.dtype]]] = {}

    def over(self, model: nn.Module, branches: Branches) -> BranchedModel:
        """What a pipeline is given for `model`."""
        return BranchedModel(self, model, branches)

    def call(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """One call of several; what it returns is deferred."""
        call = _Call(model, args, kwargs)
        self._open.append(call)
        if (len(self._open) - 1) % self._group.size == self._group.index:
            call.compute()
        return _Outputs(self, call)

    def settle(self) -> None:
        """All calls that are open, to all ranks. Collective: all come here, at the same place of the same program."""
        calls, self._open = self._open, []
        turns = len(calls) + -len(calls) % self._group.size
        if any(turn % self._group.size == self._group.index for turn in range(len(calls), turns)):
            calls[-1].compute()  # there was no call for this rank
        for turn, call in enumerate(calls):
            owner = turn % self._group.size
            call.arrived = self._share(call.computed, owner, (_signature([call.args, call.kwargs]), owner), call.device)

    def batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call with all branches in it: this rank computes its part of the batch; all of it, where it cannot be
        divided, as without guidance.
        """
        parts, index = self._group.size, self._group.index
        first = next(_tensors([args, kwargs]))
        size = len(args[0] if args else next(iter(kwargs.values())))
        if size % parts:
            return model(*args, **kwargs)

        def cut(value: Any) -> Any:
            whole = (isinstance(value, Tensor) and value.ndim > 0) or isinstance(value, list)
            if not whole or len(value) != size:
                return value
            share = size // parts
            return value[index * share : (index + 1) * share]

        output = model(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
        computed, key = list(_tensors(output)), _signature([args, kwargs])
        arrived = [
            self._share(computed if owner == index else None, owner, (key, owner), first.device)
            for owner in range(parts)
        ]
        return _joined(output, [iter(part) for part in arrived])

    def _share(self, computed: list[Tensor] | None, owner: int, key: object, device: torch.device) -> list[Tensor]:
        """What the rank with index `owner` computed, on all. `key`: what its shapes follow from."""
        mine = owner == self._group.index
        assert computed is not None or not mine
        shapes = [(tensor.shape, tensor.dtype) for tensor in computed or ()]
        if key not in self._known:
            self._known[key] = self._group.broadcast_object(shapes if mine else None, owner)
        if mine and self._known[key] != shapes:
            raise RuntimeError(
                f"the transformer returned {shapes}, but {self._known[key]} for the same arguments before: the other "
                "ranks of the guidance group cannot know"
            )
        if mine:
            tensors = [tensor.contiguous() for tensor in computed or ()]
        else:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._known[key]]
        for tensor in tensors:
            self._group.broadcast(tensor, owner)
        return tensors


class BranchedModel(nn.Module):
    """Stands in a pipeline for its transformer. All attributes but `forward` are the transformer's."""

    def __init__(self, guidance: GuidanceParallelism, model: nn.Module, branches: Branches) -> None:
        super().__init__()
        self._guidance = guidance
        self._held = [model]  # in a list: not a submodule, so that it is moved by nobody else
        self._branches = branches

    @property
    def forward(self) -> Any:  # type: ignore[override, unused-ignore]
        """With the signature of the transformer's own, which pipelines of blocks look at."""
        model = self._held[0]

        @functools.wraps(model.forward, updated=())
        def forward(*args: object, **kwargs: object) -> Any:
            if kwargs.get("return_dict") is not False:
                raise ValueError("a transformer is not called with return_dict=False: its branches cannot be split")
            run = self._guidance.batch if self._branches == "batch" else self._guidance.call
            return run(model, args, kwargs)

        return forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_held"][0], name)


class Deferred:
    """A tensor that may be on its way. Slices and casts of it are deferred, too; any other use of it waits."""

    def __init__(self, make: Any) -> None:
        self._make = make

    @property
    def value(self) -> Tensor:
        made: Tensor = self._make()
        self._make = lambda: made
        return made

    def __getitem__(self, key: Any) -> Deferred:
        return Deferred(lambda: self.value[key])

    def to(self, *args: Any, **kwargs: Any) -> Deferred:
        return Deferred(lambda: self.value.to(*args, **kwargs))

    def float(self) -> Deferred:
        return Deferred(lambda: self.value.float())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_resolved(args), **_resolved(kwargs or {}))


def _operator(name: str) -> Any:
    def operate(self: Deferred, *others: object) -> Any:
        return getattr(self.value, name)(*_resolved(others))

    return operate


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "neg",
    "pow",
    "len",
    "iter",
    "matmul",
):
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))


class _Call:
    """A call that waits for the others."""

    def __init__(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.device = next(_tensors([args, kwargs])).device
        self.computed: list[Tensor] | None = None
        self.arrived: list[Tensor] | None = None

    def compute(self) -> None:
        self.computed = list(_tensors(self.model(*self.args, **self.kwargs)))


class _Outputs:
    """The tuple that a model returns, deferred: however many tensors there are in it."""

    def __init__(self, guidance: GuidanceParallelism, call: _Call) -> None:
        self._guidance, self._call = guidance, call

    def _at(self, place: int) -> Tensor:
        if self._call.arrived is None:
            self._guidance.settle()
        assert self._call.arrived is not None
        return self._call.arrived[place]

    def __getitem__(self, place: int) -> Deferred:
        return Deferred(lambda: self._at(place))

    def __iter__(self) -> Iterator[Tensor]:
        self._at(0)
        return iter(self._call.arrived or ())


def _resolved(value: object) -> Any:
    """`value` with every deferred tensor in it resolved."""
    if isinstance(value, Deferred):
        return value.value
    if isinstance(value, tuple | list):
        return type(value)(_resolved(item) for item in value)
    if isinstance(value, dict):
        return {name: _resolved(item) for name, item in value.items()}
    return value


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _signature(value: object) -> object:
    """What shapes follow from: those of tensors, and modes, counts and switches; no numbers that change every step."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, dict):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    return value if isinstance(value, str | bool | int) or value is None else type(value).__name__


def _joined(output: Any, parts: list[Iterator[Tensor]]) -> Any:
    """`output`, a structure of tensors and lists of one item per picture, with all ranks' parts in it."""
    if isinstance(output, Tensor):
        return torch.cat([next(part) for part in parts])
    if isinstance(output, list):
        return [next(part) for part in parts for _ in output]
    return tuple(_joined(item, parts) for item in output)
