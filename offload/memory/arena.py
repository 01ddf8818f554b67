"""Device memory for weights, in one allocation, which several tenants use in turn.

A slot is a fixed range of it. The slots of one tenant (a transformer, a text encoder, a VAE) never overlap; slots of
different tenants may. Loading into a slot takes its bytes from whoever has them: the rival's block is then absent and
is loaded again when it is next asked for. So the components of a pipeline take turns under one budget without any
allocation when the turn passes, and every parameter keeps its address.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol

import torch

from crossdock.offload.memory.copy_engine import Event
from crossdock.offload.memory.layout import aligned_bytes


class Tenant(Protocol):
    def settle_interrupted(self) -> None:
        """End the reading of a block that was thrown out of its forward without a hook."""

    def flush(self) -> None:
        """Enqueue what was held back: others wait for it."""

    def vacate(self) -> None:
        """Give all slots back; nothing may be computing."""

    def move_in(self) -> None:
        """Lease slots again, and bind to them."""


class Slot:
    """Bytes [start, stop) of an arena, and which block of its tenant they hold."""

    def __init__(self, arena: Arena, tenant: Tenant, start: int, stop: int, idle: Event) -> None:
        self.start, self.stop = start, stop
        self.memory = arena.memory[start:stop]
        self.holder: int | None = None  # the block that is in it, or on its way into it
        self.ready: Event = idle  # its bytes have arrived
        self.free: Event | None = idle  # its last reader is done; None while it is being read
        self.rivals: list[Slot] = []
        self._arena = arena
        self._tenant = tenant
        self._used = 0

    def begin_reading(self) -> None:
        self.free = None

    def end_reading(self, done: Event) -> None:
        self.free = done
        self._used = self._arena.tick()

    def claim(self, block: int) -> list[Event]:
        """Make `block` the holder; returns what has to have ended before its bytes may be written.

        Raises:
            RuntimeError: somebody is computing with these bytes.
        """
        if self.free is None:
            raise RuntimeError(f"a slot is being read while block {block} wants it")
        waits = [self.free, self.ready]
        for rival in self.rivals:
            rival._tenant.flush()
            if rival.free is None:
                rival._tenant.settle_interrupted()
            if rival.free is None:
                raise RuntimeError(f"another component is computing with the bytes that block {block} wants")
            rival.holder = None
            if rival._used > self._used:
                waits += [rival.free, rival.ready]
        self.holder = block
        self._used = self._arena.tick()
        return waits


class Arena:
    """`memory`: uint8 `[nbytes]` on `device`, aligned."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.memory = aligned_bytes(nbytes, device)
        self._slots: list[Slot] = []
        self._tenants: list[Tenant] = []
        self._ticks = itertools.count(1)

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def tick(self) -> int:
        return next(self._ticks)

    def enter(self, tenant: Tenant) -> None:
        self._tenants.append(tenant)

    def leave(self, tenant: Tenant) -> None:
        self._tenants.remove(tenant)

    def lease(self, tenant: Tenant, sizes: Iterable[int], idle: Event) -> list[Slot]:
        """Slots of these sizes (bytes), one after the other from the start, for one tenant.

        Raises:
            ValueError: they do not fit.
        """
        ends = list(itertools.accumulate(sizes))
        if ends and ends[-1] > self.nbytes:
            raise ValueError(f"{ends[-1]} bytes of slots do not fit into an arena of {self.nbytes} bytes")
        slots = [Slot(self, tenant, start, stop, idle) for start, stop in zip([0, *ends], ends, strict=False)]
        for slot in slots:
            slot.rivals = [other for other in self._slots if other.start < slot.stop and slot.start < other.stop]
            for rival in slot.rivals:
                rival.rivals.append(slot)
        self._slots += slots
        return slots

    def evict(self, stop: int) -> None:
        """Forget what slots before byte `stop` hold. Where blocks are gathered, all ranks must forget alike."""
        for slot in self._slots:
            if slot.start < stop:
                slot.holder = None

    def release(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self._slots.remove(slot)
            for rival in slot.rivals:
                rival.rivals.remove(slot)

    def resize(self, nbytes: int) -> None:
        """Another size, for all tenants; every address changes. Nothing may be computing."""
        for tenant in self._tenants:
            tenant.vacate()
        self.memory = self.memory.new_empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.memory = aligned_bytes(nbytes, self.device)
        for tenant in self._tenants:
            tenant.move_in()
