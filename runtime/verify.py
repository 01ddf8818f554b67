"""The composition contract, judged. Pure functions of the plan and the ranks' reports.

Every check has a function in a `verify_*.py` of its own; see the README for what each one promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import RankReport, Violation
from crossdock.runtime.verify_aliasing import no_alias
from crossdock.runtime.verify_collectives import Issued, same_collectives
from crossdock.runtime.verify_coverage import covers
from crossdock.runtime.verify_ownership import owned_once
from crossdock.runtime.verify_schedule import in_order, same_schedule, trace_in_order

CHECKS: dict[str, Callable[[RunPlan, Sequence[RankReport]], Iterable[Violation]]] = {
    "same-schedule": same_schedule,
    "owned-once": owned_once,
    "covers": covers,
    "no-alias": no_alias,
    "in-order": in_order,
    "same-collectives": same_collectives,
}


def verify_composition(plan: RunPlan, reports: Sequence[RankReport]) -> list[Violation]:
    """Every violation of the contract before the first step; empty when offloading and sharding compose."""
    missing = set(range(plan.mesh.world_size)) - {report.rank for report in reports}
    if missing:
        return [Violation("same-schedule", min(missing), "report", "one", "none", "a rank is missing; start again")]
    return [violation for check in CHECKS.values() for violation in check(plan, reports)]


def verify_request(plan: RunPlan, results: Sequence[Issued]) -> list[Violation]:
    """in-order and same-collectives for what the ranks did in a request."""
    ordered = [violation for result in results for violation in trace_in_order(plan, result.rank, result.trace)]
    return [*ordered, *same_collectives(plan, results)]
