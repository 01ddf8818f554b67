"""The order in which blocks run: assumed as listed, recorded in the first run, known from then on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence


class Pass:
    """The blocks that run in one pass. Some models interleave their stacks: the listed order is not the real one."""

    def __init__(self, listed: Sequence[int]) -> None:
        self.order = list(listed)
        self._first_run: list[int] = []
        self._known = False

    @property
    def recorded(self) -> tuple[int, ...] | None:
        """As the blocks ran in the first run; None before it closed, or when it left blocks out."""
        return tuple(self.order) if self._known and len(self._first_run) == len(self.order) else None

    def learn(self, index: int) -> bool:
        """Block `index` runs. True when this closes the first run and gives the pass another order.

        Blocks that the first run left out keep their place, and so do all others then.
        """
        if self._known:
            return False
        if index not in self._first_run:
            self._first_run.append(index)
            return False
        self._known = True
        changed = len(self._first_run) == len(self.order) and self._first_run != self.order
        if changed:
            self.order = list(self._first_run)
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
    """The passes of a stream: one, or several that share slots; no block runs in two of them.

    Attributes:
        running: number of the pass whose block ran last.
    """

    def __init__(self, listed: Sequence[int], passes: Sequence[Collection[int]] = ()) -> None:
        """`passes`: the blocks of each; empty: all are one."""
        self.passes = [Pass([index for index in listed if index in pass_]) for pass_ in passes] or [Pass(listed)]
        self.running = 0
        self._pass_of = {index: number for number, pass_ in enumerate(self.passes) for index in pass_.order}

    @property
    def order(self) -> list[int]:
        """Pass after pass."""
        return [index for pass_ in self.passes for index in pass_.order]

    @property
    def rehearsal(self) -> list[int]:
        """The pass that runs comes last: what it keeps on the device is there afterwards."""
        last = self.passes[self.running]
        return [index for pass_ in self.passes if pass_ is not last for index in pass_.order] + last.order

    @property
    def recorded(self) -> tuple[int, ...] | None:
        """Of the first pass of which it is known."""
        return next((known for pass_ in self.passes if (known := pass_.recorded) is not None), None)

    def learn(self, index: int) -> bool:
        """See `Pass.learn`."""
        self.running = self._pass_of[index]
        return self.passes[self.running].learn(index)

    def set(self, order: Sequence[int]) -> None:
        for number, pass_ in enumerate(self.passes):
            pass_.set([index for index in order if self._pass_of[index] == number])

    def ahead(self, prefetch: int, residents: Collection[int]) -> dict[int, tuple[int, ...]]:
        """See `Pass.ahead`: at the end of a pass, its own first blocks come next."""
        return {
            index: following for pass_ in self.passes for index, following in pass_.ahead(prefetch, residents).items()
        }

    def stay_in_pass(self, slots: Mapping[int, int]) -> frozenset[int]:
        """Of several passes, the blocks that share their slot with blocks of other passes only.

        Args:
            slots: block -> slot.
        """
        if len(self.passes) == 1:
            return frozenset()
        used = Counter((self._pass_of[index], slot) for index, slot in slots.items())
        return frozenset(index for index, slot in slots.items() if used[self._pass_of[index], slot] == 1)
