"""FLUX.1 [dev]."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.tensor import COLUMN
from crossdock.runtime.families.flux_blocks import QUERY_KEY_NORMS, REGION, STACKS, flux1_plan
from crossdock.runtime.models.spec import ModelSpec, Published
from crossdock.runtime.tiny.clip import CLIP_HIDDEN, clip_text_config, clip_tokenizer
from crossdock.runtime.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
)
from crossdock.runtime.tiny.t5 import t5_sizes, t5_tokenizer

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
    published=(Published("FLUX.1-dev", 11.901e9, {"guidance_embeds": True}),),
)


def _transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_HIDDEN,
        pooled_projection_dim=CLIP_HIDDEN,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def _components() -> dict[str, Any]:
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "transformer": _transformer(),
        "vae": kl_vae(),
        "text_encoder": CLIPTextModel(clip_text_config(tokenizer)),
        "text_encoder_2": T5EncoderModel(T5Config(**t5_sizes(len(tokenizer_2)))),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=QUERY_KEY_NORMS,  # 512 tokens, most padding
)
