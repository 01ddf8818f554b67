"""The pipeline's other components: the text encoder and the VAE, and how they get on and off the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from crossdock.offload.arena import Arena
from crossdock.offload.copy_engine import CopyEngine
from crossdock.offload.discovery import DiscoveryError, FoundBlock, discover_blocks
from crossdock.offload.host_memory import HostMemoryError
from crossdock.offload.layout import ALIGNMENT, BlockLayout
from crossdock.offload.offloader import LayerwiseOffloader, component_layouts
from crossdock.offload.residency import minimum_bytes
from crossdock.runtime.errors import CheckpointError, LaunchError
from crossdock.runtime.meta_model import build_on_meta

TEXT_ENCODER = "text_encoder"
VAE = "vae"
VAE_STACKS = ("decoder", "encoder")
"""Each is one block. The rest of a VAE is small, and pipelines read it outside of decoding (statistics of latents)."""


class Component(Protocol):
    def present(self) -> AbstractContextManager[None]:
        """The component's turn on the device."""

    @property
    def turn_bytes(self) -> int:
        """What it uses of the arena in its turn."""

    def discard(self) -> None:
        """Give it up, and its memory."""


class WholeComponent:
    """A component that is moved in one piece: it stays on the device, or comes and goes."""

    def __init__(self, module: nn.Module, device: torch.device, stays: bool) -> None:
        self._module = module
        self._device = device
        self._leaves = not stays and device.type != "cpu"
        if stays:
            module.to(device)

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


def place_component(
    name: str, module: nn.Module, device: torch.device, engine: CopyEngine, arena: Arena | None, prefetch: int
) -> Component:
    """Without an arena the VAE stays on the device and the text encoder comes and goes; else they take turns in it.

    Raises:
        LaunchError: host memory has become too little since it was looked at, before loading.
    """
    if arena is None:
        return WholeComponent(module, device, stays=name == VAE)
    options: dict[str, Any] = {"prefetch": 0, "stacks": VAE_STACKS}
    if name != VAE:
        options = {"prefetch": prefetch, "stacks": None if encoder_blocks(module) else (), "outside": "held"}
    try:
        return LayerwiseOffloader(module, device, arena=arena, engine=engine, **options)
    except HostMemoryError as error:
        raise LaunchError(f"{name}: {error}", "offload.host") from None


@dataclass(frozen=True)
class ComponentNeed:
    """What a component needs on the rank that runs it.

    Attributes:
        turn_bytes: of the device, at least during its turn.
        resident_bytes: of the device; what never leaves it.
        host_bytes: of host memory, where the rest of it rests.
        loaded_bytes: of host memory, while it was loaded and that copy is being filled.
    """

    name: str
    turn_bytes: int
    resident_bytes: int
    host_bytes: int
    loaded_bytes: int


def host_peak_bytes(needs: Sequence[ComponentNeed]) -> int:
    """Host memory that the components need at once. All are loaded, then each in turn is copied and let go of."""
    peak, loaded, copied = 0, sum(need.loaded_bytes for need in needs), 0
    for need in needs:
        copied += need.host_bytes
        peak = max(peak, loaded + copied)
        loaded -= need.loaded_bytes
    return peak


def component_needs(
    model_dir: Path, index: Mapping[str, Any], dtype: torch.dtype, prefetch: int
) -> tuple[ComponentNeed, ...]:
    """What the text encoder and the VAE need on the rank that runs them, in the order in which they are placed.
    Nothing is loaded.

    Raises:
        CheckpointError: a component's config does not fit its class.
    """
    encoder = _text_encoder_on_meta(model_dir / TEXT_ENCODER, index[TEXT_ENCODER][1]).to(dtype)
    vae = build_on_meta(index[VAE][1], model_dir / VAE).to(dtype)
    layouts, held = component_layouts(encoder, encoder_blocks(encoder))
    parts, rest = component_layouts(vae, discover_blocks(vae, VAE_STACKS))
    streamed = minimum_bytes([layout.nbytes for layout in layouts], (prefetch,))
    return (
        _need(TEXT_ENCODER, held.nbytes + streamed, 0, [*layouts, held], encoder),
        _need(VAE, max(layout.nbytes for layout in parts), rest.nbytes + ALIGNMENT, parts, vae),
    )


def _need(
    name: str, turn_bytes: int, resident_bytes: int, on_host: Sequence[BlockLayout], module: nn.Module
) -> ComponentNeed:
    loaded = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return ComponentNeed(name, turn_bytes, resident_bytes, sum(layout.nbytes for layout in on_host), loaded)


def encoder_blocks(encoder: nn.Module) -> list[FoundBlock]:
    """The blocks of a text encoder; none where nothing looks like one: then it moves as one piece."""
    try:
        return discover_blocks(encoder)
    except DiscoveryError:
        return []


def _text_encoder_on_meta(folder: Path, class_name: str) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, class_name)(config)
    except (AttributeError, OSError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {class_name} cannot be built: {error}") from None
    return model.eval()
