"""`crossdock timeline`: draws a trace file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock.runtime.errors import LaunchError, RequestError

COLOURS = {"phase": "#b8c4d6", "compute": "#4c9f70", "wait": "#d64550", "copy": "#3b7dd8", "gather": "#e0a030"}
OTHER = "#888888"
SUFFIXES = (".png", ".svg", ".pdf")
_LETTER_PX = 6.0


@dataclass(frozen=True)
class Slice:
    """One bar; times in ms."""

    row: str
    name: str
    kind: str
    begin_ms: float
    length_ms: float


def read_slices(path: Path) -> list[Slice]:
    """The bars of a trace file in the Trace Event Format, whoever wrote it.

    Raises:
        RequestError: no such file, not JSON, or nothing in it that could be drawn.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}; write one with generate --trace") from None
    except ValueError as error:
        raise RequestError(f"{path}: is no trace file: not JSON ({error}); write one with generate --trace") from None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise RequestError(f"{path}: is no trace file: it has no list traceEvents; write one with generate --trace")
    slices = _slices([event for event in events if isinstance(event, dict)])
    if not slices:
        raise RequestError(f"{path}: holds no complete events (ph X): there is nothing to draw")
    return slices


def _slices(events: Sequence[Mapping[str, Any]]) -> list[Slice]:
    ranks = {e["pid"]: str(e["args"]["name"]).split(" (")[0] for e in events if e.get("name") == "process_name"}
    tracks = {(e["pid"], e["tid"]): str(e["args"]["name"]) for e in events if e.get("name") == "thread_name"}
    found = []
    for event in sorted(events, key=lambda e: (e.get("pid", 0), e.get("tid", 0))):
        if event.get("ph") == "X" and all(isinstance(event.get(key), int | float) for key in ("ts", "dur")):
            pid, tid = event.get("pid", 0), event.get("tid", 0)
            row = f"{ranks.get(pid, pid)}  {tracks.get((pid, tid), tid)}"
            times = (event["ts"] / 1e3, event["dur"] / 1e3)
            found.append(Slice(row, str(event.get("name", "")), str(event.get("cat", "")), *times))
    return found


def last_steps(slices: Sequence[Slice], count: int) -> list[Slice]:
    """What belongs to the last `count` denoise steps: from the begin of the first of them on any rank."""
    steps = sorted({s.begin_ms for s in slices if s.kind == "phase" and s.name.startswith("step ")})
    rows = max(1, len({s.row for s in slices if s.kind == "phase"}))
    begin = steps[-count * rows] if len(steps) >= count * rows else min(s.begin_ms for s in slices)
    return [s for s in slices if s.begin_ms >= begin]


def check_out(out: Path) -> None:
    """
    Raises:
        RequestError: `out` is no picture, or cannot be written there.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--out {out}: allowed: a file ending in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise RequestError(f"--out {out}: the folder {out.parent} does not exist; create it first")


def draw(slices: Sequence[Slice], out: Path) -> None:
    """One row per rank and stream, a colour per kind, block names where they fit.

    Raises:
        LaunchError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise LaunchError("matplotlib is not installed; run: pip install 'crossdock[timeline]'") from None
    rows = list(dict.fromkeys(s.row for s in slices))
    begin = min(s.begin_ms for s in slices)
    width_ms = max(s.begin_ms + s.length_ms for s in slices) - begin or 1.0
    figure = Figure(figsize=(16, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        for kind in dict.fromkeys(s.kind for s in slices if s.row == row):
            bars = [(s.begin_ms - begin, s.length_ms) for s in slices if (s.row, s.kind) == (row, kind)]
            axes.broken_barh(
                bars, (place - 0.4, 0.8), facecolors=COLOURS.get(kind, OTHER), edgecolor="white", linewidth=0.3
            )
        for s in (s for s in slices if s.row == row):
            if s.length_ms / width_ms * 1400 > _LETTER_PX * (len(s.name) + 1):
                middle = s.begin_ms - begin + s.length_ms / 2
                axes.text(middle, place, s.name, ha="center", va="center", fontsize=7, clip_on=True)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, width_ms)
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    kinds = [kind for kind in COLOURS if any(s.kind == kind for s in slices)]
    handles = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds) or 1, frameon=False)
    part = out.with_name(f".{out.name}.part{out.suffix}")
    try:
        figure.savefig(part, dpi=110)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
