"""FLUX.2 [klein], 4B and 9B."""

from __future__ import annotations

from crossdock.runtime.models.families.flux_blocks import FLUX2_PLAN, REGION, STACKS
from crossdock.runtime.models.spec import ModelSpec, Published

SPEC = ModelSpec(
    family="flux2-klein",
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    block_stacks=STACKS,
    tensor_plan=FLUX2_PLAN,
    regions=(REGION,),
    branches="calls",
    negative_prompt=False,
    unguided={"is_distilled": True},
    latents="_unpatchify_latents",
    steps=4,
    published=(
        Published(
            "FLUX.2-klein-4B",
            3.876e9,
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        Published(
            "FLUX.2-klein-9B",
            9.079e9,
            {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
        ),
    ),
)
