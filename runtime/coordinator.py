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
    """Judges what the ranks report; `composition` is the verdict for `report.json`, `plan` what holds now."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self.composition: list[dict[str, str]] = []

    def admit(self, reports: Sequence[RankReport]) -> None:
        """Before the first step.

        Raises:
            CompositionError: some part of the contract does not hold.
        """
        violations = verify_composition(self.plan, reports)
        self._judge(violations, f"{len(reports)} ranks, {len(self.plan.blocks)} blocks")

    def review(self, results: Sequence[RankResult]) -> None:
        """After a request, before its pictures are handed out; a changed schedule is judged like the first.

        Raises:
            CompositionError: a rank did not stream in order, or the new schedule does not compose.
        """
        if any(result.plan is not None for result in results):
            self._adopt(results)
        violations = [v for result in results for v in verify_trace(self.plan, result.rank, result.trace)]
        if violations:
            self._judge(violations, "")

    def _adopt(self, results: Sequence[RankResult]) -> None:
        plan = next(result.plan for result in results if result.plan is not None)
        self.plan = plan
        self.admit([result.report for result in results if result.report is not None])

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
