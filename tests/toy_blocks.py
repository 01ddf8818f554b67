"""Toy blocks, engines and shard groups for tests of the block stream: a streamed model beside an equal resident one."""

from __future__ import annotations

import copy
import queue
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from crossdock.offload.codecs.codec import IDENTITY, Codec
from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine, CpuCopyEngine, Event
from crossdock.offload.memory.layout import BlockLayout, aligned_bytes
from crossdock.offload.schedule.residency import assumed_costs, minimum_bytes, plan_residency
from crossdock.offload.schedule.shared_slots import place_sizes, shared_slots
from crossdock.offload.schedule.slots import SlotSchedule, assign_slots
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.loader import Gather
from crossdock.runtime.contract.ordering import trace_in_order
from crossdock.runtime.plan.memory_plan import MemoryPlan

WIDTH = 8
STREAMED = (Home.HOST, Home.DEVICE_SHARD, Home.HOST_SHARD)


class BlockError(Exception):
    """What a block's forward, or a load, is made to raise."""


class QueuedEngine:
    """CUDA's picture on the CPU: compute is a lane too, and `wait` and `record` only queue."""

    @dataclass
    class Done:
        event: threading.Event = field(default_factory=threading.Event)

    def __init__(self, delay: Callable[[], None]) -> None:
        self.errors: list[BaseException] = []
        self.submits_to_failure: int | None = None  # of copies and gathers; then one raises, as on CUDA
        self._delay = delay
        self._lanes: dict[str, queue.SimpleQueue[Any]] = {}
        for lane in ("copy", "gather", "compute"):
            self._lanes[lane] = queue.SimpleQueue()
        lanes = list(self._lanes)
        self._threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()

    def submit(
        self, lane: str, work: Callable[[], None], after: Sequence[Event] = (), needs: Sequence[Event] = ()
    ) -> Event:
        if lane != "compute" and self.submits_to_failure is not None:
            self.submits_to_failure -= 1
            if self.submits_to_failure < 0:
                self.submits_to_failure = None
                raise BlockError("the submit")
        done = self.Done()
        self._lanes[lane].put((work, (*after, *needs), done))
        return done

    def move(self, target: Tensor, source: Tensor) -> None:
        np.copyto(target.numpy(), source.numpy())

    def wait(self, event: Event) -> None:
        self.submit("compute", nothing, (event,))

    def record(self) -> Event:
        return self.submit("compute", nothing)

    def synchronize(self) -> None:
        done = self.record()
        assert isinstance(done, self.Done)
        assert done.event.wait(60), "the lanes wait for each other"
        assert not self.errors, self.errors

    def mark(self, lane: str) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark

    def close(self) -> None:
        for lane, thread in zip(self._lanes.values(), self._threads, strict=True):
            lane.put(None)
            thread.join(60)

    def _run(self, lane: str) -> None:
        while (job := self._lanes[lane].get()) is not None:
            work, after, done = job
            for event in after:
                event.event.wait(60)
            try:
                self._delay()
                work()
            except BaseException as error:
                self.errors.append(error)
            done.event.set()


def nothing() -> None:
    pass


def strided(choice: random.Random, tensor: Tensor) -> Tensor:
    """The values of `tensor` (two-dimensional) turned, with gaps, behind an offset, or as it is."""
    match choice.randrange(4):
        case 0:
            return tensor.t().contiguous().t()
        case 1:
            wide = tensor.repeat_interleave(2, dim=1)
            return wide[:, ::2]
        case 2:
            return torch.cat([tensor, tensor])[len(tensor) :]
        case _:
            return tensor


class Toy(nn.Module):
    """Mixed dtypes and strides, column-major fp8, bool and tied tensors, all of which the output depends on."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        hidden = choice.randint(1, 20)
        self.up = nn.Linear(WIDTH, hidden, dtype=choice.choice((torch.bfloat16, torch.float16, torch.float64)))
        self.up.weight = nn.Parameter(strided(choice, self.up.weight.detach()))
        self.down = nn.Linear(hidden, WIDTH)
        if choice.random() < 0.5:
            self.alias = nn.Linear(hidden, WIDTH)
            self.alias.weight = self.down.weight  # tied
            self.norm = nn.LayerNorm(WIDTH)
        square = (WIDTH, WIDTH)
        whole = choice.choice((torch.int8, torch.int16, torch.int32))
        self.int8 = nn.Parameter(
            strided(choice, torch.randint(-99, 99, square, dtype=torch.int32).to(whole)), requires_grad=False
        )
        fp8 = choice.choice((torch.float8_e4m3fn, torch.float8_e5m2))
        self.fp8 = nn.Parameter(torch.randn(square).to(fp8).t(), requires_grad=False)
        self.register_buffer("scale", torch.rand(hidden) + 0.5)
        self.register_buffer("mask", torch.rand(WIDTH) < 0.5, persistent=False)
        self.requires_grad_(False)
        self.fail_at: int | None = None
        self.error: type[BaseException] = BlockError
        self.pause: Callable[[], None] = nothing
        self.engine: QueuedEngine | None = None
        self.collectives = 0
        self.on_collective: Callable[[], None] = nothing

    def forward(self, x: Any) -> Any:
        """x: `[batch, WIDTH]`, or with a queued engine a list that will hold it."""
        for _ in range(self.collectives):
            self.on_collective()
        if self.engine is None:
            return self._compute(x)

        def kernel() -> None:
            x[0] = self._compute(x[0])

        self.engine.submit("compute", kernel)
        return x

    def _compute(self, x: Tensor) -> Tensor:
        self._point(0)
        # kernels may round differently by strides and alignment, and the twin's memory has another alignment
        up = self.up.weight.clone(memory_format=torch.contiguous_format)
        hidden = nn.functional.linear(x.to(up.dtype), up, self.up.bias).float() * cast(Tensor, self.scale)
        self._point(1)
        x = torch.tanh(x + (self.alias if hasattr(self, "alias") else self.down)(hidden))
        if hasattr(self, "norm"):
            x = self.norm(x)
        x = x + torch.tanh(x @ self.int8.float() / 64) + torch.tanh(x @ self.fp8.float())
        self._point(2)
        return torch.where(cast(Tensor, self.mask), x, -0.5 * x)

    def _point(self, number: int) -> None:
        self.pause()
        if self.fail_at == number:
            raise self.error(f"at point {number}")


class ShardGroup:
    """The other ranks of a shard group, in this process: knows the whole block that a shard is cut from."""

    def __init__(self, parts: int, index: int) -> None:
        self.parts, self.index = parts, index
        self.fail: set[int] = set()
        self._wholes: dict[bytes, Tensor] = {}

    def shard_of(self, whole: Tensor, layout: BlockLayout | None = None, codec: Codec = IDENTITY) -> Tensor:
        """What this rank holds of `whole`; `layout`: needed with a codec."""
        if layout is None or codec.in_place:
            shard = whole.chunk(self.parts)[self.index].clone()
            self._wholes[shard.numpy().tobytes()] = whole
            return shard
        raw = whole.chunk(self.parts)
        held = [codec.encode(layout, self.parts, index, part) for index, part in enumerate(raw)]
        travelling = [part[: codec.travel_bytes(layout, self.parts)] for part in held]
        self._wholes[travelling[self.index].numpy().tobytes()] = torch.cat(travelling)
        return held[self.index]

    def gather(self) -> Gather:
        return Gather(self.parts, self.index, self._all_gather)

    def _all_gather(self, out: Tensor, shard: Tensor) -> None:
        within = shard.data_ptr() - out.data_ptr()
        in_place = within == self.index * shard.nbytes
        assert in_place or not 0 <= within < out.nbytes, "in place, a shard lies where the gather puts it"
        whole = self._wholes.get(shard.numpy().tobytes())
        assert whole is not None, "the gather began before the shard was there"
        if whole.data_ptr() in self.fail:
            self.fail.clear()
            raise BlockError("the gather")
        np.copyto(out.numpy(), whole.numpy())


class FailingEngine(CpuCopyEngine):
    """Raises once where a copy reads one of `fail` (addresses in sources): for whoever waits for it."""

    def __init__(self, delay: Callable[[], None] | None = None) -> None:
        super().__init__(60, delay)
        self.fail: set[int] = set()

    def move(self, target: Tensor, source: Tensor) -> None:
        fail_once(self.fail, target, source)
        super().move(target, source)


class ImmediateEngine:
    """Everything runs in the caller's thread; what a copy or a gather raises comes out of `submit`, as on CUDA."""

    def __init__(self, delay: Callable[[], None] = lambda: None) -> None:
        self.fail: set[int] = set()
        self._delay = delay

    def submit(
        self, lane: str, work: Callable[[], None], after: Sequence[Event] = (), needs: Sequence[Event] = ()
    ) -> Event:
        self._delay()
        work()
        return self.record()

    def move(self, target: Tensor, source: Tensor) -> None:
        fail_once(self.fail, target, source)
        target.copy_(source)

    def wait(self, event: Event) -> None:
        pass

    def record(self) -> Event:
        return cast(Event, object())

    def mark(self, lane: str) -> float:
        return time.perf_counter()

    def seconds(self, mark: float) -> float:
        return mark

    def reset_clock(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def fail_once(addresses: set[int], target: Tensor, source: Tensor) -> None:
    """Where `source` covers one of `addresses`: fill half of `target`, and raise."""
    start = source.data_ptr()
    if any(start <= address < start + source.nbytes for address in addresses):
        addresses.clear()
        target[: len(target) // 2].fill_(0xFF)
        raise BlockError("the copy")


@dataclass
class Case:
    """A streamed model beside an equal resident one."""

    stream: BlockStream
    modules: list[Toy]
    twins: list[Toy]
    wholes: list[Tensor]
    group: ShardGroup

    def check(self, order: Sequence[int]) -> None:
        """One pass over the blocks in `order`; same bits as the resident run."""
        found, expected = run(self.modules, order), run(self.twins, order)
        assert bool(expected.isfinite().all())
        assert torch.equal(found, expected), f"differs by {(found - expected).abs().max()}"

    def misses(self, order: Sequence[int]) -> int:
        before = self.stream.counters.misses
        self.check(order)
        return self.stream.counters.misses - before

    def finish(self, in_order: bool = True) -> None:
        """Detach; what was recorded must be in order, unless a load failed."""
        self.stream.remove()
        self.stream.engine.close()
        if in_order and isinstance(self.stream.engine, CpuCopyEngine):
            memory = SimpleNamespace(blocks=self.stream.blocks, schedule=self.stream.schedule)
            trace = [event for event in self.stream.trace() if event.sequence >= self.stream.scheduled_at]
            assert list(trace_in_order(cast(MemoryPlan, memory), 0, trace)) == []


def run(modules: Sequence[Toy], order: Sequence[int]) -> Tensor:
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    engine = modules[0].engine
    if engine is None:
        for index in order:
            x = modules[index](x)
        return x
    box = [x]
    for index in order:
        modules[index](box)
    engine.synchronize()
    return box[0]


def build(
    homes: Sequence[Home],
    prefetch: int,
    seed: int = 0,
    engine: CopyEngine | None = None,
    poison: bool = False,
    resident: Collection[int] = (),
    arena: Arena | None = None,
    budget: float | None = None,
    passes: Sequence[Sequence[int]] = (),
    codec: Codec = IDENTITY,
) -> Case:
    """An attached stream over one toy block per home.

    Args:
        budget: residents and slots as planned for it, from the minimum (0.0) to everything (1.0).
        passes: blocks that take turns; with a budget, all of them streamable.
        codec: of all that is streamed.
    """
    choice = random.Random(seed)
    torch.manual_seed(seed)
    modules = [Toy(choice) for _ in homes]
    twins = copy.deepcopy(modules)
    parts = choice.randint(1, 4)
    group = ShardGroup(parts, choice.randrange(parts))
    blocks, wholes = [], []
    for index, (module, home) in enumerate(zip(modules, homes, strict=True)):
        layout = BlockLayout.of(module, multiple=parts)
        whole = aligned_bytes(layout.slot_bytes, torch.device("cpu"))
        whole.random_(0, 256)  # so that shards of nothing but padding differ
        layout.pack(module, whole)
        if home.sharded:
            source = group.shard_of(whole, layout, codec)
        else:
            source = codec.encode(layout, 1, 0, whole) if home.streamed else whole
        own = codec if home.streamed else IDENTITY
        blocks.append(StreamedBlock(f"blocks.{index}", module, layout, home, source, codec=own))
        wholes.append(whole)
    schedule = assign_slots(sum(home.streamed for home in homes) - len(resident), prefetch)
    if passes:
        assert budget is not None
        sizes = place_sizes([[blocks[index].layout.slot_bytes for index in pass_] for pass_ in passes])
        least = minimum_bytes(sizes, (prefetch,))
        allowed = least + int(budget * max(sum(sizes) - least, 0))
        residency = plan_residency(sizes, assumed_costs(sizes), allowed, (prefetch,))
        slots = shared_slots(residency, passes)
        schedule = SlotSchedule(tuple(slots[i] for pass_ in passes for i in pass_), residency.schedule.prefetch)
    elif budget is not None:
        streamable = [index for index, home in enumerate(homes) if home.streamed]
        sizes = [blocks[index].layout.slot_bytes for index in streamable]
        least = minimum_bytes(sizes, (prefetch,))
        allowed = least + int(budget * max(sum(sizes) - least, 0))
        residency = plan_residency(sizes, assumed_costs(sizes), allowed, (prefetch,))
        resident, schedule = [streamable[place] for place in residency.resident], residency.schedule
    engine = engine or CpuCopyEngine(60)
    for module in modules:
        module.engine = engine if isinstance(engine, QueuedEngine) else None
    stream = BlockStream(
        blocks,
        schedule,
        torch.device("cpu"),
        engine,
        group.gather(),
        resident=resident,
        passes=passes,
        arena=arena,
        yield_to_collectives=choice.random() < 0.5,
        poison_freed=poison,
    )
    for module in modules:
        module.collectives, module.on_collective = choice.choice((0, 0, 1, 2, 5)), stream.collective_issued
    stream.attach()
    return Case(stream, modules, twins, wholes, group)


def stalls(seed: int, share: float) -> Callable[[], None]:
    """Sleeps up to a millisecond, now and then."""
    choice = random.Random(seed)

    def stall() -> None:
        if choice.random() < share:
            time.sleep(choice.random() * 1e-3)

    return stall
