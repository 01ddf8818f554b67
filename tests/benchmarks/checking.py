"""What watching and checking cost, with both on and off in one run.

    python tests/benchmarks/checking.py [--rounds 5] [--steps 4] [--size 256] [--heads 8]

Two Ray ranks on the CPU hold a FLUX.2-shaped pipeline (0.2B parameters in the transformer, 0.8B with 16 heads; fp32,
random), layerwise with tp 2. Before the first step: the sampled comparison with the checkpoint, the ranks' reports and
the verdict, against loading; the rehearsal is told apart, for it also brings the first blocks. In a request: the
coordinator's questions four times a second, the record of every collective, and the ranks' agreement at every step's
end, switched on and off in turn.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import Flux2Transformer2DModel
from rich.console import Console
from rich.table import Table

import crossdock.launch.ray_gang as ray_gang
from crossdock.launch.engine import Engine
from crossdock.runtime.config import RunConfig
from crossdock.runtime.coordinator import Coordinator
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import RankReport
from crossdock.runtime.tiny_checkpoint import make_checkpoint
from crossdock.runtime.worker import RankWorker

SHAPE = {"num_layers": 3, "num_single_layers": 9, "attention_head_dim": 128, "axes_dims_rope": (32, 32, 32, 32)}


def main(
    rounds: Annotated[int, typer.Option(min=0, help="Rounds; in each, a request with and one without.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Denoise steps of a request.")] = 4,
    size: Annotated[int, typer.Option(min=64, help="Pixels of the picture's sides.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the transformer, 128 wide.")] = 8,
) -> None:
    """Time loading and requests with and without checks."""
    console = Console()
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}})
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        make_large_checkpoint(directory, heads)
        with Engine.start(config, directory) as engine:
            _show_load(console, _load_again(engine))
            if rounds:
                _show_requests(console, _requests(engine, rounds, steps, size))


def make_large_checkpoint(directory: Path, heads: int) -> None:
    """A FLUX.2 pipeline whose transformer is large enough for its load to count."""
    make_checkpoint("flux2-klein", directory)
    tiny = Flux2Transformer2DModel.from_pretrained(directory / "transformer")
    large = Flux2Transformer2DModel.from_config({**tiny.config, **SHAPE, "num_attention_heads": heads})
    shutil.rmtree(directory / "transformer")
    large.save_pretrained(directory / "transformer")


def _load_again(engine: Engine) -> list[dict[str, float]]:
    """Per rank, the parts of a second setup: files in the page cache, libraries imported."""

    def timed_setup(worker: RankWorker, plan: RunPlan) -> tuple[RankReport, dict[str, float]]:
        from crossdock.runtime.arrival import rehearse

        def least(*works: Callable[[], Any]) -> list[float]:
            times: list[list[float]] = [[] for _ in works]
            for _ in range(5):
                for work, found in zip(works, times, strict=True):
                    worker.engine.drain()
                    began = time.perf_counter()
                    work()
                    found.append(time.perf_counter() - began)
            return [min(found) for found in times]

        report = worker.setup(plan)
        plain, compared, reported = least(
            lambda: worker.stream.rehearse(lambda *_: None),
            lambda: rehearse(plan, worker.rank, worker.model, worker.stream),
            worker.report,
        )
        return report, {"load": worker.load_s, "rehearsal": plain, "comparison": compared - plain, "report": reported}

    engine.gang.call(RankWorker.teardown, timeout_s=60)
    timed = engine.gang.call(timed_setup, engine.plan, timeout_s=300)
    began = time.perf_counter()
    Coordinator(engine.plan).admit([report for report, _ in timed])
    verdict = time.perf_counter() - began
    return [times | {"verdict": verdict} for _, times in timed]


def _requests(engine: Engine, rounds: int, steps: int, size: int) -> dict[str, list[float]]:
    """Mean step time in ms, of the slower rank, per round."""
    found: dict[str, list[float]] = {"checked": [], "unchecked": []}
    engine.generate("warm up", steps=2, height=size, width=size)
    for number in range(rounds):
        sides = list(found) if number % 2 else list(found)[::-1]
        for side in sides:
            with _checks(engine, on=side == "checked"):
                report = engine.generate("a lighthouse", steps=steps, height=size, width=size).report
            found[side].append(max(statistics.mean(row["step_ms"]) for row in report["ranks"]))
    return found


@contextmanager
def _checks(engine: Engine, on: bool) -> Iterator[None]:
    def switch_off(worker: RankWorker) -> None:
        from crossdock.parallel.group import Group
        from crossdock.runtime.stopping import Stopping

        worker.switched: Any = (Group._begin, Stopping.agree)  # type: ignore[misc, attr-defined]
        Group._begin = lambda *_: None  # type: ignore[method-assign]
        Stopping.agree = lambda *_: None  # type: ignore[method-assign]

    def switch_on(worker: RankWorker) -> None:
        from crossdock.parallel.group import Group
        from crossdock.runtime.stopping import Stopping

        Group._begin, Stopping.agree = worker.switched  # type: ignore[method-assign, attr-defined]

    if on:
        yield
        return
    every = ray_gang._ASK_EVERY_S
    engine.gang.call(switch_off, timeout_s=60)
    ray_gang._ASK_EVERY_S = 1e6
    try:
        yield
    finally:
        ray_gang._ASK_EVERY_S = every
        engine.gang.call(switch_on, timeout_s=60)


def _show_load(console: Console, ranks: list[dict[str, float]]) -> None:
    table = Table(title="before the first step, seconds")
    for name in ("rank", *ranks[0], "checks / load"):
        table.add_column(name)
    for rank, times in enumerate(ranks):
        share = (times["comparison"] + times["report"] + times["verdict"]) / times["load"]
        table.add_row(str(rank), *(f"{seconds:.3f}" for seconds in times.values()), f"{share:.1%}")
    console.print(table)


def _show_requests(console: Console, found: dict[str, list[float]]) -> None:
    ratios = [on / off for on, off in zip(found["checked"], found["unchecked"], strict=True)]
    medians = {side: statistics.median(times) for side, times in found.items()}
    console.print(f"a step with checks {medians['checked']:.1f} ms, without {medians['unchecked']:.1f} ms")
    console.print(f"ratio: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


if __name__ == "__main__":
    typer.run(main)
