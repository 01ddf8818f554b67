"""Composition faults that show while blocks are streamed, in collectives, or in numbers only; see `mutations`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossdock.offload.memory.arena import Arena, Slot
from crossdock.offload.stream.block import Piece, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.loader import BlockLoader
from crossdock.parallel import attention as attention_module
from crossdock.parallel import tensor as tensor_module
from crossdock.parallel.mesh import MeshShape
from crossdock.parallel.tensor import RowParallelLinear
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.request import RankRequest
from mutations import BLOCK, LATE_S, TOO_LATE_S, VERY_LATE_S, block_of, index_of, when_attached


def holds(stream: BlockStream, index: int, memory: Tensor) -> bool:
    """Block `index` is on its way into `memory`, or a part of it is."""
    slot = stream._table.of[index]
    start = slot.memory.data_ptr()
    return slot.holder == index and start <= memory.data_ptr() < start + slot.memory.nbytes


# -- in-order --------------------------------------------------------------------------------------------------------


def load_left_out(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A stale slot: it is taken to hold the block, but nothing was copied."""
    load = BlockLoader.load

    def forgetful(
        loader: BlockLoader, block: Any, memory: Any, after: Any, slot: Any, done: Any, **options: Any
    ) -> None:
        if block.name == BLOCK:
            done(loader.engine.record())
        else:
            load(loader, block, memory, after, slot, done, **options)

    patch.setattr(BlockLoader, "load", forgetful)


def first_load_left_out(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Once, in the first step of a request; the following steps are right."""
    load, left_out = worker.loaded.stream._loader.load, list[str]()

    def forgetful(block: Any, memory: Any, after: Any, slot: Any, done: Any, **options: Any) -> None:
        if block.name == BLOCK and not left_out:
            left_out.append(block.name)
            done(worker.loaded.copy_engine.record())
        else:
            load(block, memory, after, slot, done, **options)

    patch.setattr(worker.loaded.stream._loader, "load", forgetful)


def stale_from_the_start(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """What was in a slot when the request began is taken for its first block."""
    stream, index = worker.loaded.stream, index_of(worker.loaded.stream, "noise_refiner.1")
    prepare = stream.prepare

    def prepared(pass_: int) -> None:  # when the text encoder, which may have the memory before, is done
        stream._table.of[index].holder = index
        patch.setattr(stream, "prepare", prepare)
        prepare(pass_)

    patch.setattr(stream, "prepare", prepared)


def wait_left_out(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A block does not wait for its copy, which comes when the block is done."""
    stream, engine = worker.loaded.stream, worker.loaded.copy_engine
    wait, load, index, done_with_it = engine.wait, BlockLoader.load, index_of(stream), threading.Event()
    stream.blocks[index].module.register_forward_hook(lambda *_: done_with_it.set())

    def late(loader: BlockLoader, block: Any, *args: Any, **options: Any) -> None:
        if block.name == BLOCK:
            done_with_it.clear()
            loader.engine.submit("copy", lambda: done_with_it.wait(TOO_LATE_S) and None, ())
        load(loader, block, *args, **options)

    def impatient(event: Any) -> None:
        if stream._table.of[index].holder != index or event is not stream._table.of[index].ready:
            wait(event)

    patch.setattr(engine, "wait", impatient)
    patch.setattr(BlockLoader, "load", late)


def readers_not_waited_for(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Fetched too far ahead: the next block of a slot is loaded while the slot is being read."""
    stream = worker.loaded.stream
    stream._prefetch += 1
    stream._look_ahead()

    def fetch_ahead(index: int) -> None:
        for following in stream._ahead[index]:
            stream._enqueue(following)

    def claim(slot: Slot, block: int) -> list[Any]:
        slot.holder = block
        return [slot.ready]

    patch.setattr(stream, "_fetch_ahead", fetch_ahead)
    patch.setattr(Slot, "claim", claim)


def blocks_skipped(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A cache leaves two blocks out."""
    for name in ("layers.1", BLOCK):
        layers, _, number = name.partition(".")
        patch.setitem(worker.loaded.model.get_submodule(layers)._modules, number, _Skipped())


def trusted_prediction(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A cache leaves two blocks out, on all ranks; the next block's weights were never fetched, on one."""
    blocks_skipped(worker, patch)
    stream, running = worker.loaded.stream, list[int]()
    before, enqueue = stream._fetch_ahead, stream._enqueue

    def only_ahead(index: int, chunks: int = 1) -> None:
        if running:
            enqueue(index, chunks)

    def fetch_ahead(index: int) -> None:
        running.append(index)
        before(index)
        running.clear()

    if worker.rank == min(1, worker.world_size - 1):
        patch.setattr(stream, "_enqueue", only_ahead)
        patch.setattr(stream, "_fetch_ahead", fetch_ahead)


class _Skipped(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def error_swallowed(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A copy breaks off in the middle, and nobody is told: the slot stays half filled."""
    stream, engine = worker.loaded.stream, worker.loaded.copy_engine
    move, submit, index = engine.move, engine.submit, index_of(stream)

    def breaking(target: Tensor, source: Tensor) -> None:
        if holds(stream, index, target):
            target[: len(target) // 2].copy_(source[: len(target) // 2])
            raise OSError("planted")
        move(target, source)

    def silent(lane: Any, work: Callable[[], None], *args: Any) -> Any:
        def run() -> None:
            with suppress(OSError):
                work()

        return submit(lane, run, *args)

    patch.setattr(engine, "move", breaking)
    patch.setattr(engine, "submit", silent)


def gathered_too_early(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The gather does not wait for this rank's shard, which comes late."""
    all_gather = BlockLoader._all_gather

    def impatient(loader: BlockLoader, job: Any, whole: Any, shard: Any, after: Any, needs: Any) -> Any:
        return all_gather(loader, job, whole, shard, after, ())

    def late() -> None:
        if threading.current_thread().name == "crossdock-copy":
            time.sleep(LATE_S)

    patch.setattr(BlockLoader, "_all_gather", impatient)
    when_attached(patch, lambda stream: patch.setattr(stream.engine, "_delay", late))


# -- same-collectives ------------------------------------------------------------------------------------------------


def axes_confused(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The groups of Ulysses are made along the ring, and the other way round."""
    groups = MeshShape.groups

    def confused(shape: MeshShape, rank: int) -> dict[str, tuple[int, ...]]:
        right = groups(shape, rank)
        return right | {"ulysses": right["ring"], "ring": right["ulysses"]}

    patch.setattr(MeshShape, "groups", confused)


def replica_is_the_world(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Prompts are broadcast to all ranks instead of the replica's: each replica has another one."""
    groups = MeshShape.groups

    def confused(shape: MeshShape, rank: int) -> dict[str, tuple[int, ...]]:
        return groups(shape, rank) | {"replica": tuple(range(shape.world_size))}

    patch.setattr(MeshShape, "groups", confused)


def reduce_left_out(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    _last_row_parallel(worker).group = None


def reduce_on_the_world(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The group on which the ranks agree to go on, instead of tensor parallelism's."""
    _last_row_parallel(worker).group = worker.world


def _last_row_parallel(worker: RankWorker) -> RowParallelLinear:
    """Behind it the sizes of collectives do not change: gloo ends a process that gets a message of another size."""
    return [module for module in worker.loaded.model.modules() if isinstance(module, RowParallelLinear)][-1]


def text_doubled_on_a_slow_link(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    text_doubled(worker, patch)
    _slow_link(patch)


def text_dropped_on_a_slow_link(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    text_dropped(worker, patch)
    _slow_link(patch)


def _slow_link(patch: pytest.MonkeyPatch) -> None:
    """So that the ranks are heard before gloo ends the one that gets a message of another size."""
    exchange = dist.all_to_all_single

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(5)
        return exchange(*args, **options)

    patch.setattr(dist, "all_to_all_single", slow)


def text_doubled(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The replicated text enters twice."""
    _change_text(worker, lambda text, dim: torch.cat([text] * 2, dim=dim))


def text_dropped(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The second half of the text is lost."""
    _change_text(worker, lambda text, dim: text.narrow(dim, 0, text.shape[dim] // 2))


def _change_text(worker: RankWorker, change: Callable[[Tensor, int], Tensor]) -> None:
    def changed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {name: change(kwargs[name], dim) for name, dim in _TEXT.items()}

    worker.loaded.model.register_forward_pre_hook(changed, with_kwargs=True, prepend=True)


_TEXT = {"encoder_hidden_states": 1, "txt_ids": -2}


# -- same-numbers ----------------------------------------------------------------------------------------------------


def hooks_missing(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A block that the hooks were not put on runs with what is in its slot at the time."""
    stream = worker.loaded.stream
    for handle in stream._hooks._handles[2 * index_of(stream) : 2 * index_of(stream) + 2]:
        handle.remove()
    engine, move, index = worker.loaded.copy_engine, worker.loaded.copy_engine.move, index_of(stream)

    def late(target: Tensor, source: Tensor) -> None:
        if holds(stream, index, target):
            time.sleep(VERY_LATE_S)
        move(target, source)

    patch.setattr(engine, "move", late)


def turn_not_taken(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The text encoder loads over the transformer's slots, which are still taken to be full."""

    def claim(slot: Slot, block: int) -> list[Any]:
        slot.holder = block
        return [slot.free, slot.ready]

    patch.setattr(Slot, "claim", claim)
    patch.setattr(Arena, "evict", lambda arena, stop: None)


def copy_left_out(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """As `load_left_out`, but noted as if it had been done."""
    stream, engine = worker.loaded.stream, worker.loaded.copy_engine
    move, index = engine.move, index_of(stream)

    def forgetful(target: Tensor, source: Tensor) -> None:
        if not holds(stream, index, target):
            move(target, source)

    patch.setattr(engine, "move", forgetful)


def damaged_at_rest(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """One byte, after it was compared."""
    source = block_of(worker.loaded.stream).source
    assert isinstance(source, Tensor)
    source[1027] ^= 0x80


# -- what all ranks do alike -----------------------------------------------------------------------------------------


def padding_attended(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention_module, "score_bias", lambda *_: None)


def merged_without_weights(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """The parts of the ring count alike, whatever their log-sum-exp."""

    def mean(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
        return (out + other.float()) / 2, lse

    patch.setattr(attention_module, "merge", mean)


def cut_as_one_part(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """A fused projection is cut in the middle instead of part by part: when planned, and on the ranks."""
    patch.setattr(tensor_module, "_part_sizes", lambda linear, style, dim: [linear.weight.shape[dim]])


# -- single-owner: what is read --------------------------------------------------------------------------------------


def host_copy_never_read(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    """Loads come from a private copy that is made by the first one."""
    load, kept = BlockLoader.load, dict[Any, Any]()

    def cached(loader: BlockLoader, block: StreamedBlock, *args: Any, **options: Any) -> None:
        key = (loader, block.name)
        kept.setdefault(key, _copied(block.source))
        load(loader, replace(block, source=kept[key]), *args, **options)

    patch.setattr(BlockLoader, "load", cached)


def _copied(source: Tensor | tuple[Piece, ...]) -> Tensor | tuple[Piece, ...]:
    if isinstance(source, Tensor):
        return source.clone()
    return tuple(replace(piece, source=piece.source.clone()) for piece in source)


def one_more_step(worker: RankWorker, patch: pytest.MonkeyPatch) -> None:
    generate = RankWorker.generate

    def longer(self: RankWorker, request: RankRequest) -> Any:
        return generate(self, replace(request, asked=replace(request.asked, steps=request.asked.steps + 1)))

    patch.setattr(RankWorker, "generate", longer)
