"""no-alias: no bytes belong to two blocks, or to a block and the resident part. Judged by address, not by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import REPORT_IT, MemorySpan, RankReport, TensorRecord

_CHECK = "no-alias"
_OUTSIDE_REMEDY = "give it memory of its own: what is loaded there for a block would change it"
_PLAIN_REMEDY = "tie it by name as a parameter or buffer, or make it a copy: streaming moves what is behind it"


@dataclass(frozen=True)
class _Claim:
    """Bytes that somebody has for himself.

    Kinds: a slot; the memory of a block that `stays` on the device; the bytes of a block at `rest`; a tensor that is
    resident `outside`; a `stray` one, which is a block's but not in its memory; a `plain` attribute.
    """

    kind: Literal["slot", "stays", "rest", "outside", "stray", "plain"]
    name: str
    span: MemorySpan
    block: str | None = None

    @property
    def is_tensor(self) -> bool:
        return self.kind in ("outside", "stray", "plain")


def no_alias(plan: RunPlan, reports: Sequence[RankReport]) -> Iterator[Violation]:
    """Blocks share memory with each other only through a slot, and with the part outside never."""
    for report in reports:
        yield from _claims_are_disjoint(plan.memory, report)
        yield from _entries_are_disjoint(plan.memory, report)


def _claims_are_disjoint(memory: MemoryPlan, report: RankReport) -> Iterator[Violation]:
    moving = {block.name for block in memory.blocks if block.home.streamed}
    for one, other in _overlapping(_claims(memory, report)):
        if not _may_share(one, other, moving):
            yield _violation(report, one, other)


def _claims(memory: MemoryPlan, report: RankReport) -> list[_Claim]:
    claims = [_Claim("slot", f"slot {number}", span) for number, span in enumerate(report.slots)]
    for home in report.homes:
        if home.stays is not None:
            claims.append(_Claim("stays", f"the memory of {home.block}", home.stays, home.block))
        if home.rest is not None and home.home.streamed:
            claims.append(_Claim("rest", f"{home.block} at rest", home.rest, home.block))
    held = _memory_of_blocks(memory, report)
    for record in report.tensors:
        block = memory.owner_of(record.fqn)
        if record.span is None:
            continue
        if block is None:
            claims.append(_Claim("outside", record.fqn, record.span))
        elif block.name not in held or not held[block.name].holds(record.span):
            claims.append(_Claim("stray", record.fqn, record.span, block.name))
    claims += [_Claim("plain", record.fqn, record.span) for record in report.plain if record.span is not None]
    return claims


def _memory_of_blocks(memory: MemoryPlan, report: RankReport) -> dict[str, MemorySpan]:
    """Block -> the device memory that its tensors should lie in."""
    slots, own = report.slots, {home.block: home.stays for home in report.homes if home.stays is not None}
    shared = {b.name: slots[b.slot] for b in memory.streamed if b.slot is not None and b.slot < len(slots)}
    return own | shared


def _may_share(one: _Claim, other: _Claim, moving: set[str]) -> bool:
    """Whether bytes in common are right. `moving`: the blocks that are streamed."""
    kinds = {one.kind, other.kind}
    if kinds == {"outside"}:
        return (
            one.span == other.span
        )  # tied: one tensor under two names; that it has the right bytes, `complete` proves
    if "plain" in kinds:
        place = other if one.kind == "plain" else one
        return place.kind in ("plain", "outside", "stray") or (place.kind == "stays" and place.block not in moving)
    if "stray" in kinds:  # not where it should be, says single-owner; here: does it harm another?
        return one.block is not None and one.block == other.block
    return False


def _violation(report: RankReport, one: _Claim, other: _Claim) -> Violation:
    """Names a parameter wherever there is one."""
    culprit, victim = (one, other) if one.is_tensor and one.kind != "outside" else (other, one)
    if victim.is_tensor and not culprit.is_tensor:
        culprit, victim = victim, culprit
    common = culprit.span.common_bytes(victim.span)
    there = victim.name if victim.is_tensor else f"{victim.name}{_tensor_there(report, culprit.span, culprit.name)}"
    remedy = {"outside": _OUTSIDE_REMEDY, "plain": _PLAIN_REMEDY}.get(culprit.kind, REPORT_IT)
    where = culprit.name if culprit.is_tensor else f"{culprit.name}{_tensor_there(report, victim.span)}"
    return Violation(_CHECK, report.rank, where, "bytes of its own", f"{common} bytes shared with {there}", remedy)


def _tensor_there(report: RankReport, span: MemorySpan, besides: str = "") -> str:
    """` (holds layers.0.norm.weight)`: the first parameter, by address, of those that lie there `besides` one."""
    there = [r for r in report.tensors if r.place != "outside" and r.fqn != besides]
    inside = [r for r in there if r.span is not None and r.span.common_bytes(span)]
    first = min(inside, key=lambda record: (record.offset, record.fqn), default=None)
    return "" if first is None else f" (holds {first.fqn})"


def _entries_are_disjoint(memory: MemoryPlan, report: RankReport) -> Iterator[Violation]:
    """Two names of one block have bytes in common only where they are one tensor of its layout."""
    records: dict[str, list[TensorRecord]] = {}
    for record in report.tensors:
        block = memory.owner_of(record.fqn)
        if block is not None:
            records.setdefault(block.name, []).append(record)
    for block in memory.blocks:
        entry_of = {f"{block.name}.{name}": entry for entry in block.layout.entries for name in entry.names}
        held = [_Claim("stray", r.fqn, r.span, block.name) for r in records.get(block.name, ()) if r.span is not None]
        for one, other in _overlapping(held):
            tied = one.name in entry_of and entry_of[one.name] is entry_of.get(other.name)
            if not tied and one.name != other.name:
                found = f"{one.span.common_bytes(other.span)} bytes shared with {one.name}, which it is not tied to"
                yield Violation(_CHECK, report.rank, other.name, "bytes of its own", found, REPORT_IT)


def _overlapping(claims: Sequence[_Claim]) -> Iterator[tuple[_Claim, _Claim]]:
    """Every two that have a byte in common, the one that begins first, first."""
    open_ended: list[_Claim] = []
    for claim in sorted(claims, key=lambda claim: (claim.span.start, claim.name)):
        open_ended = [earlier for earlier in open_ended if earlier.span.stop > claim.span.start]
        yield from ((earlier, claim) for earlier in open_ended)
        open_ended.append(claim)
