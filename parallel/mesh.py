"""The device mesh: which ranks work together on what.

Axes, outer to inner: `dp, cfg, ring, ulysses, tp`. A rank's number is its coordinates read as mixed-radix digits, so
tensor parallelism, which talks the most, gets neighbouring ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from crossdock.parallel.group import Group, GroupRecord

AXES = ("dp", "cfg", "ring", "ulysses", "tp")


@dataclass(frozen=True)
class MeshShape:
    """The degrees and the HSDP shard count. Pure: knows every rank's place, holds no process group."""

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    hsdp_shard: int = 1

    def __post_init__(self) -> None:
        holders = self.world_size // self.tp
        if holders % self.hsdp_shard:
            raise ValueError(f"hsdp.shard {self.hsdp_shard} does not divide the {holders} ranks of a TP slice")

    @property
    def world_size(self) -> int:
        return math.prod(self.degree(axis) for axis in AXES)

    @property
    def sequence(self) -> int:
        return self.ring * self.ulysses

    def degree(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, self.degree(axis))
        return place

    def sequence_index(self, rank: int) -> int:
        """Which part of a sequence the rank holds: ring outside, Ulysses inside."""
        place = self.coordinates(rank)
        return place["ring"] * self.ulysses + place["ulysses"]

    def group_along(self, rank: int, axes: Iterable[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` in nothing but `axes`, in rank order; `rank` is one of them."""
        fixed = {axis: at for axis, at in self.coordinates(rank).items() if axis not in set(axes)}
        return tuple(
            other
            for other in range(self.world_size)
            if all(self.coordinates(other)[axis] == at for axis, at in fixed.items())
        )

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """The ranks that work on the same prompt."""
        return self.group_along(rank, ("cfg", "ring", "ulysses", "tp"))

    def shard_group(self, rank: int) -> tuple[int, ...]:
        """HSDP: the ranks that hold the same TP slice between them, `hsdp_shard` neighbours at a time."""
        holders = self.group_along(rank, ("dp", "cfg", "ring", "ulysses"))
        start = holders.index(rank) // self.hsdp_shard * self.hsdp_shard
        return holders[start : start + self.hsdp_shard]

    def groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Every communicator's ranks. `weights` is apart from the others: block gathers never wait for activations."""
        return {
            "tp": self.group_along(rank, ("tp",)),
            "cfg": self.group_along(rank, ("cfg",)),
            "ulysses": self.group_along(rank, ("ulysses",)),
            "ring": self.group_along(rank, ("ring",)),
            "sequence": self.group_along(rank, ("ring", "ulysses")),
            "replica": self.replica_group(rank),
            "weights": self.shard_group(rank),
        }


@dataclass(frozen=True)
class Mesh:
    """A rank's place and its process groups; a group of one rank is None."""

    shape: MeshShape
    rank: int
    ranks: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, Group | None]
    world: Group | None = None

    @classmethod
    def connect(cls, shape: MeshShape, rank: int, timeout_s: float, world: Group | None) -> Mesh:
        """Create the process groups. Collective over the world: every rank calls it, once.

        Args:
            world: the group of all ranks; it is not the mesh's own, and outlives it.
        """
        groups: dict[str, Group | None] = {}
        for name in shape.groups(rank):
            groups[name] = None
            for ranks in dict.fromkeys(shape.groups(other)[name] for other in range(shape.world_size)):
                if len(ranks) > 1:  # every rank takes part in making every group, in the same order
                    handle = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s))
                    if rank in ranks:
                        groups[name] = Group(handle, name, ranks)
        return cls(shape, rank, shape.groups(rank), groups, world)

    def index_in(self, name: str) -> int:
        return self.ranks[name].index(self.rank)

    def records(self) -> tuple[GroupRecord, ...]:
        """What was issued on each group; for any thread."""
        now_s = time.monotonic()
        return tuple(group.record(now_s) for group in self.groups.values() if group is not None)

    def disconnect(self) -> None:
        for group in self.groups.values():
            if group is not None:
                group.close()


def describe(shape: MeshShape) -> str:
    """`ulysses 2 x ring 2`; what a layout is called in reports and tables."""
    parts = [f"{axis} {shape.degree(axis)}" for axis in AXES if shape.degree(axis) > 1]
    if shape.hsdp_shard > 1:
        holders = shape.world_size // shape.tp
        parts.append(f"hsdp {holders // shape.hsdp_shard}x{shape.hsdp_shard}")
    return " x ".join(parts) or "one rank"
