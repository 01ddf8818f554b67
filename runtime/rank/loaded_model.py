"""What a rank holds of one model, from `setup` to `teardown`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.parallel.group import GroupRecord
from crossdock.parallel.mesh import Mesh
from crossdock.runtime.pipeline.pipeline import RankPipeline
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.inspection import (
    foreign_hooks,
    measure_device,
    memory_span,
    record_homes,
    record_plain,
    record_tensors,
)
from crossdock.runtime.rank.parallelize import ModelParallelism
from crossdock.runtime.rank.step_watch import StepWatch
from crossdock.runtime.rank.weights.arrivals import ArrivalWatch
from crossdock.runtime.rank.weights.compare import WeightCheck
from crossdock.runtime.rank.weights.load import RankWeights
from crossdock.runtime.reports.records import RankReport


@dataclass(frozen=True)
class LoadedModel:
    """
    Attributes:
        plan: what is held now; `memory` is another one after a rescheduling.
        schedule_note: what was made of the measured costs.
        load_s: how long it took to connect and load.
    """

    plan: RunPlan
    device: torch.device
    mesh: Mesh
    model: nn.Module
    parallelism: ModelParallelism
    weights: RankWeights
    copy_engine: CopyEngine
    arena: Arena | None
    stream: BlockStream
    pipeline: RankPipeline
    weight_check: WeightCheck
    arrivals: ArrivalWatch
    watch: StepWatch
    load_s: float
    schedule_note: str = "assumed costs: nothing was measured yet"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that this rank runs."""
        return self.model, *self.pipeline.on_device

    def issued(self) -> tuple[GroupRecord, ...]:
        """The collectives of the mesh's groups; of gathers that run ahead, too: all ranks are asked at one place."""
        self.copy_engine.drain()
        return self.mesh.records()

    def report(self, grown_bytes: int | None = None) -> RankReport:
        """What this rank holds now, read off the live model.

        Args:
            grown_bytes: by how much loading made the device's allocator grow, where it is known.
        """
        issued = self.issued()
        weights, stream = self.weights, self.stream
        shards = [b.source for b in stream.blocks if b.home is Home.DEVICE_SHARD and isinstance(b.source, Tensor)]
        return RankReport(
            rank=self.mesh.rank,
            tensors=record_tensors(self.model, stream, weights.slices),
            plain=record_plain(self.model, stream),
            homes=record_homes(self.plan.memory.blocks, stream, weights.ranges),
            order=stream.order,
            slot_bytes=tuple(memory.nbytes for memory in stream.slot_memory),
            slots=tuple(span for memory in stream.slot_memory if (span := memory_span(memory)) is not None),
            arrivals=tuple(self.weight_check.records),
            device_bytes=measure_device(self.model, self.pipeline.on_device, shards, self.device, grown_bytes),
            foreign_hooks=foreign_hooks(self.model),
            trace=stream.trace(since=stream.scheduled_at),
            collectives=issued,
        )

    def detach(self) -> None:
        """Give up what is outside this object; its own memory goes with the last reference to it."""
        self.pipeline.discard()
        self.stream.remove()
        self.copy_engine.close()
        self.parallelism.remove()
