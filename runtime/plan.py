"""The plan of a run: config + model directory -> what every rank will hold. Pure; nothing is started or loaded.

Whatever can be wrong with the input is found here, in one process, before a rank exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from crossdock.offload.block import Home
from crossdock.offload.discovery import DiscoveryError, FoundBlock, discover_blocks
from crossdock.offload.layout import ALIGNMENT, BlockLayout
from crossdock.offload.offloader import shared_tensors
from crossdock.offload.residency import Residency, minimum_bytes
from crossdock.offload.schedule import SlotSchedule
from crossdock.offload.turns import place_sizes, slots_in_turn
from crossdock.parallel.mesh import MeshShape, describe
from crossdock.parallel.tensor import TensorParallelism, TensorSlice
from crossdock.runtime.checkpoint import (
    StoredTensor,
    check_components,
    component_names,
    index_file,
    read_model_index,
)
from crossdock.runtime.components import component_needs, host_peak_bytes
from crossdock.runtime.config import RunConfig
from crossdock.runtime.device_space import divide_device
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.families import SPECS, spec_of_pipeline
from crossdock.runtime.foreign_code import refuse_foreign_code
from crossdock.runtime.meta_model import non_persistent_buffers
from crossdock.runtime.plan_checks import check_attention, check_degree, check_guidance, check_pages
from crossdock.runtime.reports import ScheduleReport
from crossdock.runtime.specs import ModelSpec
from crossdock.runtime.streamed_model import (
    build_transformers,
    prefixes,
    stored_of,
    transformer_names,
    transformers_in,
)
from crossdock.runtime.vae_scale import vae_scale


@dataclass(frozen=True)
class PlannedBlock:
    """One transformer block: `name` is its path in the model; `slot` is None where it stays on the device."""

    name: str
    layout: BlockLayout
    home: Home
    slot: int | None


@dataclass(frozen=True)
class RunPlan:
    """What every rank will hold; the coordinator compares the ranks' reports with it.

    Attributes:
        device: "cpu" or "cuda".
        transformers: the components that are sharded and streamed, in the order in which the loop uses them.
        blocks: as the model lists them.
        order: indices of the blocks that can be streamed, in the order in which they run, transformer by transformer.
        residency: which places of a transformer's order stay on the device while it runs, and the slots of the others.
        budget_bytes: device memory that the weights may take; None: as little as possible.
        arena_bytes: device memory that the transformer's blocks, the text encoder and the VAE use in turn; None: they
            do not take turns.
        turn_bytes: component -> how much of the arena, from its start, it uses in its turn.
        encoders, decoders: the components that encode prompts and that make pictures of latents.
        component_host_bytes: host memory that the components that take turns need at once, on the rank that runs them.
        outside: fqns of all parameters and buffers outside the blocks; resident on the device.
        outside_bytes: of these, and of what never leaves the device of the other components.
        stored: the transformers' tensors in the checkpoint.
        dtypes: fqn -> dtype in which a tensor is held.
        slices: per TP rank, fqn -> the part it holds; a tensor that is missing here is replicated.
        pipeline_dtype: dtype of the other components.
        pixel_multiple: picture sizes are multiples of this.
        frame_multiple: videos have a multiple of this, and one more, frames.
        decoder_features: features that the decoder has of each pixel, at least.
    """

    config: RunConfig
    model_dir: Path
    spec: ModelSpec
    mesh: MeshShape
    device: str
    transformers: tuple[str, ...]
    blocks: tuple[PlannedBlock, ...]
    order: tuple[int, ...]
    residency: Residency
    budget_bytes: int | None
    arena_bytes: int | None
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    turn_bytes: Mapping[str, int]
    component_host_bytes: int
    outside: tuple[str, ...]
    outside_bytes: int
    stored: Mapping[str, StoredTensor]
    dtypes: Mapping[str, torch.dtype]
    slices: tuple[Mapping[str, TensorSlice], ...]
    pipeline_dtype: torch.dtype
    pixel_multiple: int
    frame_multiple: int
    decoder_features: int

    @cached_property
    def _outside(self) -> frozenset[str]:
        return frozenset(self.outside)

    @property
    def layout_name(self) -> str:
        """`layerwise, ulysses 2 x ring 2`."""
        return ("layerwise, " if self.config.offload.layerwise else "") + describe(self.mesh)

    @cached_property
    def rings(self) -> tuple[tuple[int, ...], ...]:
        """`order` of each transformer: the others do not run in its pass."""
        return _rings([block.name for block in self.blocks], self.order, self.transformers)

    def sizes_of(self, indices: Sequence[int]) -> list[int]:
        """Bytes of these blocks."""
        return [self.blocks[index].layout.nbytes for index in indices]

    @property
    def schedule(self) -> SlotSchedule:
        """Of `streamed`, transformer after transformer."""
        slots = tuple(block.slot for block in self.streamed if block.slot is not None)
        return SlotSchedule(slots, self.residency.schedule.prefetch)

    @property
    def blocks_budget_bytes(self) -> int | None:
        """What of the budget is left for the blocks."""
        return None if self.budget_bytes is None else self.budget_bytes - self.outside_bytes - ALIGNMENT

    @property
    def least_budget_bytes(self) -> int:
        """No budget can be below it."""
        sizes = place_sizes([self.sizes_of(ring) for ring in self.rings])
        turns = max(self.turn_bytes.values(), default=0)
        return self.outside_bytes + ALIGNMENT + max(minimum_bytes(sizes, self.config.offload.depths), turns)

    def schedule_report(self, verdict: str) -> ScheduleReport:
        """`verdict`: what became of the schedule when the first steps were measured."""
        residency = self.residency
        return ScheduleReport(
            tuple(self.blocks[index].name for index in sorted(self.staying)),
            residency.schedule.prefetch,
            residency.schedule.n_slots,
            self.budget_bytes,
            self.arena_bytes,
            round(residency.step_s * 1e3, 3),
            round(residency.bound_s * 1e3, 3),
            verdict,
        )

    @property
    def resident(self) -> frozenset[int]:
        """Indices of the blocks that can be streamed and have memory of their own: they are brought once and stay."""
        return frozenset(index for index in self.order if self.blocks[index].slot is None)

    @property
    def staying(self) -> frozenset[int]:
        """Indices of the blocks that are brought once and stay while their transformer runs."""
        return frozenset(ring[place] for ring in self.rings for place in self.residency.resident if place < len(ring))

    @cached_property
    def streamed(self) -> tuple[PlannedBlock, ...]:
        """The blocks that pass through slots, in the order in which they run."""
        return tuple(self.blocks[index] for index in self.order if self.blocks[index].slot is not None)

    def rescheduled(self, residency: Residency, order: Sequence[int]) -> RunPlan:
        """The same run with other residents and other slots."""
        rings = _rings([block.name for block in self.blocks], order, self.transformers)
        blocks = _in_slots(self.blocks, residency, rings, self.blocks_budget_bytes)
        return replace(self, blocks=blocks, order=tuple(order), residency=residency)

    @property
    def host_bytes(self) -> int:
        """Host memory for block bytes on one node that holds every slice: each once."""
        return self.mesh.tp * sum(block.layout.nbytes for block in self.blocks if block.home.on_host)

    def owner_of(self, fqn: str) -> PlannedBlock | None:
        """The block that `fqn` belongs to; None outside the blocks."""
        if fqn in self._outside:
            return None
        return next((block for block in self.blocks if fqn.startswith(f"{block.name}.")), None)

    def tensor_at(self, block: str, byte: int) -> str:
        """The full name of the tensor that has byte `byte` of a block, or of the next one; the block's, after all."""
        layout = next((known.layout for known in self.blocks if known.name == block), None)
        entries = sorted(layout.entries, key=lambda entry: entry.offset) if layout is not None else ()
        return next((f"{block}.{e.name}" for e in entries if e.nbytes and byte < e.offset + e.nbytes), block)


def make_plan(config: RunConfig, model_dir: Path, device: str, device_bytes: int | None = None) -> RunPlan:
    """Plan a run.

    Args:
        device_bytes: the memory of the smallest device, where it is known; a budget that is a fraction needs it.

    Raises:
        CheckpointError: the model directory is incomplete, damaged, or of an unknown family.
        ConfigError: the config does not fit the model.
        LaunchError: an optional package is missing.
    """
    spec = spec_for(model_dir)
    index = {name: value for name, value in read_model_index(model_dir).items() if name not in spec.unused}
    names = component_names(index)
    encoders, decoders = (tuple(n for n in known if n in names) for known in (spec.encoders, spec.decoders))
    transformers = transformer_names(spec.transformers, names)
    check_components(model_dir, index, (*transformers, *encoders, *decoders))
    refuse_foreign_code(model_dir, index)
    model = build_transformers(spec.transformer, model_dir, transformers)
    stored = stored_of(model, model_dir, transformers)
    for transformer in transformers_in(model).values():
        check_degree(transformer, spec, config)
        check_attention(transformer, spec, config, device)
    check_guidance(spec, config)

    mesh = mesh_shape(config)
    found = transformer_blocks(model, spec)
    block_names = [block.name for block in found]
    slices = _tensor_slices(model, spec, mesh.tp)
    dtypes = _dtypes(model, stored, config)
    shared = shared_tensors(model, found)
    layouts = [_layout(block, dtypes, mesh.hsdp_shard, shared) for block in found]
    placed = {
        f"{name}.{local}"
        for name, layout in zip(block_names, layouts, strict=True)
        for entry in layout.entries
        for local in entry.names
    }
    outside = tuple(fqn for fqn in _all_tensors(model) if fqn not in placed)
    pipeline_dtype = _pipeline_dtype(stored, config)
    depth = config.offload.depths[0]
    scale = vae_scale(model_dir / spec.decoders[0] / "config.json")
    others = (
        component_needs(model_dir, index, encoders, decoders, pipeline_dtype, depth) if config.offload.layerwise else ()
    )
    outside_bytes = sum(_nbytes(model, fqn, dtypes) for fqn in outside) + sum(need.resident_bytes for need in others)
    if config.offload.host == "mmap":
        check_pages(block_names, layouts, stored)
    home = _home(config, mesh)
    order = tuple(range(len(found))) if home.streamed else ()
    rings = _rings(block_names, order, transformers)
    sizes = [[layouts[index].nbytes for index in ring] for ring in rings]
    space = divide_device(config.offload, device_bytes, outside_bytes, rings=sizes, others=others)
    blocks = [PlannedBlock(name, layout, home, None) for name, layout in zip(block_names, layouts, strict=True)]
    budget = None if space.budget_bytes is None else space.budget_bytes - outside_bytes - ALIGNMENT
    return RunPlan(
        config,
        model_dir,
        spec,
        mesh,
        device,
        transformers,
        _in_slots(blocks, space.residency, rings, budget),
        order,
        space.residency,
        space.budget_bytes,
        space.arena_bytes,
        encoders,
        decoders,
        {need.name: need.turn_bytes for need in others},
        host_peak_bytes(others),
        outside,
        outside_bytes,
        stored,
        dtypes,
        slices,
        pipeline_dtype,
        spec.patch * scale.pixels,
        scale.frames,
        scale.features,
    )


def _rings(names: Sequence[str], order: Sequence[int], transformers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """`order`, transformer by transformer."""
    return tuple(tuple(i for i in order if names[i].startswith(prefix)) for prefix in prefixes(transformers))


def _in_slots(
    blocks: Sequence[PlannedBlock], residency: Residency, rings: Sequence[Sequence[int]], budget_bytes: int | None
) -> tuple[PlannedBlock, ...]:
    """`blocks` in the slots of a residency of their places; where the budget holds all of them, in none."""
    everything = sum(blocks[index].layout.nbytes for ring in rings for index in ring)
    fits = budget_bytes is not None and budget_bytes >= everything
    slots = {} if fits else slots_in_turn(residency, rings)
    return tuple(replace(block, slot=slots.get(index)) for index, block in enumerate(blocks))


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


def spec_for(model_dir: Path) -> ModelSpec:
    """The family of a checkpoint.

    Raises:
        CheckpointError: no such directory, not a diffusers pipeline, or none that crossdock knows.
    """
    pipeline = read_model_index(model_dir)["_class_name"]
    spec = spec_of_pipeline(pipeline)
    if spec is None:
        known = ", ".join(f"{spec.pipeline} ({family})" for family, spec in SPECS.items())
        raise CheckpointError(
            f"{index_file(model_dir)}: unknown model class {str(pipeline)[:100]!r}; crossdock knows {known}"
        )
    return spec


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


def _dtypes(model: nn.Module, stored: Mapping[str, StoredTensor], config: RunConfig) -> dict[str, torch.dtype]:
    """As stored, or the config's dtype for floating-point tensors, but for what the class keeps in fp32."""
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    buffers = non_persistent_buffers(model)
    dtypes: dict[str, torch.dtype] = {}
    for fqn in _all_tensors(model):
        dtype = model.get_buffer(fqn).dtype if fqn in buffers else stored[fqn].dtype
        if config.dtype != "auto" and dtype.is_floating_point and fqn not in buffers:
            kept = any(part in keep for part in fqn.split("."))
            dtype = torch.float32 if kept else getattr(torch, config.dtype)
        dtypes[fqn] = dtype
    return dtypes


def _pipeline_dtype(stored: Mapping[str, StoredTensor], config: RunConfig) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    elements = Counter[torch.dtype]()
    for tensor in stored.values():
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
