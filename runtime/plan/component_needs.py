"""What the pipeline's other components, text encoders and decoders (VAEs), need of a device and of host memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from crossdock.offload.codecs.codec import staging_bytes
from crossdock.offload.live.discovery import DiscoveryError, FoundBlock, discover_blocks
from crossdock.offload.live.parts import codec_of, component_layouts, held_bytes
from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.schedule.slots import device_bytes
from crossdock.runtime.models.build_limits import bounded
from crossdock.runtime.models.checkpoint import StoredTensor, open_weights, read_json, stored_tensors
from crossdock.runtime.models.diffusers_api import kept_in_fp32
from crossdock.runtime.models.foreign_code import unasked
from crossdock.runtime.models.meta import build_on_meta, described, non_persistent_buffers

_ROWS = 4096
"""Of two stored tensors, compared at once."""
VAE_PARTS = ("decoder", "encoder")
"""Each is one block. The rest of a VAE is small, and pipelines read it outside of decoding (statistics of latents)."""


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
    variant: str | None = None,
    encodes: bool = False,
) -> tuple[ComponentNeed, ...]:
    """What the components need on the rank that runs them, in the order in which they are placed. Nothing is loaded.

    Args:
        encodes: the blocks of text encoders rest encoded, where that makes them smaller.

    Raises:
        CheckpointError: a component's config does not fit its class.
    """
    needs = []
    for name in (*encoders, *decoders):
        module = component_on_meta(model_dir / name, index[name][0], index[name][1], dtype)
        _untie(module, stored_tensors(model_dir / name, variant))
        parts = vae_parts(module) if name in decoders else ()
        found = discover_blocks(module, parts) if parts else component_blocks(module)
        layouts, rest = component_layouts(module, found)
        sizes = [layout.slot_bytes for layout in layouts]
        if parts:
            on_host = sum(held_bytes(layout) for layout in layouts)
            needs.append(_need(name, max(sizes), rest.slot_bytes + ALIGNMENT, on_host, module))
        else:
            streamed = device_bytes(sizes, tuple(range(len(sizes))), prefetch)  # without a budget, all of it is
            codecs = [codec_of(layout, encodes) for layout in layouts]
            staging = max(map(staging_bytes, codecs, layouts), default=0)
            on_host = held_bytes(rest) + sum(map(held_bytes, layouts, codecs))
            needs.append(_need(name, rest.slot_bytes + streamed + staging, 0, on_host, module))
    return tuple(needs)


def _need(name: str, turn_bytes: int, resident_bytes: int, host_bytes: int, module: nn.Module) -> ComponentNeed:
    loaded = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return ComponentNeed(name, turn_bytes, resident_bytes, host_bytes, loaded)


def component_blocks(module: nn.Module) -> list[FoundBlock]:
    """The blocks of a text encoder; none where nothing looks like one: then it moves as one piece."""
    try:
        return discover_blocks(module)
    except DiscoveryError:
        return []


def component_on_meta(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The module as it will be loaded, in `dtype` but for what its class keeps in fp32."""
    if library != "transformers":
        return _cast(build_on_meta(class_name, folder, library), library, dtype)
    path = folder / "config.json"
    config = read_json(path)

    def build(changed: Mapping[str, object]) -> nn.Module:
        return _text_model(class_name, transformers.AutoConfig.for_model(**copy.deepcopy(dict(changed))))

    with described(path, class_name, config, build), unasked():
        loaded = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return _cast(_text_model(class_name, loaded), library, dtype)


def _text_model(class_name: str, config: object) -> nn.Module:
    with torch.device("meta"), bounded():
        module: nn.Module = getattr(transformers, class_name)(config)
    return module


def _cast(module: nn.Module, library: str, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained` does: some classes keep some parts in fp32, transformers' only where fp16 is asked for.

    diffusers then leaves what is not in the checkpoint as it is, too.
    """
    kept = kept_in_fp32(module, strictly=True)
    if library != "transformers" or dtype == torch.float16:
        kept |= kept_in_fp32(module)
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


def _untie(module: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Where the files have both of a pair that the config ties, and they differ, `module` (on meta) has two: what
    transformers makes of them when it loads.
    """
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    for target, source in tied.items():
        one, other = _stored_as(target, stored), _stored_as(source, stored)
        if one is not None and other is not None and not _equal(one, other):
            path, _, leaf = target.rpartition(".")
            parent = module.get_submodule(path)
            setattr(parent, leaf, nn.Parameter(torch.empty_like(getattr(parent, leaf))))


def _stored_as(fqn: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """In files of older models, what comes before the module's own name may be another."""
    ends = [name for name in stored if name.split(".")[-2:] == fqn.split(".")[-2:]]
    return stored.get(fqn) or (stored[ends[0]] if len(ends) == 1 else None)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    left, right = (open_weights(each.file).get_slice(each.name) for each in (one, other))
    return all(torch.equal(left[n : n + _ROWS], right[n : n + _ROWS]) for n in range(0, one.shape[0], _ROWS))
