"""Where a model rests on a rank, and through which slots its blocks pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from crossdock.offload.codecs.codec import IDENTITY, Codec, staging_bytes
from crossdock.offload.memory.layout import ALIGNMENT, BlockLayout
from crossdock.offload.schedule.residency import Residency
from crossdock.offload.schedule.shared_slots import shared_slots
from crossdock.offload.schedule.slots import SlotSchedule
from crossdock.offload.stream.block import Home


@dataclass(frozen=True)
class PlannedBlock:
    """One transformer block. Sizes in bytes.

    Attributes:
        name: its path in the model.
        slot: None where it stays on the device.
        parts: how many it is cut into, one for each rank of a shard group.
    """

    name: str
    layout: BlockLayout
    home: Home
    slot: int | None
    codec: Codec = IDENTITY
    parts: int = 1

    @property
    def held_bytes(self) -> int:
        """What rests of it on a rank, or in the host store that the rank shares."""
        return self.codec.held_bytes(self.layout, self.parts)

    @property
    def travel_bytes(self) -> int:
        """What is copied and gathered to make it present."""
        return self.parts * self.codec.travel_bytes(self.layout, self.parts)

    @property
    def staging_bytes(self) -> int:
        """Device memory in which it is decoded."""
        return staging_bytes(self.codec, self.layout, self.parts)


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything rests; all that a rescheduling changes is in here.

    Attributes:
        blocks: as the model lists them.
        passes: per transformer, indices of its blocks that can be streamed, in the order in which they run.
        residency: which places of a pass stay on the device while it runs, and the slots of the others.
        budget_bytes: device memory that the weights may take; None: as little as possible.
        arena_bytes: device memory that the transformer's blocks, the text encoder and the VAE use in turn; None: they
            do not take turns.
        turn_bytes: component -> how much of the arena, from its start, it uses in its turn.
        encodes_text: text encoders rest encoded, too.
        component_host_bytes: host memory that the components that take turns need at once, on the rank that runs them.
        outside: fqns of all parameters and buffers outside the blocks; resident on the device.
        outside_bytes: of these, and of what never leaves the device of the other components.
    """

    blocks: tuple[PlannedBlock, ...]
    passes: tuple[tuple[int, ...], ...]
    residency: Residency
    budget_bytes: int | None
    arena_bytes: int | None
    turn_bytes: Mapping[str, int]
    encodes_text: bool
    component_host_bytes: int
    outside: tuple[str, ...]
    outside_bytes: int

    @cached_property
    def _outside(self) -> frozenset[str]:
        return frozenset(self.outside)

    @property
    def order(self) -> tuple[int, ...]:
        """`passes`, one after the other."""
        return tuple(chain.from_iterable(self.passes))

    def slot_sizes_of(self, indices: Sequence[int]) -> list[int]:
        """Bytes that these blocks take on the device."""
        return [self.blocks[index].layout.slot_bytes for index in indices]

    def travel_sizes_of(self, indices: Sequence[int]) -> list[int]:
        """Bytes that make each of these blocks present."""
        return [self.blocks[index].travel_bytes for index in indices]

    @property
    def staging_bytes(self) -> int:
        """Of the blocks' device memory, where what travels encoded is decoded."""
        return max((block.staging_bytes for block in self.blocks), default=0)

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

    def schedule_report(self, schedule_note: str) -> dict[str, object]:
        """How the blocks use the device, and what became of the schedule once the first steps were measured.

        `step_ms`: predicted time of the blocks of a step, from the costs that the note names; `bound_ms` is proven to
        be a lower bound for this budget. `encoded`: of the blocks with a codec, what rests here, or would without.
        """
        residency, encoded = self.residency, [block for block in self.blocks if not block.codec.in_place]
        places = ((pass_, place) for pass_ in self.passes for place in residency.resident)
        return {
            "resident": [self.blocks[i].name for i in sorted(pass_[at] for pass_, at in places if at < len(pass_))],
            "prefetch": residency.schedule.prefetch,
            "slots": residency.schedule.n_slots,
            "budget_bytes": self.budget_bytes,
            "arena_bytes": self.arena_bytes,
            "step_ms": round(residency.step_s * 1e3, 3),
            "bound_ms": round(residency.bound_s * 1e3, 3),
            "schedule_note": schedule_note,
            "encoded": {
                "blocks": len(encoded),
                "held_bytes": sum(block.held_bytes for block in encoded),
                "plain_bytes": sum(block.layout.shard_bytes(block.parts) for block in encoded),
            },
        }

    @property
    def resident(self) -> frozenset[int]:
        """Indices of the blocks that can be streamed and have memory of their own: they are brought once and stay."""
        return frozenset(index for index in self.order if self.blocks[index].slot is None)

    @cached_property
    def streamed(self) -> tuple[PlannedBlock, ...]:
        """The blocks that pass through slots, in the order in which they run."""
        return tuple(self.blocks[index] for index in self.order if self.blocks[index].slot is not None)

    def scheduled(self, residency: Residency, passes: tuple[tuple[int, ...], ...]) -> MemoryPlan:
        """The same with these residents, and the others in slots; where the budget holds all blocks, in none."""
        budget, everything = self.blocks_budget_bytes, sum(map(sum, map(self.slot_sizes_of, passes)))
        slots = {} if budget is not None and budget >= everything else shared_slots(residency, passes)
        blocks = tuple(replace(block, slot=slots.get(index)) for index, block in enumerate(self.blocks))
        return replace(self, blocks=blocks, passes=passes, residency=residency)

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
