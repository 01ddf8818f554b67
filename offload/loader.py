"""Bringing a block's bytes from where they rest to a range of device memory, and noting when it happened."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crossdock.offload.block import Home, StreamedBlock
from crossdock.offload.copy_engine import CopyEngine, Event, Lane, Mark
from crossdock.offload.trace import EventKind, StreamCounters, TraceEvent


@dataclass(frozen=True)
class Gather:
    """All-gather of equal shards: `all_gather(out, shard)` fills `out` (uint8) with the shards of all `parts` ranks."""

    parts: int
    index: int
    all_gather: Callable[[Tensor, Tensor], None]


class EventLog:
    """The last `limit` events of a stream. Written from all lanes."""

    def __init__(self, engine: CopyEngine, limit: int) -> None:
        self.upcoming = 0  # the sequence number of the next event
        self._engine = engine
        self._lock = threading.Lock()
        self._events: deque[tuple[int, EventKind, str, int | None, Mark, int]] = deque(maxlen=limit)

    def note(
        self, kind: EventKind, block: str, slot: int | None, lane: Lane | Literal["compute"], nbytes: int = 0
    ) -> None:
        with self._lock:
            self._events.append((self.upcoming, kind, block, slot, self._engine.mark(lane), nbytes))
            self.upcoming += 1

    def last(self, count: int | None = None) -> tuple[TraceEvent, ...]:
        """The last `count` events (all by default), oldest first; waits until the device has got there."""
        events = list(self._events)[-count if count else None :]
        return tuple(
            TraceEvent(number, kind, block, slot, self._engine.seconds(mark), nbytes)
            for number, kind, block, slot, mark, nbytes in events
        )


class BlockLoader:
    """Loads blocks on the lanes of `engine`; `counters` are its totals."""

    def __init__(self, engine: CopyEngine, gather: Gather | None, log: EventLog) -> None:
        self.engine = engine
        self.counters = StreamCounters()
        self._gather = gather
        self._log = log

    def load(
        self, block: StreamedBlock, memory: Tensor, after: Sequence[Event], slot: int | None, noted: bool = True
    ) -> Event:
        """Fill `memory` (uint8, at least the block's bytes) behind the events `after`. Collective when sharded."""
        whole = memory[: block.layout.nbytes]
        log = self._log if noted else None
        if block.home is Home.HOST:
            return self._copy(block, whole, after, slot, log)
        assert self._gather is not None
        if block.home is Home.DEVICE_SHARD:
            assert isinstance(block.source, Tensor)
            return self._all_gather(block, whole, block.source, after, slot, log)
        size = block.layout.shard_nbytes(self._gather.parts)
        mine = whole[self._gather.index * size : (self._gather.index + 1) * size]
        return self._all_gather(block, whole, mine, (self._copy(block, mine, after, slot, log),), slot, log)

    def store(self, block: StreamedBlock, memory: Tensor) -> None:
        """Write `memory` (the whole block) back to where the block rests: this rank's part of it."""
        if not isinstance(block.source, Tensor):
            raise RuntimeError(f"{block.name} rests in the checkpoint's files, which are not written to")
        start = block.source.nbytes * self._gather.index if self._gather is not None and block.home.sharded else 0
        block.source.copy_(memory[start : start + block.source.nbytes])

    def _copy(
        self, block: StreamedBlock, target: Tensor, after: Sequence[Event], slot: int | None, log: EventLog | None
    ) -> Event:
        nbytes = block.source_bytes

        def work() -> None:
            if log is not None:
                log.note("load_begin", block.name, slot, "copy", nbytes)
            for part, source in _moves(block, target):
                self.engine.move(part, source)
            if log is not None:
                log.note("load_end", block.name, slot, "copy")

        self.counters.h2d_bytes += nbytes
        return self.engine.submit("copy", work, after)

    def _all_gather(
        self,
        block: StreamedBlock,
        whole: Tensor,
        shard: Tensor,
        after: Sequence[Event],
        slot: int | None,
        log: EventLog | None,
    ) -> Event:
        gather, nbytes = self._gather, whole.nbytes - shard.nbytes
        assert gather is not None

        def work() -> None:
            if log is not None:
                log.note("gather_begin", block.name, slot, "gather", nbytes)
            gather.all_gather(whole, shard)
            if log is not None:
                log.note("gather_end", block.name, slot, "gather")

        self.counters.gathered_bytes += nbytes
        return self.engine.submit("gather", work, after)


def _moves(block: StreamedBlock, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(target, source) of each copy that brings the bytes at rest; uint8, of one shape."""
    if isinstance(block.source, Tensor):
        return [(target, block.source)]
    return [(piece.target(target), piece.source) for piece in block.source]


def fill_nan(memory: Tensor) -> None:
    """NaN in every floating-point dtype; uint8 memory."""
    assert memory.dtype is torch.uint8
    memory.fill_(0xFF)
