"""A small process per host store that keeps its memory while the ranks that map it die and are started again.

The keeper holds the memory file open (it does not map it) and hands it out over a unix socket in the abstract
namespace. Neither has a name on a file system: when the keeper and the mappers are gone, however they ended, the
kernel has freed everything, and a next start finds nothing stale. Only processes of the same user are answered.

It ends by itself: when it is told to, when the process that fills the store died in the middle, when no process that
made or found the store is alive for `grace_s` seconds, or without that wait when the launcher is gone too. It is a
cache: whatever goes wrong, the answer is "no kept store", within `ANSWER_S`, and the run goes on without one.

This file is also the keeper's program, run by path: it needs the standard library alone, for torch would cost it
seconds and hundreds of megabytes. Documents: unix(7), pidfd_open(2), memfd_create(2).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator

GRACE_S = 120.0
"""How long a store is kept when all processes that used it are dead."""
ANSWER_S = 3.0
"""The longest wait for a keeper's answer, and the keeper's for the question of whoever connected."""
START_S = 10.0
"""The longest wait for a keeper to start; it takes about 0.05 s."""

_PROGRAM = "crossdock-keeper"
_MESSAGE_BYTES = 64
_YES = b"yes"
_FD = struct.Struct("i")


# -- what ranks call ---------------------------------------------------------------------------------------------


def keep(key: str, fd: int, nbytes: int, *, grace_s: float = GRACE_S, launcher: int | None = None) -> bool:
    """Start a keeper of memory file `fd`, to be handed out once this process says `complete`.

    Args:
        key: what the bytes are, as a hex digest of at most 64 digits; one keeper per key, user and node.
        nbytes: the size that whoever looks for the store must expect.
        launcher: pid of the process without which nobody will start the ranks again; default: the parent.

    Returns:
        False when the key is taken (the running keeper is not disturbed), or no keeper could be started.
    """
    import subprocess  # the keeper, which never calls this, need not load it

    address, launcher = _address(key), os.getppid() if launcher is None else launcher
    try:
        with _pidfd(os.getpid()) as owner, _pidfd(launcher) as lifeline:
            started = subprocess.run(
                # -I: no file beside this one, whatever it is called, must shadow the standard library
                [sys.executable, "-I", "-S", os.path.abspath(__file__), address]
                + [str(value) for value in (nbytes, grace_s, os.getpid(), fd, owner, lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # not the exit status, which is lost where SIGCHLD is ignored
                stderr=subprocess.DEVNULL,
                cwd="/",
                pass_fds=(fd, owner, lifeline),
                start_new_session=True,  # Ctrl-C and a hang-up go to the terminal's session
                timeout=START_S,
            )
    except (OSError, subprocess.SubprocessError):
        return False
    return started.stdout == _YES


def find(key: str, nbytes: int) -> int | None:
    """A new descriptor of the kept memory file, and this process becomes one of those it is kept for.

    None without a keeper of this key that answers in time and whose store is complete and has exactly `nbytes`.
    """
    try:
        with _asked(key, b"find %d" % nbytes) as connection:
            # not `recv_fds`, which ignores its flags: every child of the rank would inherit the memory
            _, carried, _, _ = connection.recvmsg(_MESSAGE_BYTES, socket.CMSG_LEN(_FD.size), socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    return int(_FD.unpack(carried[0][2])[0]) if carried else None


def complete(key: str) -> bool:
    """All bytes are written: the store may be handed out. Only the process that called `keep` can say so."""
    try:
        with _asked(key, b"complete") as connection:
            return connection.recv(_MESSAGE_BYTES) == _YES
    except OSError:
        return False


def drop(key: str) -> bool:
    """End the keeper; afterwards the key is free and only mappers hold the memory. False: none, or no answer."""
    try:
        with _asked(key, b"drop") as connection:
            return connection.recv(_MESSAGE_BYTES) == b""  # it closes its end last
    except OSError:
        return False


def _address(key: str) -> str:
    if not 0 < len(key) <= 64 or set(key) - set("0123456789abcdef"):
        raise ValueError(f"key: found {key!r}; expected 1 to 64 lower-case hex digits")
    return f"{_PROGRAM}-{os.geteuid()}-{key}"


@contextlib.contextmanager
def _asked(key: str, question: bytes) -> Iterator[socket.socket]:
    """A connection to the keeper on which the question was sent. Any failure is an OSError."""
    with _socket() as connection:
        connection.settimeout(ANSWER_S)
        connection.connect("\0" + _address(key))
        if not _is_same_user(connection):  # anybody may have bound that name, and would give us his weights
            raise PermissionError(f"the keeper of {key} belongs to another user")
        connection.send(question)
        yield connection


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


# -- both sides --------------------------------------------------------------------------------------------------


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # one message is one packet: never half of one


def _peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other end, as the kernel noted them at connect or listen."""
    pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _is_same_user(connection: socket.socket) -> bool:
    return _peer(connection)[1] == os.geteuid()


# -- the keeper's process ----------------------------------------------------------------------------------------


class _Keeper:
    """Answers `listener` and watches processes through pidfds, which cannot be mistaken for a reused pid.

    Args:
        owner_pid: the process that fills the store; `owner` is its pidfd.
        store: the memory file.
        lifeline: the launcher's pidfd.
    """

    def __init__(
        self,
        listener: socket.socket,
        nbytes: int,
        grace_s: float,
        owner_pid: int,
        store: int,
        owner: int,
        lifeline: int,
    ) -> None:
        self._listener = listener
        self._nbytes = nbytes
        self._grace_s = grace_s
        self._owner_pid = owner_pid
        self._store = store
        self._owner = owner
        self._lifeline = lifeline
        self._complete = False
        self._dropped = False
        self._clients: set[int] = {owner}
        self._ended: set[int] = set()
        self._alone_since = time.monotonic()
        self._poll = select.poll()
        for fd in (listener.fileno(), owner, lifeline):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        while not self._is_over():
            for fd, _ in self._poll.poll(self._patience_ms()):
                if fd == self._listener.fileno():
                    self._answer()
                else:
                    self._note_end(fd)

    def _is_over(self) -> bool:
        if self._dropped or (self._owner in self._ended and not self._complete):
            return True  # what nobody can complete only stands in the way of the next start
        if self._clients:
            return False
        return self._lifeline in self._ended or time.monotonic() >= self._alone_since + self._grace_s

    def _patience_ms(self) -> float | None:
        """None: until something happens."""
        if self._clients:
            return None
        return max(self._alone_since + self._grace_s - time.monotonic(), 0.0) * 1000

    def _note_end(self, process: int) -> None:
        self._poll.unregister(process)
        self._clients.discard(process)
        self._alone_since = time.monotonic()
        if process in (self._owner, self._lifeline):
            self._ended.add(process)  # stays open: a new client's pidfd must not get its number
        else:
            os.close(process)

    def _answer(self) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError):  # a client that died or hangs is not the keeper's trouble
            connection.settimeout(ANSWER_S / 3)  # the others wait behind it
            if _is_same_user(connection):
                self._obey(connection, connection.recv(_MESSAGE_BYTES))

    def _obey(self, connection: socket.socket, question: bytes) -> None:
        """No answer, only the end of the connection, is a no."""
        pid, _ = _peer(connection)
        if question == b"find %d" % self._nbytes and self._complete:
            self._hand_out(connection, pid)
        elif question == b"complete" and pid == self._owner_pid:
            self._complete = True
            connection.send(_YES)
        elif question == b"drop":
            self._dropped = True
            self._listener.close()
            os.close(self._store)

    def _hand_out(self, connection: socket.socket, pid: int) -> None:
        client = os.pidfd_open(pid)
        try:
            socket.send_fds(connection, [_YES], [self._store])
        except OSError:  # it died or gave up meanwhile: `pid` may be another process by now
            os.close(client)
            raise
        self._clients.add(client)
        self._poll.register(client, select.POLLIN)


def _detach() -> bool:
    """Go on in a process that is not the rank's child; False in the one that is left behind.

    Ray ends the children of a worker that it ends, and a child that nobody waits for stays as a zombie.
    """
    if os.fork():
        return False
    for path, text in (("/proc/self/comm", _PROGRAM), ("/proc/self/oom_score_adj", "1000")):
        with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
            file.write(text)  # out of memory: better the cache than whoever computes
    return True


def _serve(address: str, nbytes: str, grace_s: str, *numbers: str) -> None:
    """Runs as the keeper. The bind decides which of several processes keeps a key."""
    with _socket() as listener:
        try:
            listener.bind("\0" + address)
        except OSError:
            return
        listener.listen(128)
        if _detach():
            keeper = _Keeper(listener, int(nbytes), float(grace_s), *map(int, numbers))
            os.write(1, _YES)
            os.dup2(0, 1)  # whoever started it waits for the end of the pipe
            keeper.run()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
