"""The residency schedule: which blocks stay on the device, and which slot each of the others is streamed into.

Pure functions of sizes and counts; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SlotSchedule:
    """`slots[i]` is the slot of the i-th streamed block; `prefetch` blocks are loaded ahead of the running one."""

    slots: tuple[int, ...]
    prefetch: int

    @property
    def n_slots(self) -> int:
        return max(self.slots, default=-1) + 1


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


def spread(count: int, chosen: int) -> tuple[int, ...]:
    """`chosen` of `count` positions, evenly spread, so that every copy has compute to hide behind."""
    return tuple((2 * i + 1) * count // (2 * chosen) for i in range(chosen))


def minimum_bytes(sizes: Sequence[int], prefetch: int) -> int:
    """Device bytes when nothing is resident: the slots."""
    return _bytes_needed(sizes, set(), prefetch)


def choose_resident(sizes: Sequence[int], prefetch: int, budget_bytes: int) -> tuple[int, ...]:
    """The blocks (by index) that stay on the device, as many as `budget_bytes` holds beside the slots of the rest.

    Raises:
        ValueError: the budget is below `minimum_bytes`.
    """
    count = len(sizes)
    for resident in range(count, -1, -1):
        stay = spread(count, resident)
        if _bytes_needed(sizes, set(stay), prefetch) <= budget_bytes:
            return stay
    raise ValueError(f"{budget_bytes} bytes are below the minimum of {minimum_bytes(sizes, prefetch)} bytes")


def _bytes_needed(sizes: Sequence[int], stay: set[int], prefetch: int) -> int:
    streamed = [size for i, size in enumerate(sizes) if i not in stay]
    slots = slot_sizes(streamed, assign_slots(len(streamed), prefetch).slots)
    return sum(slots) + sum(sizes[i] for i in stay)
