"""One component at a time: which of a pipeline's components is on the device while it encodes or decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.runtime.pipeline.components import Component


class ActiveComponent:
    """Whoever is called comes onto the device, and stays until another one is called or the turn ends.

    Attributes:
        on_use: gets the name of a component that was used, before it leaves.
    """

    def __init__(self, components: Mapping[str, Component], device: torch.device) -> None:
        self._components = components
        self._device = device
        self.on_use: Callable[[str], None] = lambda name: None
        self._name: str | None = None
        self._present = ExitStack()

    def enter(self, name: str) -> None:
        """`name` is about to run."""
        if name != self._name:
            self.clear()
            self._present.enter_context(self._components[name].present())
            self._name = name

    def clear(self) -> None:
        """The turn is over."""
        used, self._name = self._name, None
        if used is not None:
            self.on_use(used)
        self._present.close()

    def __enter__(self) -> None:
        """A turn, which ends with the block."""

    def __exit__(self, *_: object) -> None:
        self.clear()

    def watch(self, name: str, module: nn.Module) -> None:
        """Every call of `module`, or of a part of it, is one of `name`. What it is given is put where it runs."""

        def come(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
            self.enter(name)
            return tuple(map(self._here, args)), {key: self._here(value) for key, value in kwargs.items()}

        for part in (module, *module.children()):  # some pipelines call a language model without its head
            part.register_forward_pre_hook(come, prepend=True, with_kwargs=True)

    def wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Every call of what this returns is one of `method`, and of `name`."""

        def call(*args: object, **kwargs: object) -> Any:
            self.enter(name)
            return method(*map(self._here, args), **{key: self._here(value) for key, value in kwargs.items()})

        return call

    def _here(self, value: object) -> Any:
        return value.to(self._device) if isinstance(value, Tensor) else value
