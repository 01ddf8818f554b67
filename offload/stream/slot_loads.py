"""Loads of blocks into slots. A load that breaks off, wherever it broke, leaves no block in its slot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial

from torch import Tensor

from crossdock.offload.memory.arena import Slot
from crossdock.offload.memory.copy_engine import CopyEngine, Event
from crossdock.offload.stream.block import StreamedBlock, Turns
from crossdock.offload.stream.first_loads import FirstLoadCallback, to_nobody
from crossdock.offload.stream.loader import BlockLoader, poison


class SlotLoads:
    """What `loader` brings into slots. A slot's `holder` is a block from the moment its load is asked for."""

    def __init__(self, engine: CopyEngine, loader: BlockLoader, turns: Turns) -> None:
        self._engine = engine
        self._loader = loader
        self._turns = turns
        self._pending: set[Slot] = set()  # claimed for a load of which not all is enqueued
        self.staging: Slot | None = None  # where what travels encoded waits to be decoded
        self.on_use: FirstLoadCallback = to_nobody
        self.on_write: Callable[[Collection[str]], None] = lambda names: None

    def enqueue(self, slot: Slot, holder: int, block: StreamedBlock, number: int | None, chunks: int = 1) -> None:
        """Load `block` into `slot`, behind the slot's last reader and its last load; not if it is there.

        Args:
            holder: the block's index.
            number: the slot's, for the trace; None where the block has it alone.
        """
        if self._turns.is_stale(holder) and slot.holder == holder:
            self.forget(slot)
        if slot.holder == holder:
            return
        staging = None if block.codec.in_place else self.staging

        def done(ready: Event) -> None:
            slot.ready = ready
            if staging is not None:
                staging.ready = ready
            self._pending.discard(slot)

        try:
            if staging is not None:
                self.flush()  # what was held back of the load before goes through the staging first
            waits = slot.claim(holder) + ([] if staging is None else staging.claim(holder))
            self._pending.add(slot)
            memory = None if staging is None else staging.memory
            self._loader.load(block, slot.memory, waits, number, done, chunks=chunks, staging=memory)
        except BaseException:
            slot.holder = None  # half filled at best: whoever asks for the block loads it again
            raise

    def flush(self) -> None:
        """Enqueue what was held back. A load that is pending even then broke off: no block is in its slot."""
        self._loader.flush()
        if not self._pending:
            return
        ended = self._engine.submit("gather", _nothing, (self._engine.submit("copy", _nothing, ()),))
        for slot in self._pending:  # what was enqueued of such a load may still write to the slot
            slot.holder, slot.ready = None, ended
        self._pending.clear()

    def wait(self, slot: Slot) -> None:
        """Make the compute stream wait for what is loaded into `slot`."""
        try:
            self._engine.wait(slot.ready)
        except BaseException:
            slot.holder = None  # half filled: the next request loads it again
            raise

    def end(self, slots: Iterable[Slot]) -> None:
        """Wait for all loads: one that failed is of no interest any more, one under way must end first."""
        for slot in slots:
            with suppress(Exception):
                self._engine.wait(slot.ready)

    def begin_reading(self, slot: Slot, holder: int) -> None:
        """The compute stream has waited: the block's turn begins."""
        self._turns.begin(holder)
        slot.begin_reading()

    def end_reading(self, slot: Slot, holder: int) -> Event:
        """The event after which the slot may be overwritten: what the block wrote has been written back by then."""
        self.show(holder, slot.memory)
        done = self._engine.record()
        if written := self._turns.end(holder):

            def work() -> None:
                for rest, changed in written:
                    self._engine.move(rest, changed)

            done = self._engine.submit("copy", work, (done,))
            self._turns.written(holder, done)
        slot.end_reading(done)
        return done

    def show(self, holder: int, memory: Tensor) -> None:
        """A block has computed with what is in `memory` (uint8)."""
        block = self._turns.blocks[holder]
        self.on_use(block, memory[: block.layout.slot_bytes])

    def forget(self, slot: Slot) -> None:
        """What the slot holds is out of date."""
        self._engine.wait(slot.ready)
        slot.holder = None

    def poison(self, slot: Slot, holder: int) -> None:
        """NaN at the beginning of all that can lie in the slot, whose bytes are forgotten."""
        waits = slot.claim(holder)
        slot.holder = None
        slot.ready = self._engine.submit("copy", partial(poison, slot.memory), waits)


def _nothing() -> None:
    """For the event of what is before it on a lane."""
