"""Pipelines that diffusers has as blocks only (`ModularPipeline`), run like the others.

Their blocks hand a state on to one another. What encodes is a block here, not a method; a denoise loop calls nobody at
a step's end, so that its steps are told by the scheduler; and what comes out is picked by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from crossdock.runtime.models.checkpoint import MODULAR_INDEX, named_files
from crossdock.runtime.models.diffusers_api import ModularPipeline, blocks_of, variant
from crossdock.runtime.models.foreign_code import is_component

Share = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes of a function one that runs on one rank, with what it returns on all."""


def as_pipeline(pipeline: type, outputs: tuple[str, ...], workflow: str | None = None) -> type:
    """A subclass of the modular `pipeline` that is loaded and called like a `DiffusionPipeline`.

    Args:
        outputs: names of what it returns.
        workflow: which of its own it runs; None: it has one, or chooses by what it is called with.
    """

    class Adapted(pipeline):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, model_dir: Path, dtype: torch.dtype, **given: object) -> ModularPipeline:
            return _loaded(partial(cls, workflow=workflow), model_dir, dtype, given)

        returned_latents: Tensor | None = None

        def __call__(self, return_dict: bool, **inputs: object) -> Any:
            found = super().__call__(output=[*outputs, "latents"], **inputs)
            self.returned_latents = found.pop("latents")
            return found if return_dict else tuple(found[name] for name in outputs)

    Adapted.__name__ = pipeline.__name__
    return Adapted


def _loaded(
    pipeline: Callable[..., ModularPipeline], model_dir: Path, dtype: torch.dtype, given: Mapping[str, object]
) -> ModularPipeline:
    """A pipeline with the components of `model_dir`, but for those that are `given`: as modules, or None for none.

    Blocks whose components are not in this directory (another model's, of another repository) are left out.
    """
    options = {"local_files_only": given.get("local_files_only", True), "variant": given.get("variant")}
    pipe = pipeline(pretrained_model_name_or_path=str(model_dir), local_files_only=options["local_files_only"])
    here = {name for name in pipe.pretrained_component_names if (model_dir / name).is_dir()}
    blocks = blocks_of(pipe)
    for name, block in list(blocks.items()):
        wanted = {part.name for part in block.expected_components if part.default_creation_method == "from_pretrained"}
        if not wanted <= here:
            blocks.pop(name)
    for name in sorted(here - given.keys()):
        pipe.register_components(**{name: _load_component(pipe.get_component_spec(name), model_dir, dtype, options)})
    pipe.register_components(**{name: module for name, module in given.items() if isinstance(module, nn.Module)})
    return pipe


def _load_component(spec: Any, model_dir: Path, dtype: torch.dtype, options: Mapping[str, object]) -> object:
    """The component as it lies in `model_dir`, whatever place and class its entry in the index names."""
    kind = spec.type_hint
    if (spec.pretrained_model_name_or_path, spec.subfolder) != (str(model_dir), spec.name):
        raise ValueError(f"{MODULAR_INDEX}: {spec.name}: names another place than {model_dir / spec.name}")
    if not is_component(kind):
        raise ValueError(f"{MODULAR_INDEX}: {spec.name}: {kind} is no class of a component")
    more: dict[str, object] = {"use_safetensors": True} if issubclass(kind, nn.Module) else {}
    if options["variant"] is not None and named_files(model_dir / spec.name, str(options["variant"])) is None:
        more["variant"] = None
    if not issubclass(kind, diffusers.ConfigMixin):  # transformers'
        more["trust_remote_code"] = False
    return spec.load(dtype=dtype, **{**options, **more})


def share_block(pipe: ModularPipeline, name: str, share: Share) -> None:
    """The block called `name` runs on one rank, and what it puts into the state is put there on all."""
    blocks = blocks_of(pipe)
    block = copy.copy(blocks[name])  # pipelines of a class have their blocks in common
    kinds = {output.name: output.kwargs_type for output in block.intermediate_outputs}
    own = type(block)

    def values(state: object) -> dict[str, Any]:
        _, after = own.__call__(block, pipe, state)
        return {output: after.get(output) for output in kinds}

    shared = share(values)

    def call(_block: Any, components: Any, state: Any) -> tuple[Any, Any]:
        for output, value in shared(state).items():
            state.set(output, value, kinds[output])
        return components, state

    block.__class__ = variant(own, __call__=call)
    blocks[name] = block
