"""LongCat-Image."""

from __future__ import annotations

from crossdock.parallel.tensor import COLUMN
from crossdock.runtime.models.families.flux_blocks import HEAD_COUNTS, REGION, STACKS, flux1_plan
from crossdock.runtime.models.spec import ModelSpec, Published

SPEC = ModelSpec(
    family="longcat-image",
    pipeline="LongCatImagePipeline",
    transformer="LongCatImageTransformer2DModel",
    block_stacks=STACKS,
    tensor_plan=flux1_plan(mlp_in=COLUMN, counts=HEAD_COUNTS),
    regions=(REGION,),
    encode=("rewire_prompt", "encode_prompt"),  # the text encoder first writes a longer prompt
    branches="calls",
    published=(Published("LongCat-Image", 6.270e9, {"num_layers": 10, "num_single_layers": 20}),),
)
