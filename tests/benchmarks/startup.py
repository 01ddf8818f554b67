"""What starting ranks costs, under Ray and by the local launcher, side by side.

    python tests/benchmarks/startup.py [--rounds 3] [--ranks 4]

Ranks on the CPU that hold no model: until they have met, started by a process that has imported everything itself
(Ray, or the server that forks ranks, comes up with them), and restarted. Then the `crossdock` command, from its start
to its end: the first picture of the demo checkpoint (flux2-klein, tiny), with one rank and with four.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from figures import spread
from rich.console import Console
from rich.table import Table

from crossdock.launch.gangs.choose import Launcher, choose_gang
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint

LAUNCHERS: tuple[Launcher, ...] = ("ray", "local")
LAYOUTS = {1: "{}", 4: "{ulysses_degree: 2, ring_degree: 2}"}
LIMIT_S = 300

Times = dict[tuple[str, Launcher], list[float]]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind, in turn.")] = 3,
    ranks: Annotated[int, typer.Option(min=1, help="Of the gangs without a model.")] = 4,
) -> None:
    """Time starts, restarts and first pictures."""
    times: Times = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint("flux2-klein", folder / "demo")
        for _ in range(rounds):
            for launcher in LAUNCHERS:
                took = {f"{what}, {ranks} ranks": seconds for what, seconds in _start(launcher, ranks).items()}
                for count in LAYOUTS:
                    took[f"first picture, {count} rank{'s' * (count > 1)}"] = _first_picture(launcher, count, folder)
                for what, seconds in took.items():
                    times.setdefault((what, launcher), []).append(seconds)
                print(launcher, {what: round(seconds, 2) for what, seconds in took.items()}, flush=True)
    table = Table(title=f"seconds, medians of {rounds} (least-most)")
    for column in ("", "Ray", "local", "Ray / local"):
        table.add_column(column)
    for what in dict.fromkeys(what for what, _ in times):
        rows = [times[what, launcher] for launcher in LAUNCHERS]
        ratios = [under_ray / local for under_ray, local in zip(*rows, strict=True)]
        table.add_row(what, *(spread(row, 2) for row in rows), spread(ratios, 1))
    Console(width=120).print(table)


def _start(launcher: Launcher, ranks: int) -> dict[str, float]:
    gang = choose_gang(launcher)(LaunchConfig(), ranks, "cpu")
    times = {}
    try:
        for what, work in (("cold", gang.start), ("restarted", gang.restart)):
            began = time.perf_counter()
            work()
            times[what] = time.perf_counter() - began
            assert gang.collective_rpc(lambda worker: worker.rank, timeout_s=60) == [*range(ranks)]
        began = time.perf_counter()
    finally:
        gang.close()
    return {**times, "closed": time.perf_counter() - began}


def _first_picture(launcher: Launcher, ranks: int, folder: Path) -> float:
    config, out = folder / "config.yaml", folder / "out.png"
    config.write_text(f"parallel: {LAYOUTS[ranks]}\nlaunch: {{launcher: {launcher}, device: cpu}}\n")
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "crossdock.launch.cli", "generate", str(folder / "demo")]
    options = ["--config", str(config), "--prompt", "a crane over a dock", "--out", str(out), "--steps", "2"]
    began = time.perf_counter()
    subprocess.run([*command, *options], check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    took_s = time.perf_counter() - began
    assert out.is_file()
    return took_s


if __name__ == "__main__":
    typer.run(main)
