"""The ranks of one machine, without Ray and without torchrun: forked by a process that has imported everything once.

`local_server` is that process. It is started as a program, so nothing of the launcher's state reaches the ranks: it
may be a script without a `__main__` guard, a notebook, or have any threads. Nothing outlives `close`, nor the launcher.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import cloudpickle

from crossdock.launch.gangs.choose import check_gpus
from crossdock.launch.gangs.local_channel import (
    ANSWER,
    BESIDE,
    CALL,
    PACKET_BYTES,
    TAIL_BYTES,
    Answer,
    Channel,
    RankDiedError,
)
from crossdock.launch.gangs.ranks.host import RENDEZVOUS_VARIABLES, RankHost
from crossdock.launch.gangs.ranks.process_state import process_state
from crossdock.launch.gangs.ranks.rendezvous import LOOPBACK
from crossdock.launch.gangs.ranks.watcher import Watcher, await_results
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.errors import LaunchError, RankError
from crossdock.runtime.rank.worker import compute_threads
from crossdock.runtime.watch.gang import Notice

T = TypeVar("T")

_PROGRAM = (
    "import json, sys; sys.path[:], *arguments = json.load(sys.stdin); "
    "from crossdock.launch.gangs.local_server import main; main(*arguments)"
)
"""Not `-m`: where the launcher finds this package, and what it sends, the server does, too."""
_ANSWER_S = 15.0
"""The longest wait for an answer of the server."""
_GONE_S = 5.0
"""The longest wait for ranks to be gone whose server is."""
_LIBRARIES = ("diffusers.", "transformers.")


class LocalGang:
    """A gang of processes of this machine."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        self._device = device
        self._server: _Server | None = None
        self._ranks: _Ranks | None = None

    can_restart = True
    own_rank = None

    def start(self) -> None:
        if self._device == "cuda":
            check_gpus(self.world_size)
        self.restart()

    def restart(self) -> None:
        deadline = time.monotonic() + self._config.timeouts.launch_s
        try:
            self._end_ranks()
            if self._server is None:
                self._server = _Server(_environment(self.world_size, self._device), deadline)
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


def _environment(world_size: int, device: str) -> dict[str, str]:
    """Of the server, and so of the ranks."""
    environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS_VARIABLES}
    if device == "cpu":  # OpenMP reads it when a thread starts; torch.set_num_threads comes too late
        environment["OMP_NUM_THREADS"] = str(compute_threads(world_size))
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fork must find no thread, and numpy computes nothing here
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked without a CUDA context
    return environment


class _Server:
    """The process that forks ranks.

    Raises:
        LaunchError: it did not come up.
    """

    def __init__(self, environment: dict[str, str], deadline: float) -> None:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._owner = os.getpid()
        self._control = own
        self._lock = threading.Lock()
        self._number = 0  # of the latest command
        self._output = os.memfd_create("crossdock-output")  # of imports; nobody has to read it, as a pipe
        modules = sorted(name for name in list(sys.modules) if name.startswith(_LIBRARIES))
        told = json.dumps([[*map(str, sys.path)], theirs.fileno(), os.getpid(), modules])
        try:
            with theirs, open(os.memfd_create("crossdock-told"), "w+", encoding="utf-8") as stdin:
                stdin.write(told)
                stdin.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM],
                    env=environment,
                    stdin=stdin,
                    stdout=self._output,
                    stderr=self._output,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException as error:
            own.close()
            os.close(self._output)
            if isinstance(error, OSError):
                raise LaunchError(f"the process that starts the ranks cannot be started: {error}") from None
            raise
        try:
            if self._receive(deadline - time.monotonic()) is None:
                raise LaunchError(f"the process that starts the ranks did not come up: {self._tail()}")
        except BaseException:
            self.close()
            raise

    def fork(self, rank: int, world_size: int, device: str) -> tuple[int, socket.socket, int]:
        """A rank's pid, the connection to it, and the pipe to which it writes its output.

        Raises:
            RankError: it was not started.
        """
        own, theirs = socket.socketpair()
        reads, writes = os.pipe()
        command = {"do": "fork", "rank": rank, "world_size": world_size, "device": device}
        answer = None
        try:
            answer = self._ask(command, [theirs.fileno(), writes])
        finally:
            theirs.close()
            os.close(writes)
            if answer is None:
                own.close()
                os.close(reads)
        if answer is None:
            raise RankError(rank, "was not started: the process that starts the ranks is gone", "died")
        return answer["pid"], own, reads

    def how_ended(self, pid: int) -> int | None:
        """A rank's exit code, or the number of the signal that ended it, negative; None: it is not known."""
        answer = self._ask({"do": "status", "pid": pid})
        return None if answer is None else answer["status"]

    def end_ranks(self) -> bool:
        """False: the server is gone, and they are gone with it, or does not answer."""
        return self._ask({"do": "end"}) is not None

    def close(self) -> None:
        """End the server; a rank ends with it."""
        if os.getpid() == self._owner:  # not a fork of the launcher
            self._end()
        self._control.close()
        os.close(self._output)

    def _ask(self, command: dict[str, object], handles: Sequence[int] = ()) -> dict[str, Any] | None:
        if os.getpid() != self._owner:
            return None
        with self._lock:
            self._number += 1
            command["number"] = self._number
            try:
                socket.send_fds(self._control, [json.dumps(command).encode()], handles)
            except OSError:
                return None
            return self._receive(_ANSWER_S)

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The answer to the latest command: those of others, which somebody has given up, may come first."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._control.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                packet = self._control.recv(PACKET_BYTES)
            except OSError:
                return None
            answer: dict[str, Any] | None = json.loads(packet) if packet else None
            if answer is None or answer["number"] == self._number:
                return answer

    def _end(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GONE_S)

    def _tail(self) -> str:
        self._end()
        length = os.fstat(self._output).st_size
        text = os.pread(self._output, TAIL_BYTES, max(0, length - TAIL_BYTES)).decode(errors="replace").strip()
        return text or "it said nothing"


class _Ranks:
    """The `Ranks` of a `LocalGang`: futures of its channel."""

    def __init__(self, server: _Server, world_size: int, device: str) -> None:
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
