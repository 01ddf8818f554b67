"""`--trace`: what every rank did when, for chrome://tracing, ui.perfetto.dev and `crossdock timeline`.

Format: the Trace Event Format of Chromium, JSON object form. A process per rank, a thread per stream of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from crossdock.offload.stream.trace import Interval, intervals
from crossdock.runtime.reports.records import RankTrace

TRACKS = ("phases", "compute", "copy", "gather", "decode")


def chrome_trace(traces: Sequence[RankTrace]) -> dict[str, object]:
    """The content of a trace file; times in microseconds since the first event of the rank's host.

    Several traces of one rank (one per round of prompts) go on the same tracks.
    """
    starts: dict[str, float] = {}
    for trace in traces:
        times = [event.at_s for event in trace.events] + [span.begin_s for span in trace.spans]
        starts[trace.host] = min([starts.get(trace.host, float("inf")), *times])
    events: list[dict[str, object]] = []
    for rank in sorted({trace.rank for trace in traces}):
        mine = [trace for trace in traces if trace.rank == rank]
        slices = [event for trace in mine for event in _slices(trace, starts[trace.host])]
        used = {event["tid"] for event in slices}
        events += _names(mine[0], used) + slices
    note = "hosts have no common clock: each begins at 0" if len(starts) > 1 else "all ranks share one clock"
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"clock": note}}


def _names(trace: RankTrace, used: set[object]) -> list[dict[str, object]]:
    facts: list[tuple[str, int, dict[str, object]]] = [
        ("process_name", 0, {"name": f"rank {trace.rank} ({trace.host}, {trace.device})"}),
        ("process_sort_index", 0, {"sort_index": trace.rank}),
    ]
    for number, track in enumerate(TRACKS):
        if number in used:
            facts.append(("thread_name", number, {"name": track}))
            facts.append(("thread_sort_index", number, {"sort_index": number}))
    return [{"ph": "M", "name": n, "pid": trace.rank, "tid": tid, "args": args} for n, tid, args in facts]


def _slices(trace: RankTrace, start_s: float) -> Iterator[dict[str, object]]:
    for span in trace.spans:
        yield _slice(trace.rank, "phases", span.name, "phase", span.begin_s - start_s, span.end_s - start_s, {})
    for interval in intervals(trace.events):
        name = "wait" if interval.kind == "wait" else interval.block
        begin, end = interval.begin_s - start_s, interval.end_s - start_s
        yield _slice(trace.rank, interval.stream, name, interval.kind, begin, end, _facts(interval))


def _facts(interval: Interval) -> dict[str, object]:
    facts: dict[str, object] = {"block": interval.block, "slot": interval.slot}
    if interval.travel_bytes:
        facts["bytes"] = interval.travel_bytes
    if interval.travel_bytes and interval.ms > 0:
        facts["GiB/s"] = round(interval.travel_bytes / 2**30 / interval.ms * 1e3, 2)
    return facts


def _slice(
    rank: int, track: str, name: str, category: str, begin_s: float, end_s: float, args: dict[str, object]
) -> dict[str, object]:
    begin, end = round(begin_s * 1e6, 3), round(end_s * 1e6, 3)  # both, so that neighbours touch and do not overlap
    microseconds = {"ts": begin, "dur": round(max(end - begin, 0.0), 3)}
    place = {"pid": rank, "tid": TRACKS.index(track)}
    return {"ph": "X", "name": name, "cat": category, **place, **microseconds, "args": args}
