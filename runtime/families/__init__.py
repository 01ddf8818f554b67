"""The model families: one module each, with what crossdock has to know (`SPEC`) and a tiny recipe for tests (`TINY`).

Nothing outside this folder knows a model's name. See README.md for how to add one.
"""

from __future__ import annotations

from collections.abc import Mapping

from crossdock.runtime.families import flux2_klein, ltx2, z_image
from crossdock.runtime.specs import ModelSpec
from crossdock.runtime.tiny_parts import TinyRecipe

_MODULES = (flux2_klein, ltx2, z_image)

SPECS: Mapping[str, ModelSpec] = {module.SPEC.family: module.SPEC for module in _MODULES}
TINY: Mapping[str, TinyRecipe] = {module.SPEC.family: module.TINY for module in _MODULES}


def spec_of_pipeline(pipeline: str) -> ModelSpec | None:
    return next((spec for spec in SPECS.values() if spec.pipeline == pipeline), None)
