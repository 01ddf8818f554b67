"""complete, same-bits and arrives: the ranks' parts add up to the checkpoint, what is encoded is so alike, and what
arrives on the device, and what is computed with in every step, is what the checkpoint has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

from crossdock.parallel.hsdp import shard_range
from crossdock.parallel.mesh import MeshShape
from crossdock.parallel.tensor import TensorSlice, part_shape
from crossdock.runtime.contract.result import Violation, common, outvoted
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import REPORT_IT, RankReport, WeightsRecord, WrongBytes

_WRONG_BYTES = "what is at rest or the way to the device is wrong: load the model again; if it stays, report it"
_NOT_AT_REST = "what rests was written to: load the model again; if it stays, look at the host's memory"
_ON_THE_WAY = "a load was left out or wrong, or was written over: look for a hook or an extension, else report it"
_FILE = "load the model again, and leave its files alone while it is in use (or use offload.host: shared)"
_ENCODED_ALIKE = "what rests was written to, or encoded by another version: load the model again on all nodes"
_OTHER_FILE = "the checkpoint differs between nodes: copy it again"


def complete(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Shards add up to the checkpoint's tensor exactly once; what is replicated is equal on all ranks."""
    by_rank = {report.rank: report for report in reports}
    yield from _slices_cover(plan.layout, by_rank)
    yield from _shards_cover(plan, by_rank)
    yield from all_equal(plan, reports)


def _slices_cover(layout: ModelLayout, by_rank: dict[int, RankReport]) -> Iterator[Violation]:
    """The parts of a TP group tile every stored tensor, and each tensor has the shape of its part."""
    records = {rank: {record.fqn: record for record in report.tensors} for rank, report in by_rank.items()}
    for group in _groups(layout.mesh, "tp"):
        for fqn, stored in layout.stored.items():
            held = [(rank, records[rank][fqn]) for rank in group if fqn in records[rank]]
            for rank, record in held:
                expected = part_shape(stored.shape, record.part)
                if record.shape != expected:
                    yield Violation("complete", rank, fqn, f"shape {expected}", f"shape {record.shape}", REPORT_IT)
            how = {rank: f"cut along dim {part.dim}" if (part := record.part) else "not cut" for rank, record in held}
            yield from outvoted("complete", fqn, how, REPORT_IT) if how else ()
            parts = {rank: record.part for rank, record in held if record.part is not None}
            if parts and len(set(how.values())) == 1:
                yield from _tiles(fqn, group, parts)


def _tiles(fqn: str, group: Sequence[int], parts: Mapping[int, TensorSlice]) -> Iterator[Violation]:
    """Of a gap or an overlap, the ranks whose parts are not their own, or else the one at which it shows."""
    any_part = next(iter(parts.values()))
    spans = sorted((span, rank) for rank, part in parts.items() for span in part.ranges)
    at = 0
    for (start, stop), shows in [*spans, ((any_part.full_size, 0), min(parts))]:
        if start != at:
            low, high = sorted((start, at))
            found = f"[{low}, {high}) of dim {any_part.dim} held {'twice' if start < at else 'by nobody'}"
            for rank in _with_anothers_part(group, parts) or [shows]:
                yield Violation("complete", rank, fqn, "every element held once", found, REPORT_IT)
            return
        at = stop


def _with_anothers_part(group: Sequence[int], parts: Mapping[int, TensorSlice]) -> list[int]:
    """Every rank of `group` has its own share of each section, and all shares are alike in size; empty: not known."""
    sizes = common({rank: tuple(stop - start for start, stop in part.ranges) for rank, part in parts.items()})
    if not isinstance(sizes, tuple):
        return []
    begins = [len(group) * before for before in accumulate(sizes, initial=0)][: len(sizes)]
    shares = list(zip(begins, sizes, strict=True))
    own = {
        rank: tuple((begin + place * size, begin + (place + 1) * size) for begin, size in shares)
        for place, rank in enumerate(group)
    }
    return [rank for rank, part in parts.items() if part.ranges != own[rank]]


def _shards_cover(plan: RunPlan, by_rank: dict[int, RankReport]) -> Iterator[Violation]:
    """The shards of a group tile every block, in group order: that is the order of the all-gather."""
    sizes = {block.name: block.layout.slot_bytes for block in plan.memory.blocks}
    held = {block.name: block.held_bytes for block in plan.memory.blocks}
    for group in _groups(plan.layout.mesh, "weights"):
        for index, rank in enumerate(group):
            for home in by_rank[rank].homes:
                if home.block not in sizes:
                    continue  # same-schedule says so
                expected = (0, sizes[home.block])
                if home.home.sharded:
                    expected = shard_range(sizes[home.block], len(group), index)
                found = (home.start, home.stop)
                if found != expected:
                    where = plan.memory.tensor_at(home.block, home.start)
                    of_block = f"of block {home.block}"
                    yield Violation(
                        "complete", rank, where, f"bytes {expected} {of_block}", f"bytes {found} {of_block}", REPORT_IT
                    )
                elif home.rest is not None and home.rest.nbytes != held[home.block]:
                    wanted, rests = f"{held[home.block]} bytes at rest", f"{home.rest.nbytes} bytes"
                    yield Violation("complete", rank, home.block, wanted, rests, REPORT_IT)


def same_bits(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every block rests in the plan's code, and ranks that hold the same part of it have encoded it alike."""
    codes = {block.name: block.codec.name for block in plan.memory.blocks}
    tables: dict[tuple[str, int, int, int], dict[int, int]] = defaultdict(dict)
    for report in reports:
        tp = plan.layout.mesh.coordinates(report.rank)["tp"]
        for home in report.homes:
            if (code := codes.get(home.block, home.code)) != home.code:
                yield Violation("same-bits", report.rank, home.block, f"code {code}", f"code {home.code}", REPORT_IT)
            tables[home.block, tp, home.start, home.stop][report.rank] = home.tables
    for (block, *_), found in tables.items():
        yield from outvoted("same-bits", f"{block}: windows and escapes", found, _ENCODED_ALIKE)


def _replicas_agree(reports: Sequence[RankReport]) -> Iterator[Violation]:
    """The same part of a tensor was compared with the same bytes, wherever they were read."""
    sums: dict[tuple[str, TensorSlice | None], dict[int, int]] = defaultdict(dict)
    for report in reports:
        parts = {record.fqn: record.part for record in report.tensors}
        for arrival in report.arrivals:
            sums[arrival.fqn, parts.get(arrival.fqn)][report.rank] = arrival.expected
    for (fqn, _), holders in sums.items():
        yield from outvoted("complete", fqn, holders, _OTHER_FILE)


def all_compared(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Once all blocks were streamed: each tensor was compared with the checkpoint when it had come to the device."""
    inside = [
        (f"{block.name}.{entry.name}", {f"{block.name}.{name}" for name in entry.names})
        for block in plan.memory.blocks
        for entry in block.layout.entries
        if entry.nbytes
    ]
    for report in reports:
        compared = {record.fqn for record in report.arrivals}
        for fqn, names in [*inside, *((fqn, {fqn}) for fqn in plan.memory.outside)]:
            if compared.isdisjoint(names):
                expected = "compared with the checkpoint on arrival"
                yield Violation("complete", report.rank, fqn, expected, "it was not", REPORT_IT)


class Held(Protocol):
    """What a rank tells of its weights in a request."""

    @property
    def rank(self) -> int: ...

    @property
    def weights(self) -> WeightsRecord: ...


def arrives(plan: RunPlan, results: Sequence[Held]) -> Iterator[Violation]:
    """What was computed with is what first arrived, in every step. Of each rank, the first step in which it was not."""
    resting = {(result.rank, wrong.block) for result in results for wrong in result.weights.wrong if wrong.at_rest}
    for result in results:
        for file in result.weights.files:
            expected, found = "the file that the model was loaded from", "it was changed while in use"
            yield Violation("arrives", result.rank, file, expected, found, _FILE)
        for name in result.weights.changed:
            expected, found = "the bytes that it had after the load", "others at the request's end"
            yield Violation("arrives", result.rank, name, expected, found, _NOT_AT_REST)
        first = min((wrong.step for wrong in result.weights.wrong), default=0)
        for wrong in result.weights.wrong:
            if wrong.step == first and not _is_of_another(plan, result.rank, wrong, resting):
                yield _not_as_first(plan, result.rank, wrong)


def _is_of_another(plan: RunPlan, rank: int, wrong: WrongBytes, resting: Collection[tuple[int, str]]) -> bool:
    """Whether it came with the part that another rank of the shard group holds."""
    block = next((block for block in plan.memory.blocks if block.name == wrong.block), None)
    if wrong.at_rest or block is None or not block.home.sharded:
        return False
    return any((other, wrong.block) in resting for other in plan.layout.mesh.groups(rank)["weights"])


def _not_as_first(plan: RunPlan, rank: int, wrong: WrongBytes) -> Violation:
    expected = "the bytes of its first arrival"
    if not wrong.step:
        return Violation("arrives", rank, wrong.block, expected, "others after its use", _NOT_AT_REST)
    where = f"step {wrong.step}: {wrong.at_rest or wrong.block}"
    if wrong.at_rest:
        block = next(block for block in plan.memory.blocks if block.name == wrong.block)
        found = f"others, and not the file's where it rests ({block.home})"
        return Violation("arrives", rank, where, expected, found, _NOT_AT_REST)
    return Violation("arrives", rank, where, expected, "others when it had computed", _ON_THE_WAY)


def all_equal(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Every tensor that was compared so far was equal to the checkpoint's, which is the same on all ranks."""
    yield from _replicas_agree(reports)
    for report in reports:
        for arrival in report.arrivals:
            if arrival.found == arrival.expected:
                continue
            stored = plan.layout.stored.get(arrival.fqn)
            origin = f"of {stored.file.name}" if stored is not None else "that the model computes"
            if arrival.fqn not in plan.layout.dtypes:
                origin = "of its file"
            expected = f"the bytes {origin} (checksum {arrival.expected:#010x} of {arrival.nbytes} bytes)"
            found = f"{arrival.found:#010x} {_where(plan.memory, arrival.fqn)}"
            yield Violation("complete", report.rank, arrival.fqn, expected, found, _WRONG_BYTES)


def _where(memory: MemoryPlan, fqn: str) -> str:
    block = memory.owner_of(fqn)
    if block is None:
        return "on the device"
    place = "the memory of" if block.slot is None else f"slot {block.slot} after loading"
    return f"in {place} block {block.name} from {block.home}"


def _groups(mesh: MeshShape, name: str) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(mesh.groups(rank)[name] for rank in range(mesh.world_size)))
