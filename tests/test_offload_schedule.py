"""Slots, their bytes, and the time of a step: against brute force, a simulation, and sums made another way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations

import pytest

from crossdock.offload.schedule.slots import (
    SlotSchedule,
    assign_slots,
    device_bytes,
    least_memory,
    slot_sizes,
    step_ticks,
)

COUNTS = range(61)
PREFETCHES = range(1, 9)


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_blocks_present_together_never_share_a_slot(prefetch: int) -> None:
    """Pitfall 17: an odd number of blocks on two slots collides where the last block prefetches the first."""
    for count in COUNTS:
        schedule = assign_slots(count, prefetch)
        assert len(schedule.slots) == count
        assert set(schedule.slots) == set(range(schedule.n_slots)), "slots without a block, or negative ones"
        assert schedule.n_slots <= prefetch + 2
        assert 0 <= schedule.prefetch <= prefetch
        window = schedule.prefetch + 1
        for start in range(count):
            together = [schedule.slots[(start + step) % count] for step in range(window)]
            assert len(set(together)) == window, f"{count} blocks, prefetch {prefetch}: {schedule}"


@cache
def _fewest_slots(count: int, window: int) -> int:
    """By trying: the fewest slots for `count` blocks in a circle, any `window` neighbours of which differ."""

    def extends(slots: tuple[int, ...], available: int) -> bool:
        place = len(slots)
        if place == count:
            return True
        behind = set(slots[max(0, place - window + 1) :])
        ahead = {slots[(place + step) % count] for step in range(1, window) if (place + step) % count < place}
        fresh = max(slots, default=-1) + 1  # a slot not used yet is as good as any other
        return any(
            extends((*slots, slot), available)
            for slot in range(min(fresh + 1, available))
            if slot not in behind | ahead
        )

    return next(available for available in range(1, count + 1) if extends((), available))


@pytest.mark.parametrize("prefetch", range(1, 6))
def test_slots_are_as_few_and_the_window_as_wide_as_can_be(prefetch: int) -> None:
    """One slot too many is a block of device memory lost; a window cut without need is a slow step."""
    for count in range(1, 15):
        schedule = assign_slots(count, prefetch)
        window = schedule.prefetch + 1
        assert schedule.n_slots == _fewest_slots(count, window), f"{count} blocks, prefetch {prefetch}"
        for wider in range(window + 1, min(prefetch + 1, count) + 1):
            assert _fewest_slots(count, wider) > prefetch + 2, f"{count} blocks, prefetch {prefetch}"


@pytest.mark.parametrize("prefetch", PREFETCHES)
def test_long_passes_keep_the_full_prefetch(prefetch: int) -> None:
    """Only passes too short for it may lose prefetch distance (pitfall 18: prefetch that starts too late)."""
    for count in range(prefetch * (prefetch + 1), 61):
        assert count == 0 or assign_slots(count, prefetch).prefetch == prefetch, count


def test_slot_sizes() -> None:
    """Pitfall 3: a slot is as large as its largest block, and no larger."""
    assert slot_sizes([], []) == []
    assert slot_sizes([5, 9, 7, 1], [0, 1, 0, 1]) == [7, 9]
    assert slot_sizes([3, 8, 2], [0, 0, 0]) == [8]
    with pytest.raises(ValueError, match="zip"):
        slot_sizes([1, 2], [0])


def _device_bytes(sizes: Sequence[int], stay: Sequence[int], schedule: SlotSchedule) -> int:
    """Resident bytes, plus per slot the largest of the blocks that pass through it."""
    streamed = [size for index, size in enumerate(sizes) if index not in stay]
    assert len(streamed) == len(schedule.slots)
    passing: dict[int, list[int]] = {}
    for size, slot in zip(streamed, schedule.slots, strict=True):
        passing.setdefault(slot, []).append(size)
    return sum(sizes[index] for index in stay) + sum(max(found) for found in passing.values())


@pytest.mark.parametrize("seed", range(40))
def test_device_bytes_are_those_of_residents_and_slots(seed: int) -> None:
    """Pitfall 19: resident blocks beside slots that were not counted run out of memory at the first step."""
    choice = random.Random(seed)
    sizes = [choice.randint(1, 1000) for _ in range(choice.randint(1, 30))]
    depth = choice.randint(1, 8)
    stay = sorted(choice.sample(range(len(sizes)), choice.randint(0, len(sizes))))
    streamed = [index for index in range(len(sizes)) if index not in stay]
    expected = _device_bytes(sizes, stay, assign_slots(len(streamed), depth))
    assert device_bytes(sizes, streamed, depth) == expected


@pytest.mark.parametrize("seed", range(60))
def test_least_memory_against_every_choice(seed: int) -> None:
    """With an odd cycle, streaming everything can take a slot more than keeping one small block."""
    choice = random.Random(seed)
    giant = choice.choice((1, 1, 30))
    sizes = tuple(choice.randint(1, 20) * choice.choice((1, giant)) for _ in range(choice.randint(1, 9)))
    depth = choice.randint(1, 4)
    least = min(
        device_bytes(sizes, streamed, depth)
        for count in range(len(sizes) + 1)
        for streamed in combinations(range(len(sizes)), count)
    )
    assert device_bytes(sizes, least_memory(sizes, depth), depth) == least, f"{sizes}, depth {depth}"


def test_an_odd_block_stays_rather_than_take_a_slot() -> None:
    assert device_bytes([9, 9, 9, 9, 1], range(5), 1) == 27
    assert least_memory((9, 9, 9, 9, 1), 1) == (0, 1, 2, 3)


def _simulated_step(compute: Sequence[int], copy: Sequence[int], streamed: Sequence[int], prefetch: int) -> Fraction:
    """Mean over laps of an event-by-event run: one dictionary of end times per kind of event, from a cold start."""
    settle, group = 150, 60  # steps repeat in groups of at most `prefetch + 2` laps: 1..5 divide 60
    loads: dict[int, int] = {}
    computes: dict[tuple[int, int], int] = {}
    clock, steps = 0, []
    for lap in range(settle + group):
        for block, seconds in enumerate(compute):
            if block in streamed:
                number = lap * len(streamed) + streamed.index(block)
                user = number - (prefetch + 1)
                freed = computes.get((user // len(streamed), streamed[user % len(streamed)]), 0)
                loads[number] = max(loads.get(number - 1, 0), freed) + copy[block]
                clock = max(clock, loads[number])
            clock += seconds
            computes[lap, block] = clock
        steps.append(clock)
    return Fraction(steps[-1] - steps[-1 - group], group)


@pytest.mark.parametrize("seed", range(250))
def test_step_time_against_a_simulation(seed: int) -> None:
    """Pitfall 18: what loads wait for, the wrap from step to step and short cycles included."""
    choice = random.Random(seed)
    count = choice.randint(1, 7)
    compute = [choice.randint(0, 30) for _ in range(count)]
    copy = [choice.randint(0, choice.choice((10, 40, 90))) for _ in range(count)]
    streamed = sorted(choice.sample(range(count), choice.randint(1, count)))
    prefetch = min(choice.randint(0, 3), len(streamed) - 1)
    expected = _simulated_step(compute, copy, streamed, prefetch)
    assert step_ticks(compute, copy, streamed, prefetch + 1) == pytest.approx(float(expected), rel=1e-12)


def test_steps_by_hand() -> None:
    assert step_ticks([5, 5, 5], [9, 9, 9], [], 1) == 15, "nothing to copy"
    assert step_ticks([5, 5], [4, 4], [0], 1) == 10, "hidden behind the other block"
    assert step_ticks([5, 5], [7, 7], [0], 1) == 12, "loaded between its own computes"
    assert step_ticks([5, 5], [7, 7], [0, 1], 1) == 24, "one slot: copy and compute take turns"
    assert step_ticks([5, 5], [4, 4], [0, 1], 2) == 10, "two slots: each copy behind the other's compute"
    assert step_ticks([5, 5], [7, 7], [0, 1], 2) == 14, "as fast as the lane"
    assert step_ticks([10, 1, 1, 1], [3, 3, 3, 3], [1, 2, 3], 2) == 15, (
        "the long block hides two copies; of the third, the next block hides 1"
    )


def test_nothing_to_stream() -> None:
    """A model whose blocks are all resident has no slots and needs no bytes for them."""
    assert assign_slots(0, 3) == SlotSchedule((), 0)
    assert assign_slots(0, 3).n_slots == 0
    assert device_bytes([], [], 2) == 0
    assert least_memory((), 2) == ()
