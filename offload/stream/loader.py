"""Bringing a block's bytes from where they rest to a range of device memory, and noting when it happened."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from typing import Literal

import torch
from torch import Tensor

from crossdock.offload.codecs.codec import decode_all, staging_bytes
from crossdock.offload.memory.copy_engine import CopyEngine, Event, Lane, Mark
from crossdock.offload.memory.layout import ALIGNMENT, round_up
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.trace import EventKind, StreamCounters, TraceEvent


@dataclass(frozen=True)
class Gather:
    """All-gather of equal shards: `all_gather(out, shard)` fills `out` (uint8) with the shards of all `parts` ranks."""

    parts: int
    index: int
    all_gather: Callable[[Tensor, Tensor], None]


class EventLog:
    """The last `limit` events of a stream, and all since `keep`. Written from all lanes."""

    def __init__(self, engine: CopyEngine, limit: int) -> None:
        self.upcoming = 0  # the sequence number of the next event
        self._engine = engine
        self._limit = limit
        self.kept_since = math.inf
        self._lock = threading.Lock()
        self._events: deque[tuple[int, EventKind, str, int | None, Mark, int, bool]] = deque()
        self.latest: dict[str, tuple[EventKind, str]] = {}  # lane -> (event, block)

    def note(
        self,
        kind: EventKind,
        block: str,
        slot: int | None,
        lane: Lane | Literal["compute"],
        travel_bytes: int = 0,
        missed: bool = False,
    ) -> None:
        with self._lock:
            self._events.append((self.upcoming, kind, block, slot, self._engine.mark(lane), travel_bytes, missed))
            self.upcoming += 1
            while len(self._events) > self._limit and self._events[0][0] < self.kept_since:
                self._events.popleft()
        self.latest[lane] = kind, block

    def keep(self) -> None:
        """Keep all events from here on, however many: all of a request are judged. The limit is for those before."""
        with self._lock:
            self.kept_since = self.upcoming

    def drop(self, since: int) -> None:
        """Forget the events from number `since` on; their numbers are not given again."""
        with self._lock:
            while self._events and self._events[-1][0] >= since:
                self._events.pop()

    def read(self, last: int | None = None, since: int = 0) -> tuple[TraceEvent, ...]:
        """Of the last `last` events (of all by default) those from number `since` on, oldest first; waits until the
        device has got there. Older ones are not even looked at: what it costs goes with what is asked for.
        """
        with self._lock:
            newest_first = islice(reversed(self._events), last)
            events = list(takewhile(lambda event: event[0] >= since, newest_first))[::-1]
        return tuple(
            TraceEvent(number, kind, block, slot, self._engine.seconds(mark), travel_bytes, missed)
            for number, kind, block, slot, mark, travel_bytes, missed in events
        )


class BlockLoader:
    """Loads blocks on the lanes of `engine`; `counters` are its totals.

    `read` has, of every block, what its loads really read since `log` keeps all events, and at least the last one's;
    each place once, by address and size. It is noted beside the copy itself, or where a shard on the device is
    gathered, beside the gather.

    Where copies and collectives share a link, a copy is cut into chunks: the first is enqueued at once, each of the
    others behind a collective (`release`), so that the copy uses the link while the collectives do not.

    What travels as it computes goes straight into the slot. What a codec made goes to a staging buffer, and from there
    it is decoded into the slot, as the end of the work that brought the last of its bytes.
    """

    def __init__(self, engine: CopyEngine, gather: Gather | None, log: EventLog, yield_to_collectives: bool) -> None:
        self.engine = engine
        self.counters = StreamCounters()
        self.read: dict[str, dict[tuple[int, int], Tensor]] = {}
        self._read_at: dict[str, int] = {}  # the number of the event at which the block was loaded last
        self._gather = gather
        self._log = log
        self.yield_to_collectives = yield_to_collectives
        self._last_gather: Event | None = None
        self._held: deque[Callable[[Sequence[Event]], None]] = deque()

    def load(
        self,
        block: StreamedBlock,
        memory: Tensor,
        after: Sequence[Event],
        slot: int | None,
        done: Callable[[Event], None],
        *,
        chunks: int = 1,
        noted: bool = True,
        staging: Tensor | None = None,
    ) -> None:
        """Fill `memory` (uint8, at least the block's bytes) behind the events `after`. Collective when sharded.

        Args:
            done: gets the event of completion as soon as all of it is enqueued: at once, or from `release` or `flush`.
            chunks: how many parts the copy is cut into.
            staging: uint8, at least `staging_bytes` of the block, on the device; nobody's until `done`'s event.
        """
        parts, index = self._part(block)
        whole, size = memory[: block.layout.slot_bytes], block.codec.travel_bytes(block.layout, parts)
        travelled = whole
        if not block.codec.in_place:
            assert staging is not None
            travelled = staging[: parts * size]
        job = _Job(block, slot, self._log if noted else None, parts, travelled, whole)
        if block.home is Home.HOST:
            self._copy(job, travelled, after, done, chunks)
            return
        if block.home is Home.DEVICE_SHARD:
            assert isinstance(block.source, Tensor)
            done(self._all_gather(job, block.source[:size], after, needs=()))
            return
        mine = travelled[index * size : (index + 1) * size]
        if self._last_gather is not None:
            after = (*after, self._last_gather)
        self._copy(job, mine, after, lambda copied: done(self._all_gather(job, mine, (), (copied,))), chunks)

    def staging_bytes(self, block: StreamedBlock) -> int:
        """Device memory that a load of `block` needs beside its slot.

        Raises:
            ValueError: its home is sharded, and there is no shard group.
        """
        return staging_bytes(block.codec, block.layout, self._part(block)[0])

    def release(self) -> None:
        """A collective was just given to the compute stream: enqueue one more chunk behind it."""
        if self._held:
            self._held.popleft()((self.engine.record(),))

    def flush(self) -> None:
        """Enqueue everything that was held back."""
        while self._held:
            self._held.popleft()(())

    def store(self, block: StreamedBlock, memory: Tensor) -> None:
        """Write `memory` (the whole block) back to where the block rests: this rank's part of it."""
        if not isinstance(block.source, Tensor):
            raise RuntimeError(f"{block.name} rests in the checkpoint's files, which are not written to")
        parts, index = self._part(block)
        raw = memory[: block.layout.slot_bytes].chunk(parts)[index]
        block.source.copy_(block.codec.encode(block.layout, parts, index, raw))

    def _part(self, block: StreamedBlock) -> tuple[int, int]:
        """How many parts a block is cut into, and which of them rests here."""
        if not block.home.sharded:
            return 1, 0
        if self._gather is None:
            raise ValueError("a sharded home needs a shard group")
        return self._gather.parts, self._gather.index

    def _copy(
        self,
        job: _Job,
        target: Tensor,
        after: Sequence[Event],
        done: Callable[[Event], None],
        chunks: int,
    ) -> None:
        whole_moves = _moves(job.block, target)
        travel_bytes = sum(source.nbytes for _, source in whole_moves)
        moves = _cut(whole_moves, chunks)

        def enqueue(place: int, needs: Sequence[Event], behind: Sequence[Event]) -> None:
            def work() -> None:
                if place == 0:
                    job.note("load_begin", "copy", travel_bytes)
                    self._begin_read(job.block)
                for part, source in moves[place]:
                    self.engine.move(part, source)
                    self._note_read(job.block, source)
                if place == len(moves) - 1:
                    job.note("load_end", "copy")
                    if not job.block.home.sharded:
                        job.decode("copy")

            event = self.engine.submit("copy", work, behind, needs)
            if place == len(moves) - 1:
                done(event)
            else:  # the rest of a copy goes before that of a later one
                (self._held.appendleft if place else self._held.append)(partial(enqueue, place + 1, (event,)))

        self.counters.h2d_bytes += travel_bytes
        enqueue(0, (), after)

    def _begin_read(self, block: StreamedBlock) -> None:
        if self._read_at.get(block.name, -1) < self._log.kept_since:
            self.read[block.name] = {}
        self._read_at[block.name] = self._log.upcoming

    def _note_read(self, block: StreamedBlock, source: Tensor) -> None:
        place, known = (source.data_ptr(), source.nbytes), self.read[block.name]
        if place not in known:  # another dict: who has copied `read` keeps what there was
            self.read[block.name] = {**known, place: source}

    def _all_gather(self, job: _Job, shard: Tensor, after: Sequence[Event], needs: Sequence[Event]) -> Event:
        gather, travel_bytes = self._gather, job.travelled.nbytes - shard.nbytes
        assert gather is not None

        def work() -> None:
            job.note("gather_begin", "gather", travel_bytes)
            gather.all_gather(job.travelled, shard)
            if job.block.home is Home.DEVICE_SHARD:
                self._begin_read(job.block)
                self._note_read(job.block, shard)
            job.note("gather_end", "gather")
            job.decode("gather")

        self.counters.gathered_bytes += travel_bytes
        gathered = self.engine.submit("gather", work, after, needs)
        if self.yield_to_collectives:
            self._last_gather = gathered
        return gathered


@dataclass(frozen=True)
class _Job:
    """A load, and where it is noted. `travelled` gets the bytes of all `parts`; of them `whole`, the block, is made."""

    block: StreamedBlock
    slot: int | None
    log: EventLog | None
    parts: int
    travelled: Tensor
    whole: Tensor

    def decode(self, lane: Lane) -> None:
        if self.block.codec.in_place:
            return
        self.note("decode_begin", lane)
        decode_all(self.block.codec, self.block.layout, self.parts, self.travelled, self.whole)
        self.note("decode_end", lane)

    def note(self, kind: EventKind, lane: Lane, travel_bytes: int = 0) -> None:
        if self.log is not None:
            self.log.note(kind, self.block.name, self.slot, lane, travel_bytes)


def _cut(moves: list[tuple[Tensor, Tensor]], chunks: int) -> list[list[tuple[Tensor, Tensor]]]:
    """The copies in at most `chunks` groups of about equal size; one contiguous copy is cut itself."""
    if chunks > 1 and len(moves) == 1 and moves[0][0].dim() == 1:
        target, source = moves[0]
        size = round_up(-(-len(target) // chunks), ALIGNMENT)
        return [[pair] for pair in zip(target.split(size), source.split(size), strict=True)]  # type: ignore[no-untyped-call]
    size = max(1, -(-len(moves) // chunks))
    return [moves[start : start + size] for start in range(0, len(moves), size)] or [[]]


def _moves(block: StreamedBlock, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(target, source) of each copy that brings the bytes at rest; uint8, of one shape."""
    if isinstance(block.source, Tensor):
        return [(target, block.source[: len(target)])]
    return [(piece.target(target), piece.source) for piece in block.source]


def fill_nan(memory: Tensor) -> None:
    """NaN in every floating-point dtype; uint8 memory."""
    assert memory.dtype is torch.uint8
    memory.fill_(0xFF)


def poison(memory: Tensor) -> None:
    """NaN wherever a tensor can begin, and further on at every multiple of `ALIGNMENT`: a quarter of filling it all."""
    memory[: len(memory) // ALIGNMENT * ALIGNMENT].view(-1, ALIGNMENT)[:, : ALIGNMENT // 4].fill_(0xFF)
