"""The model families: one module each, with what crossdock has to know (`SPEC`) and a tiny recipe for tests (`TINY`).

A family whose checkpoints differ in their structure has several recipes, by name. Nothing outside this folder knows a
model's name. See README.md for how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping

from crossdock.runtime.families import (
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
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.tiny.parts import TinyRecipe

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


def _recipes(spec: ModelSpec, tiny: TinyRecipe | Mapping[str, TinyRecipe]) -> Mapping[str, TinyRecipe]:
    """By name; a family's only one is called what the family is called."""
    return {spec.family: tiny} if isinstance(tiny, TinyRecipe) else tiny


SPECS: Mapping[str, ModelSpec] = {module.SPEC.family: module.SPEC for module in _MODULES}
TINY: Mapping[str, TinyRecipe] = {
    name: recipe for module in _MODULES for name, recipe in _recipes(module.SPEC, module.TINY).items()
}
SPEC_OF_RECIPE: Mapping[str, ModelSpec] = {
    name: module.SPEC for module in _MODULES for name in _recipes(module.SPEC, module.TINY)
}


def spec_of_pipeline(pipeline: str) -> ModelSpec | None:
    return next((spec for spec in SPECS.values() if spec.pipeline == pipeline), None)
