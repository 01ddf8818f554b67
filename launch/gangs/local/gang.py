"""The ranks of one machine, without Ray and without torchrun: forked by a process that has imported everything once.

`server` is that process. It is started as a program, so nothing of the launcher's state reaches the ranks: it
may be a script without a `__main__` guard, a notebook, or have any threads. Nothing outlives `close`, nor the launcher.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import cloudpickle

from crossdock.launch.gangs.local.channel import (
    ANSWER,
    BESIDE,
    CALL,
    Answer,
    Channel,
    RankDiedError,
)
from crossdock.launch.gangs.local.process import ServerProcess, begun
from crossdock.launch.gangs.ranks.environment import check_gpus
from crossdock.launch.gangs.ranks.host import RankHost
from crossdock.launch.gangs.ranks.process_state import process_state
from crossdock.launch.gangs.ranks.rendezvous import LOOPBACK
from crossdock.launch.gangs.ranks.watcher import Watcher, await_results
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.errors import RankError
from crossdock.runtime.watch.gang import Notice

T = TypeVar("T")

_GONE_S = 5.0
"""The longest wait for ranks to be gone whose server is."""


class LocalGang:
    """A gang of processes of this machine."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        self._device = device
        self._server: ServerProcess | None = None
        self._ranks: _Ranks | None = None

    can_restart = True
    own_rank = None

    def begin(self, classes: Sequence[tuple[str, str]] = ()) -> None:
        if self._server is None:
            self._server = begun(self.world_size, self._device, classes)

    def start(self) -> None:
        if self._device == "cuda":
            check_gpus(self.world_size)
        self.restart()

    def restart(self) -> None:
        deadline = time.monotonic() + self._config.timeouts.launch_s
        try:
            self._end_ranks()
            self.begin()
            assert self._server is not None
            if not self._server.is_up:
                self._server.await_up(deadline)
            self._ranks = _Ranks(self._server, self.world_size, self._device)
            self._meet(deadline)
        except RankError:  # may be tried again, with the same server
            self._end_ranks()
            raise
        except BaseException:
            self.close()
            raise

    def collective_rpc(
        self, work: Callable[..., T], *args: object, timeout_s: float, notice: Notice | None = None
    ) -> list[T]:
        ranks = self._ranks
        if ranks is None:
            raise RankError(0, "this gang is closed; start a new engine", "died")
        futures = ranks.channel.ask(range(self.world_size), CALL, RankHost.collective_rpc, work, args)
        return await_results(ranks, futures, time.monotonic() + timeout_s, Watcher(ranks, notice))

    def rpc(self, rank: int, work: Callable[..., T], *args: object, timeout_s: float) -> T:
        ranks = self._ranks
        if ranks is None or not 0 <= rank < self.world_size:
            raise RankError(rank, "is not there", "silent")
        futures = ranks.channel.ask([rank], BESIDE, RankHost.rpc, work, args)
        if not ranks.wait(futures, timeout_s):
            raise RankError(rank, f"does not answer within {timeout_s:g} s", "silent")
        result: T = ranks.result(futures[0], rank)
        return result

    def close(self) -> None:
        self._end_ranks()
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def _end_ranks(self) -> None:
        """The server lives on, if it lives."""
        ranks, self._ranks = self._ranks, None
        if self._server is not None and not self._server.end_ranks():
            server, self._server = self._server, None
            server.close()
            if ranks is not None:
                ranks.await_end(_GONE_S)
        if ranks is not None:
            ranks.channel.close()

    def _meet(self, deadline: float) -> None:
        """Let the ranks find each other; they are watched from here on."""
        assert self._ranks is not None
        ranks, timeouts = self._ranks, self._config.timeouts
        opened = ranks.channel.ask([0], CALL, RankHost.open_store, LOOPBACK, self._config.port)
        port = await_results(ranks, opened, deadline, Watcher(ranks))[0]
        where = (LOOPBACK, port, timeouts.launch_s, timeouts.collective_s, True)
        met = ranks.channel.ask(range(self.world_size), CALL, RankHost.join, *where)
        await_results(ranks, met, deadline, Watcher(ranks))


class _Ranks:
    """The `Ranks` of a `LocalGang`: futures of its channel."""

    def __init__(self, server: ServerProcess, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._server = server
        self.pids: list[int] = []
        ends: list[tuple[socket.socket, int]] = []
        try:
            for rank in range(world_size):
                place = f"cuda:{rank}" if device == "cuda" else "cpu"
                pid, own, output = server.fork(rank, world_size, place)
                self.pids.append(pid)
                ends.append((own, output))
        except BaseException:
            for own, output in ends:
                own.close()
                os.close(output)
            raise
        self.channel = Channel(ends)

    def wait(self, futures: Sequence[Future[Answer]], timeout_s: float) -> list[Future[Answer]]:
        return list(wait(futures, timeout_s).done)

    def result(self, future: Future[Answer], rank: int) -> Any:
        try:
            kind, packed = future.result(timeout=0)
        except RankDiedError:
            raise RankError(rank, f"its process died: {self._how_ended(rank)}", "died") from None
        try:
            value = cloudpickle.loads(packed)
        except Exception as error:  # of a class that is not here
            raise RankError(rank, f"its answer cannot be read: {type(error).__name__}: {error}") from None
        if kind == ANSWER:
            return value
        raise value

    def ask_status(self, rank: int) -> Future[Answer]:
        return self.channel.ask([rank], BESIDE, RankHost.status)[0]

    def stopped(self, rank: int, silent: set[int]) -> str | None:
        pid = self.pids[rank]
        return f"{pid} on {socket.gethostname()}" if process_state(pid) == "stopped" else None

    def await_end(self, timeout_s: float) -> None:
        """Of all ranks, after that of the server, or until the time is up."""
        deadline = time.monotonic() + timeout_s
        while any(process_state(pid) != "gone" for pid in self.pids) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _how_ended(self, rank: int) -> str:
        status = self._server.how_ended(self.pids[rank])
        if status is None:
            return "killed, crashed, or out of host memory"
        if status == -signal.SIGKILL:
            return "killed, or out of host memory"
        what = f"exit code {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
        tail = self.channel.tail(rank)
        return f"{what}; it wrote last: {tail}" if tail else what
