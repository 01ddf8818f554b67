"""One step of the unsharded model, on one rank of each guidance branch, and how far every rank's own is from it.

The first rank of a branch tells what the unsharded model's blocks return while it runs; the others wait for one block
at a time. Which tokens of it are a rank's own is worked out here once more, from their number alone: what cuts and
gathers the sharded model's has no part in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crossdock.parallel.group import Group
from crossdock.runtime.contract.numbers import RETURNED, SHARED_OUT, is_short
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.probe.calls import Call, on_host
from crossdock.runtime.rank.probe.unsharded import Segment, UnshardedModel
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.records import Deviation


@dataclass(frozen=True)
class _Told:
    """What a block of the unsharded model returned. `error`: its own, to what it returns in float32."""

    call: int
    place: int
    block: str
    segments: tuple[Segment, ...]
    error: float
    tensors: Sequence[Any]  # on their way: shape and dtype


class _Line:
    """From one rank to all, on the host. Collective over `group`."""

    def __init__(self, group: Group | None, source: int) -> None:
        self._group, self._source = group, source

    def send(self, told: _Told | None) -> None:
        """None: a sign of life."""
        if self._group is not None:
            shapes = told and replace(told, tensors=[(tensor.shape, tensor.dtype) for tensor in told.tensors])
            self._group.broadcast_object((True, shapes), self._source)
            self._share(told.tensors if told else ())

    def end(self) -> None:
        if self._group is not None:
            self._group.broadcast_object((False, None), self._source)

    def received(self) -> Iterator[_Told]:
        assert self._group is not None
        while True:
            more, told = self._group.broadcast_object(None, self._source)
            if not more:
                return
            if told is not None:
                tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in told.tensors]
                self._share(tensors)
                yield replace(told, tensors=tensors)

    def _share(self, tensors: Sequence[Tensor]) -> None:
        assert self._group is not None
        for tensor in tensors:
            if tensor.numel():
                self._group.broadcast(tensor, self._source)


def deviations(worker: RankWorker, calls: Sequence[Call], shared_out: Sequence[Call]) -> tuple[Deviation, ...]:
    """Of what `calls` gave on this rank, block by block, and of what its pipeline got where they are `shared_out`.

    Collective over the world.
    """
    plan, rank = worker.loaded.plan, worker.rank
    own = _Comparison(calls, plan.layout.mesh.sequence, plan.layout.mesh.sequence_index(rank))
    whole = _Comparison(shared_out)
    cfg = plan.layout.mesh.coordinates(rank)["cfg"]
    for source in plan.layout.mesh.group_along(0, ("cfg",)):
        mine = own if plan.layout.mesh.coordinates(source)["cfg"] == cfg else None
        _one_rank(worker, source, calls, mine, _Line(worker.world, source))
    if shared_out:
        _one_rank(worker, 0, shared_out, whole, _Line(worker.world, 0), as_a_whole=True)
    return (*own.found, *own.not_called(), *whole.found, *whole.not_called())


def _one_rank(
    worker: RankWorker, source: int, calls: Sequence[Call], mine: _Comparison | None, line: _Line, **how: bool
) -> None:
    """The unsharded model on rank `source`, beside what is `mine`."""
    if worker.rank == source:
        assert mine is not None
        _Reference(worker.loaded.plan, worker.device, line, mine, **how).run(calls)
    else:
        for told in line.received():
            if mine is not None:
                mine.compare(told)


class _Reference:
    """The unsharded model on this rank; what its blocks return is sent, and compared with this rank's own."""

    def __init__(
        self, plan: RunPlan, device: torch.device, line: _Line, own: _Comparison, as_a_whole: bool = False
    ) -> None:
        """`as_a_whole`: its blocks are not compared."""
        self._plan, self._device, self._line, self._own, self._as_a_whole = plan, device, line, own, as_a_whole

    def run(self, calls: Sequence[Call]) -> None:
        with ExitStack() as models:
            model = models.enter_context(closing(UnshardedModel(self._plan, self._device)))
            exact = None
            if is_short(self._plan.layout):
                exact = models.enter_context(closing(UnshardedModel(self._plan, self._device, exact=True)))
            for number, call in enumerate(calls):
                true = None if exact is None else self._outputs(exact, call)
                model.call(call, partial(self._tell, number, itertools.count(), true))
        self._line.end()

    def _outputs(self, exact: UnshardedModel, call: Call) -> list[list[Tensor]]:
        outputs = list[list[Tensor]]()

        def note(name: str, tensors: list[Tensor], segments: tuple[Segment, ...]) -> None:
            outputs.append([on_host(tensor) for tensor in tensors])
            self._line.send(None)

        exact.call(call, note)
        return outputs

    def _tell(
        self,
        call: int,
        places: Iterator[int],
        true: Sequence[Sequence[Tensor]] | None,
        name: str,
        tensors: list[Tensor],
        segments: tuple[Segment, ...],
    ) -> None:
        place = next(places)
        if self._as_a_whole and name != RETURNED:
            self._line.send(None)
            return
        own = [on_host(tensor) for tensor in tensors]
        error = 0.0 if true is None else max(map(_error, own, true[place], true[place]), default=0.0)
        if self._as_a_whole:
            place, name = 0, SHARED_OUT
        told = _Told(call, place, name, segments, error, own)
        self._line.send(told)
        self._own.compare(told)


class _Comparison:
    """Of what this rank's `calls` gave, which has part `index` of `parts` of the tokens."""

    def __init__(self, calls: Sequence[Call], parts: int = 1, index: int = 0) -> None:
        self._calls = calls
        self._part = parts, index
        self.found: list[Deviation] = []

    def compare(self, told: _Told) -> None:
        outputs = self._calls[told.call].outputs if told.call < len(self._calls) else []
        name, tensors = outputs[told.place] if told.place < len(outputs) else ("nothing", [])
        self.found.append(_deviation(told, name, tensors, self._part))

    def not_called(self) -> Iterator[Deviation]:
        """The calls that there were on this rank alone."""
        for number in range(max((each.call for each in self.found), default=0), len(self._calls)):
            yield Deviation(number + 1, RETURNED, math.inf, found="one call more")


def _deviation(told: _Told, name: str, tensors: Sequence[Tensor], part: tuple[int, int]) -> Deviation:
    """Of a block that returned `tensors` on this rank, which has part `index` of `parts` of the tokens."""
    alike = Deviation(told.call + 1, told.block, 0.0, told.error, "", "")
    if name != told.block:
        return replace(alike, error=math.inf, found=name)
    if len(tensors) != len(told.tensors):
        return replace(alike, error=math.inf, found=f"{len(tensors)} tensors for {len(told.tensors)}")
    found = []
    for tensor, whole in zip(tensors, told.tensors, strict=True):
        fit = [part_of for part_of in _parts_of(whole, told.segments, *part) if part_of.own.shape == tensor.shape]
        if not fit:
            text = f"a tensor of shape {list(tensor.shape)} for {list(whole.shape)}"
            return replace(alike, error=math.inf, found=text)
        found.append(min((_error(tensor, own.own, whole, own.real), own.text) for own in fit))
    error, tokens = max(found, default=(0.0, ""))
    return replace(alike, error=error, tokens=tokens)


@dataclass(frozen=True)
class _Part:
    """Of a tensor, what a rank has. `real`: bool `[batch, tokens]`, which of it is no padding; None: all."""

    own: Tensor
    real: Tensor | None
    text: str


def _parts_of(whole: Tensor, segments: Sequence[Segment], parts: int, index: int) -> Iterator[_Part]:
    """What part `index` of `parts` may have of `whole` `[batch, tokens, ...]`: all of it, or of every segment of which
    it is made, one behind the other, its share. These lie side by side; where they are not equal, the first ones have
    one token more. Whose share has none has a copy of the first one, whatever comes of it.
    """
    known = False
    for count in range(1, len(segments) + 1):
        for chosen in itertools.combinations(segments, count):
            lengths = [segment.tokens for segment in chosen]
            if whole.ndim < 2 or sum(lengths) != whole.shape[1]:
                continue
            known, real = True, _real(chosen, len(whole))
            yield _Part(whole, real, "")
            spans = [(_start(length, parts, index), _start(length, parts, index + 1)) for length in lengths]
            first = [sum(lengths[:place]) for place in range(count)]
            copies = [low == high and length > 0 for (low, high), length in zip(spans, lengths, strict=True)]
            held = [range(copy) if copy else range(*span) for copy, span in zip(copies, spans, strict=True)]
            rows = torch.cat(
                [torch.tensor([*each], dtype=torch.long) + at for at, each in zip(first, held, strict=True)]
            )
            if any(copies):
                own = torch.cat([torch.full((len(each),), not copy) for copy, each in zip(copies, held, strict=True)])
                real = torch.ones(whole.shape[:2], dtype=torch.bool) if real is None else real.clone()
                real[:, rows] &= own
            shares = " and ".join(f"{low} to {high - 1} of {n}" for (low, high), n in zip(spans, lengths, strict=True))
            yield _Part(whole[:, rows], None if real is None else real[:, rows], f"its tokens, {shares}")
    if not known:
        yield _Part(whole, None, "")


def _real(segments: Sequence[Segment], batch: int) -> Tensor | None:
    if all(segment.real is None for segment in segments):
        return None
    rows = [torch.ones(1, each.tokens, dtype=torch.bool) if each.real is None else each.real for each in segments]
    return torch.cat([row.expand(batch, -1) for row in rows], 1)


def _start(length: int, parts: int, index: int) -> int:
    return index * (length // parts) + min(index, length % parts)


def _error(tensor: Tensor, true: Tensor, whole: Tensor, real: Tensor | None = None) -> float:
    """The largest difference of `tensor` and `true`, to the largest value of `whole`; inf where some is not finite."""
    if real is not None:
        tensor, true = tensor[real], true[real]
    if not tensor.numel():
        return 0.0
    difference, largest = (tensor.float() - true.float()).abs().max(), whole.float().abs().max()
    error = float(difference / largest) if largest else float(difference)
    return error if math.isfinite(error) else math.inf
