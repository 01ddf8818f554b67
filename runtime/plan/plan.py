"""The plan of a run: what every rank will hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from crossdock.offload.memory.codec import IDENTITY, Codec, staging_bytes
from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout
from crossdock.offload.schedule.residency import Residency, minimum_bytes
from crossdock.offload.schedule.shared_slots import place_sizes, shared_slots
from crossdock.offload.schedule.slots import SlotSchedule
from crossdock.offload.stream.block import Home
from crossdock.parallel.mesh import MeshShape, describe
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.models.checkpoint import StoredTensor
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.models.transformers import prefixes


@dataclass(frozen=True)
class PlannedBlock:
    """One transformer block: `name` is its path in the model; `slot` is None where it stays on the device."""

    name: str
    layout: BlockLayout
    home: Home
    slot: int | None
    codec: Codec = IDENTITY

    def parts(self, shards: int) -> int:
        """How many parts it is cut into; `shards`: the size of the shard groups."""
        return shards if self.home.sharded else 1

    def held_bytes(self, shards: int) -> int:
        """What rests of it on a rank, or in the host store that the rank shares."""
        return self.codec.held_bytes(self.layout, self.parts(shards))

    def travel_bytes(self, shards: int) -> int:
        """What is copied and gathered to make it present."""
        return self.parts(shards) * self.codec.travel_bytes(self.layout, self.parts(shards))

    def staging_bytes(self, shards: int) -> int:
        """Device memory in which it is decoded."""
        return staging_bytes(self.codec, self.layout, self.parts(shards))


@dataclass(frozen=True)
class ScheduleReport:
    """How the blocks use the device. Sizes in bytes.

    Attributes:
        resident: the blocks that stay on the device.
        budget_bytes: None: as little as possible.
        arena_bytes: what the components use in turn; None: they do not take turns.
        step_ms: predicted time of the blocks of a step, from the costs named in `schedule_note`; `bound_ms` is proven
            to be a lower bound for this budget.
        schedule_note: what became of the schedule once the first steps were measured.
    """

    resident: tuple[str, ...]
    prefetch: int
    slots: int
    budget_bytes: int | None
    arena_bytes: int | None
    step_ms: float
    bound_ms: float
    schedule_note: str


@dataclass(frozen=True)
class RunPlan:
    """What every rank will hold; the coordinator compares the ranks' reports with it.

    Attributes:
        device: "cpu" or "cuda".
        transformers: the components that are sharded and streamed, in the order in which the loop uses them.
        blocks: as the model lists them.
        order: indices of the blocks that can be streamed, in the order in which they run, transformer by transformer.
        residency: which places of a transformer's order stay on the device while it runs, and the slots of the others.
        budget_bytes: device memory that the weights may take; None: as little as possible.
        arena_bytes: device memory that the transformer's blocks, the text encoder and the VAE use in turn; None: they
            do not take turns.
        turn_bytes: component -> how much of the arena, from its start, it uses in its turn.
        encoders, decoders: the components that encode prompts and that make pictures of latents.
        component_host_bytes: host memory that the components that take turns need at once, on the rank that runs them.
        outside: fqns of all parameters and buffers outside the blocks; resident on the device.
        outside_bytes: of these, and of what never leaves the device of the other components.
        stored: the transformers' tensors in the checkpoint.
        dtypes: fqn -> dtype in which a tensor is held.
        slices: per TP rank, fqn -> the part it holds; a tensor that is missing here is replicated.
        pipeline_dtype: dtype of the other components.
        pixel_multiple: picture sizes are multiples of this.
        frame_multiple: videos have a multiple of this, and one more, frames.
        decoder_features: features that the decoder has of each pixel, at least.
    """

    config: RunConfig
    model_dir: Path
    spec: ModelSpec
    mesh: MeshShape
    device: str
    transformers: tuple[str, ...]
    blocks: tuple[PlannedBlock, ...]
    order: tuple[int, ...]
    residency: Residency
    budget_bytes: int | None
    arena_bytes: int | None
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    turn_bytes: Mapping[str, int]
    component_host_bytes: int
    outside: tuple[str, ...]
    outside_bytes: int
    stored: Mapping[str, StoredTensor]
    dtypes: Mapping[str, torch.dtype]
    slices: tuple[Mapping[str, TensorSlice], ...]
    pipeline_dtype: torch.dtype
    pixel_multiple: int
    frame_multiple: int
    decoder_features: int

    @cached_property
    def _outside(self) -> frozenset[str]:
        return frozenset(self.outside)

    @property
    def layout_name(self) -> str:
        """`layerwise, ulysses 2 x ring 2`."""
        return ("layerwise, " if self.config.offload.layerwise else "") + describe(self.mesh)

    @cached_property
    def passes(self) -> tuple[tuple[int, ...], ...]:
        """`order` of each transformer: the others do not run in its pass."""
        return passes_of([block.name for block in self.blocks], self.order, self.transformers)

    def slot_sizes_of(self, indices: Sequence[int]) -> list[int]:
        """Bytes that these blocks take on the device."""
        return [self.blocks[index].layout.slot_bytes for index in indices]

    def travel_sizes_of(self, indices: Sequence[int]) -> list[int]:
        """Bytes that make each of these blocks present."""
        return [self.blocks[index].travel_bytes(self.mesh.hsdp_shard) for index in indices]

    def held_bytes(self, block: PlannedBlock) -> int:
        """What rests of a block on a rank."""
        return block.held_bytes(self.mesh.hsdp_shard)

    @property
    def staging_bytes(self) -> int:
        """Of the blocks' device memory, where what travels encoded is decoded."""
        return max((block.staging_bytes(self.mesh.hsdp_shard) for block in self.blocks), default=0)

    @property
    def schedule(self) -> SlotSchedule:
        """Of `streamed`, transformer after transformer."""
        slots = tuple(block.slot for block in self.streamed if block.slot is not None)
        return SlotSchedule(slots, self.residency.schedule.prefetch)

    @property
    def blocks_budget_bytes(self) -> int | None:
        """What of the budget is left for slots and for the blocks that stay."""
        fixed = self.outside_bytes + ALIGNMENT + self.staging_bytes
        return None if self.budget_bytes is None else self.budget_bytes - fixed

    @property
    def least_budget_bytes(self) -> int:
        """No budget can be below it."""
        sizes = place_sizes([self.slot_sizes_of(pass_) for pass_ in self.passes])
        blocks = minimum_bytes(sizes, self.config.offload.depths) + self.staging_bytes
        return self.outside_bytes + ALIGNMENT + max([blocks, *self.turn_bytes.values()])

    def schedule_report(self, schedule_note: str) -> ScheduleReport:
        """`schedule_note`: what became of the schedule when the first steps were measured."""
        residency = self.residency
        return ScheduleReport(
            tuple(self.blocks[index].name for index in sorted(self.staying)),
            residency.schedule.prefetch,
            residency.schedule.n_slots,
            self.budget_bytes,
            self.arena_bytes,
            round(residency.step_s * 1e3, 3),
            round(residency.bound_s * 1e3, 3),
            schedule_note,
        )

    @property
    def resident(self) -> frozenset[int]:
        """Indices of the blocks that can be streamed and have memory of their own: they are brought once and stay."""
        return frozenset(index for index in self.order if self.blocks[index].slot is None)

    @property
    def staying(self) -> frozenset[int]:
        """Indices of the blocks that are brought once and stay while their transformer runs."""
        return frozenset(
            pass_[place] for pass_ in self.passes for place in self.residency.resident if place < len(pass_)
        )

    @cached_property
    def streamed(self) -> tuple[PlannedBlock, ...]:
        """The blocks that pass through slots, in the order in which they run."""
        return tuple(self.blocks[index] for index in self.order if self.blocks[index].slot is not None)

    def rescheduled(self, residency: Residency, order: Sequence[int]) -> RunPlan:
        """The same run with other residents and other slots."""
        passes = passes_of([block.name for block in self.blocks], order, self.transformers)
        blocks = in_slots(self.blocks, residency, passes, self.blocks_budget_bytes)
        return replace(self, blocks=blocks, order=tuple(order), residency=residency)

    @property
    def host_bytes(self) -> int:
        """Host memory for block bytes on one node that holds every slice: each once."""
        on_host = [block for block in self.blocks if block.home.on_host]
        shards = self.mesh.hsdp_shard
        return self.mesh.tp * sum(block.parts(shards) * block.held_bytes(shards) for block in on_host)

    def owner_of(self, fqn: str) -> PlannedBlock | None:
        """The block that `fqn` belongs to; None outside the blocks."""
        if fqn in self._outside:
            return None
        return next((block for block in self.blocks if fqn.startswith(f"{block.name}.")), None)

    def tensor_at(self, block: str, byte: int) -> str:
        """The full name of the tensor that has byte `byte` of a block, or of the next one; the block's, after all."""
        layout = next((known.layout for known in self.blocks if known.name == block), None)
        entries = sorted(layout.entries, key=lambda entry: entry.offset) if layout is not None else ()
        return next((f"{block}.{e.name}" for e in entries if e.nbytes and byte < e.offset + e.nbytes), block)


def passes_of(names: Sequence[str], order: Sequence[int], transformers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """`order`, transformer by transformer."""
    return tuple(tuple(i for i in order if names[i].startswith(prefix)) for prefix in prefixes(transformers))


def in_slots(
    blocks: Sequence[PlannedBlock], residency: Residency, passes: Sequence[Sequence[int]], budget_bytes: int | None
) -> tuple[PlannedBlock, ...]:
    """`blocks` in the slots of a residency of their places; where the budget holds all of them, in none."""
    everything = sum(blocks[index].layout.slot_bytes for pass_ in passes for index in pass_)
    fits = budget_bytes is not None and budget_bytes >= everything
    slots = {} if fits else shared_slots(residency, passes)
    return tuple(replace(block, slot=slots.get(index)) for index, block in enumerate(blocks))
