"""Which blocks stay on the device so that the least copy time is exposed, and a proof of how good the choice is.

Local search from evenly spread starts, then branch and bound. Times are rounded to integers first, so that sums are
exact: every rank gets the same answer, and equal schedules compare equal.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product

from crossdock.offload.schedule.slots import SlotSchedule, assign_slots, device_bytes, least_memory, step_ticks

WORTHWHILE = 0.02
"""Another schedule is taken when it promises to save this share of a step."""
_PRECISION_BITS = 44
"""Costs are kept to 2**-44 of their sum: `optimal` looks at 1e-9 of it, and sums of laps stay below 2**53."""
_SEARCH_WORK = 1_000_000
"""Events that may be timed per search. A count, not a time limit: every rank has to stop at the same place."""
_COUNT_VECTORS = 5_000
"""Up to so many ways to stream so-and-so many blocks of each kind, the bound is taken over whole blocks."""


@dataclass(frozen=True)
class Costs:
    """Seconds per block, in the order in which they run.

    Attributes:
        compute_s: from the moment the block has its bytes until the next block asks for its own.
        copy_s: to bring the block's bytes to the device, gathering included.
    """

    compute_s: tuple[float, ...]
    copy_s: tuple[float, ...]

    @cached_property
    def _scale(self) -> float:
        """A power of two, so that scaling itself rounds nothing."""
        exponent = math.frexp(sum(self.compute_s) + sum(self.copy_s))[1]
        return math.ldexp(1.0, _PRECISION_BITS - exponent)

    def _ticks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        scale = self._scale
        return tuple(round(s * scale) for s in self.compute_s), tuple(round(s * scale) for s in self.copy_s)


@dataclass(frozen=True)
class Residency:
    """
    Attributes:
        resident: indices of the blocks that stay on the device, ascending.
        schedule: slots of the others, in the order in which they run.
        device_bytes: slots and resident blocks.
        step_s: predicted steady-state time of a step over the blocks.
        bound_s: no choice that the budget allows can be faster than this.
        compute_s: of a step that never waits for a copy.
    """

    resident: tuple[int, ...]
    schedule: SlotSchedule
    device_bytes: int
    step_s: float
    bound_s: float
    compute_s: float

    @property
    def exposed_s(self) -> float:
        """Copy time per step that no compute hides."""
        return self.step_s - self.compute_s

    @property
    def optimal(self) -> bool:
        return self.step_s <= self.bound_s * (1 + 1e-9)


def assumed_costs(sizes: Sequence[int], travel_sizes: Sequence[int] | None = None) -> Costs:
    """Before anything was measured: computing and copying in proportion to bytes, and copying takes twice as long.

    `sizes`: bytes of each block in its slot; `travel_sizes`: those that are copied, where they are others.

    Assumed faster, copies look hidden wherever they are, and what is streamed may be one clump; assumed slower, only
    bytes count, and nothing is spread. The same for every budget: more memory is then never expected to be slower.
    """
    return Costs(tuple(size * 1e-9 for size in sizes), tuple(2 * (size * 1e-9) for size in travel_sizes or sizes))


def steady_step_s(costs: Costs, resident: Sequence[int], schedule: SlotSchedule) -> float:
    """Seconds per step, once the steps repeat, with one copy lane that loads the streamed blocks in run order.

    A block starts when the one before it has ended and its own bytes are there. The load of a streamed block starts
    when the load before it has ended and so has the compute of the `prefetch + 1`-th streamed block before it.
    """
    stay = set(resident)
    streamed = tuple(index for index in range(len(costs.compute_s)) if index not in stay)
    if len(streamed) != len(schedule.slots):
        raise ValueError(f"{len(streamed)} blocks are streamed, but the schedule has slots for {len(schedule.slots)}")
    return step_ticks(*costs._ticks(), streamed, schedule.prefetch + 1) / costs._scale


def minimum_bytes(sizes: Sequence[int], depths: Sequence[int]) -> int:
    """The least budget that `plan_residency` accepts."""
    return min(device_bytes(sizes, least_memory(tuple(sizes), depth), depth) for depth in depths)


def plan_residency(
    sizes: Sequence[int],
    costs: Costs,
    budget_bytes: int | None,
    depths: Sequence[int],
    travel_sizes: Sequence[int] | None = None,
) -> Residency:
    """The blocks to keep and the prefetch distance with the shortest step; then the fewest bytes copied, and held.

    Few blocks are searched exhaustively by branch and bound. With many, the search stops after a fixed amount of work
    and `bound_s` tells how much better any other choice could be.

    Args:
        sizes: bytes of each block in its slot, in the order in which they run.
        budget_bytes: device memory for slots and resident blocks; None: nothing stays, with the least prefetch.
        depths: prefetch distances to choose from.
        travel_sizes: bytes of each that are copied, where they are others than `sizes`.

    Raises:
        ValueError: the budget is below `minimum_bytes`, or the costs are of another number of blocks.
    """
    if not len(sizes) == len(costs.compute_s) == len(costs.copy_s):
        raise ValueError(f"{len(sizes)} blocks, {len(costs.compute_s)} compute times, {len(costs.copy_s)} copy times")
    if budget_bytes is None:
        everything = tuple(range(len(sizes)))
        step = step_ticks(*costs._ticks(), everything, assign_slots(len(sizes), min(depths)).prefetch + 1)
        return _residency(sizes, costs, everything, min(depths), step, step)
    if budget_bytes < (least := minimum_bytes(sizes, depths)):
        raise ValueError(f"{budget_bytes} bytes are below the minimum of {least} bytes")
    search = _Search(_Problem(tuple(sizes), *costs._ticks(), budget_bytes, tuple(travel_sizes or ())), depths)
    bound = search.run()
    return _residency(sizes, costs, search.best[-1], search.best[-2], search.best[0], bound)


def _residency(
    sizes: Sequence[int], costs: Costs, streamed: tuple[int, ...], depth: int, step: float, bound: float
) -> Residency:
    resident = tuple(sorted(set(range(len(sizes))) - set(streamed)))
    compute_s = sum(costs._ticks()[0]) / costs._scale
    used = device_bytes(sizes, streamed, depth)
    schedule = assign_slots(len(streamed), depth)
    return Residency(resident, schedule, used, step / costs._scale, bound / costs._scale, compute_s)


@dataclass(frozen=True)
class _Problem:
    sizes: tuple[int, ...]
    compute: tuple[int, ...]
    copy: tuple[int, ...]
    budget: int
    travel_sizes: tuple[int, ...] = ()
    """where they are others than `sizes`"""

    @cached_property
    def total(self) -> int:
        return sum(self.sizes)

    @cached_property
    def whole_compute(self) -> int:
        return sum(self.compute)

    @cached_property
    def cheapest(self) -> list[int]:
        """Blocks in ascending order of copy time per byte."""
        return sorted(range(len(self.sizes)), key=lambda index: (self.copy[index] / max(self.sizes[index], 1), index))

    @property
    def saving(self) -> int:
        """Bytes by which the streamed blocks must exceed their slots."""
        return self.total - self.budget

    def cover(self, among: Sequence[int], need: int) -> float:
        """Lower bound of the copy time of such of `among`, given from the cheapest, as have `need` bytes."""
        ticks = 0.0
        for index in among:
            if need <= 0:
                return ticks
            size = self.sizes[index]
            ticks += self.copy[index] * (1.0 if size <= need else need / size)
            need -= size
        return ticks if need <= 0 else math.inf

    def least_copy(self, depth: int) -> float:
        """Lower bound of the copy time per step, whatever is streamed with prefetch `depth`."""
        if self.saving <= 0:
            return 0
        kinds = sorted(Counter(zip(self.sizes, self.copy, strict=True)).items(), key=lambda kind: (kind[1], kind[0]))
        if math.prod(count + 1 for _, count in kinds[:-1]) <= _COUNT_VECTORS:
            return _least_copy_of_kinds(self, depth, [kind for kind, _ in kinds])
        return self._least_copy_of_parts(depth)

    def _least_copy_of_parts(self, depth: int) -> float:
        """As if the last block could be streamed in part; for each size that the largest streamed block can have."""
        floor = list(accumulate(sorted(self.sizes), initial=0))
        fewest = bisect_left([self.total - kept for kept in reversed(floor)], self.saving)
        others = min(assign_slots(m, depth).n_slots for m in range(max(fewest, 1), len(self.sizes) + 1)) - 1
        best = math.inf
        for largest in sorted(set(self.sizes)):
            among = [index for index in self.cheapest if self.sizes[index] <= largest]
            best = min(best, self.cover(among, self.saving + largest + floor[others]))
        return best


def _least_copy_of_kinds(problem: _Problem, depth: int, kinds: Sequence[tuple[int, int]]) -> float:
    """Over every number of streamed blocks of each (size, copy) kind, the last kind being the most frequent."""
    cycle = list(zip(problem.sizes, problem.copy, strict=True))
    counts = [cycle.count(kind) for kind in kinds]
    # neighbours of one kind are in different slots, if nothing of another kind can run between them
    joined = [sum(a != b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True) if b == kind) < 2 for kind in kinds]
    falling = sorted(range(len(kinds)), key=lambda k: -kinds[k][0])
    best = math.inf
    for head in product(*(range(count + 1) for count in counts[:-1])):
        saved = sum(n * size for n, (size, _) in zip(head, kinds, strict=False))
        fewest = max(0, -(-(problem.saving - saved) // max(kinds[-1][0], 1)))
        for last in range(fewest, counts[-1] + 1):
            vector = (*head, last)
            ticks = sum(n * copy for n, (_, copy) in zip(vector, kinds, strict=True))
            if ticks >= best:
                break
            slots = _least_slots([(kinds[k][0], vector[k], joined[k]) for k in falling if vector[k]], depth)
            if saved + last * kinds[-1][0] - slots >= problem.saving:
                best = ticks
                break
    return best


def _least_slots(kinds: Sequence[tuple[int, int, bool]], depth: int) -> int:
    """Lower bound of the slots' bytes for `kinds`, largest first: (size, how many, whether they run in a row)."""
    schedule = assign_slots(sum(count for _, count, _ in kinds), depth)
    filled = total = 0
    for size, count, joined in kinds:
        slots = min(count, schedule.prefetch + 1) if joined else 1
        total += max(slots - filled, 0) * size
        filled = max(filled, slots)
    return total + (schedule.n_slots - filled) * kinds[-1][0] if kinds else 0


_Key = tuple[float, int, int, int, tuple[int, ...]]
"""What is minimised: ticks per step, bytes copied per step, device bytes, prefetch distance; and what is streamed."""


class _Search:
    """The best choice so far, and the work that may still be done to find a better one."""

    def __init__(self, problem: _Problem, depths: Sequence[int]) -> None:
        self.problem = problem
        self.depths = sorted(set(depths))
        self.best: _Key = (math.inf, 0, 0, 0, ())
        self._work = 0
        self._seen: set[tuple[int, tuple[int, ...]]] = set()

    def run(self) -> float:
        """Find `best`; return the lower bound of the ticks per step."""
        problem = self.problem
        bounds = {d: max(problem.whole_compute, problem.least_copy(d)) for d in self.depths}
        for depth in self.depths:
            for streamed in self._starts(depth):
                self._offer(depth, streamed)
        self._work = _SEARCH_WORK
        self._improve(bounds)
        self._work = _SEARCH_WORK // 4
        open_bounds = [bounds[d] for d in self.depths if not self._branch(d)]
        return min([*open_bounds, self.best[0]])

    def _starts(self, depth: int) -> Iterator[tuple[int, ...]]:
        """Everything, nothing, the least memory; and copies diffused along the compute, more and more of them."""
        problem = self.problem
        yield tuple(range(len(problem.sizes)))
        yield ()
        yield least_memory(problem.sizes, depth)
        steepest = 2 * sum(problem.copy) / max(problem.whole_compute, 1)
        for step in range(1, 201):
            for phase in (0.5, 1.0):
                yield _diffuse(problem, steepest * step / 200, phase)

    def _offer(self, depth: int, streamed: tuple[int, ...]) -> bool:
        """Whether `streamed` is better than `best`, and now is."""
        problem = self.problem
        self._work -= len(streamed)
        if (depth, streamed) in self._seen:
            return False
        self._seen.add((depth, streamed))
        copied = sum((problem.travel_sizes or problem.sizes)[index] for index in streamed)
        floor = max(problem.whole_compute, sum(problem.copy[index] for index in streamed))
        if (floor, copied) > self.best[:2]:
            return False
        used = device_bytes(problem.sizes, streamed, depth)
        if used > problem.budget:
            return False
        ticks = self._ticks(streamed, assign_slots(len(streamed), depth).prefetch + 1)
        key = (ticks, copied, used, depth, streamed)
        if key >= self.best:
            return False
        self.best = key
        return True

    def _improve(self, bounds: dict[int, float]) -> None:
        """Local search, until nothing near is better."""
        improved = True
        while improved and self._work > 0:
            improved = False
            for depth, streamed in self._neighbours(bounds):
                improved = self._offer(depth, streamed)
                if improved or self._work <= 0:
                    break

    def _neighbours(self, bounds: dict[int, float]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Keep one block more; or, while the step may get shorter, keep one and stream another instead."""
        ticks, _, used, depth, streamed = self.best
        sizes, copy = self.problem.sizes, self.problem.copy
        without = {out: tuple(index for index in streamed if index != out) for out in streamed}
        costly = sorted(streamed, key=lambda index: (-copy[index], index))
        yield from ((depth, without[out]) for out in costly)
        if ticks <= bounds[depth]:
            return
        # streaming more never makes a step shorter: a swap is only worth a try where the block taken out matters
        eased = {out: self._ticks(without[out], assign_slots(len(streamed), depth).prefetch + 1) for out in costly}
        critical = sorted((out for out in costly if eased[out] < ticks), key=lambda out: (eased[out], out))
        kept = sorted(set(range(len(sizes))) - set(streamed), key=lambda index: (copy[index], index))
        slack = self.problem.budget - used
        pairs = [(out, into) for out in critical for into in kept]
        pairs.sort(key=lambda pair: sizes[pair[0]] - sizes[pair[1]] > slack)  # those that fit in the same slots first
        for out, into in pairs:
            yield depth, tuple(sorted((*without[out], into)))

    def _ticks(self, streamed: tuple[int, ...], window: int) -> float:
        self._work -= len(streamed) * (window + 1)
        return step_ticks(self.problem.compute, self.problem.copy, streamed, window)

    def _branch(self, depth: int) -> bool:
        """Branch and bound over what is streamed; False where the work ran out before everything was seen."""
        problem = self.problem
        order = sorted(range(len(problem.sizes)), key=lambda index: (-problem.copy[index], index))
        open_nodes: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        while open_nodes:
            if self._work <= 0:
                return False
            place, streamed = open_nodes.pop()
            self._work -= 4 * len(order)
            if self._bound(depth, streamed, order[place:]) >= self.best[:3]:
                continue
            if place == len(order):
                self._offer(depth, streamed)
                continue
            open_nodes.append((place + 1, tuple(sorted((*streamed, order[place])))))
            open_nodes.append((place + 1, streamed))
        return True

    def _bound(self, depth: int, streamed: tuple[int, ...], undecided: Sequence[int]) -> tuple[float, int, int]:
        """No choice that streams `streamed`, and of the rest some `undecided`, is better than this.

        Streaming more never makes a step shorter, nor does a smaller window: so what is decided, alone and with the
        full window, is a lower bound.
        """
        problem = self.problem
        need = problem.saving + max((problem.sizes[index] for index in streamed), default=0)
        decided = sum(problem.sizes[index] for index in streamed)
        free = set(undecided)
        ahead = problem.cover([index for index in problem.cheapest if index in free], need - decided)
        copy = sum(problem.copy[index] for index in streamed) + ahead
        ticks = self._ticks(streamed, depth + 1)
        held = problem.total - decided - sum(problem.sizes[index] for index in undecided)
        return max(ticks, copy), max(decided, need), held + need - problem.saving


def _diffuse(problem: _Problem, rate: float, phase: float) -> tuple[int, ...]:
    """Stream a block whenever `rate` times the compute since the last ones has paid for its copy."""
    credit, streamed = 0.0, []
    for index, (compute, copy) in enumerate(zip(problem.compute, problem.copy, strict=True)):
        credit += rate * compute
        if credit >= phase * copy:
            streamed.append(index)
            credit = min(credit - copy, copy)
    return tuple(streamed)
