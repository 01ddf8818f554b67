"""Tensor parallelism without processes: what each rank gets, and that the parts add up to the whole."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from crossdock.parallel.tensor import (
    COLUMN,
    ROW,
    LinearStyle,
    RowParallelLinear,
    TensorParallelism,
    TensorPlan,
    TensorSlice,
    tensor_slices,
)
from crossdock.runtime.checkpoint import TensorReader, stored_tensors
from crossdock.runtime.families import SPECS

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


@pytest.mark.parametrize(("family", "degree"), DEGREES)
def test_the_reader_reads_slices_and_ranges(family: str, degree: int, checkpoints: dict[str, Path]) -> None:
    """Every rank's bytes, whole and in odd pieces, against slicing the whole tensors loaded by safetensors."""
    folder = checkpoints[family] / "transformer"
    whole = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model, reader = _load(family, checkpoints[family]), TensorReader(stored_tensors(folder))
    generator = torch.Generator().manual_seed(degree)
    for rank in range(degree):
        slices = tensor_slices(model, SPECS[family].tensor_plan, rank, degree)
        for fqn, tensor in whole.items():
            part = slices.get(fqn)
            expected = tensor if part is None else _take(part, tensor)
            assert torch.equal(reader.read(fqn, part), expected), fqn
            start, stop = sorted(torch.randint(0, expected.numel() + 1, (2,), generator=generator).tolist())
            if start < stop:
                assert torch.equal(reader.read_flat(fqn, part, start, stop), expected.reshape(-1)[start:stop]), fqn
