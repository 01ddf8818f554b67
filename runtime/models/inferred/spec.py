"""A `ModelSpec` for a model that nobody wrote one for: read off a live transformer, which may be on the meta device.

What cannot be told is not guessed: the spec leaves it out, and `missing` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from crossdock.offload.live.discovery import DiscoveryError, FoundBlock, discover_blocks, stack_paths
from crossdock.runtime.models.inferred.regions import infer_regions
from crossdock.runtime.models.inferred.tensor_plan import infer_tensor_plan
from crossdock.runtime.models.spec import ModelSpec


@dataclass(frozen=True)
class InferredSpec(ModelSpec):
    """
    Attributes:
        run_order: the blocks' paths in the order in which they ran on the inputs that were given; may be handed to
            `LayerwiseOffloader` as `stacks`. Empty without inputs.
        pixel_multiple, frame_multiple: as in a `ModelLayout`, as its pipeline says; 0: it was not asked.
        rehearsed: ranks without encoders got to the first step; else no picture can be shared among ranks.
        missing: what could not be told, a sentence each.
    """

    run_order: tuple[str, ...] = ()
    pixel_multiple: int = 0
    frame_multiple: int = 0
    rehearsed: bool = False
    missing: tuple[str, ...] = ()


def infer_spec(model: nn.Module, inputs: Mapping[str, object] | None = None) -> InferredSpec:
    """What `model` says of itself.

    Stacks are those that the model declares, else those that its structure shows (`live.discovery`), in the order
    in which they are registered. A run on `inputs` decides over both, tries a tensor plan that no class declares,
    and shows what a `_cp_plan` leaves open.

    Args:
        model: on any device. Nothing of it is changed.
        inputs: arguments of its forward, on the device of its weights, for up to two passes; meta tensors for meta.
            Segments of a joint sequence should differ in length.
    """
    missing: list[str] = []
    stacks: tuple[str, ...] = ()
    blocks: list[FoundBlock] = []
    try:
        stacks = stack_paths(model)[0]
        blocks = discover_blocks(model, stacks)
    except DiscoveryError as error:
        stacks = ()
        missing.append(f"Block stacks: {error}.")
    ran = _first_runs(model, blocks, inputs) if inputs is not None else ()
    if inputs is None:
        missing += _open_order(stacks)
    else:
        stacks = _as_run(stacks, ran)
        missing += _did_not_run(blocks, ran)
    missing += _other_lists(model, blocks)
    tensor_plan, not_cut = infer_tensor_plan(model, [block.name for block in blocks], inputs)
    regions, not_regions = infer_regions(model, inputs)
    return InferredSpec(
        family=type(model).__name__,
        pipeline="",
        transformer=type(model).__name__,
        block_stacks=stacks,
        tensor_plan=tensor_plan,
        regions=regions,
        branches=None,
        run_order=ran,
        missing=(*missing, *not_cut, *not_regions, BEYOND),
    )


BEYOND = "Pipeline: a transformer does not tell its pipeline, nor what becomes of its latents."


def _first_runs(model: nn.Module, blocks: Sequence[FoundBlock], inputs: Mapping[str, object]) -> tuple[str, ...]:
    """The names of the blocks as they first run."""
    ran: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.setdefault(name)

    handles = [block.module.register_forward_pre_hook(note(block.name)) for block in blocks]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(ran)


def _as_run(stacks: Sequence[str], ran: Sequence[str]) -> tuple[str, ...]:
    """`stacks` in the order of their first blocks; those that did not run stand last."""
    first = {stack: place for place, name in reversed([*enumerate(ran)]) for stack in (name, name.rpartition(".")[0])}
    return tuple(sorted(stacks, key=lambda stack: first.get(stack, len(ran))))


def _open_order(stacks: Sequence[str]) -> list[str]:
    """What only a run tells."""
    if len(stacks) < 2:
        return []
    return [f"Order: {', '.join(stacks)} stand as they are registered or declared; give inputs."]


def _did_not_run(blocks: Sequence[FoundBlock], ran: Sequence[str]) -> list[str]:
    idle = [block.name for block in blocks if block.name not in ran]
    return [f"Order: on these inputs {', '.join(idle)} did not run."] if idle else []


def _other_lists(model: nn.Module, blocks: Sequence[FoundBlock]) -> list[str]:
    """Module lists that are taken for no stack: they stay on the device as a whole."""
    inside = {id(part) for block in blocks for part in block.module.modules()}
    missing = []
    for path, module in model.named_modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList):
            continue
        inside |= {id(part) for part in module.modules()}
        kinds = {type(child) for child in module}
        if len(module) > 1 and len(kinds) == 1 and not any(block.name.startswith(f"{path}.") for block in blocks):
            what = f"{path} ({len(module)} x {kinds.pop().__name__})"
            missing.append(f"Block stacks: {what} is taken for no stack and stays on the device.")
    return missing
