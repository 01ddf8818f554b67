"""same-schedule and in-order: what is streamed when, through which slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from crossdock.offload.schedule.slots import slot_sizes
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.trace import TraceEvent
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import REPORT_IT, RankReport


def same_schedule(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every rank streams the same blocks in the same order through the same slots, as planned."""
    check, memory = "same-schedule", plan.memory
    order = tuple(block.name for block in memory.streamed)
    homes = [(b.name, _described(b.name, b.home, b.slot, b.layout.slot_bytes)) for b in memory.blocks]
    sizes = slot_sizes([block.layout.slot_bytes for block in memory.streamed], memory.schedule.slots)
    for report in reports:
        for place, (expected, found) in enumerate(zip_longest(order, report.order)):
            if expected != found:
                wanted = f"streamed in place {place}" if expected else f"nothing streamed in place {place}"
                yield Violation(
                    check, report.rank, str(expected or found), wanted, f"{found or 'nothing'} there", REPORT_IT
                )
        held = [(home.block, _described(home.block, home.home, home.slot, home.slot_bytes)) for home in report.homes]
        for (name, wanted_home), (other, found_home) in zip_longest(homes, held, fillvalue=("", "no block")):
            if wanted_home != found_home:
                yield Violation(check, report.rank, name or other, wanted_home, found_home, REPORT_IT)
        for slot, (planned, size) in enumerate(zip_longest(sizes, report.slot_bytes, fillvalue=0)):
            if planned != size:
                first = next((block.name for block in memory.streamed if block.slot == slot), "no block")
                where = f"slot {slot} (of {first})"
                yield Violation(check, report.rank, where, f"{planned} bytes", f"{size} bytes", REPORT_IT)


def _described(block: str, home: Home, slot: int | None, slot_bytes: int) -> str:
    place = "memory of its own" if slot is None else f"slot {slot}"
    return f"{block} ({slot_bytes} bytes, {home}) in {place}"


def in_order(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Per block load -> gather -> compute -> free; no slot overwritten under its reader; no more than the window."""
    for report in reports:
        yield from trace_in_order(plan.memory, report.rank, report.trace)


def all_rehearsed(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """After a rehearsal: every block was streamed in it."""
    for report in reports:
        computed = {event.block for event in report.trace if event.kind == "compute_begin"}
        for block in plan.memory.streamed:
            if block.name not in computed:
                expected = "streamed in the rehearsal"
                yield Violation("in-order", report.rank, block.name, expected, "it was not", REPORT_IT)


def trace_in_order(memory: MemoryPlan, rank: int, trace: Sequence[TraceEvent]) -> Iterator[Violation]:
    """All events of `trace`, oldest first, under one schedule. What a slot had before its first event is not known.

    What steps repeat is judged, and told, once: that is what makes it cheap enough for all steps of a request.
    """
    latest: dict[int | str, TraceEvent] = {}  # a block that stays has a place of its own
    homes = {block.name: block.home for block in memory.blocks}
    judged: set[tuple[str, str, str, str]] = set()
    for event in trace:
        if event.kind == "wait_begin":
            continue
        place = event.block if event.slot is None else event.slot
        before = latest.get(place)
        latest[place] = event
        if before is None or (key := (before.kind, before.block, event.kind, event.block)) in judged:
            continue
        judged.add(key)
        reason = _wrong_succession(before, event, homes) if homes[event.block].streamed else None
        if reason is not None:
            found = f"{event.kind} right after {before.kind} of {before.block}"
            yield Violation("in-order", rank, _place(event), reason, found, REPORT_IT)
    slots = [event for place, event in latest.items() if isinstance(place, int)]
    if len(slots) > (window := memory.schedule.n_slots):
        yield Violation(
            "in-order", rank, _place(slots[-1]), f"a window of {window} slots", f"{len(slots)} slots", REPORT_IT
        )


def _place(event: TraceEvent) -> str:
    return event.block if event.slot is None else f"{event.block} in slot {event.slot}"


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
