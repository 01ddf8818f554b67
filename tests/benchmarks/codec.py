"""What the lossless code saves and costs: bytes and seconds of it alone, and of steps and loads with it and without.

    python tests/benchmarks/codec.py [--rounds 5] [--steps 3] [--size 256] [--heads 8]

Alone: a block of normal weights in bf16, on one thread, beside a plain copy and, where `zstandard` is installed, zstd
at its fastest. Published for the same bytes: DFloat11 0.70 of them (arXiv:2504.11651), ZipNN 0.67 (arXiv:2411.05239).

Steps: one rank in this process with one compute thread streams a FLUX.2-shaped transformer in bf16 (0.2B parameters
with 8 heads), layerwise, encoded and not, in turn; the latents have to be equal. The bytes are those of its report.
Loads: of the checkpoint as it is, encoded at load, and of the packed one, whose writing is timed as well; the files are
in the page cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from checking import make_large_checkpoint
from figures import spread, verdict

from crossdock.offload.codecs.lossless import Lossless
from crossdock.offload.memory.layout import BlockLayout
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.weights.pack_checkpoint import pack_checkpoint
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.request import GenerateRequest, RankRequest

BYTES_AIM, STEP_AIM = 0.76, 1.02
CODECS = "none", "lossless"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of each side, in turn.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Denoise steps of a request.")] = 3,
    size: Annotated[int, typer.Option(min=64, help="Pixels of the picture's sides.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of the transformer, 128 wide.")] = 8,
) -> None:
    """Time the code."""
    torch.set_num_threads(1)
    _alone(rounds)
    with tempfile.TemporaryDirectory() as name:
        model, packed = Path(name) / "model", Path(name) / "packed"
        make_large_checkpoint(model, heads, torch.bfloat16)
        packed.mkdir()
        began = time.perf_counter()
        before, after = pack_checkpoint(model, packed, ["transformer"], lambda *_: None)
        print(f"packing {before / 1e9:.2f} GB: {time.perf_counter() - began:.2f} s; {after / before:.4f} of its bytes")
        _loaded(packed, "lossless", "packed").teardown()
        _in_a_run(model, rounds, steps, size)


# -- alone -----------------------------------------------------------------------------------------------------------


def _alone(rounds: int) -> None:
    module = torch.nn.Linear(6144, 6144, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.copy_(torch.randn(6144, 6144, generator=torch.Generator().manual_seed(0)) * 0.02)
    layout, codec = BlockLayout.of(module), Lossless()
    raw = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.pack(module, raw)
    slot, held = torch.empty_like(raw), codec.encode(layout, 1, 0, raw)
    ratio = len(held) / len(raw)
    print(f"a block of {len(raw) / 2**20:.0f} MiB: {ratio:.4f} of its bytes", flush=True)
    _rate("plain copy", lambda: slot.copy_(raw), len(raw), rounds)
    _rate("encode", lambda: codec.encode(layout, 1, 0, raw), len(raw), rounds)
    _rate("decode", lambda: codec.decode(layout, 1, 0, held, slot), len(raw), rounds)
    assert torch.equal(slot, raw)
    try:
        import zstandard
    except ImportError:
        print("zstd: zstandard is not installed")
        return
    content = raw.numpy().tobytes()
    packed = zstandard.ZstdCompressor(level=1).compress(content)
    print(f"zstd: {len(packed) / len(raw):.4f} of its bytes")
    _rate("zstd encode", lambda: zstandard.ZstdCompressor(level=1).compress(content), len(raw), rounds)
    _rate("zstd decode", lambda: zstandard.ZstdDecompressor().decompress(packed), len(raw), rounds)


def _rate(name: str, work: Callable[[], Any], nbytes: int, rounds: int) -> None:
    rates = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        rates.append(nbytes / (time.perf_counter() - began) / 1e9)
    print(f"{name}: {spread(rates[1:], 2)} GB/s of what computes", flush=True)


# -- in a run --------------------------------------------------------------------------------------------------------


def _in_a_run(model: Path, rounds: int, steps: int, size: int) -> None:
    """Both are loaded at once; requests in turn."""
    workers = {codec: _loaded(model, codec) for codec in CODECS}
    asked = GenerateRequest.of("a lighthouse", steps=steps, height=size, width=size)
    found: dict[str, list[Any]] = {codec: [] for codec in CODECS}
    for number in range(rounds + 1):
        for codec in CODECS if number % 2 else CODECS[::-1]:
            workers[codec].coordinator.review([result := workers[codec].generate(RankRequest(asked, number + 1))])
            found[codec].append(result)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(*found.values(), strict=True))
    plain, encoded = (results[1:] for results in found.values())
    for figure in ("host_bytes", "h2d_bytes_per_step"):
        shares = [
            getattr(other.measurements, figure) / getattr(one.measurements, figure)
            for one, other in zip(plain, encoded, strict=True)
        ]
        print(f"{figure}: {spread(shares, 3)} of plain; aim {BYTES_AIM}: {verdict(shares, BYTES_AIM)}")
    times = {codec: [_step_ms(result) for result in results[1:]] for codec, results in found.items()}
    ratios = [other / one for one, other in zip(*times.values(), strict=True)]
    print(f"a step: plain {spread(times['none'], 0)} ms, encoded {spread(times['lossless'], 0)}", end="; ")
    print(f"ratio {spread(ratios, 3)}; aim {STEP_AIM}: {verdict(ratios, STEP_AIM)}; latents equal")
    decoding = [sum(block.decode_ms for block in result.measurements.blocks.values()) / steps for result in encoded]
    print(f"decoding, beside it: {spread(decoding, 0)} ms of a step")
    for worker in workers.values():
        worker.teardown()


def _loaded(model: Path, codec: str, name: str = "") -> Any:
    config = {"dtype": "bfloat16", "offload": {"layerwise": True, "codec": codec}}
    plan = make_plan(RunConfig.parse(config), model, "cpu")
    worker: Any = RankWorker(0, 1, torch.device("cpu"))
    torch.set_num_threads(1)
    loads = []
    for _ in range(2):  # the first brings the files to the page cache
        worker.teardown()
        worker.coordinator = Coordinator(plan)
        worker.coordinator.admit([worker.setup(plan)], rehearsed=False)
        loads.append(worker.loaded.load_s)
    print(f"a load, {name or codec}: {loads[-1]:.2f} s", flush=True)
    return worker


def _step_ms(result: Any) -> float:
    return statistics.median(result.measurements.step_ms)


if __name__ == "__main__":
    typer.run(main)
