"""The launcher's side of the process that forks ranks (`server`). Imports nothing that is heavy: it may be started
before the launcher has imported anything, so that both import at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from crossdock.launch.gangs.local.channel import PACKET_BYTES, TAIL_BYTES
from crossdock.launch.gangs.ranks.environment import forked_environment
from crossdock.runtime.errors import LaunchError, RankError

_PROGRAM = (
    "import json, sys; sys.path[:], *arguments = json.load(sys.stdin); "
    "from crossdock.launch.gangs.local.server import main; main(*arguments)"
)
"""Not `-m`: where the launcher finds this package, and what it sends, the server does, too."""
_ANSWER_S = 15.0
"""The longest wait for an answer of the server."""
_GONE_S = 5.0
"""The longest wait for the server to be gone."""
_LIBRARIES = ("diffusers.", "transformers.")
_AT_ONCE = 25
"""Names of modules in one packet."""

_early: dict[tuple[int, str], ServerProcess] = {}


def begin(world_size: int, device: str, classes: Iterable[tuple[str, str]]) -> None:
    """Start the process for the next gang of this size already; `device` as the config has it.

    Args:
        classes: library and class of what the ranks will need.
    """
    if not _early:
        atexit.register(_end_early)
    _early[world_size, device] = ServerProcess(forked_environment(world_size, device), list(classes))


def begun(world_size: int, device: str, classes: Iterable[tuple[str, str]] = ()) -> ServerProcess:
    """The one that was started early, or a new one."""
    early = _early.pop((world_size, device), None) or _early.pop((world_size, "auto"), None)
    return early or ServerProcess(forked_environment(world_size, device), list(classes))


def _imported() -> set[str]:
    """Of libraries that import their parts late."""
    return {name for name in list(sys.modules) if name.startswith(_LIBRARIES)}


def _end_early() -> None:
    while _early:
        _early.popitem()[1].close()


class ServerProcess:
    """The process that forks ranks, which imports meanwhile, until it `is_up`; see `await_up`.

    Raises:
        LaunchError: it cannot be started.
    """

    def __init__(self, environment: dict[str, str], classes: Sequence[tuple[str, str]] = ()) -> None:
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._owner = os.getpid()
        self._control = own
        self._lock = threading.Lock()
        self._number = 0  # of the latest command
        self._output = os.memfd_create("crossdock-output")  # of imports; nobody has to read it, as a pipe
        self._brought = set(_imported())
        told = json.dumps([[*map(str, sys.path)], theirs.fileno(), os.getpid(), sorted(self._brought), classes])
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
        self.is_up = False

    def await_up(self, deadline: float) -> None:
        """It has imported what the launcher has by now. Of the libraries that import their parts late, the parts.

        Raises:
            LaunchError: it did not come up.
        """
        try:
            if self._receive(deadline - time.monotonic()) is None:
                raise LaunchError(f"the process that starts the ranks did not come up: {self._tail()}")
            self.is_up = True
            later = sorted(_imported() - self._brought)
            while later:
                part, later = later[:_AT_ONCE], later[_AT_ONCE:]
                if self._ask({"do": "import", "modules": part}, timeout_s=deadline - time.monotonic()) is None:
                    raise LaunchError(f"the process that starts the ranks did not import: {self._tail()}")
                self._brought.update(part)
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
        return not self.is_up or self._ask({"do": "end"}) is not None  # it still imports: there are none

    def close(self) -> None:
        """End the server; a rank ends with it."""
        if self._control.fileno() < 0:
            return
        if os.getpid() == self._owner:  # not a fork of the launcher
            self._end()
        self._control.close()
        os.close(self._output)

    def _ask(
        self, command: dict[str, object], handles: Sequence[int] = (), timeout_s: float | None = None
    ) -> dict[str, Any] | None:
        if os.getpid() != self._owner:
            return None
        with self._lock:
            self._number += 1
            command["number"] = self._number
            try:
                socket.send_fds(self._control, [json.dumps(command).encode()], handles)
            except OSError:
                return None
            return self._receive(_ANSWER_S if timeout_s is None else timeout_s)

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
