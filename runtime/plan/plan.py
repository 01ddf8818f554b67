"""The plan of a run: what every rank will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.schedule.residency import minimum_bytes
from crossdock.offload.schedule.shared_slots import place_sizes
from crossdock.parallel.mesh import describe
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.plan.model_layout import ModelLayout


@dataclass(frozen=True)
class RunPlan:
    """What every rank will hold; the coordinator compares the ranks' reports with it.

    Attributes:
        memory: the only part that changes while ranks hold the model.
        plain: block -> its tensors that no codec makes smaller, as a load has found.
    """

    config: RunConfig
    layout: ModelLayout
    memory: MemoryPlan
    plain: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def layout_name(self) -> str:
        """`layerwise, ulysses 2 x ring 2`."""
        return ("layerwise, " if self.config.offload.layerwise else "") + describe(self.layout.mesh)

    @property
    def least_budget_bytes(self) -> int:
        """No budget can be below it."""
        memory = self.memory
        sizes = place_sizes([memory.slot_sizes_of(pass_) for pass_ in memory.passes])
        blocks = minimum_bytes(sizes, self.config.offload.depths) + memory.staging_bytes
        return memory.outside_bytes + ALIGNMENT + max([blocks, *memory.turn_bytes.values()])
