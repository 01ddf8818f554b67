"""Faults in the steps of a request, to be planted in a rank that has a model; see `test_steps`.

A plant runs on the rank, before the request; it takes effect in step `at`, or when step `at - 1` has ended. Ranks
cannot import this module: its functions are pickled by value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossdock.offload.stream.loader import BlockLoader
from crossdock.runtime.pipeline import replicate
from crossdock.runtime.pipeline.denoise_loop import DenoiseLoop
from crossdock.runtime.pipeline.pipeline import RankPipeline
from crossdock.runtime.rank.worker import RankWorker

Plant = Callable[[RankWorker, pytest.MonkeyPatch, int], None]
BLOCK, NEXT = "single_transformer_blocks.2", "single_transformer_blocks.3"
OUTSIDE = "x_embedder.weight"


def runs(worker: RankWorker, at: int) -> bool:
    """Step `at` of the request does."""
    state = worker._state
    return state is not None and state.log.running == at


def block_of(worker: RankWorker, name: str = BLOCK) -> Any:
    return next(block for block in worker.loaded.stream.blocks if block.name == name)


def _hooked(patch: pytest.MonkeyPatch, handle: Any) -> None:
    """Taken off when the patches are undone."""
    ids = handle.hooks_dict_ref()
    hook = ids.pop(handle.id)
    patch.setitem(ids, handle.id, hook)


def _when(worker: RankWorker, patch: pytest.MonkeyPatch, at: int, act: Callable[[Any], None]) -> None:
    """`act(pipe)` when step `at` ends, before anybody looks at it."""
    tick = DenoiseLoop.tick

    def ticked(loop: DenoiseLoop, pipe: Any, *args: Any) -> Any:
        if runs(worker, at):
            act(pipe)
        return tick(loop, pipe, *args)

    patch.setattr(DenoiseLoop, "tick", ticked)


def nan_in_block(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    def spoil(module: nn.Module, args: Any, output: Tensor) -> Any:
        if runs(worker, at):
            output[..., -1, 0] = torch.nan
        return output

    _hooked(patch, block_of(worker).module.register_forward_hook(spoil))


def infinite_embeddings(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _embeddings(worker, patch, at, lambda embeddings: embeddings[..., -1, 0].fill_(torch.inf))


def latents(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The last bit of one number."""
    tick = DenoiseLoop.tick

    def ticked(loop: DenoiseLoop, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if runs(worker, at):
            number = tensors["latents"][..., 0, 0]
            number.copy_(torch.nextafter(number, torch.full_like(number, torch.inf)))
        return tick(loop, pipe, step, timestep, tensors)

    patch.setattr(DenoiseLoop, "tick", ticked)


def embeddings(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _embeddings(worker, patch, at, lambda embeddings: embeddings[..., -1, 0].add_(1e-3))


def _embeddings(worker: RankWorker, patch: pytest.MonkeyPatch, at: int, change: Callable[[Tensor], Any]) -> None:
    """As they arrive, or in place when the step before `at` ends."""
    broadcast, got = replicate._broadcast, list[Tensor]()

    def delivered(*args: Any) -> Any:
        value = broadcast(*args)
        got.append(value[0])
        if at == 1:
            change(value[0])
        return value

    patch.setattr(replicate, "_broadcast", delivered)
    _when(worker, patch, at - 1, lambda pipe: [change(each) for each in got])


def seeds(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    run = RankPipeline.run

    def other(pipeline: RankPipeline, items: Any, *args: Any) -> Any:
        return run(pipeline, [replace(item, seed=item.seed + 1) for item in items], *args)

    patch.setattr(RankPipeline, "run", other)


def timesteps(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _when(worker, patch, at, lambda pipe: pipe.scheduler.timesteps[-1:].mul_(1.01))


def sigmas(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _when(worker, patch, at, lambda pipe: pipe.scheduler.sigmas[-2:-1].mul_(1.01))


def guidance(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _when(worker, patch, at, lambda pipe: setattr(pipe, "_guidance_scale", 3.5))


def outside_weight(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    weight = worker.loaded.model.get_parameter(OUTSIDE).data
    patch.setattr(worker, "weight_before", weight.clone(), raising=False)
    _when(worker, patch, at, lambda pipe: weight[0, :4].mul_(1.5))


def put_back(worker: RankWorker) -> None:
    """What `outside_weight` changed."""
    before = getattr(worker, "weight_before", None)
    if before is not None:
        worker.loaded.model.get_parameter(OUTSIDE).data.copy_(before)


def rotary_table(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """One angle of what the model computes for all its blocks."""

    def turned(module: nn.Module, args: Any, output: Any) -> Any:
        if runs(worker, at):
            output[0][-1, -1] += 0.01
        return output

    _hooked(patch, worker.loaded.model.get_submodule("pos_embed").register_forward_hook(turned))


class _Skipped(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def block_skipped(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """In all of this rank's branches."""
    stack, _, number = BLOCK.partition(".")
    modules = worker.loaded.model.get_submodule(stack)._modules
    block, skipped = modules[number], _Skipped()
    patch.setitem(modules, number, block)

    def choose(module: nn.Module, *_: Any) -> None:
        modules[number] = skipped if runs(worker, at) else block

    _hooked(patch, worker.loaded.model.register_forward_pre_hook(choose))


def other_transformer(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The one that denoises the other steps."""
    pipe = worker.loaded.pipeline.pipe
    forwards = {name: getattr(pipe, name)._held for name in ("transformer", "transformer_2")}
    own = {name: held[0] for name, held in forwards.items()}
    tick = DenoiseLoop.tick

    def swap(back: bool) -> None:
        for name, other in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
            forwards[name][0] = own[name if back else other]

    def ticked(loop: DenoiseLoop, *args: Any) -> Any:
        swap(back=not runs(worker, at - 1))
        return tick(loop, *args)

    patch.setattr(DenoiseLoop, "tick", ticked)


def hooks_lost(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The stream's of one block, when step `at` begins; what is in its slot then is anybody's."""
    stream = worker.loaded.stream
    index = [block.name for block in stream.blocks].index(BLOCK)
    lost = stream._hooks._handles[2 * index : 2 * index + 2]
    for handle in lost:
        hooks = handle.hooks_dict_ref()
        patch.setitem(hooks, handle.id, hooks[handle.id])

    def lose(transformer: nn.Module, *_: Any) -> None:
        if runs(worker, at):
            for handle in lost:
                handle.hooks_dict_ref().pop(handle.id, None)

    _hooked(patch, worker.loaded.model.register_forward_pre_hook(lose))


def hooks_lost_and_found(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """They are there again at the request's end."""
    stream = worker.loaded.stream
    index = [block.name for block in stream.blocks].index(BLOCK)
    for handle in stream._hooks._handles[2 * index : 2 * index + 2]:
        hooks = handle.hooks_dict_ref()
        hook = hooks[handle.id]
        patch.setitem(hooks, handle.id, lambda *args, hook=hook: None if runs(worker, at) else hook(*args))


def another_home(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """A block's bytes come from where the next one rests, in one step."""
    load = BlockLoader.load

    def mistaken(loader: BlockLoader, block: Any, *args: Any, **options: Any) -> None:
        if block.name == BLOCK and runs(worker, at):
            block = replace(block, source=block_of(worker, NEXT).source)
        load(loader, block, *args, **options)

    patch.setattr(BlockLoader, "load", mistaken)
