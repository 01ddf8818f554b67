"""The block stream: the one mechanism behind layerwise offload and HSDP.

Every block has a home where its bytes rest. A streamed block also has a slot: device memory to which its parameters
are bound once, at attach time. Before a block computes, the stream waits for its bytes and has already enqueued the
next `prefetch` blocks; after it computes, the slot is free for its next block. Prediction may be wrong (a cache
skipped blocks, a custom entry point): a block whose slot holds another is loaded on demand and counted as a miss.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crossdock.offload.copy_engine import CopyEngine, Event
from crossdock.offload.layout import BlockLayout, TensorEntry, aligned_bytes
from crossdock.offload.schedule import SlotSchedule, slot_sizes


class Home(StrEnum):
    """Where a block's bytes rest."""

    RESIDENT = "resident"
    """the whole block on the device"""
    HOST = "host"
    """the whole block in host memory, shared by the ranks of the node; copied into a slot"""
    DEVICE_SHARD = "device_shard"
    """1/S of the block on each rank's device; gathered into a slot"""
    HOST_SHARD = "host_shard"
    """1/S of the block in host memory; copied, then gathered into a slot"""

    @property
    def streamed(self) -> bool:
        return self is not Home.RESIDENT

    @property
    def sharded(self) -> bool:
        return self in (Home.DEVICE_SHARD, Home.HOST_SHARD)

    @property
    def on_host(self) -> bool:
        return self in (Home.HOST, Home.HOST_SHARD)


@dataclass(frozen=True)
class StreamedBlock:
    """One transformer block. `source` is uint8: the whole block, or this rank's shard, where `home` says."""

    name: str
    module: nn.Module
    layout: BlockLayout
    home: Home
    source: Tensor


@dataclass(frozen=True)
class Gather:
    """All-gather of equal shards: `all_gather(out, shard)` fills `out` (uint8) with the shards of all `parts` ranks."""

    parts: int
    index: int
    all_gather: Callable[[Tensor, Tensor], None]


EventKind = Literal["load_begin", "load_end", "gather_begin", "gather_end", "compute_begin", "compute_end"]


@dataclass(frozen=True)
class TraceEvent:
    """What happened, in order: `sequence` counts over both lanes and the compute stream of this rank."""

    sequence: int
    kind: EventKind
    block: str
    slot: int


@dataclass
class StreamCounters:
    """Totals since the stream was attached."""

    h2d_bytes: int = 0
    gathered_bytes: int = 0
    misses: int = 0


class _Slot:
    def __init__(self, memory: Tensor, idle: Event) -> None:
        self.memory = memory
        self.holder: int | None = None  # the block that is in it, or on its way into it
        self.ready = idle  # its bytes have arrived
        self.free = idle  # its last reader is done


class BlockStream:
    """Streams `blocks` through slots on `device`.

    Args:
        blocks: every block, resident ones included, in the order in which they are expected to run.
        schedule: slots of the streamed blocks, in the same order.
        gather: the shard group; needed where a home is sharded.
        trace_limit: how many trace events are kept.
        poison_freed: overwrite a slot with NaN as soon as its block has computed; shows reads of freed memory.
    """

    def __init__(
        self,
        blocks: Sequence[StreamedBlock],
        schedule: SlotSchedule,
        device: torch.device,
        engine: CopyEngine,
        gather: Gather | None = None,
        trace_limit: int = 100_000,
        poison_freed: bool = False,
    ) -> None:
        self.blocks = tuple(blocks)
        self.schedule = schedule
        self.engine = engine
        self.counters = StreamCounters()
        self.trace: deque[TraceEvent] = deque(maxlen=trace_limit)
        self.poison_freed = poison_freed
        self._device = device
        self._gather = gather
        self._sequence = itertools.count()
        self._streamed = [i for i, block in enumerate(self.blocks) if block.home.streamed]
        if len(self._streamed) != len(schedule.slots):
            raise ValueError(f"{len(self._streamed)} streamed blocks, but slots for {len(schedule.slots)}")
        if gather is None and any(block.home.sharded for block in self.blocks):
            raise ValueError("a sharded home needs a shard group")
        self._slot_of = dict(zip(self._streamed, schedule.slots, strict=True))
        self._successor = dict(zip(self._streamed, self._streamed[1:] + self._streamed[:1], strict=True))
        self._recorded: list[int] = []  # the order of the first pass, until it closes
        self._order_known = False
        self._slots = self._allocate_slots()
        self._handles: list[RemovableHandle] = []
        self._unbound: list[tuple[nn.Module, str, Tensor]] = []

    # -- attach and remove ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Bind every block's parameters to their memory, once, and hook the streamed blocks. Not twice."""
        if self._handles or self._unbound:
            raise RuntimeError("this block stream is attached already")
        for index, block in enumerate(self.blocks):
            memory = self._memory_of(index)
            for entry in block.layout.entries:
                self._bind(block.module, entry, entry.view(memory))
            if block.home.streamed:
                self._handles += [
                    block.module.register_forward_pre_hook(self._hook(self._before, index), prepend=True),
                    block.module.register_forward_hook(self._hook(self._after, index), always_call=True),
                ]

    def remove(self) -> None:
        """Take the hooks off and give the modules the parameters back that they had before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, name, tensor in reversed(self._unbound):
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = tensor
            else:
                module._buffers[name] = tensor
        self._unbound.clear()
        self.engine.close()

    def rehearse(self) -> None:
        """Stream every block once without computing, so that ordering is proven before the first step."""
        for index in self._streamed:
            self._before(index)
            self._after(index)
        self._recorded.clear()  # the order of a rehearsal is the assumed one, not a fact

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the streamed blocks in the order in which they are prefetched."""
        if not self._streamed:
            return ()
        indices = [self._streamed[0]]
        while (following := self._successor[indices[-1]]) != indices[0]:
            indices.append(following)
        return tuple(self.blocks[i].name for i in indices)

    @property
    def slot_memory(self) -> tuple[Tensor, ...]:
        return tuple(slot.memory for slot in self._slots)

    def slot_of(self, name: str) -> int | None:
        """The slot of the block called `name`; None for a resident one."""
        return self._slot_of.get(next(i for i, block in enumerate(self.blocks) if block.name == name))

    # -- one block -----------------------------------------------------------------------------------------------

    def _before(self, index: int) -> None:
        self._learn(index)
        slot = self._slots[self._slot_of[index]]
        if slot.holder != index:
            self.counters.misses += 1
            self._enqueue(index)
        following, taken = index, {self._slot_of[index]}
        for _ in range(self.schedule.prefetch):
            following = self._successor[following]
            if self._slot_of[following] not in taken:  # else it would push out a block that runs before it
                taken.add(self._slot_of[following])
                self._enqueue(following)
        try:
            self.engine.wait(slot.ready)
        except BaseException:
            slot.holder = None  # half filled: the next request loads it again
            raise
        slot.free = _NEVER  # replaced in _after; nothing is enqueued to this slot in between
        self._note("compute_begin", index)

    def _after(self, index: int) -> None:
        slot = self._slots[self._slot_of[index]]
        if slot.free is not _NEVER:
            return  # the block never began: its own load failed
        self._note("compute_end", index)
        slot.free = self.engine.record()
        if self.poison_freed:
            slot.ready = self.engine.submit("copy", lambda: _fill_nan(slot.memory), (slot.free,))
            slot.holder = None

    def _enqueue(self, index: int) -> None:
        """Load block `index` into its slot, behind the slot's last reader and its last load."""
        slot = self._slots[self._slot_of[index]]
        if slot.holder == index:
            return
        if slot.free is _NEVER:
            raise RuntimeError(f"slot {self._slot_of[index]} is being read while {self.blocks[index].name} wants it")
        slot.holder = index
        slot.ready = self._load(index, slot.memory, (slot.free, *self._if_done(slot.ready)))

    def _if_done(self, ready: Event) -> tuple[Event, ...]:
        """The slot's earlier load, unless it failed: a failed load is no reason not to load again."""
        return () if getattr(ready, "error", None) is not None else (ready,)

    def _load(self, index: int, memory: Tensor, after: Sequence[Event]) -> Event:
        block = self.blocks[index]
        whole = memory[: block.layout.nbytes]
        if block.home is Home.HOST:
            return self._copy(index, whole, after)
        assert self._gather is not None
        if block.home is Home.DEVICE_SHARD:
            return self._all_gather(index, whole, block.source, after)
        size = block.layout.shard_nbytes(self._gather.parts)
        mine = whole[self._gather.index * size : (self._gather.index + 1) * size]
        return self._all_gather(index, whole, mine, (self._copy(index, mine, after),))

    def _copy(self, index: int, target: Tensor, after: Sequence[Event]) -> Event:
        source = self.blocks[index].source

        def work() -> None:
            self._note("load_begin", index)
            self.engine.move(target, source)
            self._note("load_end", index)

        self.counters.h2d_bytes += source.nbytes
        return self.engine.submit("copy", work, after)

    def _all_gather(self, index: int, whole: Tensor, shard: Tensor, after: Sequence[Event]) -> Event:
        gather = self._gather
        assert gather is not None

        def work() -> None:
            self._note("gather_begin", index)
            gather.all_gather(whole, shard)
            self._note("gather_end", index)

        self.counters.gathered_bytes += whole.nbytes - shard.nbytes
        return self.engine.submit("gather", work, after)

    # -- the order in which blocks run ---------------------------------------------------------------------------

    def _learn(self, index: int) -> None:
        """Record the first pass; from then on, prefetch in that order. Blocks it left out keep their place."""
        if self._order_known:
            return
        if index not in self._recorded:
            self._recorded.append(index)
            return
        self._order_known = True
        if len(self._recorded) == len(self._streamed):
            ring = self._recorded
            self._successor = dict(zip(ring, ring[1:] + ring[:1], strict=True))

    # -- memory --------------------------------------------------------------------------------------------------

    def _allocate_slots(self) -> list[_Slot]:
        sizes = slot_sizes([self.blocks[i].layout.nbytes for i in self._streamed], self.schedule.slots)
        idle = self.engine.record()
        return [_Slot(aligned_bytes(size, self._device), idle) for size in sizes]

    def _memory_of(self, index: int) -> Tensor:
        block = self.blocks[index]
        return self._slots[self._slot_of[index]].memory if block.home.streamed else block.source

    def _bind(self, block: nn.Module, entry: TensorEntry, view: Tensor) -> None:
        tensor = nn.Parameter(view, requires_grad=False) if entry.kind == "parameter" else view
        for name in entry.names:
            path, _, leaf = name.rpartition(".")
            module = block.get_submodule(path)
            owner = module._parameters if entry.kind == "parameter" else module._buffers
            before = owner[leaf]
            assert before is not None
            self._unbound.append((module, leaf, before))
            owner[leaf] = tensor  # type: ignore[assignment]

    def _hook(self, act: Callable[[int], None], index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            act(index)

        return hook

    def _note(self, kind: EventKind, index: int) -> None:
        self.trace.append(TraceEvent(next(self._sequence), kind, self.blocks[index].name, self._slot_of[index]))


class _Never:
    """Stands in a slot's `free` while its block computes."""


_NEVER = _Never()


def _fill_nan(memory: Tensor) -> None:
    memory.fill_(0xFF)  # NaN in every floating-point dtype
