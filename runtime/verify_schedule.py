"""same-schedule and in-order: what is streamed when, through which slot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

from crossdock.offload.block import Home
from crossdock.offload.trace import TraceEvent
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import REPORT_IT, RankReport, Violation


def same_schedule(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every rank streams the same blocks in the same order through the same slots, as planned."""
    check = "same-schedule"
    order = tuple(block.name for block in plan.streamed)
    homes = [(block.name, block.home, block.slot, block.layout.nbytes) for block in plan.blocks]
    slots = reports[0].slot_bytes
    for report in reports:
        for place, (expected, found) in enumerate(zip_longest(order, report.order)):
            if expected != found:
                yield Violation(check, report.rank, f"streamed block {place}", str(expected), str(found), REPORT_IT)
        held = [(home.block, home.home, home.slot, home.nbytes) for home in report.homes]
        for expected_home, found_home in zip_longest(homes, held):
            if expected_home != found_home:
                where = str((expected_home or found_home or ("?",))[0])
                yield Violation(check, report.rank, where, str(expected_home), str(found_home), REPORT_IT)
        if report.slot_bytes != slots:
            yield Violation(check, report.rank, "slot sizes", str(slots), str(report.slot_bytes), REPORT_IT)


def in_order(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Per block load -> gather -> compute -> free; no slot overwritten under its reader; no more than the window."""
    for report in reports:
        yield from trace_in_order(plan, report.rank, report.trace)
        computed = {event.block for event in report.trace if event.kind == "compute_begin"}
        for block in plan.streamed:
            if block.name not in computed:
                expected = "streamed in the rehearsal"
                yield Violation("in-order", report.rank, block.name, expected, "it was not", REPORT_IT)


def trace_in_order(plan: RunPlan, rank: int, trace: Sequence[TraceEvent]) -> Iterator[Violation]:
    places: dict[int | str, list[TraceEvent]] = defaultdict(list)  # a block that stays has a place of its own
    homes = {block.name: block.home for block in plan.blocks}
    for event in trace:
        if event.kind != "wait_begin" and homes[event.block].streamed:
            places[event.block if event.slot is None else event.slot].append(event)
    for events in places.values():
        for before, event in pairwise(sorted(events, key=lambda event: event.sequence)):
            reason = _wrong_succession(before, event, homes)
            if reason is not None:
                found = f"{event.kind} right after {before.kind} of {before.block}"
                where = event.block if event.slot is None else f"{event.block} in slot {event.slot}"
                yield Violation("in-order", rank, where, reason, found, REPORT_IT)
    slots = sum(isinstance(place, int) for place in places)
    if slots > plan.schedule.n_slots:
        yield Violation("in-order", rank, "window", f"{plan.schedule.n_slots} slots", f"{slots}", REPORT_IT)


def _wrong_succession(before: TraceEvent, event: TraceEvent, homes: dict[str, Home]) -> str | None:
    """What should have come before `event` in its slot, if not `before`; None when all is well."""
    same = before.block == event.block
    home = homes[event.block]
    match event.kind:
        case "load_end" | "gather_end" | "compute_end":
            begun = same and before.kind == event.kind.replace("end", "begin")
            return None if begun else f"its own {event.kind.replace('end', 'begin')}"
        case "compute_begin":
            filled = {"gather_end", "compute_end"} if home.sharded else {"load_end", "compute_end"}
            return None if same and before.kind in filled else "its own bytes in the slot"
        case "gather_begin" if home is Home.HOST_SHARD:
            return None if same and before.kind == "load_end" else "its own shard in the slot"
        case _:  # the first event of a fill: the slot's reader must be done
            done = {"compute_end", "gather_end"} | ({"load_end"} if not homes[before.block].sharded else set())
            return None if before.kind in done else "the slot's last block to be done"
