"""`crossdock timeline`: draws a trace file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock.runtime.config.bounded_files import read_bounded
from crossdock.runtime.errors import LaunchError, RequestError

COLOURS = {
    "phase": "#b8c4d6",
    "compute": "#4c9f70",
    "wait": "#d64550",
    "copy": "#3b7dd8",
    "gather": "#e0a030",
    "decode": "#8e5bb5",
}
OTHER = "#888888"
SUFFIXES = (".png", ".svg", ".pdf")
_LETTER_PX = 6.0
_MAX_INCHES = 500.0
"""Of height: no renderer takes more than 2**16 pixels."""
_MAX_US = 1e18
_MAX_BYTES = 2**30
_WAY_OUT = "write one with generate --trace"


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
        content = json.loads(read_bounded(path, _MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}; {_WAY_OUT}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: is no trace file: not JSON ({error}); {_WAY_OUT}") from None
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise RequestError(f"{path}: is no trace file: it has no list traceEvents; {_WAY_OUT}")
    slices = _slices([event for event in events if isinstance(event, dict)])
    if not slices:
        raise RequestError(f"{path}: holds no complete events (ph X), so there is nothing to draw; {_WAY_OUT}")
    return slices


_Key = tuple[bool, float, str]


def _slices(events: Sequence[Mapping[str, Any]]) -> list[Slice]:
    processes = {_key(e, "pid"): name for e in events if (name := _name_in(e, "process_name"))}
    threads = {(_key(e, "pid"), _key(e, "tid")): name for e in events if (name := _name_in(e, "thread_name"))}
    taken: dict[str, tuple[_Key, _Key]] = {}
    found = []
    for event in sorted(filter(_is_complete, events), key=lambda e: (_key(e, "pid"), _key(e, "tid"))):
        place = (_key(event, "pid"), _key(event, "tid"))
        pid, tid = _text(event.get("pid", 0)), _text(event.get("tid", 0))
        row = f"{processes.get(place[0], pid).split(' (')[0]}  {threads.get(place, tid)}"
        if taken.setdefault(row, place) != place:  # another process or thread with the same name
            row = f"{row} ({pid}, {tid})"
        times = (event["ts"] / 1e3, event["dur"] / 1e3)
        found.append(Slice(row, _text(event.get("name", "")), _text(event.get("cat", "")), *times))
    return found


def _is_complete(event: Mapping[str, Any]) -> bool:
    times = (event.get("ts"), event.get("dur"))
    return event.get("ph") == "X" and all(map(_is_number, times)) and event["dur"] >= 0


def _is_number(value: object) -> bool:
    """One that can be drawn: neither NaN nor infinite."""
    return isinstance(value, int | float) and abs(value) < _MAX_US


def _name_in(event: Mapping[str, Any], kind: str) -> str | None:
    args = event.get("args")
    named = event.get("ph") == "M" and event.get("name") == kind and isinstance(args, dict) and "name" in args
    return _text(event["args"]["name"]) if named else None


def _key(event: Mapping[str, Any], field: str) -> _Key:
    """Writers number processes and threads, or name them: numbers come first, in their order."""
    value = event.get(field, 0)
    return (False, float(value), "") if _is_number(value) else (True, 0.0, str(value))


def _text(value: object) -> str:
    """One line that every renderer takes."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def last_steps(slices: Sequence[Slice], count: int) -> list[Slice]:
    """What belongs to the last `count` denoise steps: from the begin of the first of them on any rank."""
    steps: dict[str, list[float]] = {}
    for s in slices:
        if s.kind == "phase" and s.name.startswith("step "):
            steps.setdefault(s.row, []).append(s.begin_ms)
    if not steps:
        return list(slices)
    begin = min(sorted(begins)[-min(count, len(begins))] for begins in steps.values())
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
    if out.is_dir():
        raise RequestError(f"--out {out}: is a directory; give a file")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise RequestError(f"--out {out}: cannot be written: no permission")


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
    figure = Figure(figsize=(16, min(1.2 + 0.42 * len(rows), _MAX_INCHES)), layout="constrained")
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
                axes.text(middle, place, s.name, ha="center", va="center", fontsize=7, clip_on=True, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)  # a name may hold $
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
