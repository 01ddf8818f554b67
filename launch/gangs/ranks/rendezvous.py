"""The store in which ranks find each other, where it is ours: reachable where the ranks are, and nowhere else."""

from __future__ import annotations

import socket

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from crossdock.runtime.errors import LaunchError

LOOPBACK = "127.0.0.1"
_BACKLOG = 4096


def open_store(host: str, port: int, world_size: int) -> TCPStore:
    """A store that listens on `host` alone; torch's own server would listen on all interfaces.

    Args:
        host: of this machine: the loopback address, or the one at which the other nodes reach it.
        port: 0: a free one that the system picks.

    Raises:
        LaunchError: the port is taken.
    """
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
        port = listener.getsockname()[1]
        return TCPStore(
            host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    except (RuntimeError, OSError) as error:
        raise LaunchError(
            f"port {port} on {host} cannot be used for the rendezvous ({error}); free it, or use port: 0", "launch.port"
        ) from None
