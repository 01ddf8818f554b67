"""What the coordinator found: the result with every violation, and the error that carries it."""

from __future__ import annotations

from dataclasses import dataclass

from crossdock.runtime.errors import CrossdockError
from crossdock.runtime.reports.records import Deviation, RankReport


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


@dataclass(frozen=True)
class ContractResult:
    """What the coordinator found.

    Attributes:
        composition: per check its status ("holds", "violated", "no step yet", "off", "not probed") and a detail, for
            `report.json`.
        violations: every one.
        reports: what was judged.
        deviations: of a probe, how far each output of a block is from the unsharded model's.
    """

    layout: str
    composition: tuple[dict[str, str], ...]
    violations: tuple[Violation, ...]
    reports: tuple[RankReport, ...]
    deviations: tuple[Deviation, ...] = ()


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
