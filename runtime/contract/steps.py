"""finite, same-state and same-order: what the ranks saw in the steps of a request, compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Protocol

import torch

from crossdock.offload.stream.trace import TraceEvent
from crossdock.runtime.contract.result import Violation, common, outvoted
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.reports.records import RunRecord, StepRecord, WeightsRecord

_FLOAT16 = "float16 ends at 65504, which activations exceed: set dtype to bfloat16 or float32 in the YAML file"
_NOT_FLOAT16 = "look at the checkpoint and the request's numbers; if both are right, report it"
_ALIKE = "the ranks of a replica compute one picture: look for a hook, an extension or a device that differs there"
_CALLED = "a hook or a cache decides on some ranks only: let it decide alike on all, or remove it"
_UNHOOKED = "something takes hooks off or calls the block another way: let it keep them, or remove it"


class Saw(Protocol):
    """What a rank tells of a request."""

    @property
    def rank(self) -> int: ...

    @property
    def seen(self) -> RunRecord: ...

    @property
    def weights(self) -> WeightsRecord: ...

    @property
    def trace(self) -> tuple[TraceEvent, ...]: ...


def finite(layout: ModelLayout, results: Sequence[Saw]) -> Iterator[Violation]:
    """Of each replica the first step whose latents are not finite, and where that begins in it."""
    for replica in _groups(layout, results, "dp"):
        faulty = [(step.step, result.rank, step) for result in replica for step in result.seen.steps if not step.finite]
        if not faulty:
            continue
        number = min(faulty)[0]
        named = [found for found in faulty if found[0] == number and found[2].not_finite_from]
        _, rank, step = min(named or faulty, key=lambda found: (found[0], found[2].not_finite_place, found[1]))
        where = f"step {number}: {step.not_finite_from or 'outside the blocks'}"
        remedy = _FLOAT16 if torch.float16 in layout.dtypes.values() else _NOT_FLOAT16
        found = "the first that is not, and latents that are not either" if named else "latents that are not"
        yield Violation("finite", rank, where, "finite numbers", found, remedy)


def same_state(layout: ModelLayout, results: Sequence[Saw]) -> Iterator[Violation]:
    """What goes into a step, and the latents that come out, is the same on all ranks of a replica.

    Of each replica the first quantity, of the first step, in which ranks differ.
    """
    for replica in _groups(layout, results, "dp"):
        branches = _groups(layout, replica, "dp", "cfg")
        for steps in range(min(len(result.seen.steps) for result in replica)):
            inputs = list(_first_difference(replica, steps, lambda step: step.inputs))
            inside = [v for branch in branches for v in _first_difference(branch, steps, lambda step: step.branch)]
            latents = list(_first_difference(replica, steps, lambda step: step.latents))
            if found := inputs or inside or latents:
                yield from found
                break


def _first_difference(
    group: Sequence[Saw], place: int, read: Callable[[StepRecord], Mapping[str, int]]
) -> Iterator[Violation]:
    """Of what was read of the step in this place."""
    steps = {result.rank: result.seen.steps[place] for result in group}
    values = {rank: read(step) for rank, step in steps.items()}
    for name in dict.fromkeys(name for of_rank in values.values() for name in of_rank):
        found = {rank: of_rank.get(name) for rank, of_rank in values.items()}
        if len(set(found.values())) > 1:
            yield from outvoted("same-state", f"step {next(iter(steps.values())).step}: {name}", found, _ALIKE)
            return


def same_order(layout: ModelLayout, results: Sequence[Saw]) -> Iterator[Violation]:
    """The ranks of a replica computed the same blocks in the same order, each of them through its hooks."""
    for result in results:
        for path in result.seen.unhooked:
            expected = "the hooks that it had after the load"
            yield Violation("same-order", result.rank, path or "the model", expected, "not all of them", _UNHOOKED)
        yield from _streamed_as_called(result)
    for replica in _groups(layout, results, "dp"):
        for steps in zip(*(result.seen.steps for result in replica), strict=False):
            called = {
                result.rank: result.seen.orders[step.computed] for result, step in zip(replica, steps, strict=True)
            }
            if len(set(called.values())) > 1:
                yield from _other_blocks(steps[0].step, called)
                break


def _other_blocks(step: int, called: Mapping[int, tuple[str, ...]]) -> Iterator[Violation]:
    """The first call of a step in which ranks differ."""
    for place, names in enumerate(zip_longest(*called.values(), fillvalue="nothing")):
        if len(set(names)) > 1:
            found = dict(zip(called, names, strict=True))
            usual = common(found)
            where = next((name for name in names if name not in ("nothing", usual)), names[0])
            yield from outvoted("same-order", f"step {step}: {usual or where}, call {place + 1}", found, _CALLED)
            return


def _streamed_as_called(result: Saw) -> Iterator[Violation]:
    """Every call of a block is one that the stream saw."""
    if not result.seen.orders:
        return
    called = [name for step in result.seen.steps for name in result.seen.orders[step.computed]]
    streamed = [event.block for event in result.trace if event.kind == "compute_begin"][: len(called)]
    for place, (name, other) in enumerate(zip_longest(called, streamed, fillvalue="nothing")):
        if name != other:
            expected = f"the block that was called (call {place + 1} of the request)"
            where = name if name != "nothing" else other
            yield Violation("same-order", result.rank, where, expected, f"{other} was streamed", _UNHOOKED)
            return


def _groups(layout: ModelLayout, results: Sequence[Saw], *axes: str) -> list[list[Saw]]:
    """The results of ranks with the same place on `axes`, by rank."""
    groups: dict[tuple[int, ...], list[Saw]] = defaultdict(list)
    for result in sorted(results, key=lambda result: result.rank):
        place = layout.mesh.coordinates(result.rank)
        groups[tuple(place[axis] for axis in axes)].append(result)
    return list(groups.values())
