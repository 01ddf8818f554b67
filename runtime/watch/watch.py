"""The watch over a gang while it works: from what the ranks say they are doing to which of them is at fault.

Pure: statuses and times go in, a verdict comes out. Two ranks of a group that issued different collectives are at fault
at once; ranks that wait for each other, or for one that has ended its part, after `patience_s`. A rank that computes
for long is not: nobody knows how long a block takes. It is only named (`awaited`), until the others' collectives run
into their time limit; then it is to blame, and not who was cut off first.

Statuses may be of different ages. A rank waits for another that has issued fewer collectives of the group: where all
run the same program, that one was at an earlier place of it. So ranks can only seem to wait for each other when one of
them left the program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from crossdock.parallel.group import Collective, GroupRecord
from crossdock.runtime.errors import CrossdockError, RankError
from crossdock.runtime.reports.status import RankStatus, ranks_text

PATIENCE_S = 2.5
SUSPECT_S = 1.5
"""A rank that was not heard for so long is looked at: is its process stopped?"""
SILENT_S = 120.0
"""A rank that was not heard for so long is given up, although its process seems to run."""
EXPLAIN_S = 3.0
"""How long after a rank was cut off another one may take to show that it is the cause."""


@dataclass(frozen=True)
class Fault:
    """`rank` is where to look; `what` says what it did, and what the others wait for."""

    rank: int
    what: str


class Watch:
    """What was heard of the ranks in one call."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.statuses: dict[int, RankStatus] = {}
        self.ended: set[int] = set()
        self._patience_s = patience_s
        self._lost: dict[int, tuple[GroupRecord, ...]] = {}

    def hear(self, status: RankStatus) -> None:
        """With what is known of ranks that are gone; what they had said before was older."""
        self.statuses[status.rank] = status
        self._lost |= status.lost
        for rank, groups in self._lost.items():
            known = self.statuses.get(rank, RankStatus(rank, status.host, 0, "lost"))
            others = tuple(group for group in known.groups if _group(groups, group) is None)
            self.statuses[rank] = replace(known, groups=(*others, *groups))

    def end(self, rank: int) -> None:
        """The rank has handed in its result, and was heard since: what it has issued by then is all it will issue."""
        self.ended.add(rank)

    def fault(self) -> Fault | None:
        """What can be told from the collectives."""
        return different_collective(self.statuses) or self._stuck()

    def awaited(self) -> Fault | None:
        """A rank that another one has waited for longer than `patience_s`, and that computes: it is slow, or hangs."""
        waits = {rank: status.waiting for rank, status in self.statuses.items() if rank not in self.ended}
        for rank, group in sorted(waits.items()):
            if any(_under_way([group], self._patience_s)) and (other := self._holds_up(rank)) is not None:
                return Fault(other, self.last_seen(other))
        return None

    def explain(self, error: CrossdockError) -> CrossdockError:
        """With where the rank was, and what the others wait for; what is told of collectives says so itself."""
        if not isinstance(error, RankError) or error.kind == "collectives":
            return error
        if error.kind == "cut off" and (other := self._holds_up(error.rank)) is not None:
            return RankError(other, f"it does not go on; {self.last_seen(other)}", "hangs")
        seen = self.last_seen(error.rank)
        return RankError(error.rank, f"{error.message}; {seen}" if seen else error.message, error.kind)

    def last_seen(self, rank: int) -> str:
        """Where a rank was, and what the others wait for: the end of a message about it."""
        parts = []
        if (status := self.statuses.get(rank)) is not None:
            parts.append(f"last seen in {status}")
        for other in sorted(self.statuses.keys() - self.ended - {rank}):
            group = self.statuses[other].waiting
            if group is not None and rank in group.ranks:
                parts.append(f"rank {other} waits for it in {self.statuses[other]}")
        return "; ".join(parts)

    def _stuck(self) -> Fault | None:
        present = {rank: status for rank, status in sorted(self.statuses.items()) if rank not in self.ended}
        for rank, status in present.items():
            for group in _under_way(status.groups, self._patience_s):
                for other in self.ended.intersection(self._missing(group)):
                    ahead = "" if group == status.waiting else f"{group.last[-1]} of group {group.name}, ahead of "
                    return Fault(other, f"it has ended its part, but rank {rank} waits for it in {ahead}{status}")
        missing = {
            rank: self._missing(stuck)
            for rank, status in present.items()
            if (stuck := next(_under_way([status.waiting], self._patience_s), None)) is not None
        }
        if not (circle := _circle(missing)):
            return None  # whoever is waited for computes, or all have come
        waited_for = [other for others in missing.values() for other in others]
        culprit = max(circle, key=lambda rank: (waited_for.count(rank), rank))
        places = [f"rank {rank}: {self.statuses[rank]}" for rank in circle]
        return Fault(culprit, f"{ranks_text(sorted(circle))} wait for each other: " + "; ".join(places))

    def _holds_up(self, rank: int) -> int | None:
        """Whom `rank` waits for, through others that wait themselves; None: nobody, a circle, or one that has ended."""
        path = [rank]
        while (status := self.statuses.get(path[-1])) is not None:
            missing = self._missing(status.waiting) if status.waiting is not None else []
            if not missing:
                break
            if missing[0] in path:
                return None
            path.append(missing[0])
        known = path[-1] in self.statuses and path[-1] not in self.ended
        return path[-1] if len(path) > 1 and known else None

    def _missing(self, group: GroupRecord) -> list[int]:
        """Who has not come to the latest collective of `group`."""
        return [rank for rank in group.ranks if self._issued(rank, group) < group.issued]

    def _issued(self, rank: int, group: GroupRecord) -> int:
        status = self.statuses.get(rank)
        record = _group(status.groups, group) if status else None
        return record.issued if record else 0


def different_collective(statuses: Mapping[int, RankStatus], patience_s: float = PATIENCE_S) -> Fault | None:
    """Ranks of a group whose collectives of one number differ. What most of them issued is taken to be right; without
    a majority, that is said. Before that is known, `patience_s` are waited for the others.
    """
    seen: dict[tuple[str, tuple[int, ...], int], dict[int, Collective]] = {}
    for rank in sorted(statuses):
        for group in statuses[rank].groups:
            for call in group.last:
                seen.setdefault((group.name, group.ranks, call.number), {})[rank] = call
    for (name, ranks, number), calls in sorted(seen.items(), key=lambda item: item[0][2]):
        if len({call.what for call in calls.values()}) > 1:
            choices = Counter(call.what for call in calls.values())
            (_, count), (other, _) = choices.most_common(2)
            known = 2 * count > len(ranks) or len(calls) == len(ranks)
            if not known and not any(_under_way((statuses[rank].waiting for rank in calls), patience_s)):
                continue
            odd = next(rank for rank, call in calls.items() if call.what == other)
            told = f"it issued {other} as number {number} of group {name} (ranks {ranks}){_where(calls[odd])}, where "
            told += " and ".join(_issued_by(calls, what, calls[odd]) for what in choices if what != other)
            unsure = "" if 2 * count > len(calls) else "; which of them is wrong is not known"
            return Fault(odd, f"{told}{unsure}; it is in {statuses[odd]}")
    return None


def _issued_by(calls: Mapping[int, Collective], what: str, odd: Collective) -> str:
    """Who issued it, and where, unless that is where the odd one was."""
    ranks = [rank for rank, call in calls.items() if call.what == what]
    place = _where(calls[ranks[0]]) if calls[ranks[0]].place != odd.place else ""
    return f"{ranks_text(ranks)} issued {what}{place}"


def _where(call: Collective) -> str:
    return f" in {call.place}" if call.place else ""


def _under_way(groups: Iterable[GroupRecord | None], patience_s: float) -> Iterator[GroupRecord]:
    """Groups whose latest collective has been under way for longer than that."""
    return (group for group in groups if group is not None and (group.waiting_s or 0) > patience_s)


def _circle(missing: Mapping[int, Sequence[int]]) -> list[int]:
    """Ranks each of which waits for the next one, and the last for the first; empty when there are none."""
    left: set[int] = set()

    def walk(rank: int, path: list[int]) -> list[int]:
        if rank in path:
            return path[path.index(rank) :]
        if rank in left:
            return []
        found = next(filter(None, (walk(other, [*path, rank]) for other in missing.get(rank, ()))), [])
        left.add(rank)
        return found

    return next(filter(None, (walk(rank, []) for rank in missing)), [])


def _group(groups: Iterable[GroupRecord], like: GroupRecord) -> GroupRecord | None:
    return next((group for group in groups if (group.name, group.ranks) == (like.name, like.ranks)), None)
