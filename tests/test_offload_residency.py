"""The choice of resident blocks, against brute force on few blocks and against its own bound on many."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest

from crossdock.offload.schedule import residency
from crossdock.offload.schedule import slots as schedule
from crossdock.offload.schedule.residency import (
    Costs,
    Residency,
    assumed_costs,
    minimum_bytes,
    plan_residency,
    steady_step_s,
)
from crossdock.offload.schedule.slots import assign_slots, device_bytes
from tiers import every, how_many, not_quick, some

MIB = 1 << 20
MOST_TIMED = 1_000_000  # events: about half a second


def _few_blocks(choice: random.Random) -> tuple[list[int], Costs]:
    """Random, equal, or two stacks; whole seconds, so that nothing is rounded and ties are real."""
    count = choice.choice((1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 9))
    kind = choice.choice(("random", "random", "equal", "stacks"))
    split = choice.randint(0, count)
    most = choice.choice((3, 30))
    size, other = choice.randint(1, most), choice.randint(1, most)
    sizes = [choice.randint(1, most) if kind == "random" else size for _ in range(count)]
    if kind == "stacks":
        sizes[split:] = [other] * (count - split)
    rate = choice.choice((1, 2, 5))
    copy = [choice.randint(0, most) if kind == "random" else rate * size for size in sizes]
    compute = [choice.randint(0, most) if kind == "random" else choice.choice((1, 3)) * size for size in sizes]
    return sizes, Costs(tuple(map(float, compute)), tuple(map(float, copy)))


def _every_choice(sizes: Sequence[int], costs: Costs, depths: Sequence[int]) -> list[tuple[int, float, int]]:
    """Device bytes, step and bytes copied of every subset with every depth."""
    found = []
    everything = range(len(sizes))
    for count in range(len(sizes) + 1):
        for resident in combinations(everything, count):
            streamed = [index for index in everything if index not in resident]
            copied = sum(sizes[index] for index in streamed)
            for depth in depths:
                step = steady_step_s(costs, resident, assign_slots(len(streamed), depth))
                found.append((device_bytes(sizes, streamed, depth), step, copied))
    return found


def _check(plan: Residency, sizes: Sequence[int], costs: Costs, budget: int) -> None:
    """What a plan says about itself, recomputed."""
    streamed = [index for index in range(len(sizes)) if index not in plan.resident]
    slots = dict.fromkeys(plan.schedule.slots, 0)
    for index, slot in zip(streamed, plan.schedule.slots, strict=True):
        slots[slot] = max(slots[slot], sizes[index])
    assert list(plan.resident) == sorted(set(plan.resident))
    assert plan.device_bytes == sum(slots.values()) + sum(sizes[index] for index in plan.resident) <= budget
    assert plan.step_s == steady_step_s(costs, plan.resident, plan.schedule)
    assert plan.bound_s <= plan.step_s
    assert plan.exposed_s >= 0
    assert plan.exposed_s == pytest.approx(plan.step_s - sum(costs.compute_s), abs=1e-9 * plan.step_s)


@pytest.mark.parametrize("seed", range(how_many(20, 40, 320)))
def test_few_blocks_against_every_choice(seed: int) -> None:
    """The criterion: the shortest step; among those the fewest bytes copied, then the fewest device bytes."""
    choice = random.Random(seed)
    sizes, costs = _few_blocks(choice)
    depths = choice.choice(((1,), (2,), (1, 2), (3, 1)))
    choices = _every_choice(sizes, costs, depths)
    least = min(used for used, _, _ in choices)
    assert minimum_bytes(sizes, depths) == least
    before = float("inf")
    for budget in sorted({least, sum(sizes), choice.randint(least, sum(sizes)), choice.randint(least, sum(sizes))}):
        plan = plan_residency(sizes, costs, budget, depths)
        _check(plan, sizes, costs, budget)
        step, copied, used = min((step, copied, used) for used, step, copied in choices if used <= budget)
        where = f"seed {seed}, budget {budget}: {plan}"
        assert plan.step_s == pytest.approx(step, rel=1e-12), where
        assert plan.optimal, where
        assert sum(sizes) - sum(sizes[index] for index in plan.resident) == copied, where
        assert plan.device_bytes == used, where
        assert plan.step_s <= before, where
        before = plan.step_s


@pytest.mark.parametrize("seed", range(how_many(10, 20, 120)))
def test_the_proof_does_not_lean_on_the_local_search(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branch and bound alone finds the best choice; the bound alone is below it, counted in blocks or in parts."""
    choice = random.Random(1000 + seed)
    sizes, costs = _few_blocks(choice)
    depths = choice.choice(((1,), (2,), (1, 2), (3, 1)))
    choices = _every_choice(sizes, costs, depths)
    budget = choice.randint(minimum_bytes(sizes, depths), sum(sizes))
    best = min(step for used, step, _ in choices if used <= budget)
    monkeypatch.setattr(residency._Search, "_improve", lambda *_: None)
    monkeypatch.setattr(residency, "_diffuse", lambda *_: ())
    assert plan_residency(sizes, costs, budget, depths).step_s == pytest.approx(best, rel=1e-12)
    monkeypatch.setattr(residency, "_SEARCH_WORK", 0)
    for vectors in (residency._COUNT_VECTORS, 0):
        monkeypatch.setattr(residency, "_COUNT_VECTORS", vectors)
        plan = plan_residency(sizes, costs, budget, depths)
        assert sum(costs.compute_s) <= plan.bound_s <= best * (1 + 1e-12), f"seed {seed}, budget {budget}"


@pytest.mark.parametrize("seed", range(how_many(20, 40, 300)))
def test_the_least_copy_time_is_a_lower_bound(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every choice with one depth; counted in whole blocks of few kinds, in any order, or in parts of blocks."""
    choice = random.Random(seed)
    kinds = [(choice.randint(1, 30), choice.randint(1, 30)) for _ in range(choice.randint(1, 3))]
    blocks = [choice.choice(kinds) for _ in range(choice.randint(2, 8))]
    sizes, copy = zip(*(sorted(blocks) if seed % 3 == 0 else blocks), strict=True)
    depth = choice.randint(1, 2)
    needs = [
        (device_bytes(sizes, streamed, depth), sum(copy[index] for index in streamed))
        for count in range(len(sizes) + 1)
        for streamed in combinations(range(len(sizes)), count)
    ]
    for budget in {used for used, _ in needs}:
        problem = residency._Problem(sizes, (0,) * len(sizes), copy, budget)
        least = min(ticks for used, ticks in needs if used <= budget)
        assert problem.least_copy(depth) <= least, f"seed {seed}, budget {budget}"
        with monkeypatch.context() as patch:
            patch.setattr(residency, "_COUNT_VECTORS", 0)
            assert problem.least_copy(depth) <= least + 1e-9, f"seed {seed}, budget {budget}, in parts"


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_below_the_minimum_names_the_minimum(seed: int) -> None:
    """The message must carry the number to put into the config, and that number must then work."""
    choice = random.Random(seed)
    sizes = [choice.randint(1, 1000) for _ in range(choice.randint(1, 60))]
    costs, depths = assumed_costs(sizes), (choice.randint(1, 4),)
    least = minimum_bytes(sizes, depths)
    with pytest.raises(ValueError, match=rf"{least - 1} bytes .* minimum of {least} bytes"):
        plan_residency(sizes, costs, least - 1, depths)
    _check(plan_residency(sizes, costs, least, depths), sizes, costs, least)


def _interleaved(count: int) -> list[int]:
    return [(300, 200, 120)[index % 3] * MIB for index in range(count)]


def _random(count: int) -> list[int]:
    choice = random.Random(0)
    return [choice.randint(50, 400) * MIB + 256 * choice.randint(0, 4000) for _ in range(count)]


MODELS = {
    "60 equal": [300 * MIB] * 60,
    "200 equal": [300 * MIB] * 200,
    "19 + 38": [340 * MIB] * 19 + [140 * MIB] * 38,
    "5 + 20": [340 * MIB] * 5 + [140 * MIB] * 20,
    "200 of 3 sizes": _interleaved(200),
    "200 random": _random(200),
}
PROVEN = {
    # model, copy/compute: from which tenth between the minimum and everything the plan is proven optimal
    ("60 equal", 0.5): 0,
    ("60 equal", 1.0): 0,
    ("60 equal", 2.0): 0,
    ("200 equal", 0.5): 0,
    ("200 equal", 1.0): 0,
    ("200 equal", 2.0): 0,
    ("19 + 38", 0.5): 0,
    ("19 + 38", 1.0): 1,
    ("19 + 38", 2.0): 6,
    ("5 + 20", 0.5): 0,
    ("5 + 20", 1.0): 1,
    ("5 + 20", 2.0): 7,
    ("200 of 3 sizes", 0.5): 3,
    ("200 of 3 sizes", 1.0): 3,
    ("200 of 3 sizes", 2.0): 6,
    ("200 random", 0.5): 4,
    ("200 random", 1.0): 6,
    ("200 random", 2.0): 8,
}


def _costs(sizes: Sequence[int], rate: float) -> Costs:
    compute = assumed_costs(sizes).compute_s
    return Costs(compute, tuple(rate * seconds for seconds in compute))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Events that a search times: what its time goes with, on whatever machine."""
    counts = []

    def step_ticks(compute: Sequence[int], copy: Sequence[int], streamed: Sequence[int], window: int) -> float:
        counts.append(len(streamed) * (window + 1))
        return schedule.step_ticks(compute, copy, streamed, window)

    monkeypatch.setattr(residency, "step_ticks", step_ticks)
    return counts


@not_quick
@pytest.mark.parametrize(("model", "rate"), every(PROVEN, 5))
def test_many_blocks(model: str, rate: float, timed: list[int]) -> None:
    """Ten steps from the minimum to everything: in time, never slower with more memory, and how much is proven."""
    sizes = MODELS[model]
    costs, least = _costs(sizes, rate), minimum_bytes(sizes, (1,))
    plans = []
    for tenth in range(11):
        budget = least + (sum(sizes) - least) * tenth // 10
        timed.clear()
        plan = plan_residency(sizes, costs, budget, (1,))
        assert sum(timed) < MOST_TIMED
        _check(plan, sizes, costs, budget)
        plans.append(plan)
    for before, after in pairwise(plans):
        assert after.step_s <= before.step_s * (1 + 1e-12)
        assert after.bound_s <= before.bound_s * (1 + 1e-12)
    assert all(plan.optimal for plan in plans[PROVEN[model, rate] :])
    assert plans[-1].resident == tuple(range(len(sizes)))
    assert plans[-1].exposed_s == 0


@pytest.mark.parametrize("model", MODELS)
def test_more_depths_are_no_slower(model: str, timed: list[int]) -> None:
    sizes = MODELS[model]
    costs, least = _costs(sizes, 1.5), minimum_bytes(sizes, (1,))
    budget = (least + sum(sizes)) // 2
    one = plan_residency(sizes, costs, budget, (1,))
    timed.clear()
    several = plan_residency(sizes, costs, budget, (1, 2, 3, 4))
    assert sum(timed) < MOST_TIMED
    assert several.step_s <= one.step_s
    assert several.bound_s <= one.bound_s


def test_residents_are_spread() -> None:
    """Pitfall 34: resident blocks in one clump leave the copies of the others nothing to hide behind."""
    sizes = [MIB] * 60
    plan = plan_residency(sizes, _costs(sizes, 2.0), 33 * MIB, (1,))
    assert len(plan.resident) == 30
    assert plan.exposed_s == 0
    clumped = steady_step_s(_costs(sizes, 2.0), range(30), plan.schedule)
    assert clumped > 1.4 * plan.step_s


def test_the_same_answer_whatever_the_unit() -> None:
    """Ranks compare schedules: times that differ only in how they were summed must not change the choice."""
    choice = random.Random(1)
    sizes = [choice.randint(1, 400) * MIB for _ in range(57)]
    costs, budget = _costs(sizes, 1.7), sum(sizes) // 2
    plan = plan_residency(sizes, costs, budget, (1, 2))
    for unit in (2.0**-20, 2.0**30):
        scaled = Costs(tuple(s * unit for s in costs.compute_s), tuple(s * unit for s in costs.copy_s))
        other = plan_residency(sizes, scaled, budget, (1, 2))
        assert (other.resident, other.schedule) == (plan.resident, plan.schedule)
        assert other.step_s == plan.step_s * unit


def test_steady_step_by_hand() -> None:
    costs = Costs((5.0, 5.0), (7.0, 7.0))
    assert steady_step_s(costs, (1,), assign_slots(1, 1)) == 12, "one block: loaded between its own computes"
    assert steady_step_s(costs, (), assign_slots(2, 0)) == 24, "one slot: copy and compute take turns"
    assert steady_step_s(costs, (), assign_slots(2, 1)) == 14, "two slots: as fast as the lane"
    assert steady_step_s(costs, (0, 1), assign_slots(0, 1)) == 10


def test_no_budget_is_the_least_memory_of_streaming_everything() -> None:
    sizes = [5, 3, 4, 2]
    plan = plan_residency(sizes, assumed_costs(sizes), None, (2, 1))
    assert plan.resident == ()
    assert plan.schedule == assign_slots(4, 1)
    assert plan.device_bytes == 8
    assert plan.step_s == plan.bound_s == steady_step_s(assumed_costs(sizes), (), plan.schedule)


@pytest.mark.parametrize("share", some([0.65, 0.5, 0.8, 0.9], 1))
@pytest.mark.parametrize("stacks", [((648, 19), (270, 38)), ((1100, 8), (500, 48))], ids=["FLUX.1", "FLUX.2"])
def test_what_is_assumed_is_good_on_any_link(stacks: tuple[tuple[int, int], ...], share: float) -> None:
    """A clump of streamed blocks waits for its copies, and no assumption may choose one where a spread would not.

    Against the choice that knows the costs: a fifth of the compute is the same for all blocks, the rest goes by bytes.
    """
    sizes = [mib * MIB for mib, count in stacks for _ in range(count)]
    budget = round(sum(sizes) * share)
    chosen = plan_residency(sizes, assumed_costs(sizes), budget, (1,))
    for copy_s in (1.0, 2.0, 3.0, 5.0):
        compute = tuple(0.2 / len(sizes) + 0.8 * size / sum(sizes) for size in sizes)
        costs = Costs(compute, tuple(copy_s * size / sum(sizes) for size in sizes))
        found = steady_step_s(costs, chosen.resident, chosen.schedule)
        known = min(plan_residency(sizes, costs, budget, (1,)).step_s, found)
        print(f"copying all takes {copy_s} of the compute: {found:.3f}, known costs {known:.3f}")
        assert found <= 1.15 * known


def test_nothing_to_stream() -> None:
    none = Costs((), ())
    assert assumed_costs([]) == none
    assert minimum_bytes([], (1, 2)) == 0
    for budget in (None, 0, 10):
        plan = plan_residency([], none, budget, (1,))
        assert (plan.resident, plan.schedule, plan.device_bytes, plan.step_s) == ((), assign_slots(0, 1), 0, 0)
        assert plan.optimal


def test_times_may_all_be_zero() -> None:
    plan = plan_residency([3, 3, 3], Costs((0.0,) * 3, (0.0,) * 3), 9, (1,))
    assert plan.optimal
    assert plan.resident == (0, 1, 2), "fewest bytes copied"


def test_costs_of_another_number_of_blocks() -> None:
    with pytest.raises(ValueError, match="2 blocks, 1 compute times, 2 copy times"):
        plan_residency([1, 1], Costs((1.0,), (1.0, 1.0)), None, (1,))
    with pytest.raises(ValueError, match="1 blocks are streamed, but the schedule has slots for 2"):
        steady_step_s(assumed_costs([1, 1]), (0,), assign_slots(2, 1))
