"""The process that starts the ranks of this machine: it has imported what they need, and forks one for each.

It has no thread and no CUDA context, without which a fork would not be sound, and a session of its own, so that Ctrl-C
in the terminal reaches the launcher alone. It ends with its launcher and takes the ranks along, whose end it also is
(prctl(2), PR_SET_PDEATHSIG). Commands come over a socket pair as packets of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import queue
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import cloudpickle

from crossdock.launch.gangs.local.channel import ANSWER, CALL, ERROR, HEADER, PACKET_BYTES
from crossdock.launch.gangs.ranks.host import RankHost, import_classes
from crossdock.runtime.errors import CrossdockError, RankError
from crossdock.runtime.rank.weights.kept_stores import ANSWER_S, KeptStores, StoreHolder
from crossdock.runtime.watch.faults import rank_error

_LOOK_EVERY_S = 0.5
"""How often it looks whether its launcher is there: another process may hold the other end of its socket."""
_KILL_S = 5.0
"""The longest wait for a killed rank to be gone."""
_PR_SET_PDEATHSIG = 1


def main(control: int, launcher: int, modules: Sequence[str], classes: Sequence[tuple[str, str]]) -> None:
    """The process's program.

    Args:
        modules: what the launcher has imported of libraries that import their parts late.
        classes: library and name of what it is going to import.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    _import(("torch", "diffusers", "transformers", *modules))
    import_classes(classes)
    _name("server")
    with socket.socket(fileno=control) as connection:
        connection.send(b'{"number": 0}')
        server = _Server(connection, launcher)
        try:
            server.run()
        finally:
            server.end_ranks()


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        with contextlib.suppress(Exception):  # where it is needed, the rank says so
            importlib.import_module(name)


class _Server:
    def __init__(self, control: socket.socket, launcher: int) -> None:
        self._control = control
        self._launcher = launcher
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ, self._obey)
        self._ranks: dict[int, tuple[int, socket.socket]] = {}  # pid -> pidfd, and what it asks of the stores
        self._statuses: dict[int, int] = {}  # pid -> how it ended: an exit code, or a signal's number, negative
        self._stores = KeptStores()

    def run(self) -> None:
        while os.getppid() == self._launcher:
            for key, _ in self._selector.select(_LOOK_EVERY_S):
                if key.data() is False:
                    return

    def _obey(self) -> bool:
        try:
            packet, handles, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 2)
            if not packet:
                return False
            command = json.loads(packet)
            answer = {"number": command["number"]}
            match command["do"]:
                case "fork":
                    answer["pid"] = self._fork(command, handles)
                case "status":
                    answer["status"] = self._await_end(command["pid"])
                case "import":
                    _import(command["modules"])
                case "end":
                    self.end_ranks()
            self._control.send(json.dumps(answer).encode())
        except OSError:
            return False
        return True

    def _fork(self, command: dict[str, Any], handles: list[int]) -> int:
        gc.collect()  # what was looked at before is frozen: this looks at what was imported since
        gc.freeze()  # a collection in a rank would copy the pages of all that was imported
        server = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                _die_with(server)
                self._selector.close()
                self._control.close()
                self._stores.drop()  # the server's are not closed by that
                ours.close()
                for other, asks in self._ranks.values():
                    os.close(other)
                    asks.close()
                _run_rank(command["rank"], command["world_size"], command["device"], theirs, *handles)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        for handle in handles:
            os.close(handle)
        ours.setblocking(False)
        self._ranks[pid] = os.pidfd_open(pid), ours
        self._selector.register(self._ranks[pid][0], selectors.EVENT_READ, partial(self._reap, pid))
        self._selector.register(ours, selectors.EVENT_READ, partial(self._answer, ours))
        return pid

    def _answer(self, rank: socket.socket) -> None:
        """What a rank asks of the stores."""
        try:
            question = rank.recv(PACKET_BYTES)
            rank.send(self._stores.answer(question.decode()).encode())
        except (OSError, ValueError):  # it has ended, or given up
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(rank)

    def _await_end(self, pid: int) -> int | None:
        """How a rank ended whose connection is closed; None: it runs."""
        deadline = time.monotonic() + 1.0
        while pid in self._ranks and time.monotonic() < deadline:
            self._reap(pid)
            time.sleep(0.01)
        return self._statuses.get(pid)

    def _reap(self, pid: int) -> None:
        if pid not in self._ranks:  # two have seen it end
            return
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended and (known := self._ranks.pop(pid, None)) is not None:
            for each in known:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(each)
            os.close(known[0])
            known[1].close()
            self._statuses[pid] = os.waitstatus_to_exitcode(status)

    def end_ranks(self) -> None:
        for pid in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # also reaches one that is stopped
        deadline = time.monotonic() + _KILL_S
        while self._ranks and time.monotonic() < deadline:
            for pid in list(self._ranks):
                self._reap(pid)
            time.sleep(0.002)


# -- a rank's process --------------------------------------------------------------------------------------------


def _die_with(parent: int) -> None:
    """This process ends as soon as the one that forked it has ended, however that was."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        os._exit(1)


def _name(what: str) -> None:
    """For `ps` and `top`: `crossdock-rank0`."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(f"crossdock-{what}")


def _run_rank(rank: int, world_size: int, device: str, asks: socket.socket, connection: int, output: int) -> NoReturn:
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    _name(f"rank{rank}")
    _Rank(RankHost(rank, world_size, device, StoreHolder(_asking(asks))), socket.socket(fileno=connection)).run()


def _asking(server: socket.socket) -> Callable[[str], str]:
    """`ask` of a `StoreHolder`."""
    server.settimeout(ANSWER_S)

    def ask(question: str) -> str:
        try:
            server.send(question.encode())
            return server.recv(PACKET_BYTES).decode()
        except OSError:
            server.close()  # an answer that came late would be taken for the next one's
            raise

    return ask


class _Rank:
    """Calls run on the main thread, what is asked meanwhile on another; a third reads, and sees the launcher go."""

    def __init__(self, host: RankHost, connection: socket.socket) -> None:
        self._host = host
        self._connection = connection
        self._lock = threading.Lock()
        self._queues: tuple[queue.SimpleQueue[tuple[int, bytes]], ...] = (queue.SimpleQueue(), queue.SimpleQueue())

    def run(self) -> NoReturn:
        for work in (self._read, self._answer_beside):
            threading.Thread(target=work, name=f"crossdock{work.__name__}", daemon=True).start()
        while True:
            self._answer(*self._queues[CALL].get())

    def _answer_beside(self) -> None:
        while True:
            self._answer(*self._queues[1 - CALL].get())

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while header := stream.read(HEADER.size):
                    kind, number, nbytes = HEADER.unpack(header)
                    self._queues[kind].put((number, stream.read(nbytes)))
        finally:
            os._exit(1)

    def _answer(self, number: int, packed: bytes) -> None:
        try:
            work, args = cloudpickle.loads(packed)
            kind, answer = ANSWER, cloudpickle.dumps(work(self._host, *args))
        except Exception as error:
            kind, answer = ERROR, self._packed(rank_error(self._host.status(), error))
        with self._lock:
            self._connection.sendall(HEADER.pack(kind, number, len(answer)))
            self._connection.sendall(answer)

    def _packed(self, error: CrossdockError) -> bytes:
        """Whole, or what it says, where it carries what cannot travel."""
        packed: bytes
        try:
            packed = cloudpickle.dumps(error)
        except Exception:
            packed = cloudpickle.dumps(RankError(self._host.status().rank, f"{type(error).__name__}: {error}"))
        return packed
