"""The tiny recipe of Stable Diffusion 3.5."""

from __future__ import annotations

from crossdock.runtime.models.tiny.clip import clip_text_config, clip_tokenizer
from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
)
from crossdock.runtime.models.tiny.t5 import t5_sizes, t5_tokenizer

_CLIP_HIDDEN = (24, 40)  # side by side they are narrower than what the third encoder gives


def _transformer() -> object:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_HIDDEN,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=sum(_CLIP_HIDDEN),
        pos_embed_max_size=20,
        dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
    )


def _components() -> dict[str, object]:
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoders = (CLIPTextModelWithProjection(clip_text_config(clip, hidden)) for hidden in _CLIP_HIDDEN)
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=False),
        "tokenizer": clip,
        "tokenizer_2": clip,
        "tokenizer_3": t5,
        "transformer": _transformer(),
        "vae": kl_vae(),
        "text_encoder": next(encoders),
        "text_encoder_2": next(encoders),
        "text_encoder_3": T5EncoderModel(T5Config(**t5_sizes(len(t5)))),
    }


TINY = TinyRecipe(
    _components,
    # guidance by 7 enlarges what text does to every block at once, through the pooled half of it
    outputs=("proj_out.weight", "time_text_embed.text_embedder.linear_2.weight"),
)
