"""The probe: one denoise step with streaming and one without it, to be compared bit by bit.

Without streaming every block, before it runs, is bound to fresh memory that was filled straight from the checkpoint's
files: neither the host store nor shards, slots or gathers are on that way. One block at a time, so that it also works
for a model that is larger than the device: the probe takes the memory of the largest block on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.offload.stream.block import StreamedBlock
from crossdock.runtime.contract.numbers import FINAL_LATENTS, not_called
from crossdock.runtime.models.transformers import build_transformers
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.rank.inspection import checksum, digest
from crossdock.runtime.rank.weights.load import WeightLoader
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import ProbeReport
from crossdock.runtime.request import GenerateRequest

_PROMPT = "a small wooden boat on a calm lake"
_SIDE = 4
"""Image tokens along each side of the probe's picture."""
_MOST_STEPS = 32
"""With fewer, some transformer may not get its turn; with so many it has no turn at all."""


def probe_request(layout: ModelLayout) -> GenerateRequest:
    """One step of a picture that is as small as it can be and still has tokens for every rank of most layouts."""
    side = _SIDE * layout.pixel_multiple
    spec = layout.spec
    fewest = spec.frame_counts[0] if spec.frame_counts else spec.chunk_frames or layout.frame_multiple + 1
    return GenerateRequest.of(_PROMPT, steps=1, height=side, width=side, frames=None if spec.fps is None else fewest)


def probe_numbers(worker: RankWorker, request: GenerateRequest) -> ProbeReport:
    """Run the step of `request` twice. Collective over the world; every replica computes the same picture.

    As many steps as it takes for every transformer to have one.

    Afterwards the rank serves requests as before; its slots are empty, as they are when another component had the
    memory.
    """
    try:
        on = _streamed(worker, request)
        while not_called(worker.loaded.plan.layout, on) and request.steps < _MOST_STEPS:
            request = replace(request, steps=2 * request.steps)
            on = _streamed(worker, request)
        with worker.loaded.stream.suspended(), _weights_from_files(worker):
            off = _run(worker, request)
    finally:
        worker.phase = "idle"
    return ProbeReport(worker.rank, on, off)


def _streamed(worker: RankWorker, request: GenerateRequest) -> tuple[tuple[str, int], ...]:
    with worker.loaded.stream.unrecorded():
        return _run(worker, request)


def _run(worker: RankWorker, request: GenerateRequest) -> tuple[tuple[str, int], ...]:
    """(block, checksum of what it returned) of each call, and at the end that of the latents."""
    worker.phase = "encode"
    loaded, calls = worker.loaded, list[tuple[str, list[Tensor]]]()

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # the digests stay on the device: to read one is to wait for it, and that would hide a wait that is missing
        calls.append((name, [digest(tensor) for tensor in _tensors(output)]))

    with ExitStack() as hooks:
        for block in loaded.weights.blocks:
            hooks.callback(block.module.register_forward_hook(partial(note, block.name)).remove)
        done = loaded.pipeline.run(request.items, request, lambda finished: None)
    return (*((name, _combined(digests)) for name, digests in calls), (FINAL_LATENTS, checksum(done.latents)))


@contextmanager
def _weights_from_files(worker: RankWorker) -> Iterator[None]:
    """Every block runs with its own copy of the checkpoint's bytes, which exists as long as it runs."""
    loaded, plan, layout = worker.loaded, worker.loaded.plan, worker.loaded.plan.layout
    planned = {block.name: block for block in plan.memory.blocks}
    fresh = build_transformers(layout.spec.transformer, layout.model_dir, layout.transformers)
    # has the buffers that no file holds
    loader = WeightLoader(plan, loaded.mesh, fresh, worker.device)

    with ExitStack() as cleanup, ExitStack() as bound:
        cleanup.callback(loader.close)

        def before(block: StreamedBlock, *_: Any) -> None:
            bound.enter_context(block.bound_to(loader.read_block(planned[block.name])))

        def after(*_: Any) -> None:
            bound.close()

        for block in loaded.weights.blocks:
            cleanup.callback(block.module.register_forward_pre_hook(partial(before, block)).remove)
            cleanup.callback(block.module.register_forward_hook(after, always_call=True).remove)
        yield


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in what a module returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | Sequence) and not isinstance(output, str):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _combined(digests: list[Tensor]) -> int:
    return checksum(torch.stack(digests)) if digests else 0
