"""Which modules of a model are its blocks, and what stands in the way of streaming them.

A model says where its blocks are through the class attribute `_layerwise_offload_blocks_attrs`, as in vLLM-Omni;
for one that says nothing, the module lists that hold most of it are taken. A block goes by its true path in the
module tree, whatever name it was found under: a name that placement cannot find again moves nothing, or everything.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CURRENT, DEPRECATED = "_layerwise_offload_blocks_attrs", "_layerwise_offload_blocks_attr"

_CLASS_LISTS = ("_no_split_modules", "_repeated_blocks")
"""Where transformers and diffusers classes name the classes of their blocks."""
_NEGLIGIBLE = 0.05
"""Share of the model's bytes under which a module list that no class attribute points at stays resident."""


class DiscoveryError(ValueError):
    """The blocks of a model cannot be told; one line: class, what, the module lists there are, what to do."""


@dataclass(frozen=True)
class FoundBlock:
    """`name` is the block's path in the model's module tree."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class SharedStorage:
    """Two tensors of different owners in one storage. An owner is a block's name, or None outside the blocks."""

    fqn: str
    owner: str | None
    other_fqn: str
    other_owner: str | None


def discover_blocks(model: nn.Module, stacks: Sequence[str] | None = None) -> list[FoundBlock]:
    """The blocks of `model`, stack after stack, each in the order of its list.

    The stacks are those that the model declares in `_layerwise_offload_blocks_attrs`; else in the old spelling
    `_layerwise_offload_blocks_attr`; else `stacks`; else those of `infer_stacks`. A stack is a dotted path to a
    ModuleList, ModuleDict, Sequential, list or tuple of modules, or to any other module, which is one block; it may
    be a property. An entry without any parameter or buffer (None, `nn.Identity`, a pipeline stage's placeholder) is
    skipped: there is nothing to stream.

    Raises:
        DiscoveryError: no stack can be told; a stack is missing, empty or no modules; a block is listed twice, lies
            inside another one or outside the module tree, or has no forward that would ever be called.
    """
    paths, source = stack_paths(model, stacks)
    names = {id(module): name for name, module in model.named_modules() if name}
    blocks = []
    for path in paths:
        for module in _stack_modules(model, path, source):
            if id(module) not in names:
                what = f"a {type(module).__name__} of block stack {path!r} is not in the model's module tree"
                raise _error(model, what, "register it as a submodule")
            blocks.append(FoundBlock(names[id(module)], module))
    _check_distinct(model, blocks)
    return blocks


def stack_paths(model: nn.Module, stacks: Sequence[str] | None = None) -> tuple[tuple[str, ...], str]:
    """The paths of the block stacks, as `discover_blocks` takes them, and where they were found.

    Raises:
        DiscoveryError: none is to be found, or what names them is no list of paths.
    """
    current, deprecated = getattr(model, CURRENT, None), getattr(model, DEPRECATED, None)
    if deprecated is not None:
        new = f"{CURRENT} = [{deprecated!r}]" if isinstance(deprecated, str) else CURRENT
        message = f"{type(model).__name__} declares {DEPRECATED}, which is deprecated; write {new}"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    for value, source in ((current, CURRENT), (deprecated, DEPRECATED), (stacks, "the argument stacks")):
        if value is not None:
            return _as_paths(model, value, source), source
    inferred = infer_stacks(model)
    if not inferred:
        raise _error(model, "it declares no block stack, and no module list looks like one", f"declare {CURRENT}")
    return inferred, "the model's structure"


def infer_stacks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the block stacks of a model that declares none, in the order in which they are registered.

    Empty where nothing looks like one. The order in which they run is recorded in the first pass.
    A stack is a ModuleList of blocks whose classes the model (or a model inside it) names in `_no_split_modules` or
    `_repeated_blocks`; or of at least two modules of one class that hold 5% of the model's bytes or more. Lists that
    overlap are taken once: those of named classes first, then the outermost.
    """
    lists = {path: module for path, module in model.named_modules() if path and isinstance(module, nn.ModuleList)}
    named = {name for module in model.modules() for key in _CLASS_LISTS for name in getattr(module, key, None) or ()}
    least = _NEGLIGIBLE * _tensor_bytes(model)
    candidates = [path for path, stack in lists.items() if _holds_named(stack, named)]
    candidates += [path for path, stack in lists.items() if _is_large_and_uniform(stack, least)]
    chosen: list[str] = []
    for path in candidates:
        if not any(_overlap(lists[path], lists[other]) for other in chosen):
            chosen.append(path)
    return tuple(path for path in lists if path in chosen)


def shared_storage(model: nn.Module, blocks: Iterable[FoundBlock]) -> list[SharedStorage]:
    """Every storage that two blocks, or a block and the part outside, both use: one item per further owner.

    Judged by memory, not by name: tied parameters, modules reached twice, views into one storage, and different
    storages over overlapping addresses all count. Meta tensors go by the identity of their storage.
    """
    found = list(blocks)
    uses = [(f"{block.name}.{name}", block.name, tensor) for block in found for name, tensor in _tensors(block.module)]
    inside = {id(block.module) for block in found}
    every = [*uses, *((fqn, None, tensor) for fqn, tensor in _outside(model, "", inside))]
    shared = []
    for group in _by_memory([tensor for _, _, tensor in every]):
        first_of: dict[str | None, str] = {}
        for index in group:
            first_of.setdefault(every[index][1], every[index][0])
        (owner, fqn), *others = first_of.items()
        shared += [SharedStorage(fqn, owner, other_fqn, other) for other, other_fqn in others]
    return shared


def plain_tensors(module: nn.Module) -> list[str]:
    """Dotted names of tensors kept as plain attributes, also inside a list, tuple or dict (`cache.0`).

    They are neither parameters nor buffers, so nothing that moves the module's weights moves them.
    """
    return [name for name, _ in named_plain_tensors(module)]


def named_plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `plain_tensors` with their names."""
    registered = {id(tensor) for _, tensor in _tensors(module)}
    yield from (
        (plain.name, plain.tensor) for plain in _attribute_tensors(module) if id(plain.tensor) not in registered
    )


@dataclass(frozen=True)
class PlainTensor:
    """A tensor kept as an attribute of a module, or in a list, tuple or mapping that is one.

    Attributes:
        name: dotted, from the root (`blocks.3.cache.0`).
        value: of the attribute: the tensor, or what it is kept in.
        keys: where in `value` it is; empty where it is `value`.
    """

    name: str
    module: nn.Module
    attribute: str
    value: Any
    keys: tuple[Any, ...]
    tensor: Tensor

    def put(self, tensor: Tensor) -> None:
        """Keep `tensor` there instead."""
        kept = getattr(self.module, self.attribute) if self.keys else None
        if isinstance(kept, list | MutableMapping):
            kept[self.keys[0]] = tensor
        elif isinstance(kept, tuple):
            items = [tensor if place == self.keys[0] else item for place, item in enumerate(kept)]
            setattr(self.module, self.attribute, kept._make(items) if hasattr(kept, "_make") else type(kept)(items))
        elif isinstance(kept, Mapping):
            setattr(self.module, self.attribute, {**kept, self.keys[0]: tensor})
        else:
            setattr(self.module, self.attribute, tensor)

    def put_back(self) -> None:
        """As it was: the very tensor, in the very list, tuple or mapping."""
        if isinstance(self.value, list | MutableMapping):
            self.value[self.keys[0]] = self.tensor
        setattr(self.module, self.attribute, self.value)


def move_plain_tensors(model: nn.Module, device: torch.device) -> list[PlainTensor]:
    """Move tensors that are neither parameters nor buffers; returns what there was, for `put_back`.

    Another name of a parameter or buffer gets a copy, but in a list or mapping: a module's own list of its weights
    is no second place for them. One on meta stays there: it is made anew when it is needed, as by `weight_norm`.
    """
    registered = {id(tensor) for _, tensor in _tensors(model)}
    found = [plain for plain in _attribute_tensors(model) if not plain.tensor.is_meta]
    moved = [plain for plain in found if not plain.keys or id(plain.tensor) not in registered]
    for plain in moved:
        plain.put(plain.tensor.to(device))
    return moved


def _as_paths(model: nn.Module, value: object, source: str) -> tuple[str, ...]:
    paths = (value,) if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise _error(model, f"{source} is no list of attribute paths", "make it one")
    if not paths:
        raise _error(model, f"{source} names no block stack", "name at least one attribute that holds the blocks")
    return tuple(paths)


def _stack_modules(model: nn.Module, path: str, source: str) -> list[nn.Module]:
    """The modules of one stack that hold tensors."""
    try:
        value = operator.attrgetter(path)(model)
    except AttributeError as error:
        what = f"there is no block stack {path!r}, which {source} names"
        raise _error(model, what, "name an attribute that holds the blocks") from error
    if isinstance(value, nn.ModuleDict):
        value = list(value.values())
    entries = list(value) if isinstance(value, nn.ModuleList | nn.Sequential | list | tuple) else [value]
    for entry in entries:
        if not isinstance(entry, nn.Module) and (entry is not None or value is None):
            what = f"block stack {path!r}, which {source} names, holds a {type(entry).__name__}"
            raise _error(model, what, "name a module or a sequence of modules")
    modules = [entry for entry in entries if entry is not None and _holds_tensors(entry)]
    if not modules:
        what = f"block stack {path!r}, which {source} names, " + ("holds no tensors" if entries else "is empty")
        raise _error(model, what, "drop it or name another one")
    return modules


def _check_distinct(model: nn.Module, blocks: Sequence[FoundBlock]) -> None:
    names: dict[int, str] = {}
    for block in blocks:
        if id(block.module) in names:
            raise _error(model, f"block {block.name!r} is listed twice", "list every block once, in one stack")
        if not _has_forward(block.module):
            what = f"block {block.name!r} is a {type(block.module).__name__}, which is never called itself"
            raise _error(model, what, "name the list that holds the blocks")
        names[id(block.module)] = block.name
    for block in blocks:
        for part in block.module.modules():
            if part is not block.module and id(part) in names:
                what = f"block {names[id(part)]!r} lies inside block {block.name!r}"
                raise _error(model, what, "name only one of the two stacks")


def _error(model: nn.Module, what: str, advice: str) -> DiscoveryError:
    inner: set[int] = set()  # the lists inside blocks are many (one per attention) and of no use here
    there = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inner:
            inner |= {id(part) for part in module.modules()}
            there.append(f"{name} ({len(module)})")
    return DiscoveryError(f"{type(model).__name__}: {what}; its module lists: {', '.join(there) or 'none'}; {advice}")


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers under all their names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _holds_tensors(module: nn.Module) -> bool:
    return next(_tensors(module), None) is not None


def _tensor_bytes(module: nn.Module) -> int:
    """Buffers count: some quantized layers keep their weights in them."""
    distinct = {id(tensor): tensor for _, tensor in _tensors(module)}
    return sum(part.nbytes for tensor in distinct.values() for part in _stored_parts(tensor))


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _blocks_in(stack: nn.ModuleList) -> list[nn.Module]:
    return [child for child in stack if child is not None and _has_forward(child) and _holds_tensors(child)]


def _holds_named(stack: nn.ModuleList, named: set[str]) -> bool:
    classes = {type(block).__name__ for block in _blocks_in(stack)}
    return bool(classes) and classes <= named


def _is_large_and_uniform(stack: nn.ModuleList, least: float) -> bool:
    blocks = _blocks_in(stack)
    return len(blocks) >= 2 and len({type(block) for block in blocks}) == 1 and _tensor_bytes(stack) >= least


def _overlap(one: nn.ModuleList, other: nn.ModuleList) -> bool:
    """A block of one list is, or lies inside, a block of the other."""
    return any(
        id(part) in {id(block) for block in left if block is not None}
        for left, right in ((one, other), (other, one))
        for part in right.modules()
    )


def _outside(module: nn.Module, path: str, blocks: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is reached without passing through a block."""
    if id(module) in blocks:
        return
    prefix = f"{path}." if path else ""
    for name, tensor in _tensors(module, recurse=False):
        yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _outside(child, prefix + name, blocks)


def _by_memory(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors that lie in one piece of memory, group by group, in order of first use."""
    spans: list[tuple[str, int, int, int]] = []  # device, first address, end, index
    nowhere: dict[int, list[int]] = {}
    alive = []  # or the next storage object could get the id of this one
    for index, tensor in enumerate(tensors):
        for part in _stored_parts(tensor):
            storage = part.untyped_storage()
            alive.append(storage)
            start = 0 if part.is_meta else storage.data_ptr()
            if start:
                spans.append((str(part.device), start, start + storage.nbytes(), index))
            elif part.numel():
                nowhere.setdefault(id(storage), []).append(index)
    groups = list(nowhere.values())
    device, end = "", 0
    for where, start, stop, index in sorted(spans):
        if where != device or start >= end:
            groups.append([])
            device, end = where, stop
        groups[-1].append(index)
        end = max(end, stop)
    return sorted(sorted(group) for group in groups)


def _stored_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a subclass (DTensor, a quantized weight) wraps; `tensor` itself where it is a plain one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # a DTensor names its mesh here, too
            yield from _stored_parts(part)


_OF_ANY_MODULE = frozenset(vars(nn.Module()))
"""Parameters, buffers, submodules, hooks."""


def _attribute_tensors(model: nn.Module) -> Iterator[PlainTensor]:
    for path, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if attribute in _OF_ANY_MODULE:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            if isinstance(value, Tensor):
                yield PlainTensor(name, module, attribute, value, (), value)
                continue
            items: Iterable[tuple[Any, Any]] = ()
            if isinstance(value, Mapping):
                items = value.items()
            elif isinstance(value, list | tuple):
                items = enumerate(value)
            for key, item in items:
                if isinstance(item, Tensor):
                    yield PlainTensor(f"{name}.{key}", module, attribute, value, (key,), item)
