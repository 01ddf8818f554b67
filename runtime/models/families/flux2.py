"""FLUX.2 [dev]."""

from __future__ import annotations

from crossdock.runtime.models.families.flux_blocks import FLUX2_PLAN, REGION, STACKS
from crossdock.runtime.models.spec import ModelSpec, Published

SPEC = ModelSpec(
    family="flux2",
    pipeline="Flux2Pipeline",
    transformer="Flux2Transformer2DModel",
    block_stacks=STACKS,
    tensor_plan=FLUX2_PLAN,
    regions=(REGION,),
    branches=None,  # its guidance is in the model
    negative_prompt=False,
    published=(Published("FLUX.2-dev", 32.223e9),),
)
