"""Tensor and sequence parallelism on every transformer of a rank's model, and the gathering of its blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from crossdock.offload.stream.loader import Gather
from crossdock.parallel.attention import SequenceParallelAttention
from crossdock.parallel.hsdp import all_gather_bytes
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.regions import Attend, SequenceParallelism
from crossdock.parallel.tensor import TensorParallelism
from crossdock.parallel.xfuser_attention import XFuserAttention
from crossdock.runtime.models.transformers import transformers_in
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.attention_backend import AttentionBinding


class ModelParallelism:
    """What `apply` did to a model; `remove` undoes it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    @classmethod
    def apply(
        cls, model: nn.Module, plan: RunPlan, mesh: Mesh, after_collective: Callable[[], None]
    ) -> ModelParallelism:
        """Cut the linears of the meta-device `model`, and hook the regions in which tokens are cut.

        Args:
            after_collective: called whenever exchanges of attention have been given to the compute stream.
        """
        handle = cls()
        for transformer in transformers_in(model).values():
            handle._cut_linears(transformer, plan, mesh)
            if mesh.groups["sequence"] is not None:
                handle._cut_tokens(transformer, plan, mesh, after_collective)
        return handle

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _cut_linears(self, transformer: nn.Module, plan: RunPlan, mesh: Mesh) -> None:
        place = mesh.index_in("tp"), mesh.shape.tp, mesh.groups["tp"]
        self._undo.append(TensorParallelism.apply(transformer, plan.layout.spec.tensor_plan, *place).remove)

    def _cut_tokens(
        self, transformer: nn.Module, plan: RunPlan, mesh: Mesh, after_collective: Callable[[], None]
    ) -> None:
        group, shape = mesh.groups["sequence"], mesh.shape
        assert group is not None
        attention = make_attention(plan, mesh, after_collective)
        place = shape.sequence_index(mesh.rank), shape.sequence, group
        sequence = SequenceParallelism(attention, *place, after_collective)
        self._undo.append(sequence.remove)
        sequence.apply(transformer, plan.layout.spec.regions)
        self._undo.append(AttentionBinding(transformer, sequence).remove)


def make_attention(plan: RunPlan, mesh: Mesh, after_collective: Callable[[], None]) -> Attend:
    """The attention that the plan asks for, in this rank's place of the mesh."""
    shape, groups = mesh.shape, mesh.groups
    kind = XFuserAttention if plan.config.parallel.attention == "xfuser" else SequenceParallelAttention
    return kind(
        ulysses_group=groups["ulysses"],
        ulysses_rank=mesh.index_in("ulysses"),
        ulysses_degree=shape.ulysses,
        ring_group=groups["ring"],
        ring_rank=mesh.index_in("ring"),
        ring_degree=shape.ring,
        after_collective=after_collective,
    )


def gather_of(mesh: Mesh) -> Gather | None:
    """How a block is gathered from the shards of it; None where nothing is sharded."""
    group = mesh.groups["weights"]
    if group is None:
        return None
    return Gather(
        mesh.shape.hsdp_shard,
        mesh.index_in("weights"),
        lambda whole, shard: all_gather_bytes(whole, shard, group),
    )
