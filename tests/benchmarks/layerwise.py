"""Time per step of layerwise streaming at several budgets, against the resident model and, on a GPU, against peers.

    python tests/benchmarks/layerwise.py [--size small|flux-dev] [--tokens 256 --tokens 1024] [--json figures.json]

`small` is the 283M-parameter FLUX transformer of `hsdp_vs_fsdp.py` in fp32; `flux-dev` has the shape of FLUX.1-dev
(11.9B parameters, bf16) with random weights, and needs a GPU that holds 24 GB for the resident side. All sides run in
one process with the same weights; every round runs the resident model right before each other side, so that a ratio
is taken between runs a few seconds apart. Peers (on a GPU; on a CPU they move nothing): diffusers' group offloading
with streams, and accelerate's `cpu_offload`.
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
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from hsdp_vs_fsdp import CONFIG, make_inputs, run_step
from rich.console import Console
from rich.table import Table
from torch import Tensor

from crossdock.offload.copy_engine import make_copy_engine
from crossdock.offload.host_store import HostStore
from crossdock.offload.offloader import LayerwiseOffloader

STACKS = ("transformer_blocks", "single_transformer_blocks")
MIB = 2**20


class Size(StrEnum):
    SMALL = "small"
    FLUX_DEV = "flux-dev"


BUDGETS_MIB = {Size.SMALL: (None, 512, 768), Size.FLUX_DEV: (2 * 1024, 8 * 1024, 14 * 1024, 20 * 1024)}
"""None: as little as possible."""
TOKENS = {Size.SMALL: (256, 1024), Size.FLUX_DEV: (4096,)}


@dataclass
class Side:
    """What was measured of one way to run the model; times in ms per step, sizes in bytes."""

    name: str
    step_ms: list[float] = field(default_factory=list)
    resident_ms: list[float] = field(default_factory=list)
    weight_bytes: int = 0
    h2d_bytes: int = 0
    identical: bool = False

    @property
    def ratios(self) -> list[float]:
        return [mine / resident for mine, resident in zip(self.step_ms, self.resident_ms, strict=True)]


def make_model(size: Size) -> FluxTransformer2DModel:
    """On the CPU; the same seed gives the same weights. The class has no buffers: rotary tables are made in forward."""
    small = size is Size.SMALL
    with torch.device("meta"):
        model = FluxTransformer2DModel(**(CONFIG if small else {"guidance_embeds": True}))
    model = model.to(torch.float32 if small else torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
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


@contextmanager
def layerwise(model: Any, device: torch.device, budget_mib: int | None) -> Iterator[LayerwiseOffloader]:
    budget = None if budget_mib is None else budget_mib * MIB
    with LayerwiseOffloader(model, device, budget_bytes=budget, stacks=STACKS) as offloader:
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


def peers(model: Any, device: torch.device) -> Iterator[tuple[str, Any]]:
    """(name, model) one after the other, each with the other library's offloading; `model` is used up."""
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=True,
    )
    yield "diffusers group offloading", model
    model._diffusers_hook.remove_hook("group_offloading", recurse=True)
    yield "accelerate cpu_offload", cpu_offload(model.to("cpu"), device)


@torch.no_grad()
def main(
    size: Annotated[Size, typer.Option(help="Which model.")] = Size.SMALL,
    tokens: Annotated[list[int] | None, typer.Option(help="Image tokens; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps per side and round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; a ratio is taken in each.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time layerwise against resident; exit code 1 when an output of ours is not bit-identical."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # on the CPU: one thread computes, the other core copies
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one compute thread"
    copied_s = bandwidth(device)
    print(f"{place}; {size}; host to device {copied_s / 2**30:.1f} GiB/s; {rounds} rounds of {steps} steps")
    resident = make_model(size).to(device)
    figures: dict[str, Any] = {"device": place, "size": size, "bandwidth": copied_s}
    failed = False
    for count in tokens or TOKENS[size]:
        inputs = inputs_for(size, count, device)
        sides = _sides(size, inputs, resident, rounds, steps, device)
        show(f"{count} image tokens", sides, copied_s)
        failed |= any(not side.identical for side in sides if side.name.startswith("layerwise"))
        figures[str(count)] = [asdict(side) for side in sides]
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if failed:
        raise typer.Exit(1)


def _sides(
    size: Size, inputs: dict[str, Tensor], resident: Any, rounds: int, steps: int, device: torch.device
) -> list[Side]:
    sides, model = [], make_model(size)

    def against_resident(side: Side, other: Any) -> None:
        run, run_resident = lambda: run_step(other, inputs), lambda: run_step(resident, inputs)
        measure(side, run, run_resident, rounds, steps, device)
        sides.append(side)

    for budget in BUDGETS_MIB[size]:
        side = Side("layerwise, least memory" if budget is None else f"layerwise, {budget} MiB")
        with layerwise(model, device, budget) as offloader:
            run_step(model, inputs)
            before = offloader.stream.counters.h2d_bytes
            run_step(model, inputs)
            side.h2d_bytes = offloader.stream.counters.h2d_bytes - before
            side.weight_bytes = offloader.stream.arena.nbytes + offloader.stream.resident_memory["(outside)"].nbytes
            against_resident(side, model)
    for name, other in peers(model, device) if device.type == "cuda" else ():
        against_resident(Side(name), other)
    del model
    gc.collect()
    return sides


def show(title: str, sides: list[Side], copied_s: float) -> None:
    """Efficiency: the longer of computing and copying, by the time it took."""
    table = Table(title=title)
    for column in ("side", "weights MiB", "copied MiB/step", "ms/step", "ratio to resident", "efficiency", "output"):
        table.add_column(column, justify="left" if column in ("side", "output") else "right")
    for side in sides:
        compute = statistics.median(side.resident_ms)
        least = max(compute, side.h2d_bytes / copied_s * 1e3)
        low, high = min(side.ratios), max(side.ratios)
        table.add_row(
            side.name,
            f"{side.weight_bytes / MIB:.0f}" if side.weight_bytes else "",
            f"{side.h2d_bytes / MIB:.0f}" if side.h2d_bytes else "",
            f"{statistics.median(side.step_ms):.1f}",
            f"{statistics.median(side.ratios):.3f} ({low:.3f}-{high:.3f})",
            f"{least / statistics.median(side.step_ms):.2f}" if side.weight_bytes else "",
            "bit-identical" if side.identical else "differs",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
