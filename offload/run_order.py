"""The order in which blocks run: assumed as listed, recorded in the first pass, known from then on."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class RunOrder:
    """A ring of block indices. Some models interleave their stacks, so that the listed order is not the real one."""

    def __init__(self, listed: Sequence[int]) -> None:
        self.ring = list(listed)
        self._first_pass: list[int] = []
        self._known = False

    @property
    def recorded(self) -> tuple[int, ...] | None:
        """As the blocks ran in the first pass; None before it closed, or when it left blocks out."""
        return tuple(self.ring) if self._known and len(self._first_pass) == len(self.ring) else None

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
        changed = len(self._first_pass) == len(self.ring) and self._first_pass != self.ring
        if changed:
            self.ring = list(self._first_pass)
        return changed

    def set(self, order: Sequence[int]) -> None:
        self.ring, self._known = list(order), True

    def ahead(self, prefetch: int, residents: Collection[int]) -> dict[int, tuple[int, ...]]:
        """Per block, what is to be on its way while it runs: the next `prefetch` that are streamed, and of the
        residents between them the nearest: a resident is loaded once, its neighbours see to it.
        """
        found: dict[int, tuple[int, ...]] = {}
        for place, index in enumerate(self.ring):
            following: list[int] = []
            streamed = kept = 0
            for step in range(1, len(self.ring)):
                other = self.ring[(place + step) % len(self.ring)]
                stays = other in residents
                streamed, kept = streamed + (not stays), kept + stays
                if streamed > prefetch:
                    break
                if not stays or kept <= prefetch + 1:
                    following.append(other)
            found[index] = tuple(following)
        return found
