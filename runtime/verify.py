"""The composition contract, judged. Pure functions of the plan and the ranks' reports.

Checked here: same-schedule, owned-once, covers, in-order. See the README for what each one promises.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, zip_longest

from crossdock.offload.block import Home
from crossdock.offload.trace import TraceEvent
from crossdock.parallel.hsdp import shard_range
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.reports import RankReport, TensorRecord, Violation

_REPORT_IT = "this is a fault of crossdock or of a hook added to the model: report it with the report.json"
_RELOAD = "load the model again; if it stays, the checkpoint differs between nodes"


def verify_composition(plan: RunPlan, reports: Sequence[RankReport]) -> list[Violation]:
    """Every violation of the contract before the first step; empty when offloading and sharding compose."""
    missing = set(range(plan.mesh.world_size)) - {report.rank for report in reports}
    if missing:
        return [Violation("same-schedule", min(missing), "report", "one", "none", "a rank is missing; start again")]
    return [violation for check in CHECKS.values() for violation in check(plan, reports)]


def verify_trace(plan: RunPlan, rank: int, trace: Sequence[TraceEvent]) -> list[Violation]:
    """in-order for what a rank did in a request."""
    return list(_in_order(plan, rank, trace))


# -- same-schedule ------------------------------------------------------------------------------------------------


def same_schedule(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every rank streams the same blocks in the same order through the same slots, as planned."""
    check = "same-schedule"
    order = tuple(block.name for block in plan.streamed)
    homes = [(block.name, block.home, block.slot, block.layout.nbytes) for block in plan.blocks]
    slots = reports[0].slot_bytes
    for report in reports:
        for place, (expected, found) in enumerate(zip_longest(order, report.order)):
            if expected != found:
                yield Violation(check, report.rank, f"streamed block {place}", str(expected), str(found), _REPORT_IT)
        held = [(home.block, home.home, home.slot, home.nbytes) for home in report.homes]
        for expected_home, found_home in zip_longest(homes, held):
            if expected_home != found_home:
                where = str((expected_home or found_home or ("?",))[0])
                yield Violation(check, report.rank, where, str(expected_home), str(found_home), _REPORT_IT)
        if report.slot_bytes != slots:
            yield Violation(check, report.rank, "slot sizes", str(slots), str(report.slot_bytes), _REPORT_IT)


# -- owned-once ---------------------------------------------------------------------------------------------------


def owned_once(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every parameter and buffer has exactly one home; none on meta; none outside the blocks off the device."""
    for report in reports:
        found = Counter(record.fqn for record in report.tensors)
        for fqn in plan.dtypes:
            if found[fqn] != 1:
                yield Violation("owned-once", report.rank, fqn, "one home", f"{found[fqn]}", _REPORT_IT)
        for fqn in found.keys() - plan.dtypes.keys():
            remedy = "add it to the checkpoint, or do not register it on the model"
            yield Violation("owned-once", report.rank, fqn, "no such tensor", "an unplanned one", remedy)
        for record in report.tensors:
            yield from _check_home(plan, report.rank, record)
        for module, what in report.foreign_hooks:
            remedy = "remove it: two mechanisms must not move the same weights"
            yield Violation("owned-once", report.rank, module or "the model", "no other mechanism", what, remedy)


def _check_home(plan: RunPlan, rank: int, record: TensorRecord) -> Iterator[Violation]:
    if record.device == "meta":
        yield Violation("owned-once", rank, record.fqn, f"on {plan.device}", "on meta: never loaded", _REPORT_IT)
        return
    if record.device.split(":")[0] != plan.device:
        yield Violation("owned-once", rank, record.fqn, f"on {plan.device}", f"on {record.device}", _REPORT_IT)
    block = plan.owner_of(record.fqn)
    if block is None:
        expected, offset = "outside", 0
    else:
        expected = f"block {block.name}" if block.slot is None else f"slot {block.slot}"
        local = record.fqn.removeprefix(f"{block.name}.")
        offset = next((entry.offset for entry in block.layout.entries if local in entry.names), -1)
    if (record.place, record.offset) != (expected, offset):
        found = f"{record.place} at byte {record.offset}"
        yield Violation("owned-once", rank, record.fqn, f"{expected} at byte {offset}", found, _REPORT_IT)
    if record.dtype != str(plan.dtypes.get(record.fqn, record.dtype)):
        yield Violation("owned-once", rank, record.fqn, str(plan.dtypes[record.fqn]), record.dtype, _REPORT_IT)


# -- covers -------------------------------------------------------------------------------------------------------


def covers(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Shards add up to the checkpoint's tensor exactly once; what is replicated is equal on all ranks."""
    by_rank = {report.rank: report for report in reports}
    yield from _slices_cover(plan, by_rank)
    yield from _shards_cover(plan, by_rank)
    yield from _replicas_agree(plan, by_rank)


def _slices_cover(plan: RunPlan, by_rank: dict[int, RankReport]) -> Iterator[Violation]:
    """The parts of a TP group tile every stored tensor, and each tensor has the shape of its part."""
    records = {rank: {record.fqn: record for record in report.tensors} for rank, report in by_rank.items()}
    for group in _groups(plan, "tp"):
        for fqn, stored in plan.stored.items():
            held = [(rank, records[rank][fqn]) for rank in group if fqn in records[rank]]
            for rank, record in held:
                expected = _part_shape(stored.shape, record.part)
                if record.shape != expected:
                    yield Violation("covers", rank, fqn, f"shape {expected}", f"shape {record.shape}", _REPORT_IT)
            cut = [(rank, record.part) for rank, record in held if record.part is not None]
            whole = [rank for rank, record in held if record.part is None]
            if cut and whole:
                others = f"cut along dim {cut[0][1].dim}, as on rank {cut[0][0]}"
                yield Violation("covers", whole[0], fqn, others, "not cut", _REPORT_IT)
            elif cut:
                yield from _tiles(fqn, cut)


def _tiles(fqn: str, parts: Sequence[tuple[int, TensorSlice]]) -> Iterator[Violation]:
    rank, first = parts[0]
    for other, part in parts:
        if part.dim != first.dim:
            yield Violation("covers", other, fqn, f"cut along dim {first.dim}", f"along dim {part.dim}", _REPORT_IT)
            return
    ranges = sorted((span, rank) for rank, part in parts for span in part.ranges)
    at = 0
    for (start, stop), owner in ranges:
        if start != at:
            what = "twice" if start < at else "by nobody"
            low, high = sorted((start, at))
            yield Violation(
                "covers",
                owner,
                fqn,
                "every element held once",
                f"[{low}, {high}) of dim {first.dim} held {what}",
                _REPORT_IT,
            )
            return
        at = stop
    if at != first.full_size:
        found = f"[{at}, {first.full_size}) of dim {first.dim} held by nobody"
        yield Violation("covers", rank, fqn, "every element held once", found, _REPORT_IT)


def _shards_cover(plan: RunPlan, by_rank: dict[int, RankReport]) -> Iterator[Violation]:
    """The shards of a group tile every block, in group order: that is the order of the all-gather."""
    sizes = {block.name: block.layout.nbytes for block in plan.blocks}
    for group in _groups(plan, "weights"):
        for index, rank in enumerate(group):
            for home in by_rank[rank].homes:
                if home.block not in sizes:
                    continue  # same-schedule says so
                expected = (0, sizes[home.block])
                if home.home.sharded:
                    expected = shard_range(sizes[home.block], len(group), index)
                found = (home.start, home.stop)
                if found != expected:
                    yield Violation("covers", rank, home.block, f"bytes {expected}", f"bytes {found}", _REPORT_IT)


def _replicas_agree(plan: RunPlan, by_rank: dict[int, RankReport]) -> Iterator[Violation]:
    """Equal checksums: the same part of a block, and the same part of a tensor, wherever it is held."""
    sums: dict[object, dict[int, tuple[int, str]]] = defaultdict(dict)
    for rank, report in by_rank.items():
        tp = plan.mesh.coordinates(rank)["tp"]
        for home in report.homes:
            if home.checksum is not None:
                sums[("block", home.block, tp, home.start, home.stop)][rank] = (home.checksum, home.block)
        for record in report.tensors:
            if record.checksum is not None:
                part = record.part.ranges if record.part else None
                sums[("tensor", record.fqn, part)][rank] = (record.checksum, record.fqn)
    for holders in sums.values():
        common, _ = Counter(checksum for checksum, _ in holders.values()).most_common(1)[0]
        agreeing = [rank for rank, (checksum, _) in holders.items() if checksum == common]
        for rank, (checksum, name) in holders.items():
            if checksum != common:
                expected = f"the bytes of rank {agreeing[0]} (checksum {common:#x})"
                yield Violation("covers", rank, name, expected, f"{checksum:#x}", _RELOAD)


# -- in-order -----------------------------------------------------------------------------------------------------


def in_order(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Per block load -> gather -> compute -> free; no slot overwritten under its reader; no more than the window."""
    for report in reports:
        yield from _in_order(plan, report.rank, report.trace)
        computed = {event.block for event in report.trace if event.kind == "compute_begin"}
        for block in plan.streamed:
            if block.name not in computed:
                expected = "streamed in the rehearsal"
                yield Violation("in-order", report.rank, block.name, expected, "it was not", _REPORT_IT)


def _in_order(plan: RunPlan, rank: int, trace: Sequence[TraceEvent]) -> Iterator[Violation]:
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
                yield Violation("in-order", rank, where, reason, found, _REPORT_IT)
    slots = sum(isinstance(place, int) for place in places)
    if slots > plan.schedule.n_slots:
        yield Violation("in-order", rank, "window", f"{plan.schedule.n_slots} slots", f"{slots}", _REPORT_IT)


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


# -- common -------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[RunPlan, Sequence[RankReport]], Iterable[Violation]]] = {
    "same-schedule": same_schedule,
    "owned-once": owned_once,
    "covers": covers,
    "in-order": in_order,
}


def _groups(plan: RunPlan, name: str) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(plan.mesh.groups(rank)[name] for rank in range(plan.mesh.world_size)))


def _part_shape(shape: tuple[int, ...], part: TensorSlice | None) -> tuple[int, ...]:
    if part is None:
        return shape
    return (*shape[: part.dim], part.size, *shape[part.dim + 1 :])
