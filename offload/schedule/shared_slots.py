"""Rings of blocks that take turns in the same device memory, as the transformers of a pipeline do. Pure functions.

Blocks of different rings never run in the same pass, so they may share memory: those that stand at one place of their
rings have one slot. What is planned for a ring's places, which of them are streamed, through which slot, and which stay
while the ring runs, holds for every ring in its turn, each of which has the whole budget. Addresses never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from crossdock.offload.schedule.residency import Residency


def place_sizes(rings: Sequence[Sequence[int]]) -> list[int]:
    """Bytes of the largest block at every place; `rings`: bytes of each ring's blocks, in the order of their run."""
    return [max(sizes) for sizes in zip_longest(*rings, fillvalue=0)]


def usable_bytes(rings: Sequence[Sequence[int]], room: int) -> int:
    """How much of `room` bytes the rings can use: for all blocks at once if they fit, else for one ring at a time."""
    together = sum(map(sum, rings))
    return together if room >= together else min(room, sum(place_sizes(rings)))


def slots_in_turn(residency: Residency, rings: Sequence[Sequence[int]]) -> dict[int, int]:
    """Block -> slot, of the blocks that share one.

    Args:
        residency: of the places.
        rings: each ring's blocks, in the order of their run.
    """
    resident = set(residency.resident)
    passing = [place for place in range(max(map(len, rings), default=0)) if place not in resident]
    slots = dict(zip(passing, residency.schedule.slots, strict=True))
    if len(rings) > 1:
        slots |= {place: residency.schedule.n_slots + n for n, place in enumerate(residency.resident)}
    return {index: slots[place] for ring in rings for place, index in enumerate(ring) if place in slots}
