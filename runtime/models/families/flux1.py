"""FLUX.1 [dev]."""

from __future__ import annotations

from crossdock.parallel.tensor import COLUMN
from crossdock.runtime.models.families.flux_blocks import REGION, STACKS, flux1_plan
from crossdock.runtime.models.spec import ModelSpec, Published

SPEC = ModelSpec(
    family="flux1",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    block_stacks=STACKS,
    tensor_plan=flux1_plan(mlp_in=COLUMN, counts={}),
    regions=(REGION,),
    encoders=("text_encoder", "text_encoder_2"),
    branches=None,  # its guidance is in the model
    negative_prompt=False,
    unguided={"guidance_embeds": False},  # [schnell]
    steps=28,
    published=(Published("FLUX.1-dev", 11.901e9, {"guidance_embeds": True}),),
)
