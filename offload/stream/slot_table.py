"""Which block has which slot: the slots that blocks share, and those of one block alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from crossdock.offload.memory.arena import Arena, Slot, Tenant
from crossdock.offload.memory.copy_engine import Event
from crossdock.offload.schedule.slots import slot_sizes
from crossdock.offload.stream.block import StreamedBlock


class SlotTable:
    """The slots of `blocks`, which go by their indices.

    Attributes:
        number: block -> the number of the slot that it shares.
        shared: the slots that blocks share, by number.
        own: block -> the slot that it has alone.
        of: block -> its slot.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], staging_bytes: int) -> None:
        self.staging_bytes = staging_bytes
        self._blocks = blocks
        self.assign({}, ())
        self._leased: list[Slot] = []
        self.shared: list[Slot] = []
        self.own: dict[int, Slot] = {}
        self.of: dict[int, Slot] = {}

    def assign(self, number: Mapping[int, int], alone: Sequence[int]) -> None:
        """For the next `lease`. `alone`: the blocks with a slot of their own."""
        self.number, self._alone = dict(number), tuple(alone)

    @property
    def nbytes(self) -> int:
        """Device bytes of all slots, and of what is decoded into them."""
        return sum(self._sizes())

    @property
    def every(self) -> list[Slot]:
        return [*self.shared, *self.own.values()]

    def lease(self, arena: Arena, tenant: Tenant, idle: Event) -> Slot | None:
        """Returns where what travels encoded waits to be decoded; None where nothing does."""
        self._leased = slots = arena.lease(tenant, self._sizes(), idle)
        count = len(self._shared_sizes())
        self.shared = slots[:count]
        self.own = dict(zip(self._alone, slots[count:], strict=False))
        self.of = {i: self.shared[slot] for i, slot in self.number.items()} | self.own
        return slots[-1] if self.staging_bytes else None

    def release(self, arena: Arena) -> None:
        arena.release(self._leased)
        self._leased, self.shared, self.own, self.of = [], [], {}, {}

    def _shared_sizes(self) -> list[int]:
        return slot_sizes([self._blocks[i].layout.slot_bytes for i in self.number], [*self.number.values()])

    def _sizes(self) -> list[int]:
        own = [self._blocks[i].layout.slot_bytes for i in self._alone]
        return [*self._shared_sizes(), *own, *([self.staging_bytes] if self.staging_bytes else [])]
