"""Which slot each streamed block is loaded into, and what that costs: bytes of device memory, and time per step.

Pure functions; nothing here touches a device. A step is modelled as timed events in max-plus algebra: its steady-state
time is the greatest cycle mean of the event graph (Baccelli, Cohen, Olsder, Quadrat: Synchronization and Linearity,
1992).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from itertools import accumulate

_LEAST_WORK = 200_000
"""Block placements that may be tried in search of the least memory: a count, so that every rank stops alike."""


@dataclass(frozen=True)
class SlotSchedule:
    """`slots[i]` is the slot of the i-th streamed block; `prefetch` blocks are loaded ahead of the running one."""

    slots: tuple[int, ...]
    prefetch: int

    @property
    def n_slots(self) -> int:
        return max(self.slots, default=-1) + 1


@lru_cache(maxsize=4096)
def assign_slots(count: int, prefetch: int) -> SlotSchedule:
    """Give each of `count` streamed blocks, which run in a cycle, one fixed slot.

    Any `prefetch + 1` consecutive blocks, the wrap from the last to the first included, get different slots. That
    is a circular colouring: with count = q * window + r, `window + ceil(r / q)` slots are needed. At most
    `prefetch + 2` are used; where a short cycle would need more, the prefetch distance is cut instead.
    """
    if count == 0:
        return SlotSchedule((), 0)
    for window in range(min(prefetch + 1, count), 0, -1):
        laps, rest = divmod(count, window)
        if window + -(-rest // laps) <= prefetch + 2:
            break
    laps, rest = divmod(count, window)
    # `laps` runs through the slots; the first ones are longer, so that no run is shorter than the window
    lengths = [window + rest // laps + (lap < rest % laps) for lap in range(laps)]
    return SlotSchedule(tuple(slot for length in lengths for slot in range(length)), window - 1)


def slot_sizes(sizes: Sequence[int], slots: Sequence[int]) -> list[int]:
    """Bytes of every slot: the largest block that is streamed into it."""
    result = [0] * (max(slots, default=-1) + 1)
    for size, slot in zip(sizes, slots, strict=True):
        result[slot] = max(result[slot], size)
    return result


def device_bytes(sizes: Sequence[int], streamed: Sequence[int], depth: int) -> int:
    passing = [sizes[index] for index in streamed]
    return sum(sizes) - sum(passing) + sum(slot_sizes(passing, assign_slots(len(passing), depth).slots))


@lru_cache(maxsize=256)
def least_memory(sizes: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The streamed blocks with which slots and resident blocks take the fewest bytes.

    Streaming everything is not always it: an odd block can cost a whole slot. Sets of resident blocks are tried in
    ascending order of their bytes, until these alone are too many.
    """
    everything = tuple(range(len(sizes)))
    best = min((device_bytes(sizes, streamed, depth), streamed) for streamed in (everything, ()))
    order = sorted(everything, key=sizes.__getitem__)
    heap: list[tuple[int, int, tuple[int, ...]]] = [(sizes[order[0]], 0, (order[0],))] if order else []
    for _ in range(_LEAST_WORK // (len(sizes) + 1)):
        if not heap or heap[0][0] + sizes[order[0]] >= best[0]:
            break
        held, place, resident = heappop(heap)
        streamed = tuple(index for index in everything if index not in resident)
        best = min(best, (device_bytes(sizes, streamed, depth), streamed))
        if place + 1 < len(order):
            more = order[place + 1]
            heappush(heap, (held + sizes[more], place + 1, (*resident, more)))
            heappush(heap, (held + sizes[more] - sizes[order[place]], place + 1, (*resident[:-1], more)))
    return best[1]


def step_ticks(compute: Sequence[int], copy: Sequence[int], streamed: Sequence[int], window: int) -> float:
    """Steady-state ticks per step; `window` may exceed the number of streamed blocks.

    The state between two laps is when the lane and the last `window` streamed blocks ended. Once a lap adds the same
    to all of it, that is the step; where steps only repeat in groups, Karp's formula gives their mean.
    """
    if not streamed:
        return sum(compute)
    rows = _lap(compute, copy, streamed)
    lane = end = 0
    ends = deque([0] * window, maxlen=window)
    states = [[0] * (window + 1)]
    for _ in range(window + 1):
        for load, lead, own in rows:
            lane = max(lane, ends[0]) + load
            end = max(end + lead, lane) + own
            ends.append(end)
        states.append([lane, *ends])
        added = {after - before for before, after in zip(states[-2], states[-1], strict=True)}
        if len(added) == 1:
            return added.pop()
    return max(
        min((last - states[lap][place]) / (window + 1 - lap) for lap in range(window + 1))
        for place, last in enumerate(states[-1])
    )


def _lap(compute: Sequence[int], copy: Sequence[int], streamed: Sequence[int]) -> list[tuple[int, int, int]]:
    """Per streamed block: its copy, the compute of the resident blocks since the streamed one before, its own."""
    ends = list(accumulate(compute, initial=0))
    rows, before = [], streamed[-1] + 1 - len(compute)
    for index in streamed:
        lead = ends[index] - ends[before] if before >= 0 else ends[index] + ends[-1] - ends[before + len(compute)]
        rows.append((copy[index], lead, compute[index]))
        before = index + 1
    return rows
