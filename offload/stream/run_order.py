"""The order in which blocks run: assumed as listed, recorded in the first pass, known from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence


class Ring:
    """The blocks that run in one pass. Some models interleave their stacks: the listed order is not the real one."""

    def __init__(self, listed: Sequence[int]) -> None:
        self.order = list(listed)
        self._first_pass: list[int] = []
        self._known = False

    @property
    def recorded(self) -> tuple[int, ...] | None:
        """As the blocks ran in the first pass; None before it closed, or when it left blocks out."""
        return tuple(self.order) if self._known and len(self._first_pass) == len(self.order) else None

    def learn(self, index: int) -> bool:
        """Block `index` runs. True when this closes the first pass and gives the ring another order.

        Blocks that the first pass left out keep their place, and so do all others then.
        """
        if self._known:
            return False
        if index not in self._first_pass:
            self._first_pass.append(index)
            return False
        self._known = True
        changed = len(self._first_pass) == len(self.order) and self._first_pass != self.order
        if changed:
            self.order = list(self._first_pass)
        return changed

    def set(self, order: Sequence[int]) -> None:
        self.order, self._known = list(order), True

    def ahead(self, prefetch: int, residents: Collection[int]) -> dict[int, tuple[int, ...]]:
        """Per block, what is to be on its way while it runs: the next `prefetch` that are streamed, and of the
        residents between them the nearest: a resident is loaded once, its neighbours see to it.
        """
        found: dict[int, tuple[int, ...]] = {}
        for place, index in enumerate(self.order):
            following: list[int] = []
            streamed = kept = 0
            for step in range(1, len(self.order)):
                other = self.order[(place + step) % len(self.order)]
                stays = other in residents
                streamed, kept = streamed + (not stays), kept + stays
                if streamed > prefetch:
                    break
                if not stays or kept <= prefetch + 1:
                    following.append(other)
            found[index] = tuple(following)
        return found


class RunOrder:
    """The rings of a stream: one, or several that take turns, of which no block runs in another's pass.

    Attributes:
        running: number of the ring whose block ran last.
    """

    def __init__(self, listed: Sequence[int], rings: Sequence[Collection[int]] = ()) -> None:
        """`rings`: the blocks of each; empty: all are one."""
        self.rings = [Ring([index for index in listed if index in ring]) for ring in rings] or [Ring(listed)]
        self.running = 0
        self._ring_of = {index: number for number, ring in enumerate(self.rings) for index in ring.order}

    @property
    def order(self) -> list[int]:
        """Ring after ring."""
        return [index for ring in self.rings for index in ring.order]

    @property
    def rehearsal(self) -> list[int]:
        """The ring that runs comes last: what it keeps on the device is there afterwards."""
        last = self.rings[self.running]
        return [index for ring in self.rings if ring is not last for index in ring.order] + last.order

    @property
    def recorded(self) -> tuple[int, ...] | None:
        """Of the first ring of which it is known."""
        return next((known for ring in self.rings if (known := ring.recorded) is not None), None)

    def learn(self, index: int) -> bool:
        """See `Ring.learn`."""
        self.running = self._ring_of[index]
        return self.rings[self.running].learn(index)

    def set(self, order: Sequence[int]) -> None:
        for number, ring in enumerate(self.rings):
            ring.set([index for index in order if self._ring_of[index] == number])

    def ahead(self, prefetch: int, residents: Collection[int]) -> dict[int, tuple[int, ...]]:
        """See `Ring.ahead`: at a ring's end, its own first blocks come next."""
        return {index: following for ring in self.rings for index, following in ring.ahead(prefetch, residents).items()}

    def stay_in_turn(self, slots: Mapping[int, int]) -> frozenset[int]:
        """Of several rings, the blocks that share their slot with blocks of other rings only.

        Args:
            slots: block -> slot.
        """
        if len(self.rings) == 1:
            return frozenset()
        used = Counter((self._ring_of[index], slot) for index, slot in slots.items())
        return frozenset(index for index, slot in slots.items() if used[self._ring_of[index], slot] == 1)
