"""Who is named where ranks differ: the one that is alone, not the one that is compared; of two, both."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crossdock.parallel.mesh import MeshShape
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.contract.coverage import _replicas_agree, _slices_cover
from crossdock.runtime.contract.numbers import same_numbers
from crossdock.runtime.contract.result import Violation, outvoted, to_compare
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.reports.records import ArrivalRecord, ProbeReport, RankReport

WEIGHT = "blocks.0.ff.weight"


@pytest.mark.parametrize("bad", range(3))
def test_most_ranks_are_right(bad: int) -> None:
    found = {rank: 7 if rank == bad else 9 for rank in range(3)}
    assert to_compare(found) == {bad: 1 if bad == 0 else 0}
    (violation,) = outvoted("complete", "there", found, "do")
    agree = ", ".join(str(rank) for rank in range(3) if rank != bad)
    assert (violation.rank, violation.expected) == (bad, f"checksum 0x9, as on ranks {agree}")
    assert violation.found == "checksum 0x7"


def test_nobody_is_known_to_be_right() -> None:
    """Of two ranks, of four in two camps, of three that all differ; and where all agree."""
    assert to_compare({0: "a", 1: "b"}) == {0: 1, 1: 0}
    assert to_compare({0: "a", 1: "a", 2: "b", 3: "b"}) == {0: 2, 1: 2, 2: 0, 3: 0}
    assert to_compare({0: "a", 1: "b", 2: "c"}) == {0: 1, 1: 0, 2: 0}
    assert to_compare({0: "a", 1: "a"}) == to_compare({0: "a"}) == {}
    found = [violation.rank for violation in outvoted("complete", "there", {0: "a", 1: "b"}, "do")]
    assert found == [0, 1]


def _arrived(checksums: Sequence[int]) -> list[RankReport]:
    report = lambda rank, expected: SimpleNamespace(  # noqa: E731
        rank=rank, tensors=(), arrivals=(ArrivalRecord(WEIGHT, 4, expected, expected),)
    )
    return [cast(RankReport, report(rank, expected)) for rank, expected in enumerate(checksums)]


@pytest.mark.parametrize(
    ("checksums", "named"),
    [((1, 1, 1), []), ((2, 1, 1), [0]), ((1, 1, 2), [2]), ((1, 2), [0, 1]), ((1, 2, 3), [0, 1, 2])],
)
def test_another_checkpoint(checksums: Sequence[int], named: list[int]) -> None:
    """The files of one node differ; of two, nobody knows which is the right one."""
    assert [violation.rank for violation in _replicas_agree(_arrived(checksums))] == named


def _cut(parts: Sequence[TensorSlice | None]) -> list[Violation]:
    """What is told of a weight `[12, 8]` of which each rank holds a part."""
    full = (12, 8)
    records = {
        rank: SimpleNamespace(
            tensors=[
                SimpleNamespace(
                    fqn=WEIGHT,
                    part=part,
                    shape=full if part is None else (part.size, 8) if part.dim == 0 else (12, part.size),
                )
            ]
        )
        for rank, part in enumerate(parts)
    }
    layout = SimpleNamespace(mesh=MeshShape(tp=len(parts)), stored={WEIGHT: SimpleNamespace(shape=full)})
    return list(_slices_cover(cast(ModelLayout, layout), cast(Any, records)))


def _part(rank: int, dim: int = 0) -> TensorSlice:
    """Of three ranks, in a projection of two sections, or along the other dim."""
    if dim:
        return TensorSlice(1, ((rank, rank + 1),), 3)
    return TensorSlice(0, ((2 * rank, 2 * rank + 2), (6 + 2 * rank, 8 + 2 * rank)), 12)


@pytest.mark.parametrize("bad", range(3))
def test_parts_of_a_tensor(bad: int) -> None:
    """Not cut, cut along another dim, another rank's part, a part too short: that rank, wherever the gap shows."""
    right = [_part(rank) for rank in range(3)]
    assert _cut(right) == []
    other = (bad + 1) % 3
    start = 2 * bad
    short = TensorSlice(0, ((start, start + 1), (6 + start, 8 + start)), 12)
    for wrong in (None, _part(bad, dim=1), _part(other), short):
        parts: list[TensorSlice | None] = [*right]
        parts[bad] = wrong
        violations = _cut(parts)
        assert [(violation.rank, violation.where) for violation in violations] == [(bad, WEIGHT)], (wrong, violations)


@pytest.mark.parametrize("bad", range(3))
def test_other_blocks_without_streaming(bad: int) -> None:
    calls, others = (("a", 1), ("b", 2)), (("a", 1), ("c", 2))
    layout = SimpleNamespace(mesh=MeshShape(tp=3), transformers={"transformer": None})
    reports = [ProbeReport(rank, *[others if rank == bad else calls] * 2) for rank in range(3)]
    found = list(same_numbers(cast(ModelLayout, layout), reports))
    assert [(violation.rank, violation.found) for violation in found] == [(bad, "c")]
