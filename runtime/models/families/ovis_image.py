"""Ovis-Image."""

from __future__ import annotations

from crossdock.runtime.models.families.flux_blocks import HEAD_COUNTS, REGION, SINGLE, STACKS, flux1_plan
from crossdock.runtime.models.spec import SWIGLU, ModelSpec, Published

SPEC = ModelSpec(
    family="ovis-image",
    pipeline="OvisImagePipeline",
    transformer="OvisImageTransformer2DModel",
    block_stacks=STACKS,
    tensor_plan=flux1_plan(mlp_in=SWIGLU, counts={**HEAD_COUNTS, f"{SINGLE}.*": ("mlp_hidden_dim",)}),
    regions=(REGION,),
    branches="calls",
    published=(Published("Ovis-Image-7B", 7.370e9),),
)
