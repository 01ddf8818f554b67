"""Races on the device, to be planted in a rank that has a model; see `test_clock`. Each is in one step of a request.

What has to come too late waits for what must not be first, so that nothing depends on how fast the machine is.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from faults_in_steps import BLOCK, _hooked, block_of, runs

from crossdock.offload.memory.arena import Slot
from crossdock.offload.stream.loader import BlockLoader
from crossdock.runtime.rank.worker import RankWorker

WAIT_S = 60.0


def _ends_late(worker: RankWorker, patch: pytest.MonkeyPatch, at: int, until: threading.Event) -> None:
    """The block's copy in step `at` begins, and ends when `until` is set."""
    log = worker.loaded.stream._log
    note = log.note

    def noted(kind: Any, block: str, *args: Any, **more: Any) -> None:
        if kind == "load_end" and block == BLOCK and runs(worker, at):
            until.wait(WAIT_S)
        note(kind, block, *args, **more)

    patch.setattr(log, "note", noted)


def _computed(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> threading.Event:
    """Set when the block's call in step `at` is over."""
    computed = threading.Event()
    hook = lambda *_: computed.set() if runs(worker, at) else None  # noqa: E731
    _hooked(patch, block_of(worker).module.register_forward_hook(hook))
    return computed


def wait_left_out(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    stream, engine = worker.loaded.stream, worker.loaded.copy_engine
    wait, index = engine.wait, [block.name for block in stream.blocks].index(BLOCK)

    def impatient(event: Any) -> None:
        slot = stream._table.of[index]
        if slot.holder != index or event is not slot.ready or not runs(worker, at):
            wait(event)

    patch.setattr(engine, "wait", impatient)
    _ends_late(worker, patch, at, _computed(worker, patch, at))


def event_too_early(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """What the block waits for happens before the copy."""

    load = BlockLoader.load

    def early(loader: BlockLoader, block: Any, memory: Any, after: Any, slot: Any, done: Any, **options: Any) -> None:
        if block.name == BLOCK and runs(worker, at):
            done(loader.engine.record())
            done = lambda event: None  # noqa: E731
        load(loader, block, memory, after, slot, done, **options)

    patch.setattr(BlockLoader, "load", early)
    _ends_late(worker, patch, at, _computed(worker, patch, at))


def reader_not_waited_for(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The next block of the slot is fetched while this one computes, which goes on until the copy has begun."""
    stream, engine = worker.loaded.stream, worker.loaded.copy_engine
    index, begun = stream.blocks.index(block_of(worker)), threading.Event()
    move, claim = engine.move, Slot.claim
    following = next(
        other for other in range(index + 1, len(stream.blocks)) if stream._table.of[other] is stream._table.of[index]
    )

    def claimed(slot: Slot, block: int) -> list[Any]:
        if slot.free is None and runs(worker, at):
            slot.holder = block
            return [slot.ready]
        return claim(slot, block)

    def moved(target: Any, source: Any) -> None:
        if stream._table.of[index].holder == following and runs(worker, at):
            begun.set()
        move(target, source)

    def go_on(*_: Any) -> None:
        if runs(worker, at):
            stream._enqueue(following)
            begun.wait(WAIT_S)

    patch.setattr(Slot, "claim", claimed)
    patch.setattr(engine, "move", moved)
    _hooked(patch, block_of(worker).module.register_forward_pre_hook(go_on))


def gathered_too_early(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """Before this rank's shard has come from the host."""
    gather, gathered = BlockLoader._all_gather, threading.Event()

    def impatient(loader: BlockLoader, job: Any, shard: Any, after: Any, needs: Any) -> Any:
        if job.block.name != BLOCK or not runs(worker, at):
            return gather(loader, job, shard, after, needs)
        event = gather(loader, job, shard, after, ())
        loader.engine.submit("gather", gathered.set, ())
        return event

    patch.setattr(BlockLoader, "_all_gather", impatient)
    _ends_late(worker, patch, at, gathered)
