"""What the `check` command does: launch, load, verify, tell. Nothing is drawn."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crossdock.launch.commands.bars import waiting_line
from crossdock.launch.commands.generate import locating
from crossdock.launch.commands.options import ConfigFile, located
from crossdock.launch.console import end
from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.progress import Waiting
from crossdock.launch.gangs.choose import Command, Launcher, choose_gang, choose_launcher
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import CompositionError, ContractResult
from crossdock.runtime.reports.records import RankReport, TensorRecord

PROMISES = {
    "same-schedule": "every rank streams the same blocks in the same order through the same slots",
    "single-owner": "every parameter and buffer has exactly one home, and nobody else moves it",
    "complete": "the ranks' parts add up to the checkpoint exactly once; replicas are equal",
    "same-bits": "blocks rest in the planned code; ranks that hold the same part have the same tables",
    "no-alias": "blocks share no memory, unless it stays on the device",
    "in-order": "load, gather, compute, free; no slot is overwritten under its reader",
    "same-collectives": "the ranks of a group issue the same collectives in the same order",
    "arrives": "what blocks compute with is what first arrived, in every step of a request",
    "finite": "no step's latents have a number that is not finite (in every request)",
    "same-state": "a replica's ranks have the same inputs and latents in every step of a request",
    "same-order": "they compute the same blocks in the same order, each through its hooks (in every request)",
    "same-numbers": "a step with streaming and one without it give the same bits (--probe)",
    "same-as-one": "each block gives what it gives in the unsharded model, but for rounding (--probe)",
}
_COLOURS = {"holds": "green", "violated": "bold red", "not probed": "dim", "no step yet": "dim", "off": "dim"}


@dataclass(frozen=True)
class Holdings:
    """What a rank holds of the transformer. Sizes in bytes.

    Attributes:
        homes: kind of home -> how many blocks rest there.
        resident: how many blocks stay on the device, whatever their home.
        slots: how many slots the other blocks share.
        device_bytes: of everything outside the blocks, of slots, and of blocks and shards that stay.
        host_bytes: of blocks at rest, in host memory or in the page cache; ranks with the same part share them.
    """

    rank: int
    homes: dict[str, int]
    resident: int
    slots: int
    slot_bytes: int
    device_bytes: int
    host_bytes: int

    @classmethod
    def of(cls, report: RankReport) -> Holdings:
        """Added up from what the rank reported."""
        stay = [home for home in report.homes if home.slot is None]
        on_device = sum(home.held_bytes for home in report.homes if home.home == "device_shard")
        on_device += sum(home.slot_bytes for home in stay) + sum(report.slot_bytes)
        on_device += sum(_nbytes(record) for record in report.tensors if record.place == "outside")
        return cls(
            report.rank,
            dict(Counter(str(home.home) for home in report.homes)),
            len(stay),
            len(report.slot_bytes),
            sum(report.slot_bytes),
            on_device,
            sum(home.held_bytes for home in report.homes if home.home.on_host),
        )


def run_check(
    source: ConfigFile, model: str, command: Command, *, probe: bool, as_json: bool, quiet: bool = False
) -> None:
    """Check and print. `quiet`: another rank prints.

    Raises:
        SystemExit: 1: the composition contract does not hold; everything that is violated was printed.
        UserError: with file, line and key path, where the config is to blame.
    """
    config = source.config
    console = Console(highlight=False, soft_wrap=True, quiet=quiet)
    signal.signal(signal.SIGTERM, end)
    beside = Console(stderr=True, quiet=quiet) if as_json else console
    model_dir = located(model, beside, config)
    with locating(source.path):
        launcher = choose_launcher(config, command, "check")
        if not as_json:
            console.print(f"{model}: starting {config.world_size} ranks ({launcher})", markup=False)
        with waiting_line(Console(quiet=True) if as_json else console) as waiting:
            result = check(config, model_dir, launcher, probe, waiting)
    if as_json:
        console.print(as_text(model, result), markup=False)
    else:
        show(result, console)
    if result.violations:
        raise SystemExit(CompositionError.exit_code)


def check(
    config: RunConfig, model_dir: Path, launcher: Launcher, probe: bool, waiting: Waiting | None = None
) -> ContractResult:
    """Launch, load, verify; end all ranks. `probe`: see `Engine.probe`."""
    try:
        how: dict[str, Any] = {"probe": probe, "rehearse": True, "waiting": waiting}
        with Engine.start(config, model_dir, make_gang=choose_gang(launcher), **how) as engine:
            return engine.contract_result
    except CompositionError as error:
        if error.result is None:
            raise
        return error.result


def as_text(model: str, result: ContractResult) -> str:
    """One JSON object."""
    content = {
        "model": model,
        "layout": result.layout,
        "holds": not result.violations,
        "composition": result.composition,
        "inferred": list(result.inferred),
        "violations": [asdict(violation) for violation in result.violations],
        "ranks": [asdict(Holdings.of(report)) for report in result.reports],
        "deviations": [_finite(asdict(deviation)) for deviation in result.deviations],
    }
    return json.dumps(content, indent=2)


def show(result: ContractResult, console: Console) -> None:
    """What was inferred, the checks, what is violated, and what every rank holds."""
    for line in result.inferred:
        console.print(line, markup=False)
    console.print(checks_table(result.composition))
    for violation in result.violations:
        console.print(str(violation), markup=False)
    console.print(holdings_table(result.layout, [Holdings.of(report) for report in result.reports]))


def checks_table(composition: Sequence[dict[str, str]]) -> Table:
    """One row per check."""
    table = Table(title="composition contract")
    for name in ("check", "holds when", "verdict", "detail"):
        table.add_column(name, overflow="fold")
    for row in composition:
        check, status = row["check"], row["status"]
        detail = "see below" if status == "violated" else row["detail"]
        table.add_row(check, PROMISES.get(check, ""), Text(status, _COLOURS.get(status, "")), Text(detail))
    return table


def holdings_table(layout: str, ranks: Sequence[Holdings]) -> Table:
    """One row per rank; sizes in MiB."""
    table = Table(title=f"{layout}: the transformer (MiB)")
    for name in ("rank", "blocks rest", "stay on the device", "slots", "on the device", "host memory"):
        table.add_column(name, justify="left" if name == "blocks rest" else "right")
    for row in ranks:
        table.add_row(
            str(row.rank),
            ", ".join(f"{count} {home}" for home, count in row.homes.items()),
            str(row.resident),
            f"{row.slots} ({_mib(row.slot_bytes)})",
            _mib(row.device_bytes),
            _mib(row.host_bytes),
        )
    return table


def _nbytes(record: TensorRecord) -> int:
    dtype: torch.dtype = getattr(torch, record.dtype.removeprefix("torch."))
    return math.prod(record.shape) * dtype.itemsize


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: None if value == math.inf else value for name, value in row.items()}


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"
