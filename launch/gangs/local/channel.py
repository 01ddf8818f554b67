"""The connections between a process and the ranks that it started on this machine: questions, and their answers.

Each is an unnamed socket pair, whose ends only the two processes have (and what they fork): nobody else can write to
it, so both ends may unpickle what they read there. Functions travel by value where they have to (cloudpickle): nested
ones, lambdas, those of a script or a notebook.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import cloudpickle

HEADER = struct.Struct("<BQQ")
"""Kind, number of the question, bytes that follow."""
CALL, BESIDE = 0, 1
"""Kinds of questions: for the rank's main thread, and for the one beside it."""
ANSWER, ERROR = 2, 3
PACKET_BYTES = 4096
"""The longest packet between a launcher and the server that forks ranks for it."""
TAIL_BYTES = 4000
"""So much of what a rank wrote to its stdout and stderr is kept."""
_CHUNK = 2**20
_CLOSE_S = 10.0
"""The longest wait for the thread, which waits for nothing."""


class RankDiedError(Exception):
    """The other end of a rank's connection is closed."""


Answer = tuple[int, bytes]
"""The kind of what a rank sent, and that itself."""


@dataclass
class _Connection:
    """One rank's socket and output, and what is under way on it."""

    socket: socket.socket
    output: int
    unsent: deque[memoryview] = field(default_factory=deque)
    arrived: bytearray = field(default_factory=bytearray)
    waiting: dict[int, Future[Answer]] = field(default_factory=dict)
    tail: bytes = b""
    ended: bool = False

    def read_output(self) -> bool:
        """Raises BlockingIOError where there is none yet; False: there will be none."""
        text = os.read(self.output, 2**16)
        self.tail = (self.tail + text)[-TAIL_BYTES:]
        return bool(text)


class Channel:
    """Asks ranks, from any thread. One thread of its own reads and writes, and never waits for a single rank.

    Args:
        ends: by rank, a socket and the reading end of the pipe to which the rank writes its output; owned from here on.
    """

    def __init__(self, ends: Sequence[tuple[socket.socket, int]]) -> None:
        self._connections = [_Connection(*pair) for pair in ends]
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._closing = False
        self._bell, self._ringer = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for end in (self._bell, self._ringer, *(each.socket for each in self._connections)):
            end.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        for each in self._connections:
            os.set_blocking(each.output, False)
            self._selector.register(each.socket, selectors.EVENT_READ, each)
            self._selector.register(each.output, selectors.EVENT_READ, each)
        self._thread = threading.Thread(target=self._run, name="crossdock-local", daemon=True)
        self._thread.start()

    def ask(self, ranks: Sequence[int], kind: int, work: Callable[..., object], *args: object) -> list[Future[Answer]]:
        """`work(host, *args)` on these ranks. A future holds what arrives (pickled), an error that the rank raised, or
        `RankDiedError`.
        """
        packed = cloudpickle.dumps((work, args))
        futures: list[Future[Answer]] = []
        with self._lock:  # of two callers, one is the first on all ranks
            for rank in ranks:
                connection, future = self._connections[rank], Future[Answer]()
                futures.append(future)
                if connection.ended or self._closing:
                    future.set_exception(RankDiedError())
                    continue
                number = next(self._numbers)
                connection.waiting[number] = future
                header = HEADER.pack(kind, number, len(packed))
                connection.unsent.extend((memoryview(header), memoryview(packed)))
        self._ring()
        return futures

    def tail(self, rank: int) -> str:
        """The last whole lines that the rank wrote; not what faulthandler adds: every library that is loaded."""
        lines = self._connections[rank].tail.decode(errors="replace").splitlines()
        whole = lines[len(self._connections[rank].tail) >= TAIL_BYTES :]
        return "\n".join(line for line in whole if not line.startswith("Extension modules:")).strip()

    def close(self) -> None:
        """Every question that is open, and every later one, is answered with `RankDiedError`."""
        with self._lock:
            self._closing = True
        self._ring()
        self._thread.join(_CLOSE_S)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            self._ringer.send(b"\0")

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._await_more()
        finally:
            self._closing = True
            for each in self._connections:
                self._end(each)
                os.close(each.output)
            self._selector.close()
            self._bell.close()
            self._ringer.close()

    def _await_more(self) -> None:
        for each in self._connections:
            if not each.ended:
                writes = selectors.EVENT_WRITE if each.unsent else 0
                self._selector.modify(each.socket, selectors.EVENT_READ | writes, each)
        for key, events in self._selector.select():
            connection = key.data
            if connection is None:
                with contextlib.suppress(BlockingIOError):
                    self._bell.recv(4096)
            elif key.fileobj == connection.output:
                with contextlib.suppress(BlockingIOError):
                    if not connection.read_output():
                        self._selector.unregister(connection.output)
            elif not connection.ended:
                try:
                    if events & selectors.EVENT_WRITE:
                        self._send(connection)
                    if events & selectors.EVENT_READ:
                        self._receive(connection)
                except OSError:
                    self._end(connection)

    def _send(self, connection: _Connection) -> None:
        with self._lock:
            while connection.unsent:
                part = connection.unsent[0]
                try:
                    sent = connection.socket.send(part[:_CHUNK])
                except BlockingIOError:
                    return
                if sent < len(part):
                    connection.unsent[0] = part[sent:]
                else:
                    connection.unsent.popleft()

    def _receive(self, connection: _Connection) -> None:
        try:
            chunk = connection.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            raise ConnectionResetError
        arrived = connection.arrived
        arrived += chunk
        while len(arrived) >= HEADER.size:
            kind, number, nbytes = HEADER.unpack_from(arrived)
            if len(arrived) < HEADER.size + nbytes:
                break
            packed = bytes(memoryview(arrived)[HEADER.size : HEADER.size + nbytes])
            del arrived[: HEADER.size + nbytes]
            with self._lock:
                future = connection.waiting.pop(number)
            future.set_result((kind, packed))

    def _end(self, connection: _Connection) -> None:
        """The rank is gone: what it still wrote is in its pipe."""
        with contextlib.suppress(BlockingIOError):
            while not connection.ended and connection.read_output():
                pass
        with self._lock:
            if connection.ended:
                return
            connection.ended = True
            waiting, connection.waiting = connection.waiting, {}
            connection.unsent.clear()
        self._selector.unregister(connection.socket)
        connection.socket.close()
        for future in waiting.values():
            future.set_exception(RankDiedError())
