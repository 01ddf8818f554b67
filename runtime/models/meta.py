"""Building a transformer without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from crossdock.offload.live.discovery import plain_tensors
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import component_class, read_json


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which every layer allocates its weights, goes to the meta device.

    What is computed in a constructor (rotary tables, sigmas) stays real: non-persistent buffers are in no checkpoint,
    so a model built on the meta device as a whole would have lost them.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_on_meta(class_name: str, component_dir: Path, library: str = "diffusers") -> nn.Module:
    """The diffusers model `class_name` with the config of `component_dir`: parameters on meta, buffers real.

    Args:
        library: as in model_index.json.

    Raises:
        CheckpointError: the config is missing, names another class, or does not fit the class.
    """
    config = read_json(component_dir / "config.json")
    if config.get("_class_name") != class_name:
        raise CheckpointError(
            f"{component_dir / 'config.json'}: _class_name is {config.get('_class_name')!r}, expected {class_name!r}"
        )
    if component_class(library, class_name) is None:
        raise CheckpointError(f"{component_dir / 'config.json'}: {library} has no class {class_name}; is it too old?")
    try:
        return build_config_on_meta(class_name, config, library)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(f"{component_dir / 'config.json'}: {class_name} cannot be built: {error}") from None


def build_config_on_meta(class_name: str, config: Mapping[str, Any], library: str = "diffusers") -> nn.Module:
    """The diffusers model `class_name` with `config`; raises whatever its constructor does.

    Where all that a constructor computes is in the checkpoint as well (a table of 150,000 positions takes 9 s), it is
    not computed.
    """
    shape = build_shape(class_name, config, library)
    if shape is not None and len(list(shape.buffers())) and not (non_persistent_buffers(shape) or plain_tensors(shape)):
        return shape
    model_class: Any = component_class(library, class_name)
    with _EmptyOnMeta():
        model: nn.Module = model_class.from_config(dict(config))
    return _parameters_to_meta(model).eval()


def build_shape(class_name: str, config: Mapping[str, Any], library: str = "diffusers") -> nn.Module | None:
    """The same, with everything on meta; None where a constructor needs values."""
    model_class: Any = component_class(library, class_name)
    try:
        with torch.device("meta"):
            model: nn.Module = model_class.from_config(dict(config))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    return _parameters_to_meta(model).eval()


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
