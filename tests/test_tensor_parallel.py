"""Tensor parallelism without processes: what each rank gets, and that the parts add up to the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from safetensors.torch import load_file
from thread_ranks import as_group, groups_of, run_threads
from torch import Tensor, nn

from crossdock.parallel.tensor import (
    COLUMN,
    ROW,
    LinearStyle,
    ParallelRMSNorm,
    RowParallelLinear,
    TensorParallelism,
    TensorPlan,
    TensorSlice,
    matching_modules,
    tensor_slices,
)
from crossdock.runtime.models.checkpoint import stored_tensors
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.rank.weights.source import WeightSource

MODELS = {"flux2-klein": Flux2Transformer2DModel, "z-image": ZImageTransformer2DModel}


def _load(family: str, directory: Path) -> nn.Module:
    model: nn.Module = MODELS[family].from_pretrained(directory / "transformer")
    return model.eval()


def _take(part: TensorSlice, tensor: Tensor) -> Tensor:
    return torch.cat([tensor.narrow(part.dim, start, stop - start) for start, stop in part.ranges], part.dim)


DEGREES = [("flux2-klein", 2), ("flux2-klein", 3), ("z-image", 2)]
"""Z-Image's feed-forward has 256 features here, which 3 does not divide."""


@pytest.mark.parametrize(("family", "degree"), DEGREES)
def test_slices_of_all_ranks_tile(family: str, degree: int, checkpoints: dict[str, Path]) -> None:
    """Every element of every cut tensor is on exactly one rank, the parts of fused projections included."""
    model, plan = _load(family, checkpoints[family]), SPECS[family].tensor_plan
    per_rank = [tensor_slices(model, plan, rank, degree) for rank in range(degree)]
    assert all(slices.keys() == per_rank[0].keys() for slices in per_rank)
    for fqn in per_rank[0]:
        held = torch.zeros(model.get_parameter(fqn).shape[per_rank[0][fqn].dim], dtype=torch.int)
        for slices in per_rank:
            for start, stop in slices[fqn].ranges:
                held[start:stop] += 1
        assert (held == 1).all(), fqn


def test_fused_projections_are_cut_part_by_part(checkpoints: dict[str, Path]) -> None:
    """Pitfall 37: a rank gets its share of q, of k, of v, of the gate and of the up half; by hand."""
    model = _load("flux2-klein", checkpoints["flux2-klein"])
    fqn = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    found = _take(tensor_slices(model, SPECS["flux2-klein"].tensor_plan, 1, 2)[fqn], model.get_parameter(fqn))
    attention = model.get_submodule("single_transformer_blocks.0.attn")
    inner, hidden = attention.inner_dim, attention.mlp_hidden_dim
    parts = model.get_parameter(fqn).split([inner, inner, inner, hidden, hidden])
    assert torch.equal(found, torch.cat([part.chunk(2)[1] for part in parts]))


@pytest.mark.parametrize("block", ["transformer_blocks.0.ff", "single_transformer_blocks.0.attn.to_out"])
def test_partial_sums_add_up(block: str, checkpoints: dict[str, Path]) -> None:
    """The ranks' partial outputs, summed by hand, are the whole module's output."""
    model = _load("flux2-klein", checkpoints["flux2-klein"]).double()
    whole, plan = model.get_submodule(block), SPECS["flux2-klein"].tensor_plan
    weights = dict(model.named_parameters())
    x = torch.randn(5, whole.in_features if isinstance(whole, nn.Linear) else 96, dtype=torch.float64)
    total = torch.zeros_like(expected := whole(x))
    for rank in range(2):
        local = copy.deepcopy(model)
        handle = TensorParallelism.apply(local, plan, rank, 2, group=None)
        for fqn in [name for name, parameter in local.named_parameters() if parameter.is_meta]:
            path, _, leaf = fqn.rpartition(".")
            value = _take(handle.slices[fqn], weights[fqn]) if fqn in handle.slices else weights[fqn]
            setattr(local.get_submodule(path), leaf, nn.Parameter(value))
        own = x if not isinstance(whole, nn.Linear) else _take(handle.slices[f"{block}.weight"], x)
        total += local.get_submodule(block)(own)
    assert torch.allclose(total, expected, atol=1e-12)


@pytest.mark.parametrize("family", list(MODELS))
def test_remove_restores_the_model(family: str, checkpoints: dict[str, Path]) -> None:
    """Pitfall 35: modules and head counts are the very same afterwards."""
    model, plan = _load(family, checkpoints[family]), SPECS[family].tensor_plan
    modules = {name: id(module) for name, module in model.named_modules()}
    heads = {name: m.heads for name, m in model.named_modules() if hasattr(m, "heads")}
    handle = TensorParallelism.apply(model, plan, 0, 2, group=None)
    if plan.heads:
        assert {m.heads for _, m in model.named_modules() if hasattr(m, "heads")} == {3}
    assert any(isinstance(module, RowParallelLinear) for module in model.modules())
    handle.remove()
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: m.heads for name, m in model.named_modules() if hasattr(m, "heads")} == heads


def test_a_row_parallel_bias_is_added_once() -> None:
    """Pitfall 38. The group of two is played by doubling: both ranks would hold equal halves."""
    linear = RowParallelLinear(4, 3)
    linear.group = SimpleNamespace(all_reduce=lambda output: output.mul_(2))  # type: ignore[assignment]
    x = torch.randn(2, 4)
    assert torch.allclose(linear(x), 2 * (x @ linear.weight.T) + linear.bias)


def test_what_does_not_divide_is_named() -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    plan = TensorPlan(linears={"up": COLUMN, "down": ROW}, head_count="heads")
    with pytest.raises(ValueError, match=r"up\.weight: a part of 6 features does not divide by tp_degree 4"):
        tensor_slices(model, plan, 0, 4)
    with pytest.raises(ValueError, match=r"no module of ModuleDict matches 'left'"):
        tensor_slices(model, TensorPlan(linears={"left": COLUMN}, head_count="heads"), 0, 2)
    with pytest.raises(ValueError, match="do not split in the proportions"):
        tensor_slices(model, TensorPlan({"up": LinearStyle("column", (3, 1))}, "heads"), 0, 2)


class Gated(nn.Module):
    """What sits between column- and row-parallel linears in the field's models, all at once.

    A norm over all heads, a table per head that comes from outside, a gate and a scale per head, fewer key heads than
    heads, and an output projection of attention and MLP side by side.
    """

    def __init__(self, heads: int, kv_heads: int, width: int, hidden: int, affine: bool = True) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = heads, kv_heads
        inner, kv_inner = heads * width, kv_heads * width
        self.to_q, self.to_k = nn.Linear(24, inner), nn.Linear(24, kv_inner)
        self.norm_q, self.norm_k = nn.RMSNorm(inner, 1e-6, affine), nn.RMSNorm(kv_inner, 1e-6, affine)
        self.to_gate, self.scale = nn.Linear(24, heads), nn.Parameter(torch.randn(heads))
        self.mlp, self.out = nn.Linear(24, 2 * hidden), nn.Linear(inner + hidden, 24)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x `[batch, tokens, 24]`, tables `[batch, heads, tokens, width]` and `[batch, tokens, heads * width]`."""
        q = (self.norm_q(self.to_q(x)) * tables[1]).unflatten(-1, (self.num_heads, -1)) * tables[0].transpose(1, 2)
        k = self.norm_k(self.to_k(x)).unflatten(-1, (self.num_kv_heads, -1))
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, 2) * self.scale[:, None]
        attention = (q + k.cumsum(1)) * torch.sigmoid(self.to_gate(x)).unsqueeze(-1)
        value, gate = self.mlp(x).chunk(2, -1)
        return self.out(torch.cat([attention.flatten(2), value * torch.nn.functional.silu(gate)], -1))  # type: ignore[no-any-return]


class Caller(nn.Module):
    """Gives the block what it is made for: one table counts heads, the other features."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, by_head: Tensor, by_feature: Tensor) -> Tensor:
        return self.block(x, (by_head, by_feature))  # type: ignore[no-any-return]


def gated_plan(hidden: int, inner: int) -> TensorPlan:
    return TensorPlan(
        linears={
            "block.to_q": COLUMN,
            "block.to_k": COLUMN,
            "block.to_gate": COLUMN,
            "block.to_absent?": COLUMN,
            "block.mlp": LinearStyle("column", (1, 1)),
            "block.out": LinearStyle("row", (inner, hidden)),
        },
        head_count="heads",
        heads={"block": ("num_heads", "num_kv_heads")},
        norms=("block.norm_q", "block.norm_k"),
        vectors=("block.scale",),
        inputs={"": {"by_head": 1, "by_feature": -1}},
    )


def fill(local: nn.Module, whole: nn.Module, handle: TensorParallelism) -> None:
    """What the weight loader does: a rank's part of every tensor of the whole model."""
    weights = dict(whole.named_parameters())
    for fqn in [name for name, parameter in local.named_parameters() if parameter.is_meta]:
        path, _, leaf = fqn.rpartition(".")
        value = _take(handle.slices[fqn], weights[fqn]) if fqn in handle.slices else weights[fqn]
        local.get_submodule(path)._parameters[leaf] = nn.Parameter(value)


@pytest.mark.parametrize(
    ("degree", "heads", "kv_heads", "hidden", "affine"),
    [(2, 4, 2, 12, True), (3, 6, 6, 30, True), (2, 6, 2, 8, False), (4, 8, 4, 20, True)],
)
def test_what_spans_all_heads(degree: int, heads: int, kv_heads: int, hidden: int, affine: bool) -> None:
    """Against the whole block, in float64; the proportions of the output projection have no common unit but 2."""
    torch.manual_seed(0)
    whole = Caller(Gated(heads, kv_heads, 6, hidden, affine)).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    x, by_head = torch.randn(2, 5, 24).double(), torch.randn(2, heads, 5, 6).double()
    by_feature = torch.randn(2, 5, heads * 6).double()
    meeting, groups = groups_of(degree)

    def work(rank: int) -> Tensor:
        local = copy.deepcopy(whole)
        handle = TensorParallelism.apply(local, gated_plan(hidden, heads * 6), rank, degree, as_group(groups[rank]))
        fill(local, whole, handle)
        return local(x, by_head, by_feature)  # type: ignore[no-any-return]

    expected = whole(x, by_head, by_feature)
    for found in run_threads([meeting], work, degree):
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_what_spans_all_heads_is_put_back() -> None:
    whole = Caller(Gated(4, 2, 6, 12))
    before, parts = copy.deepcopy(whole.state_dict()), {name: id(m) for name, m in whole.named_modules()}
    handle = TensorParallelism.apply(whole, gated_plan(12, 24), 0, 2, group=None)
    assert whole.get_parameter("block.norm_q.weight").shape == (12,)
    assert whole.get_parameter("block.scale").shape == (2,)
    assert (whole.block.num_heads, whole.block.num_kv_heads) == (2, 1)
    handle.remove()
    assert {name: id(m) for name, m in whole.named_modules()} == parts
    assert (whole.block.num_heads, whole.block.num_kv_heads) == (4, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    x = torch.randn(1, 3, 24)
    assert whole(x, torch.randn(1, 4, 3, 6), torch.randn(1, 3, 24)).shape == x.shape  # inputs are whole again


def test_a_plan_that_does_not_fit_leaves_the_model_alone() -> None:
    whole = Caller(Gated(4, 2, 6, 12))
    parts = {name: id(m) for name, m in whole.named_modules()}
    plan = TensorPlan({"block.to_q": COLUMN}, "heads", inputs={"": {"nonsense": 1}})
    with pytest.raises(ValueError, match=r"Caller\.forward has no argument 'nonsense'"):
        TensorParallelism.apply(whole, plan, 0, 2, group=None)
    assert {name: id(m) for name, m in whole.named_modules()} == parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [1e-6, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_on_one_rank_is_torchs(dtype: torch.dtype, eps: float | None, affine: bool) -> None:
    """Bit for bit: the sum is made in fp32 and rounded once, at the end."""
    torch.manual_seed(0)
    norm, alone = nn.RMSNorm(96, eps, affine).to(dtype), ParallelRMSNorm(96, eps, affine).to(dtype)
    if affine:
        nn.init.normal_(norm.weight)
        alone.load_state_dict(norm.state_dict())
    x = 3 * torch.randn(4, 7, 96).to(dtype)
    assert torch.equal(alone(x), norm(x))


@pytest.mark.parametrize("degree", [2, 3])
def test_a_norm_in_bfloat16_is_as_exact_as_torchs(degree: int) -> None:
    torch.manual_seed(0)
    norm = nn.RMSNorm(96, 1e-6).bfloat16()
    nn.init.normal_(norm.weight)
    x = 3 * torch.randn(4, 7, 96).bfloat16()
    meeting, groups = groups_of(degree)

    def work(rank: int) -> Tensor:
        local = ParallelRMSNorm(96 // degree, 1e-6).bfloat16()
        local.group, local.degree = as_group(groups[rank]), degree
        local.weight = nn.Parameter(norm.weight.chunk(degree)[rank])
        return local(x.chunk(degree, -1)[rank])

    found, exact = torch.cat(run_threads([meeting], work, degree), -1), norm.double()(x.double())
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (found != norm.bfloat16()(x)).float().mean() < 0.01  # of the values, the last bit of a few


def test_heads_that_do_not_divide_are_named() -> None:
    """Two key heads of six features divide by 4 as features, but not as heads."""
    model, plan = Caller(Gated(8, 2, 6, 12)), gated_plan(12, 48)
    with pytest.raises(ValueError, match="block: 2 num_kv_heads do not divide by tp_degree 4"):
        tensor_slices(model, plan, 0, 4)
    model.block.norm_k = nn.LayerNorm(12)
    with pytest.raises(ValueError, match=r"block\.norm_k: LayerNorm is not an RMSNorm"):
        tensor_slices(model, plan, 0, 2)


def test_only_an_optional_pattern_may_match_nothing() -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 6)})
    assert matching_modules(model, "up?") == ["up"]
    assert matching_modules(model, "u?") == []
    with pytest.raises(ValueError, match="no module of ModuleDict matches 'u'"):
        matching_modules(model, "u")
    with pytest.raises(ValueError, match=r"no parameter of ModuleDict matches 'up\.scale'"):
        tensor_slices(model, TensorPlan({}, "heads", vectors=("up.scale",)), 0, 2)


@pytest.mark.parametrize(
    ("parts", "features", "expected"),
    [((1, 4), 20, [(2, 4), (12, 20)]), ((3, 8), 44, [(6, 12), (28, 44)]), ((6, 10), 16, [(3, 6), (11, 16)])],
)
def test_proportions_need_no_common_unit(
    parts: tuple[int, ...], features: int, expected: list[tuple[int, int]]
) -> None:
    """Row-parallel, the second of two ranks: of each part the second half."""
    model = nn.ModuleDict({"down": nn.Linear(features, 4)})
    part = tensor_slices(model, TensorPlan({"down": LinearStyle("row", parts)}, "heads"), 1, 2)["down.weight"]
    assert (part.dim, list(part.ranges), part.full_size) == (1, expected, features)


@pytest.mark.parametrize(("family", "degree"), DEGREES)
def test_the_reader_reads_slices_and_ranges(family: str, degree: int, checkpoints: dict[str, Path]) -> None:
    """Every rank's bytes, whole and in odd pieces, against slicing the whole tensors loaded by safetensors."""
    folder = checkpoints[family] / "transformer"
    whole = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model, reader = _load(family, checkpoints[family]), WeightSource(stored_tensors(folder))
    generator = torch.Generator().manual_seed(degree)
    for rank in range(degree):
        slices = tensor_slices(model, SPECS[family].tensor_plan, rank, degree)
        for fqn, tensor in whole.items():
            part = slices.get(fqn)
            expected = tensor if part is None else _take(part, tensor)
            assert torch.equal(reader.rows(fqn, part), expected), fqn
            start, stop = sorted(torch.randint(0, expected.numel() + 1, (2,), generator=generator).tolist())
            if start < stop:
                assert torch.equal(reader.flat(fqn, part, start, stop), expected.reshape(-1)[start:stop]), fqn
