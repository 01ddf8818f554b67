"""same-collectives: every rank of a group issued the same collectives in the same order with the same sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

from crossdock.offload.stream.trace import TraceEvent
from crossdock.parallel.group import GroupRecord
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.model_layout import ModelLayout

_CHECK = "same-collectives"
_REMEDY = "a hook or a branch runs on some ranks only: remove it, or let it run on all"


class Issued(Protocol):
    """What a rank reports of its collectives: before the first step, or after a request."""

    @property
    def rank(self) -> int: ...

    @property
    def collectives(self) -> tuple[GroupRecord, ...]: ...

    @property
    def trace(self) -> tuple[TraceEvent, ...]: ...


def same_collectives(layout: ModelLayout, reports: Sequence[Issued]) -> Iterator[Violation]:
    """Compared with the first rank of the group; of blocks, also which one every gather was for."""
    members: dict[tuple[str, tuple[int, ...]], dict[int, GroupRecord]] = defaultdict(dict)
    for report in reports:
        found = {record.name: record for record in report.collectives}
        for name, ranks in layout.mesh.groups(report.rank).items():
            if len(ranks) > 1 and name not in found:
                yield Violation(_CHECK, report.rank, f"group {name}", f"of ranks {ranks}", "none", _REMEDY)
        for record in report.collectives:
            if (expected := layout.mesh.groups(report.rank).get(record.name)) != record.ranks:
                where = f"group {record.name}"
                yield Violation(_CHECK, report.rank, where, f"of ranks {expected}", f"of ranks {record.ranks}", _REMEDY)
            else:
                members[record.name, record.ranks][report.rank] = record
    by_rank = {report.rank: report for report in reports}
    for (name, ranks), records in members.items():
        first, *others = sorted(records)
        for other in others:
            difference = _difference(records[first], records[other])
            if difference is not None:
                wanted, found_there = difference
                where = f"group {name} of ranks {ranks}"
                yield Violation(_CHECK, other, where, f"{wanted}, as on rank {first}", found_there, _REMEDY)
            elif name == "weights":
                yield from _same_gathers(by_rank[first], by_rank[other])


def _difference(first: GroupRecord, other: GroupRecord) -> tuple[str, str] | None:
    """The first collective, of those still known, in which two ranks of a group differ."""
    if (first.issued, first.digest) == (other.issued, other.digest):
        return None
    theirs = {call.number: call.what for call in other.last}
    for call in first.last:
        if call.number in theirs and theirs[call.number] != call.what:
            return str(call), f"{theirs[call.number]} (number {call.number})"
    if first.issued != other.issued:
        return f"{first.issued} collectives", f"{other.issued}"
    return f"the same {first.issued} collectives", f"others, before the last {len(other.last)}"


def _same_gathers(first: Issued, other: Issued) -> Iterator[Violation]:
    """Blocks of one size could be gathered in different orders: the sizes would not tell."""
    ours, theirs = _gathered(first), _gathered(other)
    known = min(len(ours), len(theirs))
    for block, found in zip(ours[len(ours) - known :], theirs[len(theirs) - known :], strict=True):
        if block != found:
            expected = f"gathered at the same time as on rank {first.rank}"
            yield Violation(_CHECK, other.rank, block, expected, f"{found} was gathered instead", _REMEDY)
            return


def _gathered(report: Issued) -> list[str]:
    return [event.block for event in report.trace if event.kind == "gather_begin"]
