"""The residency schedule, against brute force and against its own budget recomputed another way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest

from crossdock.offload.schedule import (
    SlotSchedule,
    assign_slots,
    choose_resident,
    minimum_bytes,
    slot_sizes,
    spread,
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
    """By trying: the fewest slots for `count` blocks in a ring, any `window` neighbours of which differ."""

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
def test_long_rings_keep_the_full_prefetch(prefetch: int) -> None:
    """Only rings too short for it may lose prefetch distance (pitfall 18: prefetch that starts too late)."""
    for count in range(prefetch * (prefetch + 1), 61):
        assert count == 0 or assign_slots(count, prefetch).prefetch == prefetch, count


def test_slot_sizes() -> None:
    """Pitfall 3: a slot is as large as its largest block, and no larger."""
    assert slot_sizes([], []) == []
    assert slot_sizes([5, 9, 7, 1], [0, 1, 0, 1]) == [7, 9]
    assert slot_sizes([3, 8, 2], [0, 0, 0]) == [8]
    with pytest.raises(ValueError, match="zip"):
        slot_sizes([1, 2], [0])


def test_spread_is_even_and_distinct() -> None:
    """Pitfall 34: resident blocks in one clump leave the copies of the others nothing to hide behind."""
    for count in range(1, 61):
        assert spread(count, 0) == ()
        assert spread(count, count) == tuple(range(count))
        for chosen in range(1, count + 1):
            places = spread(count, chosen)
            assert len(set(places)) == chosen
            assert list(places) == sorted(places)
            assert 0 <= places[0] <= places[-1] < count
            ring = [*places, places[0] + count]
            gaps = [after - before for before, after in pairwise(ring)]
            assert max(gaps) - min(gaps) <= 1, f"{chosen} of {count}: {places}"


def _device_bytes(sizes: Sequence[int], stay: Sequence[int], schedule: SlotSchedule) -> int:
    """Resident bytes, plus per slot the largest of the blocks that pass through it."""
    streamed = [size for index, size in enumerate(sizes) if index not in stay]
    assert len(streamed) == len(schedule.slots)
    passing: dict[int, list[int]] = {}
    for size, slot in zip(streamed, schedule.slots, strict=True):
        passing.setdefault(slot, []).append(size)
    return sum(sizes[index] for index in stay) + sum(max(found) for found in passing.values())


def _needed(sizes: Sequence[int], stay: Sequence[int], prefetch: int) -> int:
    return _device_bytes(sizes, stay, assign_slots(len(sizes) - len(stay), prefetch))


@pytest.mark.parametrize("seed", range(40))
def test_residents_obey_the_budget(seed: int) -> None:
    """Pitfall 19: resident blocks beside slots that were not counted run out of memory at the first step."""
    choice = random.Random(seed)
    sizes = [choice.randint(1, 1000) for _ in range(choice.randint(1, 30))]
    prefetch = choice.randint(1, 8)
    least = minimum_bytes(sizes, prefetch)
    assert least == _needed(sizes, (), prefetch)
    before = 0
    for budget in sorted({least, sum(sizes), *(choice.randint(least, sum(sizes)) for _ in range(20))}):
        stay = choose_resident(sizes, prefetch, budget)
        assert len(set(stay)) == len(stay)
        assert _needed(sizes, stay, prefetch) <= budget, f"seed {seed}, budget {budget}"
        assert len(stay) >= before, f"seed {seed}: a larger budget keeps fewer blocks resident"
        for more in range(len(stay) + 1, len(sizes) + 1):
            assert _needed(sizes, spread(len(sizes), more), prefetch) > budget, "budget left unused"
        before = len(stay)
    assert choose_resident(sizes, prefetch, sum(sizes)) == tuple(range(len(sizes)))


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_below_the_minimum_names_the_minimum(seed: int) -> None:
    """The message must carry the number to put into the config, and that number must then work."""
    choice = random.Random(seed)
    sizes = [choice.randint(1, 1000) for _ in range(choice.randint(1, 30))]
    least = min(_needed(sizes, spread(len(sizes), n), 2) for n in range(len(sizes) + 1))
    assert least <= minimum_bytes(sizes, 2)
    with pytest.raises(ValueError, match=rf"{least - 1} bytes .* minimum of {minimum_bytes(sizes, 2)} bytes"):
        choose_resident(sizes, 2, least - 1)
    choose_resident(sizes, 2, minimum_bytes(sizes, 2))


def test_nothing_to_stream() -> None:
    """A model whose blocks are all resident has no slots and needs no bytes for them."""
    assert assign_slots(0, 3) == SlotSchedule((), 0)
    assert assign_slots(0, 3).n_slots == 0
    assert minimum_bytes([], 2) == 0
    assert choose_resident([], 2, 0) == ()
