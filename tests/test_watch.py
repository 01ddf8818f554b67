"""The watch's judge without processes: statuses made by hand, then a small SPMD program that runs in random order."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from crossdock.parallel.group import KEPT, Collective, GroupRecord
from crossdock.parallel.mesh import MeshShape
from crossdock.runtime.errors import CheckpointError, FaultKind, RankError, RequestCancelled, RequestTimeout
from crossdock.runtime.reports.status import RankStatus, ranks_text
from crossdock.runtime.watch.faults import first_cause, is_conclusive, rank_error
from crossdock.runtime.watch.watch import PATIENCE_S, Watch, different_collective
from tiers import every, how_many, not_quick

LONG = PATIENCE_S + 1.0


def issued(name: str, ranks: Sequence[int], whats: Sequence[str], waiting_s: float | None = None) -> GroupRecord:
    """What a rank has issued on a group, waiting in the latest for `waiting_s`."""
    digest = 0
    for what in whats:
        digest = zlib.crc32(what.encode(), digest)
    calls = [Collective(number, what) for number, what in enumerate(whats, 1)]
    return GroupRecord(name, tuple(ranks), len(calls), digest, tuple(calls[-KEPT:]), waiting_s)


def reduces(name: str, ranks: Sequence[int], count: int, waiting_s: float | None = None) -> GroupRecord:
    return issued(name, ranks, ["all_reduce 8"] * count, waiting_s)


def at(rank: int, *groups: GroupRecord, step: int | None = 3, waits: bool = False) -> RankStatus:
    block = "layers.2" if step else None
    return RankStatus(rank, "host", 100 + rank, "denoise", step=step, block=block, waits=waits, groups=groups)


def watch_of(*statuses: RankStatus, ended: Sequence[int] = ()) -> Watch:
    watch = Watch()
    for status in statuses:
        watch.hear(status)
    for rank in ended:
        watch.end(rank)
    return watch


def culprit(*statuses: RankStatus, ended: Sequence[int] = ()) -> int | None:
    fault = watch_of(*statuses, ended=ended).fault()
    return None if fault is None else fault.rank


# -- no fault ------------------------------------------------------------------------------------------------

PAIR = (0, 1)


def test_nothing_was_heard() -> None:
    """A watch that has not heard anybody yet finds somebody guilty."""
    assert Watch().fault() is None
    assert Watch().last_seen(0) == ""


def test_a_slow_collective_that_all_have_issued() -> None:
    """A slow link is taken for a deadlock."""
    assert culprit(*(at(rank, reduces("tp", PAIR, 5, 600.0)) for rank in PAIR)) is None


def test_a_rank_that_computes_for_long() -> None:
    """A rank that computes for minutes while the others wait for it is blamed."""
    waiting = [at(rank, reduces("world", range(4), 5, 300.0)) for rank in (0, 2, 3)]
    assert culprit(*waiting, at(1, reduces("world", range(4), 4))) is None


def test_a_rank_that_was_not_heard_yet() -> None:
    """A rank that still loads its model, or has not answered yet, is blamed."""
    assert culprit(at(0, reduces("tp", PAIR, 1, LONG))) is None
    assert culprit(at(0, reduces("tp", PAIR, 1, LONG)), RankStatus(1, "host", 1, "load")) is None


def test_a_lane_waits_while_its_rank_computes() -> None:
    """A gather that runs ahead, and that nobody waits for, is taken for a rank that waits."""
    weights = [reduces("weights", PAIR, 7, LONG), reduces("weights", PAIR, 6)]
    first = at(0, reduces("tp", PAIR, 4), weights[0])
    second = at(1, reduces("tp", PAIR, 5, LONG), weights[1])
    assert first.waiting is None
    assert culprit(first, second) is None
    assert culprit(replace(first, waits=True), second) is not None


def test_a_lane_waits_while_its_rank_waits_for_activations() -> None:
    """The gather lane's wait hides what the rank itself waits for."""
    status = at(0, reduces("weights", PAIR, 7, LONG), reduces("tp", PAIR, 4, LONG))
    assert status.waiting == status.groups[1]
    assert replace(status, waits=True).waiting == status.groups[1]


def test_a_circle_that_has_not_lasted() -> None:
    """Two statuses of different ages look like a circle for a moment."""
    circle = [at(0, reduces("tp", PAIR, 5, 0.1), reduces("ring", PAIR, 2)), at(1, reduces("ring", PAIR, 3, LONG))]
    assert culprit(*circle) is None


def test_statuses_of_different_ages() -> None:
    """A status from long ago, when the rank waited for others that have come since, is taken for the present."""
    old = at(0, reduces("tp", PAIR, 5, LONG), reduces("ring", PAIR, 2))
    assert culprit(old, at(1, reduces("tp", PAIR, 9, LONG), reduces("ring", PAIR, 4))) is None


def test_a_rank_that_ended_after_its_part() -> None:
    """A rank that has ended is blamed although it came to all collectives that anybody waits in."""
    assert culprit(at(0, reduces("tp", PAIR, 5, LONG)), at(1, reduces("tp", PAIR, 5)), ended=[1]) is None
    assert culprit(at(0, reduces("tp", PAIR, 5, LONG)), at(1, reduces("tp", PAIR, 4)), ended=[0]) is None
    assert culprit(at(0, reduces("tp", PAIR, 5, LONG)), at(1, reduces("tp", PAIR, 4)), ended=PAIR) is None


def test_groups_of_one_name_are_apart() -> None:
    """Two groups of one name, of other ranks, are compared with each other."""
    statuses = [at(rank, issued("tp", (rank // 2 * 2, rank // 2 * 2 + 1), [f"size {rank // 2}"])) for rank in range(4)]
    assert culprit(*statuses) is None


# -- a rank that is awaited: named, but no fault before the others' collectives are given up -----------------


def _held_up() -> Watch:
    """Rank 3 computes; 2 waits for it, 0 and 1 for 2."""
    return watch_of(
        at(0, reduces("tp", (0, 2), 5, LONG)),
        at(1, reduces("ring", (1, 2), 3, LONG)),
        at(2, reduces("tp", (0, 2), 4), reduces("ring", (1, 2), 2), reduces("world", (2, 3), 2, LONG)),
        at(3, reduces("world", (2, 3), 1)),
    )


def test_who_is_awaited_is_named() -> None:
    """Of ranks that wait one behind the other, one is named that waits itself."""
    watch = _held_up()
    assert watch.fault() is None
    awaited = watch.awaited()
    assert awaited is not None
    assert awaited.rank == 3
    assert awaited.what.startswith("last seen in step 3, block layers.2; rank 2 waits for it in step 3")


def test_nobody_is_awaited() -> None:
    """A rank is named before anybody has waited long, or in a collective to which all have come."""
    assert watch_of(at(0, reduces("tp", PAIR, 5, 0.1)), at(1, reduces("tp", PAIR, 4))).awaited() is None
    assert watch_of(*(at(rank, reduces("tp", PAIR, 5, LONG)) for rank in PAIR)).awaited() is None
    assert watch_of(at(0, reduces("tp", PAIR, 5, LONG))).awaited() is None
    circle = [at(0, reduces("tp", PAIR, 5, LONG), reduces("ring", PAIR, 2)), at(1, reduces("ring", PAIR, 3, LONG))]
    assert watch_of(*circle).awaited() is None


@pytest.mark.parametrize("cut_off", [0, 1, 2])
def test_who_did_not_come_is_to_blame(cut_off: int) -> None:
    """A rank hangs in its part; the first whose collective runs into its time limit is blamed instead."""
    found = _held_up().explain(RankError(cut_off, "timed out", "cut off"))
    assert isinstance(found, RankError)
    assert (found.rank, found.kind) == (3, "hangs")
    assert "it does not go on; last seen in step 3, block layers.2" in found.message


def test_cut_off_by_nobody() -> None:
    """A collective that failed although all had come is blamed on one of them."""
    both = watch_of(*(at(rank, reduces("tp", PAIR, 5, LONG)) for rank in PAIR))
    found = both.explain(RankError(1, "timed out", "cut off"))
    assert isinstance(found, RankError)
    assert (found.rank, found.kind) == (1, "cut off")


# -- a fault -------------------------------------------------------------------------------------------------


def test_a_circle_across_two_groups() -> None:
    """Two ranks wait for each other in different groups, and nobody notices."""
    fault = watch_of(
        at(0, reduces("tp", PAIR, 5, LONG), reduces("ring", PAIR, 2)),
        at(1, reduces("tp", PAIR, 4), reduces("ring", PAIR, 3, LONG)),
    ).fault()
    assert fault is not None
    assert fault.rank in PAIR
    assert fault.what == (
        "ranks 0, 1 wait for each other: "
        "rank 0: step 3, block layers.2, all_reduce 8 (number 5) of group tp with rank 1, for 3.5 s; "
        "rank 1: step 3, block layers.2, all_reduce 8 (number 3) of group ring with rank 0, for 3.5 s"
    )


def test_a_circle_is_found_while_another_rank_computes() -> None:
    """Whoever a rank waits for besides, and that still computes, hides the one that will never come."""
    world = range(3)
    stuck = [at(0, reduces("world", world, 5, LONG)), at(2, reduces("world", world, 4), reduces("tp", (0, 2), 1, LONG))]
    assert culprit(*stuck, at(1, reduces("world", world, 4))) in (0, 2)


def test_the_one_that_most_wait_for_is_named() -> None:
    """Of a circle, a rank is named that did the same as the others."""
    world = range(4)
    waiting = [at(rank, reduces("world", world, 5, LONG), reduces("replica", world, 1)) for rank in (0, 2, 3)]
    odd = at(1, reduces("world", world, 4), reduces("replica", world, 2, LONG))
    assert culprit(*waiting, odd) == 1


def test_a_circle_of_three() -> None:
    """Only two ranks that wait for each other directly are found."""
    ring = [(0, 1), (1, 2), (0, 2)]
    statuses = [
        at(0, reduces("a", ring[0], 1, LONG), reduces("c", ring[2], 0)),
        at(1, reduces("b", ring[1], 1, LONG), reduces("a", ring[0], 0)),
        at(2, reduces("c", ring[2], 1, LONG), reduces("b", ring[1], 0)),
        at(3, reduces("d", (0, 3), 1, LONG)),
    ]
    fault = watch_of(*statuses).fault()
    assert fault is not None
    assert "ranks 0, 1, 2 wait for each other" in fault.what
    assert culprit(*statuses[:2], replace(statuses[2], groups=(statuses[2].groups[1],)), statuses[3]) is None


def test_who_waits_for_a_circle_is_not_in_it() -> None:
    """A rank that only waits for the stuck ones is told as one of them."""
    circle = [
        at(1, reduces("tp", (1, 2), 5, LONG), reduces("ring", (1, 2), 2)),
        at(2, reduces("tp", (1, 2), 4), reduces("ring", (1, 2), 3, LONG)),
    ]
    fault = watch_of(at(0, reduces("cfg", PAIR, 1, LONG)), *circle).fault()
    assert fault is not None
    assert fault.what.startswith("ranks 1, 2 wait for each other")


def test_a_gather_ahead_for_which_a_rank_will_not_come() -> None:
    """A rank has ended its part without a gather that another one's lane is in: that one never ends."""
    lane = at(0, reduces("weights", PAIR, 7, LONG))
    fault = watch_of(lane, at(1, reduces("weights", PAIR, 6)), ended=[1]).fault()
    assert fault is not None
    assert fault.rank == 1
    assert "in all_reduce 8 (number 7) of group weights, ahead of step 3" in fault.what


def test_most_of_the_group_decide() -> None:
    """A difference is not told before the last rank has come, although most of them agree."""
    five = [at(rank, issued("world", range(5), ["a" if rank else "odd"], 0.1)) for rank in range(4)]
    assert culprit(*five) == 0
    assert culprit(*five[:3]) is None


def test_a_wait_for_weights_is_a_wait() -> None:
    """A rank that waits for a block's bytes is taken to compute."""
    first = at(0, reduces("tp", PAIR, 4), reduces("weights", PAIR, 7, LONG), waits=True)
    second = at(1, reduces("tp", PAIR, 5, LONG), reduces("weights", PAIR, 6))
    assert culprit(first, second) in PAIR


def test_a_rank_that_ended_early() -> None:
    """A rank has handed in its result, the others wait for it for ever."""
    fault = watch_of(
        at(0, reduces("tp", (0, 2), 5, LONG)), at(1), at(2, reduces("tp", (0, 2), 4), step=None), ended=[1, 2]
    ).fault()
    assert fault is not None
    assert fault.rank == 2
    assert fault.what == (
        "it has ended its part, but rank 0 waits for it in "
        "step 3, block layers.2, all_reduce 8 (number 5) of group tp with rank 2, for 3.5 s"
    )
    assert culprit(at(0, reduces("tp", PAIR, 5, PATIENCE_S)), at(1, reduces("tp", PAIR, 4)), ended=[1]) is None


@pytest.mark.parametrize("waiting_s", [None, 0.0])
def test_different_collectives_of_two(waiting_s: float | None) -> None:
    """Of two ranks the larger is named, at once, with both operations, the number, the group and the place."""
    fault = watch_of(
        at(0, issued("tp", PAIR, ["all_reduce 8", "all_gather 4"], waiting_s)),
        at(1, issued("tp", PAIR, ["all_reduce 8", "all_reduce 8"], waiting_s)),
    ).fault()
    assert fault is not None
    assert fault.rank == 1
    start = "it issued all_reduce 8 as number 2 of group tp (ranks (0, 1)), where rank 0 issued all_gather 4; which of "
    assert fault.what.startswith(start + "them is wrong is not known; it is in step 3, block layers.2")


def _placed(whats: Sequence[str], place: str) -> GroupRecord:
    record = issued("tp", range(3), whats, 0.1)
    return replace(record, last=tuple(replace(call, place=place) for call in record.last))


@pytest.mark.parametrize("odd", range(3))
def test_sizes_of_all_ranks(odd: int) -> None:
    """Which collective of which block and step, each rank's size, and which rank is alone with its."""
    whats = ["broadcast 1", "all_reduce torch.float32 100"], ["broadcast 1", "all_reduce torch.float32 107"]
    records = [_placed(whats[rank == odd], f"step {2 + (rank == odd)}, block b") for rank in range(3)]
    fault = watch_of(*(at(rank, record) for rank, record in enumerate(records))).fault()
    assert fault is not None
    assert fault.rank == odd
    others = ", ".join(str(rank) for rank in range(3) if rank != odd)
    assert fault.what.startswith(
        "it issued all_reduce torch.float32 107 as number 2 of group tp (ranks (0, 1, 2)) in step 3, block b, "
        f"where ranks {others} issued all_reduce torch.float32 100 in step 2, block b; it is in step 3"
    )


def test_three_sizes() -> None:
    """Of three that all differ, one is left out."""
    fault = watch_of(*(at(rank, _placed([f"all_reduce {rank}"], "step 1")) for rank in range(3))).fault()
    assert fault is not None
    assert "where rank 0 issued all_reduce 0 and rank 2 issued all_reduce 2; which of them is wrong" in fault.what


@pytest.mark.parametrize("gone", range(3))
def test_a_rank_that_is_gone(gone: int) -> None:
    """What it had issued last is known from another one only, and newer than what it had said itself."""
    old = [at(rank, issued("tp", range(3), ["a"])) for rank in range(3)]
    new = [at(rank, _placed(["a", "odd" if rank == 1 else "b"], "step 1")) for rank in range(3)]
    heard = [replace(status, lost={gone: new[gone].groups}) for status in new if status.rank != gone]
    assert culprit(*old) is None
    assert culprit(*old, *heard) == 1
    assert culprit(*heard) == 1, "it had never been heard"
    assert culprit(*heard, *old[gone : gone + 1]) == 1, "and what is heard later is older"


@pytest.mark.parametrize("odd", range(4))
def test_different_collectives_of_four(odd: int) -> None:
    """Another rank than the one that differs is named: also before the others have come to that number."""
    world = range(4)
    statuses = [at(rank, issued("world", world, ["a", "odd" if rank == odd else "b"], LONG)) for rank in world]
    assert culprit(*statuses) == odd
    hurried = [replace(s, groups=(replace(s.groups[0], waiting_s=0.1),)) for s in statuses]
    one, two, _ = set(world) - {odd}
    assert culprit(hurried[odd], hurried[one]) is None  # one of them, but which?
    assert culprit(statuses[odd], hurried[one]) in {odd, one}
    assert culprit(*hurried) == odd
    assert culprit(*hurried[:odd], *hurried[odd + 1 :], hurried[odd]) == odd
    assert culprit(hurried[odd], hurried[one], hurried[two]) is None


def test_the_earliest_difference_counts() -> None:
    """What is only a consequence of an earlier difference is told."""
    calls = ["a", "b", "c", "d"]
    statuses = {0: at(0, issued("tp", PAIR, calls)), 1: at(1, issued("tp", PAIR, ["a", "c", "d", "e"]))}
    fault = different_collective(statuses)
    assert fault is not None
    assert "issued c as number 2" in fault.what


def test_ring_neighbours() -> None:
    """A ring of hops: the one that stays out is found from ranks that are not its neighbours."""
    ring = range(4)
    hops = [issued("ring", ring, ["pass_on 8"] * count, LONG) for count in (3, 3, 2, 3)]
    others = [reduces("tp", (rank - rank % 2, rank - rank % 2 + 1), 2) for rank in ring]
    statuses = [at(rank, hops[rank], others[rank]) for rank in ring]
    assert culprit(*statuses, ended=[2]) == 2
    computing = at(2, replace(hops[2], waiting_s=None), others[2])
    assert culprit(*statuses[:2], computing, statuses[3]) is None
    away = at(2, replace(hops[2], waiting_s=None), reduces("tp", (2, 3), 3, LONG))
    assert culprit(*statuses[:2], away, statuses[3]) == 2


# -- texts ---------------------------------------------------------------------------------------------------


def test_last_seen() -> None:
    """A message about a lost rank does not say where it was, or who waits for it."""
    watch = watch_of(
        at(0, reduces("tp", PAIR, 5, 4.0)),
        replace(at(1, reduces("tp", PAIR, 4)), waits=True),
        at(2, reduces("tp", (2, 3), 5, 4.0)),
        at(3, reduces("replica", range(4), 5, 1.0)),
        ended=[3],
    )
    assert watch.last_seen(1) == (
        "last seen in step 3, block layers.2, waiting for its bytes; "
        "rank 0 waits for it in step 3, block layers.2, all_reduce 8 (number 5) of group tp with rank 1, for 4.0 s"
    )
    assert watch.last_seen(4) == ""


def test_status_texts() -> None:
    """A status tells a block outside the loop, or not the phase there, or nothing of whom it waits for."""
    assert str(RankStatus(0, "host", 1, "load")) == "load"
    assert str(at(0, step=None)) == "denoise"
    assert str(RankStatus(0, "host", 1, "encode", block="layers.1")) == "encode"
    gather = reduces("weights", (0, 2, 3), 2, 1.25)
    assert str(at(0, gather)) == "step 3, block layers.2"
    expected = "step 3, block layers.2, all_reduce 8 (number 2) of group weights with ranks 2, 3, for 1.2 s"
    assert str(at(0, gather, waits=True)) == expected
    assert "a collective of group" in str(at(0, replace(gather, last=()), waits=True))
    assert ranks_text([4]) == "rank 4"
    assert ranks_text([0, 2]) == "ranks 0, 2"


# -- what explains the others --------------------------------------------------------------------------------

KINDS: tuple[FaultKind, ...] = ("died", "stopped", "memory", "raised", "collectives", "silent", "cut off")


@pytest.mark.parametrize("worse", range(len(KINDS) - 1))
def test_first_cause_of_two(worse: int) -> None:
    """A rank that was cut off is told in place of the one that died, or the smaller rank in place of the cause."""
    cause, other = RankError(3, "cause", KINDS[worse]), RankError(0, "other", KINDS[worse + 1])
    assert first_cause({0: other, 3: cause}) is cause
    assert first_cause({3: cause, 0: other}) is cause
    same = RankError(1, "same", KINDS[worse])
    assert first_cause({3: cause, 1: same}) is same


def test_first_cause_of_other_errors() -> None:
    """What the user has to act on is hidden by a rank's end; or a fault by an agreed stop, and the gang is kept."""
    wrong, died = CheckpointError("truncated"), RankError(0, "died", "died")
    stopped = RequestCancelled("asked", 3)
    assert first_cause({0: RankError(0, "x", "raised"), 1: wrong}) is wrong
    for error in (died, RankError(1, "x", "cut off"), wrong):
        assert first_cause({0: stopped, 1: error}) is error
    assert first_cause({1: stopped, 0: RequestTimeout("late", 3)}).args == ("late", 3)


def test_is_conclusive() -> None:
    """The wait for the other ranks ends before one that explains it has spoken, or goes on when one has."""
    assert [kind for kind in KINDS if not is_conclusive(RankError(0, "x", kind))] == ["cut off"]
    assert is_conclusive(CheckpointError("truncated"))
    assert not is_conclusive(RequestCancelled("asked", 3))
    assert not is_conclusive(RequestTimeout("late", 3))


WAITS = at(1, reduces("tp", PAIR, 5, 0.5))
GATHERS = at(1, reduces("weights", PAIR, 5, 0.5))
LOADS = replace(GATHERS, phase="rehearsal", step=None)


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (WAITS, RuntimeError("connection closed by peer"), "cut off"),
        (WAITS, TimeoutError("a copy did not finish"), "cut off"),
        (WAITS, torch.OutOfMemoryError("none left"), "memory"),
        (WAITS, ValueError("shape"), "raised"),
        (at(1), RuntimeError("shape"), "raised"),
        (GATHERS, RuntimeError("shape"), "raised"),
        (replace(GATHERS, waits=True), RuntimeError("connection closed by peer"), "cut off"),
        (LOADS, RuntimeError("connection closed by peer"), "cut off"),
        (replace(LOADS, phase="decode"), RuntimeError("shape"), "raised"),
        (at(1, step=None), RuntimeError("shape"), "raised"),
        (replace(at(1, step=None), phase="connect"), RuntimeError("connection closed by peer"), "cut off"),
        (replace(at(1, reduces("world", PAIR, 2, 0.1), step=None), phase="load"), RuntimeError("closed"), "cut off"),
        (replace(at(1, reduces("world", PAIR, 2), step=None), phase="load"), RuntimeError("shape"), "raised"),
    ],
)
def test_rank_error(status: RankStatus, error: Exception, kind: str) -> None:
    """A rank's own mistake passes for the loss of another rank, or the other way round."""
    found = rank_error(status, error)
    assert isinstance(found, RankError)
    assert (found.rank, found.kind) == (1, kind)
    assert str(error) in found.message
    assert str(status) in found.message
    own = CheckpointError("truncated")
    assert rank_error(status, own) is own


# -- a small program in random order -------------------------------------------------------------------------

SHAPES = (
    MeshShape(tp=2),
    MeshShape(ulysses=2, ring=2, hsdp_shard=2),
    MeshShape(tp=2, ulysses=2, hsdp_shard=2),
    MeshShape(dp=2, tp=2, hsdp_shard=2),
    MeshShape(ring=3, tp=2, hsdp_shard=3),
    MeshShape(ulysses=4, hsdp_shard=4),
)


@dataclass(frozen=True)
class Op:
    """One place of the program: a collective of `group` ("" computes), which the lane or the computing thread issues.

    A lane's op lets the computing thread go on; with `joins` that waits until the lane's op number `joins` is done.
    """

    group: str
    what: str = ""
    joins: int | None = None


@dataclass
class Simulated:
    """A rank. `place` is its computing thread's in `program`; `lane` what its gather lane was given and did not do."""

    rank: int
    ranks: dict[str, tuple[int, ...]]
    program: list[Op]
    place: int = 0
    lane: list[str] = field(default_factory=list)
    lane_done: int = 0
    log: dict[str, list[str]] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.place == len(self.program) and not self.lane

    def waits(self) -> bool:
        joins = self.program[self.place].joins if self.place < len(self.program) else None
        return joins is not None and self.lane_done < joins

    def status(self, now_s: float) -> RankStatus:
        groups = tuple(
            issued(name, self.ranks[name], log, now_s - self.since[name] if name in self.since else None)
            for name, log in self.log.items()
        )
        return RankStatus(self.rank, "host", 1, "denoise", step=1, block="b", waits=self.waits(), groups=groups)


class Gang:
    """All ranks; `advance` lets one do the next thing that it can do."""

    def __init__(self, ranks: list[Simulated]) -> None:
        self.ranks = ranks
        self.now_s = 0.0
        self.moved = False

    def advance(self, rank: Simulated, on_lane: bool) -> bool:
        """Whether anything moved."""
        return self._lane(rank) if on_lane else self._compute(rank)

    def _compute(self, rank: Simulated) -> bool:
        if rank.place == len(rank.program) or rank.waits():
            return False
        op = rank.program[rank.place]
        if op.group == "weights":
            rank.lane.append(op.what)
        elif op.group and not self._issue(rank, op.group, op.what):
            return False
        rank.place += 1
        return True

    def _lane(self, rank: Simulated) -> bool:
        if not rank.lane or not self._issue(rank, "weights", rank.lane[0]):
            return False
        rank.lane.pop(0)
        rank.lane_done += 1
        return True

    def _issue(self, rank: Simulated, name: str, what: str) -> bool:
        """Begin the collective; over as soon as all have begun it."""
        log = rank.log.setdefault(name, [])
        if name not in rank.since:
            log.append(what)
            rank.since[name] = self.now_s
            self.moved = True
        if any(len(self.ranks[other].log.get(name, ())) < len(log) for other in rank.ranks[name]):
            return False
        del rank.since[name]
        return True


def random_program(chance: random.Random, names: Sequence[str]) -> list[Op]:
    """The same on all ranks. Gathers are joined in order, some of them late."""
    program: list[Op] = []
    gathers = 0
    for _ in range(chance.randint(4, 14)):
        name = chance.choice(["", *names])
        gathers += name == "weights"
        program.append(Op(name, f"{chance.choice(('all_reduce', 'all_gather'))} {chance.randint(1, 3)}"))
        if gathers and chance.random() < 0.3:
            program.append(Op("", joins=chance.randint(1, gathers)))
    return [*program, Op("", joins=gathers), Op("world", "all_gather 4")]


def gang_of(shape: MeshShape, programs: Callable[[int], list[Op]]) -> Gang:
    world = tuple(range(shape.world_size))
    return Gang([Simulated(rank, {**shape.groups(rank), "world": world}, programs(rank)) for rank in world])


def run(gang: Gang, chance: random.Random, watch: Watch) -> Iterator[None]:
    """Random ranks advance, random ones are heard, at random times; after each that, the watch may be asked."""
    late: list[RankStatus] = []
    idle = 0
    while idle < 40 * len(gang.ranks):
        moving = chance.choice(gang.ranks)
        gang.now_s += chance.choice((0.0, 0.01, 1.0, 10.0))
        gang.moved = False
        idle = 0 if gang.advance(moving, chance.random() < 0.5) or gang.moved else idle + 1
        if chance.random() < 0.4:
            late.append(chance.choice(gang.ranks).status(gang.now_s))
        # an answer may be on its way for long, but those of one rank come in order
        if late and chance.random() < 0.4:
            status = late.pop(0)
            if status.rank not in watch.ended:
                watch.hear(status)
                yield
        for rank in gang.ranks:
            if rank.ended and rank.rank not in watch.ended and chance.random() < 0.3:
                watch.hear(rank.status(gang.now_s))
                watch.end(rank.rank)
                yield


@not_quick
@pytest.mark.parametrize("shape", every(SHAPES, 2), ids=str)
def test_no_false_alarm_in_any_order(shape: MeshShape) -> None:
    """A correct program is stopped because of how its ranks happened to run, or when they were heard."""
    names = [name for name, ranks in shape.groups(0).items() if len(ranks) > 1]
    for seed in range(how_many(100, 150, 400)):
        chance = random.Random(seed)
        program = random_program(chance, names)
        watch = Watch()
        gang = gang_of(shape, lambda _, program=program: list(program))  # type: ignore[misc]
        for _ in run(gang, chance, watch):
            assert watch.fault() is None, f"seed {seed}"
        assert all(rank.ended for rank in gang.ranks), f"seed {seed}: the simulation itself hangs"


def _skip(program: list[Op], at: int) -> list[Op]:
    """With a gather goes the wait for it."""
    gather = program[at].group == "weights"
    rest = [replace(op, joins=op.joins - gather) if op.joins else op for op in program[at + 1 :]]
    return program[:at] + rest


def _double(program: list[Op], at: int) -> list[Op]:
    return program[: at + 1] + program[at:]


def _stop(program: list[Op], at: int) -> list[Op]:
    return program[:at]


def _resize(program: list[Op], at: int) -> list[Op]:
    return [*program[:at], replace(program[at], what="all_reduce 99"), *program[at + 1 :]]


def _swap(program: list[Op], at: int) -> list[Op]:
    """With the next one of the same group; as it is where there is none that differs."""
    op = program[at]
    for other in range(at + 1, len(program)):
        if program[other].group == op.group and program[other].what != op.what:
            swapped = list(program)
            swapped[at], swapped[other] = swapped[other], swapped[at]
            return swapped
    return program


@pytest.mark.parametrize(
    ("shape", "plant"),
    every(itertools.product(SHAPES, [_skip, _double, _stop, _resize, _swap]), 4),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_planted_fault_is_found(shape: MeshShape, plant: Callable[[list[Op], int], list[Op]]) -> None:
    """One rank leaves the program, nothing moves any more, and no rank or one that has no part in it is blamed."""
    names = [name for name, ranks in shape.groups(0).items() if len(ranks) > 1]
    found = named = 0
    for seed in range(60):
        chance = random.Random(seed)
        program = random_program(chance, names)
        bad = chance.randrange(shape.world_size)
        place = chance.choice([place for place, op in enumerate(program) if op.group])
        broken = plant(program, place)
        watch, fault = Watch(), None
        gang = gang_of(shape, lambda rank: broken if rank == bad else program)  # noqa: B023
        for _ in run(gang, chance, watch):
            if (fault := watch.fault()) is not None:
                break
        stuck = not all(rank.ended for rank in gang.ranks)
        if fault is None and stuck:
            gang.now_s += LONG
            for rank in gang.ranks:
                watch.hear(rank.status(gang.now_s))
            fault = watch.fault()
        assert (fault is not None) >= (stuck or plant is _resize), f"seed {seed}"
        if fault is not None:
            found += 1
            named += fault.rank == bad
            involved = fault.what.split(": ")[0] if "wait for each other" in fault.what else fault.what
            assert fault.rank == bad or str(bad) in involved.replace(",", "").replace(")", "").split(), f"seed {seed}"
    assert found > (8 if plant is _swap else 40)
    assert named > found / 3
    print(f"{plant.__name__}: found {found} of 60, the rank itself {named}")
