"""What the `generate` command does, whichever launcher runs it."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crossdock.launch.commands.bars import step_bar, waiting_line
from crossdock.launch.commands.options import ConfigFile, Outputs, located
from crossdock.launch.commands.outputs import write_outputs
from crossdock.launch.console import end
from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.recovery import brief
from crossdock.launch.gangs.choose import Command, choose_gang, choose_launcher
from crossdock.runtime.config.yaml_file import locate
from crossdock.runtime.contract.numbers import PROBE_CHECKS
from crossdock.runtime.errors import UserError
from crossdock.runtime.models.families import spec_for
from crossdock.runtime.request import GenerateRequest


def run_generate(
    source: ConfigFile,
    model: str,
    request: GenerateRequest,
    outputs: Outputs,
    command: Command,
    quiet: bool = False,
    probe: bool = False,
) -> None:
    """Generate and write the outputs.

    Args:
        quiet: another rank prints and writes.
        probe: see `Engine.probe`; what it refuses is not drawn.

    Raises:
        UserError: with file, line and key path, where the config is to blame.
    """
    config = source.config
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    signal.signal(signal.SIGTERM, end)
    model_dir = located(model, console, config)
    spec = spec_for(model_dir)
    outputs.check_kind(spec.family, videos=spec.fps is not None)
    with locating(source.path):
        launcher = choose_launcher(config, command, "generate")
        console.print(f"{model}: starting {config.world_size} ranks ({launcher})", markup=False)
        notify = partial(console.print, markup=False)
        options: dict[str, Any] = {"make_gang": choose_gang(launcher), "first_request": request, "notify": notify}
        with waiting_line(console) as options["waiting"]:
            engine = Engine.start(config, model_dir, probe=probe, **options)
        with engine:
            rows = engine.contract_result.composition
            probed = "; ".join(f"{row['check']}: {row['detail']}" for row in rows if row["check"] in PROBE_CHECKS)
            verified = f"composition verified; {probed if probe else 'what arrives is compared in the first step'}"
            console.print(f"layout: {engine.plan.layout_name}; {verified}", markup=False)
            with step_bar(console) as step:
                generation = engine.run(request, step)
    if not quiet:
        for path in write_outputs(generation, outputs):
            console.print(f"wrote {path}", markup=False)
        for fault in generation.report["faults"]:
            console.print(survived(fault), markup=False)
        console.print(summary(generation.report))


@contextmanager
def locating(config_path: Path) -> Iterator[None]:
    """An error about the config says file and line."""
    try:
        yield
    except UserError as error:
        if error.key is None:
            raise
        raise type(error)(f"{locate(config_path, error.key)}: {error}") from None


def survived(fault: dict[str, Any]) -> str:
    """A fault of the report in one line."""
    went_on = f"went on after step {fault['resumed_after']}" if fault["resumed_after"] else "began again"
    more = f", after {len(fault['meanwhile'])} more faults" if fault["meanwhile"] else ""
    return f"survived: {brief(fault['error'])} ({fault['remedy']} in {fault['recovery_s']:.1f} s{more}; {went_on})"


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
            f"{statistics.median(row['step_ms']):.1f}" if row["step_ms"] else "-",  # resumed after its last step
        )
    return table
