"""FLUX.2 [klein], 4B and 9B."""

from __future__ import annotations

from typing import Any

from crossdock.runtime.families.flux_blocks import (
    FLUX2_PLAN,
    QUERY_KEY_NORMS,
    REGION,
    STACKS,
    tiny_flux2_transformer,
    tiny_flux2_vae,
)
from crossdock.runtime.models.spec import ModelSpec, Published
from crossdock.runtime.tiny.parts import TinyRecipe, flow_scheduler, qwen3_config, qwen_tokenizer

SPEC = ModelSpec(
    family="flux2-klein",
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    block_stacks=STACKS,
    tensor_plan=FLUX2_PLAN,
    regions=(REGION,),
    branches="calls",
    negative_prompt=False,
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


def _components() -> dict[str, Any]:
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(qwen3_config(len(tokenizer), layers=28))  # hidden states 9, 18 and 27 are read
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": tiny_flux2_transformer(num_layers=3, num_single_layers=5, guidance_embeds=False),
        "vae": tiny_flux2_vae(),
        "text_encoder": encoder,
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    options={"is_distilled": False},  # guidance works in the undistilled one only
    sharp=QUERY_KEY_NORMS,  # 512 tokens, most padding
)
