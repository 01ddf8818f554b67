"""What a block stream did, in order and in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal[
    "wait_begin", "load_begin", "load_end", "gather_begin", "gather_end", "compute_begin", "compute_end"
]


@dataclass(frozen=True)
class TraceEvent:
    """One event of one rank.

    Attributes:
        sequence: counts over both lanes and the compute stream of the rank, in the order of issue.
        kind: `wait_begin`: the compute stream reached the block and waits for its bytes; `compute_begin`: it has them.
        slot: where the block is streamed into; None for one that stays on the device.
        at_s: seconds on the node's monotonic clock (`time.perf_counter`), when it happened on the device.
        nbytes: of a `load_begin` or `gather_begin`: the bytes it moves.
    """

    sequence: int
    kind: EventKind
    block: str
    slot: int | None
    at_s: float = 0.0
    nbytes: int = 0


@dataclass
class StreamCounters:
    """Totals since the stream was attached."""

    h2d_bytes: int = 0
    gathered_bytes: int = 0
    misses: int = 0
