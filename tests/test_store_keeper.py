"""The keeper of a host store: it outlives ranks that are killed, ends by itself, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crossdock.offload.memory import store_keeper

MIB = 2**20
SIZE = 3 * MIB + 123
LONG_S = 60.0
"""A grace that no test waits for."""
NOBODY = 65534

RANK = """
import mmap, os, signal, sys
from crossdock.offload.memory import store_keeper

def create(key, nbytes, value, **options):
    global memory
    fd = os.memfd_create("crossdock-blocks")
    os.ftruncate(fd, nbytes)
    memory = mmap.mmap(fd, nbytes)
    memory.write(bytes([value]) * nbytes)
    kept = store_keeper.keep(key, fd, nbytes, **options)
    os.close(fd)
    return kept

def read(key, nbytes):
    global memory
    fd = store_keeper.find(key, nbytes)
    if fd is None:
        return None
    memory = mmap.mmap(fd, nbytes)
    os.close(fd)
    return set(memory[:])

print("ready", flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Rank:
    """A process that makes and finds stores; `ask` evaluates an expression in it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        assert self.answer() == "ready"

    def say(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> str:
        self.say(expression)
        return self.answer()

    def make(self, key: str, nbytes: int = SIZE, grace_s: float = LONG_S, launcher: int | None = None) -> None:
        """A complete store full of sevens."""
        assert self.ask(f"create('{key}', {nbytes}, 7, grace_s={grace_s}, launcher={launcher})") == "True"
        assert self.ask(f"store_keeper.complete('{key}')") == "True"

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL


@pytest.fixture
def rank() -> Iterator[Callable[[], Rank]]:
    """Starts ranks; all are ended afterwards, whatever happened."""
    started: list[Rank] = []

    def start() -> Rank:
        started.append(Rank())
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(10)
        for pipe in (one.process.stdin, one.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def launcher() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait(10)


@pytest.fixture
def key() -> Iterator[str]:
    """A key of its own for every test; its keeper is ended afterwards."""
    key = secrets.token_hex(32)
    yield key
    for pid in _keepers(key):
        os.kill(pid, signal.SIGKILL)
    assert _within(5, lambda: not _keepers(key))


def _keepers(key: str) -> list[int]:
    """Zombies have no command line: they do not count."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if key.encode() in _read(path)]


def _keeper(key: str) -> int:
    (pid,) = _keepers(key)
    return pid


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended
        return b""


def _sockets(key: str) -> list[bytes]:
    return [line for line in _read(Path("/proc/net/unix")).splitlines() if key.encode() in line]


def _within(limit_s: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def _shared_memory_bytes() -> int:
    """Of the whole machine: what memory files and /dev/shm take."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return int(line.split()[1]) * 1024


# -- what it keeps -----------------------------------------------------------------------------------------------


def test_the_bytes_survive_the_rank_that_read_them(rank: Callable[[], Rank], key: str) -> None:
    """A gang that crashed must not read tens of GB again: the same bytes, also for a second crash."""
    first = rank()
    first.make(key)
    first.kill()
    second = rank()
    assert second.ask(f"read('{key}', {SIZE})") == "{7}"
    second.kill()
    assert rank().ask(f"read('{key}', {SIZE})") == "{7}"


def test_half_written_bytes_are_never_handed_out(rank: Callable[[], Rank], key: str) -> None:
    """A rank that dies while it loads leaves bytes that look like a model. Its keeper must not hold the key either."""
    owner, other = rank(), rank()
    assert owner.ask(f"create('{key}', {SIZE}, 7, grace_s={LONG_S})") == "True"
    assert other.ask(f"read('{key}', {SIZE})") == "None"
    owner.kill()
    assert other.ask(f"read('{key}', {SIZE})") == "None"
    assert _within(5, lambda: not _keepers(key))
    assert other.ask(f"create('{key}', {SIZE}, 8)") == "True"
    assert other.ask(f"store_keeper.complete('{key}')") == "True"
    assert rank().ask(f"read('{key}', {SIZE})") == "{8}"


def test_only_the_owner_says_when_it_is_complete(rank: Callable[[], Rank], key: str) -> None:
    """A second run of the same model that found nothing reads its own copy; when that is full, this one is not."""
    owner, other = rank(), rank()
    assert owner.ask(f"create('{key}', {SIZE}, 7)") == "True"
    assert other.ask(f"store_keeper.complete('{key}')") == "False"
    assert other.ask(f"read('{key}', {SIZE})") == "None"


def test_another_size_or_key_finds_nothing(rank: Callable[[], Rank], key: str) -> None:
    owner = rank()
    owner.make(key)
    other = key[:-1] + ("0" if key[-1] != "0" else "1")
    for name, nbytes in ((other, SIZE), (key, SIZE + 1), (key, SIZE - 1), (key, 0), (key[:-1], SIZE)):
        assert store_keeper.find(name, nbytes) is None
    for unusable in ("", "xyz", key.upper() + "A", key * 2, "../" + key[:8]):
        with pytest.raises(ValueError, match="hex digits"):
            store_keeper.find(unusable, SIZE)


def test_what_is_found_is_closed_on_exec(rank: Callable[[], Rank], key: str) -> None:
    """A child of a rank that inherits the memory file would keep it alive."""
    rank().make(key)
    fd = store_keeper.find(key, SIZE)
    assert fd is not None
    assert not os.get_inheritable(fd)
    assert os.fstat(fd).st_size == SIZE
    os.close(fd)


def test_several_create_at_once(rank: Callable[[], Rank], key: str) -> None:
    """One wins; the others are told so, do not disturb it, and find its bytes."""
    ranks = [rank() for _ in range(4)]
    for number, one in enumerate(ranks):
        one.say(f"create('{key}', {SIZE}, {number})")
    kept = [one.answer() for one in ranks]
    assert sorted(kept) == ["False", "False", "False", "True"]
    winner = kept.index("True")
    assert ranks[winner].ask(f"store_keeper.complete('{key}')") == "True"
    assert len(_keepers(key)) == 1
    assert [one.ask(f"read('{key}', {SIZE})") for one in ranks] == [f"{{{winner}}}"] * 4


def test_a_taken_key_is_noticed_where_child_statuses_are_ignored(rank: Callable[[], Rank], key: str) -> None:
    """An ignored SIGCHLD is inherited over exec, and every exit status then reads as 0."""
    rank().make(key)
    other = rank()
    other.ask("signal.signal(signal.SIGCHLD, signal.SIG_IGN)")
    assert other.ask(f"create('{key}', {SIZE}, 8)") == "False"
    assert other.ask(f"create('{key[:-1]}', {SIZE}, 8)") == "True"


# -- how it ends -------------------------------------------------------------------------------------------------


def test_drop_ends_it(rank: Callable[[], Rank], key: str) -> None:
    """The normal close of a run. The key is free when `drop` returns, and the users keep their mapping."""
    owner = rank()
    owner.make(key)
    assert rank().ask(f"store_keeper.drop('{key}')") == "True"
    assert _sockets(key) == []
    assert owner.ask(f"store_keeper.find('{key}', {SIZE})") == "None"
    assert owner.ask(f"store_keeper.drop('{key}')") == "False"
    assert owner.ask("memory[-1]") == "7"
    owner.make(key)


def test_it_ends_after_the_grace(rank: Callable[[], Rank], key: str) -> None:
    """Ranks that nobody starts again must not occupy the node's memory."""
    owner = rank()
    owner.make(key, grace_s=0.8)
    time.sleep(1)
    assert _keepers(key)
    owner.kill()
    began = time.monotonic()
    assert _within(10, lambda: not _keepers(key))
    assert 0.7 < time.monotonic() - began < 3
    assert _sockets(key) == []


def test_who_found_it_keeps_it_alive(rank: Callable[[], Rank], key: str) -> None:
    owner, finder, refused = rank(), rank(), rank()
    owner.make(key, grace_s=0.3)
    assert finder.ask(f"read('{key}', {SIZE})") == "{7}"
    assert refused.ask(f"read('{key}', {SIZE + 1})") == "None"
    owner.kill()
    time.sleep(0.8)
    assert _keepers(key)
    finder.kill()
    assert _within(3, lambda: not _keepers(key))


def test_it_ends_with_the_launcher(rank: Callable[[], Rank], key: str, launcher: subprocess.Popen[bytes]) -> None:
    """Nobody starts the ranks again: what they left is worth no grace."""
    owner = rank()
    owner.make(key, launcher=launcher.pid)
    owner.kill()
    time.sleep(0.3)
    assert _keepers(key)
    launcher.kill()
    assert _within(3, lambda: not _keepers(key))


def test_without_the_launcher_it_ends_with_the_last_rank(
    rank: Callable[[], Rank], key: str, launcher: subprocess.Popen[bytes]
) -> None:
    """While one lives, another run may still find the store."""
    owner, finder = rank(), rank()
    owner.make(key, launcher=launcher.pid)
    launcher.kill()
    time.sleep(0.3)
    assert finder.ask(f"read('{key}', {SIZE})") == "{7}"
    owner.kill()
    time.sleep(0.3)
    assert _keepers(key)
    finder.kill()
    assert _within(3, lambda: not _keepers(key))


def test_the_launcher_is_the_parent(key: str) -> None:
    """Torchrun's agent and Ray's raylet are their ranks' parents."""
    rank = RANK.replace("for line in sys.stdin", "for line in sys.argv[1:]")
    lines = [f"create('{key}', 5, 7, grace_s={LONG_S})", f"store_keeper.complete('{key}')"]
    parent = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', *sys.argv[1:]]); time.sleep(100)"
    launcher = subprocess.Popen([sys.executable, "-c", parent, rank, *lines], stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout is not None
        assert [launcher.stdout.readline().strip() for _ in range(3)] == ["ready", "True", "True"]
        time.sleep(0.3)
        keepers = [pid for pid in _keepers(key) if "store_keeper.py" in _read(Path(f"/proc/{pid}/cmdline")).decode()]
        assert len(keepers) == 1
    finally:
        launcher.kill()
        launcher.communicate(timeout=10)
    assert _within(3, lambda: not _keepers(key))


def test_kill_of_everything_leaves_nothing(rank: Callable[[], Rank], key: str) -> None:
    """No process, no socket, no file; and the next start has nothing to clean up first."""
    before = set(os.listdir("/dev/shm"))
    owner = rank()
    owner.make(key)
    assert _within(2, lambda: len(_sockets(key)) == 1)
    assert set(os.listdir("/dev/shm")) == before
    keeper = _keeper(key)
    os.kill(keeper, signal.SIGKILL)
    owner.kill()
    assert _within(5, lambda: not _keepers(key) and not _sockets(key))
    assert set(os.listdir("/dev/shm")) == before
    assert store_keeper.find(key, SIZE) is None
    rank().make(key)


def test_a_keeper_that_was_killed_costs_only_the_cache(rank: Callable[[], Rank], key: str) -> None:
    owner = rank()
    owner.make(key)
    os.kill(_keeper(key), signal.SIGKILL)
    assert _within(5, lambda: not _sockets(key))
    assert owner.ask(f"store_keeper.complete('{key}')") == "False"
    assert owner.ask(f"store_keeper.drop('{key}')") == "False"
    assert owner.ask("memory[-1]") == "7"


def test_the_memory_is_given_back(rank: Callable[[], Rank], key: str) -> None:
    """Held once by keeper and mapper together, held by the keeper alone, and free when both are gone."""
    nbytes = 256 * MIB  # far above what tests beside this one may hold or give back
    before = _shared_memory_bytes()
    owner = rank()
    owner.make(key, nbytes, grace_s=0.5)
    held = _shared_memory_bytes() - before
    owner.kill()
    kept = _shared_memory_bytes() - before
    assert _within(5, lambda: not _keepers(key))
    assert _within(5, lambda: _shared_memory_bytes() - before < nbytes // 2)
    print(f"shared memory of the machine: +{held} with a mapper, +{kept} with the keeper alone")
    assert nbytes // 2 < held < nbytes * 3 // 2
    assert nbytes // 2 < kept < nbytes * 3 // 2


# -- what does not disturb it ------------------------------------------------------------------------------------


def test_ctrl_c_does_not_reach_it(rank: Callable[[], Rank], key: str) -> None:
    """The terminal sends SIGINT to the whole process group of the ranks, and SIGHUP to the session."""
    owner = rank()
    owner.make(key)
    keeper = _keeper(key)
    assert os.getsid(keeper) not in (os.getsid(owner.process.pid), os.getsid(0))
    os.killpg(owner.process.pid, signal.SIGINT)
    assert owner.process.wait(10) != 0
    time.sleep(0.3)
    assert _keeper(key) == keeper
    assert rank().ask(f"read('{key}', {SIZE})") == "{7}"


def test_it_is_small_idle_and_nobodys_child(rank: Callable[[], Rank], key: str) -> None:
    """Ray ends the children of a worker that it ends; a launcher that looks at its family must not find it."""
    owner = rank()
    owner.make(key)
    keeper = _keeper(key)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{keeper}/status").read_text().splitlines())
    assert "crossdock-keeper".startswith(status["Name"].strip())
    assert int(status["PPid"]) not in (owner.process.pid, os.getpid())
    assert int(status["VmRSS"].split()[0]) < 24 * 1024  # kB; the store is not mapped, and no torch
    assert "crossdock-blocks" not in Path(f"/proc/{keeper}/maps").read_text()
    assert os.readlink(f"/proc/{keeper}/cwd") == "/"
    assert {os.readlink(f"/proc/{keeper}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert Path(f"/proc/{keeper}/oom_score_adj").read_text().strip() == "1000"
    owner.kill()
    before = _cpu_ticks(keeper)
    time.sleep(0.5)
    assert _cpu_ticks(keeper) - before <= 1


def test_ended_processes_do_not_wake_it_up(
    rank: Callable[[], Rank], key: str, launcher: subprocess.Popen[bytes]
) -> None:
    """A pidfd of an ended process stays readable: whoever keeps polling it never sleeps again."""
    owner, finder = rank(), rank()
    owner.make(key, launcher=launcher.pid)
    assert finder.ask(f"read('{key}', {SIZE})") == "{7}"
    launcher.kill()
    owner.kill()
    keeper = _keeper(key)
    before = _cpu_ticks(keeper)
    time.sleep(0.5)
    assert _cpu_ticks(keeper) - before <= 1


def test_one_that_does_not_answer_hangs_nobody(
    rank: Callable[[], Rank], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped keeper: every call comes back in time, as if there were none; going on, it serves again."""
    monkeypatch.setattr(store_keeper, "ANSWER_S", 0.5)
    rank().make(key)
    keeper = _keeper(key)
    os.kill(keeper, signal.SIGSTOP)
    began = time.monotonic()
    assert store_keeper.find(key, SIZE) is None
    assert not store_keeper.complete(key)
    assert not store_keeper.keep(key, 0, SIZE)
    assert 0.9 < time.monotonic() - began < 3
    os.kill(keeper, signal.SIGCONT)
    assert rank().ask(f"read('{key}', {SIZE})") == "{7}"


def test_a_client_that_says_nothing_holds_nobody_up(rank: Callable[[], Rank], key: str) -> None:
    rank().make(key)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(f"\0crossdock-keeper-{os.geteuid()}-{key}")
        assert rank().ask(f"read('{key}', {SIZE})") == "{7}"


@pytest.mark.parametrize("question", [b"", b"find", b"find x", b"find -1", b"\xff" * 64, b"drop it"])
def test_questions_it_does_not_know(rank: Callable[[], Rank], key: str, question: bytes) -> None:
    """Another version of the program, for example: no answer, and no harm."""
    rank().make(key)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(5)
        other.connect(f"\0crossdock-keeper-{os.geteuid()}-{key}")
        other.send(question)
        assert other.recv(64) == b""
    assert rank().ask(f"read('{key}', {SIZE})") == "{7}"


def test_no_keeper_can_be_started(key: str, monkeypatch: pytest.MonkeyPatch, launcher: subprocess.Popen[bytes]) -> None:
    """Never a failure of the run: no interpreter, one that fails, one that hangs, no launcher, no memory file."""
    fd = os.memfd_create("crossdock-blocks")
    assert not store_keeper.keep(key, fd, 0, launcher=0)
    launcher.kill()
    launcher.wait(10)
    assert not store_keeper.keep(key, fd, 0, launcher=launcher.pid)
    for program in ("/nonexistent", "", "/bin/false", "/bin/echo"):
        monkeypatch.setattr(sys, "executable", program)
        assert not store_keeper.keep(key, fd, 0)
    os.close(fd)
    assert not store_keeper.keep(key, fd, 0)
    assert _keepers(key) == []


# -- who is answered ---------------------------------------------------------------------------------------------


def test_the_other_end_is_judged_by_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        assert store_keeper._peer(left) == (os.getpid(), os.geteuid())
        assert store_keeper._is_same_user(left)
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY - 1)
        assert not store_keeper._is_same_user(left)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_nothing(rank: Callable[[], Rank], key: str) -> None:
    """An abstract name has no permissions: anybody may connect."""
    rank().make(key)
    name = f"crossdock-keeper-{os.geteuid()}-{key}"
    for question in (b"find %d" % SIZE, b"drop"):
        assert _as_nobody(lambda question=question: _ask_as_stranger(name, question)) == 0  # type: ignore[misc]
    assert rank().ask(f"read('{key}', {SIZE})") == "{7}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_users_keeper_is_not_believed(key: str) -> None:
    """Anybody may also bind the name first, and hand out weights of his own."""
    heard, bound = os.pipe()

    def squat() -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"\0crossdock-keeper-0-{key}")
            listener.listen()
            os.write(bound, b"x")
            connection, _ = listener.accept()
            with connection, contextlib.suppress(BrokenPipeError):
                socket.send_fds(connection, [b"yes"], [os.memfd_create("crossdock-blocks")])
        return True

    pid = _fork_as_nobody(squat)
    assert os.read(heard, 1) == b"x"
    assert store_keeper.find(key, SIZE) is None
    os.close(heard)
    os.close(bound)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _ask_as_stranger(name: str, question: bytes) -> bool:
    """No descriptor and no word comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(5)
        stranger.connect("\0" + name)
        try:
            stranger.send(question)
            message, fds, _, _ = socket.recv_fds(stranger, 64, 1)
        except (BrokenPipeError, ConnectionResetError):  # it was shown the door before it could ask
            return True
        return message == b"" and not fds


def _fork_as_nobody(work: Callable[[], bool]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(10)
            os.setuid(NOBODY)
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return pid


def _as_nobody(work: Callable[[], bool]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_fork_as_nobody(work), 0)[1])
