"""The coordinator: one per run. Admits a gang whose parts compose, refuses one whose parts do not. Fails closed."""

from __future__ import annotations

from collections.abc import Sequence

from crossdock.runtime.errors import CompositionError
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import RankReport, Violation
from crossdock.runtime.verify import CHECKS, verify_composition, verify_trace
from crossdock.runtime.worker import RankResult

SHOWN = 5
"""How many violations an error lists; the rest is counted."""


class Coordinator:
    """Judges what the ranks report; `composition` is the verdict for `report.json`."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self.composition: list[dict[str, str]] = []

    def admit(self, reports: Sequence[RankReport]) -> None:
        """Before the first step.

        Raises:
            CompositionError: some part of the contract does not hold.
        """
        violations = verify_composition(self._plan, reports)
        self._judge(violations, f"{len(reports)} ranks, {len(self._plan.blocks)} blocks")

    def review(self, results: Sequence[RankResult]) -> None:
        """After a request, before its pictures are handed out.

        Raises:
            CompositionError: a rank did not stream in order.
        """
        violations = [v for result in results for v in verify_trace(self._plan, result.rank, result.trace)]
        if violations:
            self._judge(violations, "")

    def _judge(self, violations: list[Violation], detail: str) -> None:
        broken = {check: [v for v in violations if v.check == check] for check in CHECKS}
        self.composition = [
            {
                "check": check,
                "status": "violated" if found else "holds",
                "detail": str(found[0]) if found else detail,
            }
            for check, found in broken.items()
        ]
        if violations:
            lines = [str(violation) for violation in violations[:SHOWN]]
            if len(violations) > SHOWN:
                lines.append(f"and {len(violations) - SHOWN} more violations")
            raise CompositionError("offloading and sharding do not compose:\n  " + "\n  ".join(lines))
