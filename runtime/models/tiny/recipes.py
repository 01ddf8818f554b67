"""The tiny recipes of all families, by name. A family whose checkpoints differ in their structure has several."""

from __future__ import annotations

from collections.abc import Mapping

from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.models.tiny import (
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
from crossdock.runtime.models.tiny.parts import TinyRecipe

_OF_FAMILY: Mapping[str, TinyRecipe | Mapping[str, TinyRecipe]] = {
    "flux1": flux1.TINY,
    "flux2": flux2.TINY,
    "flux2-klein": flux2_klein.TINY,
    "flux3": flux3.TINY,
    "flux3-distilled": flux3_distilled.TINY,
    "longcat-image": longcat_image.TINY,
    "ovis-image": ovis_image.TINY,
    "z-image": z_image.TINY,
    "wan": wan.TINY,
    "hunyuan-video-1.5": hunyuan_video_15.TINY,
    "ltx2": ltx2.TINY,
    "minimax-h3": minimax_h3.TINY,
    "helios": helios.TINY,
    "qwen-image": qwen_image.TINY,
    "qwen-image-2.1": qwen_image_21.TINY,
    "sd3.5": sd35.TINY,
    "krea2": krea2.TINY,
}


def _recipes(family: str) -> Mapping[str, TinyRecipe]:
    """By name; a family's only one is called what the family is called."""
    tiny = _OF_FAMILY[family]
    return {family: tiny} if isinstance(tiny, TinyRecipe) else tiny


TINY: Mapping[str, TinyRecipe] = {name: recipe for family in SPECS for name, recipe in _recipes(family).items()}
SPEC_OF_RECIPE: Mapping[str, ModelSpec] = {name: spec for family, spec in SPECS.items() for name in _recipes(family)}
