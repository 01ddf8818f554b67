"""single-owner: every tensor has exactly one home, on the device, and nothing is there twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.schedule.slots import slot_sizes
from crossdock.offload.stream.block import Home
from crossdock.parallel.tensor import part_shape
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import REPORT_IT, HomeRecord, MemorySpan, RankReport, TensorRecord

NOT_WEIGHTS = 2 * 2**20
"""Bytes that setup may leave allocated on the device besides weights: a few small tensors of the communication."""

_LET_GO = "something keeps weights on the device that are streamed: let go of it (a hook, a wrapper, a cached copy)"


def single_owner(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every parameter and buffer has exactly one home; none on meta; none outside the blocks off the device."""
    layout, move_it = plan.layout, "move it yourself, or register it as a buffer"
    for report in reports:
        found = Counter(record.fqn for record in report.tensors)
        for fqn in layout.dtypes:
            if found[fqn] != 1:
                yield Violation("single-owner", report.rank, fqn, "one home", f"{found[fqn]}", REPORT_IT)
        for fqn in found.keys() - layout.dtypes.keys():
            remedy = "add it to the checkpoint, or do not register it on the model"
            yield Violation("single-owner", report.rank, fqn, "no such tensor", "an unplanned one", remedy)
        for record in report.tensors:
            yield from _check_home(plan, report.rank, record)
        for record in report.plain:
            yield from _check_device(layout.device, report.rank, record, move_it)
        yield from _check_freed(plan.memory, report)
        yield from _check_bytes(plan, report)
        for module, what in report.foreign_hooks:
            remedy = "remove it: two mechanisms must not move the same weights"
            yield Violation("single-owner", report.rank, module or "the model", "no other mechanism", what, remedy)


def all_read(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Once every block has been streamed: from where it rests."""
    for report in reports:
        reads = {home.block: home.read for home in report.homes}
        yield from read_at_rest(plan.memory, report.rank, report.homes, reads)


def _check_home(plan: RunPlan, rank: int, record: TensorRecord) -> Iterator[Violation]:
    yield from _check_device(plan.layout.device, rank, record, REPORT_IT)
    if record.device == "meta":
        return
    block = plan.memory.owner_of(record.fqn)
    if block is None:
        expected, offset = "outside", 0
    else:
        expected = f"block {block.name}" if block.slot is None else f"slot {block.slot}"
        local = record.fqn.removeprefix(f"{block.name}.")
        offset = next((entry.offset for entry in block.layout.entries if local in entry.names), -1)
    if (record.place, record.offset) != (expected, offset):
        found = f"{record.place} at byte {record.offset}"
        yield Violation("single-owner", rank, record.fqn, f"{expected} at byte {offset}", found, REPORT_IT)
    if record.dtype != str(plan.layout.dtypes.get(record.fqn, record.dtype)):
        yield Violation("single-owner", rank, record.fqn, str(plan.layout.dtypes[record.fqn]), record.dtype, REPORT_IT)


def _check_device(device: str, rank: int, record: TensorRecord, remedy: str) -> Iterator[Violation]:
    if record.device == "meta":
        yield Violation("single-owner", rank, record.fqn, f"on {device}", "on meta: never loaded", remedy)
    elif record.device.split(":")[0] != device:
        yield Violation("single-owner", rank, record.fqn, f"on {device}", f"on {record.device}", remedy)


def read_at_rest(
    memory: MemoryPlan, rank: int, homes: Sequence[HomeRecord], reads: Mapping[str, Sequence[MemorySpan]]
) -> Iterator[Violation]:
    """What was copied into the slots are the very bytes that rest in the home, not another copy of them."""
    for home in homes:
        if not home.home.streamed:
            continue
        places = home.pages if home.rest is None else (home.rest,)
        read = reads.get(home.block, ())
        strange = [span for span in read if not any(place.holds(span) for place in places)]
        if read and not strange:
            continue
        where = memory.tensor_at(home.block, home.start)
        expected = f"bytes read from where they rest ({home.home}: {_spans(places)})"
        found = f"read from {_spans(strange)}: {_whose(homes, home, strange[0])}" if strange else "never read"
        remedy = "something keeps weights of its own and loads from there: let go of it (a hook, a wrapper, a cache)"
        yield Violation("single-owner", rank, where, expected, found, remedy)


def _whose(homes: Sequence[HomeRecord], own: HomeRecord, span: MemorySpan) -> str:
    others = ((home.block, place) for home in homes if home is not own for place in (home.rest, *home.pages))
    there = (block for block, place in others if place is not None and place.common_bytes(span))
    return f"where {other} rests" if (other := next(there, None)) else "a second copy"


def _spans(spans: Sequence[MemorySpan]) -> str:
    first = ", ".join(f"{span.start:#x} to {span.stop:#x}" for span in spans[:1])
    return f"{first} and {len(spans) - 1} more" if len(spans) > 1 else first


def _check_freed(memory: MemoryPlan, report: RankReport) -> Iterator[Violation]:
    """Per streamed block: it has no bytes on the device beside its slot's, so that they fall when the slot is freed."""
    records = {record.fqn: record for record in report.tensors}
    for block in memory.streamed:
        names = (f"{block.name}.{name}" for entry in block.layout.entries for name in entry.names)
        held = [records[fqn] for fqn in names if fqn in records]
        own = [record for record in held if record.place != f"slot {block.slot}" and record.span is not None]
        if own:
            kept = sum(span.nbytes for span in {record.span for record in own} if span is not None)
            expected = f"all {block.layout.slot_bytes} bytes in slot {block.slot}, which the next block takes"
            found = f"{kept} bytes elsewhere that are never freed, of {own[0].fqn} first"
            yield Violation("single-owner", report.rank, block.name, expected, found, _LET_GO)


def _check_bytes(plan: RunPlan, report: RankReport) -> Iterator[Violation]:
    """What lies on the device is what the plan has there. A total, because a hidden copy belongs to no tensor."""
    planned, counted = planned_device_bytes(plan, report), report.device_bytes
    found = counted.weights + counted.shards
    outside = (record.fqn for record in report.tensors if record.place == "outside")
    where = next((fqn for fqn in outside if plan.memory.owner_of(fqn) is not None), "device memory")
    pieces = 1 + sum(not block.home.on_host for block in plan.memory.blocks)
    if found > planned + pieces * ALIGNMENT:
        expected = f"at most {planned} bytes of weights on the device"
        yield Violation("single-owner", report.rank, where, expected, f"{found} bytes", _LET_GO)
    if counted.allocated is not None:
        most = max(planned, found) + counted.others + counted.rounding + NOT_WEIGHTS
        if counted.allocated > most:
            expected = f"at most {most} bytes allocated on the device by loading"
            yield Violation("single-owner", report.rank, where, expected, f"{counted.allocated} bytes", _LET_GO)


def planned_device_bytes(plan: RunPlan, report: RankReport) -> int:
    """Slots, resident blocks, shards, and what is outside; for a buffer that no checkpoint holds, its found shape."""
    layout, memory = plan.layout, plan.memory
    blocks, slots = memory.blocks, memory.arena_bytes
    if slots is None:
        streamed = [block.layout.slot_bytes for block in memory.streamed]
        slots = sum(slot_sizes(streamed, memory.schedule.slots))
        slots += sum(blocks[index].layout.slot_bytes for index in memory.resident) + memory.staging_bytes
    resident = sum(block.layout.slot_bytes for block in blocks if not block.home.streamed)
    shards = sum(block.held_bytes for block in blocks if block.home is Home.DEVICE_SHARD)
    slices = layout.slices_of(report.rank)
    shapes = {record.fqn: record.shape for record in report.tensors}
    outside = 0
    for fqn in memory.outside:
        shape = part_shape(layout.stored[fqn].shape, slices.get(fqn)) if fqn in layout.stored else shapes.get(fqn, (0,))
        outside += math.prod(shape) * layout.dtypes[fqn].itemsize
    return slots + resident + shards + outside
