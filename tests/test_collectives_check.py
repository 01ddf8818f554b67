"""same-collectives, judged on records made by hand."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import cast

import pytest

from crossdock.offload.stream.trace import TraceEvent
from crossdock.parallel.group import KEPT, Collective, GroupRecord
from crossdock.parallel.mesh import MeshShape
from crossdock.runtime.contract.collectives import same_collectives
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.model_layout import ModelLayout

MESHES = {
    "tp2": MeshShape(tp=2),
    "ulysses2_ring2": MeshShape(ulysses=2, ring=2),
    "hsdp2 x tp2": MeshShape(dp=2, tp=2, hsdp_shard=2),
    "dp2": MeshShape(dp=2),
    "hsdp4": MeshShape(dp=4, hsdp_shard=4),
    "ulysses2 x tp2": MeshShape(ulysses=2, tp=2),
}
BLOCKS = ("a", "b", "c", "d")
WHATS = ("all_reduce 8", "all_gather 4", "all_reduce 2", "broadcast 1")
CHECK = "same-collectives"


@dataclass(frozen=True)
class Report:
    rank: int
    collectives: tuple[GroupRecord, ...]
    trace: tuple[TraceEvent, ...]


def record(name: str, ranks: Sequence[int], whats: Sequence[str]) -> GroupRecord:
    digest = 0
    for what in whats:
        digest = zlib.crc32(what.encode(), digest)
    calls = tuple(Collective(number, what) for number, what in enumerate(whats, 1))
    return GroupRecord(name, tuple(ranks), len(calls), digest, calls[-KEPT:], None)


def trace(blocks: Sequence[str], shift: int = 0) -> tuple[TraceEvent, ...]:
    """Gathers of `blocks`; `shift` events of the copy lane come between."""
    events = [("load_begin", "x")] * shift
    for block in blocks:
        ahead = [("load_begin", "y")] * (shift + 1)
        events += [("gather_begin", block), *ahead, ("gather_end", block)]
    return tuple(TraceEvent(number, kind, block, 0) for number, (kind, block) in enumerate(events))  # type: ignore[arg-type]


def healthy(shape: MeshShape, whats: Sequence[str] = WHATS) -> dict[int, Report]:
    """Of every rank; replicas have had different prompts, so their groups differ from each other's."""
    reports = {}
    for rank in range(shape.world_size):
        groups = {name: ranks for name, ranks in shape.groups(rank).items() if len(ranks) > 1}
        records = [
            record(name, ranks, [*whats, f"{name} {'' if name == 'weights' else ranks}"])
            for name, ranks in groups.items()
        ]
        reports[rank] = Report(rank, tuple(records), trace(BLOCKS, shift=rank))
    return reports


def judged(shape: MeshShape, reports: dict[int, Report]) -> list[Violation]:
    layout = cast(ModelLayout, SimpleNamespace(mesh=shape))
    return list(same_collectives(layout, list(reports.values())))


def with_record(report: Report, name: str, changed: GroupRecord | None) -> Report:
    """`changed` in the place of the record of group `name`."""
    records = [changed if each.name == name else each for each in report.collectives]
    assert any(each.name == name for each in report.collectives)
    return replace(report, collectives=tuple(each for each in records if each is not None))


CASES = [(mesh, name) for mesh, shape in MESHES.items() for name, ranks in shape.groups(0).items() if len(ranks) > 1]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("calls", [0, 4, 200])
def test_no_false_alarm(mesh: str, calls: int) -> None:
    """Ranks that did the same are told apart: other replicas' groups, events of other lanes, records of long runs."""
    shape = MESHES[mesh]
    reports = healthy(shape, [WHATS[number % 4] for number in range(calls)])
    assert judged(shape, reports) == []
    assert judged(shape, dict(reversed(reports.items()))) == []


def test_a_trace_that_begins_later() -> None:
    """Traces are cut by their number of events, so one may begin with a gather that another one has lost."""
    shape = MESHES["hsdp4"]
    reports = healthy(shape)
    reports[2] = replace(reports[2], trace=trace(BLOCKS[1:]))
    reports[3] = replace(reports[3], trace=())
    assert judged(shape, reports) == []


Change = Callable[[list[str]], list[str]]
CHANGES: dict[str, tuple[Change, str, str]] = {
    "skipped": (lambda w: [w[0], *w[2:]], "all_gather 4 (number 2)", "all_reduce 2 (number 2)"),
    "doubled": (lambda w: [*w[:2], w[1], *w[2:]], "all_reduce 2 (number 3)", "all_gather 4 (number 3)"),
    "reordered": (lambda w: [w[0], w[2], w[1], *w[3:]], "all_gather 4 (number 2)", "all_reduce 2 (number 2)"),
    "other size": (lambda w: [*w[:2], "all_reduce 3", *w[3:]], "all_reduce 2 (number 3)", "all_reduce 3 (number 3)"),
    "last one skipped": (lambda w: w[:-1], "5 collectives", "4"),
    "one more at the end": (lambda w: [*w, "all_reduce 1"], "5 collectives", "6"),
    "none at all": (lambda w: [], "5 collectives", "0"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_another_sequence(mesh: str, name: str, change: str) -> None:
    """A difference is not found, or told without rank, group, what was expected and what was found."""
    shape = MESHES[mesh]
    reports = healthy(shape)
    changed, expected, found = CHANGES[change]
    ranks = shape.groups(0)[name]
    bad = ranks[1]
    whats = [call.what for each in reports[bad].collectives if each.name == name for call in each.last]
    reports[bad] = with_record(reports[bad], name, record(name, ranks, changed(whats)))
    *other, violation = judged(shape, reports)
    assert [v.rank for v in other] == ([0] if len(ranks) == 2 else []), "of two, it is not known which is wrong"
    assert (violation.check, violation.rank, violation.where) == (CHECK, bad, f"group {name} of ranks {ranks}")
    assert violation.expected == f"{expected}, as on rank 0"
    assert violation.found == found


@pytest.mark.parametrize("bad", range(4))
def test_the_odd_one_is_named(bad: int) -> None:
    """The first rank, which others could be compared with, is right; or one of the others, where it is wrong."""
    shape = MESHES["hsdp4"]
    reports = healthy(shape)
    ranks = (0, 1, 2, 3)
    reports[bad] = with_record(reports[bad], "weights", record("weights", ranks, WHATS))
    (violation,) = judged(shape, reports)
    assert (violation.rank, violation.found) == (bad, "4")
    assert violation.expected == f"5 collectives, as on rank {int(bad == 0)}"
    reports = healthy(shape)
    reports[bad] = replace(reports[bad], trace=trace(("a", "c", "b", "d")))
    (violation,) = judged(shape, reports)
    assert (violation.rank, violation.where, violation.found) == (bad, "b", "c was gathered instead")


def test_a_difference_that_is_not_kept() -> None:
    """Only the last 64 collectives are compared, or the difference is told of one of them."""
    shape = MESHES["tp2"]
    whats = [WHATS[number % 4] for number in range(200)]
    reports = healthy(shape, whats)
    whats[3], whats[4] = whats[4], whats[3]
    reports[1] = with_record(reports[1], "tp", record("tp", (0, 1), [*whats, "tp (0, 1)"]))
    other, violation = judged(shape, reports)
    assert (other.rank, other.expected) == (0, "the same 201 collectives, as on rank 1")
    assert (violation.rank, violation.where) == (1, "group tp of ranks (0, 1)")
    assert violation.expected == "the same 201 collectives, as on rank 0"
    assert violation.found == "others, before the last 64"


def test_far_apart() -> None:
    """Two ranks of which no collective of one number is kept are taken to agree."""
    shape = MESHES["tp2"]
    reports = healthy(shape, ["all_reduce 8"] * 200)
    reports[1] = with_record(reports[1], "tp", record("tp", (0, 1), ["all_reduce 8"] * 20))
    other, violation = judged(shape, reports)
    assert (other.rank, other.expected, other.found) == (0, "20 collectives, as on rank 1", "201")
    assert (violation.rank, violation.expected, violation.found) == (1, "201 collectives, as on rank 0", "20")


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_a_group_is_missing(mesh: str, name: str) -> None:
    """A rank that has no such group, or does not report it, passes."""
    shape = MESHES[mesh]
    reports = healthy(shape)
    reports[1] = with_record(reports[1], name, None) if 1 in shape.groups(0)[name] else reports[1]
    bad = shape.groups(0)[name][1]
    if bad != 1:
        reports[bad] = with_record(reports[bad], name, None)
    ranks = shape.groups(bad)[name]
    found = [(v.check, v.rank, v.where, v.expected, v.found) for v in judged(shape, reports)]
    assert found == [(CHECK, bad, f"group {name}", f"of ranks {ranks}", "none")]


@pytest.mark.parametrize("wrong", [(0, 1), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("bad", [2, 3])
def test_a_wrong_group(bad: int, wrong: tuple[int, ...]) -> None:
    """A rank talks to others than the mesh says: also where it says the very same as that group's ranks."""
    shape = MESHES["ulysses2 x tp2"]
    reports = healthy(shape)
    right = shape.groups(bad)["ulysses"]
    reports[bad] = with_record(reports[bad], "ulysses", record("ulysses", wrong, [*WHATS, f"ulysses {wrong}"]))
    (violation,) = judged(shape, reports)
    assert (violation.rank, violation.where) == (bad, "group ulysses")
    assert (violation.expected, violation.found) == (f"of ranks {right}", f"of ranks {wrong}")


def test_a_member_too_many() -> None:
    """A rank that is in a group in which it has no part is compared with it as if it belonged there."""
    shape = MESHES["ulysses2 x tp2"]
    reports = healthy(shape)
    tp = next(each for each in reports[0].collectives if each.name == "tp")
    reports[3] = with_record(reports[3], "tp", tp)
    (violation,) = judged(shape, reports)
    assert (violation.rank, violation.expected, violation.found) == (3, "of ranks (2, 3)", "of ranks (0, 1)")


@pytest.mark.parametrize("mesh", ["hsdp2 x tp2", "hsdp4"])
def test_gathers_of_equal_size_in_another_order(mesh: str) -> None:
    """Blocks of one size are gathered in different orders: every rank computes with a mixture of both."""
    shape = MESHES[mesh]
    reports = healthy(shape)
    bad = shape.groups(0)["weights"][1]
    reports[bad] = replace(reports[bad], trace=trace(("a", "c", "b", "d")))
    *other, violation = judged(shape, reports)
    assert [v.rank for v in other] == ([0] if mesh == "hsdp2 x tp2" else [])
    assert (violation.check, violation.rank, violation.where) == (CHECK, bad, "b")
    assert violation.expected == "gathered at the same time as on rank 0"
    assert violation.found == "c was gathered instead"
    assert "b" in str(violation)


def test_gathers_without_a_shard_group() -> None:
    """Replicas that share no weights are compared by their traces."""
    shape = MESHES["dp2"]
    reports = healthy(shape)
    reports[1] = replace(reports[1], trace=trace(("d", "c")))
    assert judged(shape, reports) == []
