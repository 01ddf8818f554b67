"""What a live transformer adds to a spec that its pipeline's class alone began, and what then has to be refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.models.inferred.rehearsal import FirstCall, RehearsalError, rehearse
from crossdock.runtime.models.inferred.spec import BEYOND, InferredSpec, infer_spec
from crossdock.runtime.models.inferred.trial import on_meta
from crossdock.runtime.models.transformers import transformers_in
from crossdock.runtime.plan.component_needs import component_on_meta
from crossdock.runtime.plan.plan import RunPlan


def completed(
    spec: InferredSpec, model_dir: Path, index: Mapping[str, Any], model: nn.Module, others: tuple[str, ...]
) -> InferredSpec:
    """With stacks, plan and regions, and the sizes of pictures where a rehearsal shows them.

    Args:
        model: the transformers on meta.
        others: the components with weights beside them.
    """
    transformers = dict(zip(spec.transformers, map(on_meta, transformers_in(model).values()), strict=True))
    rest = {name: component_on_meta(model_dir / name, index[name][0], index[name][1], torch.float32) for name in others}
    first = next(iter(transformers.values()))
    call, failed = None, []
    try:
        call = rehearse(spec, model_dir, transformers, rest)
    except RehearsalError as why:
        failed = [f"Ranks that share one picture: {why}."]
    found, unclear = _of_transformer(first, call)
    return replace(
        spec,
        block_stacks=found.block_stacks,
        tensor_plan=found.tensor_plan,
        regions=found.regions,
        pixel_multiple=call.pixel_multiple if call is not None else 0,
        frame_multiple=call.frame_multiple if call is not None else 0,
        rehearsed=call is not None,
        missing=(*spec.missing, *failed, *unclear, *(said for said in found.missing if said != BEYOND)),
    )


def _of_transformer(model: nn.Module, call: FirstCall | None) -> tuple[InferredSpec, list[str]]:
    if call is not None:
        try:
            return infer_spec(model, call.inputs), []
        except Exception as error:  # whatever a forward may raise that asks for numbers
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return infer_spec(model), [f"Trial: {type(model).__name__} does not run without its weights ({what})."]
    return infer_spec(model), []


def check_inferred(spec: InferredSpec, config: RunConfig) -> None:
    """
    Raises:
        ConfigError: the layout needs what could not be told.
    """
    for key in ("tp_degree", "ulysses_degree", "ring_degree", "cfg_degree"):
        degree: int = getattr(config.parallel, key)
        if degree > 1 and (why := _why_not(spec, key)):
            unknown = f"no family describes {spec.family}, and this is not inferred: {why}"
            raise ConfigError(f"found {degree}: {unknown} Allowed: 1", f"parallel.{key}")


def _why_not(spec: InferredSpec, key: str) -> str | None:
    """A sentence or more."""
    if not spec.rehearsed:
        return _said(spec, "Ranks")
    if key == "cfg_degree":
        return "how it runs the branches of guidance."
    if key == "tp_degree":
        return None if spec.tensor_plan.linears and spec.tensor_plan.head_count else _said(spec, "Tensor")
    return None if spec.regions else _said(spec, "Sequence")


def _said(spec: InferredSpec, about: str) -> str:
    return " ".join(sentence for sentence in spec.missing if sentence.startswith(about))


def not_proven(plan: RunPlan) -> bool:
    """Whether its layout rests on what is inferred, so that one step has to be compared before a picture is made."""
    shape = plan.layout.mesh
    return isinstance(plan.layout.spec, InferredSpec) and shape.tp * shape.sequence > 1


def what_is_inferred(plan: RunPlan) -> tuple[str, ...]:
    """First what is assured of a pipeline that no family describes, then what could not be told; else nothing."""
    spec = plan.layout.spec
    if not isinstance(spec, InferredSpec):
        return ()
    compared = "and that one step is the unsharded model's" if not_proven(plan) else "and nothing of it is cut"
    stacks = ", ".join(spec.block_stacks)
    return (
        f"{spec.family}: no family describes it, it runs from what was inferred: blocks of {stacks}; assured: "
        f"that its weights are the checkpoint's {compared}; not assured: that guidance does something",
        *spec.missing,
    )
