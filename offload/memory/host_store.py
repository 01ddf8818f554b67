"""Host memory for block bytes: exactly sized, one copy per node, gone with its last process.

A store is an anonymous memory file (`memfd_create`). Other ranks of the node map the same pages through
`/proc/<pid>/fd/<fd>`. Nothing ever appears in /dev/shm or on disk, so there is nothing to clean up after a crash or
kill -9: the kernel frees the pages with the last mapping. On CUDA the mapping is registered (pinned) as it is;
torch's pinned allocator would round it up to a power of two.

Where the process that started the ranks holds a store, too, it outlives them.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import torch
from torch import Tensor

from crossdock.offload.memory.store_handle import PREFIX, HostStoreHandle


class HostStore:
    """`bytes`: uint8 `[nbytes]`, shared with every process that maps the same store."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self.nbytes = nbytes
        self._map = mmap.mmap(fd, max(nbytes, 1), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]
        self._registered = False

    @classmethod
    def create(cls, nbytes: int, *, name: str = PREFIX) -> HostStore:
        """A store of zeros, whose size nobody can change any more: a reader would die of SIGBUS.

        Args:
            name: what the memory is called in /proc/<pid>/maps.

        Raises:
            OSError: no memory for the mapping.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, max(nbytes, 1))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return cls(fd, nbytes)

    @classmethod
    def attach(cls, handle: HostStoreHandle) -> HostStore:
        """Map a store of another process of this node.

        Raises:
            OSError: as `HostStoreHandle.open`, or no memory for the mapping.
        """
        return cls(handle.open(), handle.nbytes)

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

    def close(self) -> None:
        """Unmap. The tensor views must not be used afterwards."""
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
