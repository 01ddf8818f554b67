"""Making the plan of a run: config + model directory -> what every rank will hold. No weights are read, no rank starts.

Whatever can be wrong with the input is found here, in one process, before a rank exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossdock.offload.codecs.codec import IDENTITY
from crossdock.offload.codecs.lossless import lossless
from crossdock.offload.live.discovery import DiscoveryError, FoundBlock, discover_blocks
from crossdock.offload.live.parts import shared_tensors
from crossdock.offload.memory.layout import BlockLayout
from crossdock.offload.stream.block import Home
from crossdock.parallel.mesh import MeshShape
from crossdock.parallel.tensor import TensorParallelism, TensorSlice
from crossdock.runtime.adapters.lora import Lora, planned_lora
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError, ConfigError
from crossdock.runtime.models.checkpoint import (
    StoredTensor,
    check_components,
    check_tensors,
    component_names,
    read_model_index,
    stored_tensors,
    variant_of,
)
from crossdock.runtime.models.diffusers_api import kept_in_fp32
from crossdock.runtime.models.families import spec_for
from crossdock.runtime.models.foreign_code import refuse_foreign_code
from crossdock.runtime.models.inferred.spec import InferredSpec
from crossdock.runtime.models.latents import vae_scale
from crossdock.runtime.models.meta import non_persistent_buffers
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.models.transformers import (
    build_transformers,
    prefixes,
    transformer_names,
    transformers_in,
)
from crossdock.runtime.plan.checks import (
    check_attention,
    check_codec,
    check_degree,
    check_guidance,
    check_pages,
    transformer_files,
)
from crossdock.runtime.plan.complete_spec import check_inferred, completed
from crossdock.runtime.plan.component_needs import ComponentNeed, component_needs, host_peak_bytes
from crossdock.runtime.plan.device_budget import divide_device
from crossdock.runtime.plan.memory_plan import MemoryPlan, PlannedBlock
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.single_file import single_file


def make_plan(
    config: RunConfig,
    model_dir: Path,
    device: str,
    device_bytes: int | None = None,
    plain: Mapping[str, frozenset[str]] | None = None,
) -> RunPlan:
    """Plan a run.

    Args:
        device_bytes: the memory of the smallest device, where it is known; a budget that is a fraction needs it.
        plain: block -> its tensors that no codec makes smaller, as a load has found.

    Raises:
        CheckpointError: the model directory is incomplete, damaged, or of an unknown family.
        ConfigError: the config does not fit the model.
        LaunchError: an optional package is missing.
    """
    plain = plain or {}
    found = _describe(config, model_dir, device)
    layout = _shard(config, found, model_dir, device)
    return RunPlan(config, layout, _place(config, found, layout, device_bytes, plain), plain)


@dataclass(frozen=True)
class _FoundModel:
    """What the model directory has. `model`: the transformers on meta, which `_shard` leaves with local shapes."""

    spec: ModelSpec
    index: Mapping[str, Any]
    transformers: tuple[str, ...]
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    model: nn.Module
    stored: Mapping[str, StoredTensor]
    blocks: Sequence[FoundBlock]
    variant: str | None
    loras: tuple[Lora, ...]

    @property
    def settings(self) -> list[Mapping[str, Any]]:
        """Of the pipeline, and of the transformers."""
        configs: list[Any] = [transformer.config for transformer in transformers_in(self.model).values()]
        return [self.index, *configs]


def _describe(config: RunConfig, model_dir: Path, device: str) -> _FoundModel:
    """What there is; it is complete, and the config fits it."""
    spec = spec_for(model_dir)
    index = {name: value for name, value in read_model_index(model_dir).items() if name not in spec.unused}
    names = component_names(index)
    encoders, decoders = (tuple(n for n in known if n in names) for known in (spec.encoders, spec.decoders))
    transformers = transformer_names(spec.transformers, names)
    placed, files = (*transformers, *encoders, *decoders), transformer_files(config, transformers)
    variant = variant_of([model_dir / name for name in placed if name not in files and (model_dir / name).is_dir()])
    check_components(model_dir, index, placed, variant, elsewhere=files)
    refuse_foreign_code(model_dir, index)
    model = build_transformers(spec.transformer, model_dir, transformers)
    if isinstance(spec, InferredSpec):
        spec = completed(spec, model_dir, index, model, (*encoders, *decoders))
        check_inferred(spec, config)
    stored = _stored(model, model_dir, transformers, variant, files)
    for transformer in transformers_in(model).values() if spec.tensor_plan.head_count else ():
        check_degree(transformer, spec, config)
        check_attention(transformer, spec, config, device)
    check_guidance(spec, config)
    blocks = transformer_blocks(model, spec)
    loras = _loras(config, spec, model, transformers)
    return _FoundModel(spec, index, transformers, encoders, decoders, model, stored, blocks, variant, loras)


def _loras(config: RunConfig, spec: ModelSpec, model: nn.Module, names: Sequence[str]) -> tuple[Lora, ...]:
    """The adapters, which fit.

    Raises:
        ConfigError: one does not.
    """
    found, whole = [], dict(zip(names, transformers_in(model).items(), strict=True))
    for number, asked in enumerate(config.loras):
        key = f"loras.{number}"
        if asked.component not in whole:
            raise ConfigError(f"found {asked.component}; the checkpoint has {', '.join(names)}", f"{key}.component")
        prefix, transformer = whole[asked.component]
        file = asked.path, asked.scale, f"{key}.path"
        found.append(planned_lora(*file, asked.component, prefix, spec.pipeline, transformer))
    return tuple(found)


def _stored(
    model: nn.Module,
    model_dir: Path,
    names: Sequence[str],
    variant: str | None,
    files: Mapping[str, Path],
) -> dict[str, StoredTensor]:
    """fqn in the model -> where it is stored; the files have all that the model needs.

    Args:
        files: name -> the single file of a transformer, which stands for what is in its folder.

    Raises:
        CheckpointError: they have not, or are damaged.
    """
    found: dict[str, StoredTensor] = {}
    for name, (prefix, transformer) in zip(names, transformers_in(model).items(), strict=True):
        file = files.get(name)
        if file is None:
            stored = stored_tensors(model_dir / name, variant)
        else:
            config: Any = transformer.config
            stored = single_file(file, type(transformer).__name__, config, list(transformer.state_dict()))
        check_tensors(transformer, stored, file or model_dir / name)
        found |= {f"{prefix}{fqn}": tensor for fqn, tensor in stored.items()}
    return found


def _shard(config: RunConfig, found: _FoundModel, model_dir: Path, device: str) -> ModelLayout:
    """How it is cut over the ranks."""
    spec, model, mesh = found.spec, found.model, mesh_shape(config)
    slices = _tensor_slices(model, spec, mesh.tp)
    dtype = _pipeline_dtype([found.stored[fqn] for fqn in model.state_dict()], config)
    asked = spec if isinstance(spec, InferredSpec) else None
    scale = vae_scale(model_dir / spec.decoders[0] / "config.json")
    return ModelLayout(
        model_dir,
        spec,
        mesh,
        device,
        found.transformers,
        found.encoders,
        found.decoders,
        found.stored,
        _dtypes(model, found.stored, dtype),
        slices,
        dtype,
        asked.pixel_multiple if asked and asked.pixel_multiple else spec.patch * scale.pixels,
        asked.frame_multiple if asked and asked.frame_multiple else scale.frames,
        scale.features,
        not any(settings.get(name) == value for name, value in spec.unguided.items() for settings in found.settings),
        found.variant,
        found.loras,
    )


def _place(
    config: RunConfig,
    found: _FoundModel,
    layout: ModelLayout,
    device_bytes: int | None,
    plain: Mapping[str, frozenset[str]],
) -> MemoryPlan:
    """Where it rests, and what passes through slots."""
    offload, model, dtypes = config.offload, found.model, layout.dtypes
    home, shared = _home(config, layout.mesh), shared_tensors(model, found.blocks)
    encodes = _encodes(config, layout.device, home)

    def planned(block: FoundBlock) -> PlannedBlock:
        parts = layout.mesh.hsdp_shard
        laid_out = _layout(block, dtypes, parts, shared)
        codec = lossless(laid_out, parts, plain.get(block.name, frozenset())) if encodes else IDENTITY
        return PlannedBlock(block.name, laid_out, home, None, codec, parts)

    blocks = tuple(map(planned, found.blocks))
    if not plain:
        check_codec(config, blocks)
    placed = {f"{b.name}.{local}" for b in blocks for entry in b.layout.entries for local in entry.names}
    outside = tuple(fqn for fqn in _all_tensors(model) if fqn not in placed)
    others: Sequence[ComponentNeed] = ()
    if offload.layerwise:
        components = found.encoders, found.decoders, layout.pipeline_dtype, offload.depths[0], found.variant
        others = component_needs(layout.model_dir, found.index, *components, encodes=encodes)
    outside_bytes = sum(_nbytes(model, fqn, dtypes) for fqn in outside) + sum(need.resident_bytes for need in others)
    if offload.host == "mmap":
        check_pages(blocks, found.stored, found.loras)
    passes = tuple(
        tuple(index for index, block in enumerate(blocks) if home.streamed and block.name.startswith(prefix))
        for prefix in prefixes(found.transformers)
    )
    residency, budget_bytes, arena_bytes = divide_device(
        offload,
        device_bytes,
        outside_bytes,
        passes=[[blocks[index].layout.slot_bytes for index in pass_] for pass_ in passes],
        travel=[[blocks[index].travel_bytes for index in pass_] for pass_ in passes],
        staging_bytes=max((block.staging_bytes for block in blocks), default=0),
        others=others,
    )
    return MemoryPlan(
        blocks,
        passes,
        residency,
        budget_bytes,
        arena_bytes,
        {need.name: need.turn_bytes for need in others},
        encodes and offload.layerwise,
        host_peak_bytes(others),
        outside,
        outside_bytes,
    ).scheduled(residency, passes)


def _encodes(config: RunConfig, device: str, home: Home) -> bool:
    """What rests is encoded, where that makes it smaller."""
    asked = config.offload.codec
    is_auto = asked == "auto" and device == "cuda" and home.on_host and config.offload.host == "shared"
    return home.streamed and (asked == "lossless" or is_auto)


def mesh_shape(config: RunConfig) -> MeshShape:
    hsdp = config.parallel.hsdp
    return MeshShape(**config.parallel.degrees, hsdp_shard=hsdp.shard if hsdp else 1)


def transformer_blocks(model: nn.Module, spec: ModelSpec) -> list[FoundBlock]:
    """The transformers' blocks, each's in execution order.

    Raises:
        CheckpointError: a stack is missing or empty; the message lists the module lists there are.
    """
    try:
        return [
            replace(block, name=f"{prefix}{block.name}")
            for prefix, transformer in transformers_in(model).items()
            for block in discover_blocks(transformer, spec.block_stacks)
        ]
    except DiscoveryError as error:
        raise CheckpointError(str(error)) from None


def _tensor_slices(model: nn.Module, spec: ModelSpec, degree: int) -> tuple[dict[str, TensorSlice], ...]:
    """Per TP rank; leaves `model` with local shapes, which are the same on every rank."""
    if degree == 1:
        return ({},)
    slices: tuple[dict[str, TensorSlice], ...] = tuple({} for _ in range(degree))
    for prefix, transformer in transformers_in(model).items():
        for rank in range(degree):
            handle = TensorParallelism.apply(transformer, spec.tensor_plan, rank, degree, group=None)
            slices[rank].update({f"{prefix}{fqn}": part for fqn, part in handle.slices.items()})
            if rank < degree - 1:
                handle.remove()
    return slices


def _all_tensors(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)] + [
        name for name, _ in model.named_buffers(remove_duplicate=False)
    ]


def _dtypes(model: nn.Module, stored: Mapping[str, StoredTensor], wanted: torch.dtype) -> dict[str, torch.dtype]:
    """Floating-point tensors as `wanted`, but for what the class keeps in fp32, and what no file has; others as stored:
    what diffusers makes of them.
    """
    keep = frozenset[str]().union(*map(kept_in_fp32, transformers_in(model).values()))
    buffers = non_persistent_buffers(model)
    dtypes: dict[str, torch.dtype] = {}
    for fqn in _all_tensors(model):
        dtype = model.get_buffer(fqn).dtype if fqn in buffers else stored[fqn].dtype
        if dtype.is_floating_point and fqn not in buffers:
            dtype = wanted if keep.isdisjoint(fqn.split(".")) else torch.float32
        dtypes[fqn] = dtype
    return dtypes


def _pipeline_dtype(stored: Sequence[StoredTensor], config: RunConfig) -> torch.dtype:
    """The config's; `auto`: what most elements of the transformers are stored in, of the dtypes that compute."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    elements = Counter[torch.dtype]()
    for tensor in stored:
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
            elements[tensor.dtype] += torch.Size(tensor.shape).numel()
    return elements.most_common(1)[0][0] if elements else torch.float32


def _layout(block: FoundBlock, dtypes: Mapping[str, torch.dtype], shards: int, without: frozenset[int]) -> BlockLayout:
    prefix = f"{block.name}."
    local = {fqn.removeprefix(prefix): dtype for fqn, dtype in dtypes.items() if fqn.startswith(prefix)}
    return BlockLayout.of(block.module, local, multiple=shards, without=without)


def _nbytes(model: nn.Module, fqn: str, dtypes: Mapping[str, torch.dtype]) -> int:
    path, _, leaf = fqn.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    return int(tensor.numel()) * dtypes[fqn].itemsize


def _home(config: RunConfig, mesh: MeshShape) -> Home:
    """Where the bytes of every block rest."""
    sharded = mesh.hsdp_shard > 1
    if config.offload.layerwise:
        return Home.HOST_SHARD if sharded else Home.HOST
    return Home.DEVICE_SHARD if sharded else Home.RESIDENT
