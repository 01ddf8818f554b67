"""The tiny recipe of Helios."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, TinyRecipe
from crossdock.runtime.models.tiny.t5 import t5_sizes, t5_tokenizer


def _transformer() -> object:
    from diffusers import HeliosTransformer3DModel

    return HeliosTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_HIDDEN,
        freq_dim=48,
        ffn_dim=216,
        num_layers=5,
        rope_dim=(4, 6, 6),
    )


def _vae() -> object:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        latents_mean=[0.1 * (channel - 3) for channel in range(LATENT_CHANNELS)],
        latents_std=[1.0 + 0.1 * channel for channel in range(LATENT_CHANNELS)],
    )


def _components() -> dict[str, object]:
    from diffusers import HeliosScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(UMT5Config(**t5_sizes(len(tokenizer)))),
        "vae": _vae(),
        "scheduler": HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True),
        "transformer": _transformer(),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=("attn2.norm_q.weight", "attn2.norm_k.weight"),  # 512 text tokens, most of them padding
)
