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
from contextlib import contextmanager
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine, Lane
from crossdock.offload.schedule.slots import SlotSchedule
from crossdock.offload.stream.block import StreamedBlock, Turns
from crossdock.offload.stream.first_loads import FirstLoadCallback, FirstLoadObserver
from crossdock.offload.stream.hooks import BlockHooks, is_running
from crossdock.offload.stream.loader import BlockLoader, EventLog, Gather, fill_nan
from crossdock.offload.stream.run_order import RunOrder
from crossdock.offload.stream.slot_loads import SlotLoads
from crossdock.offload.stream.slot_table import SlotTable
from crossdock.offload.stream.trace import EventKind, StreamCounters, TraceEvent
from crossdock.offload.stream.true_weights import TrueWeights


class BlockStream:
    """Streams `blocks` through slots on `device`.

    Args:
        blocks: every block, in the order in which they are expected to run.
        schedule: slots of the blocks that are streamed and not in `resident`, in that order, pass after pass.
        gather: the shard group; needed where a home is sharded.
        resident: indices of blocks with a streamed home that get a slot of their own.
        passes: the blocks of each pass, by index; empty: all run in one.
        arena: where the slots lie; by default memory of their own.
        yield_to_collectives: copies use the link only between collectives; tell them by `collective_issued`.
        trace_limit: how many trace events are kept, unless `keep_trace` asks for more.
        turns: what the modules' tensors are; by default they are bound to their slots for good.
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
        passes: Sequence[Collection[int]] = (),
        arena: Arena | None = None,
        yield_to_collectives: bool = False,
        turns: Turns | None = None,
        trace_limit: int = 100_000,
        poison_freed: bool = False,
    ) -> None:
        self.blocks = tuple(blocks)
        self.engine = engine
        self.poison_freed = poison_freed
        self._device = device
        self._log = EventLog(engine, trace_limit)
        self._loader = BlockLoader(engine, gather, self._log, yield_to_collectives)
        self.counters: StreamCounters = self._loader.counters
        self._turns = turns or Turns(self.blocks)
        self._loads = SlotLoads(engine, self._loader, self._turns)
        self._collectives, self._chunks = 0, 1  # of the block that is running
        self._table = SlotTable(self.blocks, max(map(self._loader.staging_bytes, self.blocks), default=0))
        self._index = {block.name: index for index, block in enumerate(self.blocks)}
        self._run_order = RunOrder([i for i, b in enumerate(self.blocks) if b.home.streamed and b.is_called], passes)
        self._held = [i for i, block in enumerate(self.blocks) if block.home.streamed and not block.is_called]
        self._reading, self._kept = cast(int | None, None), frozenset[int]()  # by a call; by `hold`
        self._hooks, self._first_loads = BlockHooks(), FirstLoadObserver()
        self._set_schedule(schedule, resident)
        self.arena = arena or Arena(self.slots_bytes, device)
        self.move_in()
        self.arena.enter(self)

    # -- attach and remove ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Bind every block's parameters to their memory and hook the blocks. Not twice."""
        if self._hooks.attached:
            raise RuntimeError("this block stream is attached already")
        for index, block in enumerate(self.blocks):
            fixed = partial(self._note, "compute_begin"), self._fixed_computed
            self._hooks.attach(index, block, *((self._before, self._after) if block.home.streamed else fixed))
        self._bind()

    def remove(self) -> None:
        """Take the hooks off and give the modules the tensors back that they had before `attach`."""
        self._hooks.remove()
        self.vacate()
        self._turns.put_back()
        self.arena.leave(self)

    def observe_first_loads(self, callback: FirstLoadCallback) -> None:
        """`callback` gets every streamed block once: when its bytes have come for the first time, before it computes.
        Until then every slot is poisoned, so that what was there before does not pass for what was brought.
        """
        self._poison()
        self._first_loads.observe(callback, self._run_order.order)

    def observe_uses(self, used: FirstLoadCallback, written: Callable[[Collection[str]], None]) -> None:
        """`used` gets every block that has computed, before its memory is free; `written` what `gathered` writes to."""
        self._loads.on_use, self._loads.on_write = used, written

    def rehearse(self, unseen: bool = False) -> None:
        """Stream every block once without computing, so that ordering is proven; `unseen`: of those, the ones that have
        not come since `observe_first_loads`. Collective when sharded.
        """
        for index in self._run_order.rehearsal:
            if not unseen or index in self._first_loads.unseen:
                self._bring(index)
                self._after(index)

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
        self._turns.finish()
        self._table.release(self.arena)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """What runs meanwhile leaves no events, reads or order of running behind; afterwards all slots are empty."""
        self.settle()
        self.engine.drain()  # of a load that is under way, all events stay or none
        run_order, since, read = copy.deepcopy(self._run_order), self._log.upcoming, dict(self._loader.read)
        try:
            with self._first_loads.paused():
                yield
        finally:
            self._end_loads()
            for slot in self._table.every:
                slot.holder = None
            self._run_order, self._loader.read = run_order, read
            self._look_ahead()
            if self._first_loads.unseen:
                self._poison()
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
        self._loads.staging = self._table.lease(self.arena, self, self.engine.record())
        if self._hooks.attached:
            self._bind()

    # -- what it knows -------------------------------------------------------------------------------------------

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the blocks that share slots in the order in which they are prefetched."""
        return tuple(self.blocks[i].name for i in self._run_order.order if i not in self._table.own)

    @property
    def recorded_order(self) -> tuple[int, ...] | None:
        """Indices of a pass's streamable blocks, as they ran first; None before that closed, or if it skipped some."""
        return self._run_order.recorded

    @property
    def slot_memory(self) -> tuple[Tensor, ...]:
        """The slots that blocks share."""
        return tuple(slot.memory for slot in self._table.shared)

    @property
    def resident_memory(self) -> dict[str, Tensor]:
        """Block -> its memory, for those that stay on the device."""
        fixed = {b.name: b.source for b in self.blocks if not b.home.streamed and isinstance(b.source, Tensor)}
        return fixed | {self.blocks[index].name: slot.memory for index, slot in self._table.own.items()}

    def latest(self, lane: Lane | Literal["compute"] = "compute") -> tuple[EventKind, str] | None:
        """What the lane was last given, and of which block; for any thread."""
        return self._log.latest.get(lane)

    @property
    def read(self) -> dict[str, list[Tensor]]:
        """Of every block that was loaded: see `BlockLoader.read`. Waits for the loads under way."""
        self.engine.drain()
        return {block: list(places.values()) for block, places in self._loader.read.items()}

    @property
    def upcoming(self) -> int:
        """Sequence number of the next event."""
        return self._log.upcoming

    def trace(self, last: int | None = None, since: int = 0) -> tuple[TraceEvent, ...]:
        """The last events (by default all that are kept) from number `since` on, oldest first; waits for the device."""
        return self._log.read(last, since)

    def keep_trace(self) -> None:
        """Keep every event from here on; those before, up to `trace_limit`."""
        self._log.keep()

    def slot_of(self, name: str) -> int | None:
        """The slot of the block called `name`; None for a resident one."""
        return self._table.number.get(self._index[name])

    # -- one block -----------------------------------------------------------------------------------------------

    def prepare(self, pass_: int = 0) -> None:
        """Begin to load the first blocks of pass number `pass_`: call it when this component's turn begins."""
        if self._hooks.suspended:
            return
        for first in self._run_order.passes[pass_].order[:1]:
            self.settle()
            self._enqueue(first)
            self._fetch_ahead(first)

    def collective_issued(self) -> None:
        """A collective was just given to the compute stream: what comes next of the copies may follow it."""
        if self._loader.yield_to_collectives and not self._hooks.suspended:
            self._collectives += 1
            self._loader.release()

    def flush(self) -> None:
        """Enqueue what was held back."""
        self._loads.flush()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Keep a block on the device meanwhile, whatever runs."""
        index = self._index[name]
        slot = self._table.of[index]
        self.flush()
        self._enqueue(index)
        self._loads.wait(slot)
        self._loads.begin_reading(slot, index)
        kept, self._kept = self._kept, self._kept | {index}
        try:
            yield
        finally:
            self._kept = kept
            if index not in {*kept, self._reading}:
                self._loads.end_reading(slot, index)

    @contextmanager
    def gathered(self, name: str, write_back: bool = False) -> Iterator[dict[str, Tensor]]:
        """The true weights of a block, by their names in it: copies on the device. Collective when sharded.

        The names are those of the block's `state_dict()` and of its non-persistent buffers, also where a tensor is
        shared with another block or lies outside the blocks. Under tensor parallelism it is this rank's slice. Of a
        part that is no module of its own (`runs` is False), it is what the part alone holds.

        Args:
            write_back: what was changed goes to where it rests, unless the body raises; of a shared tensor it changes
                for all that share it. Processes that share a host store must all have read before one of them
                writes, and must make the same change.
        """
        if write_back:
            self.rehearse(unseen=True)  # what comes later is not what was loaded
        self.flush()
        weights = TrueWeights.of(self._index[name], self.blocks, self._loader, self._device)
        yield weights.named
        if write_back:
            for part in weights.parts & self._table.of.keys():
                self._loads.forget(self._table.of[part])
            weights.write_back()
            self._loads.on_write({self.blocks[part].name for part in weights.parts})

    def _before(self, index: int) -> None:
        if self._run_order.learn(index):
            self._look_ahead()
        self._bring(index)

    def _bring(self, index: int) -> None:
        self.settle()
        slot = self._table.of[index]
        missed = slot.holder != index
        self._note("wait_begin", index, missed)
        if missed:
            self.counters.misses += 1
        self._enqueue(index)
        self._fetch_ahead(index)
        self._loads.wait(slot)
        self._loads.begin_reading(slot, index)
        self._reading = index
        self._note("compute_begin", index)
        self._first_loads.loaded(index, self.blocks[index], slot.memory)

    def _after(self, index: int) -> None:
        if self._reading != index:
            return  # the block never began: its own load failed
        self.settle()

    def settle(self) -> None:
        """End the reading of the block that ran last: also of one that an interrupt threw out, without its hook."""
        self.flush()
        if self._reading is None:
            return
        self._chunks, self._collectives = 1 + self._collectives, 0
        index, self._reading = self._reading, None
        self._note("compute_end", index)
        if index in self._kept:
            return
        done = self._loads.end_reading(slot := self._table.of[index], index)
        if self.poison_freed and index not in self._staying:
            slot.holder = None
            slot.ready = self.engine.submit("copy", lambda: fill_nan(slot.memory), (done,))

    def _fixed_computed(self, index: int) -> None:
        self._note("compute_end", index)
        self._loads.show(index, cast(Tensor, self.blocks[index].source))

    def settle_interrupted(self) -> None:
        """`settle`, unless the block is still at it."""
        if self._reading is not None and not is_running(self.blocks[self._reading].module):
            self.settle()

    def _fetch_ahead(self, index: int) -> None:
        taken = {self._table.of[index]}
        for following in self._ahead[index]:
            slot = self._table.of[following]
            if slot not in taken:  # else it would push out a block that runs before it
                taken.add(slot)
                self._enqueue(following, self._chunks)

    def _enqueue(self, index: int, chunks: int = 1) -> None:
        """Load block `index` into its slot."""
        self._loads.enqueue(self._table.of[index], index, self.blocks[index], self._table.number.get(index), chunks)

    @contextmanager
    def turn(self, index: int) -> Iterator[None]:
        """Something else of the block than its own call runs meanwhile: out of the order of the run."""
        self._bring(index)
        try:
            yield
        finally:
            self._after(index)

    # -- memory --------------------------------------------------------------------------------------------------

    def _set_schedule(self, schedule: SlotSchedule, resident: Collection[int]) -> None:
        sharing = [i for i in self._run_order.order if i not in resident]
        if len(sharing) != len(schedule.slots):
            raise ValueError(f"{len(sharing)} streamed blocks, but slots for {len(schedule.slots)}")
        self.schedule = schedule
        self.scheduled_at = self._log.upcoming
        alone = [i for i in self._run_order.order if i in resident]
        self._table.assign(dict(zip(sharing, schedule.slots, strict=True)), [*self._held, *alone])
        self._staying = self._run_order.stay_in_pass(self._table.number).union(resident)
        self._prefetch = max(schedule.prefetch, 1) if self._staying else schedule.prefetch
        self._look_ahead()

    def _look_ahead(self) -> None:
        self._ahead = self._run_order.ahead(self._prefetch, self._staying)

    @property
    def slots_bytes(self) -> int:
        """Device bytes of all slots, and of what is decoded into them."""
        return self._table.nbytes

    def _end_loads(self) -> None:
        self.settle()
        self._loads.end(self._table.every)

    def _bind(self) -> None:
        for index, block in enumerate(self.blocks):
            memory = self._table.of[index].memory if block.home.streamed else block.source
            self._turns.bind(index, cast(Tensor, memory))

    def _poison(self) -> None:
        """No slot holds anything but NaN from here on."""
        self.settle()
        for index, slot in {id(slot): (index, slot) for index, slot in self._table.of.items()}.values():
            self._loads.poison(slot, index)

    def _note(self, kind: EventKind, index: int, missed: bool = False) -> None:
        self._log.note(kind, self.blocks[index].name, self._table.number.get(index), "compute", missed=missed)
