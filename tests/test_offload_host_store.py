"""The host store: one copy per node, exactly sized, and gone with its last process."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossdock.offload.memory import store_keeper
from crossdock.offload.memory.host_store import PREFIX, HostStore, HostStoreHandle, mapped_share_bytes

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")

OWNER = """
import sys
from crossdock.offload.memory.host_store import HostStore, mapped_share_bytes
store = HostStore.create(int(sys.argv[1]))
store.bytes.fill_(7)
print(store.handle.pid, store.handle.fd, flush=True)
"""
SERVE = """
for line in sys.stdin:
    print(eval(line), flush=True)
"""
ATTACHER = """
import sys
from crossdock.offload.memory.host_store import HostStore, HostStoreHandle, mapped_share_bytes
store = HostStore.attach(HostStoreHandle(*map(int, sys.argv[1:])))
print("mapped", flush=True)
"""

KEYED = """
import sys
from crossdock.offload.memory.host_store import HostStore
print("ready", flush=True)
"""


class Peer:
    """Another process that holds a store; `ask` evaluates an expression in it."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script + SERVE, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first_line = self._line()

    def ask(self, expression: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._line()

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def _owner(nbytes: int) -> tuple[Peer, HostStoreHandle]:
    peer = Peer(OWNER, nbytes)
    pid, fd = map(int, peer.first_line.split())
    return peer, HostStoreHandle(pid, fd, nbytes)


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """Processes that a test started; all ended afterwards, whatever happened."""
    started: list[Peer] = []
    yield started
    for peer in started:
        if peer.process.poll() is None:
            peer.process.kill()
        peer.process.wait(10)
        for pipe in (peer.process.stdin, peer.process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def key() -> Iterator[str]:
    """A key of its own for every test; its keeper is ended afterwards."""
    key = secrets.token_hex(32)
    yield key
    store_keeper.drop(key)


def _inode(handle: HostStoreHandle) -> int:
    return os.stat(f"/proc/{handle.pid}/fd/{handle.fd}").st_ino


def _mappers(inode: int) -> set[int]:
    """Processes that map or hold open the store with this inode."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "maps").read_text().splitlines()
            files = list((process / "fd").iterdir())
        except OSError:  # it ended, or is not ours
            continue
        mapped = any(PREFIX in line and line.split()[4] == str(inode) for line in lines)
        if mapped or any(_is_store(file, inode) for file in files):
            found.add(int(process.name))
    return found


def _is_store(file: Path, inode: int) -> bool:
    try:
        return PREFIX in os.readlink(file) and file.stat().st_ino == inode
    except OSError:  # closed meanwhile
        return False


def test_two_processes_share_one_copy(peers: list[Peer]) -> None:
    """Pitfall 29: each rank with its own copy of the model. What one writes, the other sees, both ways."""
    owner, handle = _owner(3 * MIB)
    peers.append(owner)
    store = HostStore.attach(handle)
    assert store.nbytes == 3 * MIB
    assert bool((store.bytes == 7).all())
    store.bytes[12345] = 99
    assert owner.ask("store.bytes[12345].item()") == "99"
    assert owner.ask("store.bytes[54321].fill_(42).item()") == "42"
    assert store.bytes[54321].item() == 42
    store.close()


def test_share_halves_with_two_mappers(peers: list[Peer]) -> None:
    """Pitfall 31: the number reported must be what the node pays: shared pages divided by their users."""
    nbytes = 8 * MIB
    owner, handle = _owner(nbytes)
    peers.append(owner)
    alone = int(owner.ask("mapped_share_bytes()"))
    attached = Peer(ATTACHER, handle.pid, handle.fd, nbytes)
    peers.append(attached)
    assert attached.first_line == "mapped"
    assert attached.ask("int(store.bytes.long().sum())") == str(7 * nbytes)  # touches every page
    shared = [int(peer.ask("mapped_share_bytes()")) for peer in (owner, attached)]
    print(f"store {nbytes} bytes: share {alone} alone, then {shared} with two mappers")
    assert alone == nbytes
    assert shared == [nbytes // 2, nbytes // 2]
    attached.kill()
    assert int(owner.ask("mapped_share_bytes()")) == nbytes


def test_share_is_of_stores_only() -> None:
    """Other mappings of the process must not be reported as streamed weights."""
    assert mapped_share_bytes() == 0
    first, second = HostStore.create(PAGE * 3), HostStore.create(PAGE * 5)
    assert mapped_share_bytes() == 0  # reserved, not paid for yet
    first.bytes.fill_(1)
    second.bytes.fill_(1)
    assert mapped_share_bytes() == PAGE * 8
    first.close()
    second.close()


def test_close_gives_the_memory_back() -> None:
    """Pitfall 19: the second model of a process must not pay for the first one's store."""
    store = HostStore.create(PAGE * 4)
    handle, inode = store.handle, _inode(store.handle)
    store.bytes.fill_(1)
    assert _mappers(inode) == {os.getpid()}
    store.close()
    assert mapped_share_bytes() == 0
    assert _mappers(inode) == set()
    with pytest.raises(OSError, match=rf"/proc/{handle.pid}/fd/{handle.fd}"):
        HostStore.attach(handle)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 5 * MIB + 123, 33 * MIB])
def test_exact_size(nbytes: int) -> None:
    """Pitfall 28: pinned memory rounded up to a power of two locked 68 GiB for 41 and killed the desktop."""
    store = HostStore.create(nbytes)
    store.bytes.fill_(1)
    status = os.fstat(store.handle.fd)
    assert store.bytes.shape == (nbytes,)
    assert status.st_size == max(nbytes, 1)
    assert status.st_blocks * 512 <= nbytes + PAGE
    assert mapped_share_bytes() <= nbytes + PAGE
    store.close()


def test_nothing_in_shared_memory_files() -> None:
    """A name in /dev/shm outlives kill -9 and needs somebody to clean up; a store has no name anywhere."""
    before = set(os.listdir("/dev/shm"))
    store = HostStore.create(MIB)
    store.bytes.fill_(1)
    assert set(os.listdir("/dev/shm")) == before
    target = os.readlink(f"/proc/self/fd/{store.handle.fd}")
    assert target == f"/memfd:{PREFIX} (deleted)"
    store.close()


def test_memory_goes_with_killed_processes(peers: list[Peer]) -> None:
    """kill -9 of all ranks must leave nothing behind; of the owner alone, the others keep their bytes."""
    owner, handle = _owner(4 * MIB)
    peers.append(owner)
    attached = Peer(ATTACHER, handle.pid, handle.fd, handle.nbytes)
    peers.append(attached)
    inode = _inode(handle)
    assert _mappers(inode) == {owner.process.pid, attached.process.pid}
    owner.kill()
    assert _mappers(inode) == {attached.process.pid}
    assert attached.ask("int(store.bytes[-1])") == "7"
    attached.kill()
    assert _mappers(inode) == set()


def test_a_forgotten_store_goes_with_its_process(peers: list[Peer]) -> None:
    """A process that ends without `close` (an exception at start-up) leaves nothing either."""
    owner, handle = _owner(MIB)
    peers.append(owner)
    inode = _inode(handle)
    assert owner.process.stdin is not None
    owner.process.stdin.close()
    owner.process.stdin = None
    assert owner.process.wait(10) == 0
    assert _mappers(inode) == set()


def test_attach_to_a_dead_owner(peers: list[Peer]) -> None:
    """A rank that starts after the owner died gets an error at once, not zeros and not a wait."""
    owner, handle = _owner(MIB)
    peers.append(owner)
    owner.kill()
    began = time.monotonic()
    with pytest.raises(OSError, match=rf"/proc/{handle.pid}/fd/{handle.fd}"):
        HostStore.attach(handle)
    assert time.monotonic() - began < 1


def test_nobody_can_change_the_size(peers: list[Peer]) -> None:
    """A reader of a truncated mapping would die of SIGBUS, without a message."""
    owner, handle = _owner(MIB)
    peers.append(owner)
    store = HostStore.attach(handle)
    for nbytes in (0, MIB - 1, MIB + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(store.handle.fd, nbytes)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/{handle.pid}/fd/{handle.fd}", 0)
    assert int(store.bytes[-1]) == 7
    store.close()


# -- stores with a key -------------------------------------------------------------------------------------------


def _fill_with(value: int, key: str, nbytes: int) -> str:
    return f"(s := HostStore.create({nbytes}, '{key}', grace_s=60)).bytes.fill_({value}) is not None and s.key"


def test_a_sealed_store_outlives_its_creator(peers: list[Peer], key: str) -> None:
    """kill -9 of the rank that read the checkpoint; the next one maps the very same pages, in exactly this size."""
    nbytes = 3 * MIB + 5
    creator = Peer(KEYED)
    peers.append(creator)
    assert creator.ask(_fill_with(7, key, nbytes)) == key
    assert HostStore.find(key, nbytes) is None
    assert creator.ask("s.seal()") == "None"
    pid, fd = map(int, creator.ask("(s.handle.pid, s.handle.fd)").strip("()").split(","))
    inode = _inode(HostStoreHandle(pid, fd, nbytes))
    creator.kill()
    assert HostStore.find(key, nbytes - 1) is None
    assert HostStore.find(key[:-1], nbytes) is None
    store = HostStore.find(key, nbytes)
    assert store is not None
    assert (store.nbytes, store.key, _inode(store.handle)) == (nbytes, key, inode)
    assert bool((store.bytes == 7).all())
    assert nbytes <= mapped_share_bytes() < nbytes + PAGE  # the keeper maps nothing: it takes no share
    attached = Peer(ATTACHER, store.handle.pid, store.handle.fd, nbytes)
    peers.append(attached)
    assert attached.ask("int(store.bytes[-1])") == "7"
    attached.kill()
    store.drop()
    store.close()
    assert _mappers(inode) == set()


def test_an_unsealed_store_dies_with_its_creator(peers: list[Peer], key: str) -> None:
    creator = Peer(KEYED)
    peers.append(creator)
    assert creator.ask(_fill_with(7, key, MIB)) == key
    creator.kill()
    assert HostStore.find(key, MIB) is None


def test_two_creators_at_once(peers: list[Peer], key: str) -> None:
    """One store gets the key; the other is an ordinary one, whose seal and drop do not touch the kept one."""
    both = [Peer(KEYED), Peer(KEYED)]
    peers.extend(both)
    for value, peer in enumerate(both):
        assert peer.process.stdin is not None
        peer.process.stdin.write(_fill_with(value, key, MIB) + "\n")
        peer.process.stdin.flush()
    keys = [peer._line() for peer in both]
    assert sorted(keys) == sorted([key, "None"])
    winner = keys.index(key)
    assert both[1 - winner].ask("s.seal()") == "None"
    assert HostStore.find(key, MIB) is None
    assert both[winner].ask("s.seal()") == "None"
    assert both[1 - winner].ask("s.drop()") == "None"
    for peer in both:
        assert peer.ask(f"set(HostStore.find('{key}', {MIB}).bytes.tolist())") == f"{{{winner}}}"


def test_close_keeps_and_drop_ends(key: str) -> None:
    """Closing and starting again in one process finds the bytes; a normal end leaves nothing."""
    store = HostStore.create(MIB, key)
    store.bytes.fill_(3)
    store.seal()
    inode = _inode(store.handle)
    store.close()
    assert len(_mappers(inode)) == 1
    again = HostStore.find(key, MIB)
    assert again is not None
    assert int(again.bytes[-1]) == 3
    again.drop()
    again.drop()
    assert again.key is None
    assert int(again.bytes[-1]) == 3
    assert _mappers(inode) == {os.getpid()}
    again.close()
    assert _mappers(inode) == set()
    assert HostStore.find(key, MIB) is None


def test_an_empty_store_is_kept_too(key: str) -> None:
    store = HostStore.create(0, key)
    store.seal()
    found = HostStore.find(key, 0)
    assert found is not None
    assert found.bytes.shape == (0,)
    store.drop()
    store.close()
    found.close()


def test_a_store_without_a_keeper_is_an_ordinary_one(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a crash would cost the reading again is no reason to fail a run."""
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    store = HostStore.create(MIB, key)
    assert store.key is None
    store.bytes.fill_(3)
    store.seal()
    store.drop()
    assert int(store.bytes[-1]) == 3
    store.close()
    assert mapped_share_bytes() == 0
