"""Tensor parallelism: column- and row-parallel linears with plain local tensors (Megatron-LM, arXiv 1909.08053).

A column-parallel linear holds a slice of its output features, the row-parallel one behind it the same slice of its
input features; one all-reduce per row-parallel output. A fused projection (qkv + mlp, gate + up) is cut part by
part, so that every rank gets its share of each part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from crossdock.parallel.group import Group


@dataclass(frozen=True)
class LinearStyle:
    """How one linear is cut.

    `parts` are the proportions of a fused projection, or the name of an attribute of the linear that holds them.
    """

    kind: Literal["column", "row"]
    parts: tuple[int, ...] | str = (1,)


COLUMN = LinearStyle("column")
ROW = LinearStyle("row")


@dataclass(frozen=True)
class TensorPlan:
    """A model family's tensor parallelism, as data.

    Attributes:
        linears: module path pattern (`*` stands for one path component) -> style.
        heads: patterns of modules whose `heads` attribute must become the local count.
        head_count: the transformer config's key for the number of attention heads.
    """

    linears: Mapping[str, LinearStyle]
    head_count: str
    heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorSlice:
    """The part of a tensor that a rank holds: `ranges` (start, stop) along `dim`, one per part, put together."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    full_size: int

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def part_shape(shape: tuple[int, ...], part: TensorSlice | None) -> tuple[int, ...]:
    """The shape of `part` of a tensor of `shape`; None: all of it."""
    if part is None:
        return shape
    return (*shape[: part.dim], part.size, *shape[part.dim + 1 :])


def matching_modules(model: nn.Module, pattern: str) -> list[str]:
    """Module paths that match `pattern`, in module order.

    Raises:
        ValueError: none does.
    """
    expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
    found = [name for name, _ in model.named_modules() if expression.fullmatch(name)]
    if not found:
        raise ValueError(f"no module of {type(model).__name__} matches {pattern!r}")
    return found


def tensor_slices(model: nn.Module, plan: TensorPlan, rank: int, degree: int) -> dict[str, TensorSlice]:
    """fqn -> slice, for every tensor that `plan` cuts on TP rank `rank`. A row-parallel bias stays whole.

    Raises:
        ValueError: a part does not divide by `degree`; names the tensor and both numbers.
    """
    slices: dict[str, TensorSlice] = {}
    for name, style in _planned_linears(model, plan).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        dim = 0 if style.kind == "column" else 1
        ranges = _ranges(f"{name}.weight", _part_sizes(linear, style, dim), rank, degree)
        slices[f"{name}.weight"] = TensorSlice(dim, ranges, linear.weight.shape[dim])
        if linear.bias is not None and style.kind == "column":
            slices[f"{name}.bias"] = TensorSlice(0, ranges, linear.bias.shape[0])
    return slices


class RowParallelLinear(nn.Linear):
    """Input features are local; the output is summed over the group, then the bias is added, once."""

    group: Group | None = None

    def forward(self, input: Tensor) -> Tensor:
        """input: `[..., in_features / degree]` -> `[..., out_features]`, equal on all ranks."""
        output = nn.functional.linear(input, self.weight)
        if self.group is not None:
            self.group.all_reduce(output)
        return output if self.bias is None else output + self.bias


class TensorParallelism:
    """What `apply` did to a model; `remove` undoes it."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self.slices = slices
        self._modules: list[tuple[nn.Module, str, nn.Module]] = []
        self._heads: list[tuple[Any, int]] = []

    @classmethod
    def apply(
        cls, model: nn.Module, plan: TensorPlan, rank: int, degree: int, group: Group | None
    ) -> TensorParallelism:
        """Replace the planned linears of a meta-device `model` by their local ones; weights are read afterwards."""
        handle = cls(tensor_slices(model, plan, rank, degree))
        if degree == 1:
            return handle
        for name, style in _planned_linears(model, plan).items():
            handle._replace(model, name, style, group)
        for pattern in plan.heads:
            for name in matching_modules(model, pattern):
                handle._cut_heads(model.get_submodule(name), name, degree)
        return handle

    def remove(self) -> None:
        for parent, leaf, module in self._modules:
            parent._modules[leaf] = module
        for attention, heads in self._heads:
            attention.heads = heads
        self._modules.clear()
        self._heads.clear()

    def _replace(self, model: nn.Module, name: str, style: LinearStyle, group: Group | None) -> None:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        local = self.slices[f"{name}.weight"].size
        options: dict[str, Any] = {"device": "meta", "dtype": linear.weight.dtype}
        replacement: nn.Linear
        if style.kind == "column":
            replacement = nn.Linear(linear.in_features, local, linear.bias is not None, **options)
        else:
            replacement = RowParallelLinear(local, linear.out_features, linear.bias is not None, **options)
            replacement.group = group
        path, _, leaf = name.rpartition(".")
        parent = model.get_submodule(path)
        self._modules.append((parent, leaf, linear))
        parent._modules[leaf] = replacement

    def _cut_heads(self, attention: Any, name: str, degree: int) -> None:
        if attention.heads % degree:
            raise ValueError(f"{name}: {attention.heads} heads do not divide by tp_degree {degree}")
        self._heads.append((attention, attention.heads))
        attention.heads //= degree


def _planned_linears(model: nn.Module, plan: TensorPlan) -> dict[str, LinearStyle]:
    return {name: style for pattern, style in plan.linears.items() for name in matching_modules(model, pattern)}


def _part_sizes(linear: nn.Linear, style: LinearStyle, dim: int) -> list[int]:
    parts: Sequence[int] = getattr(linear, style.parts) if isinstance(style.parts, str) else style.parts
    unit, rest = divmod(linear.weight.shape[dim], sum(parts))
    if rest:
        raise ValueError(f"{linear.weight.shape[dim]} features do not split in the proportions {tuple(parts)}")
    return [part * unit for part in parts]


def _ranges(fqn: str, sizes: Sequence[int], rank: int, degree: int) -> tuple[tuple[int, int], ...]:
    ranges, start = [], 0
    for size in sizes:
        if size % degree:
            raise ValueError(f"{fqn}: a part of {size} features does not divide by tp_degree {degree}")
        local = size // degree
        ranges.append((start + rank * local, start + (rank + 1) * local))
        start += size
    return tuple(ranges)
