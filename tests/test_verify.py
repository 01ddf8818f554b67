"""The composition contract, broken on purpose: real reports of real gangs, with one fault planted in each.

Every fault must be caught by the check that is responsible, with the rank and the tensor or block in the message; and
there is no false alarm on any healthy layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crossdock.launch.engine.engine import Engine
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.numbers import PROBE_CHECKS
from crossdock.runtime.contract.ordering import trace_in_order
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.contract.verify import CHECKS, STEP_CHECKS, verify_composition
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.inspection import checksum, foreign_hooks
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import ArrivalRecord, HomeRecord, MemorySpan, RankReport, TensorRecord
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES, LAYOUTS
from tiers import thorough

Healthy = tuple[RunPlan, tuple[RankReport, ...]]
BAD = 1
"""The rank on which faults are planted."""


@pytest.fixture(scope="module")
def healthy(gang_of: Callable[[int], Gang], checkpoints: dict[str, Path]) -> Callable[[str, str], Healthy]:
    """(layout, family) -> the plan and what the ranks really report."""
    known: dict[tuple[str, str], Healthy] = {}

    def healthy(name: str, family: str = "z-image") -> Healthy:
        if (name, family) not in known:
            config = load_config(next(layout for layout in LAYOUTS if layout.name == name).config)
            with Engine.start(config, checkpoints[family], gang_of(config.world_size), rehearse=True) as engine:
                known[name, family] = engine.plan, tuple(engine.gang.collective_rpc(RankWorker.report, timeout_s=60))
        return known[name, family]

    return healthy


@thorough  # of every family and layout that the matrix loads it sees the same
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
def test_no_false_alarm(name: str, family: str, healthy: Callable[[str, str], Healthy]) -> None:
    plan, reports = healthy(name, family)
    assert verify_composition(plan, reports) == []


# -- faults: each takes the bad rank's healthy report and returns a broken one ---------------------------------------


def _swap(items: Sequence[Any], i: int, j: int) -> tuple[Any, ...]:
    swapped = list(items)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    return tuple(swapped)


def _home(report: RankReport, index: int, **changes: Any) -> RankReport:
    homes = list(report.homes)
    homes[index] = replace(homes[index], **changes)
    return replace(report, homes=tuple(homes))


def _tensor(report: RankReport, fqn: str, **changes: Any) -> RankReport:
    assert any(record.fqn == fqn for record in report.tensors), fqn
    change = lambda record: replace(record, **changes) if record.fqn == fqn else record  # noqa: E731
    return replace(report, tensors=tuple(change(record) for record in report.tensors))


def _record(report: RankReport, fqn: str) -> TensorRecord:
    return next(record for record in report.tensors if record.fqn == fqn)


def _events(report: RankReport, kinds: Sequence[str]) -> RankReport:
    """The rehearsal with the first block's events replaced by `kinds`; "other:kind" is another block's event."""
    first = report.trace[0]
    other = next(event.block for event in report.trace if event.slot == first.slot and event.block != first.block)
    events = [
        replace(first, sequence=number, kind=kind.split(":")[-1], block=other if ":" in kind else first.block)
        for number, kind in enumerate(kinds)
    ]
    return replace(report, trace=tuple(events) + tuple(e for e in report.trace if e.slot != first.slot))


def _slot(report: RankReport) -> int:
    """Of the block of CUT."""
    return int(_record(report, CUT).place.removeprefix("slot "))


def _slice_of_rank_0(report: RankReport) -> RankReport:
    part = _record(report, CUT).part
    assert part is not None
    size = part.size
    return _tensor(report, CUT, part=TensorSlice(part.dim, ((0, size),), part.full_size))


def _gap(report: RankReport) -> RankReport:
    part = _record(report, CUT).part
    assert part is not None
    (start, stop) = part.ranges[0]
    return _tensor(report, CUT, part=replace(part, ranges=((start + 1, stop),)))


def _over(span: MemorySpan | None) -> MemorySpan:
    """Begins where `span` does, and is no longer than its first bytes."""
    assert span is not None
    return MemorySpan(span.start, span.start + 4)


def _less_at_rest(report: RankReport) -> RankReport:
    rest = report.homes[0].rest
    assert rest is not None
    return _home(report, 0, rest=replace(rest, stop=rest.stop - 256))


def _astride(span: MemorySpan | None) -> MemorySpan:
    """Ends inside of `span`."""
    assert span is not None
    return MemorySpan(span.start - 64, span.start + 4)


def _at_rest(report: RankReport) -> RankReport:
    return _home(report, 1, rest=report.homes[0].rest)


def _read_from_the_next(report: RankReport) -> RankReport:
    index = next(i for i, home in enumerate(report.homes) if CUT.startswith(f"{home.block}."))
    return _home(report, index, read=report.homes[index + 1].read)


def _kept(report: RankReport) -> RankReport:
    """One weight of a block has memory of its own beside the slots."""
    span = _record(report, CUT).span
    assert span is not None
    return _tensor(report, CUT, place="outside", offset=0, span=MemorySpan(span.start + 2**40, span.stop + 2**40))


def _arrived(report: RankReport, fqn: str, file: int = 0) -> RankReport:
    """The bytes of one tensor came wrong, or (`file`) from a file that has others."""

    def change(record: ArrivalRecord) -> ArrivalRecord:
        if record.fqn != fqn:
            return record
        return replace(record, expected=record.expected ^ file, found=record.found ^ 1)

    return replace(report, arrivals=tuple(map(change, report.arrivals)))


def _device_bytes(report: RankReport, **changes: Any) -> RankReport:
    return replace(report, device_bytes=replace(report.device_bytes, **changes))


def _plain(report: RankReport, **changes: Any) -> RankReport:
    record = replace(_record(report, OUTSIDE), fqn=PLAIN, span=None)
    return replace(report, plain=(*report.plain, replace(record, **changes)))


CUT = "layers.1.attention.to_q.weight"
NORM = "layers.1.attention_norm1.weight"
OUTSIDE = "x_pad_token"
PLAIN = "layers.2.attention.cache"


@dataclass(frozen=True)
class Fault:
    """`plant` breaks a report; `check` must catch it and say `text`; on these layouts."""

    name: str
    check: str
    text: str
    plant: Callable[[RankReport], RankReport]
    layouts: tuple[str, ...]


STREAMED = ("layerwise_tp2", "layerwise_hsdp", "layerwise_ulysses2_ring2")
ANY = (*STREAMED, "hsdp", "tp2")
UNCUT = ("layerwise_hsdp", "layerwise_ulysses2_ring2", "hsdp")
FAULTS = (
    Fault(
        "blocks swapped",
        "same-schedule",
        "noise_refiner.1: expected streamed in place 1",
        lambda r: replace(r, order=_swap(r.order, 1, 2)),
        STREAMED,
    ),
    Fault(
        "block left out",
        "same-schedule",
        "streamed in place 8, found nothing",
        lambda r: replace(r, order=r.order[:-1]),
        STREAMED,
    ),
    Fault("another slot", "same-schedule", "noise_refiner.0", lambda r: _home(r, 0, slot=2), STREAMED),
    Fault(
        "other slot sizes",
        "same-schedule",
        "slot 2 (of context",
        lambda r: replace(r, slot_bytes=(1, 2)),
        STREAMED,
    ),
    Fault("another block size", "same-schedule", "noise_refiner.1", lambda r: _home(r, 1, slot_bytes=1), STREAMED),
    Fault("homes swapped", "same-schedule", "layers", lambda r: replace(r, homes=_swap(r.homes, 4, 5)), ANY),
    Fault("left on meta", "single-owner", OUTSIDE, partial(_tensor, fqn=OUTSIDE, device="meta", place="nowhere"), ANY),
    Fault("off the device", "single-owner", OUTSIDE, partial(_tensor, fqn=OUTSIDE, device="cuda:0"), ANY),
    Fault(
        "tensor missing",
        "single-owner",
        OUTSIDE,
        lambda r: replace(r, tensors=tuple(t for t in r.tensors if t.fqn != OUTSIDE)),
        ANY,
    ),
    Fault(
        "tensor twice", "single-owner", OUTSIDE, lambda r: replace(r, tensors=(*r.tensors, _record(r, OUTSIDE))), ANY
    ),
    Fault(
        "unplanned tensor",
        "single-owner",
        "extra",
        lambda r: replace(r, tensors=(*r.tensors, replace(r.tensors[0], fqn="extra"))),
        ANY,
    ),
    Fault("wrong dtype", "single-owner", NORM, partial(_tensor, fqn=NORM, dtype="torch.float16"), ANY),
    Fault("bound to another slot", "single-owner", CUT, partial(_tensor, fqn=CUT, place="slot 9"), ANY),
    Fault("bound to another offset", "single-owner", CUT, partial(_tensor, fqn=CUT, offset=12345), ANY),
    Fault("private copy", "single-owner", CUT, partial(_tensor, fqn=CUT, place="outside", offset=0), ANY),
    Fault(
        "foreign hook",
        "single-owner",
        "accelerate",
        lambda r: replace(r, foreign_hooks=(("layers.0", "an accelerate hook"),)),
        ANY,
    ),
    Fault(
        "plain tensor off the device", "single-owner", "layers.2.attention.cache", partial(_plain, device="cuda:0"), ANY
    ),
    Fault("plain tensor on meta", "single-owner", "layers.2.attention.cache", partial(_plain, device="meta"), ANY),
    Fault(
        "all blocks on the device",
        "single-owner",
        "bytes of weights on the device, found 12",
        partial(_device_bytes, weights=120000000),
        ANY,
    ),
    Fault(
        "shards of all on one device",
        "single-owner",
        "bytes of weights",
        lambda r: _device_bytes(r, shards=2 * r.device_bytes.shards),
        ("hsdp",),
    ),
    Fault(
        "hidden copy on the device",
        "single-owner",
        "found 123456789 bytes",
        partial(_device_bytes, allocated=123456789),
        ANY,
    ),
    Fault("never freed", "single-owner", f"elsewhere that are never freed, of {CUT} first", _kept, STREAMED),
    Fault("read from a copy", "single-owner", "a second copy", lambda r: _home(r, 1, read=(r.slots[0],)), STREAMED),
    Fault(
        "read from another block", "single-owner", CUT.partition(".att")[0], _read_from_the_next, (*STREAMED, "hsdp")
    ),
    Fault("never read", "single-owner", "never read", lambda r: _home(r, 1, read=()), (*STREAMED, "hsdp")),
    Fault(
        "another code",
        "same-bits",
        "noise_refiner.0: expected code none, found code x",
        lambda r: _home(r, 0, code="x"),
        ANY,
    ),
    Fault(
        "other tables",
        "same-bits",
        "noise_refiner.0: windows and escapes: expected checksum 0x0",
        lambda r: _home(r, 0, tables=7),
        ("layerwise_ulysses2_ring2",),
    ),
    Fault("outside in a slot", "no-alias", OUTSIDE, lambda r: _tensor(r, OUTSIDE, span=_over(r.slots[1])), STREAMED),
    Fault(
        "outside over a weight",
        "no-alias",
        ".attention.to_q.weight",
        lambda r: _tensor(r, OUTSIDE, span=_record(r, CUT).span),
        ANY,
    ),
    Fault(
        "outside tensors overlap",
        "no-alias",
        OUTSIDE,
        lambda r: _tensor(r, OUTSIDE, span=_astride(_record(r, "cap_pad_token").span)),
        ANY,
    ),
    Fault("two blocks at rest in one place", "no-alias", "noise_refiner.1 at rest", _at_rest, (*STREAMED, "hsdp")),
    Fault(
        "at rest in a slot",
        "no-alias",
        "noise_refiner.0 at rest",
        lambda r: _home(r, 0, rest=_astride(r.slots[2])),
        STREAMED,
    ),
    Fault(
        "resident blocks overlap",
        "no-alias",
        "noise_refiner.1",
        lambda r: _home(r, 1, stays=_astride(r.homes[0].stays)),
        ("tp2",),
    ),
    Fault(
        "slots overlap",
        "no-alias",
        "slot 1",
        lambda r: replace(r, slots=(r.slots[0], _astride(r.slots[0]), *r.slots[2:])),
        STREAMED,
    ),
    Fault(
        "bound across two slots",
        "no-alias",
        CUT,
        lambda r: _tensor(r, CUT, span=_over(r.slots[(_slot(r) + 1) % 3])),
        STREAMED,
    ),
    Fault(
        "two tensors of a block overlap",
        "no-alias",
        NORM,
        lambda r: _tensor(r, NORM, span=_over(_record(r, CUT).span)),
        ANY,
    ),
    Fault(
        "plain tensor in a slot",
        "no-alias",
        PLAIN,
        lambda r: _plain(r, span=_over(_record(r, CUT).span)),
        (*STREAMED, "hsdp"),
    ),
    Fault(
        "plain tensor over bytes at rest",
        "no-alias",
        PLAIN,
        lambda r: _plain(r, span=_over(r.homes[3].rest)),
        (*STREAMED, "hsdp"),
    ),
    Fault("other bytes arrived", "complete", CUT, partial(_arrived, fqn=CUT), ANY),
    Fault("other bytes outside", "complete", OUTSIDE, partial(_arrived, fqn=OUTSIDE), ANY),
    Fault(
        "arrival not compared",
        "complete",
        NORM,
        lambda r: replace(r, arrivals=tuple(a for a in r.arrivals if a.fqn != NORM)),
        ANY,
    ),
    Fault("slice of another rank", "complete", CUT, _slice_of_rank_0, ("layerwise_tp2", "tp2")),
    Fault("gap in a slice", "complete", CUT, _gap, ("layerwise_tp2", "tp2")),
    Fault("not cut", "complete", CUT, partial(_tensor, fqn=CUT, part=None), ("layerwise_tp2", "tp2")),
    Fault("wrong shape", "complete", NORM, partial(_tensor, fqn=NORM, shape=(3,)), ANY),
    Fault(
        "shard of another rank",
        "complete",
        "noise_refiner.0",
        lambda r: _home(r, 0, start=0, stop=r.homes[0].slot_bytes // 2),
        ("hsdp", "layerwise_hsdp"),
    ),
    Fault("less at rest", "complete", "noise_refiner.0", _less_at_rest, ANY),
    Fault("half a block", "complete", "noise_refiner.0", lambda r: _home(r, 0, stop=8), ("layerwise_ulysses2_ring2",)),
    Fault("another file", "complete", NORM, partial(_arrived, fqn=NORM, file=1), ANY),
    Fault("another file of what is cut", "complete", CUT, partial(_arrived, fqn=CUT, file=1), UNCUT),
    Fault("another file outside", "complete", OUTSIDE, partial(_arrived, fqn=OUTSIDE, file=1), ANY),
    Fault("not rehearsed", "in-order", "not", lambda r: replace(r, trace=()), STREAMED),
    Fault(
        "computed too early",
        "in-order",
        "its own bytes",
        partial(_events, kinds=("load_begin", "compute_begin", "load_end", "compute_end")),
        ("layerwise_tp2",),
    ),
    Fault(
        "overwritten under its reader",
        "in-order",
        "the slot's last block",
        partial(_events, kinds=("load_begin", "load_end", "compute_begin", "other:load_begin", "compute_end")),
        ("layerwise_tp2",),
    ),
    Fault(
        "another block computed",
        "in-order",
        "its own bytes",
        partial(_events, kinds=("load_begin", "load_end", "other:compute_begin", "other:compute_end")),
        ("layerwise_tp2",),
    ),
    Fault(
        "end without begin",
        "in-order",
        "compute_begin",
        partial(_events, kinds=("load_begin", "load_end", "compute_end")),
        ("layerwise_tp2",),
    ),
    Fault(
        "gathered before its shard",
        "in-order",
        "its own shard",
        partial(
            _events, kinds=("load_begin", "gather_begin", "load_end", "gather_end", "compute_begin", "compute_end")
        ),
        ("layerwise_hsdp",),
    ),
    Fault(
        "shard of another block gathered",
        "in-order",
        "its own shard",
        partial(
            _events,
            kinds=("other:load_begin", "other:load_end", "gather_begin", "gather_end", "compute_begin", "compute_end"),
        ),
        ("layerwise_hsdp",),
    ),
    Fault(
        "computed before the gather",
        "in-order",
        "its own bytes",
        partial(_events, kinds=("load_begin", "load_end", "compute_begin", "compute_end")),
        ("layerwise_hsdp",),
    ),
    Fault(
        "more slots than the window",
        "in-order",
        "a window of 3 slots, found 4",
        lambda r: replace(r, trace=(*r.trace, *(replace(e, slot=7) for e in r.trace[:2]))),
        STREAMED,
    ),
)


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        pytest.param(fault, layout, id=f"{fault.name.replace(' ', '-')}-{layout}")
        for fault in FAULTS
        for layout in fault.layouts
    ],
)
def test_planted_fault_is_caught(fault: Fault, layout: str, healthy: Callable[[str], Healthy]) -> None:
    plan, reports = healthy(layout)
    broken = [fault.plant(report) if report.rank == BAD else report for report in reports]
    assert broken[BAD] != reports[BAD], "nothing was planted"
    violations = verify_composition(plan, broken)
    assert fault.check in {violation.check for violation in violations}
    mine = [str(violation) for violation in violations if violation.check == fault.check]
    assert any(fault.text in text for text in mine), mine
    assert any(f"rank {BAD}" in text for text in mine), mine
    assert all("expected" in text and "found" in text for text in mine)


def test_tied_and_plain_names_of_resident_tensors_are_no_alias(healthy: Callable[[str], Healthy]) -> None:
    """Two names of one tensor that never moves: outside the blocks, or a plain attribute of a resident block."""
    plan, reports = healthy("tp2")
    rank_0 = reports[0]
    tied = _tensor(rank_0, OUTSIDE, span=_record(rank_0, "cap_pad_token").span)
    noted = _plain(rank_0, span=_record(rank_0, CUT).span)
    for report in (tied, noted):
        assert verify_composition(plan, [report, reports[1]]) == []


def test_a_missing_rank_is_a_violation(healthy: Callable[[str], Healthy]) -> None:
    plan, reports = healthy("layerwise_tp2")
    assert verify_composition(plan, reports[:1])
    assert verify_composition(plan, [])


def test_a_request_is_reviewed_with_the_same_rule(healthy: Callable[[str], Healthy]) -> None:
    plan, reports = healthy("layerwise_tp2")
    trace = reports[0].trace
    assert list(trace_in_order(plan.memory, 0, trace)) == []
    without_load = [event for event in trace if not event.kind.startswith("load")]
    assert list(trace_in_order(plan.memory, 0, without_load))


def test_the_coordinator_fails_closed(healthy: Callable[[str], Healthy]) -> None:
    """The error lists what is broken, and the verdict for report.json says which check."""
    plan, reports = healthy("layerwise_tp2")
    coordinator = Coordinator(plan)
    coordinator.admit(reports)
    to_come = ["no step yet"] * len(STEP_CHECKS) + ["not probed"] * len(PROBE_CHECKS)
    assert [row["status"] for row in coordinator.composition] == ["holds"] * len(CHECKS) + to_come
    broken = [_tensor(reports[0], OUTSIDE, device="meta", place="nowhere"), reports[1]]
    with pytest.raises(CompositionError, match=rf"single-owner: rank 0: {OUTSIDE}: expected on cpu, found on meta"):
        coordinator.admit(broken)
    assert {row["check"]: row["status"] for row in coordinator.composition}["single-owner"] == "violated"
    with pytest.raises(CompositionError):
        coordinator.admit([])


def test_foreign_mechanisms_are_seen() -> None:
    """Pitfalls 1, 2 and 4: an accelerate hook, FSDP and DTensor parameters would own the same weights."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert foreign_hooks(model) == ()
    add_hook_to_module(model[0], ModelHook())
    model[1].weight = nn.Parameter(torch.Tensor._make_subclass(_Subclass, torch.ones(2, 2)))
    assert [what for _, what in foreign_hooks(model)] == ["an accelerate hook (ModelHook)", "a _Subclass"]


class _Subclass(torch.Tensor):
    """Stands for a DTensor, which needs a process group."""


def test_checksum_sees_order_and_every_byte() -> None:
    """Sums alone would not see two swapped rows."""
    torch.manual_seed(0)
    tensor = torch.randn(1003, 7)
    same = checksum(tensor)
    assert checksum(tensor.clone()) == same
    assert checksum(tensor[torch.randperm(1003)]) != same
    for place in (0, 500, 1002):
        changed = tensor.clone()
        changed[place, 6] += 1e-6
        assert checksum(changed) != same
    assert checksum(tensor.bfloat16()) != checksum(tensor.half())
    assert isinstance(checksum(torch.zeros(0)), int)


def test_home_records_are_what_they_say(healthy: Callable[[str], Healthy]) -> None:
    """The reports that the faults are planted in are not empty: every block, every tensor, both ranks."""
    plan, reports = healthy("layerwise_tp2")
    for report in reports:
        assert len(report.homes) == len(plan.memory.blocks) == 9
        assert {record.fqn for record in report.tensors} == set(plan.layout.dtypes)
        assert all(isinstance(home, HomeRecord) for home in report.homes)
