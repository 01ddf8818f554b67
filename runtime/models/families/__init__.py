"""The model families: one module each, with what crossdock has to know (`SPEC`).

Nothing outside this folder and `models/tiny`, which makes small ones for tests, knows a model's name. See README.md for
how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import diffusers

from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import index_file, read_model_index
from crossdock.runtime.models.families import (
    flux1,
    flux2,
    flux2_klein,
    flux3,
    flux3_distilled,
    helios,
    hunyuan_video_15,
    krea2,
    longcat_image,
    ltx2,
    minimax_h3,
    ovis_image,
    qwen_image,
    qwen_image_21,
    sd35,
    wan,
    z_image,
)
from crossdock.runtime.models.inferred.pipeline import infer_pipeline
from crossdock.runtime.models.spec import ModelSpec

_MODULES = (
    flux1,
    flux2,
    flux2_klein,
    flux3,
    flux3_distilled,
    longcat_image,
    ovis_image,
    z_image,
    wan,
    hunyuan_video_15,
    ltx2,
    minimax_h3,
    helios,
    qwen_image,
    qwen_image_21,
    sd35,
    krea2,
)


SPECS: Mapping[str, ModelSpec] = {module.SPEC.family: module.SPEC for module in _MODULES}


def spec_of_pipeline(pipeline: str) -> ModelSpec | None:
    return next((spec for spec in SPECS.values() if spec.pipeline == pipeline), None)


def spec_for(model_dir: Path) -> ModelSpec:
    """The family of a checkpoint, or what its pipeline's class says where no family describes it.

    Raises:
        CheckpointError: no such directory, not a diffusers pipeline, or none that can run.
    """
    index = read_model_index(model_dir)
    pipeline = index["_class_name"]
    spec = spec_of_pipeline(pipeline) or infer_pipeline(index, index_file(model_dir))
    if spec is None:
        known = ", ".join(f"{spec.pipeline} ({family})" for family, spec in SPECS.items())
        raise CheckpointError(
            f"{index_file(model_dir)}: unknown model class {str(pipeline)[:100]!r}; diffusers "
            f"{diffusers.__version__} has no such pipeline, and crossdock knows {known}"
        )
    return spec
