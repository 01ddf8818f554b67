"""The pipeline's other components: text encoders and decoders (VAEs), and how they get on and off the device."""

from __future__ import annotations

import copy
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
from crossdock.offload.schedule import device_bytes
from crossdock.runtime.build_limits import bounded
from crossdock.runtime.checkpoint import read_json
from crossdock.runtime.errors import LaunchError
from crossdock.runtime.foreign_code import unasked
from crossdock.runtime.meta_model import build_on_meta, described, non_persistent_buffers

CACHE_LINE = 64
VAE_PARTS = ("decoder", "encoder")
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
) -> Component:
    """Without an arena what decodes stays on the device and a text encoder comes and goes; else they take turns in it.

    Raises:
        LaunchError: host memory has become too little since it was looked at, before loading.
    """
    if arena is None:
        return WholeComponent(module, device, stays=decodes)
    options: dict[str, Any] = {"prefetch": prefetch, "outside": "held"}
    parts = vae_parts(module) if decodes else ()
    if parts:
        options = {"prefetch": 0, "outside": "resident"}
    stacks = parts or (None if component_blocks(module) else ())
    try:
        return LayerwiseOffloader(module, device, arena=arena, engine=engine, stacks=stacks, **options)
    except HostMemoryError as error:
        raise LaunchError(f"{name}: {error}", "offload.host") from None


def vae_parts(module: nn.Module) -> tuple[str, ...]:
    """The parts of a VAE that are one block each; none: it is no VAE."""
    return tuple(name for name in VAE_PARTS if hasattr(module, name))


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
    model_dir: Path,
    index: Mapping[str, Any],
    encoders: Sequence[str],
    decoders: Sequence[str],
    dtype: torch.dtype,
    prefetch: int,
) -> tuple[ComponentNeed, ...]:
    """What the components need on the rank that runs them, in the order in which they are placed. Nothing is loaded.

    Raises:
        CheckpointError: a component's config does not fit its class.
    """
    needs = []
    for name in (*encoders, *decoders):
        module = _on_meta(model_dir / name, index[name][0], index[name][1], dtype)
        parts = vae_parts(module) if name in decoders else ()
        found = discover_blocks(module, parts) if parts else component_blocks(module)
        layouts, rest = component_layouts(module, found)
        sizes = [layout.nbytes for layout in layouts]
        if parts:
            needs.append(_need(name, max(sizes), rest.nbytes + ALIGNMENT, layouts, module))
        else:
            streamed = device_bytes(sizes, tuple(range(len(sizes))), prefetch)  # without a budget, all of it is
            needs.append(_need(name, rest.nbytes + streamed, 0, [*layouts, rest], module))
    return tuple(needs)


def _need(
    name: str, turn_bytes: int, resident_bytes: int, on_host: Sequence[BlockLayout], module: nn.Module
) -> ComponentNeed:
    loaded = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return ComponentNeed(name, turn_bytes, resident_bytes, sum(layout.nbytes for layout in on_host), loaded)


def component_blocks(module: nn.Module) -> list[FoundBlock]:
    """The blocks of a text encoder; none where nothing looks like one: then it moves as one piece."""
    try:
        return discover_blocks(module)
    except DiscoveryError:
        return []


def _on_meta(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The module as it will be loaded, in `dtype` but for what its class keeps in fp32."""
    if library != "transformers":
        return _cast(build_on_meta(class_name, folder, library), library, dtype)
    path = folder / "config.json"
    config = read_json(path)

    def build(changed: Mapping[str, Any]) -> nn.Module:
        return _text_model(class_name, transformers.AutoConfig.for_model(**copy.deepcopy(dict(changed))))

    with described(path, class_name, config, build), unasked():
        loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _cast(_text_model(class_name, loaded), library, dtype)


def _text_model(class_name: str, config: Any) -> nn.Module:
    with torch.device("meta"), bounded():
        module: nn.Module = getattr(transformers, class_name)(config)
    return module


def _cast(module: nn.Module, library: str, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained` does: some classes keep some parts in fp32, transformers' only where fp16 is asked for.

    diffusers then leaves what is not in the checkpoint as it is, too.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if library != "transformers" or dtype == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    made = non_persistent_buffers(module) if kept and library != "transformers" else ()
    tables = {name: module.get_buffer(name) for name in made}
    nn.Module.to(module, dtype)
    for name, table in tables.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, table)
    for name, child in module.named_modules():
        if name.rpartition(".")[2] in kept:
            nn.Module.to(child, torch.float32)
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2] in kept:
            parameter.data = parameter.data.float()
    return module.eval()
