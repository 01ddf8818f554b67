"""A live model is never silently wrong: what its blocks write comes back, and whatever touches a block outside its turn
gets the right values or a refusal with the way out. Every case is done to a plain twin too, which says what is right.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from crossdock.offload.live.foreign import ForeignMechanismError
from crossdock.offload.live.offloader import LayerwiseOffloader
from crossdock.offload.live.resting import LiveModelError
from crossdock.offload.memory.copy_engine import CpuCopyEngine
from tiers import not_quick

pytestmark = not_quick

CPU = torch.device("cpu")
WIDTH, COUNT = 8, 5
X = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
BUDGETS = [None, 10**9]
"""All streamed, all resident."""


class Block(nn.Module):
    """With all that a block may write in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.batch = nn.BatchNorm1d(WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH))
        for name in ("count", "kept", "given", "replaced"):
            self.register_buffer(name, torch.zeros((3, WIDTH) if name != "count" else (), dtype=torch.float32))
        self.resets = 0

    def forward(self, x: Tensor) -> Tensor:
        count, kept = cast(Tensor, self.count), cast(Tensor, self.kept)
        x = x + torch.tanh(self.batch(self.spectral(self.up(self.norm(x))))) * self.gain + 0.1 * kept + 0.01 * count
        count.add_(1)
        self.kept.copy_(x)  # type: ignore[operator]
        x = x + 0.1 * cast(Tensor, self.given)
        self.given = torch.tanh(x)
        self.replaced.data = cast(Tensor, self.replaced).data + 1
        with torch.no_grad():
            self.gain.mul_(1.01)
        return x + 0.01 * cast(Tensor, self.replaced)

    def cached(self, x: Tensor) -> Tensor:
        cast(Tensor, self.count).add_(1)
        return x + torch.tanh(self.up(x)) * self.gain

    def weight(self) -> Tensor:
        return self.up.weight

    def row(self) -> Tensor:
        return self.up.weight[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(COUNT))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("ids", torch.arange(WIDTH))
        self.register_buffer("none", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))


class Slow(CpuCopyEngine):
    """Copies come late, at random."""

    def __init__(self) -> None:
        choice = random.Random(0)
        super().__init__(30, lambda: time.sleep(choice.choice((0, 0, 0.002))))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Model:
    return Model().requires_grad_(False)


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor | list | dict):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def same_state(model: nn.Module, twin: nn.Module) -> None:
    same(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("outside", ["resident", "held"])
@pytest.mark.parametrize("budget", [*BUDGETS, 20_000])
def test_what_a_block_writes_comes_back(model: Model, budget: int | None, outside: Any) -> None:
    """Counters, caches, running statistics, spectral norm's vector, a parameter: in the run, beside it, afterwards."""
    twin, engine = copy.deepcopy(model), Slow()
    offloader = LayerwiseOffloader(model, CPU, budget_bytes=budget, outside=outside, engine=engine)
    for step in range(4):
        with offloader.present():
            same(model(X), twin(X))
        if step == 1:
            same_state(model, twin)
        if step == 2:
            offloader.reschedule()
    offloader.remove()
    same_state(model, twin)
    same(model(X), twin(X))
    engine.close()


def test_what_is_outside_the_blocks_is_written_back_too() -> None:
    """A component that moves as one, and is on the device inside `present` only."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    twin = copy.deepcopy(model)
    offloader = LayerwiseOffloader(model, CPU, stacks=(), outside="held")
    for _ in range(2):
        with offloader.present():
            same(model(X), twin(X))
        offloader.stream.engine.drain()  # another component's loads wait for what is written back
        offloader.stream.arena.memory.fill_(0xFF)  # another component's turn
        offloader.stream.arena.evict(offloader.stream.arena.nbytes)
        same_state(model, twin)
        same(model(X), twin(X))
    offloader.remove()
    same_state(model, twin)


def test_inference_mode_hides_no_write(model: Model) -> None:
    twin = copy.deepcopy(model)
    with torch.inference_mode(), LayerwiseOffloader(model, CPU):
        for _ in range(3):
            same(model(X), twin(X))
    same_state(model, twin)


def test_a_forward_that_fails_keeps_what_it_wrote(model: Model) -> None:
    twin = copy.deepcopy(model)

    def fail(*_: Any) -> None:
        raise KeyError("planted")

    with LayerwiseOffloader(model, CPU):
        for each in (model, twin):
            handle = each.blocks[2].register_forward_hook(fail)
            with pytest.raises(KeyError):
                each(X)
            handle.remove()
        same_state(model, twin)
        same(model(X), twin(X))


def _functional(model: Model) -> Any:
    named = {name: tensor * 2 for name, tensor in model.named_parameters()}
    return torch.func.functional_call(model, named, X)


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()))


def _block(model: Model, index: int = 1) -> Block:
    return cast(Block, model.blocks[index])


def _everything(model: Model) -> dict[str, Tensor]:
    return {name: tensor * 1 for name, tensor in model.named_parameters()}


READS: dict[str, Callable[[Model], Any]] = {
    "a submodule": lambda m: _block(m).norm(X),
    "a submodule of the last block": lambda m: _block(m, -1).up(X),
    "a submodule that writes": lambda m: _block(m).batch(X),
    "all blocks' submodules before the loop": lambda m: torch.stack([b.up(b.norm(X)) for b in m.blocks]),
    "a norm of a weight": lambda m: [b.up.weight.norm().item() for b in m.blocks],
    "sum": lambda m: [b.up.weight.sum() for b in m.blocks],
    "data": lambda m: [b.up.weight.data + 0 for b in m.blocks],
    "a row": lambda m: [b.up.weight[1] + 0 for b in m.blocks],
    "numpy": lambda m: [b.up.weight.numpy().copy() for b in m.blocks],
    "F.linear": lambda m: [F.linear(X, b.up.weight, b.up.bias) for b in m.blocks],
    "torch.cat": lambda m: torch.cat([b.up.weight.data for b in m.blocks]),
    "named_parameters": _everything,
    "state_dict": lambda m: {k: v.clone() for k, v in m.state_dict().items()},
    "torch.save of the state": lambda m: dict(_saved(m.state_dict())),
    "torch.save of a weight": lambda m: _saved([_block(m).up.weight, _block(m).count]),
    "deepcopy": lambda m: copy.deepcopy(m)(X),
    "deepcopy of a block": lambda m: copy.deepcopy(_block(m))(X),
    "another method of a copy": lambda m: copy.deepcopy(_block(m)).cached(X),
    "another method": lambda m: [b.cached(X) for b in m.blocks],
    "a method that gives a weight away": lambda m: [w * 1 for w in [b.weight() for b in m.blocks]],
    "a method that gives a part away": lambda m: [w * 1 for w in [b.row() for b in m.blocks]],
    "functional_call": _functional,
    "what a weight is": lambda m: tuple((p.shape, p.dtype, p.device, p.numel(), len(p)) for p in m.parameters()),
    "repr": lambda m: repr(_block(m).up.weight),
    "a copy that is streamed": lambda m: _streamed(copy.deepcopy(m)),
}


def _streamed(model: Model) -> Tensor:
    with LayerwiseOffloader(model, CPU):
        return cast(Tensor, model(X))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("way", READS)
def test_reading_outside_a_turn_is_right(model: Model, way: str, budget: int | None) -> None:
    twin, read = copy.deepcopy(model), READS[way]
    with LayerwiseOffloader(model, CPU, budget_bytes=budget):
        for _ in range(2):
            same(read(model), read(twin))
            same(model(X), twin(X))
    same(read(model), read(twin))
    same_state(model, twin)
    same(model(X), twin(X))


def test_a_submodule_and_a_method_are_the_blocks_turn(model: Model) -> None:
    """They compute on the device, and those of a copy have nothing to do with it."""
    with LayerwiseOffloader(model, CPU) as offloader:
        stream = offloader.stream
        for index, use in ((1, lambda block: block.norm(X)), (2, lambda block: block.row())):
            use(_block(model, index))
            assert stream.latest() == ("compute_end", f"blocks.{index}")
        stream.engine.drain()  # what was fetched ahead is noted when it has come
        since = stream.upcoming
        for use in (lambda block: block.norm(X), lambda block: block.cached(X), lambda block: block(X)):
            use(_block(copy.deepcopy(model)))
        assert stream.upcoming == since


def _load(model: Model, assign: bool) -> None:
    torch.manual_seed(7)
    model.load_state_dict(Model().requires_grad_(False).state_dict(), assign=assign)


def _give(model: Model) -> None:
    _block(model).up.weight = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)
    _block(model).kept = torch.ones(3, WIDTH)


def _exchange(model: Model) -> None:
    for block in model.blocks:
        block.up.weight.data = torch.full((WIDTH, WIDTH), 0.25)


def _init(model: Model) -> None:
    torch.manual_seed(3)
    model.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) and m.weight.is_leaf else None)


def _replace(model: Model) -> None:
    torch.manual_seed(4)
    _block(model).up = nn.Linear(WIDTH, WIDTH)


def _reset(model: Model) -> None:
    for block in model.blocks:
        block.count.zero_()
        block.kept.copy_(X)


def _ema(model: Model) -> None:
    for tensor in model.parameters():
        tensor.data.mul_(0.9).add_(tensor.data.clone(), alpha=0.2)


WRITES: dict[str, Callable[[Model], Any]] = {
    "load_state_dict": lambda m: _load(m, False),
    "load_state_dict, assign": lambda m: _load(m, True),
    "in place": lambda m: [p.add_(0.125) for p in m.parameters()],
    "data": _ema,
    "a view": lambda m: [b.up.weight[0].zero_() for b in m.blocks],
    "an item": lambda m: [b.up.weight.__setitem__(0, 2.0) for b in m.blocks],
    "detached": lambda m: [b.up.weight.detach().t().mul_(0.5) for b in m.blocks],
    "out": lambda m: [torch.add(b.gain, 1.0, out=b.gain) for b in m.blocks],
    "foreach": lambda m: torch._foreach_mul_([*m.parameters()], 0.5),
    "through the state_dict": lambda m: [t.mul_(2) for t in m.state_dict().values()],
    "given": _give,
    "data exchanged": _exchange,
    "init": _init,
    "a submodule replaced": _replace,
    "buffers": _reset,
    "the same dtype": lambda m: m.to(torch.float32).float(),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("way", WRITES)
def test_writing_outside_a_turn_is_right(model: Model, way: str, budget: int | None) -> None:
    twin, write = copy.deepcopy(model), WRITES[way]
    with LayerwiseOffloader(model, CPU, budget_bytes=budget):
        for _ in range(2):
            same(model(X), twin(X))
            write(model), write(twin)
            same_state(model, twin)
            same(model(X), twin(X))
    same_state(model, twin)
    same(model(X), twin(X))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_optimizer_writes_what_it_was_given(model: Model, when: str, budget: int | None) -> None:
    twin = copy.deepcopy(model)

    def optimizer(model: Model) -> Callable[[], Any]:
        def step() -> None:
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            own.step()

        parameters = [block.up.weight for block in model.blocks]
        own = torch.optim.SGD(parameters, lr=0.125)
        return step

    steps = [optimizer(model)] if when == "before" else []
    with LayerwiseOffloader(model, CPU, budget_bytes=budget):
        model(X), twin(X)
        for step in [*(steps or [optimizer(model)]), optimizer(twin)]:
            step()
        same(model(X), twin(X))
    same_state(model, twin)


REFUSED: dict[str, Callable[[Model], Any]] = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "to another device": lambda m: m.to("meta"),
    "through a wrapper": lambda m: nn.Sequential(m).to(torch.bfloat16),
    "a block": lambda m: _block(m).half(),
    "a submodule": lambda m: _block(m).up.to(torch.bfloat16),
    "data of another dtype": lambda m: setattr(_block(m).gain, "data", _block(m).gain.data.half()),
    "data of another shape": lambda m: setattr(_block(m).gain, "data", torch.zeros(3)),
    "pickle": lambda m: pickle.dumps(m),
    "torch.save of the model": lambda m: torch.save(m, io.BytesIO()),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_is_refused_with_the_way_out(model: Model, way: str, budget: int | None) -> None:
    """And changes nothing."""
    twin = copy.deepcopy(model)
    with LayerwiseOffloader(model, CPU, budget_bytes=budget):
        same(model(X), twin(X))
        with pytest.raises((LiveModelError, pickle.PicklingError), match=r"remove\(\)"):
            REFUSED[way](model)
        same_state(model, twin)
        same(model(X), twin(X))
    same_state(model, twin)
    if "pickle" not in way and "save" not in way:
        REFUSED[way](model)


def test_a_tensor_that_another_device_has_is_refused(model: Model) -> None:
    with LayerwiseOffloader(model, CPU):
        _block(model).gain = nn.Parameter(torch.ones(WIDTH, device="meta"), requires_grad=False)
        with pytest.raises(LiveModelError, match=r"blocks.1: its 'gain' was exchanged .* on meta.*gathered.*remove"):
            model(X)
        _block(model).gain = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        model(X)


def test_held_a_block_has_its_tensors_on_the_device(model: Model) -> None:
    twin = copy.deepcopy(model)
    with LayerwiseOffloader(model, CPU) as offloader:
        with offloader.hold("blocks.1"):
            weight = _block(model).up.weight
            assert weight.untyped_storage().data_ptr() == offloader.stream.arena.memory.untyped_storage().data_ptr()
            for each in (model, twin):
                _block(each).up.weight.mul_(2)
            same(_block(model)(X), _block(twin)(X))
            assert _block(model).up.weight is weight, "its own call does not end what holds it"
        assert _block(model).up.weight is not weight
        same(model(X), twin(X))
    same_state(model, twin)


def _sharing(model: Model) -> dict[str, nn.Module]:
    other = Model()
    other.blocks[0] = model.blocks[0]
    inner = Model()
    inner.embed = model.embed
    tied = Model()
    tied.head.weight = model.head.weight
    return {
        "itself": model,
        "a wrapper": nn.ModuleDict({"inner": model}),
        "a block": other,
        "outside": inner,
        "tied": tied,
    }


@pytest.mark.parametrize("how", ["itself", "a wrapper", "a block", "outside", "tied", "a part"])
@pytest.mark.parametrize("outside", ["resident", "held"])
def test_attaching_twice_is_refused(model: Model, how: str, outside: Any) -> None:
    """Whatever has a part of it in common; the first goes on. A refused or failed one leaves nothing behind."""
    twin, others = copy.deepcopy(model), _sharing(model) | {"a part": _block(model)}
    with pytest.raises(ValueError, match="minimum"):
        LayerwiseOffloader(model, CPU, budget_bytes=1)
    offloader = LayerwiseOffloader(model, CPU, outside=outside)
    for _ in range(2):
        with pytest.raises(ForeignMechanismError, match=r"streamed by another LayerwiseOffloader.*call its remove\(\)"):
            LayerwiseOffloader(others[how], CPU, stacks=())
        with offloader.present():
            same(model(X), twin(X))
    offloader.remove()
    offloader.remove()
    same(model(X), twin(X))
    with LayerwiseOffloader(others[how], CPU, stacks=()) as second, second.present():
        same(model(X), twin(X))
    same_state(model, twin)


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_in_one_arena_are_removed_in_any_order(first: int) -> None:
    models = [Model().requires_grad_(False) for _ in range(2)]
    twins = copy.deepcopy(models)
    one = LayerwiseOffloader(models[0], CPU, budget_bytes=20_000, outside="held")
    offloaders = [one, LayerwiseOffloader(models[1], CPU, outside="held", arena=one.stream.arena)]
    for _ in range(2):
        for model, twin, offloader in zip(models, twins, offloaders, strict=True):
            with offloader.present():
                same(model(X), twin(X))
    for index in (first, 1 - first):
        offloaders[index].remove()
        same_state(models[index], twins[index])
        with nullcontext() if index != first else offloaders[1 - first].present():
            same(models[1 - first](X), twins[1 - first](X))


def _flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return cast(FluxTransformer2DModel, model.eval().requires_grad_(False))


def _draw(model: FluxTransformer2DModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image, text, pooled = (torch.randn(1, *size, generator=generator) for size in ((6, 8), (4, 12), (8,)))
    ids = {"img_ids": torch.arange(18.0).view(6, 3), "txt_ids": torch.zeros(4, 3)}
    inputs = {"hidden_states": image, "encoder_hidden_states": text, "pooled_projections": pooled, **ids}
    return cast(Tensor, model(**inputs, timestep=torch.tensor([0.5]), return_dict=False)[0])


def test_a_diffusers_transformer(tmp_path: Any) -> None:
    """TeaCache's measure, saved and read again, fused meanwhile, other weights loaded."""
    model, twin = _flux(), _flux()
    other = {name: tensor + 0.01 for name, tensor in twin.state_dict().items()}

    def measured(model: FluxTransformer2DModel) -> Tensor:
        block = model.transformer_blocks[0]
        return cast(Tensor, block.norm1(torch.ones(1, 6, 16), emb=torch.ones(1, 16))[0])

    with LayerwiseOffloader(model, CPU):
        for _ in range(2):
            same(measured(model), measured(twin))
            same(_draw(model), _draw(twin))
        model.save_pretrained(tmp_path)
        same(_draw(FluxTransformer2DModel.from_pretrained(tmp_path)), _draw(twin))
        assert (model.dtype, model.device) == (twin.dtype, twin.device)
        for each in (model, twin):
            each.load_state_dict(other)
        same(_draw(model), _draw(twin))
        for each in (model, twin):
            each.fuse_qkv_projections()
        for _ in range(2):
            same(_draw(model), _draw(twin))
    same(_draw(model), _draw(twin))
