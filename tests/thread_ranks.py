"""Ranks as threads of one process, and groups that exchange between them: whole models are compared in one test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from crossdock.parallel.group import Group

TIME_LIMIT_S = 60
Result = TypeVar("Result")


class Meeting:
    """Where `size` threads exchange what they hold; one that fails lets the others go."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self._held: list[Any] = [None] * size

    def exchange(self, index: int, value: Any) -> list[Any]:
        self._held[index] = value
        self.barrier.wait(TIME_LIMIT_S)
        held = list(self._held)
        self.barrier.wait(TIME_LIMIT_S)
        return held


class ThreadGroup:
    """What `Group` does, for thread number `index` of a meeting; sums are made in one fixed order."""

    def __init__(self, meeting: Meeting, index: int) -> None:
        self._meeting = meeting
        self.index = index
        self.size = meeting.size
        self.issued: list[tuple[object, ...]] = []

    def all_reduce(self, tensor: Tensor) -> None:
        parts = self._exchange(("all_reduce", tensor.dtype, tuple(tensor.shape)), tensor.clone())
        tensor.copy_(torch.stack(parts).sum(0))

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        parts = self._exchange(("all_gather", input.dtype, input.numel()), input.clone())
        output.copy_(torch.cat([part.reshape(-1) for part in parts]).view(output.shape))

    def all_to_all(
        self,
        arrived: Tensor,
        message: Tensor,
        receive_sizes: list[int],
        send_sizes: list[int],
        agreed: tuple[object, ...] = (),
    ) -> None:
        sent = self._exchange(("all_to_all", message.dtype, *agreed), message.clone().split_with_sizes(send_sizes))
        parts = [of_rank[self.index] for of_rank in sent]
        assert [part.numel() for part in parts] == receive_sizes
        arrived.copy_(torch.cat(parts))

    def pass_on(self, sent: Tensor, received: Tensor, agreed: tuple[object, ...] = ()) -> Callable[[], None]:
        passed = self._exchange(("pass_on", sent.dtype, *agreed), sent.clone())
        received.copy_(passed[self.index - 1])
        return lambda: None

    def broadcast_object(self, value: Any, source: int) -> Any:
        return self._exchange(("broadcast_object", source), value)[source]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        sent = self._exchange(("broadcast", source, tensor.dtype, tuple(tensor.shape)), tensor.clone())
        tensor.copy_(sent[source])

    def _exchange(self, what: tuple[object, ...], value: Any) -> list[Any]:
        """All ranks must ask for the same."""
        self.issued.append(what)
        met = self._meeting.exchange(self.index, (what, value))
        assert all(other == what for other, _ in met), [other for other, _ in met]
        return [value for _, value in met]


def run_threads(meetings: Sequence[Meeting], work: Callable[[int], Result], ranks: int) -> list[Result]:
    """`work(rank)` in as many threads. The first error of one of them is raised."""

    def guarded(rank: int) -> Result:
        try:
            with torch.no_grad():
                return work(rank)
        except BaseException:
            for meeting in meetings:
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(ranks)]
        errors = [error for future in futures if (error := future.exception(TIME_LIMIT_S * 2)) is not None]
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return [future.result() for future in futures]


def as_group(group: ThreadGroup | None) -> Group | None:
    return cast("Group | None", group)


def groups_of(ranks: int) -> tuple[Meeting, list[ThreadGroup]]:
    meeting = Meeting(ranks)
    return meeting, [ThreadGroup(meeting, index) for index in range(ranks)]
