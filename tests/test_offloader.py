"""Streaming a live model: same bits, true weights on request, and the model given back as it was."""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

import crossdock.offload.live.offloader as offloader_module
from crossdock.offload.live.discovery import DiscoveryError, discover_blocks
from crossdock.offload.live.live_turns import LiveTurns
from crossdock.offload.live.offloader import OUTSIDE, LayerwiseOffloader, component_layouts
from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CpuCopyEngine
from crossdock.offload.memory.host_memory import HostMemory, HostMemoryError

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, dtype=torch.bfloat16)
        self.turned = nn.Parameter(torch.randn(width, width).t())
        self.register_buffer("scale", torch.rand(width))
        self.eps = torch.tensor(1e-3)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(torch.tanh(self.up(x)).bfloat16()).float()
        return x + hidden * cast(Tensor, self.scale) + self.eps * (x @ self.turned)


class Model(nn.Module):
    """A user's own model: one list of blocks, tied weights inside and outside them, a shared storage."""

    _layerwise_offload_blocks_attrs = ("blocks",)

    def __init__(self, count: int = 7, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))
        self.head = nn.Linear(width, width)
        self.head.weight = self.embed.weight
        first, last = cast(Block, self.blocks[0]), cast(Block, self.blocks[-1])
        last.up.weight = first.up.weight  # two blocks, one tensor
        first.turned = nn.Parameter(cast(Tensor, self.embed.weight).t())  # a view of what is outside
        self.table = torch.linspace(0, 1, width)
        self.listed = [torch.rand(width), None]
        self.mapped = {"bias": torch.rand(width)}
        self.pair = (0.5, torch.rand(width))
        self.own_weights = [self.head.bias]  # no second place for it

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table + self.listed[0] + self.mapped["bias"] * self.pair[1]
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


X = torch.linspace(-1, 1, 48).view(3, 16)


def _facts(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that must be as before: objects, bits, strides, devices, hooks, ties."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = [(n, id(t), t.dtype, t.device, t.shape, t.stride(), t.requires_grad, t.tolist()) for n, t in named]
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    plain = [(n, id(v)) for n, m in model.named_modules() for v in vars(m).values() if isinstance(v, Tensor)]
    kept = [(n, id(v), [*map(id, v.values() if isinstance(v, dict) else v)]) for n, v in _containers(model)]
    return [*tensors, *hooks, *plain, *kept]


def _containers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, vars(model)[name]) for name in ("listed", "mapped", "pair", "own_weights")]


@pytest.mark.parametrize("outside", ["resident", "held"])
@pytest.mark.parametrize("budget", [None, 40_000, 10**9])
def test_streamed_as_resident_and_given_back(model: Model, budget: int | None, outside: Any) -> None:
    """Pitfalls 10, 11: tied and aliased weights by identity, plain attributes; `remove` restores every bit."""
    expected, before = copy.deepcopy(model)(X), _facts(model)
    offloader = LayerwiseOffloader(model, CPU, budget_bytes=budget, prefetch=2, outside=outside)
    for _ in range(3):
        with offloader.present():
            assert torch.equal(model(X), expected)
    kept = {"table", "listed.0", "mapped.bias", "pair.1"}
    assert set(offloader.plain_tensors) == {*kept, *(f"blocks.{i}.eps" for i in range(7))}
    offloader.remove()
    assert _facts(model) == before
    assert torch.equal(model(X), expected)
    storages = [t.untyped_storage() for t in model.blocks[1].parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages), "each tensor has its own memory again"


def test_the_memory_of_the_weights_is_given_up(model: Model) -> None:
    """Pitfall 1: the blocks' own storages are gone while they are streamed."""
    sizes = {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()}
    originals = dict(model.blocks[3].named_parameters())
    with LayerwiseOffloader(model, CPU) as offloader:
        source = cast(Tensor, offloader.stream.blocks[3].source)
        places = {t.data_ptr() - source.data_ptr() for t in originals.values()}
        assert places < {*range(source.nbytes)}, "the originals lie in the host copy"
        assert offloader.stream.arena.nbytes < sum(sizes.values())


def test_plain_attributes_are_given_back(model: Model) -> None:
    """Pitfall 10: a tensor that is no parameter is copied to the device; afterwards it is the user's own again."""
    before = _facts(model)
    _copied_by_to(model)
    table, listed = model.table, model.listed
    with LayerwiseOffloader(model, CPU):
        assert model.table is not table
        for name, found in _containers(model):
            assert all(getattr(item, "moved", name == "own_weights") for item in _tensors_in(found))
        assert model.listed is listed, "whoever else has the list sees the same"
    assert _facts(model) == before


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_made_in_every_call_need_not_be_there() -> None:
    """`weight_norm`: of a model that was built on meta and then loaded, the product is still on meta."""

    def normed() -> nn.Sequential:
        return nn.Sequential(*(nn.utils.weight_norm(nn.Linear(16, 16)) for _ in range(4)))

    whole = normed().requires_grad_(False)
    with torch.device("meta"):
        model = normed().requires_grad_(False)
    model.load_state_dict(whole.state_dict(), assign=True)
    assert cast(Tensor, model[0].weight).is_meta
    with LayerwiseOffloader(nn.ModuleDict({"blocks": model}), CPU, stacks=("blocks",)):
        assert torch.equal(model(X), whole(X))


def _tensors_in(container: Any) -> list[Tensor]:
    items = container.values() if isinstance(container, dict) else container
    return [item for item in items if isinstance(item, Tensor)]


def _copied_by_to(model: Model) -> None:
    """`to` gives another tensor, as on another device: of everything that is neither parameter nor buffer."""
    plain = [model.table, *(tensor for _, found in _containers(model) for tensor in _tensors_in(found))]
    for own in plain:
        copied = own.detach().clone()
        copied.moved = True  # type: ignore[attr-defined]
        own.to = lambda *_, copied=copied: copied  # type: ignore[method-assign, assignment, misc]


@pytest.mark.parametrize("outside", ["resident", "held"])
@pytest.mark.parametrize("place", ["an arena that is too small", "attach", "the last tensor"])
def test_what_fails_late_is_undone(model: Model, place: str, outside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores' file descriptors are closed, threads ended, and the model and the arena are as before."""
    gc.collect()  # of other tests' models
    before, files, threads = _facts(model), len(os.listdir("/proc/self/fd")), threading.active_count()
    expected = model(X)
    _copied_by_to(model)
    arena = Arena(1000 if place == "an arena that is too small" else 10**6, CPU)
    if place == "attach":
        monkeypatch.setattr(LiveTurns, "bind", fail_at(3, LiveTurns.bind))
    if place == "the last tensor":
        monkeypatch.setattr(offloader_module, "set_local_part", fail_at(40, offloader_module.set_local_part))
    with pytest.raises((ValueError, OSError)):
        LayerwiseOffloader(model, CPU, outside=outside, arena=arena)
    monkeypatch.undo()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() <= threads
    assert (arena._tenants, arena._slots) == ([], [])
    assert _facts(model) == before
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("outside", ["resident", "held"])
def test_too_little_host_memory_is_refused(model: Model, outside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 30: past the cgroup's limit there is no exception, but a SIGKILL."""
    layouts, rest = component_layouts(model, discover_blocks(model))
    needed = sum(layout.slot_bytes for layout in layouts) + (rest.slot_bytes if outside == "held" else 0)
    before, files = _facts(model), len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(offloader_module, "host_memory", lambda: HostMemory(needed - 1, 2**33, "/sys/fs/cgroup/job"))
    with pytest.raises(HostMemoryError, match=r"Model: a host copy of its weights: needs 0\.\d+ GiB .*cgroup/job"):
        LayerwiseOffloader(model, CPU, outside=outside)
    assert _facts(model) == before
    assert len(os.listdir("/proc/self/fd")) == files
    monkeypatch.setattr(offloader_module, "host_memory", lambda: HostMemory(needed, 2**33, "/sys/fs/cgroup/job"))
    with LayerwiseOffloader(model, CPU, outside=outside) as offloader:
        assert sum(store.nbytes for store in offloader._stores) == needed


def fail_at(count: int, act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, whose call number `count` is an OSError."""
    calls = iter(range(1, 10**6))

    def call(*args: Any) -> Any:
        if next(calls) == count:
            raise OSError("planted")
        return act(*args)

    return call


def test_every_tensor_has_one_place(model: Model) -> None:
    """Pitfall 11: what is shared is placed once, under all of its names; what is placed nowhere stays on the CPU."""
    found = discover_blocks(model)
    layouts, rest = component_layouts(model, found)
    placed = [name for entry in rest.entries for name in entry.names]
    for block, layout in zip(found, layouts, strict=True):
        placed += [f"{block.name}.{name}" for entry in layout.entries for name in entry.names]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert sorted(placed) == sorted(name for name, _ in named)


@pytest.mark.parametrize("more", [0, 2**13, 2**14])
def test_the_budget_holds_for_blocks_and_rest(model: Model, more: int) -> None:
    """A budget of which only the blocks know is overrun by all that belongs to no block."""
    with LayerwiseOffloader(model, CPU) as offloader:
        least = _device_bytes(offloader)
    with LayerwiseOffloader(model, CPU, budget_bytes=least + more) as offloader:
        assert _device_bytes(offloader) <= least + more
        assert not more or _device_bytes(offloader) > least
    with pytest.raises(ValueError, match=r"1 is below the minimum of \d+ bytes") as refused:
        LayerwiseOffloader(model, CPU, budget_bytes=1)
    minimum = int(str(refused.value).split()[-2])
    with LayerwiseOffloader(model, CPU, budget_bytes=minimum) as offloader:
        assert _device_bytes(offloader) <= minimum


class _SlowLink(CpuCopyEngine):
    def move(self, target: Tensor, source: Tensor) -> None:
        time.sleep(0.01)
        super().move(target, source)


@pytest.mark.parametrize("outside", ["resident", "held"])
def test_what_blocks_really_cost_decides_what_stays(outside: Any) -> None:
    """Copies hide behind the blocks that compute for long, once it is known which they are."""
    torch.manual_seed(0)
    model = Model(12).requires_grad_(False)
    expected, slow, before = copy.deepcopy(model)(X), range(2, 8), _facts(model)
    handles = [model.blocks[n].register_forward_hook(lambda *_: time.sleep(0.02)) for n in slow]
    layouts, rest = component_layouts(model, discover_blocks(model))
    budget = sum(layout.slot_bytes for layout in layouts) + rest.slot_bytes - 2 * layouts[2].slot_bytes
    engine = _SlowLink()
    with LayerwiseOffloader(model, CPU, budget_bytes=budget, outside=outside, engine=engine) as offloader:
        held = _device_bytes(offloader)
        assert held > budget - layouts[0].slot_bytes, "another choice may need all of it"
        assert offloader.reschedule() is None, "nothing has run"
        for turn in range(5):
            with offloader.present():
                assert torch.equal(model(X), expected)
            if turn == 1:
                better = offloader.reschedule()
                assert better is not None
                assert better.exposed_s < 0.1 * better.step_s
                streamed = [n for n in range(12) if n not in better.resident]
                assert offloader.stream.order == tuple(f"blocks.{n}" for n in streamed)
                assert len(set(slow) & set(streamed)) > len(streamed) // 2
                assert _device_bytes(offloader) == held
                misses = offloader.stream.counters.misses
            if turn == 3:
                assert offloader.reschedule() is None, "there is nothing better than the best"
        assert offloader.stream.counters.misses == misses
    engine.close()
    for handle in handles:
        handle.remove()
    assert _facts(model) == before
    assert torch.equal(model(X), expected)


def test_nothing_to_choose(model: Model) -> None:
    """Without a budget as little as possible is held, whatever it costs."""
    with LayerwiseOffloader(model, CPU) as offloader:
        for _ in range(3):
            model(X)
        assert offloader.reschedule() is None


def test_the_former_name_of_reschedule_warns(model: Model) -> None:
    text = "LayerwiseOffloader.improve is deprecated; call reschedule"
    with LayerwiseOffloader(model, CPU) as offloader, pytest.warns(DeprecationWarning, match=text):
        assert offloader.improve() is None


def _device_bytes(offloader: LayerwiseOffloader) -> int:
    """What was really allocated, the margins for alignment included."""
    memories = (offloader.stream.arena.memory, offloader.stream.resident_memory[OUTSIDE])
    return sum(memory.untyped_storage().nbytes() for memory in memories)


@pytest.mark.parametrize("outside", ["resident", "held"])
def test_gathered_gives_the_true_weights(model: Model, outside: Any) -> None:
    """For LoRA, state dicts and inspection: what is in the slot may be another block, and what is shared elsewhere."""
    twin = copy.deepcopy(model)
    with LayerwiseOffloader(model, CPU, outside=outside) as offloader:
        with offloader.present():
            model(X)
        for index, block in enumerate(twin.blocks):
            with offloader.gathered(f"blocks.{index}") as tensors:
                assert set(tensors) == set(block.state_dict())
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, block.state_dict()[name]), name
        with offloader.gathered(OUTSIDE) as tensors:
            assert {"embed.weight", "head.weight", "blocks.0.up.weight"} < set(tensors)
            assert "blocks.1.up.weight" not in tensors


@pytest.mark.parametrize("outside", ["resident", "held"])
@pytest.mark.parametrize(
    ("block", "name"), [("blocks.6", "up.weight"), ("blocks.0", "turned"), (OUTSIDE, "embed.bias")]
)
def test_gathered_writes_what_is_shared(model: Model, block: str, name: str, outside: Any) -> None:
    """Tied to another block, to what is outside, or outside itself: edited in place it would change the model at once,
    without `write_back` or after an error.
    """
    twin = copy.deepcopy(model)
    before = twin(X)
    with torch.no_grad():
        (twin if block == OUTSIDE else twin.get_submodule(block)).get_parameter(name).add_(1.0)
    assert not torch.equal(before, twin(X))

    def run() -> Tensor:
        with offloader.present():
            return cast(Tensor, model(X))

    with LayerwiseOffloader(model, CPU, outside=outside) as offloader:
        assert torch.equal(run(), before)
        with offloader.gathered(block) as tensors:
            tensors[name].add_(1.0)
        with suppress(KeyError), offloader.gathered(block, write_back=True) as tensors:
            tensors[name].add_(1.0)
            raise KeyError
        assert torch.equal(run(), before)
        with offloader.gathered(block, write_back=True) as tensors:
            tensors[name].add_(1.0)
        assert torch.equal(run(), twin(X))
    assert torch.equal(model(X), twin(X)), "what was written stays in the model"


def test_gathered_writes_back(model: Model) -> None:
    """Pitfall 26: a merge into placeholders is lost, one done twice is wrong; and nothing is kept of a failed one."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        cast(Block, twin.blocks[2]).up.bias.add_(1.0)
    expected = twin(X)
    with LayerwiseOffloader(model, CPU) as offloader:
        model(X)
        with offloader.gathered("blocks.2", write_back=True) as tensors:
            tensors["up.bias"].add_(1.0)
        with suppress(KeyError), offloader.gathered("blocks.2", write_back=True) as tensors:
            tensors["up.bias"].add_(1.0)
            raise KeyError
        with offloader.gathered("blocks.2") as tensors:
            tensors["up.bias"].add_(1.0)
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected), "what was written stays in the model"


def test_the_old_spelling_works_with_a_warning() -> None:
    """A user's class written for the single attribute."""

    class Old(Model):
        _layerwise_offload_blocks_attrs = None
        _layerwise_offload_blocks_attr = "blocks"

    model = Old()
    expected = model(X)
    with pytest.warns(DeprecationWarning, match="_layerwise_offload_blocks_attrs"):
        offloader = LayerwiseOffloader(model, CPU)
    assert torch.equal(model(X), expected)
    offloader.remove()


def test_what_cannot_be_streamed_is_refused(model: Model) -> None:
    """Pitfalls 13, 25; nothing is changed by a refusal."""
    before = _facts(model)
    with pytest.raises(ValueError, match=r"minimum"):
        LayerwiseOffloader(model, CPU, budget_bytes=2000)
    model._layerwise_offload_blocks_attrs = ("layers",)  # type: ignore[assignment]
    with pytest.raises(DiscoveryError, match=r"Model: .*'layers'.*blocks \(7\)"):
        LayerwiseOffloader(model, CPU)
    del model._layerwise_offload_blocks_attrs

    class Quantized(torch.Tensor):
        pass

    other = copy.deepcopy(model)
    other.head.bias = nn.Parameter(torch.zeros(16).as_subclass(Quantized), requires_grad=False)
    with pytest.raises(TypeError, match=r"head.bias is a Quantized"):
        LayerwiseOffloader(other, CPU)
    assert _facts(model) == before


def test_a_text_encoder_streams_block_by_block() -> None:
    """Nothing is declared: the stacks are found. It shares an arena with a model that is moved as one piece."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    encoder, vae = Qwen3Model(config).eval().requires_grad_(False), Model(2).requires_grad_(False)
    tokens = torch.arange(12).view(1, 12)
    expected = encoder(tokens, output_hidden_states=True), vae(X)
    whole = sum(p.nbytes for p in encoder.parameters())
    engine, arena = CpuCopyEngine(60), Arena(whole * 2 // 3, CPU)
    first = LayerwiseOffloader(encoder, CPU, outside="held", arena=arena, engine=engine)
    second = LayerwiseOffloader(vae, CPU, stacks=(), outside="held", arena=arena, engine=engine)
    for _ in range(2):
        with first.present():
            found = encoder(tokens, output_hidden_states=True)
        assert torch.equal(found.last_hidden_state, expected[0].last_hidden_state)
        assert all(map(torch.equal, found.hidden_states, expected[0].hidden_states))
        with second.present():
            assert torch.equal(vae(X), expected[1])
    for offloader in (first, second):
        offloader.remove()
    engine.close()


def test_what_is_held_is_not_taken() -> None:
    """Pitfall 19: inside its turn, what belongs to no block stays; another component that comes is refused."""
    models = [Model(3).requires_grad_(False) for _ in range(2)]
    expected = [copy.deepcopy(model)(X) for model in models]
    engine, arena = CpuCopyEngine(60), Arena(sum(p.nbytes for p in models[0].parameters()) * 2, CPU)
    first, second = (
        LayerwiseOffloader(model, CPU, stacks=stacks, outside="held", arena=arena, engine=engine)
        for model, stacks in zip(models, (("blocks",), ()), strict=True)
    )
    with first.present():
        assert torch.equal(models[0](X), expected[0])
        with pytest.raises(RuntimeError, match="another component is computing"), second.present():
            pass
        assert torch.equal(models[0](X), expected[0])
    for _ in range(2):
        with second.present():
            assert torch.equal(models[1](X), expected[1])
        before = first.stream.counters.misses
        with first.present():
            assert torch.equal(models[0](X), expected[0])
        assert first.stream.counters.misses == before, "its turn was not prepared"
    for offloader in (first, second):
        offloader.remove()
    engine.close()


@pytest.mark.parametrize("way", ["forward", "block", "model"])
def test_compiled_blocks_do_not_recompile(model: Model, way: str) -> None:
    """Pitfall 27: addresses are fixed, so one graph serves all blocks and all steps; hooks are not compiled."""
    torch._dynamo.reset()
    counts: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        counts.append(1)
        return graph.forward

    with LayerwiseOffloader(model, CPU):
        expected = model(X)
        compiled: Any = model
        if way == "model":
            compiled = torch.compile(model, backend=count)
        for block in model.blocks if way != "model" else ():
            if way == "block":
                block.compile(backend=count)
            else:
                block.forward = torch.compile(block.forward, backend=count)
        results = [compiled(X)]
        after_first = len(counts)
        results += [compiled(X) for _ in range(4)]
        assert all(torch.equal(result, expected) for result in results)
        print(f"{way}: {after_first} graphs in the first step, {len(counts) - after_first} afterwards")
        assert after_first > 0
        assert len(counts) == after_first
