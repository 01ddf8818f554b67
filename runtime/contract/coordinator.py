"""The coordinator: one per run. Admits a gang whose parts compose, refuses one whose parts do not. Fails closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from crossdock.runtime.contract.numbers import (
    PROBE_CHECKS,
    SAME_AS_ONE,
    SAME_NUMBERS,
    by_block,
    same_as_one,
    same_numbers,
    told,
)
from crossdock.runtime.contract.result import CompositionError, ContractResult, Violation
from crossdock.runtime.contract.verify import CHECKS, STEP_CHECKS, verify_arrivals, verify_composition, verify_request
from crossdock.runtime.plan.complete_spec import what_is_inferred
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.reports.records import Deviation, ProbeReport, RankReport

SHOWN = 5
"""How many violations an error lists; the rest is counted."""


class Coordinator:
    """Judges what the ranks report; `composition` is the result for `report.json`, `plan` what holds now."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan
        self._rows: dict[str, dict[str, str]] = {}
        self._reports: tuple[RankReport, ...] = ()
        self._deviations: tuple[Deviation, ...] = ()
        self._awaits = False  # what arrives in the first request

    @property
    def composition(self) -> list[dict[str, str]]:
        """check, status ("holds", "violated", "no step yet", "off", "not probed") and detail of every check; empty
        before the first.
        """
        return [self._rows[check] for check in (*CHECKS, *STEP_CHECKS, *PROBE_CHECKS) if check in self._rows]

    @property
    def result(self) -> ContractResult:
        """What is known of the ranks as they are now."""
        return self._result(())

    def admit(self, reports: Sequence[RankReport], rehearsed: bool = True) -> None:
        """Before the first step.

        Args:
            rehearsed: all blocks were streamed once; else the first `review` judges what has arrived.

        Raises:
            CompositionError: some part of the contract does not hold.
        """
        violations = verify_composition(self.plan, reports, rehearsed)
        self._reports, self._awaits = tuple(reports), not rehearsed
        for check, on in self._looked_at.items():
            self._rows.setdefault(check, _row(check, "no step yet" if on else "off", ""))
        self._rows |= {check: _row(check, "not probed", "") for check in PROBE_CHECKS}
        self._judge(dict.fromkeys(CHECKS, self._detail()), violations)

    def compare(self, probes: Sequence[ProbeReport]) -> None:
        """After a probe step.

        Raises:
            CompositionError: streaming changed a number, or sharding changed one by more than rounding does.
        """
        outputs = sum(len(probe.on) for probe in probes)
        found = [*same_numbers(self.plan.layout, probes), *same_as_one(self.plan.layout, probes)]
        self._deviations = tuple(by_block(self.plan.layout, probes))
        details = {
            SAME_NUMBERS: f"{outputs} outputs of {len(probes)} ranks",
            SAME_AS_ONE: told(self.plan.layout, self._deviations),
        }
        self._judge(details, found)

    def review(self, results: Sequence[RankResult]) -> None:
        """After a request, before its pictures are handed out; a changed schedule is judged like the first.

        Raises:
            CompositionError: a rank did not stream in order, read other bytes than those at rest, was brought others
                than the checkpoint's or computed with others, issued other collectives or computed something else than
                its group, made latents that are not finite, or the new schedule does not compose.
        """
        before = self.plan.memory
        if any(result.memory is not None for result in results):
            self._adopt(results)
        violations = verify_request(self.plan, self._reports, results, before)
        if self._awaits or any(result.arrivals for result in results):
            arrived = {result.rank: result.arrivals for result in results}
            compared = {report.rank: (*report.arrivals, *arrived.get(report.rank, ())) for report in self._reports}
            self._reports = tuple(
                replace(report, arrivals=tuple(dict.fromkeys(compared[report.rank]))) for report in self._reports
            )
            violations = [*verify_arrivals(self.plan, self._reports), *violations]
        if any(violation.check in ("complete", "arrives") for violation in violations):
            follows = ("finite", "same-state")  # from wrong weights
            violations = [violation for violation in violations if violation.check not in follows]
        for check, on in self._looked_at.items():
            if on:
                steps = max((len(result.seen.steps) for result in results), default=0)
                self._rows[check] = _row(check, "holds", f"{steps} steps of {len(results)} ranks")
        if violations:
            self._judge({violation.check: "" for violation in violations}, violations)
        elif self._awaits:
            self._awaits = False
            self._judge(dict.fromkeys(CHECKS, self._detail()), [])

    @property
    def _looked_at(self) -> dict[str, bool]:
        """Of what steps show, whether the config wants it checked."""
        verify = self.plan.config.verify
        on = {"finite": verify.finite, "arrives": verify.arrivals != "first"}
        return {check: on.get(check, verify.state) for check in STEP_CHECKS}

    def _adopt(self, results: Sequence[RankResult]) -> None:
        memory = next(result.memory for result in results if result.memory is not None)
        self.plan = replace(self.plan, memory=memory)
        probed = {check: row for check, row in self._rows.items() if check == SAME_AS_ONE}
        self.admit([result.report for result in results if result.report is not None])
        self._rows |= probed  # the schedule has no part in it

    def _judge(self, details: Mapping[str, str], violations: list[Violation]) -> None:
        """`details`: what is said of each check that holds."""
        for check, detail in details.items():
            found = [str(violation) for violation in violations if violation.check == check]
            self._rows[check] = _row(check, "violated" if found else "holds", found[0] if found else detail)
        if violations:
            lines = [str(violation) for violation in violations[:SHOWN]]
            if len(violations) > SHOWN:
                lines.append(f"and {len(violations) - SHOWN} more violations")
            raise CompositionError(
                "offloading and sharding do not compose:\n  " + "\n  ".join(lines), self._result(violations)
            )

    def _detail(self) -> str:
        detail = f"{len(self._reports)} ranks, {len(self.plan.memory.blocks)} blocks"
        return f"{detail}; what arrives is compared in the first step" if self._awaits else detail

    def _result(self, violations: Sequence[Violation]) -> ContractResult:
        return ContractResult(
            self.plan.layout_name,
            tuple(self.composition),
            tuple(violations),
            self._reports,
            self._deviations,
            what_is_inferred(self.plan),
        )


def _row(check: str, status: str, detail: str) -> dict[str, str]:
    return {"check": check, "status": status, "detail": detail}
