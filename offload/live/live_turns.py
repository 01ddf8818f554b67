"""The turns of a live model's blocks: in its turn a block has the tensors in its slot, otherwise those at rest.

A turn is a call of the block, of a method of its class, or of one of its submodules; or somebody holds it. Beginning
and ending one exchanges entries of the modules' dicts, a few microseconds. Guards on submodules and methods are there
outside the turns only, so that neither the block's own call nor a compiled one meets them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from crossdock.offload.live.resting import LiveModelError
from crossdock.offload.memory.copy_engine import CopyEngine, Event
from crossdock.offload.memory.layout import local_part
from crossdock.offload.stream.block import StreamedBlock, Turns

Turn = Callable[[int], AbstractContextManager[None]]


@dataclass
class _State:
    """One block: what its modules have in its turns (`present`) and otherwise (`resting`), one per layout entry.

    `leaves`: a module's parameters or buffers, the attribute, the entry's number. `statistics`: batch norm writes them
    without counting versions, while the module is in training mode. `guards`: what is in which dict of a module outside
    the turns.
    """

    leaves: list[tuple[dict[str, Any], str, int]]
    resting: list[Tensor]
    hosts: list[Tensor]
    statistics: list[tuple[nn.Module, int]]
    guards: list[tuple[dict[Any, Any], Any, Any]] = field(default_factory=list)
    memory: Tensor | None = None
    present: list[Tensor] = field(default_factory=list)
    local: list[Tensor] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    host_versions: int | None = None
    returning: Event | None = None
    active: bool = False

    def holds(self, kept: dict[str, object], leaf: str, number: int) -> bool:
        """Whether the module has what it was given for its turn, in the memory that it was given."""
        return kept.get(leaf) is self.present[number] and self.local[number].data_ptr() == self.addresses[number]


class LiveTurns(Turns):
    """
    Args:
        turn: makes a turn of a block that something else than its own call uses.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], device: torch.device, engine: CopyEngine, turn: Turn) -> None:
        super().__init__(blocks)
        self._device, self._engine = device, engine
        self._states = [
            _State(
                list(_leaves(block)),
                block.tensors(),
                block.apart() if block.rests_plain else [],
                list(_statistics(block)),
            )
            for block in blocks
        ]
        key = RemovableHandle(OrderedDict()).id
        shared = Counter(id(module) for block in blocks if block.is_called for module in block.module.modules())
        for index, block in enumerate(blocks):
            if not block.is_called:
                continue
            own = [module for module in block.module.modules() if shared[id(module)] == 1]
            enter = _Enter(self, index, turn, frozenset(map(id, own)))
            guards = self._states[index].guards
            guards += [(module._forward_pre_hooks, key, enter) for module in own if module is not block.module]
            guards += [(vars(block.module), m.name, m) for m in _methods(self, index, turn, block.module)]

    def bind(self, index: int, memory: Tensor) -> None:
        block, state = self.blocks[index], self._states[index]
        if state.active:
            return  # it stays where it is
        state.memory, state.present = memory, block.placed(memory, apart=not block.home.streamed)
        state.local = [local_part(tensor) for tensor in state.present]
        state.addresses = [tensor.data_ptr() for tensor in state.local]
        state.versions = [tensor._version for tensor in state.local]
        if block.home.streamed:
            self._put_guards(state)
        else:
            self.begin(index)

    def begin(self, index: int) -> None:
        state = self._states[index]
        if state.active:
            return
        for kept, leaf, number in state.leaves:
            if kept.get(leaf) is not state.resting[number]:
                self._check_given(index, leaf, kept.get(leaf))
        state.active = True
        for kept, leaf, number in state.leaves:
            if kept.get(leaf) is state.resting[number]:
                kept[leaf] = state.present[number]
        for guarded, key, _ in state.guards:
            guarded.pop(key, None)

    def end(self, index: int) -> Sequence[tuple[Tensor, Tensor]]:
        state = self._states[index]
        if not state.active:
            return ()
        state.active = False
        for kept, leaf, number in state.leaves:
            if state.holds(kept, leaf, number):
                kept[leaf] = state.resting[number]
        self._put_guards(state)
        changed = {number for module, number in state.statistics if module.training}
        versions = [tensor._version for tensor in state.local]
        if versions != state.versions:
            both = enumerate(zip(state.versions, versions, strict=True))
            changed |= {number for number, (before, now) in both if before != now}
            state.versions = versions
        return [self._bytes(index, number) for number in sorted(changed)]

    def written(self, index: int, event: Event) -> None:
        self._states[index].returning = event
        if any(entry.distributed for entry in self.blocks[index].layout.entries):
            self.finish_block(index)  # nobody stands between a DTensor at rest and its reader

    def is_stale(self, index: int) -> bool:
        source, state = self.blocks[index].source, self._states[index]
        assert isinstance(source, Tensor)
        before = state.host_versions
        state.host_versions = source._version + sum([host._version for host in state.hosts])
        return before != state.host_versions

    def hosts(self, index: int) -> Sequence[Tensor | None]:
        """The block's tensors where they rest, one per entry of its layout; None: it rests encoded."""
        return self._states[index].hosts or [None] * len(self.blocks[index].layout.entries)

    def finish(self) -> None:
        for index in range(len(self.blocks)):
            self.finish_block(index)

    def finish_block(self, index: int) -> None:
        """Wait until what the block wrote has come back to where it rests."""
        event, self._states[index].returning = self._states[index].returning, None
        if event is not None:
            self._engine.synchronize(event)

    def put_back(self) -> None:
        for state in self._states:
            for kept, leaf, number in state.leaves if state.active else ():
                if state.holds(kept, leaf, number):
                    kept[leaf] = state.resting[number]
            state.active = False
            for guarded, key, _ in state.guards:
                guarded.pop(key, None)

    def without_slot(self, index: int, result: object) -> Any:
        """What a turn gives away: no tensor in it lies in the slot, which soon holds something else."""
        state = self._states[index]
        assert state.memory is not None
        storage = state.memory.untyped_storage().data_ptr()
        resting = {id(tensor): state.resting[number] for number, tensor in enumerate(state.present)}

        def outside(tensor: Tensor) -> Tensor:
            if (own := resting.get(id(tensor))) is not None:
                return own
            inside = not tensor.is_meta and local_part(tensor).untyped_storage().data_ptr() == storage
            return tensor.clone() if inside else tensor

        return tree_map_only(Tensor, outside, result)

    def owned(self) -> set[int]:
        """`id`s of all tensors of the model that are streamed, or kept on the device for it."""
        return {id(tensor) for state in self._states for tensor in (*state.resting, *state.present)}

    def _bytes(self, index: int, number: int) -> tuple[Tensor, Tensor]:
        block, memory = self.blocks[index], self._states[index].memory
        entry = block.layout.entries[number]
        if not block.rests_plain:
            raise LiveModelError(
                f"{block.name}.{entry.name} was written in its forward, but rests where only "
                "whole blocks are written: change it inside gathered(..., write_back=True)"
            )
        assert isinstance(block.source, Tensor)
        assert memory is not None
        place = slice(entry.offset, entry.offset + entry.nbytes)
        return block.source.data[place], memory[place]  # `data` counts versions of its own: this makes nothing stale

    def _put_guards(self, state: _State) -> None:
        for guarded, key, guard in state.guards:
            guarded[key] = guard

    def _check_given(self, index: int, leaf: str, given: object) -> None:
        """What the module was given meanwhile is its own: it stays where it is, and nothing brings it."""
        if isinstance(given, Tensor) and given.device.type != self._device.type:
            name = f"{self.blocks[index].name}: its {leaf!r}"
            raise LiveModelError(
                f"{name} was exchanged for a tensor on {given.device}, and the block computes on {self._device}: "
                "change it inside gathered(..., write_back=True), or call remove() first and attach again"
            )


class _Guard:
    """Part of a module that is attached; of its copies, nothing."""

    def __reduce__(self) -> NoReturn:
        raise LiveModelError(
            "a model that is being streamed cannot be pickled: "
            "save its state_dict(), or call the offloader's remove() first"
        )


@dataclass(frozen=True)
class _Enter(_Guard):
    """A forward pre-hook of a block's submodule: a call of it is a turn of the block. `own`: `id`s of the modules."""

    turns: LiveTurns
    index: int
    turn: Turn
    own: frozenset[int]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *_: object) -> None:
        if id(module) not in self.own:
            return
        turn = self.turn(self.index)
        turn.__enter__()

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def leave(module: nn.Module, args: object, output: object) -> Any:
            handle.remove()
            output = self.turns.without_slot(self.index, output)
            turn.__exit__(None, None, None)
            return output

        handle = module.register_forward_hook(leave, always_call=True)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _nothing


@dataclass(frozen=True)
class Instead(_Guard):
    """In place of a method of `module`, as an attribute of it; a copy of the module has the method itself."""

    module: nn.Module
    name: str
    act: Callable[..., Any]

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.act(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> Any:
        copied = memo.get(id(self.module))
        return self if copied is None else MethodType(getattr(type(self.module), self.name), copied)


def _methods(turns: LiveTurns, index: int, turn: Turn, module: nn.Module) -> Iterator[Instead]:
    """A turn around each method of the block's class, but `forward` and what every module has."""

    def in_turn(method: MethodType) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:
            with turn(index):
                return turns.without_slot(index, method(*args, **kwargs))

        return call

    for name in sorted({name for kind in type(module).__mro__ for name in vars(kind)} - vars(nn.Module).keys()):
        method = getattr(type(module), name, None)
        if isinstance(method, FunctionType) and not name.startswith("__") and name not in vars(module):
            yield Instead(module, name, in_turn(MethodType(method, module)))


def _leaves(block: StreamedBlock) -> Iterator[tuple[dict[str, Any], str, int]]:
    owners = block.owners()
    for number, entry in enumerate(block.layout.entries):
        for _ in entry.names:
            owner, leaf = next(owners)
            yield owner._parameters if entry.kind == "parameter" else owner._buffers, leaf, number


def _statistics(block: StreamedBlock) -> Iterator[tuple[nn.Module, int]]:
    owners = block.owners()
    for number, entry in enumerate(block.layout.entries):
        for _ in entry.names:
            owner, _ = next(owners)
            if entry.kind == "buffer" and entry.dtype.is_floating_point and len(entry.shape) == 1:
                yield owner, number


def _nothing(*_: object) -> None:
    """What a hook is on a copy of its module."""
