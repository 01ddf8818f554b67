"""Tensor parallelism: column- and row-parallel linears with plain local tensors (Megatron-LM, arXiv 1909.08053).

A column-parallel linear holds a slice of its output features, the row-parallel one behind it the same slice of its
input features; one all-reduce per row-parallel output. A fused projection (qkv + mlp, gate + up) is cut part by
part, so that every rank gets its share of each part. What sits between the two and depends on all features, such as
a norm over all heads, exchanges what it must.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from crossdock.parallel.arguments import Arguments, hook_arguments, map_tensors
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

    In a pattern of paths, `*` stands for one path component; a pattern that ends in `?` may match nothing.

    Attributes:
        linears: module pattern -> style.
        head_count: the transformer config's key for the number of attention heads.
        heads: module pattern -> attributes that count heads or features and must become the local count.
        norms: patterns of RMS norms over the features of a column-parallel linear, all heads together.
        vectors: patterns of parameters with one value per head or feature.
        inputs: module pattern -> argument -> the dim of it (of all its tensors) that counts heads or features, where a
            module is given something whole.
    """

    linears: Mapping[str, LinearStyle]
    head_count: str
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    inputs: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


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
    """Module paths that match `pattern` (see `TensorPlan`), in module order.

    Raises:
        ValueError: none does, and one must.
    """
    return _matching(model, (name for name, _ in model.named_modules()), "module", pattern)


def tensor_slices(model: nn.Module, plan: TensorPlan, rank: int, degree: int) -> dict[str, TensorSlice]:
    """fqn -> slice, for every tensor that `plan` cuts on TP rank `rank`. A row-parallel bias stays whole.

    Raises:
        ValueError: a part, or a number of heads, does not divide by `degree`; names the tensor and both numbers.
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
    for name, norm in _planned_norms(model, plan):
        size = norm.normalized_shape[0]
        ranges = _ranges(name, [size], rank, degree)
        if norm.weight is not None:
            slices[f"{name}.weight"] = TensorSlice(0, ranges, size)
    for fqn in _planned_vectors(model, plan):
        size = model.get_parameter(fqn).shape[0]
        slices[fqn] = TensorSlice(0, _ranges(fqn, [size], rank, degree), size)
    for name, attribute, count in _planned_heads(model, plan):
        if count % degree:
            raise ValueError(f"{name}: {count} {attribute} do not divide by tp_degree {degree}")
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


class ParallelRMSNorm(nn.RMSNorm):
    """Of features that are spread over the group (RMSNorm, arXiv 1910.07467). Computes in fp32, as torch's own does."""

    group: Group | None = None
    degree = 1

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., features / degree]` -> the same."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        squares = wide.pow(2).sum(-1, keepdim=True)
        if self.group is not None:
            self.group.all_reduce(squares)
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        normed = wide * torch.rsqrt(squares / (x.shape[-1] * self.degree) + eps)
        if self.weight is not None:
            normed = normed * self.weight.to(normed)
        return normed.to(x.dtype)


EXCHANGING = (RowParallelLinear, ParallelRMSNorm)
"""The modules that use the group while a model runs."""


class TensorParallelism:
    """What `apply` did to a model; `remove` undoes it."""

    def __init__(self, slices: Mapping[str, TensorSlice], rank: int, degree: int, group: Group | None) -> None:
        self.slices = slices
        self._rank = rank
        self._degree = degree
        self._group = group
        self._undo: list[Callable[[], None]] = []

    @classmethod
    def apply(
        cls, model: nn.Module, plan: TensorPlan, rank: int, degree: int, group: Group | None
    ) -> TensorParallelism:
        """Replace the planned modules of a meta-device `model` by their local ones; weights are read afterwards.

        Raises:
            ValueError: as `tensor_slices`; or the model does not have what the plan names.
        """
        handle = cls(tensor_slices(model, plan, rank, degree), rank, degree, group)
        if degree == 1:
            return handle
        try:
            handle._cut(model, plan)
        except ValueError:
            handle.remove()
            raise
        return handle

    def _cut(self, model: nn.Module, plan: TensorPlan) -> None:
        for name, style in _planned_linears(model, plan).items():
            self._replace(model, name, self._local_linear(model.get_submodule(name), name, style))
        for name, norm in _planned_norms(model, plan):
            self._replace(model, name, self._local_norm(norm))
        for fqn in _planned_vectors(model, plan):
            self._cut_vector(model, fqn)
        for name, attribute, count in _planned_heads(model, plan):
            self._cut_heads(model.get_submodule(name), attribute, count)
        for pattern, dims in plan.inputs.items():
            for name in matching_modules(model, pattern):
                self._cut_inputs(model.get_submodule(name), dims)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, model: nn.Module, name: str, replacement: nn.Module) -> None:
        path, _, leaf = name.rpartition(".")
        modules = model.get_submodule(path)._modules
        before = modules[leaf]
        self._undo.append(lambda: modules.update({leaf: before}))
        modules[leaf] = replacement

    def _local_linear(self, linear: nn.Module, name: str, style: LinearStyle) -> nn.Linear:
        assert isinstance(linear, nn.Linear)
        local = self.slices[f"{name}.weight"].size
        options: dict[str, Any] = {"device": "meta", "dtype": linear.weight.dtype}
        if style.kind == "column":
            return nn.Linear(linear.in_features, local, linear.bias is not None, **options)
        replacement = RowParallelLinear(local, linear.out_features, linear.bias is not None, **options)
        replacement.group = self._group
        return replacement

    def _local_norm(self, norm: nn.RMSNorm) -> ParallelRMSNorm:
        affine = norm.weight is not None
        options: dict[str, Any] = {"device": "meta", "dtype": norm.weight.dtype if affine else None}
        local = norm.normalized_shape[0] // self._degree
        replacement = ParallelRMSNorm(local, norm.eps, affine, **options)
        replacement.group, replacement.degree = self._group, self._degree
        return replacement

    def _cut_vector(self, model: nn.Module, fqn: str) -> None:
        path, _, leaf = fqn.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        before = parameters[leaf]
        assert before is not None
        self._undo.append(lambda: parameters.update({leaf: before}))
        size = part_shape(tuple(before.shape), self.slices[fqn])
        parameters[leaf] = nn.Parameter(torch.empty(size, dtype=before.dtype, device="meta"), before.requires_grad)

    def _cut_heads(self, module: nn.Module, attribute: str, count: int) -> None:
        self._undo.append(lambda: setattr(module, attribute, count))
        setattr(module, attribute, count // self._degree)

    def _cut_inputs(self, module: nn.Module, dims: Mapping[str, int]) -> None:
        def act(arguments: Arguments) -> None:
            for name, dim in dims.items():
                arguments.change(name, partial(map_tensors, partial(self._own_part, dim)))

        self._undo.append(hook_arguments(module, tuple(dims), act).remove)

    def _own_part(self, dim: int, tensor: Tensor) -> Tensor:
        local, rest = divmod(tensor.shape[dim], self._degree)
        if rest:
            raise ValueError(f"dim {dim} of {tuple(tensor.shape)} does not divide by tp_degree {self._degree}")
        return tensor.narrow(dim, self._rank * local, local)


def _matching(model: nn.Module, names: Iterator[str], kind: str, pattern: str) -> list[str]:
    expression = re.compile(re.escape(pattern.removesuffix("?")).replace(r"\*", r"[^.]+"))
    found = [name for name in names if expression.fullmatch(name)]
    if not found and not pattern.endswith("?"):
        raise ValueError(f"no {kind} of {type(model).__name__} matches {pattern!r}")
    return found


def _planned_linears(model: nn.Module, plan: TensorPlan) -> dict[str, LinearStyle]:
    return {name: style for pattern, style in plan.linears.items() for name in matching_modules(model, pattern)}


def _planned_norms(model: nn.Module, plan: TensorPlan) -> list[tuple[str, nn.RMSNorm]]:
    found = [(name, model.get_submodule(name)) for pattern in plan.norms for name in matching_modules(model, pattern)]
    for name, norm in found:
        if not isinstance(norm, nn.RMSNorm) or len(norm.normalized_shape) != 1:
            raise ValueError(f"{name}: {type(norm).__name__} is not an RMSNorm over one dim; no other norm can be cut")
    return [(name, norm) for name, norm in found if isinstance(norm, nn.RMSNorm)]


def _planned_vectors(model: nn.Module, plan: TensorPlan) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return [name for pattern in plan.vectors for name in _matching(model, iter(names), "parameter", pattern)]


def _planned_heads(model: nn.Module, plan: TensorPlan) -> Iterator[tuple[str, str, int]]:
    """Module path, attribute, whole count."""
    for pattern, attributes in plan.heads.items():
        for name in matching_modules(model, pattern):
            for attribute in attributes:
                yield name, attribute, int(getattr(model.get_submodule(name), attribute))


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
