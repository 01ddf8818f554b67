"""Trying a tensor plan on small copies, without the weights: what cannot be read off a module may show when it runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorParallelism, TensorPlan


class UntriedError(Exception):
    """The trial is no evidence, for or against the plan."""


def try_plan(model: nn.Module, plan: TensorPlan, inputs: Mapping[str, object], degree: int = 2) -> str | None:
    """What goes wrong when rank 0 of `degree` runs on inputs of these shapes; None: nothing.

    Raises:
        UntriedError: the model does not run on the meta device, or is not to be cut by `degree`.
    """
    twin = on_meta(model)
    meta_inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(inputs))
    if error := _runs(twin, meta_inputs):
        raise UntriedError(f"the model does not run on the meta device ({error})")
    try:
        TensorParallelism.apply(twin, plan, 0, degree, group=None)
    except ValueError as error:
        raise UntriedError(str(error)) from None
    return _runs(twin, meta_inputs)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` without memory for its tensors."""
    instead: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to("meta")
        instead[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(model, instead)


def _runs(model: nn.Module, inputs: Mapping[str, object]) -> str | None:
    try:
        with torch.no_grad():
            model(**copy.deepcopy(dict(inputs)))
    except Exception as error:  # whatever a user's model may raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


_OUTER, _HIDDEN = 3, 4


def try_halves(module: nn.Module, linears: Mapping[str, nn.Linear], styles: Mapping[str, LinearStyle]) -> str | None:
    """What goes wrong when a small copy of an MLP runs in two halves instead of whole; None: nothing.

    Args:
        module: has no parameters but those of `linears`, and takes one tensor; it may be on meta.
        styles: one row-parallel linear, which is the last; columns, in one part or in two.
    """
    seeded = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(_small(style), generator=seeded) for name, style in styles.items()}
    x = torch.randn(2, _OUTER, generator=seeded)
    try:
        whole = _small_copy(module, linears, weights)(x)
        halves = [
            _small_copy(module, linears, {name: _half(weights[name], styles[name], rank) for name in weights})(x)
            for rank in (0, 1)
        ]
    except Exception as error:  # whatever a module that is called with one tensor may raise
        return f"it does not run alone ({type(error).__name__})"
    agree = torch.allclose(whole, halves[0] + halves[1], atol=1e-5)
    return None if agree else "its halves do not add up to the whole"


def _small(style: LinearStyle) -> tuple[int, int]:
    return (_OUTER, _HIDDEN) if style is ROW else (_HIDDEN * (1 if style is COLUMN else 2), _OUTER)


def _half(weight: Tensor, style: LinearStyle, rank: int) -> Tensor:
    if style is ROW:
        return weight.chunk(2, dim=1)[rank]
    parts = weight.chunk(1 if style is COLUMN else 2)
    return torch.cat([part.chunk(2)[rank] for part in parts])


def _small_copy(module: nn.Module, linears: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]) -> nn.Module:
    """`module` with other linears in the place of its own, without bias."""
    instead: dict[int, Any] = {}
    for name, linear in linears.items():
        small = nn.Linear(1, 1, bias=False)
        small.weight = nn.Parameter(weights[name], requires_grad=False)
        instead[id(linear)] = small
    return copy.deepcopy(module, instead).eval()
