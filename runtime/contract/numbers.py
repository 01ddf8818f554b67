"""A probe step, judged: same-numbers, bit-identical with streaming on and off, and same-as-one, as near to
the unsharded model's step as its numbers allow. Pure.

In float32 that is 1e-4 of a block's largest value; sums in another order make some 1e-6. Shorter numbers are rounded in
every operation, and blocks that follow one another carry it on: there the unsharded model says how much that is, for it
runs in float32 as well. The sharded one may be four times as far from it as it is from itself, for partial sums are
rounded once more, or two units of rounding; never a quarter of the largest value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch

from crossdock.runtime.contract.result import Violation, to_compare
from crossdock.runtime.models.transformers import prefixes
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.reports.records import REPORT_IT, Deviation, ProbeReport

SAME_NUMBERS = "same-numbers"
SAME_AS_ONE = "same-as-one"
PROBE_CHECKS = (SAME_NUMBERS, SAME_AS_ONE)
FINAL_LATENTS = "final latents"
"""Stands in a probe's report for what the pipeline returned at the end."""
RETURNED = "the transformer"
"""Stands there for what a transformer as a whole returned."""
SHARED_OUT = "the transformer, its calls shared out"
"""And for what the pipeline got of it, where the ranks of a guidance group divide its calls, or their batch."""
FLOAT32_BOUND = 1e-4
_TIMES_OWN = 4.0
_UNITS = 2.0
_MOST = 0.25

_RELOAD = "what the block ran with is not what the checkpoint holds: load again; if it stays, report it with this line"
_ANOTHER = "sharding changes what the model computes: try a layout without it, or with less, and " + REPORT_IT
_ELSEWHERE = "every block returned the same: look at what runs outside the blocks, such as a hook or a random number"


def same_numbers(layout: ModelLayout, probes: Sequence[ProbeReport]) -> Iterator[Violation]:
    """On every rank the same calls of blocks, in the same order, with bit-identical outputs; the earliest fault first.

    Where the ranks of a replica exchange activations, one rank's fault shows on the others in the same block or a
    later one.
    """
    by_rank = {probe.rank: probe for probe in probes}
    for rank in range(layout.mesh.world_size):
        if rank not in by_rank:
            yield Violation(SAME_NUMBERS, rank, "probe", "one", "none", "a rank is missing; start again")
            continue
        called = {one: tuple(_names(by_rank[one].off)) for one in layout.mesh.replica_group(rank) if one in by_rank}
        if (other := to_compare(called).get(rank)) is not None:
            yield from _same_calls(rank, called[other], called[rank], f" as on rank {other}", " without streaming")
        for name in not_called(layout, by_rank[rank].on):
            index = layout.model_dir / "model_index.json"
            remedy = f"if the pipeline runs without it, set it to [null, null] in {index}"
            yield Violation(SAME_NUMBERS, rank, name, "a turn in the probe's steps", "none", remedy)
    differing = [(place, probe) for probe in probes if (place := _first_difference(probe)) is not None]
    for place, probe in sorted(differing, key=lambda found: (found[0], found[1].rank)):
        yield _difference(probe, place)
    for probe in probes:
        yield from _same_calls(probe.rank, _names(probe.off), _names(probe.on), " as without streaming", "")


def not_called(layout: ModelLayout, calls: Sequence[tuple[str, int]]) -> list[str]:
    """The transformers of which no block was called."""
    names = zip(layout.transformers, prefixes(layout.transformers), strict=True)
    return [name for name, prefix in names if not any(block.startswith(prefix) for block in _names(calls))]


def _names(calls: Sequence[tuple[str, int]]) -> list[str]:
    return [name for name, _ in calls]


def _same_calls(
    rank: int, expected: Sequence[str], found: Sequence[str], as_where: str, how: str
) -> Iterator[Violation]:
    """The first place at which other blocks were called."""
    for place, (name, other) in enumerate(zip_longest(expected, found, fillvalue="nothing")):
        if name != other:
            where = f"block call {place}{how}"
            yield Violation(SAME_NUMBERS, rank, where, f"{name}{as_where}", other, REPORT_IT)
            return


def _first_difference(probe: ProbeReport) -> int | None:
    """The place of the first call that returned something else; None when there is none before the calls diverge."""
    for place, (off, on) in enumerate(zip(probe.off, probe.on, strict=False)):
        if off[0] != on[0]:
            return None  # another block was called: that is told apart
        if off[1] != on[1]:
            return place
    return None


def _difference(probe: ProbeReport, place: int) -> Violation:
    (name, expected), (_, found) = probe.off[place], probe.on[place]
    where, remedy = name, _ELSEWHERE if name == FINAL_LATENTS else _RELOAD
    if _names(probe.off).count(name) > 1:
        where = f"{name} (call {_names(probe.off[: place + 1]).count(name)} of it)"
    later = [off != on for off, on in zip(probe.off[place + 1 : -1], probe.on[place + 1 :], strict=False)]
    behind = "" if name == FINAL_LATENTS else f" and other outputs of {sum(later)} of the {len(later)} calls behind it"
    return Violation(
        SAME_NUMBERS,
        probe.rank,
        where,
        f"the output without streaming (checksum {expected:#x})",
        f"{found:#x}{behind}",
        remedy,
    )


def is_short(layout: ModelLayout) -> bool:
    """Whether some of the transformers' numbers are shorter than float32."""
    return _unit(layout) > torch.finfo(torch.float32).eps


def bound(layout: ModelLayout, deviation: Deviation) -> float:
    """The largest error that is no fault."""
    if not is_short(layout):
        return FLOAT32_BOUND
    return min(max(_TIMES_OWN * deviation.own_error, _UNITS * _unit(layout)), _MOST)


def by_block(layout: ModelLayout, probes: Sequence[ProbeReport]) -> list[Deviation]:
    """Of each output, guidance branch by guidance branch, the one on the rank that is farthest off."""
    return [
        max((probe.alone[place] for probe in branch if place < len(probe.alone)), key=lambda found: found.error)
        for branch in _branches(layout, probes)
        for place in range(max(len(probe.alone) for probe in branch))
    ]


def told(layout: ModelLayout, deviations: Sequence[Deviation]) -> str:
    """Of the one that is nearest to its bound, or farthest beyond it."""
    if not deviations:
        return "nothing was compared"
    most = max(deviations, key=lambda each: each.error / bound(layout, each))
    return f"largest error {most.error:.1e} of at most {bound(layout, most):.1e}, in {most.block}"


def same_as_one(layout: ModelLayout, probes: Sequence[ProbeReport]) -> Iterator[Violation]:
    """On every rank each call of a block returned what it returns in the unsharded model. Of each guidance branch, the
    earliest call in which that is not so, on the ranks on which it is not: what comes after follows from it.
    """
    for probe in probes:
        if not probe.alone:
            what = "step of the unsharded model"
            yield Violation(SAME_AS_ONE, probe.rank, what, "one to compare with", "none", REPORT_IT)
    for branch in _branches(layout, probes):
        for place in range(max(len(probe.alone) for probe in branch)):
            here = [probe for probe in branch if place < len(probe.alone)]
            wrong = [probe for probe in here if not _holds(layout, probe.alone[place])]
            for probe in sorted(wrong, key=lambda each: -each.alone[place].error):
                yield _deviates(layout, probe, place, right=len(here) - len(wrong))
            if wrong:
                break


def _branches(layout: ModelLayout, probes: Sequence[ProbeReport]) -> list[list[ProbeReport]]:
    """The probes of each guidance branch, of all replicas."""
    branches = defaultdict[int, list[ProbeReport]](list)
    for probe in probes:
        branches[layout.mesh.coordinates(probe.rank)["cfg"]].append(probe)
    return list(branches.values())


def _holds(layout: ModelLayout, deviation: Deviation) -> bool:
    return deviation.error <= bound(layout, deviation)


def _deviates(layout: ModelLayout, probe: ProbeReport, place: int, right: int) -> Violation:
    found, most = probe.alone[place], bound(layout, probe.alone[place])
    calls = max(each.call for each in probe.alone)
    where = f"{found.block} (call {found.call})" if calls > 1 else found.block
    later = probe.alone[place + 1 :]
    follow = f"{sum(not _holds(layout, each) for each in later)} of the {len(later)} outputs behind it"
    what = found.found or f"{found.error:.1e}{f' in {found.tokens}' if found.tokens else ''}"
    others = f"; {right} ranks are right here" if right else ""
    expected = f"what one rank alone computes, within {most:.1e} of its largest value"
    return Violation(SAME_AS_ONE, probe.rank, where, expected, f"{what}, and beyond it {follow}{others}", _ANOTHER)


def _unit(layout: ModelLayout) -> float:
    """Of rounding, of the shortest of the transformers' numbers."""
    return max(
        (torch.finfo(dtype).eps for dtype in set(layout.dtypes.values()) if dtype.is_floating_point), default=0.0
    )
