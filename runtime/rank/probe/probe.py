"""The probe: one denoise step with streaming and one without it, to be compared bit by bit, and the latter with that of
the unsharded model.

Without streaming every block, before it runs, is bound to fresh memory that was filled straight from the checkpoint's
files: neither the host store nor shards, slots or gathers are on that way. One block at a time, so that it also works
for a model that is larger than the device: the probe takes the memory of the largest block on top. On the rank that
runs the unsharded model, of the largest block as a whole, and of what lies outside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.offload.stream.block import StreamedBlock
from crossdock.runtime.contract.numbers import FINAL_LATENTS, not_called
from crossdock.runtime.models.inferred.spec import InferredSpec
from crossdock.runtime.models.transformers import build_transformers
from crossdock.runtime.pipeline.denoise_loop import StepEnd
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.rank.inspection import checksum, digest
from crossdock.runtime.rank.probe.calls import CallRecorder, tensors_in
from crossdock.runtime.rank.probe.deviations import deviations
from crossdock.runtime.rank.weights.load import WeightLoader
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import ProbeReport
from crossdock.runtime.request import GenerateRequest

_PROMPT = (
    "a small wooden boat on a calm lake, with an old man and a red dog in it, seen from the pier in the light of an "
    "autumn evening, while the first lamps are lit"
)
"""So much longer than the other one that where texts are padded to one length, some of it is padding."""
_NEGATIVE_PROMPT = "blurred"
_SIDE = 5
"""Image tokens along each side of the probe's picture; an odd number of them does not divide by the ranks."""
_MOST_STEPS = 32
"""With fewer, some transformer may not get its turn; with so many it has no turn at all."""


def probe_request(layout: ModelLayout) -> GenerateRequest:
    """One step of a small picture that has tokens for every rank of most layouts, with guidance where there is any."""
    side = _SIDE * layout.pixel_multiple
    spec = layout.spec
    fewest = spec.frame_counts[0] if spec.frame_counts else spec.chunk_frames or layout.frame_multiple + 1
    frames, negative = None if spec.fps is None else fewest, _NEGATIVE_PROMPT if spec.negative_prompt else None
    steps = 2 if isinstance(spec, InferredSpec) else 1  # there are pipelines that cannot make a single one
    return GenerateRequest.of(_PROMPT, negative_prompt=negative, steps=steps, height=side, width=side, frames=frames)


def probe_numbers(worker: RankWorker, request: GenerateRequest) -> ProbeReport:
    """Run the step of `request` twice, and the unsharded model's. Collective over the world; every replica computes the
    same picture.

    As many steps as it takes for every transformer to have one.

    Afterwards the rank serves requests as before; its slots are empty, as they are when another component had the
    memory.
    """
    loaded = worker.loaded
    try:
        on = _streamed(worker, request)
        while not_called(loaded.plan.layout, on) and request.steps < _MOST_STEPS:
            request = replace(request, steps=2 * request.steps)
            on = _streamed(worker, request)
        with (
            loaded.stream.suspended(),
            _weights_from_files(worker),
            CallRecorder(loaded.model, loaded.weights.blocks, loaded.pipeline.transformers) as recorded,
        ):
            off = _run(worker, request, recorded.end_step)
            shared_out = recorded.shared_out()
        worker.phase = "compare"
        alone = deviations(worker, recorded.calls, shared_out)
    finally:
        worker.phase = "idle"
    return ProbeReport(worker.rank, on, off, alone)


def _streamed(worker: RankWorker, request: GenerateRequest) -> tuple[tuple[str, int], ...]:
    with worker.loaded.stream.unrecorded():
        return _run(worker, request)


def _run(
    worker: RankWorker, request: GenerateRequest, end_step: Callable[[StepEnd], None] = lambda end: None
) -> tuple[tuple[str, int], ...]:
    """(block, checksum of what it returned) of each call, and at the end that of the latents."""
    worker.phase = "encode"
    loaded, calls = worker.loaded, list[tuple[str, list[Tensor]]]()

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # the digests stay on the device: to read one is to wait for it, and that would hide a wait that is missing
        calls.append((name, [digest(tensor) for tensor in tensors_in(output)]))

    with ExitStack() as hooks:
        for block in loaded.weights.blocks:
            hooks.callback(block.module.register_forward_hook(partial(note, block.name)).remove)
        done = loaded.pipeline.run(request.items, request, end_step)
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


def _combined(digests: list[Tensor]) -> int:
    return checksum(torch.stack(digests)) if digests else 0
