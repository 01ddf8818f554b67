"""Other mechanisms that move, cast or shard a model's weights: two of them must not own the same bytes.

A model that one of them holds still gives right images when it is streamed as well, and no memory is saved: FSDP
gathers from a shard of its own, an offload hook puts its own copies in place of the slots. So they are refused. Neither
accelerate nor diffusers is imported: their hooks are told by the attributes that they leave on a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard

from crossdock.offload.live.resting import ATTACHED, is_resting
from crossdock.offload.memory.layout import local_part

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_LISTED = 3
"""Places that a refusal names for each mechanism."""

_MOVES = "which moves its weights itself"
_STREAMED = "streamed by another LayerwiseOffloader"
_REMOVED = "use that one, or call its remove() first"
_GATHERS = "which gathers its weights from shards of its own and would never read what is streamed"
_UNWRAPPED = (
    "give a model that was not wrapped by fully_shard or FSDP: streaming needs none; to shard weights over ranks as "
    "well, run it with parallel.hsdp of a crossdock configuration"
)
_DIFFUSERS_MOVERS = {
    "group_offloading": _MOVES,
    "lazy_prefetch_group_offloading": _MOVES,
    "layer_execution_tracker": _MOVES,
    "layerwise_casting": "which casts its weights around each call and cannot be taken off",
}
"""diffusers' hooks that touch weights; all others (caches, layer skipping, context parallelism) do not."""


class ForeignMechanismError(ValueError, TypeError):
    """Something else moves, shards or quantizes the weights; one line: where, what, why not, what to do.

    A TypeError, too, because the type of a weight may be what is wrong.
    """


@dataclass(frozen=True)
class ForeignMechanism:
    """Something that crossdock did not put on a model.

    Attributes:
        path: of the module or the tensor; "" is the model itself.
        what: a noun, such as "an accelerate hook (CpuOffload)".
        reason: why what it has hold of cannot be streamed; "" where it can.
        remedy: what the user does about it.
    """

    path: str
    what: str
    reason: str = ""
    remedy: str = ""


def foreign_mechanisms(model: nn.Module, device: torch.device | None = None) -> Iterator[ForeignMechanism]:
    """Everything on `model` that moves, casts, shards or quantizes weights, also what streaming can live with.

    A part of a model whose root is wrapped by `fully_shard`, given without the root, cannot be told from one that is
    tensor parallel, unless it is both.

    Args:
        device: where the blocks are to be streamed to; None: not to be judged.
    """
    for path, module in model.named_modules():
        yield from _hooks(path, module)
        if module in ATTACHED:
            yield ForeignMechanism(path, _STREAMED, _MOVES, _REMOVED)
        if isinstance(module, FSDPModule | FullyShardedDataParallel):
            yield ForeignMechanism(path, "sharded by FSDP", _GATHERS, _UNWRAPPED)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if is_resting(tensor):
                yield ForeignMechanism(f"{path}.{name}".lstrip("."), _STREAMED, _MOVES, _REMOVED)
            elif tensor is not None and type(tensor) not in _PLAIN:
                yield _tensor(f"{path}.{name}".lstrip("."), tensor, device)


def refuse_foreign(model: nn.Module, device: torch.device) -> None:
    """Refuse a model whose weights cannot be streamed to `device` because something else has hold of them.

    Raises:
        ForeignMechanismError: names each mechanism, the first places where it is, the reason and the remedy.
    """
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for found in foreign_mechanisms(model, device):
        if found.reason:
            kinds.setdefault((found.what, found.reason, found.remedy), []).append(found.path or "the model")
    if kinds:
        raise ForeignMechanismError("; ".join(_sentence(paths, *kind) for kind, paths in kinds.items()))


def _sentence(paths: list[str], what: str, reason: str, remedy: str) -> str:
    more = f" (so for {len(paths) - 1} more: {', '.join(paths[1:_LISTED])}" if len(paths) > 1 else ""
    more += ", ...)" if len(paths) > _LISTED else ")" if more else ""
    return f"{paths[0]} {'has' if ' hook ' in what else 'is'} {what}{more}, {reason}: {remedy}"


def _hooks(path: str, module: nn.Module) -> Iterator[ForeignMechanism]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remedy = "call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
        yield ForeignMechanism(path, f"an accelerate hook ({_hook_name(hook)})", _MOVES, remedy)
    for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
        reason = _DIFFUSERS_MOVERS.get(name, "")
        remedy = f"call diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model).remove_hook({name!r}) first"
        if name == "layerwise_casting":
            remedy = "load the model again without enable_layerwise_casting"
        yield ForeignMechanism(path, f"a diffusers hook ({name})", reason, remedy if reason else "")


def _hook_name(hook: object) -> str:
    """The class; of accelerate's SequentialHook also those of its parts."""
    parts = ", ".join(_hook_name(part) for part in getattr(hook, "hooks", ()))
    return type(hook).__name__ + (f" of {parts}" if parts else "")


def _tensor(path: str, tensor: Tensor, device: torch.device | None) -> ForeignMechanism:
    what = f"a {type(tensor).__name__}"
    if type(tensor) is not DTensor:
        reason = "and only plain tensors and DTensors can be streamed"
        return ForeignMechanism(path, what, reason, "take the other library's quantization or sharding off first")
    local, mesh = local_part(tensor), tensor.device_mesh
    if type(local) not in _PLAIN:
        reason = f"whose local part is a {type(local).__name__}, and only plain ones can be streamed"
        return ForeignMechanism(path, what, reason, "take the quantization off first, or wait for the part")
    if any(placement.is_partial() for placement in tensor.placements):
        remedy = "call its redistribute() with Replicate or Shard placements and register the result"
        return ForeignMechanism(path, what, "whose Partial placement is a sum over ranks that was never made", remedy)
    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        return ForeignMechanism(path, f"{what} sharded by FSDP (_StridedShard)", _GATHERS, _UNWRAPPED)
    if device is not None and mesh.device_type != device.type:
        reason = f"whose mesh is of {mesh.device_type} devices, and {device} is none"
        return ForeignMechanism(path, what, reason, f"parallelize the model over a mesh of {device.type} devices")
    return ForeignMechanism(path, what)
