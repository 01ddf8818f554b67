"""What checking costs, with it on and off in turn in one run.

    python tests/benchmarks/checking.py [--loads 10] [--rounds 20] [--steps 4] [--size 256] [--heads 8]

Two Ray ranks on the CPU hold a FLUX.2-shaped pipeline (0.2B parameters in the transformer, 0.8B with 16 heads; fp32,
random), layerwise with tp 2.

A load: the model is set up and the first step run, with everything that is checked in both (slots are poisoned, what
stays is compared with the checkpoint, and in the step every block when it arrives; the ranks' reports; the verdict
before the step, and that on what arrived) and without any of it. The cost is what the load and the first step take
longer together; aim: 3% of the load. Both are long, and their difference is short: it is also put together from what
ranks and coordinator spend checking.

A request: the coordinator's questions four times a second, the record of every collective, the trace of every block,
the digests of weights, what is looked at in every step (`verify`), the ranks' agreement at its end and the review of
the request, all on or all off; aim: 1% of a step. That is less than most machines' noise: it is also put together from
what the slower rank spends in each (of what is looked at in steps: at their ends).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from diffusers import Flux2Transformer2DModel
from figures import median_interval, verdict
from rich.console import Console
from rich.table import Table

import crossdock.launch.gangs.ranks.watcher as watcher
import crossdock.runtime.contract.coordinator as judging
from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import RankReport

SHAPE = {"num_layers": 3, "num_single_layers": 9, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32)}
LOAD_AIM = 0.03
STEP_AIM = 0.01


def main(
    loads: Annotated[int, typer.Option(min=0, help="Rounds; in each, a load with checks and one without.")] = 10,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds; in each, a request with checks and one without.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Denoise steps of a request.")] = 4,
    size: Annotated[int, typer.Option(min=64, help="Pixels of the picture's sides.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the transformer, 128 wide.")] = 8,
) -> None:
    """Time loads and requests with and without checks."""
    console = Console(width=130)
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}})
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        make_large_checkpoint(directory, heads)
        with Engine.start(config, directory) as engine:
            if loads:
                _show_loads(console, *_loads(engine, loads, size))
            if rounds:
                found = _requests(engine, rounds, steps, size)
                _show_requests(console, found)
                _show_parts(console, found, [_parts(engine, steps, size) for _ in range(rounds)])


def make_large_checkpoint(directory: Path, heads: int, dtype: torch.dtype = torch.float32) -> None:
    """A FLUX.2 pipeline whose transformer is large enough for its load to count."""
    make_checkpoint("flux2-klein", directory)
    tiny = Flux2Transformer2DModel.from_pretrained(directory / "transformer")
    large = Flux2Transformer2DModel.from_config({**tiny.config, **SHAPE, "num_attention_heads": heads})
    shutil.rmtree(directory / "transformer")
    large.to(dtype).save_pretrained(directory / "transformer")


# -- loads -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A load and the first step, in seconds.

    `setup_s` is what the coordinator waits, its verdict included; `checks_s` what is spent checking. Its `parts` are of
    the slower rank, and some overlap.
    """

    setup_s: float
    step_s: float
    checks_s: float
    parts: dict[str, float]


def _loads(engine: Engine, rounds: int, size: int) -> tuple[list[Load], list[Load]]:
    """With checks and without, per round. One of each before, uncounted: libraries are imported, files cached."""
    found: dict[bool, list[Load]] = {True: [], False: []}
    for number in range(rounds + 1):
        for checked in (True, False) if number % 2 else (False, True):
            load = _load(engine, checked, size)
            if number:
                found[checked].append(load)
    return found[True], found[False]


def _load(engine: Engine, checked: bool, size: int) -> Load:
    engine.gang.collective_rpc(RankWorker.teardown, timeout_s=60)
    judged = dict.fromkeys(("verdict before the first step", "verdict on what arrived"), 0.0)
    before, arrived = judged
    engine._ranks.coordinator = Coordinator(engine.plan)
    began = time.perf_counter()
    reports = engine.gang.collective_rpc(_timed_setup, engine.plan, checked, timeout_s=600)
    if checked:
        admit = _timed(judged, before, engine._ranks.coordinator.admit)
        admit([report for report in reports if report is not None], False)
    setup_s = time.perf_counter() - began
    with patch.object(judging, "verify_arrivals", _timed(judged, arrived, judging.verify_arrivals)):
        ranks = engine.generate("a lighthouse", steps=1, height=size, width=size).report["ranks"]
    step_s = max(rank["step_ms"][0] for rank in ranks) / 1e3
    if not checked:
        return Load(setup_s, step_s, 0.0, {})
    took = engine.gang.collective_rpc(lambda worker: worker.took, timeout_s=60)
    parts = {name: max(of_rank[name] for of_rank in took) for name in took[0]} | judged
    checks_s = max(sum(of_rank[name] for name in _ONE_AFTER_THE_OTHER) for of_rank in took) + sum(judged.values())
    return Load(setup_s, step_s, checks_s, parts)


def _timed(took: dict[str, float], name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            took[name] += time.perf_counter() - began

    return run


_ONE_AFTER_THE_OTHER = ("comparing what stays, asking for poisoning", "report", "comparing blocks as they arrive")


def _timed_setup(worker: RankWorker, plan: RunPlan, checked: bool) -> RankReport | None:
    """On a rank: `setup`, with all that is checked in it or without; `took` has what it and the first step spend."""
    import crossdock.offload.stream.slot_loads as loading
    from crossdock.runtime.rank.loaded_model import LoadedModel
    from crossdock.runtime.rank.weights.arrivals import ArrivalWatch
    from crossdock.runtime.rank.weights.compare import WeightCheck

    start, report, arriving = _ONE_AFTER_THE_OTHER
    digested = "  of it their digests, for later steps"
    took = worker.took = dict.fromkeys((*_ONE_AFTER_THE_OTHER, digested, "poisoning, on the copy lane"), 0.0)  # type: ignore[attr-defined]
    parts = (
        (start, WeightCheck, "begin"),
        (start, WeightCheck, "watch"),
        (report, LoadedModel, "report"),
        (arriving, WeightCheck, "block"),
        (digested, ArrivalWatch, "arrived"),
        ("poisoning, on the copy lane", loading, "poison"),
    )
    with ExitStack() as stack:
        for name, owner, work in parts:
            kept = _timed(took, name, getattr(owner, work)) if checked else lambda *_, **__: None
            stack.enter_context(patch.object(owner, work, kept))
        return worker.setup(plan)  # the stream keeps the timed method


def _show_loads(console: Console, checked: list[Load], plain: list[Load]) -> None:
    load_s = statistics.median(load.setup_s for load in plain)
    table = Table(
        title=f"checking a load of {load_s:.2f} s, {len(checked)} rounds: medians, with where they lie at 95%"
    )
    for name in ("", "ms", "share of the load"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, seconds: Sequence[float]) -> None:
        shares = [each / load_s for each in seconds]
        table.add_row(name, _interval([each * 1e3 for each in seconds], ".0f"), _interval(shares, ".1%"))

    pairs = list(zip(checked, plain, strict=True))
    timed = [on.setup_s + on.step_s - off.setup_s - off.step_s for on, off in pairs]
    row("extra, put together: what the ranks and the coordinator spend", [load.checks_s for load in checked])
    for name in checked[0].parts:
        row(f"  {name}", [load.parts[name] for load in checked])
    row("the load, timed, takes longer by", [on.setup_s - off.setup_s for on, off in pairs])
    row("the first step, timed, takes longer by", [on.step_s - off.step_s for on, off in pairs])
    row("extra, timed: both", timed)
    console.print(table)
    for name, seconds in (("put together", [load.checks_s for load in checked]), ("timed", timed)):
        shares = [each / load_s for each in seconds]
        told = verdict(shares, LOAD_AIM)
        console.print(f"extra, {name}: {_interval(shares, '.1%')} of a load; aim {LOAD_AIM:.0%}: {told}")


def _interval(values: Sequence[float], form: str) -> str:
    low, high = median_interval(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


# -- requests --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Of a request, in ms per step: the steps alone, of the slower rank; and all that its caller waits."""

    step_ms: float
    whole_ms: float


def _requests(engine: Engine, rounds: int, steps: int, size: int) -> list[tuple[Times, Times]]:
    """With checks and without, per round."""
    engine.generate("warm up", steps=2, height=size, width=size)
    found = []
    for number in range(rounds):
        pair = {on: _request(engine, on, steps, size) for on in ((True, False) if number % 2 else (False, True))}
        found.append((pair[True], pair[False]))
    return found


def _request(engine: Engine, checked: bool, steps: int, size: int) -> Times:
    with ExitStack() as stack:
        if not checked:
            stack.enter_context(_unchecked(engine))
        began = time.perf_counter()
        report = engine.generate("a lighthouse", steps=steps, height=size, width=size).report
        whole_ms = (time.perf_counter() - began) * 1e3
    return Times(max(statistics.mean(rank["step_ms"]) for rank in report["ranks"]), whole_ms / steps)


def _parts(engine: Engine, steps: int, size: int) -> dict[str, float]:
    """What the slower rank spends per step, in ms; the agreement includes waiting for the other one."""
    engine.gang.collective_rpc(_time_checks, timeout_s=60)
    try:
        engine.generate("a lighthouse", steps=steps, height=size, width=size)
        took = engine.gang.collective_rpc(lambda worker: dict(worker.took), timeout_s=60)
    finally:
        engine.gang.collective_rpc(_switch_on, timeout_s=60)
    slower = max(took, key=lambda of_rank: sum(of_rank.values()))
    return {name: seconds * 1e3 / steps for name, seconds in slower.items()}


def _time_checks(worker: RankWorker) -> None:
    from crossdock.offload.stream.loader import EventLog
    from crossdock.parallel.group import Group
    from crossdock.runtime.rank.step_watch import StepWatch
    from crossdock.runtime.rank.stop import Stopping
    from crossdock.runtime.rank.weights.arrivals import ArrivalWatch

    parts = (
        ("the record of collectives", Group, "_begin"),
        ("the trace of blocks", EventLog, "note"),
        ("arrives: digests of blocks", ArrivalWatch, "_used"),
        ("arrives: comparing them", ArrivalWatch, "end_step"),
        ("arrives: text encoder and VAE", ArrivalWatch, "component_used"),
        ("arrives: the rest, at the request's end", ArrivalWatch, "end"),
        ("finite, same-state, same-order: at steps' ends", StepWatch, "end_step"),
        ("the agreement at a step's end", Stopping, "agree"),
        ("answers to the coordinator", RankWorker, "status"),
    )
    took = worker.took = dict.fromkeys([name for name, _, _ in parts], 0.0)  # type: ignore[attr-defined]
    worker.switched: Any = ExitStack()  # type: ignore[misc, attr-defined]
    for name, owner, work in parts:
        timed = _timed(took, name, getattr(owner, work))
        worker.switched.enter_context(patch.object(owner, work, timed))  # type: ignore[attr-defined]
    _observe(worker)


@contextmanager
def _unchecked(engine: Engine) -> Iterator[None]:
    engine.gang.collective_rpc(_switch_off, timeout_s=60)
    try:
        with (
            patch.object(watcher, "ASK_EVERY_S", 1e6),
            patch.object(engine._ranks.coordinator, "review", lambda *_: None),
        ):
            yield
    finally:
        engine.gang.collective_rpc(_switch_on, timeout_s=60)


def _switch_off(worker: RankWorker) -> None:
    from crossdock.offload.stream.loader import EventLog
    from crossdock.parallel.group import Group
    from crossdock.runtime.rank.step_watch import StepWatch
    from crossdock.runtime.rank.stop import Stopping
    from crossdock.runtime.rank.weights.arrivals import ArrivalWatch

    worker.switched: Any = ExitStack()  # type: ignore[misc, attr-defined]
    off = ((Group, "_begin"), (Stopping, "agree"), (EventLog, "note"), (ArrivalWatch, "begin"), (StepWatch, "begin"))
    for owner, name in off:  # what has not begun looks at nothing
        worker.switched.enter_context(patch.object(owner, name, lambda *_, **__: None))  # type: ignore[attr-defined]


def _switch_on(worker: RankWorker) -> None:
    worker.switched.close()  # type: ignore[attr-defined]
    _observe(worker)


def _observe(worker: RankWorker) -> None:
    """Streams and pipeline keep the methods that they were given."""
    loaded = worker.loaded
    loaded.stream.observe_uses(loaded.arrivals._used, loaded.arrivals._written_to)
    loaded.pipeline.observe_uses(loaded.arrivals.component_used)


def _show_requests(console: Console, found: list[tuple[Times, Times]]) -> None:
    table = Table(title=f"{len(found)} rounds: medians, ratios with where their median lies at 95%")
    for name in ("ms per step", "with checks", "without", "ratio", f"aim: at most {1 + STEP_AIM:.2f}"):
        table.add_column(name)
    for name, read in (("a step", lambda times: times.step_ms), ("the whole request", lambda times: times.whole_ms)):
        ratios = [read(on) / read(off) for on, off in found]
        medians = [f"{statistics.median(map(read, side)):.1f}" for side in zip(*found, strict=True)]
        table.add_row(name, *medians, _interval(ratios, ".3f"), verdict(ratios, 1 + STEP_AIM))
    console.print(table)


def _show_parts(console: Console, found: list[tuple[Times, Times]], parts: list[dict[str, float]]) -> None:
    plain_ms = statistics.median(off.step_ms for _, off in found)
    table = Table(title=f"of a step of {plain_ms:.0f} ms, the slower rank spends")
    for name in ("", "ms", "share of the step"):
        table.add_column(name, justify="left" if not name else "right")
    whole = [sum(of_request.values()) for of_request in parts]
    for name, spent in (("all", whole), *((f"  {name}", [each[name] for each in parts]) for name in parts[0])):
        table.add_row(name, _interval(spent, ".2f"), _interval([each / plain_ms for each in spent], ".2%"))
    console.print(table)
    shares = [each / plain_ms for each in whole]
    console.print(
        f"put together: {_interval(shares, '.2%')} of a step; aim {STEP_AIM:.0%}: {verdict(shares, STEP_AIM)}"
    )


if __name__ == "__main__":
    typer.run(main)
