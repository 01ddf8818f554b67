"""Per-step time of crossdock's HSDP against PyTorch's `fully_shard`: same model, two gloo ranks, one run.

    python tests/benchmarks/hsdp_vs_fsdp.py [--steps 2] [--rounds 5] [--tokens 256] [--json figures.json]

Two comparisons, each with the sides interleaved round by round, so that drift of a shared machine hits all:

- HSDP: blocks at home in `device_shard`, against `fully_shard` with forward prefetch;
- layerwise HSDP: blocks at home in `host_shard`, against `fully_shard` with `CPUOffloadPolicy`.

The model is a FLUX transformer with 283M parameters in fp32 (4 double-stream and 8 single-stream blocks). 256
image tokens are a 256 x 256 picture, the size that `crossdock generate` has as its default.

The peer runs twice: as documented, where on CPU every all-gather blocks the computing thread, because its
overlap comes from CUDA streams; and with the private `_set_unshard_async_op(True)`, which lets gloo's
threads gather while the block before computes. Its root group keeps the default `reshard_after_forward` and
so stays gathered, as the part outside the blocks is resident on our side.

`CPUOffloadPolicy(pin_memory=True)`, the default, needs an accelerator; with `pin_memory=False` it runs on a
CPU mesh. Its copy to the device is then no copy at all (the shard is there already), while ours copies
every byte.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from crossdock.offload.memory.copy_engine import make_copy_engine
from crossdock.offload.memory.layout import BlockLayout, aligned_bytes
from crossdock.offload.schedule.slots import assign_slots
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.loader import Gather
from crossdock.parallel.group import Group
from crossdock.parallel.hsdp import all_gather_bytes, shard_range

RANKS = 2
TIMEOUT_S = 120.0
"""For one collective."""
PREFETCH = 1
"""Blocks ahead, on every side; crossdock's default."""
TEXT_TOKENS = 64
AIM = 0.6
CONFIG = {
    "num_layers": 4,
    "num_single_layers": 8,
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "joint_attention_dim": 768,
    "pooled_projection_dim": 768,
}
CPU = torch.device("cpu")


# -- the model -------------------------------------------------------------------------------------


def make_inputs(tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, tokens, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 768, generator=generator),
        "pooled_projections": torch.randn(1, 768, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([torch.zeros(tokens), *_grid(tokens)], dim=1),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def _grid(tokens: int) -> tuple[Tensor, Tensor]:
    """Row and column of every image token, 16 tokens to a row."""
    place = torch.arange(tokens)
    return (place // 16).float(), (place % 16).float()


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Both stacks in execution order."""
    return {
        f"{stack}.{number}": block
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for number, block in enumerate(model.get_submodule(stack).children())
    }


# -- the sides -------------------------------------------------------------------------------------


def _nothing() -> None:
    """For a side with nothing to wait for or to close."""


@dataclass
class Side:
    """One way of running the model. `drain` waits for what was fetched ahead; the time includes it."""

    name: str
    model: nn.Module
    shard_bytes: int
    drain: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing
    peak_bytes: int = 0


def crossdock_side(name: str, plain: nn.Module, home: Home, rank: int, group: Group) -> Side:
    """Stream the blocks of a model built on meta, whose bytes are packed from those of `plain`."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**CONFIG).eval()
    sources = blocks_of(plain)
    outside = {
        fqn: tensor.clone()
        for fqn, tensor in plain.state_dict().items()
        if not fqn.startswith(tuple(f"{block}." for block in sources))
    }
    model.load_state_dict(outside, strict=False, assign=True)
    blocks = []
    for (fqn, block), source in zip(blocks_of(model).items(), sources.values(), strict=True):
        layout = BlockLayout.of(block, multiple=RANKS)
        blocks.append(StreamedBlock(fqn, block, layout, home, _shard(layout, source, rank)))
    engine = make_copy_engine(CPU, TIMEOUT_S)
    gather = Gather(RANKS, rank, lambda whole, shard: all_gather_bytes(whole, shard, group))
    stream = BlockStream(blocks, assign_slots(len(blocks), PREFETCH), CPU, engine, gather)
    stream.attach()

    def drain() -> None:
        for event in [engine.submit(lane, _nothing, ()) for lane in ("copy", "gather")]:  # lanes run in order
            engine.wait(event)

    return Side(name, model, sum(block.source.nbytes for block in blocks), drain, stream.remove)


def _shard(layout: BlockLayout, block: nn.Module, rank: int) -> Tensor:
    whole = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.pack(block, whole)
    start, stop = shard_range(layout.slot_bytes, RANKS, rank)
    mine = aligned_bytes(stop - start, CPU)
    mine.copy_(whole[start:stop])
    return mine


def fully_shard_side(name: str, plain: nn.Module, policy: OffloadPolicy, overlap: bool) -> Side:
    """`fully_shard` on every block and on the root, each block prefetching the one after it."""
    model = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (RANKS,))
    blocks: list[FSDPModule] = [
        fully_shard(block, mesh=mesh, reshard_after_forward=True, offload_policy=policy)  # type: ignore[misc]
        for block in blocks_of(model).values()
    ]
    root: FSDPModule = fully_shard(model, mesh=mesh, offload_policy=policy)
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + PREFETCH])
    if overlap:
        for module in (root, *blocks):
            module._set_unshard_async_op(True)
    local = (parameter.to_local() for parameter in model.parameters())  # type: ignore[attr-defined]
    return Side(name, model, sum(tensor.untyped_storage().nbytes() for tensor in local))


# -- measuring -------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Storages of all plain tensors of this process, each once. Of a DTensor, only the local part counts."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def peak_bytes(side: Side, inputs: dict[str, Tensor]) -> int:
    """The most live bytes seen when a block began, over one step; activations (a few MiB) included."""
    seen: list[int] = []
    blocks = blocks_of(side.model).values()
    handles = [block.register_forward_pre_hook(lambda *_: seen.append(live_bytes())) for block in blocks]
    run_step(side.model, inputs)
    side.drain()
    for handle in handles:
        handle.remove()
    return max(seen)


def run_step(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**inputs, return_dict=False)[0]
    return output


@dataclass
class Comparison:
    """`step_ms[side][round]`: a round's time, over its steps. The first side is ours."""

    title: str
    step_ms: dict[str, list[float]] = field(default_factory=dict)
    shard_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    bit_identical: bool = True

    def ratios(self, peer: str) -> list[float]:
        """Ours by `peer`, per round."""
        ours = next(iter(self.step_ms.values()))
        return [mine / theirs for mine, theirs in zip(ours, self.step_ms[peer], strict=True)]

    def figures(self) -> dict[str, Any]:
        """What the JSON file holds of it."""
        return asdict(self) | {"ratios": {peer: self.ratios(peer) for peer in self.peers}}

    @property
    def peers(self) -> list[str]:
        return list(self.step_ms)[1:]


def compare(
    title: str,
    makers: Sequence[Callable[[], Side]],
    inputs: dict[str, Tensor],
    expected: Tensor,
    steps: int,
    rounds: int,
) -> Comparison:
    """Build the sides, check each against `expected`, then time them round by round. Collective."""
    result, sides = Comparison(title), []
    for make in makers:
        gc.collect()
        before = live_bytes()
        sides.append(side := make())
        run_step(side.model, inputs)  # warm-up: the order of the blocks is learnt, lazy state is made
        result.peak_bytes[side.name] = peak_bytes(side, inputs) - before
        result.shard_bytes[side.name] = side.shard_bytes
        result.step_ms[side.name] = []
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            took_ms, output = _timed(side, inputs, steps)
            result.step_ms[side.name].append(took_ms)
            result.bit_identical &= torch.equal(output, expected)
    for side in sides:
        side.close()
    return result


def _timed(side: Side, inputs: dict[str, Tensor], steps: int) -> tuple[float, Tensor]:
    """Milliseconds per step, of the slower rank, fetching ahead included; and the last step's output."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        output = run_step(side.model, inputs)
    side.drain()
    took_ms = torch.tensor((time.perf_counter() - began) * 1e3 / steps)
    dist.all_reduce(took_ms, op=dist.ReduceOp.MAX)
    return round(float(took_ms), 1), output


# -- ranks -----------------------------------------------------------------------------------------


@torch.no_grad()
def run_rank(rank: int, folder: str, tokens: int, steps: int, rounds: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    limit = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=limit
    )
    group = Group(dist.new_group(list(range(RANKS)), timeout=limit))  # the weights' own communicator
    torch.manual_seed(0)
    plain = FluxTransformer2DModel(**CONFIG).eval().requires_grad_(False)
    inputs = make_inputs(tokens)
    expected = run_step(plain, inputs)
    results = []
    for title, home, peer, policy in (
        ("HSDP", Home.DEVICE_SHARD, "fully_shard", OffloadPolicy()),
        (
            "layerwise HSDP",
            Home.HOST_SHARD,
            "fully_shard, CPUOffloadPolicy",
            CPUOffloadPolicy(pin_memory=False),
        ),
    ):
        makers = _makers(title, peer, plain, home, policy, rank, group)
        results.append(compare(title, makers, inputs, expected, steps, rounds))
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps([asdict(result) for result in results]))
    dist.barrier()
    dist.destroy_process_group()


def _makers(
    title: str,
    peer: str,
    plain: nn.Module,
    home: Home,
    policy: OffloadPolicy,
    rank: int,
    group: Group,
) -> list[Callable[[], Side]]:
    return [
        lambda: crossdock_side(f"crossdock {title}", plain, home, rank, group),
        lambda: fully_shard_side(peer, plain, policy, overlap=False),
        lambda: fully_shard_side(f"{peer}, async unshard", plain, policy, overlap=True),
    ]


def run_ranks(tokens: int, steps: int, rounds: int, limit_s: float) -> list[Comparison]:
    """Spawn the ranks and wait for them, no longer than `limit_s`."""
    with tempfile.TemporaryDirectory(prefix="crossdock-benchmark-") as folder:
        context = mp.spawn(run_rank, (folder, tokens, steps, rounds), nprocs=RANKS, join=False)
        deadline = time.monotonic() + limit_s
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the ranks did not finish within {limit_s:g} s")
        finally:
            for process in context.processes:
                process.kill()
        return [Comparison(**figures) for figures in json.loads(Path(folder, "figures.json").read_text())]


# -- the report ------------------------------------------------------------------------------------


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def show(results: Iterable[Comparison], console: Console) -> None:
    """A table, then one line per ratio: stable text, for whoever greps."""
    table = Table("side", "step ms: median (min-max)", "shards MiB", "peak MiB", "output")
    results = list(results)
    for result in results:
        for side, step_ms in result.step_ms.items():
            sizes = (result.shard_bytes[side], result.peak_bytes[side])
            same = "bit-identical" if result.bit_identical else "[red]differs[/]"
            table.add_row(side, _spread(step_ms, 0), *(f"{size / 2**20:.0f}" for size in sizes), same)
        table.add_section()
    console.print(table)
    for result in results:
        for peer in result.peers:
            ratios = result.ratios(peer)
            verdict = "met" if statistics.median(ratios) <= AIM else "missed"
            line = f"{result.title} / {peer}: ratio {_spread(ratios, 2)}; aim {AIM} {verdict}"
            console.print(line, highlight=False, soft_wrap=True)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps per side and round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; a ratio is taken in each.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens; 256 are a 256 x 256 picture.")] = 256,
    limit: Annotated[float, typer.Option(help="Seconds after which the run is given up.")] = 1800.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time crossdock's HSDP against fully_shard; exit code 1 when an output differs."""
    results = run_ranks(tokens, steps, rounds, limit)
    console = Console(width=110)
    console.print(
        f"{tokens} image + {TEXT_TOKENS} text tokens, {RANKS} gloo ranks, one thread each, {rounds} rounds "
        f"of {steps} steps, prefetch {PREFETCH}",
        highlight=False,
        soft_wrap=True,
    )
    show(results, console)
    if json_path is not None:
        figures = [result.figures() for result in results]
        json_path.write_text(json.dumps({"tokens": tokens, "comparisons": figures}, indent=2) + "\n")
    if not all(result.bit_identical for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
