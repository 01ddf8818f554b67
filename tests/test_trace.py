"""What a rank did when: intervals and their totals, the trace file, and its picture."""

from __future__ import annotations

import builtins
import json
from collections import defaultdict
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock.launch import cli, timeline
from crossdock.launch.arguments import Outputs, run_app
from crossdock.offload.block import Home
from crossdock.offload.trace import BlockTimes, EventKind, TraceEvent, block_times, intervals, step_times
from crossdock.runtime.config import RunConfig
from crossdock.runtime.coordinator import Coordinator
from crossdock.runtime.errors import LaunchError, RequestError
from crossdock.runtime.plan import make_plan
from crossdock.runtime.reports import RankTrace, Span
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.trace_file import TRACKS, chrome_trace
from crossdock.runtime.worker import RankWorker
from toy_blocks import STREAMED, BlockError, build

Json = dict[str, Any]
LINES: list[tuple[EventKind, str, int | None, float, int]] = [
    ("load_begin", "a", 0, 1.000, 64),
    ("wait_begin", "a", 0, 1.001, 0),
    ("load_end", "a", 0, 1.002, 0),
    ("gather_begin", "a", 0, 1.002, 192),
    ("load_begin", "b", 1, 1.003, 32),  # while a is gathered
    ("gather_end", "a", 0, 1.006, 0),
    ("compute_begin", "a", 0, 1.006, 0),
    ("load_end", "b", 1, 1.007, 0),
    ("compute_end", "a", 0, 1.016, 0),
    ("compute_begin", "r", None, 1.016, 0),
    ("compute_end", "r", None, 1.018, 0),
    ("wait_begin", "b", 1, 1.018, 0),
    ("load_begin", "a", 0, 1.018, 64),  # 12: for the next step
    ("compute_begin", "b", 1, 1.019, 0),
    ("compute_end", "b", 1, 1.020, 0),
    ("load_end", "a", 0, 1.024, 0),  # 15: the second step has begun
    ("wait_begin", "a", 0, 1.020, 0),
    ("compute_begin", "a", 0, 1.025, 0),
    ("compute_end", "a", 0, 1.030, 0),
    ("load_begin", "c", 1, 1.030, 8),
    ("load_end", "c", 1, 1.031, 0),  # never runs
]
EVENTS = [TraceEvent(n, kind, block, slot, at_s, nbytes) for n, (kind, block, slot, at_s, nbytes) in enumerate(LINES)]
STEPS = (Span("encode", 1.0, 1.0005), Span("step 1", 1.001, 1.020), Span("step 2", 1.020, 1.031))


def _near(times: BlockTimes) -> Any:
    return pytest.approx(astuple(times), abs=1e-5)


def test_intervals_of_interleaved_blocks() -> None:
    """Begins paired with the end of another block or lane; a wait for a resident block; the wrong bytes or slot."""
    found = [(i.stream, i.kind, i.block, i.slot, round(i.ms, 6), i.nbytes, i.sequence) for i in intervals(EVENTS)]
    assert found == [
        ("copy", "copy", "a", 0, 2.0, 64, 0),
        ("gather", "gather", "a", 0, 4.0, 192, 3),
        ("compute", "wait", "a", 0, 5.0, 0, 1),
        ("copy", "copy", "b", 1, 4.0, 32, 4),
        ("compute", "compute", "a", 0, 10.0, 0, 6),
        ("compute", "compute", "r", None, 2.0, 0, 9),
        ("compute", "wait", "b", 1, 1.0, 0, 11),
        ("compute", "compute", "b", 1, 1.0, 0, 13),
        ("copy", "copy", "a", 0, 6.0, 64, 12),
        ("compute", "wait", "a", 0, 5.0, 0, 16),
        ("compute", "compute", "a", 0, 5.0, 0, 17),
        ("copy", "copy", "c", 1, 1.0, 8, 19),
    ]


def test_events_without_a_partner() -> None:
    """An end whose begin fell out of the ring buffer, or a begin whose end an exception ate, pairs with a stranger."""
    assert [(i.kind, i.block, i.sequence) for i in intervals(EVENTS[7:11])] == [("compute", "r", 9)]
    assert not list(intervals(EVENTS[:2]))
    failed = [EVENTS[0], EVENTS[1], *EVENTS[12:]]  # a's first load and wait broke off; it was loaded again
    found = [(i.kind, i.sequence, round(i.ms, 6)) for i in intervals(failed) if i.block == "a"]
    assert found == [("copy", 12, 6.0), ("wait", 16, 5.0), ("compute", 17, 5.0)]
    assert block_times([EVENTS[1]]) == {}


def test_block_times() -> None:
    """Totals of one run only, loads counted as runs, gathered bytes among the copied ones, residents left out."""
    found = block_times(EVENTS)
    assert list(found) == ["a", "b", "r", "c"]
    assert astuple(found["a"]) == _near(BlockTimes(2, 2, 15.0, 10.0, 8.0, 4.0, 128, 192))
    assert astuple(found["b"]) == _near(BlockTimes(1, 1, 1.0, 1.0, 4.0, 0.0, 32, 0))
    assert astuple(found["r"]) == _near(BlockTimes(1, 0, 2.0))
    assert astuple(found["c"]) == _near(BlockTimes(0, 1, copy_ms=1.0, h2d_bytes=8))


def test_step_times() -> None:
    """A copy that reaches over the wrap counted in the later step or in both; what follows the last step counted."""
    first, second = step_times(EVENTS, [15, 19])
    assert astuple(first) == _near(BlockTimes(3, 3, 13.0, 6.0, 12.0, 4.0, 160, 192))
    assert astuple(second) == _near(BlockTimes(1, 0, 5.0, 5.0))
    assert step_times(EVENTS, []) == []
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
            around = [other for other in around if other > begin + 1e-6]
            assert not around or end <= around[-1] + 1e-6, f"{track}: {begin} to {end} crosses the end {around[-1]}"
            around.append(end)


def test_chrome_trace_of_two_ranks() -> None:
    """A rank without name or place, an empty track, times that are not the host's, a second round on tracks anew."""
    later = tuple(TraceEvent(40 + n, kind, "a", None, at) for n, (kind, at) in enumerate(_RUN))
    traces = [
        RankTrace(1, "node", "cpu", tuple(EVENTS[9:11]), ()),
        RankTrace(0, "node", "cpu", tuple(EVENTS), STEPS),
        RankTrace(0, "node", "cpu", later, (Span("step 1", 2.0, 2.5),)),
    ]
    content = json.loads(json.dumps(chrome_trace(traces), allow_nan=False))
    assert content["otherData"] == {"clock": "all ranks share one clock"}
    metadata = [(e["pid"], e["tid"], e["name"], *e["args"].values()) for e in _of(content, "M")]
    assert [fact for fact in metadata if fact[2].startswith("process")] == [
        (0, 0, "process_name", "rank 0 (node, cpu)"),
        (0, 0, "process_sort_index", 0),
        (1, 0, "process_name", "rank 1 (node, cpu)"),
        (1, 0, "process_sort_index", 1),
    ]
    named = [(pid, tid, name) for pid, tid, kind, name in metadata if kind == "thread_name"]
    assert named == [*((0, tid, name) for tid, name in enumerate(TRACKS)), (1, 1, "compute")]
    slices = _of(content, "X")
    assert {(e["pid"], e["tid"]) for e in slices} == {(pid, tid) for pid, tid, _ in named}
    found = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in slices if e["pid"] == 1]
    assert found == [("r", "compute", pytest.approx(16_000), pytest.approx(2_000))]
    copies = [(e["ts"], e["dur"], e["args"]["block"], e["args"]["bytes"]) for e in slices if e["cat"] == "copy"]
    assert (pytest.approx(18_000), pytest.approx(6_000), "a", 64) in copies
    assert [e["ts"] for e in slices if e["name"] == "step 1"] == pytest.approx([1_000, 1_000_000])
    _check_tracks(content)


_RUN: list[tuple[EventKind, float]] = [("wait_begin", 2.1), ("compute_begin", 2.2000000004), ("compute_end", 2.3)]


def test_two_hosts_have_no_common_clock() -> None:
    """One host's slices hours after, or before, the other's."""
    far = tuple(TraceEvent(n, kind, "a", None, 9e5 + at) for n, (kind, at) in enumerate(_RUN))
    content = chrome_trace([RankTrace(0, "here", "cpu", tuple(EVENTS), ()), RankTrace(1, "there", "cpu", far, ())])
    assert "no common clock" in content["otherData"]["clock"]
    begins = {rank: min(e["ts"] for e in _of(content, "X") if e["pid"] == rank) for rank in (0, 1)}
    assert begins == {0: 0.0, 1: 0.0}


def test_neighbours_do_not_overlap() -> None:
    """A length rounded by itself ends after the next slice's begin: Perfetto then nests the two."""
    times = [1 + n * 1.2345e-6 for n in range(200)]
    kinds: list[EventKind] = ["compute_begin", "compute_end"]
    both = [
        (n, kind, at)
        for n, span in enumerate(zip(times, times[1:], strict=False))
        for kind, at in zip(kinds, span, strict=True)
    ]
    events = tuple(TraceEvent(n, kind, f"b{n}", None, at) for n, kind, at in both)
    slices = _of(chrome_trace([RankTrace(0, "node", "cpu", events, ())]), "X")
    ends = [round((e["ts"] + e["dur"]) * 1e3) for e in slices]
    assert ends[:-1] == [round(e["ts"] * 1e3) for e in slices[1:]]


def test_a_stream_on_the_cpu() -> None:
    """Bytes counted but not traced; a run or a load that is missing; a failed block that leaves its wait open."""
    case = build([*STREAMED, Home.HOST, Home.RESIDENT], prefetch=1, seed=3)
    for _ in range(3):
        case.check(range(5))
    case.modules[1].fail_at = 0
    with pytest.raises(BlockError):
        case.check(range(5))
    case.modules[1].fail_at = None
    case.check(range(5))
    case.finish()
    found, counters = block_times(case.stream.trace()), case.stream.counters
    assert sum(times.h2d_bytes for times in found.values()) == counters.h2d_bytes > 0
    assert sum(times.gathered_bytes for times in found.values()) == counters.gathered_bytes > 0
    assert [found[f"blocks.{n}"].runs for n in range(5)] == [5, 5, 4, 4, 4]
    _check_tracks(chrome_trace([RankTrace(0, "node", "cpu", case.stream.trace(), ())]))


def test_a_request_of_one_rank(flux2_dir: Path) -> None:
    """Blocks' times that do not fit into their step, or measurements that differ from the trace of the request."""
    plan = make_plan(RunConfig.parse({"offload": {"layerwise": True}}), flux2_dir, "cpu", device_bytes=2**33)
    worker = RankWorker(0, 1, torch.device("cpu"))
    try:
        Coordinator(plan).admit([worker.setup(plan)])
        for _ in range(2):  # the second keeps to one schedule
            result = worker.generate(GenerateRequest(("a fox",), height=64, width=64, steps=3))
    finally:
        worker.teardown()
    measured, trace = result.measurements, result.timeline
    spans = [span for span in trace.spans if span.name.startswith("step ")]
    assert [span.name for span in trace.spans] == ["encode", "step 1", "step 2", "step 3", "decode"]
    assert all(span.begin_s <= span.end_s for span in trace.spans)
    blocks = {block.name for block in plan.blocks}
    for span, times in zip(spans, measured.steps, strict=True):
        mine = [i for i in intervals(trace.events) if i.stream == "compute" and span.begin_s <= i.begin_s < span.end_s]
        busy_ms = sum(i.ms for i in mine)
        assert 0 < busy_ms <= (span.end_s - span.begin_s) * 1e3
        assert busy_ms == pytest.approx(times.compute_ms + times.wait_ms, abs=1e-3)
        assert times.runs == len(blocks)
    assert measured.blocks == block_times(trace.events)
    assert set(measured.blocks) == blocks
    assert {times.runs for times in measured.blocks.values()} == {3}
    _check_tracks(chrome_trace([trace]))


def _metadata(name: str, **more: Any) -> Json:
    return {"ph": "M", "name": name, **more}


def _x(ts: Any = 0, dur: Any = 5, **more: Any) -> Json:
    return {"ph": "X", "ts": ts, "dur": dur, **more}


DRAWN: dict[str, Any] = {
    "ours": chrome_trace([RankTrace(0, "node", "cpu", tuple(EVENTS), STEPS)]),
    "list of events": [_x(name="only")],
    "no metadata": {"traceEvents": [_x(pid=1, tid="GPU"), _x(pid="Spans", tid=7, dur=0), None, 3]},
    "malformed": {"traceEvents": [_metadata("process_name"), _metadata("thread_name", pid=1, args=3), _x(name=None)]},
    "unhashable": {"traceEvents": [_metadata("process_name", pid=[1], args={"name": [2]}), _x(pid={}, tid=[1])]},
    "formula": {"traceEvents": [_x(name="$a_{$", pid="$x^$"), _x(name="\ud800\x00")]},
}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("content", DRAWN.values(), ids=DRAWN.keys())
def test_a_picture_is_drawn(tmp_path: Path, content: Any, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A crash on another writer's trace; a picture of the wrong format, or one left in parts."""
    trace, out = tmp_path / "trace.json", tmp_path / f"out{suffix}"
    trace.write_text(json.dumps(content))
    assert run_app(cli.app, ["timeline", str(trace), f"--out={out}", "--last-steps=1"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert {".png": b"PNG", ".svg": b"<svg", ".pdf": b"%PDF"}[suffix] in out.read_bytes()[:2000]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["trace.json", out.name])


NO_TRACE = {
    "missing": (None, "cannot be read: No such file"),
    "text": ("step 1 took 3 ms", "is no trace file: not JSON ("),
    "binary": (b"\xff\xfe\x00", "is no trace file: not JSON ("),
    "deep": ("[" * 100_000, "is no trace file: not JSON ("),
    "list": ("[1, 2]", "holds no complete events (ph X)"),
    "other JSON": ('{"ranks": []}', "is no trace file: it has no list traceEvents"),
    "number": ("3", "is no trace file: it has no list traceEvents"),
    "no X": ('{"traceEvents": [{"ph": "B", "ts": 1}, {"ph": "M", "name": "thread_name"}]}', "holds no complete events"),
    "no times": (json.dumps([_x(None), _x("0"), _x(0, -1), _x(float("nan")), _x(10**400)]), "holds no complete events"),
}


@pytest.mark.parametrize(("content", "message"), NO_TRACE.values(), ids=NO_TRACE.keys())
def test_no_trace_file(
    tmp_path: Path, content: str | bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, a message without the file and the way out, or an empty picture."""
    trace = tmp_path / "trace.json"
    if content is not None:
        trace.write_bytes(content.encode() if isinstance(content, str) else content)
    assert run_app(cli.app, ["timeline", str(trace), f"--out={tmp_path / 'out.png'}"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"crossdock: error: {trace}: {message}")
    assert stderr.endswith("; write one with generate --trace\n")
    assert stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"trace.json"}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps(DRAWN["ours"]))
    return trace


BAD_OUT = {
    "suffix": ("out.gif", "allowed: a file ending in .png, .svg, .pdf"),
    "folder": ("no/out.png", "the folder {tmp}/no does not exist; create it first"),
    "directory": ("dir.png", "is a directory; give a file"),
}


@pytest.mark.parametrize(("out", "message"), BAD_OUT.values(), ids=BAD_OUT.keys())
def test_bad_out(tmp_path: Path, ours: Path, out: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake that shows only after the drawing, as a traceback of the renderer."""
    (tmp_path / "dir.png").mkdir()
    assert run_app(cli.app, ["timeline", str(ours), f"--out={tmp_path / out}"]) == 2
    assert capsys.readouterr().err == f"crossdock: error: --out {tmp_path / out}: {message.format(tmp=tmp_path)}\n"


def test_last_steps(tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks that begin a step at the same moment counted as one; more steps than there are; 0 taken for all."""
    steps = [
        timeline.Slice(f"rank {r}  phases", f"step {n}", "phase", 10.0 * n, 10.0) for n in (1, 2, 3) for r in (0, 1)
    ]
    rest = [timeline.Slice("rank 0  copy", "a", "copy", 10.0 * n + 1, 1.0) for n in range(4)]
    for count in (1, 2, 3):
        found = timeline.last_steps([*steps, *rest], count)
        assert len(found) == 3 * count
        assert min(s.begin_ms for s in found) == 10.0 * (4 - count)
    assert min(s.begin_ms for s in timeline.last_steps([*steps, *rest], 9)) == 10.0
    assert run_app(cli.app, ["timeline", str(ours), f"--out={tmp_path / 'out.png'}", "--last-steps=0"]) == 2
    stderr = capsys.readouterr().err
    assert "--last-steps" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out.png").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError where the extra is not installed."""
    load = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(LaunchError, match=r"matplotlib is not installed; run: pip install 'crossdock\[timeline\]'"):
        timeline.draw([timeline.Slice("r", "n", "copy", 0.0, 1.0)], tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-written picture, or the part of one, after the disk ran full."""

    def write_half(_: object, path: Path, **more: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write_half)
    with pytest.raises(OSError, match="no space"):
        timeline.draw([timeline.Slice("r", "n", "copy", 0.0, 1.0)], tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_the_trace_is_an_output(tmp_path: Path) -> None:
    """A trace that overwrites another output, or that cannot be written after a long run."""
    for other in ("image", "latents", "report"):
        files = {"image": tmp_path / "out.png", "trace": tmp_path / "same.png", other: tmp_path / "same.png"}
        option = {"image": "--out"}.get(other, f"--{other}")
        with pytest.raises(RequestError, match=f"--trace .*same.png: is the same file as {option};"):
            Outputs(**files).check()
    with pytest.raises(RequestError, match=r"--trace .*no/t.json: the folder .*no does not exist; create it first"):
        Outputs(tmp_path / "out.png", trace=tmp_path / "no" / "t.json").check()
