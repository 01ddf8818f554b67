"""Models that arrive sharded: DTensors are streamed by their local parts, other mechanisms are refused.

Two processes are started once, as this file run as a script; every rank works through `CHECKS` and writes down what
failed, and the tests read that.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.multiprocessing.reductions import StorageWeakRef

from crossdock.offload.live.foreign import ForeignMechanismError, foreign_mechanisms
from crossdock.offload.live.offloader import OUTSIDE, LayerwiseOffloader
from crossdock.offload.memory.layout import BlockLayout
from tiers import not_quick

CPU = torch.device("cpu")
RANKS = 2
BLOCKS = 7
WIDTH, INNER, HIDDEN = 9, 8, 7
"""9 and 7 do not divide by two ranks; 8 is two heads of 4."""
TIME_LIMIT_S = 180

Check = Callable[[DeviceMesh], None]
CHECKS: dict[str, Check] = {}


class Block(nn.Module):
    """Attention and MLP in the common plan, and loose parameters of other dtypes, strides and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, INNER) for _ in range(3))
        self.to_out = nn.Linear(INNER, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN, dtype=torch.bfloat16)
        self.down = nn.Linear(HIDDEN, WIDTH, dtype=torch.bfloat16)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.heat = nn.Parameter(torch.rand(1) + 0.5)  # cut in two, the second rank has nothing
        self.codes = nn.Parameter(torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.register_buffer("scale", torch.rand(WIDTH))
        self.register_buffer("bias", torch.rand(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        heads = [linear(normed).unflatten(-1, (-1, 4)).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v)]
        x = x + self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        hidden = self.down(torch.tanh(self.up(x.bfloat16()))).float()
        x = x + hidden * self.gain * self.heat * self.get_buffer("scale") + self.get_buffer("bias").float()
        return x + 0.01 * (torch.tanh(x @ self.codes.float()) @ self.turned)


PLAN = {
    "norm": SequenceParallel(use_local_output=False),
    **{f"to_{name}": ColwiseParallel(input_layouts=Shard(1)) for name in "qkv"},
    "to_out": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
}
LOOSE = {
    "gain": Shard(0),
    "heat": Shard(0),
    "codes": Shard(1),
    "turned": Shard(0),
    "scale": Replicate(),
    "bias": Shard(0),
}


class Model(nn.Module):
    _layerwise_offload_blocks_attrs = ("blocks",)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class PlainModel(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(4))


X = torch.linspace(-1, 1, 2 * 6 * WIDTH).view(2, 6, WIDTH)


def _parallelized(mesh: DeviceMesh) -> Model:
    """With DTensors in every block, two of them tied inside a block and one across two blocks."""
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    for block in cast("list[Block]", model.blocks):
        for name, placement in LOOSE.items():
            value = cast(Tensor, getattr(block, name)).detach()
            distributed: Tensor = distribute_tensor(value, mesh, [placement])
            if name == "turned":  # each rank's part column-major
                local = distributed.to_local().t().contiguous().t()
                distributed = DTensor.from_local(local, mesh, [placement], shape=value.shape, stride=value.stride())
            is_buffer = name in block._buffers
            setattr(block, name, distributed if is_buffer else nn.Parameter(distributed, requires_grad=False))
        parallelize_module(block, mesh, PLAN)
        entrance = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
        entrance.use_local_output = False
        parallelize_module(block, mesh, entrance)
        parallelize_module(
            block, mesh, PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
        )
    first, tied, last = (cast(Block, model.blocks[i]) for i in (0, 2, -1))
    last.to_out.weight = first.to_out.weight
    tied.norm.bias = tied.norm.weight
    return model


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _bits(tensor: Tensor) -> bytes:
    return _local(tensor).detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor is, apart from where it lies."""
    spec = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    local = _local(tensor)
    shapes = (tensor.shape, tensor.stride(), local.shape, local.stride(), tensor.dtype, local.dtype)
    return (type(tensor), isinstance(tensor, nn.Parameter), *shapes, *spec)


def _facts(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that must be as before: objects, kinds, bits, hooks, ties."""
    tensors = [(n, id(t), t.requires_grad, _bits(t), *_kind(t)) for n, t in _tensors(model).items()]
    return [*tensors, *((n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules())]


def _same(found: Tensor, expected: Tensor) -> None:
    assert type(found) is Tensor
    assert torch.equal(found, expected), f"off by {(found - expected).abs().max()}"


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


# -- in the two processes ------------------------------------------------------------------------------------


@check
def streamed_bit_for_bit_and_given_back(mesh: DeviceMesh) -> None:
    """Pitfalls 2, 11: every kind of DTensor, tied ones included; twice; the same objects and bits afterwards."""
    model = _parallelized(mesh)
    expected, before = model(X), _facts(model)
    kinds = {name: _kind(tensor) for name, tensor in _tensors(model).items()}
    assert sum(kind[0] is DTensor for kind in kinds.values()) == BLOCKS * 20
    with LayerwiseOffloader(model, CPU):
        for _ in range(2):
            _same(model(X), expected)
        assert {name: _kind(tensor) for name, tensor in _tensors(model).items()} == kinds
        assert model.blocks[2].norm.bias is model.blocks[2].norm.weight
        assert model.blocks[-1].to_out.weight is model.blocks[0].to_out.weight
    assert _facts(model) == before
    _same(model(X), expected)
    storages = [_local(t).untyped_storage() for t in {id(t): t for t in _tensors(model).values()}.values()]
    assert len({s.data_ptr() for s in storages if s.nbytes()}) == sum(1 for s in storages if s.nbytes())


@check
def device_bytes_fall(mesh: DeviceMesh) -> None:
    """Pitfall 1, first half: the shards' own memory is really gone, and the blocks live in two slots."""
    model = _parallelized(mesh)
    locals_of = [_local(tensor) for tensor in {id(t): t for t in _tensors(model).values()}.values()]
    own = [StorageWeakRef(local.untyped_storage()) for local in locals_of if local.numel()]
    whole = sum(BlockLayout.of(block).slot_bytes for block in model.blocks)
    del locals_of
    with LayerwiseOffloader(model, CPU) as offloader:
        model(X)
        assert all(storage.expired() for storage in own), "memory of the weights is held by somebody"
        slots = offloader.stream.slot_memory
        assert len(slots) == 3, "two would collide at the wrap of seven blocks"
        assert sum(memory.nbytes for memory in slots) == offloader.turn_bytes < whole / 2
        rest = offloader.stream.resident_memory[OUTSIDE]
        places = [(memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in (*slots, rest)]
        for block in offloader.stream.blocks:
            with offloader.hold(block.name) if block.is_called else nullcontext():
                for name, tensor in _tensors(model).items():
                    if name.startswith(block.name) or not name.startswith("blocks."):
                        local = _local(tensor)
                        assert not local.numel() or any(a <= local.data_ptr() < b for a, b in places), name


@check
def the_host_copy_is_what_is_read(mesh: DeviceMesh) -> None:
    """Pitfall 1, second half: poison in a block's host bytes on one rank comes out on both."""
    model = _parallelized(mesh)
    expected = model(X)
    with LayerwiseOffloader(model, CPU) as offloader:
        _same(model(X), expected)
        block = offloader.stream.blocks[3]
        assert isinstance(block.source, Tensor)
        saved = block.source.clone()
        if mesh.get_local_rank() == 0:
            entry = next(entry for entry in block.layout.entries if entry.name == "up.weight")
            entry.view(block.source).fill_(torch.nan)
        assert model(X).isnan().any()
        block.source.copy_(saved)
        _same(model(X), expected)


@check
def right_after_an_exception(mesh: DeviceMesh) -> None:
    """Pitfall 21: a step that dies in the middle leaves slots half read; the next one is right, on both ranks."""
    model = _parallelized(mesh)
    expected = model(X)

    def fail(*_: Any) -> None:
        raise KeyError("planted")

    with LayerwiseOffloader(model, CPU) as offloader:
        model(X)
        for index in (3, 0, BLOCKS - 1):
            handle = model.blocks[index].up.register_forward_pre_hook(fail)
            with pytest.raises(KeyError, match="planted"):
                model(X)
            handle.remove()
            _same(model(X), expected)
        assert offloader.stream.counters.misses
    _same(model(X), expected)


@check
def any_budget_and_held_outside(mesh: DeviceMesh) -> None:
    """Resident blocks hold DTensors as well, and what is outside may come and go with its DTensor."""
    model = _parallelized(mesh)
    expected, before = model(X), _facts(model)
    with LayerwiseOffloader(model, CPU, prefetch=2) as offloader:
        least = offloader.turn_bytes + offloader.stream.resident_memory[OUTSIDE].nbytes
    more = least + 3 * 2**11
    for budget, outside in ((more, "resident"), (10**6, "resident"), (None, "held"), (more, "held")):
        offloader = LayerwiseOffloader(model, CPU, budget_bytes=budget, prefetch=2, outside=cast(Any, outside))
        for _ in range(2):
            with offloader.present():
                _same(model(X), expected)
        if budget is not None:
            assert len(offloader.stream.resident_memory) > 1
            assert offloader.turn_bytes <= budget
        offloader.remove()
        assert _facts(model) == before


@check
def gathered_are_dtensors(mesh: DeviceMesh) -> None:
    """Pitfall 26: LoRA and state dicts see DTensors of the same placements, in place of another block's bytes."""
    model = _parallelized(mesh)
    wanted = {name: _bits(tensor) for name, tensor in _tensors(model.blocks[1]).items()}
    kinds = {name: _kind(tensor)[2:] for name, tensor in _tensors(model.blocks[1]).items()}
    full = cast(DTensor, model.blocks[1].up.weight).full_tensor()
    with LayerwiseOffloader(model, CPU) as offloader:
        model(X)
        with offloader.gathered("blocks.1") as tensors:
            assert {name: _bits(tensor) for name, tensor in tensors.items()} == wanted
            assert {name: _kind(tensor)[2:] for name, tensor in tensors.items()} == kinds
            assert torch.equal(cast(DTensor, tensors["up.weight"]).full_tensor(), full)
    with torch.no_grad():
        cast(Block, model.blocks[1]).up.weight.add_(1)
    expected = model(X)
    with torch.no_grad():
        cast(Block, model.blocks[1]).up.weight.copy_(distribute_tensor(full, mesh, [Shard(0)]))
    with LayerwiseOffloader(model, CPU) as offloader:
        with offloader.gathered("blocks.1", write_back=True) as tensors:
            tensors["up.weight"].add_(1)
        _same(model(X), expected)
    _same(model(X), expected)


@check
def a_discarded_model_holds_nothing(mesh: DeviceMesh) -> None:
    """`discard` is there to free the host bytes: a DTensor must not keep its view of them."""
    model = _parallelized(mesh)
    offloader = LayerwiseOffloader(model, CPU)
    model(X)
    offloader.discard()
    assert sum(_local(tensor).untyped_storage().nbytes() for tensor in _tensors(model).values()) == 0


@check
def compiled_blocks_run(mesh: DeviceMesh) -> None:
    """Pitfall 27: one graph per block serves all passes, DTensor parameters included."""
    model = _parallelized(mesh)
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    with LayerwiseOffloader(model, CPU):
        expected = model(X)
        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend=count)
        _same(model(X), expected)
        after_first = len(graphs)
        assert after_first
        for _ in range(3):
            _same(model(X), expected)
        assert len(graphs) == after_first


@contextmanager
def _refused(model: nn.Module, *words: str, device: torch.device = CPU) -> Any:
    """The model is refused with all of `words`, and untouched."""
    before = [(name, id(tensor)) for name, tensor in _tensors(model).items()]
    with pytest.raises(ForeignMechanismError) as caught:
        LayerwiseOffloader(model, device)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert [(name, id(tensor)) for name, tensor in _tensors(model).items()] == before
    yield str(caught.value)


@check
def fully_sharded_is_refused(mesh: DeviceMesh) -> None:
    """Pitfalls 1, 4: FSDP2 gathers from its own shard; streaming would be a silent no-op."""
    model = PlainModel().requires_grad_(False)
    for block in model.blocks[1:3]:
        fully_shard(block, mesh=mesh)
    words = ("blocks.1 is sharded by FSDP", "1 more: blocks.2", "never read what is streamed", "parallel.hsdp")
    with _refused(model, *words):
        fully_shard(model, mesh=mesh)
    with _refused(model, "the model is sharded by FSDP", "2 more: blocks.1, blocks.2)"):
        pass
    assert [found.what for found in foreign_mechanisms(model) if not found.path] == ["sharded by FSDP"]


@check
def a_part_of_a_fully_sharded_tensor_parallel_model_is_refused(mesh: DeviceMesh) -> None:
    """Pitfall 1: the wrapper is outside of what is given; FSDP over tensor parallelism shows in the placements."""
    model = nn.Sequential(PlainModel())
    both = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("dp", "tp"))
    for block in cast(Model, model[0]).blocks:
        parallelize_module(block, both["tp"], {"linear": ColwiseParallel()})
    fully_shard(model, mesh=both["dp"])
    with _refused(model[0], "blocks.0.linear.weight is a DTensor sharded by FSDP (_StridedShard)", "fully_shard"):
        pass


@check
def partial_is_refused(mesh: DeviceMesh) -> None:
    """A sum over ranks that was never made is no weight yet; the remedy that is named works."""
    model = _parallelized(mesh)
    block = cast(Block, model.blocks[4])
    part = DTensor.from_local(torch.full((WIDTH,), 0.25), mesh, [Partial()])
    block.gain = nn.Parameter(part, requires_grad=False)
    with _refused(model, "blocks.4.gain is a DTensor", "Partial placement is a sum", "redistribute()"):
        block.gain = nn.Parameter(part.redistribute(placements=[Replicate()]), requires_grad=False)
    expected = model(X)
    with LayerwiseOffloader(model, CPU):
        _same(model(X), expected)


@check
def a_mesh_of_other_devices_is_refused(mesh: DeviceMesh) -> None:
    """A DTensor of a CPU mesh on a GPU's slot would be copied back to the CPU instead of bound to the slot."""
    with _refused(_parallelized(mesh), "is a DTensor", "mesh is of cpu devices", device=torch.device("cuda")):
        pass


class Quantized(torch.Tensor):
    """Stands for torchao's."""


@check
def a_quantized_local_part_is_refused(mesh: DeviceMesh) -> None:
    """Pitfall 25: a subclass inside a DTensor has more in it than its bytes."""
    model = _parallelized(mesh)
    cast(DTensor, model.blocks[5].gain)._local_tensor = torch.rand(WIDTH).as_subclass(Quantized)
    with _refused(model, "blocks.5.gain is a DTensor, whose local part is a Quantized"):
        pass


# -- from here: one process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Per rank: name of the check -> how it failed, "" where it holds."""
    return run_ranks(__file__, tmp_path_factory.mktemp("gang"), RANKS, TIME_LIMIT_S)


@not_quick
@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(failures: list[dict[str, str]], name: str) -> None:
    """Each check's own docstring says which failure it holds."""
    assert [of_rank[name] for of_rank in failures] == [""] * RANKS


@pytest.fixture
def model() -> PlainModel:
    torch.manual_seed(0)
    return PlainModel().eval().requires_grad_(False)


def _follow_remedy(message: str, model: nn.Module) -> None:
    """Run the call that the message names, word for word."""
    import accelerate
    import diffusers.hooks

    found = re.search(r"call (\S+\(.*\)) first", message)
    assert found, message
    eval(found[1], {"accelerate": accelerate, "diffusers": diffusers, "model": model})


def _add_cpu_offload(model: nn.Module) -> str:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=CPU)
    return "an accelerate hook (AlignDevicesHook)"


def _add_dispatch(model: nn.Module) -> str:
    from accelerate import dispatch_model

    dispatch_model(model, {"": "cpu", "blocks.1": "cpu"}, main_device="cpu", force_hooks=True)
    return "an accelerate hook ("


def _add_model_cpu_offload(model: nn.Module) -> str:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device=CPU)
    return "the model has an accelerate hook (CpuOffload)"


def _add_sequential(model: nn.Module) -> str:
    from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

    add_hook_to_module(model.get_submodule("blocks.1"), ModelHook())
    add_hook_to_module(model.get_submodule("blocks.1"), AlignDevicesHook(CPU, offload=True), append=True)
    return "blocks.1 has an accelerate hook (SequentialHook of ModelHook, AlignDevicesHook)"


def _add_group_offloading(model: nn.Module) -> str:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    return "a diffusers hook (group_offloading)"


@pytest.mark.parametrize(
    "add", [_add_cpu_offload, _add_dispatch, _add_model_cpu_offload, _add_sequential, _add_group_offloading]
)
def test_offload_hooks_are_refused_and_their_remedy_works(model: PlainModel, add: Callable[[nn.Module], str]) -> None:
    """Pitfall 4: two mechanisms would own the weights; after the very call that the message names it streams."""
    expected = model(X)
    what = add(model)
    with _refused(model, what, "which moves its weights itself: call ") as message:
        _follow_remedy(message, model)
    with LayerwiseOffloader(model, CPU):
        _same(model(X), expected)
    _same(model(X), expected)


def test_layerwise_casting_is_refused(model: PlainModel) -> None:
    """Pitfall 24's kin: diffusers casts whole modules around each call, which would unbind them from their slots."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=())
    words = ("has a diffusers hook (layerwise_casting)", "embed", "load the model again without")
    with _refused(model, *words):
        pass


def test_a_cache_hook_is_no_obstacle(model: PlainModel) -> None:
    """Pitfall 15: hooks that only look at activations (first-block cache) stay; the runtime still hears of them."""
    from diffusers.hooks import HookRegistry, ModelHook

    HookRegistry.check_if_exists_or_initialize(model.blocks[1]).register_hook(ModelHook(), "fbc_block_hook")
    expected = model(X)
    with LayerwiseOffloader(model, CPU):
        _same(model(X), expected)
    assert [(found.path, found.what) for found in foreign_mechanisms(model)] == [
        ("blocks.1", "a diffusers hook (fbc_block_hook)")
    ]


def test_every_mechanism_is_named_once_with_its_places(model: PlainModel) -> None:
    """Pitfall 25: a thousand quantized weights are one sentence, and a second mechanism is not hidden behind them."""
    for block in model.blocks:
        block.linear.weight = nn.Parameter(torch.rand(WIDTH, WIDTH).as_subclass(Quantized), requires_grad=False)
    model.blocks[3].register_buffer("codes", torch.rand(3).as_subclass(Quantized))
    _add_sequential(model)
    weights = "blocks.0.linear.weight is a Quantized (so for 4 more: blocks.1.linear.weight, blocks.2.linear.weight"
    words = (weights, ", ...)", "take the other library's quantization", "blocks.1 has an accelerate hook")
    with _refused(model, *words) as message:
        assert message.count("Quantized") == 1
        assert "\n" not in message


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    failed = dict.fromkeys(CHECKS, "")
    for name, function in CHECKS.items():
        print(name, flush=True)
        try:
            function(mesh)
        except (Exception, pytest.fail.Exception):  # the latter is no Exception
            failed[name] = traceback.format_exc()
        (folder / f"rank{rank}.json").write_text(json.dumps(failed))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
