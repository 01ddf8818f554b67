"""The tiny recipe of FLUX.1 [dev]."""

from __future__ import annotations

from crossdock.runtime.models.tiny.clip import CLIP_HIDDEN, clip_text_config, clip_tokenizer
from crossdock.runtime.models.tiny.flux_blocks import QUERY_KEY_NORMS
from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
)
from crossdock.runtime.models.tiny.t5 import t5_sizes, t5_tokenizer


def _transformer() -> object:
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


def _components() -> dict[str, object]:
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
