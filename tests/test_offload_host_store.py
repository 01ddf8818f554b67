"""The host store: one copy per node, exactly sized, and gone with its last process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from processes import store_holders

from crossdock.offload.memory.host_store import HostStore, mapped_share_bytes
from crossdock.offload.memory.store_handle import PREFIX, HostStoreHandle
from crossdock.runtime.rank.weights.kept_stores import KeptStores, StoreHolder
from tiers import not_quick

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
from crossdock.offload.memory.host_store import HostStore, mapped_share_bytes
from crossdock.offload.memory.store_handle import HostStoreHandle
store = HostStore.attach(HostStoreHandle(*map(int, sys.argv[1:])))
print("mapped", flush=True)
"""


@pytest.fixture(autouse=True, scope="module")
def nothing_of_others() -> None:
    """Models of other tests, in reference cycles, would keep their stores mapped."""
    gc.collect()


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


def _inode(handle: HostStoreHandle) -> int:
    return os.stat(f"/proc/{handle.pid}/fd/{handle.fd}").st_ino


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


def test_share_halves_with_twostore_holders(peers: list[Peer]) -> None:
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
    assert store_holders(inode) == {os.getpid()}
    store.close()
    assert mapped_share_bytes() == 0
    assert store_holders(inode) == set()
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


@not_quick
def test_memory_goes_with_killed_processes(peers: list[Peer]) -> None:
    """kill -9 of all ranks must leave nothing behind; of the owner alone, the others keep their bytes."""
    owner, handle = _owner(4 * MIB)
    peers.append(owner)
    attached = Peer(ATTACHER, handle.pid, handle.fd, handle.nbytes)
    peers.append(attached)
    inode = _inode(handle)
    assert store_holders(inode) == {owner.process.pid, attached.process.pid}
    owner.kill()
    assert store_holders(inode) == {attached.process.pid}
    assert attached.ask("int(store.bytes[-1])") == "7"
    attached.kill()
    assert store_holders(inode) == set()


@not_quick
def test_a_forgotten_store_goes_with_its_process(peers: list[Peer]) -> None:
    """A process that ends without `close` (an exception at start-up) leaves nothing either."""
    owner, handle = _owner(MIB)
    peers.append(owner)
    inode = _inode(handle)
    assert owner.process.stdin is not None
    owner.process.stdin.close()
    owner.process.stdin = None
    assert owner.process.wait(10) == 0
    assert store_holders(inode) == set()


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


# -- kept beyond its ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def holder() -> Iterator[StoreHolder]:
    kept = KeptStores()
    yield StoreHolder(kept.answer)
    kept.drop()


@not_quick
def test_a_kept_store_outlives_its_creator(peers: list[Peer], holder: StoreHolder) -> None:
    """kill -9 of the rank that read the checkpoint; the next one maps the very same pages."""
    owner, handle = _owner(3 * MIB + 5)
    peers.append(owner)
    assert holder.find("part", "key") is None
    holder.keep("part", "key", handle)
    inode = _inode(handle)
    assert mapped_share_bytes() == 0, "the holder maps nothing: it takes no share"
    owner.kill()
    assert holder.find("another part", "key") is None
    found = holder.find("part", "key")
    assert found is not None
    assert (found.pid, found.nbytes, _inode(found)) == (os.getpid(), handle.nbytes, inode)
    attached = Peer(ATTACHER, found.pid, found.fd, found.nbytes)
    peers.append(attached)
    assert attached.ask("set(store.bytes.tolist())") == "{7}"
    attached.kill()
    assert store_holders(inode) == {os.getpid()}
    holder.drop()
    assert store_holders(inode) == set()
    assert holder.find("part", "key") is None


def test_bytes_that_nobody_will_need_are_given_up(holder: StoreHolder) -> None:
    """Before others of the same part take as much. Those of another part stay."""
    stores = [HostStore.create(MIB) for _ in range(2)]
    inodes = [_inode(store.handle) for store in stores]
    for part, store in zip(("0", "1"), stores, strict=True):
        holder.keep(part, "old", store.handle)
        store.close()
    assert holder.find("0", "new") is None
    assert [store_holders(inode) for inode in inodes] == [set(), {os.getpid()}]
    assert holder.find("0", "old") is None
    assert holder.find("1", "old") is not None


def test_what_cannot_be_kept(peers: list[Peer], holder: StoreHolder) -> None:
    """Its owner has died, or what it names is no store; that is no reason to fail a run, nor is a holder's end."""
    owner, handle = _owner(MIB)
    peers.append(owner)
    owner.kill()
    with open("/dev/null") as other:
        for wrong in (handle, HostStoreHandle(os.getpid(), other.fileno(), MIB)):
            holder.keep("part", "key", wrong)
            assert holder.find("part", "key") is None

    def gone(question: str) -> str:
        raise ConnectionError

    alone = StoreHolder(gone)
    alone.keep("part", "key", handle)
    alone.drop()
    assert alone.find("part", "key") is None
