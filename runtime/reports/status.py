"""What a rank is doing right now. Read from another thread, at any time, without stopping the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from crossdock.parallel.group import GroupRecord


@dataclass(frozen=True)
class RankStatus:
    """
    Attributes:
        host, pid: where the rank's process runs.
        phase: "idle", "connect", "load", "verify" or "rehearsal", "encode", "denoise" or "decode", "compare".
        step: the number of the step under way, from 1; None outside the denoise loop.
        block: the last one that was asked for; `waits` while its bytes have not arrived.
        kept_step: the step after which the newest snapshot was taken; 0: there is none.
        read_bytes, all_bytes: of the weights that it brings to their homes.
        groups: what was issued on each of the mesh's groups, and on the world's.
        lost: the same of ranks of this machine whose processes are gone: the last of it.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int | None = None
    block: str | None = None
    waits: bool = False
    kept_step: int = 0
    groups: tuple[GroupRecord, ...] = ()
    lost: Mapping[int, tuple[GroupRecord, ...]] = field(default_factory=dict)
    read_bytes: int = 0
    all_bytes: int = 0

    @property
    def waiting(self) -> GroupRecord | None:
        """The group in whose latest collective the computing thread waits; a gather of weights only where that is what
        it waits for.
        """
        under_way = [group for group in self.groups if group.waiting_s is not None]
        activations = [group for group in under_way if group.name != "weights"]
        return next(iter(activations or (under_way if self.waits else [])), None)

    def __str__(self) -> str:
        places = [self.phase if self.step is None else f"step {self.step}"]
        if self.block is not None and self.step is not None:
            places.append(f"block {self.block}")
        if (group := self.waiting) is not None:
            others = ranks_text([rank for rank in group.ranks if rank != self.rank])
            places.append(f"{_latest(group)} of group {group.name} with {others}, for {group.waiting_s:.1f} s")
        elif self.waits:
            places.append("waiting for its bytes")
        return ", ".join(places)


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 0`, or `ranks 0, 2, 3`."""
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _latest(group: GroupRecord) -> str:
    return str(group.last[-1]) if group.last else "a collective"
