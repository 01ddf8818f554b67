"""Time per step of layerwise streaming against the resident model, on one device: same weights, one run.

    python tests/benchmarks/layerwise.py [--size small|flux-dev] [--steps 3] [--rounds 5] [--json figures.json]

The sides take turns round by round, so that drift of a shared machine hits both. `small` is the 283M-parameter FLUX
transformer of `hsdp_vs_fsdp.py` in fp32; `flux-dev` has the shape of FLUX.1-dev (11.9B parameters, bf16, 4,096 image
tokens: 1024 x 1024) with random weights, and needs a GPU that holds 24 GB for the resident side.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from hsdp_vs_fsdp import CONFIG, blocks_of, make_inputs, run_step
from torch import nn

from crossdock.offload.block import Home, StreamedBlock
from crossdock.offload.block_stream import BlockStream
from crossdock.offload.copy_engine import make_copy_engine
from crossdock.offload.host_store import HostStore
from crossdock.offload.layout import BlockLayout, aligned_bytes
from crossdock.offload.schedule import assign_slots


class Size(StrEnum):
    SMALL = "small"
    FLUX_DEV = "flux-dev"


FLUX_DEV_CONFIG: dict[str, Any] = {"guidance_embeds": True}
"""The class's defaults are FLUX.1-dev's: 19 + 38 blocks, 24 heads of 128."""


def make_side(config: dict[str, Any], dtype: torch.dtype, device: torch.device, home: Home) -> tuple[Any, BlockStream]:
    """A model whose outside is on `device`, and the stream of its blocks; the same seed gives the same weights."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config).eval().to(dtype)
    blocks = blocks_of(model)
    generator = torch.Generator().manual_seed(0)
    for fqn, parameter in list(model.named_parameters()):
        if not fqn.startswith(tuple(f"{name}." for name in blocks)):
            _fill_outside(model, fqn, parameter, generator, device)
    layouts = {name: BlockLayout.of(block) for name, block in blocks.items()}
    store, offset, streamed = HostStore.create(sum(layout.nbytes for layout in layouts.values())), 0, []
    for name, layout in layouts.items():
        host = store.bytes[offset : offset + layout.nbytes]
        for entry in layout.entries:
            entry.view(host).normal_(0, 0.02, generator=generator)
        source = host if home is Home.HOST else aligned_bytes(layout.nbytes, device).copy_(host)
        streamed.append(StreamedBlock(name, blocks[name], layout, home, source))
        offset += layout.nbytes
    if device.type == "cuda" and home is Home.HOST:
        store.register()
    schedule = assign_slots(len(streamed) if home is Home.HOST else 0, prefetch=1)
    stream = BlockStream(streamed, schedule, device, make_copy_engine(device))
    stream.attach()
    return model, stream


def _fill_outside(
    model: nn.Module, fqn: str, parameter: nn.Parameter, generator: torch.Generator, device: torch.device
) -> None:
    path, _, leaf = fqn.rpartition(".")
    value = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(0, 0.02, generator=generator)
    setattr(model.get_submodule(path), leaf, nn.Parameter(value.to(device), requires_grad=False))


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


@torch.no_grad()
def main(
    size: Annotated[Size, typer.Option(help="Which model.")] = Size.SMALL,
    steps: Annotated[int, typer.Option(min=1, help="Steps per side and round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; a ratio is taken in each.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time layerwise against resident; exit code 1 when the outputs are not bit-identical."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # on the CPU: one thread computes, the other core copies
    small = size is Size.SMALL
    dtype = torch.float32 if small else torch.bfloat16
    inputs = make_inputs(256 if small else 4096)
    if not small:
        inputs |= {
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "txt_ids": torch.zeros(512, 3),
            "guidance": torch.tensor([3.5]),
        }
    inputs = {name: value.to(device, value.dtype if name.endswith("_ids") else dtype) for name, value in inputs.items()}
    config = CONFIG if small else FLUX_DEV_CONFIG
    sides = {name: make_side(config, dtype, device, home) for name, home in _HOMES.items()}
    outputs = {name: run_step(model, inputs) for name, (model, _) in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            model = sides[name][0]
            times[name].append(time_steps(lambda model=model: run_step(model, inputs), steps, device))
    ratios = [layerwise / resident for layerwise, resident in zip(times["layerwise"], times["resident"], strict=True)]
    slots = sum(memory.nbytes for memory in sides["layerwise"][1].slot_memory)
    blocks = sum(block.layout.nbytes for block in sides["resident"][1].blocks)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one compute thread"
    identical = torch.equal(outputs["layerwise"], outputs["resident"])
    print(f"{place}, {size}, {rounds} rounds of {steps} steps")
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.1f} ms per step")
    print(f"layerwise / resident: median {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    print(f"block bytes on the device: {slots / 2**20:.0f} MiB instead of {blocks / 2**20:.0f} MiB")
    print("outputs bit-identical" if identical else "outputs DIFFER")
    if json_path is not None:
        figures = {"device": place, "size": size, "step_ms": times, "ratios": ratios, "slot_bytes": slots}
        json_path.write_text(json.dumps(figures | {"block_bytes": blocks}, indent=2) + "\n")
    for _, stream in sides.values():
        stream.remove()
    if not identical:
        raise typer.Exit(1)


_HOMES = {"resident": Home.RESIDENT, "layerwise": Home.HOST}

if __name__ == "__main__":
    typer.run(main)
