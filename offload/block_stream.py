"""The block stream: the one mechanism behind layerwise offload and HSDP.

Every block has a home where its bytes rest. A streamed block also has a slot: device memory to which its parameters
are bound. Before a block computes, the stream waits for its bytes and has already enqueued the next `prefetch`
blocks; after it computes, the slot is free for its next block. A block with a slot of its own stays on the device once
it is loaded: it is resident. Prediction may be wrong (a cache skipped blocks, a custom entry point, another component
took the memory): a block whose slot holds another is loaded on demand and counted as a miss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

import torch
from torch import Tensor

from crossdock.offload.arena import Arena, Slot
from crossdock.offload.block import StreamedBlock
from crossdock.offload.copy_engine import CopyEngine, Event, nothing
from crossdock.offload.hooks import BlockHooks
from crossdock.offload.loader import BlockLoader, EventLog, Gather, fill_nan, spoil
from crossdock.offload.run_order import RunOrder
from crossdock.offload.schedule import SlotSchedule, slot_sizes
from crossdock.offload.trace import EventKind, StreamCounters, TraceEvent
from crossdock.offload.true_weights import true_weights


class BlockStream:
    """Streams `blocks` through slots on `device`.

    Args:
        blocks: every block, in the order in which they are expected to run.
        schedule: slots of the blocks that are streamed and not in `resident`, in the same order.
        gather: the shard group; needed where a home is sharded.
        resident: indices of blocks with a streamed home that get a slot of their own.
        arena: where the slots lie; by default memory of their own.
        yields_link: copies use the link to the device only between collectives; tell them by `link_used`.
        trace_limit: how many trace events are kept.
        poison_freed: overwrite a shared slot with NaN as soon as its block has computed; shows reads of freed memory.

    Attributes:
        scheduled_at: sequence number of the first event under the present schedule.
    """

    def __init__(
        self,
        blocks: Sequence[StreamedBlock],
        schedule: SlotSchedule,
        device: torch.device,
        engine: CopyEngine,
        gather: Gather | None = None,
        *,
        resident: Collection[int] = (),
        arena: Arena | None = None,
        yields_link: bool = False,
        trace_limit: int = 100_000,
        poison_freed: bool = False,
    ) -> None:
        self.blocks = tuple(blocks)
        self.engine = engine
        self.poison_freed = poison_freed
        self._device = device
        self._log = EventLog(engine, trace_limit)
        self._loader = BlockLoader(engine, gather, self._log, yields_link)
        self._collectives = 0  # of the block that is running
        self._portions = 1
        if gather is None and any(block.home.sharded for block in self.blocks):
            raise ValueError("a sharded home needs a shard group")
        self._index = {block.name: index for index, block in enumerate(self.blocks)}
        self._run_order = RunOrder([i for i, b in enumerate(self.blocks) if b.home.streamed and b.runs])
        self._held = [i for i, block in enumerate(self.blocks) if block.home.streamed and not block.runs]
        self._reading: int | None = None
        self._hooks = BlockHooks()
        self._shared: list[Slot] = []
        self._own: dict[int, Slot] = {}
        self._slots: dict[int, Slot] = {}
        self._pending: set[Slot] = set()  # claimed for a load of which not all is enqueued
        self._set_schedule(schedule, resident)
        self.arena = arena or Arena(self.slots_bytes, device)
        self._lease()
        self.arena.enter(self)

    # -- attach and remove ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Bind every block's parameters to their memory and hook the blocks. Not twice."""
        if self._hooks.attached:
            raise RuntimeError("this block stream is attached already")
        for index, block in enumerate(self.blocks):
            before, after = (self._before, self._after) if block.home.streamed else (self._begin, self._end)
            self._hooks.attach(index, block, before, after)
        self._bind()

    def remove(self) -> None:
        """Take the hooks off and give the modules the tensors back that they had before `attach`."""
        self._hooks.remove()
        self.vacate()
        self.arena.leave(self)

    def rehearse(self, arrived: Callable[[StreamedBlock, Tensor], None] | None = None) -> None:
        """Stream every block once without computing, so that ordering is proven before the first step.

        Args:
            arrived: called with each block and its memory (uint8, all its bytes, on the device) when they have come,
                for the compute stream; before, every slot was spoiled.
        """
        if arrived is not None:
            self._poison()
        for index in list(self._run_order.ring):
            self._before(index)
            if arrived is not None:
                block = self.blocks[index]
                arrived(block, self._slots[index].memory[: block.layout.nbytes])
            self._after(index)
        self._run_order.forget()

    def reschedule(self, schedule: SlotSchedule, resident: Collection[int], order: Sequence[int]) -> None:
        """Other slots and other residents, between two passes; parameters get new addresses.

        Args:
            schedule: slots of the streamed blocks in the order in which `order` names them.
            order: indices of all streamable blocks in the order in which they run.
        """
        self.vacate()
        self._run_order.set(order)
        self._set_schedule(schedule, resident)
        self.move_in()

    def vacate(self) -> None:
        self._end_loads()
        self.arena.release([*self._shared, *self._own.values()])
        self._shared, self._own, self._slots = [], {}, {}

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """What runs meanwhile leaves neither events nor an order of running behind; afterwards all slots are empty."""
        run_order, since = copy.deepcopy(self._run_order), self._log.upcoming
        try:
            yield
        finally:
            self._end_loads()
            for slot in [*self._shared, *self._own.values()]:
                slot.holder = None
            self._run_order = run_order
            self._look_ahead()
            self._log.drop(since)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Nothing is streamed meanwhile: whoever runs a block has bound it to memory of his own."""
        self.settle()
        self._hooks.suspended = True
        try:
            yield
        finally:
            self._hooks.suspended = False

    def move_in(self) -> None:
        self._lease()
        if self._hooks.attached:
            self._bind()

    # -- what it knows -------------------------------------------------------------------------------------------

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the blocks that share slots in the order in which they are prefetched."""
        return tuple(self.blocks[i].name for i in self._run_order.ring if i not in self._own)

    @property
    def recorded_order(self) -> tuple[int, ...] | None:
        """Indices of all streamable blocks as they ran in the first pass; None before it closed or if it skipped."""
        return self._run_order.recorded

    @property
    def slot_memory(self) -> tuple[Tensor, ...]:
        """The slots that blocks share."""
        return tuple(slot.memory for slot in self._shared)

    @property
    def resident_memory(self) -> dict[str, Tensor]:
        """Block -> its memory, for those that stay on the device."""
        fixed = {b.name: b.source for b in self.blocks if not b.home.streamed and isinstance(b.source, Tensor)}
        return fixed | {self.blocks[index].name: slot.memory for index, slot in self._own.items()}

    @property
    def latest(self) -> tuple[EventKind, str] | None:
        """What the compute stream was last given, and of which block; for any thread."""
        return self._log.latest

    @property
    def counters(self) -> StreamCounters:
        return self._loader.counters

    @property
    def upcoming(self) -> int:
        """Sequence number of the next event."""
        return self._log.upcoming

    def trace(self, last: int | None = None) -> tuple[TraceEvent, ...]:
        """The last events (all that are kept by default), oldest first; waits for the device."""
        return self._log.last(last)

    def slot_of(self, name: str) -> int | None:
        """The slot of the block called `name`; None for a resident one."""
        return self._shared_slot.get(self._index[name])

    # -- one block -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Begin to load the first blocks of a pass: call it when this component's turn begins."""
        if self._hooks.suspended:
            return
        for first in self._run_order.ring[:1]:
            self.settle()
            self._enqueue(first)
            self._fetch_ahead(first)

    def link_used(self) -> None:
        """A collective was just given to the compute stream: what comes next of the copies may follow it."""
        if self._loader.yields_link and not self._hooks.suspended:
            self._collectives += 1
            self._loader.release()

    def flush(self) -> None:
        """Enqueue what was held back. A load that is pending even then broke off: no block is in its slot."""
        self._loader.flush()
        if not self._pending:
            return
        ended = self.engine.submit("gather", nothing, (self.engine.submit("copy", nothing, ()),))
        for slot in self._pending:  # what was enqueued of such a load may still write to the slot
            slot.holder, slot.ready = None, ended
        self._pending.clear()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Keep a block on the device meanwhile, whatever runs."""
        index = self._index[name]
        slot = self._slots[index]
        self.flush()
        self._enqueue(index)
        self._await(slot)
        slot.begin_reading()
        try:
            yield
        finally:
            slot.end_reading(self.engine.record())

    @contextmanager
    def gathered(self, name: str, write_back: bool = False) -> Iterator[dict[str, Tensor]]:
        """The true weights of a block; see `true_weights`. Collective when sharded."""
        self.flush()
        with true_weights(
            self._index[name], self.blocks, self._loader, self._device, write_back, self._forget
        ) as found:
            yield found

    def _begin(self, index: int, call: FrameType | None = None) -> None:
        self._note("compute_begin", index)

    def _end(self, index: int, call: FrameType | None = None) -> None:
        self._note("compute_end", index)

    def _before(self, index: int, call: FrameType | None = None) -> None:
        if self._run_order.learn(index):
            self._look_ahead()
        self.settle()
        slot = self._slots[index]
        missed = slot.holder != index
        self._note("wait_begin", index, missed)
        self.counters.misses += missed
        self._enqueue(index)
        self._fetch_ahead(index)
        self._await(slot)
        slot.begin_reading(call)
        self._reading = index
        self._begin(index)

    def _after(self, index: int, call: FrameType | None = None) -> None:
        if self._reading != index:
            return  # the block never began: its own load failed
        self.settle()

    def settle(self) -> None:
        """End the reading of the block that ran last: also of one that an interrupt threw out, without its hook."""
        self.flush()
        if self._reading is None:
            return
        self._portions, self._collectives = 1 + self._collectives, 0
        index, self._reading = self._reading, None
        self._end(index)
        slot = self._slots[index]
        done = self.engine.record()
        slot.end_reading(done)
        if self.poison_freed and index not in self._own:
            slot.holder = None
            slot.ready = self.engine.submit("copy", lambda: fill_nan(slot.memory), (done,))

    def _fetch_ahead(self, index: int) -> None:
        taken = {self._slots[index]}
        for following in self._ahead[index]:
            slot = self._slots[following]
            if slot not in taken:  # else it would push out a block that runs before it
                taken.add(slot)
                self._enqueue(following, self._portions)

    def _enqueue(self, index: int, portions: int = 1) -> None:
        """Load block `index` into its slot, behind the slot's last reader and its last load."""
        slot, block = self._slots[index], self.blocks[index]
        if slot.holder == index:
            return

        def done(ready: Event) -> None:
            slot.ready = ready
            self._pending.discard(slot)

        try:
            waits = slot.claim(index)
            self._pending.add(slot)
            self._loader.load(block, slot.memory, waits, self.slot_of(block.name), done, portions=portions)
        except BaseException:
            slot.holder = None  # half filled at best: whoever asks for the block loads it again
            raise

    def _await(self, slot: Slot) -> None:
        """Make the compute stream wait for what is loaded into `slot`."""
        try:
            self.engine.wait(slot.ready)
        except BaseException:
            slot.holder = None  # half filled: the next request loads it again
            raise

    # -- memory --------------------------------------------------------------------------------------------------

    def _set_schedule(self, schedule: SlotSchedule, resident: Collection[int]) -> None:
        self._residents = frozenset(resident)
        sharing = [i for i in self._run_order.ring if i not in self._residents]
        if len(sharing) != len(schedule.slots):
            raise ValueError(f"{len(sharing)} streamed blocks, but slots for {len(schedule.slots)}")
        self.schedule = schedule
        self.scheduled_at = self._log.upcoming
        self._prefetch = max(schedule.prefetch, 1) if self._residents else schedule.prefetch
        self._shared_slot = dict(zip(sharing, schedule.slots, strict=True))
        self._look_ahead()

    def _look_ahead(self) -> None:
        self._ahead = self._run_order.ahead(self._prefetch, self._residents)

    def _sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Bytes of the shared slots; the blocks with a slot of their own, and their bytes."""
        sizes = slot_sizes([self.blocks[i].layout.nbytes for i in self._shared_slot], list(self._shared_slot.values()))
        alone = [*self._held, *(i for i in self._run_order.ring if i in self._residents)]
        return sizes, alone, [self.blocks[i].layout.nbytes for i in alone]

    @property
    def slots_bytes(self) -> int:
        """Device bytes of all slots."""
        shared, _, own = self._sizes()
        return sum(shared) + sum(own)

    def _lease(self) -> None:
        shared, alone, own = self._sizes()
        slots = self.arena.lease(self, [*shared, *own], self.engine.record())
        self._shared = slots[: len(shared)]
        self._own = dict(zip(alone, slots[len(shared) :], strict=True))
        self._slots = {i: self._shared[slot] for i, slot in self._shared_slot.items()} | self._own

    def _end_loads(self) -> None:
        self.settle()
        for slot in [*self._shared, *self._own.values()]:
            with suppress(Exception):  # a load that failed is of no interest any more; one under way must end first
                self.engine.wait(slot.ready)

    def _forget(self, index: int) -> None:
        """What the slot of block `index` holds, if it has one, is out of date."""
        if index in self._slots:
            self._await(self._slots[index])
            self._slots[index].holder = None

    def _bind(self) -> None:
        for index, block in enumerate(self.blocks):
            memory = self._slots[index].memory if block.home.streamed else block.source
            assert isinstance(memory, Tensor)
            block.bind(memory)

    def _poison(self) -> None:
        """NaN at the beginning of all that can lie in a slot, whose bytes are forgotten."""
        self.settle()
        for index, slot in {id(slot): (index, slot) for index, slot in self._slots.items()}.values():
            waits = slot.claim(index)
            slot.holder = None
            slot.ready = self.engine.submit("copy", partial(spoil, slot.memory), waits)

    def _note(self, kind: EventKind, index: int, missed: bool = False) -> None:
        name = self.blocks[index].name
        self._log.note(kind, name, self.slot_of(name), "compute", missed=missed)
