"""Time per step of layerwise streaming at several budgets, against the resident model and, on a GPU, against peers.

    python tests/benchmarks/layerwise.py [--size small|flux-dev] [--tokens 256 --tokens 1024] [--json figures.json]
    python tests/benchmarks/layerwise.py --budgets 10 --tokens 256

With `--budgets`, so many budgets from the least to the whole model, in equal steps, take the place of the usual ones
and of the peers: is each obeyed, and does a larger one never make a step slower?

`small` is the 283M-parameter FLUX transformer of `hsdp_vs_fsdp.py` in fp32; `flux-dev` has the shape of FLUX.1-dev
(11.9B parameters, bf16) with random weights, and needs a GPU that holds 24 GB for the resident side. All sides run in
one process with the same weights; every round runs the resident model right before each other side, so that a ratio
is taken between runs a few seconds apart. Peers (on a GPU; on a CPU they move nothing): diffusers' group offloading at
its settings, and accelerate's `cpu_offload`. It is an error when any side's output differs from the resident one's.

The peak is of the weights, observed in a step of its own (`observed_peak`); what the resident run adds while it
computes is left out. The aims: on a CPU a step takes at most 1.02 of the resident one; on a GPU the efficiency is at
least 0.97, and where copying takes less time than computing, no step is slower than the resident one.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from figures import spread, verdict
from hsdp_vs_fsdp import CONFIG, blocks_of, make_inputs, run_step
from observed_peak import PeakObserver, activations_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from crossdock.offload.live.discovery import discover_blocks
from crossdock.offload.live.offloader import LayerwiseOffloader, component_layouts
from crossdock.offload.memory.copy_engine import make_copy_engine
from crossdock.offload.memory.host_store import HostStore
from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.schedule.residency import minimum_bytes

STACKS = ("transformer_blocks", "single_transformer_blocks")
MIB = 2**20


class Size(StrEnum):
    SMALL = "small"
    FLUX_DEV = "flux-dev"


BUDGETS_MIB = {Size.SMALL: (None, 512, 768), Size.FLUX_DEV: (2 * 1024, 8 * 1024, 14 * 1024, 20 * 1024)}
"""None: as little as possible."""
TOKENS = {Size.SMALL: (256, 1024), Size.FLUX_DEV: (4096,)}
PREFETCH = 1
CPU_AIM = 1.02
"""Of the resident run's time."""
GPU_AIM = 0.97
"""Efficiency."""
GROUP_OFFLOADING: dict[str, dict[str, Any]] = {
    "1 block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "4 blocks": {"offload_type": "block_level", "num_blocks_per_group": 4},  # with a stream it takes 1
    "1 block, stream": {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True},
    "1 block, recorded stream": {
        "offload_type": "block_level",
        "num_blocks_per_group": 1,
        "use_stream": True,
        "record_stream": True,
    },
    "leaf, stream": {"offload_type": "leaf_level", "use_stream": True},
    "leaf, recorded stream": {"offload_type": "leaf_level", "use_stream": True, "record_stream": True},
}
"""What diffusers' group offloading is called with, by name."""
HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Its own, which stay on a model until they are removed."""


@dataclass
class Side:
    """What was measured of one way to run the model; times in ms per step, sizes in bytes.

    `budget_bytes` and `h2d_bytes` are only known of our own sides; a side without a budget takes as little as it can.
    """

    name: str
    budget_bytes: int | None = None
    step_ms: list[float] = field(default_factory=list)
    resident_ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    h2d_bytes: int | None = None
    identical: bool = False

    @property
    def ratios(self) -> list[float]:
        return [mine / resident for mine, resident in zip(self.step_ms, self.resident_ms, strict=True)]

    def slowdowns(self, copied_s: float) -> list[float]:
        """Per round the time of a step, by the longer of computing and copying: the inverse of the efficiency."""
        copy_ms = (self.h2d_bytes or 0) / copied_s * 1e3
        return [mine / max(resident, copy_ms) for mine, resident in zip(self.step_ms, self.resident_ms, strict=True)]

    def judge(self, copied_s: float, device: torch.device) -> str:
        """Whether the aims are met."""
        if self.h2d_bytes is None:
            return ""
        if device.type == "cpu":
            return verdict(self.ratios, CPU_AIM)
        found = [verdict(self.slowdowns(copied_s), 1 / GPU_AIM)]
        if self.h2d_bytes / copied_s * 1e3 < statistics.median(self.resident_ms):
            found.append(verdict(self.ratios, 1.0))
        return next((worse for worse in found if worse != "met"), "met")


def make_model(size: Size, device: torch.device) -> FluxTransformer2DModel:
    """The same weights on any device. The class has no buffers: rotary tables are made in forward."""
    small = size is Size.SMALL
    with torch.device("meta"):
        model = FluxTransformer2DModel(**(CONFIG if small else {"guidance_embeds": True}))
    model = model.to(torch.float32 if small else torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    source = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(source).manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.empty(parameter.shape, device=source).normal_(0, 0.02, generator=generator))
    return model


def inputs_for(size: Size, tokens: int, device: torch.device) -> dict[str, Tensor]:
    inputs, dtype = make_inputs(tokens), torch.float32 if size is Size.SMALL else torch.bfloat16
    if size is Size.FLUX_DEV:
        inputs |= {
            "encoder_hidden_states": torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(2)),
            "txt_ids": torch.zeros(512, 3),
            "guidance": torch.tensor([3.5]),
        }
    return {name: value.to(device, value.dtype if name.endswith("_ids") else dtype) for name, value in inputs.items()}


def equal_steps(model: Any, count: int) -> list[int]:
    """So many budgets in bytes, from the least that will do to the whole model."""
    layouts, rest = component_layouts(model, discover_blocks(model, STACKS))
    sizes = [layout.slot_bytes for layout in layouts]
    fixed = rest.slot_bytes + 2 * ALIGNMENT
    least, whole = fixed + minimum_bytes(sizes, (PREFETCH,)), fixed + sum(sizes)
    return [least + (whole - least) * number // max(count - 1, 1) for number in range(count)]


def own_name(budget: int | None) -> str:
    return "layerwise, least memory" if budget is None else f"layerwise, {budget / MIB:.0f} MiB"


@contextmanager
def layerwise(model: Any, device: torch.device, budget: int | None) -> Iterator[LayerwiseOffloader]:
    with LayerwiseOffloader(model, device, budget_bytes=budget, prefetch=PREFETCH, stacks=STACKS) as offloader:
        yield offloader


def time_steps(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Milliseconds per step."""
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize(device)
    return (time.perf_counter() - began) * 1e3 / steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Bytes per second from host memory as the block store has it to the device: the best of three."""
    store, engine = HostStore.create(256 * MIB), make_copy_engine(device)
    store.bytes.fill_(1)
    if device.type == "cuda":
        store.register()
    target = torch.empty(store.nbytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        engine.wait(engine.submit("copy", lambda: engine.move(target, store.bytes), ()))

    copy()
    fastest = min(time_steps(copy, 3, device) for _ in range(3))
    engine.close()
    store.close()
    return 256 * MIB / fastest * 1e3


def measure(
    side: Side,
    run: Callable[[], Tensor],
    run_resident: Callable[[], Tensor],
    rounds: int,
    steps: int,
    device: torch.device,
) -> None:
    """The order of the two turns round from one round to the next."""
    expected = run_resident()
    for _ in range(2):
        found = run()
    side.identical = torch.equal(found, expected)
    for number in range(rounds):
        pair = [(side.resident_ms, run_resident), (side.step_ms, run)]
        for times, step in pair if number % 2 == 0 else reversed(pair):
            times.append(time_steps(step, steps, device))


@contextmanager
def group_offloading(model: Any, device: torch.device, settings: dict[str, Any]) -> Iterator[None]:
    apply_group_offloading(model, onload_device=device, offload_device=torch.device("cpu"), **settings)
    try:
        yield
    finally:
        for name in HOOKS:
            model._diffusers_hook.remove_hook(name, recurse=True)
        model.to("cpu")


@torch.no_grad()
def main(
    size: Annotated[Size, typer.Option(help="Which model.")] = Size.SMALL,
    tokens: Annotated[list[int] | None, typer.Option(help="Image tokens; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps per side and round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; a ratio is taken in each.")] = 5,
    budgets: Annotated[int, typer.Option(min=0, help="Sweep so many budgets; 0: the usual ones, and peers.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="A part of the names of the sides to run; repeated.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time layerwise against resident; exit code 1 when any side's output is not bit-identical."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # on the CPU: one thread computes, the other core copies
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one compute thread"
    copied_s = bandwidth(device)
    print(f"{place}; {size}; host to device {copied_s / 2**30:.1f} GiB/s; {rounds} rounds of {steps} steps")
    resident = make_model(size, device)
    figures: dict[str, Any] = {"device": place, "size": size, "bandwidth": copied_s}
    differing: list[str] = []
    for count in tokens or TOKENS[size]:
        model = make_model(size, torch.device("cpu"))
        bench = Bench(resident, model, inputs_for(size, count, device), device, rounds, steps)
        own = [None if mib is None else mib * MIB for mib in BUDGETS_MIB[size]]
        todo = {own_name(budget): partial(bench.layerwise, budget) for budget in equal_steps(model, budgets) or own}
        if device.type == "cuda" and not budgets:
            todo |= bench.peers()
        sides = [run() for name, run in todo.items() if any(part in name for part in only or [""])]
        show(f"{count} image tokens", sides, copied_s, device)
        if budgets:
            print(falling(sides))
        differing += [side.name for side in sides if not side.identical]
        figures[str(count)] = [asdict(side) for side in sides]
        del bench, model, todo  # before the next is made
        gc.collect()
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if differing:
        print(f"the output differs from the resident run's: {', '.join(differing)}")
        raise typer.Exit(1)


@dataclass
class Bench:
    """One model resident, and the same once more for each side in turn, on the CPU in between."""

    resident: Any
    model: Any
    inputs: dict[str, Tensor]
    device: torch.device
    rounds: int
    steps: int

    def __post_init__(self) -> None:
        self.activations = activations_of(self._run_resident, self._blocks(self.resident), self.device)

    def layerwise(self, budget: int | None) -> Side:
        side = Side(own_name(budget), budget)
        observer = self._observer()
        with layerwise(self.model, self.device, budget) as offloader:
            counters = offloader.stream.counters
            for _ in range(2):
                self._run()
            offloader.reschedule()
            self._run()  # what stays is loaded
            before = counters.h2d_bytes
            self._run()
            side.h2d_bytes = counters.h2d_bytes - before
            return self._measured(side, observer)

    def peers(self) -> dict[str, Callable[[], Side]]:
        """Each with the other library's offloading; the last one uses `model` up."""
        return {
            **{f"diffusers, {name}": partial(self._group_offloading, name) for name in GROUP_OFFLOADING},
            "accelerate cpu_offload": self._cpu_offload,
        }

    def _group_offloading(self, name: str) -> Side:
        observer = self._observer()
        with group_offloading(self.model, self.device, GROUP_OFFLOADING[name]):
            return self._measured(Side(f"diffusers, {name}"), observer)

    def _cpu_offload(self) -> Side:
        observer = self._observer()
        cpu_offload(self.model, self.device)
        return self._measured(Side("accelerate cpu_offload"), observer)

    def _measured(self, side: Side, observer: PeakObserver) -> Side:
        measure(side, self._run, self._run_resident, self.rounds, self.steps, self.device)
        side.peak_bytes = observer.weights(self._run)
        gc.collect()
        print(f"{side.name}: {statistics.median(side.step_ms):.1f} ms, {spread(side.ratios, 3)}", flush=True)
        return side

    def _observer(self) -> PeakObserver:
        gc.collect()
        return PeakObserver(self.model, self._blocks(self.model), self.activations, self.device)

    @staticmethod
    def _blocks(model: Any) -> list[Any]:
        return list(blocks_of(model).values())

    def _run(self) -> Tensor:
        return run_step(self.model, self.inputs)

    def _run_resident(self) -> Tensor:
        return run_step(self.resident, self.inputs)


def show(title: str, sides: list[Side], copied_s: float, device: torch.device) -> None:
    table = Table(title=title)
    texts = ("side", "peak <= budget", "output", "aim")
    for column in (
        "side",
        "peak MiB",
        "peak <= budget",
        "copied MiB/step",
        "ms/step",
        "ratio to resident",
        "efficiency",
        "output",
        "aim",
    ):
        table.add_column(column, justify="left" if column in texts else "right")
    for side in sides:
        ours = side.h2d_bytes is not None
        table.add_row(
            side.name,
            f"{side.peak_bytes / MIB:.1f}",
            obeyed(side),
            f"{(side.h2d_bytes or 0) / MIB:.0f}" if ours else "",
            f"{statistics.median(side.step_ms):.1f}",
            spread(side.ratios, 3),
            f"{1 / statistics.median(side.slowdowns(copied_s)):.2f}" if ours else "",
            "bit-identical" if side.identical else "differs",
            side.judge(copied_s, device),
        )
    Console(width=170).print(table)


def obeyed(side: Side) -> str:
    if side.budget_bytes is None:
        return ""
    over = side.peak_bytes - side.budget_bytes
    return "yes" if over <= 0 else f"no: {over} bytes over"


def falling(sides: list[Side]) -> str:
    """Whether more memory never makes a step slower. The noise of a side: the least to the greatest of its ratios."""
    medians = [statistics.median(side.ratios) for side in sides]
    rise = max((later - earlier for earlier, later in combinations(medians, 2)), default=0.0)
    slower = [
        f"{more.name} after {less.name}" for less, more in combinations(sides, 2) if min(more.ratios) > max(less.ratios)
    ]
    noise = max(max(side.ratios) - min(side.ratios) for side in sides)
    held = sum(obeyed(side) == "yes" for side in sides)
    falls = "yes" if rise <= 0 else f"no: {'; '.join(slower)}" if slower else "within noise"
    return (
        f"budget obeyed: {held} of {len(sides)}; step time falls with the budget: {falls} "
        f"(largest rise of a median {max(rise, 0.0):.3f} of a resident step; widest min-max of one budget {noise:.3f})"
    )


if __name__ == "__main__":
    typer.run(main)
