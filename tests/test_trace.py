"""What a rank did when: intervals, their totals per block and step, and the trace file."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from one_rank import rank_request

from crossdock.offload.stream.trace import BlockTimes, EventKind, TraceEvent, block_times, intervals, step_times
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import RankTrace, Span
from crossdock.runtime.reports.trace_file import TRACKS, chrome_trace
from toy_blocks import STREAMED, BlockError, build

Json = dict[str, Any]


def _events(script: str, start_s: float = 1.0) -> tuple[TraceEvent, ...]:
    """`script`: per event its kind, block, slot, ms after `start_s`, bytes ("-": a miss)."""
    found = []
    for number, (kind, block, slot, ms, nbytes) in enumerate(line.split() for line in script.split(",")):
        place = None if slot == "-" else int(slot)
        at_s = start_s + float(ms) / 1e3
        missed = kind == "wait_begin" and nbytes == "-"
        moved = 0 if missed else int(nbytes)
        found.append(TraceEvent(number, cast(EventKind, kind), block, place, at_s, moved, missed))
    return tuple(found)


# b is copied while a is gathered; a's next copy (12) ends when the second step has begun (15); c is decoded, never runs
EVENTS = _events("""load_begin a 0 0 64, wait_begin a 0 1 0, load_end a 0 2 0, gather_begin a 0 2 192,
    load_begin b 1 3 32, gather_end a 0 6 0, compute_begin a 0 6 0, load_end b 1 7 0, compute_end a 0 16 0,
    compute_begin r - 16 0, compute_end r - 18 0, wait_begin b 1 18 -, load_begin a 0 18 64, compute_begin b 1 19 0,
    compute_end b 1 20 0, load_end a 0 24 0, wait_begin a 0 20 0, compute_begin a 0 25 0, compute_end a 0 30 0,
    load_begin c 1 30 8, load_end c 1 31 0, decode_begin c 1 31 0, decode_end c 1 33 0""")
RUN = "wait_begin a - 0 0, compute_begin a - 1 0, compute_end a - 3 0"
SPANS = (Span("encode", 1.0, 1.0005), Span("step 1", 1.001, 1.020), Span("step 2", 1.020, 1.031))


def test_intervals_of_interleaved_blocks() -> None:
    """Begins paired with the end of another block or lane; a wait for a resident block; the wrong bytes or slot."""
    found = [f"{i.kind} {i.block} {i.slot} {i.ms:.4g} {i.travel_bytes} {i.sequence}" for i in intervals(EVENTS)]
    expected = """copy a 0 2 64 0, gather a 0 4 192 3, wait a 0 5 0 1, copy b 1 4 32 4, compute a 0 10 0 6,
        compute r None 2 0 9, wait b 1 1 0 11, compute b 1 1 0 13, copy a 0 6 64 12, wait a 0 5 0 16,
        compute a 0 5 0 17, copy c 1 1 8 19, decode c 1 2 0 21"""
    assert found == [line.strip() for line in expected.split(",")]
    assert {(i.kind, i.stream) for i in intervals(EVENTS) if i.kind != i.stream} == {("wait", "compute")}
    chunks = _events("load_begin a 0 0 8, load_begin b 1 1 8, load_end a 0 2 0, load_end b 1 4 0")  # of two copies
    assert [(i.block, round(i.ms, 6), i.sequence) for i in intervals(chunks)] == [("a", 2.0, 0), ("b", 3.0, 1)]


def test_events_without_a_partner() -> None:
    """An end whose begin fell out of the ring buffer, or a begin whose end an exception ate, pairs with a stranger."""
    assert [(i.kind, i.block, i.sequence) for i in intervals(EVENTS[7:11])] == [("compute", "r", 9)]
    assert block_times(EVENTS[:2]) == {}
    twice = _events("compute_begin a - 0 0, compute_end a - 1 0, compute_end a - 2 0")
    assert [round(i.ms, 6) for i in intervals(twice)] == [1.0]
    failed = [*EVENTS[:2], *EVENTS[12:]]  # a's first load and wait broke off; it was loaded again
    found = [(i.kind, i.sequence, round(i.ms, 6)) for i in intervals(failed) if i.block == "a"]
    assert found == [("copy", 12, 6.0), ("wait", 16, 5.0), ("compute", 17, 5.0)]


def test_totals_per_block_and_step() -> None:
    """One run only, loads counted as runs, residents left out; a copy over the wrap in the later step, or in both."""
    blocks = block_times(EVENTS)
    steps = step_times(EVENTS, [15, 19])  # c comes after the last
    expected = {
        "a": (2, 2, 15.0, 10.0, 8.0, 4.0, 0.0, 128, 192, 0),
        "b": (1, 1, 1.0, 1.0, 4.0, 0.0, 0.0, 32, 0, 1),
        "r": (1, 0, 2.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0),
        "c": (0, 1, 0.0, 0.0, 1.0, 0.0, 2.0, 8, 0, 0),
    }
    assert {name: astuple(times) for name, times in blocks.items()} == expected
    expected_steps = [(3, 3, 13.0, 6.0, 12.0, 4.0, 0.0, 160, 192, 1), (1, 0, 5.0, 5.0, 0.0, 0.0, 0.0, 0, 0, 0)]
    assert [astuple(s) for s in steps] == expected_steps
    assert step_times([], [15]) == [BlockTimes()]


def _of(content: Json, phase: str) -> list[Json]:
    return [event for event in content["traceEvents"] if event["ph"] == phase]


def _check_tracks(content: Json) -> None:
    """Of one track, each slice ends before the next begins, or within one that is around it."""
    tracks = defaultdict(list)
    for event in _of(content, "X"):
        assert min(event["ts"], event["dur"]) >= 0, event
        tracks[event["pid"], event["tid"]].append((event["ts"], -event["dur"], event["ts"] + event["dur"]))
    for track, slices in tracks.items():
        around: list[float] = []
        for begin, _, end in sorted(slices):
            around = [other for other in around if other > begin + 1e-5]
            assert not around or end <= around[-1] + 1e-5, f"{track}: {begin} to {end} crosses the end {around[-1]}"
            around.append(end)


def test_trace_of_two_ranks() -> None:
    """A rank without name or place, an empty track, times that are not the host's, new tracks for a second round."""
    again = RankTrace(0, "node", "cpu", _events(RUN, 2.0), (Span("step 1", 2.0, 2.5),))
    one = RankTrace(1, "node", "cpu", EVENTS[9:11], ())
    traces = [one, RankTrace(0, "node", "cpu", EVENTS, SPANS), again]
    content = json.loads(json.dumps(chrome_trace(traces), allow_nan=False))
    assert content["otherData"] == {"clock": "all ranks share one clock"}
    facts: dict[str, list[Any]] = defaultdict(list)
    for e in _of(content, "M"):
        facts[e["name"]].append((e["pid"], e["tid"], *e["args"].values()))
    assert facts["process_name"] == [(0, 0, "rank 0 (node, cpu)"), (1, 0, "rank 1 (node, cpu)")]
    assert facts["process_sort_index"] == [(0, 0, 0), (1, 0, 1)]
    assert facts["thread_name"] == [*((0, tid, name) for tid, name in enumerate(TRACKS)), (1, 1, "compute")]
    slices = _of(content, "X")
    assert {(e["pid"], e["tid"]) for e in slices} == {track[:2] for track in facts["thread_name"]}
    found = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in slices if e["pid"] == 1]
    assert found == [("r", "compute", pytest.approx(16_000), pytest.approx(2_000))]
    assert sum(e["args"]["bytes"] for e in slices if e["cat"] == "copy") == 168
    assert [e["ts"] for e in slices if e["name"] == "step 1"] == pytest.approx([1_000, 1_000_000])
    _check_tracks(content)


def test_two_hosts_have_no_common_clock() -> None:
    """One host's slices hours after the other's."""
    far = RankTrace(1, "there", "cpu", _events(RUN, 9e5), ())
    content = chrome_trace([RankTrace(0, "here", "cpu", EVENTS, ()), far])
    assert "no common clock" in content["otherData"]["clock"]
    assert [min(e["ts"] for e in _of(content, "X") if e["pid"] == rank) for rank in (0, 1)] == [0, 0]


def test_neighbours_touch() -> None:
    """A length that is rounded by itself ends after the next slice begins: viewers then nest the two."""
    script = [f"compute_begin b{n} - {n * 0.0012345} 0, compute_end b{n} - {(n + 1) * 0.0012345} 0" for n in range(99)]
    slices = _of(chrome_trace([RankTrace(0, "node", "cpu", _events(",".join(script)), ())]), "X")
    assert all(round(left["ts"] + left["dur"], 3) == right["ts"] for left, right in pairwise(slices))


def test_a_stream_on_the_cpu() -> None:
    """Bytes counted but not traced; a run or a load that is missing; a failed run that leaves a slice open."""
    case = build(STREAMED, prefetch=1, seed=2)
    case.check(range(3))
    case.modules[1].fail_at = 0
    with pytest.raises(BlockError):
        case.check(range(3))
    case.modules[1].fail_at = None
    case.check(range(3))
    case.finish()
    found, counters = block_times(case.stream.trace()), case.stream.counters
    assert sum(times.h2d_bytes for times in found.values()) == counters.h2d_bytes > 0
    assert sum(times.gathered_bytes for times in found.values()) == counters.gathered_bytes > 0
    assert [found[f"blocks.{n}"].runs for n in range(3)] == [3, 3, 2]
    _check_tracks(chrome_trace([RankTrace(0, "node", "cpu", case.stream.trace(), ())]))


def test_a_request_of_one_rank(flux2_dir: Path) -> None:
    """Blocks' times that do not fit into their step, or measurements that differ from the trace of the request."""
    plan = make_plan(RunConfig.parse({"offload": {"layerwise": True}}), flux2_dir, "cpu", device_bytes=2**33)
    worker = RankWorker(0, 1, torch.device("cpu"))
    try:
        Coordinator(plan).admit([worker.setup(plan, rehearse=True)])
        for _ in range(2):  # the second keeps to one schedule
            result = worker.generate(rank_request("a fox", steps=3, height=64, width=64, guidance_scale=1.0))
    finally:
        worker.teardown()
    measured, trace, blocks = result.measurements, result.timeline, {block.name for block in plan.memory.blocks}
    assert [span.name for span in trace.spans] == ["encode", "step 1", "step 2", "step 3", "decode"]
    assert all(left.begin_s <= left.end_s <= right.begin_s for left, right in pairwise(trace.spans))
    for span, times in zip(trace.spans[1:4], measured.steps, strict=True):
        mine = [i for i in intervals(trace.events) if i.stream == "compute" and span.begin_s <= i.begin_s < span.end_s]
        assert 0 < sum(i.ms for i in mine) <= (span.end_s - span.begin_s) * 1e3
        assert times.compute_ms + times.wait_ms == pytest.approx(sum(i.ms for i in mine), abs=1e-3)
    assert measured.blocks == block_times(trace.events)
    assert {name: times.runs for name, times in measured.blocks.items()} == dict.fromkeys(blocks, 3)
    _check_tracks(chrome_trace([trace]))
