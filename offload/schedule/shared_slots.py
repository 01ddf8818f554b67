"""Passes whose blocks share slots, as those of the transformers of a pipeline do. Pure functions.

Blocks of different passes never run together, so they may share memory: those that stand at one place of their passes
have one slot. What is planned for the places of a pass, which of them are streamed, through which slot, and which stay
during the pass, holds for every pass, each of which has the whole budget. Addresses never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from crossdock.offload.schedule.residency import Residency


def place_sizes(passes: Sequence[Sequence[int]]) -> list[int]:
    """Bytes of the largest block at every place; `passes`: bytes of the blocks of each, in the order of their run."""
    return [max(sizes) for sizes in zip_longest(*passes, fillvalue=0)]


def usable_bytes(passes: Sequence[Sequence[int]], room: int) -> int:
    """How much of `room` bytes the passes can use: for all blocks at once if they fit, else for one pass at a time."""
    together = sum(map(sum, passes))
    return together if room >= together else min(room, sum(place_sizes(passes)))


def shared_slots(residency: Residency, passes: Sequence[Sequence[int]]) -> dict[int, int]:
    """Block -> slot, of the blocks that share one.

    Args:
        residency: of the places.
        passes: the blocks of each, in the order of their run.
    """
    resident = set(residency.resident)
    passing = [place for place in range(max(map(len, passes), default=0)) if place not in resident]
    slots = dict(zip(passing, residency.schedule.slots, strict=True))
    if len(passes) > 1:
        slots |= {place: residency.schedule.n_slots + n for n, place in enumerate(residency.resident)}
    return {index: slots[place] for pass_ in passes for place, index in enumerate(pass_) if place in slots}
