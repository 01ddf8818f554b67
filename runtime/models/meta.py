"""Building a transformer without its weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from crossdock.offload.live.discovery import plain_tensors
from crossdock.runtime.config.bounded_files import walk
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.build_limits import (
    TooLargeError,
    blame,
    bounded,
    check_table,
    check_values,
    largest_number,
)
from crossdock.runtime.models.checkpoint import component_class, read_json

_BLAME_S = 1.5
_MAX_REASON = 500


class _BoundedTables(TorchFunctionMode):
    """For a model on meta: what its constructor computes is sized, and costs nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        if (drawn := _drawn(func, args, kwargs)) is not None:
            return drawn
        result = func(*args, **(kwargs or {}))
        if func is not torch.empty:
            check_table(result)
        return result


def _drawn(func: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object] | None) -> Tensor | None:
    """The weight that `func` only fills with numbers, where it has none: that takes a third of the time."""
    if getattr(func, "__module__", None) != nn.init.__name__:
        return None
    weight = args[0] if args else (kwargs or {}).get("tensor")
    return weight if isinstance(weight, Tensor) and weight.is_meta else None


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which every layer allocates its weights, goes to the meta device.

    What is computed in a constructor (rotary tables, sigmas) stays real: non-persistent buffers are in no checkpoint,
    so a model built on the meta device as a whole would have lost them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        if (drawn := _drawn(func, args, kwargs)) is not None:
            return drawn
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        else:
            check_table(_shapes_only(func, args, kwargs))
        return func(*args, **kwargs)


def _shapes_only(func: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """What `func` would return, without its numbers; nothing where that costs nothing, or where it cannot say."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors and all(tensor.is_meta for tensor in tensors):
        return None
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    try:
        with torch.no_grad():
            return func(*args, **(kwargs if tensors else {**kwargs, "device": "meta"}))
    except Exception:  # it is called in earnest next, and may raise what it likes
        return None


def build_on_meta(class_name: str, component_dir: Path, library: str = "diffusers") -> nn.Module:
    """The diffusers model `class_name` with the config of `component_dir`: parameters on meta, buffers real.

    Args:
        library: as in model_index.json.

    Raises:
        CheckpointError: the config is missing, names another class, or does not fit the class.
    """
    path = component_dir / "config.json"
    config = read_json(path)
    if config.get("_class_name") != class_name:
        raise CheckpointError(
            f"{path}: _class_name is {config.get('_class_name')!r}, expected {class_name!r}, as in model_index.json"
        )
    if component_class(library, class_name) is None:
        raise CheckpointError(f"{path}: {library} has no class {class_name}; is it too old?")
    with described(path, class_name, config, lambda changed: _shape_of(class_name, changed, library)):
        return build_config_on_meta(class_name, config, library)


@contextmanager
def described(
    path: Path, class_name: str, config: Mapping[str, object], build: Callable[[Mapping[str, object]], object]
) -> Iterator[None]:
    """Whatever a library raises while it makes a model of `config` says which key of which file it is about.

    Args:
        build: makes the same of another config, or raises; with it the key is looked for.

    Raises:
        CheckpointError: so, or the model would be larger than any there is.
    """
    try:
        check_values(config)
        yield
    except TooLargeError as error:
        key, value = largest_number(config)
        reason = f"{error.key}: {error}" if error.key else f"{key}: found {value}: {class_name} {error}"
        raise CheckpointError(f"{path}: {reason}; is the file damaged?") from None
    except Exception as error:
        blamed = _key_to_blame(config, build, str(error))
        where = f"{path}: {blamed}: " if blamed else f"{path}: "
        what = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise CheckpointError(f"{where}{class_name} cannot be built: {what}") from None


def _key_to_blame(
    config: Mapping[str, object], build: Callable[[Mapping[str, object]], object], message: str
) -> str | None:
    """Found by leaving out one after the other, for a short while: then nothing builds any more.

    Args:
        message: of the error; the keys and texts that it quotes are tried first.
    """
    deadline = time.thread_time() + _BLAME_S

    def builds(changed: Mapping[str, object]) -> bool:
        try:
            with bounded(deadline):
                build(changed)
        except Exception:
            return False
        return time.thread_time() < deadline

    def is_quoted(key: str) -> bool:
        return key in message or any(repr(part) in message for _, _, part in walk(config[key]) if isinstance(part, str))

    return blame({key: config[key] for key in sorted(config, key=is_quoted, reverse=True)}, builds)


def build_config_on_meta(class_name: str, config: Mapping[str, object], library: str = "diffusers") -> nn.Module:
    """The diffusers model `class_name` with `config`; raises whatever its constructor does.

    Where all that a constructor computes is in the checkpoint as well (a table of 150,000 positions takes 9 s), it is
    not computed.
    """
    shape = build_shape(class_name, config, library)
    if shape is not None and len(list(shape.buffers())) and not (non_persistent_buffers(shape) or plain_tensors(shape)):
        return shape
    with _EmptyOnMeta():
        model = _made(class_name, config, library)
    return _parameters_to_meta(model).eval()


def build_shape(class_name: str, config: Mapping[str, object], library: str = "diffusers") -> nn.Module | None:
    """The same, with everything on meta; None where a constructor needs values."""
    try:
        return _shape_of(class_name, config, library)
    except TooLargeError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _shape_of(class_name: str, config: Mapping[str, object], library: str) -> nn.Module:
    with torch.device("meta"), _BoundedTables():
        model = _made(class_name, config, library)
    return _parameters_to_meta(model).eval()


def _made(class_name: str, config: Mapping[str, object], library: str) -> nn.Module:
    model_class: Any = component_class(library, class_name)
    with bounded():
        model: nn.Module = model_class.from_config(copy.deepcopy(dict(config)))
    return model


def _parameters_to_meta(model: nn.Module) -> nn.Module:
    """Parameters made by other means than `torch.empty` (ones, zeros, randn) go to meta, too; ties are kept."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                key = id(parameter)
                moved.setdefault(key, nn.Parameter(parameter.to("meta"), requires_grad=False))
                module._parameters[name] = moved[key]
    return model


def non_persistent_buffers(model: nn.Module) -> set[str]:
    """fqns of the buffers that no checkpoint holds."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
