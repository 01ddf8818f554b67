"""The plan of a run: config + model directory -> what every rank will hold. Pure; nothing is started or loaded.

Whatever can be wrong with the input is found here, in one process, before a rank exists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossdock.offload.block_stream import Home
from crossdock.offload.layout import BlockLayout
from crossdock.offload.schedule import SlotSchedule, assign_slots, choose_resident, minimum_bytes
from crossdock.parallel.mesh import MeshShape, describe
from crossdock.parallel.tensor import TensorParallelism, TensorSlice, tensor_slices
from crossdock.parallel.xfuser_attention import xfuser_installed, xfuser_limits
from crossdock.runtime.checkpoint import StoredTensor, check_components, read_json, read_model_index, stored_tensors
from crossdock.runtime.config import RunConfig
from crossdock.runtime.errors import CheckpointError, ConfigError, LaunchError, RequestError
from crossdock.runtime.meta_model import build_on_meta, non_persistent_buffers
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.specs import SPECS, ModelSpec, spec_of_pipeline

TRANSFORMER = "transformer"
"""The pipeline component that is sharded and streamed."""


@dataclass(frozen=True)
class PlannedBlock:
    """One transformer block: `name` is its path in the model; `slot` is None for a resident one."""

    name: str
    layout: BlockLayout
    home: Home
    slot: int | None


@dataclass(frozen=True)
class RunPlan:
    """What every rank will hold; the coordinator compares the ranks' reports with it.

    Attributes:
        device: "cpu" or "cuda".
        blocks: in the order in which they are expected to run.
        outside: fqns of all parameters and buffers outside the blocks; resident on the device.
        stored: the transformer's tensors in the checkpoint.
        dtypes: fqn -> dtype in which a tensor is held.
        slices: per TP rank, fqn -> the part it holds; a tensor that is missing here is replicated.
        pipeline_dtype: dtype of the other components.
        pixel_multiple: picture sizes are multiples of this.
    """

    config: RunConfig
    model_dir: Path
    spec: ModelSpec
    mesh: MeshShape
    device: str
    blocks: tuple[PlannedBlock, ...]
    schedule: SlotSchedule
    outside: tuple[str, ...]
    stored: Mapping[str, StoredTensor]
    dtypes: Mapping[str, torch.dtype]
    slices: tuple[Mapping[str, TensorSlice], ...]
    pipeline_dtype: torch.dtype
    pixel_multiple: int

    @property
    def layout_name(self) -> str:
        """`layerwise, ulysses 2 x ring 2`."""
        return ("layerwise, " if self.config.offload.layerwise else "") + describe(self.mesh)

    @cached_property
    def streamed(self) -> tuple[PlannedBlock, ...]:
        return tuple(block for block in self.blocks if block.home.streamed)

    @property
    def host_bytes(self) -> int:
        """Host memory for block bytes on one node that holds every slice: each once."""
        return self.mesh.tp * sum(block.layout.nbytes for block in self.blocks if block.home.on_host)

    def owner_of(self, fqn: str) -> PlannedBlock | None:
        """The block that `fqn` belongs to; None outside the blocks."""
        return next((block for block in self.blocks if fqn.startswith(f"{block.name}.")), None)


def make_plan(config: RunConfig, model_dir: Path, device: str) -> RunPlan:
    """Plan a run.

    Raises:
        CheckpointError: the model directory is incomplete, damaged, or of an unknown family.
        ConfigError: the config does not fit the model.
        LaunchError: an optional package is missing.
    """
    index = read_model_index(model_dir)
    spec = _spec_for(index["_class_name"], model_dir)
    check_components(model_dir, index)
    folder = model_dir / TRANSFORMER
    model = build_on_meta(spec.transformer, folder)
    stored = stored_tensors(folder)
    _check_tensors(model, stored, folder)
    _check_degree(model, spec, config)
    _check_attention(model, spec, config, device)

    mesh = mesh_shape(config)
    names = block_names(model, spec)
    slices = _tensor_slices(model, spec, mesh.tp)
    dtypes = _dtypes(model, stored, config)
    layouts = [_layout(model, name, dtypes, mesh.hsdp_shard) for name in names]
    outside = tuple(fqn for fqn in _all_tensors(model) if not fqn.startswith(tuple(f"{name}." for name in names)))
    outside_bytes = sum(_nbytes(model, fqn, dtypes) for fqn in outside)
    homes = _homes(config, mesh, [layout.nbytes for layout in layouts], outside_bytes)
    schedule = assign_slots(sum(home.streamed for home in homes), config.offload.prefetch)
    slots = iter(schedule.slots)
    blocks = tuple(
        PlannedBlock(name, layout, home, next(slots) if home.streamed else None)
        for name, layout, home in zip(names, layouts, homes, strict=True)
    )
    return RunPlan(
        config,
        model_dir,
        spec,
        mesh,
        device,
        blocks,
        schedule,
        outside,
        stored,
        dtypes,
        slices,
        _pipeline_dtype(stored, config),
        _pixel_multiple(model_dir),
    )


def check_request(plan: RunPlan, request: GenerateRequest) -> None:
    """
    Raises:
        RequestError: no pipeline, or not this one, can do what is asked for.
    """
    request.validate()
    for name in ("height", "width"):
        pixels, multiple = getattr(request, name), plan.pixel_multiple
        if pixels % multiple:
            below = max(pixels // multiple, 1) * multiple
            raise RequestError(
                f"{name}: found {pixels}; allowed for {plan.spec.family}: a multiple of {multiple}, such as {below}"
            )


def mesh_shape(config: RunConfig) -> MeshShape:
    hsdp = config.parallel.hsdp
    return MeshShape(**config.parallel.degrees, hsdp_shard=hsdp.shard if hsdp else 1)


def block_names(model: nn.Module, spec: ModelSpec) -> list[str]:
    """Paths of the transformer blocks in execution order.

    Raises:
        CheckpointError: a stack is missing (the message lists the module lists there are) or empty.
    """
    names: list[str] = []
    for stack in spec.block_stacks:
        try:
            modules = model.get_submodule(stack)
        except AttributeError:
            there = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
            raise CheckpointError(
                f"{type(model).__name__} has no block stack {stack!r}; its module lists: {', '.join(there)}"
            ) from None
        if not list(modules.children()):
            raise CheckpointError(f"the block stack {stack!r} of {type(model).__name__} is empty")
        names += [f"{stack}.{name}" for name, _ in modules.named_children()]
    return names


def _spec_for(pipeline: str, model_dir: Path) -> ModelSpec:
    spec = spec_of_pipeline(pipeline)
    if spec is None:
        known = ", ".join(f"{spec.pipeline} ({family})" for family, spec in SPECS.items())
        raise CheckpointError(
            f"{model_dir / 'model_index.json'}: unknown model class {pipeline!r}; crossdock knows {known}"
        )
    return spec


def _check_tensors(model: nn.Module, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    expected = {fqn: tuple(tensor.shape) for fqn, tensor in model.state_dict().items()}
    if missing := [fqn for fqn in expected if fqn not in stored]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the tensor {missing[0]} is missing{more}; is the download complete?")
    for fqn, shape in expected.items():
        if stored[fqn].shape != shape:
            raise CheckpointError(
                f"{stored[fqn].file}: {fqn} has shape {list(stored[fqn].shape)}, but config.json asks for {list(shape)}"
            )


def _check_degree(model: nn.Module, spec: ModelSpec, config: RunConfig) -> None:
    """The TP degree divides the heads and every part of every planned linear."""
    degree, heads = config.parallel.tp_degree, _heads(model, spec)
    reasons = {d: _why_not(model, spec, d) for d in {degree, *(d for d in range(1, heads + 1) if heads % d == 0)}}
    if reasons[degree] is not None:
        allowed = ", ".join(str(d) for d in sorted(reasons) if reasons[d] is None)
        raise ConfigError(f"found {degree}: {reasons[degree]}; allowed: {allowed}", "parallel.tp_degree")


def _why_not(model: nn.Module, spec: ModelSpec, degree: int) -> str | None:
    if _heads(model, spec) % degree:
        return f"it does not divide the {_heads(model, spec)} attention heads of {spec.transformer}"
    try:
        tensor_slices(model, spec.tensor_plan, 0, degree)
    except ValueError as error:
        return str(error)
    return None


def _check_attention(model: nn.Module, spec: ModelSpec, config: RunConfig, device: str) -> None:
    parallel = config.parallel
    if parallel.attention != "xfuser":
        return
    reason = xfuser_limits(device, parallel.tp_degree, _heads(model, spec), parallel.ulysses_degree)
    if reason is not None:
        raise ConfigError(f"xfuser cannot work here: {reason}; use attention: native", "parallel.attention")
    if not xfuser_installed():
        raise LaunchError("xfuser is not installed; run: pip install 'crossdock[xdit]'", "parallel.attention")


def _heads(model: nn.Module, spec: ModelSpec) -> int:
    config: Any = model.config
    return int(config[spec.tensor_plan.head_count])


def _tensor_slices(model: nn.Module, spec: ModelSpec, degree: int) -> tuple[dict[str, TensorSlice], ...]:
    """Per TP rank; leaves `model` with local shapes, which are the same on every rank."""
    if degree == 1:
        return ({},)
    slices = []
    for rank in range(degree):
        handle = TensorParallelism.apply(model, spec.tensor_plan, rank, degree, group=None)
        slices.append(dict(handle.slices))
        if rank < degree - 1:
            handle.remove()
    return tuple(slices)


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


def _pixel_multiple(model_dir: Path) -> int:
    """Pixels per latent, times the 2x2 patches of the transformer."""
    config = read_json(model_dir / "vae" / "config.json")
    halvings = max(len(config.get("block_out_channels", ())) - 1, 0)
    return 2 << halvings


def _layout(model: nn.Module, name: str, dtypes: Mapping[str, torch.dtype], shards: int) -> BlockLayout:
    prefix = f"{name}."
    local = {fqn.removeprefix(prefix): dtype for fqn, dtype in dtypes.items() if fqn.startswith(prefix)}
    return BlockLayout.of(model.get_submodule(name), local, multiple=shards)


def _nbytes(model: nn.Module, fqn: str, dtypes: Mapping[str, torch.dtype]) -> int:
    path, _, leaf = fqn.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    return int(tensor.numel()) * dtypes[fqn].itemsize


def _homes(config: RunConfig, mesh: MeshShape, sizes: Sequence[int], outside_bytes: int) -> list[Home]:
    offload, sharded = config.offload, mesh.hsdp_shard > 1
    if not offload.layerwise:
        return [Home.DEVICE_SHARD if sharded else Home.RESIDENT] * len(sizes)
    streamed = Home.HOST_SHARD if sharded else Home.HOST
    budget = offload.device_budget_bytes
    if budget is None:
        return [streamed] * len(sizes)
    try:
        stay = set(choose_resident(sizes, offload.prefetch, budget - outside_bytes))
    except ValueError:
        minimum = outside_bytes + minimum_bytes(sizes, offload.prefetch)
        raise ConfigError(
            f'found "{offload.device_budget}" ({budget} bytes); this model needs at least '
            f"{minimum} bytes ({minimum / 2**20:.1f}MiB) at prefetch {offload.prefetch}",
            "offload.device_budget",
        ) from None
    return [Home.RESIDENT if i in stay else streamed for i in range(len(sizes))]
