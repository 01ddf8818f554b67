"""in-order by the device's clock: times that are made up, a device that is played by threads, and real ranks.

On CUDA the order of issue is right whatever the device does; so a race shows in the times alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cloudpickle
import numpy as np
import pytest
from faults_in_steps import BLOCK, Plant
from judged_run import with_fault
from one_rank import admitted, rank_request

import faults_of_order as faults
from crossdock.offload.memory.copy_engine import _EPOCH_S, Event, _Epoch
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.loader import Gather
from crossdock.offload.stream.trace import EventKind, TraceEvent
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.ordering import (
    TOLERANCE_S,
    Overlap,
    in_order_by_the_clock,
    overlaps,
    trace_in_order,
)
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.contract.verify import verify_request
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.watch.gang import Gang
from reference import PROMPT
from tiers import not_quick, some, thorough
from toy_blocks import STREAMED, Case, QueuedEngine, build, nothing, run, stalls

cloudpickle.register_pickle_by_value(faults)

STEPS = 4
REQUEST = rank_request(PROMPT, steps=STEPS, height=64, width=64)
TIMEOUT_S = 120.0


# -- times that are made up ------------------------------------------------------------------------------------------


class Timeline:
    """What CUDA tells of a stream that is in order: lanes that run by themselves, and wait for each other's events.

    Args:
        fault: (kind, block, step): that does not wait for what it has to, which takes long.
    """

    def __init__(self, choice: random.Random, fault: tuple[str, int, int] | None = None) -> None:
        self._choice, self._fault = choice, fault
        self.homes = [choice.choice((*STREAMED, Home.RESIDENT)) for _ in range(choice.randint(6, 12))]
        if fault is not None:
            self.homes[fault[1]] = Home.HOST_SHARD if fault[0] == "gather" else choice.choice(STREAMED)
            self.homes[0] = Home.HOST
        self.slots, self.staged = choice.randint(2, 4), choice.random() < 0.5
        if fault is not None and fault[0] == "reader":  # else a load may be late enough by itself
            self.homes, self.slots, self.staged = [choice.choice(STREAMED) for _ in self.homes], 2, False
        self.events: list[TraceEvent] = []
        self._lanes = dict.fromkeys(("copy", "gather", "compute"), 1.0)
        self._free, self._ready, self._staging_free = dict[Any, float](), dict[int, float](), 0.0
        self._slot: dict[int, int | None] = {}
        streamed = count()
        for index, home in enumerate(self.homes):
            self._slot[index] = None if home is Home.RESIDENT else next(streamed) % self.slots
        for step in range(4):
            order = [index for index, home in enumerate(self.homes) if home is not Home.RESIDENT]
            for index in range(len(self.homes)):
                if index in order:
                    self._load(index, step)
                self._compute(index, step)

    @property
    def names(self) -> set[str]:
        return {f"b{n}" for n, home in enumerate(self.homes) if self.staged and home is not Home.RESIDENT}

    def _is(self, kind: str, index: int, step: int) -> bool:
        return self._fault == (kind, index, step)

    def _on(self, lane: str, kind: str, index: int, after: Sequence[float], long: bool) -> tuple[float, float]:
        begin = max([self._lanes[lane], *after]) + self._choice.random() * 1e-5
        end = begin + (1e-2 if long else self._choice.random() * 1e-3)
        self._lanes[lane] = end
        for which, at_s in (("begin", begin), ("end", end)):
            seen = at_s + self._choice.uniform(-1, 1) * 1e-6  # as exact as events are
            what = cast(EventKind, f"{kind}_{which}")
            self.events.append(TraceEvent(len(self.events), what, f"b{index}", self._slot[index], seen))
        return begin, end

    def _load(self, index: int, step: int) -> None:
        home, slot = self.homes[index], self._slot[index]
        early = any(self._is(kind, index, step) for kind in ("wait", "gather"))
        after = [] if self._is("reader", index, step) else [self._free.get(slot, 0.0)]
        if self.staged:
            after.append(self._staging_free)
        end = 0.0
        if home is not Home.DEVICE_SHARD:
            _, end = self._on("copy", "load", index, after, early)
        if home.sharded:
            needs = [] if self._is("gather", index, step) else [end]
            _, end = self._on("gather", "gather", index, [*needs, *(after if home is Home.DEVICE_SHARD else ())], early)
        self._ready[index] = end
        if self.staged:
            self._staging_free = 0.0 if self._is("staging", index, step) else end

    def _compute(self, index: int, step: int) -> None:
        after = [] if self._is("wait", index, step) else [self._ready.get(index, 0.0)]
        following = self._fault and self._fault[0] == "reader" and self._is_before_fault(index, step)
        _, self._free[self._slot[index]] = self._on("compute", "compute", index, after, bool(following))

    def _is_before_fault(self, index: int, step: int) -> bool:
        """It had the slot just before the block that does not wait for it."""
        assert self._fault is not None
        order = [(s, n) for s in range(4) for n in self._slot if self._slot[n] == self._slot[self._fault[1]]]
        return order[order.index((self._fault[2], self._fault[1])) - 1] == (step, index)


@pytest.mark.parametrize("seed", range(60))
def test_no_false_alarm(seed: int) -> None:
    """Lanes that touch, errors of the clock, staging memory, a trace that is cut, blocks that stay."""
    choice = random.Random(seed)
    made = Timeline(choice)
    assert list(overlaps(made.events, made.names)) == []
    start = choice.randrange(len(made.events))
    assert list(overlaps(made.events[start : start + choice.randint(1, 200)], made.names)) == []


@pytest.mark.parametrize("kind", ["wait", "reader", "gather"])
@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_overlap(kind: str, seed: int) -> None:
    """In any step, of any block: told of that block, and by how much; the order of issue is that of a healthy run."""
    choice = random.Random(seed)
    block, step = choice.randint(2, 5), choice.randint(1, 3)
    made = Timeline(choice, (kind, block, step))
    found = [one for one in overlaps(made.events) if one.begins.block == f"b{block}"]
    assert found, (kind, block, step)
    kinds = {"wait": {"compute_begin"}, "reader": {"load_begin", "gather_begin"}, "gather": {"gather_begin"}}
    assert found[0].begins.kind in kinds[kind]
    assert found[0].ends.block == f"b{block}" or kind == "reader"
    assert TOLERANCE_S < found[0].by_s <= found[0].ends.at_s - found[0].begins.at_s + 1e-9
    assert all(earlier.sequence < later.sequence for earlier, later in pairwise(made.events))


def _events(*told: tuple[EventKind, str, int | None, float]) -> list[TraceEvent]:
    """(kind, block, slot, us)"""
    return [TraceEvent(n, kind, block, slot, 1.0 + us * 1e-6) for n, (kind, block, slot, us) in enumerate(told)]


def _found(events: Sequence[TraceEvent], staged: Sequence[str] = ()) -> list[tuple[str, str, str, float]]:
    return [(o.where, o.ends.kind, o.begins.kind, round(o.by_s * 1e6, 3)) for o in overlaps(events, staged)]


def test_the_tolerance() -> None:
    """5 us are no overlap, 6 are; a nested use, of which the neighbours do not touch, is one."""
    for us, found in ((95.1, []), (94.0, [("a in slot 0", "load_end", "compute_begin", 6.0)])):
        assert (
            _found(_events(("load_begin", "a", 0, 0), ("load_end", "a", 0, 100), ("compute_begin", "a", 0, us)))
            == found
        )
    nested = _events(
        ("compute_begin", "a", 0, 0),
        ("compute_end", "a", 0, 100),
        ("load_begin", "b", 0, 10),
        ("load_end", "b", 0, 20),
        ("compute_begin", "b", 0, 30),
    )
    expected = [
        ("b in slot 0", "compute_end", "load_begin", 90.0),
        ("b in slot 0", "compute_end", "compute_begin", 70.0),
    ]
    assert _found(nested) == expected


def test_staging_memory() -> None:
    """Two blocks of different slots that travel encoded: the shard of one comes before the other was decoded."""
    events = _events(
        ("load_begin", "a", 0, 0),
        ("load_end", "a", 0, 50),
        ("gather_begin", "a", 0, 60),
        ("gather_end", "a", 0, 200),
        ("load_begin", "b", 1, 120),
        ("load_end", "b", 1, 150),
    )
    assert _found(events) == []
    assert _found(events, ["a", "b"]) == [("b in the staging memory", "gather_end", "load_begin", 80.0)]


def test_what_is_not_known() -> None:
    """Events of a captured graph have no time; a broken load no end; one that began before the trace no begin."""
    captured = [replace(event, at_s=0.0) for event in Timeline(random.Random(1), ("wait", 3, 2)).events]
    assert list(overlaps(captured)) == []
    loads: list[tuple[EventKind, str, int, float]] = [("load_begin", "a", 0, 0), ("load_begin", "a", 0, 50)]
    assert _found(_events(*loads, ("load_end", "a", 0, 90), ("compute_begin", "a", 0, 95))) == []
    older = _events(("load_end", "a", 0, 100), ("compute_begin", "a", 0, 40))
    assert _found(older) == [("a in slot 0", "load_end", "compute_begin", 60.0)]


def test_what_happens_again_is_told_once() -> None:
    """Each step of fifty: one line, with the worst, and how often."""
    told: list[tuple[EventKind, str, int | None, float]] = []
    for step in range(50):
        at, by = step * 1000.0, 10.0 + step
        told += [("load_begin", "a", 0, at), ("load_end", "a", 0, at + 500)]
        told += [("compute_begin", "a", 0, at + 500 - by), ("compute_end", "a", 0, at + 900)]
    (violation,) = in_order_by_the_clock(cast(MemoryPlan, SimpleNamespace(blocks=())), 3, _events(*told))
    assert (violation.check, violation.rank, violation.where) == ("in-order", 3, "a in slot 0")
    assert violation.expected == "its compute after the load of a, by the device's clock"
    assert "59.0 us before that ended" in violation.found
    assert "the worst of 50 times" in violation.found


class _Stamp:
    """A CUDA event: its time is exact, what is told of two of them is ms in fp32."""

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Stamp) -> float:
        return float(np.float32((other.at_s - self.at_s) * 1e3))


def test_times_after_hours() -> None:
    """From the beginning, 4 us is as exact as it gets after a minute, and 0.25 ms after an hour; here 1 us, always."""
    epoch, choice = _Epoch(_Stamp(0.0), 1000.0), random.Random(0)
    marks: list[tuple[_Epoch, _Stamp]] = []
    for number in range(int(3 * 3600 / _EPOCH_S)):
        now = number * _EPOCH_S + choice.random()
        marks += [(epoch, _Stamp(now + _EPOCH_S + 6e-6 * n)) for n in range(3)]
        epoch = _Epoch(_Stamp(now + _EPOCH_S + 3e-6), epoch)  # of another stream: two of the marks are before it
        marks += [(epoch, _Stamp(now + _EPOCH_S + 6e-6 * n)) for n in range(3, 6)]
    marks[-1][0].seconds(marks[-1][1])  # the newest first: a chain of all epochs
    times = [epoch.seconds(stamp) for epoch, stamp in marks]
    for number in range(0, len(times), 6):
        for earlier, later in pairwise(times[number : number + 6]):
            assert later - earlier == pytest.approx(6e-6, abs=TOLERANCE_S / 2)
    assert times[-1] - times[0] == pytest.approx(marks[-1][1].at_s - marks[0][1].at_s, abs=1e-3)


# -- a device that is played by threads ------------------------------------------------------------------------------


class DeviceEngine(QueuedEngine):
    """CUDA's picture: work runs on the host at once, and what it gives to its lane, when the lane gets there."""

    early: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the event of the work that was just given came before it."""
    lane = ""

    def submit(self, lane: str, work: Callable[[], None], after: Any = (), needs: Any = ()) -> Event:
        if lane == "compute" or self.lane:
            return super().submit(lane, work, after, needs)
        done = super().submit(lane, nothing, (*after, *needs))
        self.lane = lane
        work()
        self.lane = ""
        return done if self.early() else super().submit(lane, nothing)

    def move(self, target: Any, source: Any) -> None:
        self.submit(self.lane, lambda: np.copyto(target.numpy(), source.numpy()))

    def mark(self, lane: str) -> Any:
        happened: list[float] = []
        done = QueuedEngine.submit(self, lane, lambda: happened.append(QueuedEngine.mark(self, lane)))
        return done, happened

    def seconds(self, mark: Any) -> float:
        assert mark[0].event.wait(60)
        return float(mark[1][0])


def _device(homes: Sequence[Home], seed: int) -> tuple[Case, DeviceEngine]:
    engine = DeviceEngine(stalls(seed, 0.3))
    case = build(homes, prefetch=1, seed=seed, engine=cast(Any, engine))
    gather = case.group.gather()

    def all_gather(out: Any, shard: Any) -> None:
        engine.submit("gather", lambda: gather.all_gather(out, shard))

    case.stream._loader._gather = Gather(gather.parts, gather.index, all_gather)
    return case, engine


@pytest.mark.parametrize("home", [*STREAMED, None])
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_device(home: Home | None, seed: int) -> None:
    case, _ = _device([home] * 7 if home else [*STREAMED, Home.RESIDENT] * 2, seed)
    for _ in range(4):
        case.check(range(len(case.modules)))
    trace = case.stream.trace()
    case.finish()
    assert sum(event.kind == "compute_begin" for event in trace) == 4 * len(case.modules)
    assert list(overlaps(trace)) == []


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("fault", ["wait", "early", "reader"])
def test_a_race_on_the_device(fault: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a middle pass and in the last: what was issued is all right, and what happened is not."""
    case, engine = _device([Home.HOST] * 7, 1)
    stream, block, passes = case.stream, 4, count()
    slot = stream._table.of[block]
    before = next(n for n in reversed(range(block)) if stream._table.of[n] is slot)
    computed, begun, now, last = threading.Event(), threading.Event(), -1, 0
    move, wait, claim, compute = engine.move, engine.wait, type(slot).claim, [m._compute for m in case.modules]

    def ours() -> bool:
        return now == at and slot.holder == block

    def moved(target: Any, source: Any) -> None:
        nonlocal last
        last = target.data_ptr()
        if ours() and slot.memory.data_ptr() == last:
            engine.submit("copy", begun.set if fault == "reader" else lambda: computed.wait(60) and None)
        move(target, source)

    def computing(number: int, x: Any) -> Any:
        if number == before and fault == "reader" and now == at:
            begun.wait(60)
        result = compute[number](x)
        if number == block and now == at:
            computed.set()
        return result

    for number, module in enumerate(case.modules):
        monkeypatch.setattr(module, "_compute", lambda x, number=number: computing(number, x))
    monkeypatch.setattr(engine, "move", moved)
    if fault == "wait":
        monkeypatch.setattr(engine, "wait", lambda event: None if ours() and event is slot.ready else wait(event))
    elif fault == "early":
        monkeypatch.setattr(engine, "early", lambda: ours() and slot.memory.data_ptr() == last)
    else:
        monkeypatch.setattr(
            type(slot), "claim", lambda of, taker: claim(of, taker)[: 0 if of is slot and ours() else 9]
        )
    for now in passes:
        if now == 4:
            break
        run(case.modules, range(len(case.modules)))
    trace = stream.trace()
    monkeypatch.undo()
    case.finish()
    plan = cast(MemoryPlan, SimpleNamespace(blocks=stream.blocks, schedule=stream.schedule))
    assert list(trace_in_order(plan, 0, trace)) == []
    (found,) = _of_block(list(overlaps(trace)), f"blocks.{block}")
    expected = ("compute_end", "load_begin") if fault == "reader" else ("load_end", "compute_begin")
    assert (found.ends.kind, found.begins.kind) == expected


def _of_block(found: Sequence[Overlap], block: str) -> list[Overlap]:
    assert {one.begins.block for one in found} == {block}
    return list(found)


# -- real ranks ------------------------------------------------------------------------------------------------------


def _clocked(plan: RunPlan, reports: Any, results: Sequence[RankResult]) -> list[Violation]:
    """What the device's clock says; that all of it was looked at."""
    for result in results:
        assert sum(event.kind == "compute_begin" for event in result.timeline.events) >= STEPS * len(plan.memory.blocks)
        assert all(event.at_s for event in result.timeline.events)
    violations = verify_request(plan, reports, results)
    return [violation for violation in violations if "by the device's clock" in violation.expected]


def _plan(directory: Path, **parallel: Any) -> RunPlan:
    config = {"parallel": parallel, "offload": {"layerwise": True}, "verify": {"state": False}}
    return make_plan(RunConfig.parse(config), directory, "cpu")


@not_quick
def test_one_rank(flux2_dir: Path) -> None:
    """In a middle step, in the last, and in a second request; the next request is right again."""
    plan = _plan(flux2_dir)
    with admitted(plan) as worker:
        reports = [worker.report()]

        def judged(plant: Plant | None, at: int) -> list[Violation]:
            return _clocked(plan, reports, [with_fault(plant, 0, at)(worker, REQUEST)])

        assert judged(None, 0) == []
        for plant in (faults.wait_left_out, faults.event_too_early, faults.reader_not_waited_for):
            for at in some((STEPS, 2), 1):
                found = judged(plant, at)
                print(plant.__name__, at, *found, sep="\n   ")
                assert found, (plant, at)
                assert {violation.rank for violation in found} == {0}
                if plant is not faults.reader_not_waited_for:
                    assert all(violation.where.startswith(BLOCK) for violation in found)
                assert any(BLOCK in str(violation) for violation in found)
        assert judged(None, 0) == []


@pytest.mark.parametrize("layout", ["tp2", pytest.param("hsdp", marks=thorough)])
def test_two_ranks(layout: str, gang_of: Callable[[int], Gang], flux2_dir: Path) -> None:
    """The rank is named, and no other one."""
    parallel = {"tp2": {"tp_degree": 2}, "hsdp": {"dp_degree": 2, "hsdp": {"replicate": 1, "shard": 2}}}[layout]
    plan, gang = _plan(flux2_dir, **parallel), gang_of(2)
    plants = [faults.wait_left_out] if layout == "tp2" else [faults.gathered_too_early, faults.event_too_early]
    try:
        reports = gang.collective_rpc(RankWorker.setup, plan, False, True, timeout_s=TIMEOUT_S)
        for plant in (None, *plants, None):
            results = gang.collective_rpc(with_fault(plant, 1, STEPS - 1), REQUEST, timeout_s=TIMEOUT_S)
            found = _clocked(plan, reports, results)
            print(layout, *found, sep="\n   ")
            assert {violation.rank for violation in found} == (set() if plant is None else {1})
            assert all(BLOCK in str(violation) for violation in found)  # some of the next one in its slot
    finally:
        gang.collective_rpc(RankWorker.teardown, timeout_s=TIMEOUT_S)
