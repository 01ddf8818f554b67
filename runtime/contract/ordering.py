"""same-schedule and in-order: what is streamed when, through which slot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import attrgetter, itemgetter

from crossdock.offload.schedule.slots import slot_sizes
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.trace import EventKind, TraceEvent
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.memory_plan import MemoryPlan, PlannedBlock
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import REPORT_IT, RankReport

TOLERANCE_S = 5e-6
"""By so much two things may seem to overlap on one device's clock. CUDA events have a resolution of 0.5 us, and each is
converted with an error of at most another 0.5 us (see `copy_engine`); the rest is a margin.
"""
_STAGING = "the staging memory"


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
        yield from in_order_by_the_clock(plan.memory, report.rank, report.trace)


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
    latest: dict[int | str, TraceEvent] = {}
    blocks = {block.name: block for block in memory.blocks}
    judged: set[tuple[str, str, str, str]] = set()
    for event in trace:
        if event.kind == "wait_begin":
            continue
        place = _key(event)
        before = latest.get(place)
        latest[place] = event
        if before is None or (key := (before.kind, before.block, event.kind, event.block)) in judged:
            continue
        judged.add(key)
        reason = _wrong_succession(before, event, blocks) if blocks[event.block].home.streamed else None
        if reason is not None:
            found = f"{event.kind} right after {before.kind} of {before.block}"
            yield Violation("in-order", rank, _place(event), reason, found, REPORT_IT)
    slots = [event for place, event in latest.items() if isinstance(place, int)]
    if len(slots) > (window := memory.schedule.n_slots):
        yield Violation(
            "in-order", rank, _place(slots[-1]), f"a window of {window} slots", f"{len(slots)} slots", REPORT_IT
        )


def in_order_by_the_clock(memory: MemoryPlan, rank: int, trace: Sequence[TraceEvent]) -> Iterator[Violation]:
    """The same of when it happened on the device, whatever the order of issue: on CUDA a missing wait, an event given
    too early and a reader that was not waited for show only here. Under one schedule, and of one clock.

    What happens again and again is told once, with the worst of it.
    """
    worst: dict[tuple[str, str, str, str], tuple[Overlap, int]] = {}
    for overlap in overlaps(trace, {block.name for block in memory.blocks if not block.codec.in_place}):
        key = (overlap.ends.kind, overlap.ends.block, overlap.begins.kind, overlap.begins.block)
        known, count = worst.get(key, (overlap, 0))
        worst[key] = max(known, overlap, key=attrgetter("by_s")), count + 1
    for overlap, count in worst.values():
        first, second = _did(overlap.ends), _did(overlap.begins)
        often = f", the worst of {count} times" if count > 1 else ""
        found = f"begun {overlap.by_s * 1e6:.1f} us before that ended (event {overlap.begins.sequence}{often})"
        expected = f"its {second} after the {first} of {overlap.ends.block}, by the device's clock"
        yield Violation("in-order", rank, overlap.where, expected, found, REPORT_IT)


@dataclass(frozen=True)
class Overlap:
    """Of one place, what `begins` was issued after what `ends`, and began so much before that ended."""

    where: str
    ends: TraceEvent
    begins: TraceEvent
    by_s: float


def overlaps(
    trace: Sequence[TraceEvent], staged: Collection[str] = (), tolerance_s: float = TOLERANCE_S
) -> Iterator[Overlap]:
    """Where a load, gather or compute begins before those have ended that were issued before it in its slot, or in the
    block's own memory: so a block that computes before its own fill has ended, and a fill under a reader.

    What has no time (events of a captured graph) is left out; what broke off took none; what began before `trace` has
    ended where it says so.

    Args:
        staged: the blocks that are brought through staging memory, which all of them share.
    """
    uses: dict[int | str, list[tuple[int, TraceEvent, TraceEvent]]] = defaultdict(list)
    begun: dict[tuple[str, str], TraceEvent] = {}
    for event in trace:
        what, _, which = event.kind.partition("_")
        if which == "begin" and what != "wait" and event.at_s:
            begun[what, event.block] = event
        elif which == "end" and event.at_s:
            begin = begun.pop((what, event.block), None)
            use = (-1, event, event) if begin is None else (begin.sequence, begin, event)
            uses[_key(event)].append(use)
            if what != "compute" and event.block in staged:
                uses[_STAGING].append(use)
    for event in begun.values():
        uses[_key(event)].append((event.sequence, event, event))
    for place, of_place in uses.items():
        last: TraceEvent | None = None
        for number, begin, end in sorted(of_place, key=itemgetter(0)):
            if last is not None and number >= 0 and last.at_s - begin.at_s > tolerance_s:
                where = f"{begin.block} in {place}" if place == _STAGING else _place(begin)
                yield Overlap(where, last, begin, last.at_s - begin.at_s)
            if last is None or end.at_s > last.at_s:
                last = end


def _did(event: TraceEvent) -> str:
    return event.kind.partition("_")[0]


def _key(event: TraceEvent) -> int | str:
    """Where it is: a block that stays has a place of its own."""
    return event.block if event.slot is None else event.slot


def _place(event: TraceEvent) -> str:
    return event.block if event.slot is None else f"{event.block} in slot {event.slot}"


def _wrong_succession(before: TraceEvent, event: TraceEvent, blocks: Mapping[str, PlannedBlock]) -> str | None:
    """What should have come before `event` in its slot, if not `before`; None when all is well."""
    same = before.block == event.block
    block = blocks[event.block]
    match event.kind:
        case "load_end" | "gather_end" | "decode_end" | "compute_end":
            begun = same and before.kind == event.kind.replace("end", "begin")
            return None if begun else f"its own {event.kind.replace('end', 'begin')}"
        case "compute_begin":
            return None if same and before.kind in (_filled(block), "compute_end") else "its own bytes in the slot"
        case "gather_begin" if block.home is Home.HOST_SHARD:
            return None if same and before.kind == "load_end" else "its own shard in the slot"
        case "decode_begin":
            arrived = same and before.kind == _arrived(block)
            return None if arrived else "all of its own bytes, encoded"
        case _:  # the first event of a fill: the slot's reader must be done
            done = "compute_end", _filled(blocks[before.block])
            return None if before.kind in done else "the slot's last block to be done"


def _arrived(block: PlannedBlock) -> EventKind:
    """With what the last of a block's bytes have come."""
    return "gather_end" if block.home.sharded else "load_end"


def _filled(block: PlannedBlock) -> EventKind:
    """After what a block can compute."""
    return _arrived(block) if block.codec.in_place else "decode_end"
