"""What the `generate` command does, whichever launcher runs it."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crossdock.launch.arguments import Outputs
from crossdock.launch.engine import Engine, Generation, MakeGang, write_outputs
from crossdock.runtime.config import RunConfig
from crossdock.runtime.errors import ConfigError, UserError
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.yaml_config import load_config, locate

Launcher = Literal["ray", "torchrun"]


def run_generate(
    config_path: Path,
    model_dir: Path,
    request: GenerateRequest,
    outputs: Outputs,
    launcher: Launcher,
    quiet: bool = False,
) -> None:
    """Generate and write the outputs. `quiet`: another rank prints and writes.

    Raises:
        UserError: with file, line and key path, where the config is to blame.
    """
    config = load_config(config_path)
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    signal.signal(signal.SIGTERM, _end)
    try:
        make_gang = _choose_gang(config, launcher)
        console.print(f"{model_dir}: starting {config.world_size} ranks ({launcher})", markup=False)
        with Engine.start(config, model_dir, make_gang=make_gang, first_request=request) as engine:
            console.print(f"layout: {engine.plan.layout_name}; composition verified", markup=False)
            generation = _generate(engine, request, console)
    except UserError as error:
        if error.key is None:
            raise
        raise type(error)(f"{locate(config_path, error.key)}: {error}") from None
    if not quiet:
        for path in write_outputs(generation, outputs):
            console.print(f"wrote {path}", markup=False)
        console.print(summary(generation.report))


def _choose_gang(config: RunConfig, launcher: Launcher) -> MakeGang | None:
    """None: the engine's own choice, Ray."""
    wanted = config.launch.launcher
    if wanted not in ("auto", launcher):
        way = (
            f"torchrun --nproc-per-node {config.world_size} -m crossdock.launch.torchrun generate ..."
            if wanted == "torchrun"
            else "crossdock generate ..."
        )
        raise ConfigError(f"found {wanted}, but this is {launcher}; start it with: {way}", "launch.launcher")
    if launcher == "ray":
        return None
    from crossdock.launch.torchrun import TorchrunGang

    return TorchrunGang


def _generate(engine: Engine, request: GenerateRequest, console: Console) -> Generation:
    with _step_bar(console) as step:
        return engine.generate(
            request.prompts,
            seed=request.seed,
            steps=request.steps,
            height=request.height,
            width=request.width,
            guidance_scale=request.guidance_scale,
            progress=step,
        )


@contextmanager
def _step_bar(console: Console) -> Iterator[Any]:
    """A bar on a terminal, a plain line per step elsewhere."""
    if not console.is_terminal or console.quiet:
        yield lambda done, total: console.print(f"step {done}/{total}", markup=False)
        return
    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("denoising", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def summary(report: dict[str, Any]) -> Table:
    """One row per rank: what it held, what it moved (MiB), and its median time per step."""
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report["phases_s"].items())
    table = Table(title=f"{report['layout']} (MiB; h2d and gather per step)", caption=phases)
    for name in ("rank", "device", "weights", "slots", "shards", "host", "h2d", "gather", "ms/step"):
        table.add_column(name, justify="left" if name == "device" else "right")
    for row in report["ranks"]:
        sizes = [row[f"{name}_bytes"] for name in ("peak_weight", "slot", "shard", "host_pss")]
        sizes += [row["h2d_bytes_per_step"], row["gathered_bytes_per_step"]]
        table.add_row(
            str(row["rank"]),
            row["device"],
            *(f"{size / 2**20:.1f}" for size in sizes),
            f"{statistics.median(row['step_ms']):.1f}",
        )
    return table


def _end(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the run like Ctrl-C: the gang is closed on the way out."""
    raise KeyboardInterrupt
