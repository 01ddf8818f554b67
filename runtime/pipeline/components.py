"""The pipeline's other components: text encoders and decoders (VAEs), and how they get on and off the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from crossdock.offload.live.offloader import LayerwiseOffloader
from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine
from crossdock.offload.memory.host_memory import HostMemoryError
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.runtime.errors import LaunchError
from crossdock.runtime.plan.component_needs import component_blocks, vae_parts

CACHE_LINE = 64


class Component(Protocol):
    def present(self) -> AbstractContextManager[None]:
        """The component's turn on the device."""

    @property
    def turn_bytes(self) -> int:
        """What it uses of the arena in its turn."""

    @property
    def stream(self) -> BlockStream | None:
        """What brings it block by block; None: it moves as one."""

    def discard(self) -> None:
        """Give it up, and its memory."""


class WholeComponent:
    """A component that is moved in one piece: it stays on the device, or comes and goes."""

    stream = None

    def __init__(self, module: nn.Module, device: torch.device, stays: bool) -> None:
        self._module = module
        self._device = device
        self._leaves = not stays and device.type != "cpu"
        if stays:
            module.to(device)
        if device.type == "cpu":
            _align(module)

    @contextmanager
    def present(self) -> Iterator[None]:
        self._module.to(self._device)
        try:
            yield
        finally:
            if self._leaves:
                self._module.to("cpu")

    @property
    def turn_bytes(self) -> int:
        return 0

    def discard(self) -> None:
        """Nothing of it is ours."""


def _align(module: nn.Module) -> None:
    """Files are read to any address, and a kernel may round by where a vector begins: begin as in an arena."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % CACHE_LINE:
            tensor.data = tensor.data.clone()


def place_component(
    name: str,
    module: nn.Module,
    device: torch.device,
    engine: CopyEngine,
    arena: Arena | None,
    prefetch: int,
    decodes: bool,
    encodes: bool = False,
) -> Component:
    """Without an arena what decodes stays on the device and a text encoder comes and goes; else they take turns in it.

    Args:
        decodes: it is a decoder.
        encodes: a text encoder rests encoded.

    Raises:
        LaunchError: host memory has become too little since it was looked at, before loading.
    """
    if arena is None:
        return WholeComponent(module, device, stays=decodes)
    options: dict[str, Any] = {"prefetch": prefetch, "outside": "held", "codec": "lossless" if encodes else "none"}
    parts = vae_parts(module) if decodes else ()
    if parts:
        options = {"prefetch": 0, "outside": "resident"}
    stacks = parts or (None if component_blocks(module) else ())
    try:
        return LayerwiseOffloader(module, device, arena=arena, engine=engine, stacks=stacks, **options)
    except HostMemoryError as error:
        raise LaunchError(f"{name}: {error}", "offload.host") from None
