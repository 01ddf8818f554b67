"""Faults in what rests and in what arrives, to be planted in a rank that has a model; see `test_arrivals`.

A plant runs on the rank, before the request, and takes effect in step `at`. What it changes for good it undoes itself:
`worker.undo` are called when the request is over. Ranks cannot import this module: it is pickled by value.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from faults_in_steps import BLOCK, NEXT, OUTSIDE, _hooked, _when, block_of, runs
from torch import Tensor

from crossdock.offload.stream import loader as loading
from crossdock.offload.stream.loader import BlockLoader
from crossdock.runtime.rank.weights.compare import sampled_rows
from crossdock.runtime.rank.worker import RankWorker

Plant = Callable[[RankWorker, pytest.MonkeyPatch, int], None]


def _flip(worker: RankWorker, memory: Tensor) -> None:
    """Another bit of each of these bytes, until the request is over."""
    before = memory.clone()
    worker.undo.append(lambda: memory.copy_(before))
    memory.copy_(before ^ 1)


def _quarter(memory: Tensor) -> Tensor:
    return memory[len(memory) // 4 : len(memory) // 2]


def _one(memory: Tensor) -> Tensor:
    return memory[len(memory) // 2 :][:1]


def unsampled(worker: RankWorker) -> Tensor:
    """A byte, where the block rests as a whole, of a row that is not compared when it arrives."""
    block = block_of(worker)
    entry = max(block.layout.entries, key=lambda entry: entry.nbytes)
    tensor = entry.view(block.source)
    rows = sampled_rows(f"{BLOCK}.{entry.name}", tensor, None, ())
    assert rows is not None
    row = next(row for row in range(len(tensor)) if row not in rows.tolist())
    return block.source[entry.offset + row * entry.nbytes // len(tensor) :][:1]


def byte_before_the_request(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _flip(worker, unsampled(worker))


def first_transformer(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """One bit of a block that is not in the last step: another transformer is."""
    _when(worker, patch, at - 1, lambda pipe: _flip(worker, _one(worker.loaded.stream.blocks[0].source)))


def at_rest(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """A quarter of what rests of a block: in host memory, a shard, or on the device for good."""
    _when(worker, patch, at - 1, lambda pipe: _flip(worker, _quarter(block_of(worker).source)))


def byte_at_rest(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """One bit."""
    _when(worker, patch, at - 1, lambda pipe: _flip(worker, _one(block_of(worker).source)))


def killed(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _when(worker, patch, at, lambda pipe: os.kill(os.getpid(), signal.SIGKILL))


def before_the_request(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    _flip(worker, _quarter(block_of(worker).source))


def resident(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The memory of a block that stays on the device, though it rests in host memory."""

    def spoil(pipe: Any) -> None:
        name = sorted(worker.loaded.stream.resident_memory)[0]
        _flip(worker, _quarter(worker.loaded.stream.resident_memory[name][: block_of(worker, name).layout.slot_bytes]))

    _when(worker, patch, at - 1, spoil)


def while_computing(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """Its slot is written over when a block has begun."""

    def spoil(*_: Any) -> None:
        if runs(worker, at):
            for tensor in block_of(worker).tensors():
                before = tensor.data.clone()
                tensor.data.mul_(1.5)
                if BLOCK in worker.loaded.stream.resident_memory:  # nothing brings it again
                    worker.undo.append(lambda tensor=tensor, before=before: tensor.data.copy_(before))

    _hooked(patch, next(block_of(worker).module.children()).register_forward_hook(spoil))


def _copied(part: Callable[[Tensor], Tensor]) -> Plant:
    def plant(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
        moves = loading._moves

        def some(block: Any, target: Tensor) -> list[tuple[Tensor, Tensor]]:
            found = moves(block, target)
            if block.name == BLOCK and runs(worker, at):
                found = [(part(there), part(here)) for there, here in found]
            return found

        patch.setattr(loading, "_moves", some)

    return plant


left_out = _copied(lambda memory: memory[:0])
half_done = _copied(lambda memory: memory[: len(memory) // 2])


def sources_swapped(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """From step `at` on, two blocks come from each other's home."""
    one, other = block_of(worker), block_of(worker, NEXT)

    def swap(*_: Any) -> None:
        first, second = one.source, other.source
        object.__setattr__(one, "source", second)
        object.__setattr__(other, "source", first)

    def begin(pipe: Any) -> None:
        worker.undo.append(swap)
        swap()

    _when(worker, patch, at - 1, begin)


def gather_swapped(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The parts of one block change places on this rank."""
    gather_all = BlockLoader._all_gather

    def gathered(loader: BlockLoader, job: Any, *args: Any, **more: Any) -> Any:
        right = loader._gather
        assert right is not None
        if job.block.name == BLOCK and runs(worker, at):

            def swapped(whole: Tensor, shard: Tensor) -> None:
                right.all_gather(whole, shard)
                whole.copy_(whole.view(right.parts, -1).flip(0).reshape(-1))

            loader._gather = replace(right, all_gather=swapped)
        try:
            return gather_all(loader, job, *args, **more)
        finally:
            loader._gather = right

    patch.setattr(BlockLoader, "_all_gather", gathered)


def outside(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    weight = worker.loaded.model.get_parameter(OUTSIDE).data
    before = weight.clone()
    worker.undo.append(lambda: weight.copy_(before))
    _when(worker, patch, at - 1, lambda pipe: weight[0, :4].mul_(1.5))


def component(name: str, number: int = 0) -> Plant:
    """One bit of a text encoder or a decoder, before the request: of what it computes with."""

    def plant(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
        module, stream = worker.loaded.pipeline.components[name]
        if stream is None:
            import torch

            parameters = [p.data for p in module.parameters() if p.data.is_contiguous()]
            memory = parameters[number].reshape(-1).view(torch.uint8)
        else:
            sources = [block.source for block in stream.blocks if block.source.nbytes]
            memory = sources[number]
        _flip(worker, memory[:1])

    return plant


def file_in_place(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """One byte of a block in the checkpoint's file."""
    stored = next(tensor for fqn, tensor in worker.loaded.plan.layout.stored.items() if fqn.startswith(f"{BLOCK}."))

    if at == 1:
        _write(stored.file, block_of(worker).source[0].source)
    _when(worker, patch, at - 1, lambda pipe: _write(stored.file, block_of(worker).source[0].source))


def _write(file: Any, piece: Tensor) -> None:
    raw = bytes(piece.reshape(-1)[:64].tolist())
    content = file.read_bytes()
    place = content.index(raw)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(bytes([content[place] ^ 1]))
