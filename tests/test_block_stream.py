"""The block stream against the resident run, bit for bit, in hundreds of random cases on two copy engines.

`CpuCopyEngine` computes synchronously. `QueuedEngine` also queues the compute, as CUDA does: the host runs
ahead, and a load that does not wait for the last reader of its slot overwrites weights still to be read.
"""

from __future__ import annotations

import copy
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossdock.offload.block_stream import BlockStream, Gather, Home, StreamedBlock
from crossdock.offload.copy_engine import CopyEngine, CpuCopyEngine, Event
from crossdock.offload.layout import ALIGNMENT, BlockLayout, aligned_bytes
from crossdock.offload.schedule import assign_slots
from crossdock.runtime.plan import RunPlan
from crossdock.runtime.verify import verify_trace

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
        self._delay = delay
        self._lanes: dict[str, queue.SimpleQueue[Any]] = {}
        for lane in ("copy", "gather", "compute"):
            self._lanes[lane] = queue.SimpleQueue()
        lanes = list(self._lanes)
        self._threads = [threading.Thread(target=self._run, args=(lane,), daemon=True) for lane in lanes]
        for thread in self._threads:
            thread.start()

    def submit(self, lane: str, work: Callable[[], None], after: Sequence[Event] = ()) -> Event:
        done = self.Done()
        self._lanes[lane].put((work, after, done))
        return done

    def move(self, target: Tensor, source: Tensor) -> None:
        np.copyto(target.numpy(), source.numpy())

    def wait(self, event: Event) -> None:
        self.submit("compute", _nothing, (event,))

    def record(self) -> Event:
        return self.submit("compute", _nothing)

    def synchronize(self) -> None:
        done = self.record()
        assert isinstance(done, self.Done)
        assert done.event.wait(60), "the lanes wait for each other"
        assert not self.errors, self.errors

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


def _nothing() -> None:
    pass


class Toy(nn.Module):
    """bf16, fp32, int8, column-major fp8, bool and tied tensors, all of which the output depends on."""

    def __init__(self, choice: random.Random) -> None:
        super().__init__()
        hidden = choice.randint(1, 20)
        self.up = nn.Linear(WIDTH, hidden, dtype=torch.bfloat16)
        self.down = nn.Linear(hidden, WIDTH)
        if choice.random() < 0.5:
            self.alias = nn.Linear(hidden, WIDTH)
            self.alias.weight = self.down.weight  # tied
            self.norm = nn.LayerNorm(WIDTH)
        square = (WIDTH, WIDTH)
        self.int8 = nn.Parameter(torch.randint(-99, 99, square, dtype=torch.int8), requires_grad=False)
        self.fp8 = nn.Parameter(torch.randn(square).to(torch.float8_e4m3fn).t(), requires_grad=False)
        self.register_buffer("scale", torch.rand(hidden) + 0.5)
        self.register_buffer("mask", torch.rand(WIDTH) < 0.5, persistent=False)
        self.requires_grad_(False)
        self.fail_at: int | None = None
        self.pause: Callable[[], None] = _nothing
        self.engine: QueuedEngine | None = None

    def forward(self, x: Any) -> Any:
        """x: `[batch, WIDTH]`, or with a queued engine a list that will hold it."""
        if self.engine is None:
            return self._compute(x)

        def kernel() -> None:
            x[0] = self._compute(x[0])

        self.engine.submit("compute", kernel)
        return x

    def _compute(self, x: Tensor) -> Tensor:
        self._point(0)
        hidden = self.up(x.bfloat16()).float() * cast(Tensor, self.scale)
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
            raise BlockError(f"at point {number}")


class ShardGroup:
    """The other ranks of a shard group, in this process: knows the whole block that a shard is cut from."""

    def __init__(self, parts: int, index: int) -> None:
        self.parts, self.index = parts, index
        self.fail: set[int] = set()
        self._wholes: dict[bytes, Tensor] = {}

    def shard_of(self, whole: Tensor) -> Tensor:
        shard = whole.chunk(self.parts)[self.index].clone()
        self._wholes[shard.numpy().tobytes()] = whole
        return shard

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
    """Raises once where a copy reads one of `fail` (addresses of sources)."""

    def __init__(self, delay: Callable[[], None] | None = None) -> None:
        super().__init__(60, delay)
        self.fail: set[int] = set()

    def move(self, target: Tensor, source: Tensor) -> None:
        if source.data_ptr() in self.fail:
            self.fail.clear()
            raise BlockError("the copy")
        super().move(target, source)


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
        found, expected = _run(self.modules, order), _run(self.twins, order)
        assert bool(expected.isfinite().all())
        assert torch.equal(found, expected), f"differs by {(found - expected).abs().max()}"

    def misses(self, order: Sequence[int]) -> int:
        before = self.stream.counters.misses
        self.check(order)
        return self.stream.counters.misses - before

    def finish(self) -> None:
        """Detach; what was recorded must be in order."""
        self.stream.remove()
        if isinstance(self.stream.engine, CpuCopyEngine):
            plan = SimpleNamespace(blocks=self.stream.blocks, schedule=self.stream.schedule)
            assert verify_trace(cast(RunPlan, plan), 0, self.stream.trace) == []


def _run(modules: Sequence[Toy], order: Sequence[int]) -> Tensor:
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


def _build(
    homes: Sequence[Home],
    prefetch: int,
    seed: int = 0,
    engine: CopyEngine | None = None,
    poison: bool = False,
) -> Case:
    """An attached stream over one toy block per home."""
    choice = random.Random(seed)
    torch.manual_seed(seed)
    modules = [Toy(choice) for _ in homes]
    twins = copy.deepcopy(modules)
    parts = choice.randint(1, 4)
    group = ShardGroup(parts, choice.randrange(parts))
    blocks, wholes = [], []
    for index, (module, home) in enumerate(zip(modules, homes, strict=True)):
        layout = BlockLayout.of(module, multiple=parts)
        whole = aligned_bytes(layout.nbytes, torch.device("cpu"))
        whole.random_(0, 256)  # so that shards of nothing but padding differ
        layout.pack(module, whole)
        source = group.shard_of(whole) if home.sharded else whole
        blocks.append(StreamedBlock(f"blocks.{index}", module, layout, home, source))
        wholes.append(whole)
    schedule = assign_slots(sum(home.streamed for home in homes), prefetch)
    engine = engine or CpuCopyEngine(60)
    for module in modules:
        module.engine = engine if isinstance(engine, QueuedEngine) else None
    stream = BlockStream(blocks, schedule, torch.device("cpu"), engine, group.gather(), poison_freed=poison)
    stream.attach()
    return Case(stream, modules, twins, wholes, group)


def _stalls(seed: int, share: float) -> Callable[[], None]:
    """Sleeps up to a millisecond, now and then."""
    choice = random.Random(seed)

    def stall() -> None:
        if choice.random() < share:
            time.sleep(choice.random() * 1e-3)

    return stall


def _random_homes(choice: random.Random, most: int) -> list[Home]:
    kinds = choice.sample(list(Home), choice.randint(1, 3))
    return choice.choices(kinds, k=choice.randint(1, most))


def _random_order(choice: random.Random, count: int) -> list[int]:
    """A pass: mostly all blocks in order; else with skips, repeats, reversed, shuffled or one half."""
    order = list(range(count))
    match choice.randrange(8):
        case 0:
            return [index for index in order if choice.random() < 0.7] or order[:1]
        case 1:
            return [index for index in order for _ in range(choice.choice((1, 1, 1, 2, 3)))]
        case 2:
            return order[::-1]
        case 3:
            return choice.sample(order, count)
        case 4:
            return order[: count // 2 + 1] if choice.random() < 0.5 else order[count // 2 :]
        case _:
            return order


def _quiesce(stream: BlockStream) -> None:
    """Wait for everything that was enqueued."""
    for lane in ("gather", "copy", "gather"):
        stream.engine.wait(stream.engine.submit(cast(Any, lane), _nothing, ()))


def _tensors(modules: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    """Every name's tensor, tied ones under each name."""
    model = nn.ModuleList(modules)
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _addresses(modules: Sequence[nn.Module]) -> list[tuple[str, int, int]]:
    return [(name, id(tensor), tensor.data_ptr()) for name, tensor in _tensors(modules)]


# -- random cases ------------------------------------------------------------------------------------------


def _stress(seed: int) -> None:
    choice = random.Random(seed)
    homes = _random_homes(choice, choice.choice((3, 8, 40)))
    engine = CpuCopyEngine(60, _stalls(seed, choice.choice((0, 0.2))))
    case = _build(homes, choice.randint(1, 4), seed, engine, choice.random() < 0.5)
    for module in case.modules:
        module.pause = _stalls(seed, choice.choice((0, 0, 0.2)))
    if choice.random() < 0.5:
        case.stream.rehearse()
    addresses = _addresses(case.modules)
    for _ in range(choice.randint(2, 5)):
        order = _random_order(choice, len(homes))
        if choice.random() < 0.3:
            victim = case.modules[choice.choice(order)]
            victim.fail_at = choice.randrange(3)
            with pytest.raises(BlockError, match="at point"):
                _run(case.modules, order)
            victim.fail_at = None
        else:
            case.check(order)
    case.check(range(len(homes)))
    assert _addresses(case.modules) == addresses, "a parameter was rebound"
    case.finish()


@pytest.mark.parametrize("chunk", range(10))
def test_random_cases_equal_the_resident_run(chunk: int) -> None:
    """Pitfalls 3, 15, 16, 17 and 21: sizes, skipped blocks, odd counts and exceptions; any mix of homes."""
    for seed in range(chunk * 25, chunk * 25 + 25):
        try:
            _stress(seed)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")


@pytest.mark.parametrize("chunk", range(4))
def test_random_cases_with_queued_compute(chunk: int) -> None:
    """On CUDA the host runs ahead of the compute: a load must wait for the slot's last reader."""
    for seed in range(1000 + chunk * 20, 1020 + chunk * 20):
        choice = random.Random(seed)
        homes = _random_homes(choice, choice.choice((4, 20)))
        engine = QueuedEngine(_stalls(seed, choice.choice((0.05, 0.3))))
        case = _build(homes, choice.randint(1, 4), seed, cast(CopyEngine, engine), choice.random() < 0.5)
        order = [index for _ in range(3) for index in _random_order(choice, len(homes))]
        try:
            case.check(order)
        except BaseException as error:
            pytest.fail(f"seed {seed}: {error!r}")
        case.finish()


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("count", range(1, 10))
def test_slow_compute_with_queued_engine(count: int, home: Home) -> None:
    """Every reader later than every load: what is overwritten too early is always seen, not by chance."""
    engine = QueuedEngine(_nothing)
    case = _build([home] * count, 1 + count % 2, count, cast(CopyEngine, engine))
    for module in case.modules:
        module.pause = lambda: time.sleep(3e-4)
    case.check([*range(count)] * 2)
    case.finish()


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_device_bytes_stay_within_the_window(prefetch: int, home: Home) -> None:
    """Pitfall 1: an offload that frees nothing. Distinct storages behind all parameters and buffers count."""
    case = _build([home] * 25, prefetch)
    case.check(range(25))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for _, t in _tensors(case.modules)}
    held = sum(storage.nbytes() for storage in storages.values())
    largest = max(block.layout.nbytes for block in case.stream.blocks)
    assert held <= (prefetch + 2) * (largest + ALIGNMENT)
    assert held == sum(memory.untyped_storage().nbytes() for memory in case.stream.slot_memory)
    assert len(storages) < 25
    case.finish()


@pytest.mark.parametrize("home", STREAMED)
def test_a_changed_source_changes_the_output(home: Home) -> None:
    """Pitfall 1: weights that come from somewhere else than the bytes that are said to be streamed."""
    case = _build([home] * 9, 2)
    case.check(range(9))
    before = _run(case.modules, range(9))
    case.wholes[4].fill_(0xFF)
    if home.sharded:
        case.stream.blocks[4].source.copy_(case.group.shard_of(case.wholes[4]))
    after = _run(case.modules, range(9))
    assert bool(before.isfinite().all())
    assert bool(after.isnan().any())
    case.finish()


@pytest.mark.parametrize("home", STREAMED)
def test_freed_slots_are_poisoned(home: Home) -> None:
    """`poison_freed` makes a read of freed memory visible: without it the old weights are still there."""
    case = _build([home] * 11, 2, poison=True)
    case.check(range(11))
    _quiesce(case.stream)
    next_ones = {case.stream.slot_of("blocks.0"), case.stream.slot_of("blocks.1")}
    freed = [slot for slot in range(case.stream.schedule.n_slots) if slot not in next_ones]
    assert freed
    for slot in freed:
        assert bool((case.stream.slot_memory[slot] == 0xFF).all())
    for index, module in enumerate(case.modules):
        if case.stream.slot_of(f"blocks.{index}") in freed:
            for tensor in (module.up.weight, module.down.bias, module.fp8.float(), module.scale):
                assert bool(cast(Tensor, tensor).isnan().all())
    case.check(range(11))
    case.finish()


def test_counters_tell_the_bytes() -> None:
    """A report of the traffic that was computed from the plan, not from what happened, proves nothing."""
    homes = [Home.HOST, Home.HOST_SHARD, Home.DEVICE_SHARD, Home.RESIDENT] * 3
    case = _build(homes, 1)
    case.check(range(12))
    case.check(range(12))
    _quiesce(case.stream)
    events = [(event.kind, event.block) for event in case.stream.trace]
    h2d = gathered = 0
    for block in case.stream.blocks:
        h2d += events.count(("load_end", block.name)) * block.source.nbytes
        gathered += events.count(("gather_end", block.name)) * (block.layout.nbytes - block.source.nbytes)
    assert (case.stream.counters.h2d_bytes, case.stream.counters.gathered_bytes) == (h2d, gathered)
    assert h2d > 0
    case.finish()


# -- attach and remove -------------------------------------------------------------------------------------


def _hooks(modules: Sequence[nn.Module]) -> list[dict[str, list[int]]]:
    """Keys of every hook dict of every module."""
    return [
        {name: list(value) for name, value in vars(module).items() if "_hooks" in name and value is not None}
        for root in modules
        for module in root.modules()
    ]


def test_remove_restores_the_model_exactly() -> None:
    """A handle undoes itself: the same tensor objects under every name, the same hooks, the same bits."""
    choice = random.Random(3)
    modules = [Toy(choice) for _ in range(7)]
    modules[2].register_forward_hook(lambda *_: None)
    twins = copy.deepcopy(modules)
    before = (_addresses(modules), _hooks(modules), [list(module.state_dict()) for module in modules])
    layouts = [BlockLayout.of(module) for module in modules]
    blocks = []
    for index, (module, layout) in enumerate(zip(modules, layouts, strict=True)):
        source = aligned_bytes(layout.nbytes, torch.device("cpu"))
        layout.pack(module, source)
        home = Home.RESIDENT if index == 3 else Home.HOST
        blocks.append(StreamedBlock(str(index), module, layout, home, source))
    stream = BlockStream(blocks, assign_slots(6, 1), torch.device("cpu"), CpuCopyEngine(60))
    stream.attach()
    assert {a[2] for a in _addresses(modules)}.isdisjoint(a[2] for a in before[0]), "nothing was bound"
    assert [list(module.state_dict()) for module in modules] == before[2]
    expected = _run(twins, range(7))
    assert torch.equal(_run(modules, range(7)), expected)
    stream.remove()
    after = (_addresses(modules), _hooks(modules), [list(module.state_dict()) for module in modules])
    assert after == before
    assert torch.equal(_run(modules, range(7)), expected)


@pytest.mark.parametrize("home", Home)
def test_attach_twice_raises(home: Home) -> None:
    """Pitfall 4: two mechanisms on one parameter. A second attach would forget the original tensors."""
    case = _build([home] * 3, 1)
    with pytest.raises(RuntimeError, match="attached already"):
        case.stream.attach()
    case.check(range(3))
    case.finish()


def test_tied_names_stay_tied() -> None:
    """Pitfall 11: two names bound to two tensors would drift apart where somebody writes to one of them."""
    case = _build([Home.HOST] * 12, 1)
    tied = [module for module in case.modules if hasattr(module, "alias")]
    assert tied
    for module in tied:
        assert module.alias.weight is module.down.weight
    case.finish()


def test_a_wrong_composition_is_refused() -> None:
    """A sharded home without a group, or slots for another number of blocks, is refused at once."""
    case = _build([Home.DEVICE_SHARD] * 3, 1)
    with pytest.raises(ValueError, match="shard group"):
        BlockStream(case.stream.blocks, assign_slots(3, 1), torch.device("cpu"), case.stream.engine)
    with pytest.raises(ValueError, match="3 streamed blocks, but slots for 4"):
        BlockStream(case.stream.blocks, assign_slots(4, 1), torch.device("cpu"), case.stream.engine)
    case.finish()


# -- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_no_misses_in_steady_state(prefetch: int, poison: bool, home: Home) -> None:
    """Pitfall 18: the wrap to the next step and the first step after the rehearsal must be prefetched too."""
    for count in (1, 2, 3, 4, 5, 7, 9, 13):
        case = _build([home] * count, prefetch, count, poison=poison)
        case.stream.rehearse()
        alone = poison and count == 1  # nothing can be ahead of the only block
        found = [case.misses(range(count)) for _ in range(3)]
        assert found == [int(alone)] * 3, f"{count} blocks, prefetch {prefetch}"
        case.finish()


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_the_next_blocks_are_on_their_way(prefetch: int) -> None:
    """Pitfall 18: while a block computes, the `prefetch` next ones, over the wrap too, are on their way."""
    count = 13
    case = _build([Home.HOST] * count, prefetch)
    case.check(range(count))
    for index, module in enumerate(case.modules):
        ahead: list[Tensor] = []

        def look(index: int = index, ahead: list[Tensor] = ahead) -> None:
            if ahead:
                return
            _quiesce(case.stream)
            for step in range(1, prefetch + 1):
                following = (index + step) % count
                whole = case.wholes[following]
                slot = case.stream.slot_of(f"blocks.{following}")
                assert slot is not None
                ahead.append(case.stream.slot_memory[slot][: whole.nbytes])
                assert torch.equal(ahead[-1], whole), f"block {following} is not there while {index} computes"

        module.pause = look
    case.check(range(count))
    case.finish()


def test_skips_and_reversal_are_misses_and_heal() -> None:
    """Pitfall 15: a cache skips a block, the next one's weights were never fetched. Right, counted, over."""
    count = 12
    case = _build([Home.HOST] * count, 1)
    case.check(range(count))
    assert case.misses(range(count)) == 0
    assert case.misses([index for index in range(count) if index != 5]) == 1
    assert case.misses(range(count)) == 0
    assert case.misses(range(count - 1, -1, -1)) >= count - 2
    case.misses(range(count))
    assert case.misses(range(count)) == 0
    case.finish()


@pytest.mark.parametrize("prefetch", [1, 2, 3, 4])
@pytest.mark.parametrize("each", [1, 2, 3, 5, 8])
def test_interleaved_stacks_are_prefetched_as_they_run(each: int, prefetch: int) -> None:
    """Some models alternate two block lists. Once that is recorded, only neighbours in one slot miss."""
    case = _build([Home.HOST] * (2 * each), prefetch, poison=True)
    case.stream.rehearse()
    order = [stack * each + index for index in range(each) for stack in (0, 1)]
    first = case.misses(order)
    names = tuple(f"blocks.{index}" for index in order)
    slots = [case.stream.slot_of(name) for name in names]
    least = sum(slot == slots[place - 1] for place, slot in enumerate(slots))
    case.check(order)  # closes the recording: from here on the real order is prefetched
    assert case.stream.order == names
    assert [case.misses(order), case.misses(order)] == [least, least], f"{first} in the first pass"
    case.finish()


def test_a_rehearsal_is_not_taken_for_the_real_order() -> None:
    """The rehearsal runs the blocks as listed; if it were recorded, the model's own order never would be."""
    case = _build([Home.HOST] * 8, 1)
    case.stream.rehearse()
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    case.check(order)
    case.check(order)
    assert case.stream.order[:2] in {("blocks.0", "blocks.7"), ("blocks.7", "blocks.6")}
    assert case.misses(order) == 0
    case.finish()


# -- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", STREAMED)
@pytest.mark.parametrize("stalled", [False, True])
def test_a_failing_load_is_raised_and_heals(stalled: bool, home: Home) -> None:
    """Pitfall 21: an exception leaves a slot half filled; the next request must not be stale or dead."""
    for seed, (count, victim) in enumerate([(1, 0), (2, 1), (5, 0), (5, 4), (8, 3)]):
        engine = FailingEngine(_stalls(seed, 0.5) if stalled else None)
        case = _build([home] * count, 2, seed, engine, poison=True)
        order = range(count)
        case.check(order)
        _quiesce(case.stream)
        engine.fail.add(case.stream.blocks[victim].source.data_ptr())
        case.group.fail.add(case.wholes[victim].data_ptr())
        raised = 0
        for _ in range(3):  # the victim may be in its slot already: then its next load is the one that fails
            try:
                case.check(order)
            except BlockError:
                raised += 1
                _arm_nothing(engine, case.group)
        assert raised == 1
        case.check(order)
        case.check(order)
        case.stream.remove()


def _arm_nothing(engine: FailingEngine, group: ShardGroup) -> None:
    engine.fail.clear()
    group.fail.clear()


@pytest.mark.parametrize("point", range(3))
def test_an_exception_in_a_block_frees_its_slot(point: int) -> None:
    """Pitfall 21: a slot that counts as being read for ever refuses its next block, or deadlocks."""
    case = _build([Home.HOST] * 6, 1)
    for victim in case.modules:
        victim.fail_at = point
        with pytest.raises(BlockError):
            _run(case.modules, range(6))
        victim.fail_at = None
        case.check(range(6))
    case.check(range(5, -1, -1))
    case.finish()


def test_a_load_that_never_ends_is_a_timeout() -> None:
    """No waiting without a limit: a hung copy ends the request with an error, and the next one is right."""
    hung = threading.Event()
    engine = CpuCopyEngine(0.1, lambda: _nothing() if not armed else _hang(hung))
    armed: list[bool] = []
    case = _build([Home.HOST] * 4, 1, engine=engine, poison=True)
    case.check(range(4))
    _quiesce(case.stream)
    armed.append(True)
    with pytest.raises(TimeoutError, match=r"0\.1 s"):
        _run(case.modules, range(4))
    armed.clear()
    hung.set()
    time.sleep(0.2)
    try:
        case.check(range(4))
    except TimeoutError:  # a load that was queued behind the hung one may have given up as well
        case.check(range(4))
    case.check(range(4))
    case.stream.remove()


def _hang(until: threading.Event) -> None:
    until.wait(10)
