"""What a lost rank costs: until it is noticed, until new ranks hold the model, with and without the kept host store.

    python tests/benchmarks/recovery.py [--kind kill,stop,raise] [--rounds 3] [--heads 8] [--no-torchrun]

Four Ray ranks on the CPU (`layerwise_ulysses2_ring2`) hold the pipeline of `checking.py`. In the middle of a request,
which then goes on, one rank after the other is killed, stopped, or raises; in turn with the host store that is
kept, and with it dropped, so that the checkpoint is read again. The files are in the page cache: from a disk,
reading takes longer. Under torchrun, which starts all ranks again itself, the same faults are timed until every process
of the run has gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import psutil
import typer
from checking import make_large_checkpoint
from figures import spread
from rich.console import Console
from rich.table import Table

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.rank.worker import RankWorker

TESTS = Path(__file__).resolve().parents[1]
CONFIG = TESTS.parent / "launch" / "configs" / "layerwise_ulysses2_ring2.yaml"
KINDS = ("kill", "stop", "raise")
STEP, STEPS, SIZE = 2, 4, 64
"""The fault is in step 2 of 4; pixels of the picture's sides."""
PASSES = 2
"""Of the model, in a step with guidance."""
LIMIT_S = 300.0
"""For a run under torchrun, from its start to its end."""

Row = tuple[float, ...]
"""Seconds: until noticed, to recover, of it loading; under torchrun until all have gone."""


def main(
    kind: Annotated[str, typer.Option(help="What happens to the rank, with commas in between.")] = ",".join(KINDS),
    rounds: Annotated[int, typer.Option(min=1, help="Faults of each kind, with and without the store.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the transformer, 128 wide.")] = 8,
    config: Annotated[Path, typer.Option(help="The layout.")] = CONFIG,
    torchrun: Annotated[bool, typer.Option(help="Also under torchrun.")] = True,
) -> None:
    """Time recoveries with and without the kept host store."""
    kinds = kind.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {', '.join(KINDS)}")
    run = load_config(config)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        make_large_checkpoint(directory, heads)
        recovered = _with_ray(run, directory, kinds, rounds, Path(folder))
        gone = {
            each: [_under_torchrun(config, run.world_size, directory, each, number) for number in range(rounds)]
            for each in (kinds if torchrun else ())
        }
    table = Table(title=f"seconds, medians of {rounds} (least-most); {run.world_size} ranks, {config.stem}")
    for name in ("fault", "ranks", "noticed after", "recovered in", "of it loading"):
        table.add_column(name)
    for (each, store), rows in recovered.items():
        table.add_row(each, f"Ray, {store}", *(spread(column, 2) for column in zip(*rows, strict=True)))
    for each, times in gone.items():
        table.add_row(each, "torchrun, all gone", spread(times, 2), "", "")
    Console(width=130).print(table)


def _with_ray(
    config: RunConfig, checkpoint: Path, kinds: list[str], rounds: int, folder: Path
) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {
        (kind, store): [] for kind in kinds for store in ("store kept", "read again")
    }
    with Engine.start(config, checkpoint) as engine:
        engine.generate("warm up", steps=2, height=SIZE, width=SIZE)
        for number in range(rounds):
            for kind, store in found:
                if store == "read again":
                    engine.gang.collective_rpc(_drop_store, timeout_s=60)
                note = folder / f"{kind}-{store}-{number}"
                found[kind, store].append(_fault(engine, number % config.world_size, kind, note))
    return found


def _drop_store(worker: RankWorker) -> None:
    if worker.holder is not None:
        worker.holder.drop()


def _fault(engine: Engine, rank: int, kind: str, note: Path) -> Row:
    engine.gang.collective_rpc(_plant, rank, kind, note, timeout_s=60)
    noticed: list[float] = []
    replace_gang = engine._ranks.replace

    def noting(*args: object) -> None:
        noticed.append(time.time())
        replace_gang(*args)  # type: ignore[arg-type]

    engine._ranks.replace = noting  # type: ignore[method-assign]
    try:
        report = engine.generate("a lighthouse", steps=STEPS, height=SIZE, width=SIZE).report
    finally:
        engine._ranks.replace = replace_gang  # type: ignore[method-assign]
    (fault,) = report["faults"]
    loads = engine.gang.collective_rpc(lambda worker: worker.loaded.load_s, timeout_s=60)
    return noticed[0] - float(note.read_text()), fault["recovery_s"], max(loads)


def _plant(worker: RankWorker, rank: int, kind: str, note: Path) -> None:
    """The rank meets its end in the middle of the step's blocks, and writes down when."""
    if worker.rank != rank:
        return
    passes: list[int] = []

    def end(*_: object) -> None:
        passes.append(1)
        if len(passes) < PASSES * STEP:
            return
        note.write_text(str(time.time()))
        if kind == "raise":
            raise ValueError("planted")
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    worker.loaded.model.single_transformer_blocks[1].register_forward_pre_hook(end)  # type: ignore[index, union-attr]


def _under_torchrun(config: Path, ranks: int, checkpoint: Path, kind: str, number: int) -> float:
    """Seconds from the fault until no process of the run is there; the program is that of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        planted = {"rank": number % ranks, "kind": kind, "step": STEP}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", "0", "-m", "torchrun_with_faults", "generate", str(checkpoint)]
        command += ["--config", str(config), "--prompt", "a lighthouse", "--steps", str(STEPS)]
        command += ["--height", str(SIZE), "--width", str(SIZE), "--out", f"{folder}/out.png"]
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, "PYTHONPATH": path, "PLANTED": json.dumps([planted]), "NOTES": folder}
        with Path(folder, "log").open("w") as log:
            run = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            return _gone_after_s(Path(folder), run.poll)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{Path(folder, 'log').read_text()[-3000:]}") from None
        finally:
            for pid in [run.pid, *_pids(Path(folder))]:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)
            run.wait()


def _gone_after_s(folder: Path, ended: Callable[[], int | None]) -> float:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        fault = folder / "try0.fault"
        if fault.exists() and not any(map(psutil.pid_exists, _pids(folder))):
            return time.time() - float(fault.read_text())
        if ended() is not None and not fault.exists():
            raise TimeoutError("the run ended before the fault")
        time.sleep(0.02)
    raise TimeoutError(f"some process is still there after {LIMIT_S:g} s")


def _pids(folder: Path) -> list[int]:
    return [int(text) for path in folder.glob("try0.rank*.pid") if (text := path.read_text())]


if __name__ == "__main__":
    typer.run(main)
