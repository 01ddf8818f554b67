"""How a process names a host store to another, which need not have torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

PREFIX = "crossdock-blocks"
"""How a store is called in /proc/<pid>/maps, for whoever measures its share."""


@dataclass(frozen=True)
class HostStoreHandle:
    """What another process of the node (same user, same pid namespace) needs to map a store."""

    pid: int
    fd: int
    nbytes: int

    def open(self) -> int:
        """A descriptor of this process for the same memory.

        Raises:
            OSError: the owner is gone, belongs to another user, lives in another pid namespace, or closed the store.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        if not os.readlink(path).startswith(f"/memfd:{PREFIX}"):
            raise FileNotFoundError(f"{path} is no host store any more: its owner closed it")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
