"""same-numbers, judged: a probe step is bit-identical with streaming on and off. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from crossdock.runtime.contract.result import Violation, to_compare
from crossdock.runtime.models.transformers import prefixes
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.records import REPORT_IT, ProbeReport

SAME_NUMBERS = "same-numbers"
FINAL_LATENTS = "final latents"
"""Stands in a probe's report for what the pipeline returned at the end."""

_RELOAD = "what the block ran with is not what the checkpoint holds: load again; if it stays, report it with this line"
_ELSEWHERE = "every block returned the same: look at what runs outside the blocks, such as a hook or a random number"


def same_numbers(plan: RunPlan, probes: Sequence[ProbeReport]) -> Iterator[Violation]:
    """On every rank the same calls of blocks, in the same order, with bit-identical outputs; the earliest fault first.

    Where the ranks of a replica exchange activations, one rank's fault shows on the others in the same block or a
    later one.
    """
    by_rank = {probe.rank: probe for probe in probes}
    for rank in range(plan.mesh.world_size):
        if rank not in by_rank:
            yield Violation(SAME_NUMBERS, rank, "probe", "one", "none", "a rank is missing; start again")
            continue
        called = {one: tuple(_names(by_rank[one].off)) for one in plan.mesh.replica_group(rank) if one in by_rank}
        if (other := to_compare(called).get(rank)) is not None:
            yield from _same_calls(rank, called[other], called[rank], f" as on rank {other}", " without streaming")
        for name in not_called(plan, by_rank[rank].on):
            remedy = f"if the pipeline runs without it, set it to [null, null] in {plan.model_dir / 'model_index.json'}"
            yield Violation(SAME_NUMBERS, rank, name, "a turn in the probe's steps", "none", remedy)
    differing = [(place, probe) for probe in probes if (place := _first_difference(probe)) is not None]
    for place, probe in sorted(differing, key=lambda found: (found[0], found[1].rank)):
        yield _difference(probe, place)
    for probe in probes:
        yield from _same_calls(probe.rank, _names(probe.off), _names(probe.on), " as without streaming", "")


def not_called(plan: RunPlan, calls: Sequence[tuple[str, int]]) -> list[str]:
    """The transformers of which no block was called."""
    names = zip(plan.transformers, prefixes(plan.transformers), strict=True)
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
