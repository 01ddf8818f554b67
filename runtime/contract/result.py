"""What the coordinator found: the result with every violation, and the error that carries it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from crossdock.runtime.errors import CrossdockError
from crossdock.runtime.reports.records import Deviation, RankReport
from crossdock.runtime.reports.status import ranks_text


@dataclass(frozen=True)
class Violation:
    """A broken rule of the composition contract: which check, who, what was expected, what was found, what to do."""

    check: str
    rank: int
    where: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.check}: rank {self.rank}: {self.where}: expected {self.expected}, found {self.found}; {self.remedy}"
        )


def common(found: Mapping[int, Hashable]) -> Hashable | None:
    """What more than half of the ranks have; None: there is no such thing."""
    value, count = Counter(found.values()).most_common(1)[0]
    return value if 2 * count > len(found) else None


def to_compare(found: Mapping[int, Hashable]) -> dict[int, int]:
    """For every rank that differs from most, one of those; without a majority, for every rank one that differs."""
    usual = common(found)
    blamed = [rank for rank, value in found.items() if value != usual] if len(set(found.values())) > 1 else []
    return {
        rank: next(other for other, value in found.items() if value != found[rank] and usual in (None, value))
        for rank in blamed
    }


def outvoted(check: str, where: str, found: Mapping[int, Hashable], remedy: str) -> Iterator[Violation]:
    """The ranks that differ from most; where there is no majority, all. `found`: by rank; numbers are checksums."""
    usual = common(found)
    agree = [rank for rank, value in found.items() if value == usual]
    for rank in to_compare(found):
        if usual is None:
            others = ", ".join(f"{_told(other)} on rank {at}" for at, other in found.items() if at != rank)
            expected = f"the same on all ranks ({others})"
        else:
            expected = f"{_told(usual)}, as on {ranks_text(agree)}"
        yield Violation(check, rank, where, expected, _told(found[rank]), remedy)


def _told(value: Hashable) -> str:
    return f"checksum {value:#x}" if isinstance(value, int) else "nothing" if value is None else str(value)


@dataclass(frozen=True)
class ContractResult:
    """What the coordinator found.

    Attributes:
        composition: per check its status ("holds", "violated", "no step yet", "off", "not probed") and a detail, for
            `report.json`.
        violations: every one.
        reports: what was judged.
        inferred: of a pipeline that no family describes, what is assured, and then what could not be told.
        deviations: of a probe, how far each output of a block is from the unsharded model's.
    """

    layout: str
    composition: tuple[dict[str, str], ...]
    violations: tuple[Violation, ...]
    reports: tuple[RankReport, ...]
    deviations: tuple[Deviation, ...] = ()
    inferred: tuple[str, ...] = ()


class CompositionError(CrossdockError):
    """The composition contract does not hold; the run is stopped before (or right after) a step.

    `result` has everything that was found; the message shows a few of the violations.
    """

    def __init__(self, message: str, result: ContractResult | None = None) -> None:
        super().__init__(message)
        self.result = result

    @property
    def violations(self) -> tuple[Violation, ...]:
        return self.result.violations if self.result else ()
