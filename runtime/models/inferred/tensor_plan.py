"""A `TensorPlan` for a model: diffusers' `_tp_plan` where its class has one, else from the shape of its blocks.

From structure, two things are recognised: an attention with its own q, k, v and output projections, and an MLP that
widens and narrows again. A pair is cut only if nothing in it stands in the way; everything else stays whole on every
rank, which is correct and saves nothing, and is said with the reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from diffusers.hooks.tensor_parallel import PackedColwiseParallel, PackedRowwiseParallel
from torch import nn

from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorPlan, matching_modules
from crossdock.runtime.models.diffusers_api import declared_linears
from crossdock.runtime.models.inferred.trial import UntriedError, try_halves, try_plan

_WHAT = "Tensor parallelism"
_QUERY, _KEY_VALUE = ("to_q", "q_proj", "add_q_proj"), ("to_k", "to_v", "k_proj", "v_proj", "add_k_proj", "add_v_proj")
_OUTPUT = ("to_out.0", "to_out", "to_add_out", "o_proj")
_HARMLESS = (nn.ModuleList, nn.Dropout, nn.Identity)
_HEAD_COUNT = re.compile(r"(\w+_)?heads")
_HEAD_KEYS = ("num_attention_heads", "num_heads", "n_heads")
_GATED = LinearStyle("column", parts=(1, 1))


class _StaysWholeError(Exception):
    """Why a module is not cut."""


@dataclass
class _Found:
    linears: dict[str, LinearStyle] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)  # pattern -> count
    whole: dict[str, str] = field(default_factory=dict)  # pattern -> why
    unknown: dict[str, dict[str, None]] = field(default_factory=dict)  # pattern of blocks -> linears in them

    def drop_whole(self) -> None:
        """What can be cut in one block of a stack and not in another."""
        for pattern in self.whole:
            for name in [name for name in self.linears if name == pattern or name.startswith(f"{pattern}.")]:
                del self.linears[name]
            self.heads.pop(pattern, None)


def infer_tensor_plan(
    model: nn.Module, blocks: Sequence[str], inputs: Mapping[str, object] | None = None
) -> tuple[TensorPlan, tuple[str, ...]]:
    """The plan for `model`, and what is missing of it. Without linears: there is nothing that can be cut.

    Args:
        blocks: paths of the transformer blocks.
        inputs: arguments of forward; a plan from structure is tried on their shapes.
    """
    declared = declared_linears(model)
    found, missing = _declared(model, declared) if declared else _from_structure(model, blocks)
    if not found.linears:
        return TensorPlan({}, ""), tuple(missing)
    head_count, no_count = _head_count(model, found)
    plan = TensorPlan(found.linears, head_count, dict.fromkeys(found.heads, ("heads",)))
    missing += no_count
    if not declared:
        try:
            if inputs is not None and (error := try_plan(model, plan, inputs)):
                return TensorPlan({}, ""), (
                    f"{_WHAT}: cut as its layers suggest, {_name(model)} does not run: {error}.",
                )
            missing.insert(0, _UNPROVEN.format(_name(model)))
        except UntriedError as why:
            missing[:0] = [_UNPROVEN.format(_name(model)), f"{_WHAT}: the plan was not tried: {why}."]
    return plan, tuple(missing)


_UNPROVEN = (
    f"{_WHAT}: the plan is read off the layers of {{}}, not declared by it; compare one pass with the uncut model "
    "before relying on it."
)


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _declared(model: nn.Module, declared: Mapping[str, object]) -> tuple[_Found, list[str]]:
    found, missing = _Found(), []
    for pattern, what in declared.items():
        try:
            found.linears[pattern] = _style(what)
            modules = [model.get_submodule(name) for name in matching_modules(model, pattern)]
            if not all(isinstance(module, nn.Linear) for module in modules):
                raise _StaysWholeError("it is no linear layer")
        except (_StaysWholeError, ValueError) as reason:
            found.linears.pop(pattern, None)
            missing.append(f"{_WHAT}: {pattern} of _tp_plan is left out: {reason}.")
    return found, missing


def _style(what: object) -> LinearStyle:
    if what == "colwise":
        return COLUMN
    if what == "rowwise":
        return ROW
    if isinstance(what, PackedColwiseParallel):
        return LinearStyle("column", tuple(what.blocks) if what.blocks else "_tp_packed_col_blocks")
    if isinstance(what, PackedRowwiseParallel):
        return LinearStyle("row", tuple(what.blocks) if what.blocks else "_tp_packed_row_blocks")
    raise _StaysWholeError(f"the style {what!r} is not known")


# -- from structure ------------------------------------------------------------------------------------------------


def _from_structure(model: nn.Module, blocks: Sequence[str]) -> tuple[_Found, list[str]]:
    found = _Found()
    read: set[tuple[str, type, str]] = set()
    for name in blocks:
        stack, _, number = name.rpartition(".")
        pattern, block = f"{stack}.*" if number.isdecimal() else name, model.get_submodule(name)
        kind = (pattern, type(block), repr(block))
        if kind not in read:
            read.add(kind)
            _read_block(block, pattern, found)
    found.drop_whole()
    missing = [f"{_WHAT}: {name} stays whole on every rank: {why}." for name, why in found.whole.items()]
    for pattern, names in found.unknown.items():
        unknown = "stays whole on every rank: it belongs to no attention and no MLP that is recognised"
        missing.append(f"{_WHAT}: {', '.join(names)} of {pattern} {unknown}.")
    if not found.linears:
        missing.insert(0, f"{_WHAT}: no attention and no MLP of the blocks can be cut.")
    return found, missing


def _read_block(block: nn.Module, pattern: str, found: _Found) -> None:
    done: tuple[str, ...] = ()
    for path, module in block.named_modules():
        if path.startswith(done):
            continue
        name = f"{pattern}.{path}".rstrip(".")
        try:
            linears = _attention(module) if _is_attention(module) else _mlp(module)
        except _StaysWholeError as why:
            found.whole.setdefault(name, str(why))
        else:
            if isinstance(module, nn.Linear):
                found.unknown.setdefault(pattern, {})[path] = None
            if not linears:
                continue
            found.linears |= {f"{name}.{linear}": style for linear, style in linears.items()}
            if _is_attention(module):
                found.heads[name] = module.heads
        done += (f"{path}." if path else "",)


def _is_attention(module: nn.Module) -> bool:
    return any(name in (*_QUERY, *_KEY_VALUE) for name, _ in module.named_children())


def _attention(module: nn.Module) -> dict[str, LinearStyle]:
    heads = getattr(module, "heads", None)
    if not isinstance(heads, int):
        raise _StaysWholeError("it does not keep its number of heads as `heads`")
    if others := [name for name, value in vars(module).items() if _counts_heads(name, value)]:
        raise _StaysWholeError(f"it keeps a number of heads as `{others[0]}`, too")
    linears = _linears(module)
    columns = {name: child for name, child in linears.items() if name in (*_QUERY, *_KEY_VALUE)}
    rows = {name: child for name, child in linears.items() if name in _OUTPUT}
    if not rows:
        raise _StaysWholeError("its output projection lies elsewhere")
    if rest := [name for name in linears if name not in {**columns, **rows}]:
        raise _StaysWholeError(f"{rest[0]} is a layer of unknown meaning")
    inner = {child.out_features for child in columns.values()} | {child.in_features for child in rows.values()}
    if len(inner) != 1 or min(inner) % heads:
        raise _StaysWholeError("its projections are of different sizes")
    if reads := _reads_size(module, min(inner)):
        raise _StaysWholeError(f"its source reads `{reads}`, the size of all heads")
    _check_between(module, linears, min(inner) // heads)
    return dict.fromkeys(columns, COLUMN) | dict.fromkeys(rows, ROW)


def _counts_heads(name: str, value: object) -> bool:
    return name != "heads" and type(value) is int and _HEAD_COUNT.fullmatch(name) is not None


def _reads_size(module: nn.Module, size: int) -> str | None:
    """An attribute that holds `size` and that the source of the attention reads."""
    source = _source(type(module).forward) + _source(getattr(module, "processor", None).__class__.__call__)
    names = [name for name, value in vars(module).items() if type(value) is int and value == size]
    return next((name for name in names if re.search(rf"\.{name}\b(?! is)", source)), None)


@lru_cache(maxsize=256)
def _source(function: Callable[..., Any]) -> str:
    """Empty where it cannot be read."""
    with suppress(OSError, TypeError):
        return inspect.getsource(inspect.unwrap(function))
    return ""


def _check_between(module: nn.Module, linears: Mapping[str, nn.Module], head_dim: int) -> None:
    """Between the projections, there is nothing that needs more than one head at a time."""
    if next(module.parameters(recurse=False), None) is not None:
        raise _StaysWholeError("it has parameters of its own")
    for name, child in module.named_modules():
        if not name or name in linears or isinstance(child, _HARMLESS):
            continue
        size = _normed_size(child)
        if size is None:
            raise _StaysWholeError(f"{name}, a {type(child).__name__}, may need all heads at once")
        if size != head_dim:
            raise _StaysWholeError(f"{name} normalises {size} features, which is not one head of {head_dim}")


def _normed_size(norm: nn.Module) -> int | None:
    """The features that a norm takes together; None where that is not to be seen."""
    shapes = {tuple(parameter.shape) for parameter in norm.parameters()}
    shapes |= {tuple(shape) for a in ("normalized_shape", "dim") if isinstance(shape := getattr(norm, a, None), tuple)}
    return shapes.pop()[0] if len(shapes) == 1 and all(len(shape) == 1 for shape in shapes) else None


def _mlp(module: nn.Module) -> dict[str, LinearStyle]:
    """The plan of an MLP; empty if `module` is none.

    Raises:
        _StaysWholeError: it has the sizes of one, but its halves do not add up.
    """
    linears = _linears(module)
    if any(_is_attention(part) for part in module.modules()):
        return {}
    if len(linears) < 2 or _parameters(module) != sum(_parameters(child) for child in linears.values()):
        return {}
    failures = []
    for last in reversed([name for name, child in linears.items() if _is_down(child, linears.values())]):
        hidden = linears[last].in_features
        styles = {name: COLUMN if child.out_features == hidden else _GATED for name, child in linears.items()}
        styles[last] = ROW
        failure = try_halves(module, linears, styles)
        if failure is None:
            return styles
        failures.append(failure)
    if failures:
        raise _StaysWholeError(failures[0])
    return {}


def _is_down(last: nn.Linear, linears: Iterable[nn.Linear]) -> bool:
    """By its size, `last` may be what brings the hidden features of all the others back."""
    hidden, outer = last.in_features, last.out_features
    others = [child for child in linears if child is not last]
    return all(child.in_features == outer and child.out_features in (hidden, 2 * hidden) for child in others)


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear) and name}


def _parameters(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


# -- the number of heads -------------------------------------------------------------------------------------------


def _head_count(model: nn.Module, found: _Found) -> tuple[str, list[str]]:
    """The config's key for the number of heads."""
    config = getattr(model, "config", None)
    keys = {key: value for key, value in config.items() if _counts(key, value)} if isinstance(config, Mapping) else {}
    counts = set(found.heads.values())
    fitting = [key for key, value in keys.items() if not counts or value in counts]
    main = [key for key in fitting if key in _HEAD_KEYS] or fitting
    if len(main) == 1:
        return main[0], []
    return "", [f"{_WHAT}: which key of the model's config is its number of heads is not to be seen ({list(keys)})."]


def _counts(key: str, value: object) -> bool:
    return type(value) is int and _HEAD_COUNT.fullmatch(key) is not None
