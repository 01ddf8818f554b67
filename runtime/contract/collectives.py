"""same-collectives: every rank of a group issued the same collectives in the same order with the same sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

from crossdock.offload.stream.trace import TraceEvent
from crossdock.parallel.group import GroupRecord
from crossdock.runtime.contract.result import Violation, to_compare
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
    """Compared with most ranks of the group, or with each other; of blocks, also which one every gather was for."""
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
        issued = {rank: (records[rank].issued, records[rank].digest) for rank in sorted(records)}
        for rank, other in to_compare(issued).items():
            wanted, found_there = _difference(records[other], records[rank])
            where = f"group {name} of ranks {ranks}"
            yield Violation(_CHECK, rank, where, f"{wanted}, as on rank {other}", found_there, _REMEDY)
        if name == "weights" and len(set(issued.values())) == 1:
            yield from _same_gathers([by_rank[rank] for rank in issued])


def _difference(first: GroupRecord, other: GroupRecord) -> tuple[str, str]:
    """The first collective, of those still known, in which two ranks of a group differ, which they do."""
    theirs = {call.number: call.what for call in other.last}
    for call in first.last:
        if call.number in theirs and theirs[call.number] != call.what:
            return str(call), f"{theirs[call.number]} (number {call.number})"
    if first.issued != other.issued:
        return f"{first.issued} collectives", f"{other.issued}"
    return f"the same {first.issued} collectives", f"others, before the last {len(other.last)}"


def _same_gathers(reports: Sequence[Issued]) -> Iterator[Violation]:
    """Blocks of one size could be gathered in different orders: the sizes would not tell."""
    gathered = {report.rank: blocks for report in reports if (blocks := _gathered(report))}
    known = min(map(len, gathered.values()), default=0)
    latest = {rank: tuple(blocks[-known:]) for rank, blocks in gathered.items()}
    for rank, other in to_compare(latest).items() if latest else ():
        block, found = next(pair for pair in zip(latest[other], latest[rank], strict=True) if pair[0] != pair[1])
        expected = f"gathered at the same time as on rank {other}"
        yield Violation(_CHECK, rank, block, expected, f"{found} was gathered instead", _REMEDY)


def _gathered(report: Issued) -> list[str]:
    return [event.block for event in report.trace if event.kind == "gather_begin"]
