"""What a killed rank costs: until it is noticed, until new ranks hold the model, with and without the kept host store.

    python tests/benchmarks/recovery.py [--rounds 3] [--heads 8]

The gang and the checkpoint of `checking.py`. A rank is killed in the middle of a request, which then goes on; in turn
with the host store that a keeper holds, and with the keeper ended, so that the checkpoint is read again. The files are
in the page cache: from a disk, reading takes longer.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from checking import make_large_checkpoint
from rich.console import Console
from rich.table import Table

from crossdock.launch.engine import Engine
from crossdock.runtime.config import RunConfig

PARTS = ("noticed", "recovered", "of it load")


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Faults of each kind.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the transformer, 128 wide.")] = 8,
) -> None:
    """Time recoveries with and without the kept host store."""
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}})
    found: dict[str, list[tuple[float, float, float]]] = {"host store kept": [], "read again": []}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        make_large_checkpoint(directory, heads)
        with Engine.start(config, directory) as engine:
            engine.generate("warm up", steps=2, height=64, width=64)
            for _ in range(rounds):
                for kind in found:
                    found[kind].append(_fault(engine, keep=kind == "host store kept"))
    table = Table(title=f"seconds, medians of {rounds} (least-most)")
    for name in ("", *PARTS):
        table.add_column(name)
    for kind, times in found.items():
        columns = zip(*times, strict=True)
        table.add_row(kind, *(f"{statistics.median(c):.2f} ({min(c):.2f}-{max(c):.2f})" for c in map(list, columns)))
    Console().print(table)


def _fault(engine: Engine, keep: bool) -> tuple[float, float, float]:
    """Kill rank 1 in the second step of a request."""
    if not keep:
        engine.gang.call(lambda worker: worker.weights.store and worker.weights.store.drop(), timeout_s=60)
    pids = engine.gang.call(lambda worker: os.getpid(), timeout_s=60)
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.perf_counter())
        os.kill(pids[1], signal.SIGKILL)

    noticed: list[float] = []
    replace_gang = engine._replace_gang

    def noting(*args: object) -> None:
        noticed.append(time.perf_counter())
        replace_gang(*args)  # type: ignore[arg-type]

    engine._replace_gang = noting  # type: ignore[method-assign]
    try:
        report = engine.generate(
            "a lighthouse",
            steps=4,
            height=64,
            width=64,
            progress=lambda step, _: threading.Thread(target=kill).start() if not killed else None,
        ).report
    finally:
        engine._replace_gang = replace_gang  # type: ignore[method-assign]
    loads = engine.gang.call(lambda worker: worker.load_s, timeout_s=60)
    return noticed[0] - killed[0], report["faults"][0]["recovery_s"], max(loads)


if __name__ == "__main__":
    typer.run(main)
