"""What a block stream did, in order and in time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

EventKind = Literal[
    "wait_begin",
    "load_begin",
    "load_end",
    "gather_begin",
    "gather_end",
    "decode_begin",
    "decode_end",
    "compute_begin",
    "compute_end",
]


@dataclass(frozen=True)
class TraceEvent:
    """One event of one rank.

    Attributes:
        sequence: counts over both lanes and the compute stream of the rank, in the order of issue.
        kind: `wait_begin`: the compute stream reached the block and waits for its bytes; `compute_begin`: it has them.
        slot: where the block is streamed into; None for one that stays on the device.
        at_s: seconds on the node's monotonic clock (`time.perf_counter`), when it happened on the device.
        travel_bytes: of a `load_begin` or `gather_begin`: the bytes it moves.
        missed: of a `wait_begin`: the block was neither there nor on its way.
    """

    sequence: int
    kind: EventKind
    block: str
    slot: int | None
    at_s: float = 0.0
    travel_bytes: int = 0
    missed: bool = False


@dataclass
class StreamCounters:
    """Totals since the stream was attached: the bytes are those that travelled."""

    h2d_bytes: int = 0
    gathered_bytes: int = 0
    misses: int = 0


Stream = Literal["compute", "copy", "gather", "decode"]
Kind = Literal["wait", "compute", "copy", "gather", "decode"]
_BEGINS: dict[EventKind, Kind] = {
    "wait_begin": "wait",
    "compute_begin": "compute",
    "load_begin": "copy",
    "gather_begin": "gather",
    "decode_begin": "decode",
}
_ENDS: dict[EventKind, Kind] = {
    "compute_begin": "wait",
    "compute_end": "compute",
    "load_end": "copy",
    "gather_end": "gather",
    "decode_end": "decode",
}


@dataclass(frozen=True)
class Interval:
    """What took time on a rank: waiting for a block's bytes (exposed), computing, copying, gathering, decoding it."""

    kind: Kind
    block: str
    slot: int | None
    begin_s: float
    end_s: float
    travel_bytes: int
    sequence: int
    """of its begin"""
    missed: bool = False
    """of a wait: for a block that was not on its way"""

    @property
    def stream(self) -> Stream:
        return "compute" if self.kind == "wait" else self.kind

    @property
    def ms(self) -> float:
        return (self.end_s - self.begin_s) * 1e3


def intervals(trace: Sequence[TraceEvent]) -> Iterator[Interval]:
    """What began and ended within `trace`, in the order of the ends."""
    begun: dict[tuple[Kind, str], TraceEvent] = {}
    for event in trace:
        if (ended := _ENDS.get(event.kind)) is not None:
            begin = begun.pop((ended, event.block), None)
            if begin is not None:
                times = begin.at_s, event.at_s
                yield Interval(ended, event.block, event.slot, *times, begin.travel_bytes, begin.sequence, begin.missed)
        if (begins := _BEGINS.get(event.kind)) is not None:
            begun[begins, event.block] = event


@dataclass
class BlockTimes:
    """Totals of a block, or of all of them: how often it ran and was loaded, and what that took (ms, bytes).

    `misses`: how often it was asked for and was not even on its way.
    """

    runs: int = 0
    loads: int = 0
    compute_ms: float = 0.0
    wait_ms: float = 0.0
    copy_ms: float = 0.0
    gather_ms: float = 0.0
    decode_ms: float = 0.0
    h2d_bytes: int = 0
    gathered_bytes: int = 0
    misses: int = 0

    def add(self, interval: Interval) -> None:
        name = f"{interval.kind}_ms"
        setattr(self, name, round(getattr(self, name) + interval.ms, 6))
        self.runs += interval.kind == "compute"
        self.loads += interval.kind == "copy"
        self.misses += interval.missed
        self.h2d_bytes += interval.travel_bytes if interval.kind == "copy" else 0
        self.gathered_bytes += interval.travel_bytes if interval.kind == "gather" else 0


def block_times(trace: Sequence[TraceEvent]) -> dict[str, BlockTimes]:
    """Totals per block; a block that only waits at the end of `trace` is left out."""
    times: dict[str, BlockTimes] = {}
    for interval in intervals(trace):
        times.setdefault(interval.block, BlockTimes()).add(interval)
    return times


def step_times(trace: Sequence[TraceEvent], ends: Sequence[int]) -> list[BlockTimes]:
    """Totals per denoise step. `ends`: per step, the sequence number of the first event after it.

    What was begun in a step counts there, also when it ended in the next one: copies reach over the wrap.
    """
    steps = [BlockTimes() for _ in ends]
    for interval in intervals(trace):
        step = bisect_right(ends, interval.sequence)
        if step < len(steps):
            steps[step].add(interval)
    return steps
