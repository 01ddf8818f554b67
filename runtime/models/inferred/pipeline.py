"""What the class of a pipeline and the index of its checkpoint say of a family that nobody described.

No weights and no configs are read: of a model of the hub, only the index is there when this is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import transformers

from crossdock.parallel.tensor import TensorPlan
from crossdock.runtime.config.bounded_files import printable
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import component_class, component_names
from crossdock.runtime.models.inferred.spec import InferredSpec

_TRANSFORMERS = ("transformer", "transformer_2")
_GIVEN = ("height", "width", "num_inference_steps", "generator", "output_type", "return_dict")
"""What crossdock calls every pipeline with, beside the prompt."""
_FRAME_RATES = ("frame_rate", "fps")
_USUAL_FPS = 24
_LATENTS = "Latents: those of the loop are returned; the pipeline may arrange them otherwise where it returns some."


class _NotInferredError(Exception):
    """Why nothing can be inferred of a pipeline."""


def infer_pipeline(index: Mapping[str, Any], file: Path) -> InferredSpec | None:
    """All but what its transformer says; None: diffusers has no such pipeline.

    Args:
        index: the content of `file`, model_index.json.

    Raises:
        CheckpointError: it is not one of text to pictures or videos, of a kind that can run.
    """
    name = index["_class_name"]
    found: object = None
    with suppress(
        AttributeError, ImportError, RuntimeError
    ):  # of a module that lacks a package, diffusers raises these
        found = getattr(diffusers, name) if name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        return None
    try:
        return _infer(found, index)
    except _NotInferredError as why:
        raise CheckpointError(
            f"{file}: {printable(name[:100])}: no family describes it, and it cannot run from what is inferred: {why}"
        ) from None


def _infer(pipeline: type, index: Mapping[str, Any]) -> InferredSpec:
    takes = inspect.signature(pipeline.__call__).parameters
    kinds = {name: component_class(*index[name]) or object for name in component_names(index)}
    _check_call(takes)
    named = tuple(name for name in _TRANSFORMERS if name in kinds)
    if not named:
        raise _NotInferredError(_no_transformer(kinds))
    if len({kinds[name] for name in named}) > 1:
        raise _NotInferredError(f"{' and '.join(named)} are of different classes")
    schedulers = [name for name, kind in kinds.items() if issubclass(kind, diffusers.SchedulerMixin)]
    if schedulers != ["scheduler"]:
        raise _NotInferredError(f"its schedulers are {', '.join(schedulers) or 'none'}; steps are counted with one")
    decoders = [name for name, kind in kinds.items() if _decodes(kind) and name not in named]
    if not decoders:
        raise _NotInferredError("no component of it decodes")
    fps, missing = _frame_rate(takes)
    return InferredSpec(
        family=pipeline.__name__,
        pipeline=pipeline.__name__,
        transformer=kinds[named[0]].__name__,
        block_stacks=(),
        tensor_plan=TensorPlan({}, ""),
        regions=(),
        branches=None,
        guidance="guidance_scale" if "guidance_scale" in takes else None,
        negative_prompt="negative_prompt" in takes,
        transformers=named,
        batches="list" in str(takes["prompt"].annotation).lower(),
        encoders=tuple(name for name, kind in kinds.items() if _encodes(kind, index[name][0])),
        encode=("encode_prompt",) if hasattr(pipeline, "encode_prompt") else (),
        decoders=tuple(decoders),
        patch=1,
        fps=fps,
        size=_size(takes),
        steps=takes["num_inference_steps"].default or InferredSpec.steps,
        resumes=False,
        missing=(*missing, _LATENTS),
    )


def _check_call(takes: Mapping[str, inspect.Parameter]) -> None:
    """It makes pictures or videos of a size of nothing but a prompt."""
    if "prompt" not in takes:
        raise _NotInferredError("it takes no prompt")
    needs = [
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in ("self", "prompt")
    ]
    if needs:
        raise _NotInferredError(f"it also requires {', '.join(needs)}, and requests have a prompt only")
    if absent := [name for name in _GIVEN if name not in takes]:
        raise _NotInferredError(f"it takes no {', '.join(absent)}; does it make pictures or videos?")
    if ("num_videos_per_prompt" in takes and "num_frames" not in takes) or "video_length" in takes:
        raise _NotInferredError("it makes videos, and takes no num_frames")


def _no_transformer(kinds: Mapping[str, type]) -> str:
    unets = [f"{name} ({kind.__name__})" for name, kind in kinds.items() if "unet" in kind.__name__.lower()]
    what = f"its model is {', '.join(unets)}, which" if unets else "it has no component `transformer`: it"
    return f"{what} has no stack of transformer blocks that could be streamed or sharded"


def _decodes(kind: type) -> bool:
    return issubclass(kind, diffusers.ModelMixin) and hasattr(kind, "decode")


def _encodes(kind: type, library: str) -> bool:
    return library == "transformers" and issubclass(kind, transformers.PreTrainedModel)


def _frame_rate(takes: Mapping[str, inspect.Parameter]) -> tuple[int | None, tuple[str, ...]]:
    if "num_frames" not in takes:
        return None, ()
    rate = next((takes[name].default for name in _FRAME_RATES if name in takes), None)
    if isinstance(rate, int | float) and rate >= 1:
        return round(rate), ()
    return _USUAL_FPS, (f"Video: its frames per second are not told; files are written with {_USUAL_FPS}.",)


def _size(takes: Mapping[str, inspect.Parameter]) -> tuple[int, int]:
    width, height = takes["width"].default, takes["height"].default
    return (width, height) if isinstance(width, int) and isinstance(height, int) else InferredSpec.size
