"""The last collectives of a rank, where the other ranks of its machine can read them when it is gone.

A collective of another size than the others' ends a process inside gloo at once, and as a rule not the one that is
wrong. What it had issued is then only known from memory that it does not take with it: a file without a name, which the
others have opened as well. Nothing is left behind when the last of them ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from crossdock.parallel.group import Collective, Group, GroupRecord

_KEPT = 8
"""So many of a group's collectives: the ranks of a group are hardly ever further apart than one."""
_GROUPS = 16
_LINE_BYTES = 512
_APART = "\x1f"


@dataclass(frozen=True)
class Address:
    """Where a rank's recorder is: an open file of its process, which is called `name`."""

    host: str
    pid: int
    file: int
    name: str


class FlightRecorder:
    """Notes what its groups issue.

    Args:
        place: of a group's name: in which step and block its next collective is issued.
    """

    def __init__(self, place: Callable[[str], str]) -> None:
        self._place = place
        self._memory: mmap.mmap | None = None
        self._numbers: dict[str, int] = {}

    def open(self) -> Address | None:
        """Where it is from here on; None: this system has no such memory."""
        name = f"crossdock-{secrets.token_hex(8)}"
        with contextlib.suppress(AttributeError, OSError):
            file = os.memfd_create(name, os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, file)
            os.ftruncate(file, _GROUPS * _KEPT * _LINE_BYTES)
            self._memory = mmap.mmap(file, 0)
            return Address(socket.gethostname(), os.getpid(), file, name)
        return None

    def attach(self, group: Group) -> None:
        """A group of a name that was there before takes its place."""
        group.observer = self._note
        self._numbers.setdefault(group.name, len(self._numbers))

    def _note(self, group: Group, number: int, what: str) -> str:
        """Returns where it is issued."""
        place, row = self._place(group.name), self._numbers[group.name]
        if self._memory is not None and row < _GROUPS:
            fields = (group.name, ",".join(map(str, group.ranks)), str(number), place, what)
            line = f"{_APART.join(fields)}\n".encode()
            if len(line) <= _LINE_BYTES:
                start = (row * _KEPT + number % _KEPT) * _LINE_BYTES
                self._memory[start : start + len(line)] = line
        return place


@dataclass
class Neighbours:
    """The recorders of the other ranks of this machine. For any thread."""

    _pids: dict[int, int] = field(default_factory=dict)
    _memory: dict[int, mmap.mmap] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: int, addresses: Sequence[Address | None]) -> Neighbours:
        """`addresses`: by rank."""
        found = cls()
        for other, address in enumerate(addresses):
            if other != rank and address is not None and address.host == socket.gethostname():
                with contextlib.suppress(OSError, ValueError):  # of another container, or not to be read
                    path = f"/proc/{address.pid}/fd/{address.file}"
                    if f"memfd:{address.name}" in os.readlink(path):
                        with open(path, "rb") as file:
                            found._memory[other] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                        found._pids[other] = address.pid
        return found

    def lost(self) -> Mapping[int, tuple[GroupRecord, ...]]:
        """What those whose processes are gone, or are about to be, had issued last."""
        return {rank: _records(self._memory[rank]) for rank, pid in self._pids.items() if not _runs(pid)}


def _runs(pid: int) -> bool:
    """A process that ends has no program any more long before it is gone."""
    try:
        return bool(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def _records(memory: mmap.mmap) -> tuple[GroupRecord, ...]:
    calls: dict[tuple[str, tuple[int, ...]], list[Collective]] = {}
    for start in range(0, len(memory), _LINE_BYTES):
        line, end, _ = memory[start : start + _LINE_BYTES].partition(b"\n")
        fields = line.decode(errors="replace").split(_APART)
        if end and len(fields) == 5:
            name, members, number, place, what = fields
            group = name, tuple(map(int, members.split(",")))
            calls.setdefault(group, []).append(Collective(int(number), what, place))
    records = []
    for (name, ranks), last in calls.items():
        last.sort(key=lambda call: call.number)
        records.append(GroupRecord(name, ranks, last[-1].number, 0, tuple(last), None))
    return tuple(records)
