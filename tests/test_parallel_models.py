"""Every transformer class in tensor and sequence parallel, ranks as threads, against the class itself in one piece."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from parallel_models import CASES, Case, build
from test_tensor_parallel import fill
from thread_ranks import Meeting, ThreadGroup, as_group, run_threads
from torch import Tensor, nn

from crossdock.parallel.attention import SequenceParallelAttention
from crossdock.parallel.regions import SequenceParallelism
from crossdock.parallel.tensor import TensorParallelism
from crossdock.runtime.rank.attention_backend import AttentionBinding
from tiers import every

LAYOUTS = {
    "tp 2": (2, 1, 1),
    "ulysses 2": (1, 2, 1),
    "ring 3": (1, 1, 3),
    "ulysses 2 x ring 2": (1, 2, 2),
    "tp 2 x ulysses 2": (2, 2, 1),
    "more ranks than tokens": (1, 2, 6),
}
MOST_HEADS = 4
LIMIT = 1e-6
"""Relative; the classes compute some of it in fp32."""


def tensors(output: Any) -> list[Tensor]:
    """Of a model's output, which may be lists of them."""
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in tensors(part)]


def run_whole(case: Case) -> tuple[nn.Module, dict[str, Any], list[Tensor]]:
    model = build(case)
    torch.manual_seed(1)
    inputs = case.inputs()
    with torch.no_grad():
        return model, inputs, tensors(model(**inputs, return_dict=False))


class Gang:
    """The groups of a layout; ranks are numbered ring, ulysses, tp, the last one fastest."""

    def __init__(self, tp: int, ulysses: int, ring: int) -> None:
        self.tp, self.ulysses, self.ring = tp, ulysses, ring
        self.size = tp * ulysses * ring
        self.meetings: list[Meeting] = []
        self._groups: dict[tuple[str, int], ThreadGroup] = {}
        sequence = ulysses * ring
        self._join("tp", [[part * tp + t for t in range(tp)] for part in range(sequence)])
        self._join("sequence", [[part * tp + t for part in range(sequence)] for t in range(tp)])
        parts = [[r * ulysses + u for u in range(ulysses)] for r in range(ring)]
        self._join("ulysses", [[part * tp + t for part in row] for row in parts for t in range(tp)])
        columns = [[r * ulysses + u for r in range(ring)] for u in range(ulysses)]
        self._join("ring", [[part * tp + t for part in column] for column in columns for t in range(tp)])

    def _join(self, name: str, sets: list[list[int]]) -> None:
        for ranks in sets:
            meeting = Meeting(len(ranks))
            self.meetings.append(meeting)
            self._groups.update({(name, rank): ThreadGroup(meeting, place) for place, rank in enumerate(ranks)})

    def group(self, name: str, rank: int) -> ThreadGroup | None:
        group = self._groups[name, rank]
        return group if group.size > 1 else None

    def sequence(self, rank: int) -> SequenceParallelism:
        part = rank // self.tp
        ring_rank, ulysses_rank = divmod(part, self.ulysses)
        attention = SequenceParallelAttention(
            ulysses_group=as_group(self.group("ulysses", rank)),
            ulysses_rank=ulysses_rank,
            ulysses_degree=self.ulysses,
            ring_group=as_group(self.group("ring", rank)),
            ring_rank=ring_rank,
            ring_degree=self.ring,
        )
        group = as_group(self.group("sequence", rank))
        assert group is not None
        return SequenceParallelism(attention, part, self.ulysses * self.ring, group)


def run_parallel(case: Case, model: nn.Module, inputs: dict[str, Any], gang: Gang) -> list[list[Tensor]]:
    locals_ = [copy.deepcopy(model) for _ in range(gang.size)]

    def work(rank: int) -> list[Tensor]:
        local = locals_[rank]
        if gang.tp > 1:
            group = as_group(gang.group("tp", rank))
            fill(local, model, TensorParallelism.apply(local, case.plan, rank % gang.tp, gang.tp, group))
        if gang.size > gang.tp:
            sequence = gang.sequence(rank)
            sequence.apply(local, case.regions)
            AttentionBinding(local, sequence)
        own = {name: copy.deepcopy(value) for name, value in inputs.items()}
        return tensors(local(**own, return_dict=False))

    return run_threads(gang.meetings, work, gang.size)


@pytest.mark.parametrize(("name", "layout"), every(itertools.product(CASES, LAYOUTS), 5))
def test_against_the_whole_model(name: str, layout: str) -> None:
    case, gang = CASES[name], Gang(*LAYOUTS[layout])
    if gang.size > MOST_HEADS and any(region.head_scatters for region in case.regions):
        pytest.skip("its heads cannot be scattered over so many ranks")
    model, inputs, expected = run_whole(case)
    for of_rank in run_parallel(case, model, inputs, gang):
        assert len(of_rank) == len(expected)
        for found, whole in zip(of_rank, expected, strict=True):
            error = float((found - whole).abs().max() / whole.abs().max())
            print(f"{name}, {layout}: {error:.1e}")
            assert error < LIMIT
