"""What only a GPU shows: stream ordering by events, pinned copies, the attention kernels that CUDA picks.

Run with `make test-gpu`, by the python at hand there; skipped with a reason elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from crossdock.offload.live.offloader import LayerwiseOffloader
from crossdock.offload.memory import copy_engine
from crossdock.offload.memory.arena import Slot
from crossdock.offload.memory.copy_engine import make_copy_engine
from crossdock.offload.memory.host_store import HostStore
from crossdock.offload.memory.layout import BlockLayout, aligned_bytes
from crossdock.offload.schedule.slots import assign_slots
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.parallel.kernels import attention_with_lse, merge
from crossdock.runtime.contract.ordering import Overlap, overlaps, trace_in_order
from crossdock.runtime.contract.result import Violation
from crossdock.runtime.plan.memory_plan import MemoryPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def _stream(blocks: list[_Block], device: torch.device, home: Home, prefetch: int) -> tuple[BlockStream, HostStore]:
    layouts = [BlockLayout.of(block) for block in blocks]
    store, offset, streamed = HostStore.create(sum(layout.slot_bytes for layout in layouts)), 0, []
    for number, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
        host = store.bytes[offset : offset + layout.slot_bytes]
        layout.pack(block, host)
        source = host if home is Home.HOST else aligned_bytes(layout.slot_bytes, device).copy_(host)
        streamed.append(StreamedBlock(f"blocks.{number}", block, layout, home, source))
        offset += layout.slot_bytes
    store.register()
    schedule = assign_slots(len(blocks) if home is Home.HOST else 0, prefetch)
    stream = BlockStream(streamed, schedule, device, make_copy_engine(device))
    stream.attach()
    return stream, store


@pytest.mark.parametrize("prefetch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_is_bit_identical_to_resident(prefetch: int, dtype: torch.dtype) -> None:
    """Ordering by events: copies and compute race on a GPU if any wait is missing. Freed slots are poisoned."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    blocks = [_Block(1024).to(dtype) for _ in range(9)]
    x = torch.randn(64, 1024, device=device, dtype=dtype)
    outputs = []
    with torch.no_grad():
        for home in (Home.RESIDENT, Home.HOST):
            stream, store = _stream(blocks, device, home, prefetch)
            stream.poison_freed = True
            for _ in range(20):
                y = x
                for block in blocks:
                    y = block(y)
            torch.cuda.synchronize()
            outputs.append(y)
            stream.remove()
            store.close()
    assert torch.equal(outputs[0], outputs[1])


def _raced(monkeypatch: pytest.MonkeyPatch, fault: str, epoch_s: float) -> tuple[list[Overlap], list[Violation]]:
    """What the clock and the order of issue tell of six passes over six blocks; `fault` is that of block 4 in the last.

    Copies take milliseconds, the blocks much less; the reader that is not waited for takes long.
    """
    monkeypatch.setattr(copy_engine, "_EPOCH_S", epoch_s)
    device, passes, at = torch.device("cuda"), 6, 0
    blocks = [_Block(2048) for _ in range(6)]
    x = torch.randn(16, 2048, device=device)
    stream, store = _stream(blocks, device, Home.HOST, prefetch=1)
    slot, engine = stream._table.of[4], stream.engine
    before = next(n for n in reversed(range(4)) if stream._table.of[n] is slot)
    wait, submit, claim = engine.wait, engine.submit, Slot.claim

    def ours() -> bool:
        return at == passes - 1 and slot.holder == 4

    def early(lane: Any, work: Any, after: Any, needs: Any = ()) -> Any:
        event, done = submit(lane, copy_engine.nothing, after), submit(lane, work, (), needs)
        return event if ours() else done

    if fault == "wait":
        monkeypatch.setattr(engine, "wait", lambda event: None if ours() and event is slot.ready else wait(event))
    elif fault == "early":
        monkeypatch.setattr(engine, "submit", early)
    elif fault == "reader":
        monkeypatch.setattr(Slot, "claim", lambda of, taker: claim(of, taker)[: 9 * (of is not slot or not ours())])
    with torch.no_grad():
        for at in range(passes):
            for number, block in enumerate(blocks):
                if number == before and at == passes - 1 and fault == "reader":
                    block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(200_000_000))
                block(x)
    torch.cuda.synchronize()
    trace = stream.trace()
    monkeypatch.undo()
    stream.remove()
    store.close()
    plan = cast(MemoryPlan, SimpleNamespace(blocks=stream.blocks, schedule=stream.schedule))
    return list(overlaps(trace)), list(trace_in_order(plan, 0, trace))


@pytest.mark.parametrize("epoch_s", [8.0, 0.0])
def test_a_healthy_stream_by_the_clock(epoch_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No false alarm, also where every event is counted from the one before it, of whichever stream."""
    assert _raced(monkeypatch, "", epoch_s) == ([], [])


@pytest.mark.parametrize("fault", ["wait", "early", "reader"])
def test_a_race_by_the_clock(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was issued is all right, and what happened is not."""
    found, issued = _raced(monkeypatch, fault, 8.0)
    print(fault, *found, sep="\n   ")
    assert issued == []
    kinds = {(one.ends.kind, one.begins.kind) for one in found if one.begins.block == "blocks.4"}
    assert (("compute_end", "load_begin") if fault == "reader" else ("load_end", "compute_begin")) in kinds


def test_device_memory_falls() -> None:
    """Pitfall 1: allocated device bytes with layerwise are the slots', not the model's."""
    device = torch.device("cuda")
    blocks = [_Block(2048) for _ in range(12)]
    before = torch.cuda.memory_allocated()
    stream, store = _stream(blocks, device, Home.HOST, prefetch=1)
    held, largest = torch.cuda.memory_allocated() - before, max(b.layout.slot_bytes for b in stream.blocks)
    stream.remove()
    store.close()
    print(f"held {held / 2**20:.1f} MiB of {store.nbytes / 2**20:.1f} MiB")
    assert held <= 3 * (largest + 1024)


def test_copies_are_asynchronous() -> None:
    """Enqueuing a copy returns before it is done: the memory really is pinned."""
    device = torch.device("cuda")
    store = HostStore.create(2**30)
    store.register()
    target = torch.empty(2**30, dtype=torch.uint8, device=device)
    engine = make_copy_engine(device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    event = engine.submit("copy", lambda: engine.move(target, store.bytes), ())
    enqueued = time.perf_counter() - began
    engine.wait(event)
    torch.cuda.synchronize()
    done = time.perf_counter() - began
    store.close()
    print(f"1 GiB: enqueued in {enqueued * 1e3:.2f} ms, copied in {done * 1e3:.1f} ms")
    assert enqueued < done / 4


@pytest.mark.parametrize("budget_mib", [None, 150, 10_000])
def test_a_live_model_is_streamed_and_given_back(budget_mib: int | None) -> None:
    """From the CPU to the GPU and back: same bits, fewer allocated bytes, every tensor where it was."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block(1024) for _ in range(9)))
    x = torch.randn(64, 1024, device=device)
    with torch.no_grad():
        expected = model.to(device)(x)
        model.to("cpu")
        before = torch.cuda.memory_allocated()
        budget = None if budget_mib is None else budget_mib * 2**20
        offloader = LayerwiseOffloader(model, device, stacks=[str(n) for n in range(9)], budget_bytes=budget)
        held = torch.cuda.memory_allocated() - before
        outputs = [model(x) for _ in range(3)]
        offloader.reschedule()  # whatever the blocks cost: the same bits
        outputs += [model(x) for _ in range(3)]
        torch.cuda.synchronize()
        offloader.remove()
    assert all(torch.equal(output, expected) for output in outputs)
    assert held <= (budget or 3 * 34 * 2**20) + 2**20
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize("way", ["compile", "graph"])
def test_streamed_blocks_compiled_and_graphed(way: str) -> None:
    """Addresses are fixed: one graph per block serves every step, and nothing is compiled again after the first."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    blocks = [_Block(512) for _ in range(6)]
    x = torch.randn(64, 512, device=device)
    with torch.no_grad():
        stream, store = _stream(blocks, device, Home.HOST, prefetch=1)
        expected = x
        for block in blocks:
            expected = block(expected)
        for block in blocks:
            if way == "compile":
                block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
            else:
                block.forward = _graphed(block, x)  # type: ignore[method-assign]
        for step in range(4):
            y = x
            if step == 1:
                torch._dynamo.config.error_on_recompile = True
            for block in blocks:
                y = block(y)
            torch.cuda.synchronize()
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.config.error_on_recompile = False
        stream.remove()
        store.close()


def _graphed(block: _Block, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The block's own forward as a CUDA graph; the hooks stay outside of it."""
    forward, held = block.forward, like.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(held)

    def replay(x: Tensor) -> Tensor:
        held.copy_(x)
        graph.replay()
        return output.clone()

    return replay


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize(("queries", "keys"), [(143, 100), (33, 7), (256, 256)])
def test_attention_parts_merge_to_the_whole(
    queries: int, keys: int, dtype: torch.dtype, tolerance: float, masked: bool
) -> None:
    """Output and log-sum-exp of the kernels that CUDA picks, against fp64: two halves merged are the whole."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 6, 64, device="cuda", dtype=dtype) for n in (queries, keys, keys))
    bias = torch.zeros(2, keys, device="cuda", dtype=dtype)
    if masked:
        bias[1, keys // 2 :] = float("-inf")  # the whole second part of one item
    half = keys // 2
    parts = [
        attention_with_lse(q, k[:, span], v[:, span], bias[:, span] if masked else None, 0.125)
        for span in (slice(None, half), slice(half, None))
    ]
    found, _ = merge(*parts[0], *parts[1])
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8 + bias.double()[:, None, None]
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    error = float((found.double() - expected).abs().max())
    print(f"{dtype} masked={masked} {queries}x{keys}: max error {error:.1e}")
    assert error < tolerance
