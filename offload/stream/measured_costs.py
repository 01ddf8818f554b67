"""What blocks really cost, read off a trace: the input of the residency schedule once a step or two have run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from crossdock.offload.schedule.residency import Costs
from crossdock.offload.stream.trace import TraceEvent


def measured_costs(trace: Sequence[TraceEvent], order: Sequence[str], travel_sizes: Sequence[int]) -> Costs | None:
    """Seconds per block, in the order `order`; None while a block has not run and been followed by another.

    A block's compute time reaches from when it has its bytes to when the next block asks for its own, so that what
    runs between two blocks, the wrap to the next step included, counts as time to copy in. The least of all passes is
    taken: the first one also warms up.

    Args:
        travel_sizes: bytes that make each block present, as in `order`.
    """
    compute = _compute_s(trace)
    rate = _seconds_per_byte(trace)
    if rate is None or any(name not in compute for name in order):
        return None
    return Costs(tuple(compute[name] for name in order), tuple(size * rate for size in travel_sizes))


def slowest(costs: Sequence[Costs]) -> Costs:
    """The costs of a step that waits for its slowest rank, block by block."""
    compute = zip(*(cost.compute_s for cost in costs), strict=True)
    copy = zip(*(cost.copy_s for cost in costs), strict=True)
    return Costs(tuple(map(max, compute)), tuple(map(max, copy)))


def _compute_s(trace: Sequence[TraceEvent]) -> dict[str, float]:
    least: dict[str, float] = {}
    begun: TraceEvent | None = None
    for event in trace:
        if event.kind == "compute_begin":
            begun = event
        elif event.kind == "wait_begin" and begun is not None:
            least[begun.block] = min(least.get(begun.block, float("inf")), event.at_s - begun.at_s)
            begun = None
    return least


def _seconds_per_byte(trace: Sequence[TraceEvent]) -> float | None:
    """Of all loads: copying, and gathering where there are shards, decoding included, per byte that travels."""
    begun: dict[tuple[str, str], TraceEvent] = {}
    moved: dict[str, int] = defaultdict(int)
    spent_s = 0.0
    for event in trace:
        lane, _, edge = event.kind.partition("_")
        if lane not in ("load", "gather", "decode"):
            continue
        if edge == "begin":
            begun[lane, event.block] = event
        elif (begin := begun.pop((lane, event.block), None)) is not None:
            spent_s += event.at_s - begin.at_s
            moved[event.block] += begin.travel_bytes
    total = sum(moved.values())  # of a sharded block: its shard by copy, the rest by gather
    return spent_s / total if total else None
