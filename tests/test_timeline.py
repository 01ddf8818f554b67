"""`crossdock timeline`: pictures of anybody's traces, what each mistake prints, and `--trace` as an output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from crossdock.launch import cli
from crossdock.launch.commands import timeline
from crossdock.launch.commands.options import Outputs, run_app
from crossdock.offload.stream.trace import TraceEvent
from crossdock.runtime.errors import LaunchError, RequestError
from crossdock.runtime.reports.records import RankTrace, Span
from crossdock.runtime.reports.trace_file import chrome_trace

Json = dict[str, Any]


def _x(ts: Any = 0, dur: Any = 5, **more: Any) -> Json:
    return {"ph": "X", "ts": ts, "dur": dur, **more}


EVENTS = (TraceEvent(0, "compute_begin", "a", None, 1.0), TraceEvent(1, "compute_end", "a", None, 1.5))
OURS = chrome_trace([RankTrace(0, "node", "cpu", EVENTS, (Span("step 1", 0.5, 1.5),))])
MALFORMED: list[Json] = [{}, {"args": 3}, {"args": {}}, {"args": {"name": [2]}, "pid": [1]}]
DRAWN: dict[str, Any] = {
    "ours": OURS["traceEvents"],
    "no metadata": [_x(pid=1, tid="GPU"), _x(pid="Spans", tid=7, dur=0), _x(name=None), None, 3],
    "malformed": [_x(ph="M", name=f"{n}_name", **m) for n in ("process", "thread") for m in MALFORMED] + [_x(pid={})],
    "formula": [_x(name="$a_{$", pid="$x^$"), _x(name="\ud800\x00")],
}


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("events", DRAWN.values(), ids=DRAWN.keys())
def test_a_picture_is_drawn(tmp_path: Path, events: Any, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A crash on another writer's trace; a picture of the wrong format, or one left in parts."""
    trace, out = tmp_path / "trace.json", tmp_path / f"out{suffix}"
    trace.write_text(json.dumps(events if suffix == ".svg" else {"traceEvents": events}))  # both forms of the format
    assert run_app(cli.app, ["timeline", str(trace), f"--out={out}", "--last-steps=1"]) == 0
    assert capsys.readouterr() == (f"wrote {out}\n", "")
    assert {".png": b"PNG", ".svg": b"<svg", ".pdf": b"%PDF"}[suffix] in out.read_bytes()[:2000]
    assert {path.name for path in tmp_path.iterdir()} == {"trace.json", out.name}


def test_rows_and_last_steps() -> None:
    """Threads of one name drawn on one row; steps that begin at once on two ranks counted as one."""
    same = [_x(ph="M", name="process_name", pid=pid, args={"name": "python (x)"}) for pid in (1, 2)]
    rows = [s.row for s in timeline._slices([*same, _x(pid=2), _x(pid=10), _x(pid=1)])]
    assert rows == ["python  0", "python  0 (2, 0)", "10  0"]
    steps = [timeline.Slice(f"rank {r}", f"step {n}", "phase", 10.0 * n, 9.0) for n in (1, 2, 3) for r in (0, 1)]
    slices = [*steps, *(timeline.Slice("rank 0  copy", "a", "copy", 10.0 * n + 1, 1.0) for n in range(4))]
    found = [timeline.last_steps(slices, count) for count in (1, 2, 9)]
    assert [(len(part), min(s.begin_ms for s in part)) for part in found] == [(3, 30.0), (6, 20.0), (9, 10.0)]


NO_TRACE = {
    "missing": (None, "cannot be read: No such file"),
    "text": (b"step 1 took 3 ms", "is no trace file: not JSON ("),
    "binary": (b"\xff\xfe\x00", "is no trace file: not JSON ("),
    "deep": (b"[" * 100_000, "is no trace file: not JSON ("),
    "list": (b"[1, 2]", "holds no complete events (ph X)"),
    "other": (b'{"ranks": []}', "is no trace file: it has no list traceEvents"),
    "no X": (json.dumps([_x(ph="M"), {"ph": "B", "ts": 1}]).encode(), "holds no complete events"),
    "times": (json.dumps([_x(None), _x("0"), _x(0, -1), _x(float("nan")), _x(10**400)]).encode(), "holds no complete"),
}


@pytest.mark.parametrize(("content", "message"), NO_TRACE.values(), ids=NO_TRACE.keys())
def test_no_trace(tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, a message without the file and the way out, or an empty picture."""
    trace = tmp_path / "trace.json"
    if content is not None:
        trace.write_bytes(content)
    assert run_app(cli.app, ["timeline", str(trace), f"--out={tmp_path / 'out.png'}"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"crossdock: error: {trace}: {message}")
    assert stderr.count("\n") == 1
    assert stderr.endswith("; write one with generate --trace\n")
    assert {path.name for path in tmp_path.iterdir()} <= {"trace.json"}


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake that shows only after the drawing, as a traceback of the renderer."""
    trace, taken = tmp_path / "trace.json", tmp_path / "dir.png"
    trace.write_text(json.dumps(OURS))
    taken.mkdir()
    wrong = {"out.gif": "allowed: a file ending in .png, .svg, .pdf", "dir.png": "is a directory; give a file"}
    for out, message in (wrong | {"no/x.png": f"the folder {tmp_path}/no does not exist; create it first"}).items():
        assert run_app(cli.app, ["timeline", str(trace), f"--out={tmp_path / out}"]) == 2
        assert capsys.readouterr().err == f"crossdock: error: --out {tmp_path / out}: {message}\n"
    assert run_app(cli.app, ["timeline", str(trace), f"--out={tmp_path / 'out.png'}", "--last-steps=0"]) == 2
    assert "--last-steps" in (stderr := capsys.readouterr().err)
    assert "Traceback" not in stderr
    assert set(tmp_path.iterdir()) == {trace, taken}


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-written picture after the disk ran full; an ImportError where the extra is not installed."""

    def write_half(_: object, path: Path, **more: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    slices = [timeline.Slice("r", "n", "copy", 0.0, 1.0)]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write_half)
    with pytest.raises(OSError, match="no space"):
        timeline.draw(slices, tmp_path / "out.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LaunchError, match=r"matplotlib is not installed; run: pip install 'crossdock\[timeline\]'"):
        timeline.draw(slices, tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_the_trace_is_an_output(tmp_path: Path) -> None:
    """A trace that overwrites another output, or that cannot be written after a long run."""
    same, no = tmp_path / "same.png", tmp_path / "no" / "t.json"
    for name, option in {"image": "--out", "latents": "--latents", "report": "--report"}.items():
        with pytest.raises(RequestError, match=f"--trace .*same.png: is the same file as {option};"):
            Outputs(**{"image": tmp_path / "out.png", "trace": same, name: same}).check()
    with pytest.raises(RequestError, match=r"--trace .*no/t.json: the folder .*no does not exist; create it first"):
        Outputs(tmp_path / "out.png", trace=no).check()
