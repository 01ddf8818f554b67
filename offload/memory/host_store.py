"""Host memory for block bytes: exactly sized, one copy per node, gone with its last process.

A store is an anonymous memory file (`memfd_create`). Other ranks of the node map the same pages through
`/proc/<pid>/fd/<fd>`. Nothing ever appears in /dev/shm or on disk, so there is nothing to clean up after a crash or
kill -9: the kernel frees the pages with the last mapping. On CUDA the mapping is registered (pinned) as it is;
torch's pinned allocator would round it up to a power of two.

A store with a key outlives its ranks for a while, so that a gang that crashed starts again without reading the
checkpoint: see `store_keeper`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from crossdock.offload.memory import store_keeper

PREFIX = "crossdock-blocks"
"""How a store is called in /proc/<pid>/maps, for whoever measures its share."""


@dataclass(frozen=True)
class HostStoreHandle:
    """What another process of the node (same user, same pid namespace) needs to map a store."""

    pid: int
    fd: int
    nbytes: int


class HostStore:
    """`bytes`: uint8 `[nbytes]`, shared with every process that maps the same store.

    `key`: under which a keeper holds the memory; None without one.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, max(nbytes, 1), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self._registered = False
        self.key: str | None = None

    @classmethod
    def create(
        cls, nbytes: int, key: str | None = None, *, grace_s: float = store_keeper.GRACE_S, name: str = PREFIX
    ) -> HostStore:
        """A store of zeros, whose size nobody can change any more: a reader would die of SIGBUS.

        Args:
            key: hex digest of what the bytes will be, to keep them beyond this process. Write the bytes, then `seal`.
                Where the key is taken or no keeper can be started, the store is an ordinary one: `key` is None.
            grace_s: how long they are kept when every process that made or found the store is dead.
            name: what the memory is called in /proc/<pid>/maps.

        Raises:
            OSError: no memory for the mapping.
            ValueError: `key` is no hex digest.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, max(nbytes, 1))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        store = cls(fd, nbytes)
        if key is not None and store_keeper.keep(key, fd, nbytes, grace_s=grace_s):
            store.key = key
        return store

    @classmethod
    def find(cls, key: str, nbytes: int) -> HostStore | None:
        """Map the kept store of this key, if there is one of exactly this size whose bytes are all written.

        From then on it is also kept for this process. The wait is at most a few seconds (`store_keeper.ANSWER_S`).
        """
        fd = store_keeper.find(key, nbytes)
        if fd is None:
            return None
        store = cls(fd, nbytes)
        store.key = key
        return store

    @classmethod
    def attach(cls, handle: HostStoreHandle) -> HostStore:
        """Map a store of another process of this node.

        Raises:
            OSError: the owner is gone, belongs to another user, lives in another pid namespace, or closed the store.
        """
        path = f"/proc/{handle.pid}/fd/{handle.fd}"
        if not os.readlink(path).startswith(f"/memfd:{PREFIX}"):
            raise FileNotFoundError(f"{path} is no host store any more: its owner closed it")
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), handle.nbytes)

    @property
    def handle(self) -> HostStoreHandle:
        return HostStoreHandle(os.getpid(), self._fd, self.nbytes)

    def register(self) -> None:
        """Pin the pages for asynchronous copies to a CUDA device. Call it once the bytes are written.

        Raises:
            RuntimeError: CUDA refused; usually the locked-memory limit.
        """
        if self.nbytes == 0 or self._registered:
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostRegister(self.bytes.data_ptr(), self.nbytes, 0)
        if int(error) != 0:
            raise RuntimeError(f"pinning {self.nbytes} bytes of host memory failed with CUDA error {int(error)}")
        self._registered = True

    def seal(self) -> None:
        """All bytes are written: from now on `find` hands the store out. Nothing to do without a key."""
        if self.key is not None:
            store_keeper.complete(self.key)

    def drop(self) -> None:
        """Nobody will need the bytes again: end the keeper. The memory goes with the last mapping."""
        if self.key is not None:
            store_keeper.drop(self.key)
            self.key = None

    def close(self) -> None:
        """Unmap; a keeper goes on keeping (see `drop`). The tensor views must not be used afterwards."""
        if self._registered:
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.bytes.data_ptr())
            self._registered = False
        del self.bytes, self._map  # a view that is still held elsewhere keeps the mapping
        os.close(self._fd)


def mapped_share_bytes() -> int:
    """This process's proportional share (PSS) of all stores it maps: shared pages are divided by their users."""
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split(" ", 1)[0]:
                inside = PREFIX in line
            elif inside and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total
