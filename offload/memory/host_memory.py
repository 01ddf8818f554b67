"""How much host memory this process may still take.

The machine's free memory is not the answer in a container: the cgroup's limit may be far lower, and going past it is
no MemoryError but a SIGKILL. Page cache counts as free on both levels, because the kernel gives it back under
pressure; shared memory (the host store's pages) is charged as anonymous memory and does not. Swap is never counted:
weights that are swapped out cannot be streamed, and pinned pages cannot be swapped.

Documents: proc(5) for MemAvailable; the kernel's admin-guide/cgroup-v2 and cgroup-v1/memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MACHINE = "the machine"
GIB = 2**30


class HostMemoryError(MemoryError):
    """Host memory does not suffice; the message names what needs it, the figures in GiB and the way out."""


@dataclass(frozen=True)
class HostMemory:
    """What this process may still take, in bytes, before it shares that with other ranks of the node.

    Attributes:
        available_bytes: the tightest of the machine and all cgroups above this process.
        limit_bytes: the whole size of what is the tightest (at most the machine's memory).
        limited_by: "the machine", or the folder of the cgroup.
    """

    available_bytes: int
    limit_bytes: int
    limited_by: str


@dataclass(frozen=True)
class _Files:
    """How a cgroup version calls its figures."""

    limit: str
    used: str
    cache: tuple[str, str]


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Read it now. Files that are missing or unreadable are skipped: this never raises.

    Args:
        proc: where procfs is mounted.
        cgroup: where the cgroup hierarchies are mounted (v2, v1, or both).
    """
    machine = _machine(proc)
    groups = [
        HostMemory(max(limit - _used_bytes(folder, files), 0), min(limit, machine.limit_bytes), str(folder))
        for folder, files in _cgroups(proc, cgroup)
        if (limit := _number(folder / files.limit)) is not None
    ]
    return min([machine, *groups], key=lambda found: found.available_bytes)


FOR_A_RUN = "read the weights from disk (offload.host: mmap), run fewer ranks per node, or use a smaller dtype"


def require(needed_bytes: int, what: str, found: HostMemory, remedy: str = FOR_A_RUN) -> None:
    """Check that `needed_bytes` may be taken for `what`.

    Raises:
        HostMemoryError: they may not; `remedy` is what the user can do.
    """
    if needed_bytes > found.available_bytes:
        raise HostMemoryError(
            f"{what}: needs {needed_bytes / GIB:.2f} GiB of host memory, but only {found.available_bytes / GIB:.2f} "
            f"of {found.limit_bytes / GIB:.2f} GiB are available (limited by {found.limited_by}); {remedy}"
        )


def _machine(proc: Path) -> HostMemory:
    figures = _figures(proc / "meminfo", unit=1024)
    page = os.sysconf("SC_PAGE_SIZE")
    total = figures.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * page)
    free = figures.get("MemAvailable", figures.get("MemFree", os.sysconf("SC_AVPHYS_PAGES") * page))
    return HostMemory(min(free, total), total, MACHINE)


def _cgroups(proc: Path, cgroup: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's memory cgroups, from its own one up to each hierarchy's root."""
    unified = cgroup / "unified"  # where a machine runs both versions
    paths = {"": "/", "memory": "/"}
    for line in _lines(proc / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths |= {name: path for name in controllers.split(",") if name in paths}
    for mount, path, files in (
        (unified if _exists(unified) else cgroup, paths[""], _V2),
        (cgroup / "memory", paths["memory"], _V1),
    ):
        yield from ((folder, files) for folder in _up_to(mount, path))


def _up_to(mount: Path, path: str) -> Iterator[Path]:
    """`mount/path` and its parents, the last one `mount`; only `mount` where a container's mount starts elsewhere."""
    inside = PurePosixPath(path.lstrip("/"))
    if ".." not in inside.parts and _exists(mount / inside):
        yield from (mount / parent for parent in (inside, *inside.parents) if parent.parts)
    yield mount


def _used_bytes(folder: Path, files: _Files) -> int:
    """What the group holds and cannot give back."""
    figures = _figures(folder / "memory.stat")
    return max((_number(folder / files.used) or 0) - sum(figures.get(name, 0) for name in files.cache), 0)


def _number(path: Path) -> int | None:
    """The number in a file; None where it holds none ("max") or cannot be read."""
    text = next(_lines(path), "")
    return int(text) if text.isdecimal() else None


def _figures(path: Path, unit: int = 1) -> dict[str, int]:
    """The lines `name value` or `name: value kB` of a file."""
    fields = (line.split() for line in _lines(path))
    return {words[0].rstrip(":"): int(words[1]) * unit for words in fields if len(words) >= 2 and words[1].isdecimal()}


def _exists(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield from (line.strip() for line in text.splitlines())
