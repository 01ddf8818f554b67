"""Building a transformer without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from crossdock.runtime.checkpoint import read_json
from crossdock.runtime.errors import CheckpointError


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


def build_on_meta(class_name: str, component_dir: Path) -> nn.Module:
    """The diffusers model `class_name` with the config of `component_dir`: parameters on meta, buffers real.

    Raises:
        CheckpointError: the config is missing, names another class, or does not fit the class.
    """
    config = read_json(component_dir / "config.json")
    if config.get("_class_name") != class_name:
        raise CheckpointError(
            f"{component_dir / 'config.json'}: _class_name is {config.get('_class_name')!r}, expected {class_name!r}"
        )
    try:
        return build_config_on_meta(class_name, config)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise CheckpointError(f"{component_dir / 'config.json'}: {class_name} cannot be built: {error}") from None


def build_config_on_meta(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model `class_name` with `config`; raises whatever its constructor does."""
    with _EmptyOnMeta():
        model: nn.Module = getattr(diffusers, class_name).from_config(dict(config))
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
