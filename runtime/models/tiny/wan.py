"""The tiny recipes of Wan: 2.1, and 2.2 with one transformer or two."""

from __future__ import annotations

from functools import partial

from crossdock.runtime.models.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, TinyRecipe
from crossdock.runtime.models.tiny.t5 import t5_sizes, t5_tokenizer


def _transformer(channels: int) -> object:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_HIDDEN,
        freq_dim=48,
        ffn_dim=216,
        num_layers=5,
    )


def _vae(channels: int, **options: object) -> object:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        num_res_blocks=1,
        latents_mean=[0.1 * (channel - 3) for channel in range(channels)],
        latents_std=[1.0 + 0.1 * channel for channel in range(channels)],
        **options,
    )


def _components(channels: int = LATENT_CHANNELS, two: bool = False, **vae: object) -> dict[str, object]:
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(UMT5Config(**t5_sizes(len(tokenizer)))),
        "vae": _vae(channels, **vae),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": _transformer(channels),
        "transformer_2": _transformer(channels) if two else None,
    }


_OUTPUTS = ("proj_out.weight",)
_SHARP = ("attn2.norm_q.weight", "attn2.norm_k.weight")  # 512 text tokens, most of them padding

TINY = {
    "wan2.1": TinyRecipe(_components, outputs=_OUTPUTS, sharp=_SHARP),
    "wan2.2-ti2v-5b": TinyRecipe(
        partial(
            _components,
            channels=9,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            is_residual=True,
            scale_factor_spatial=16,
            decoder_base_dim=12,
        ),
        outputs=_OUTPUTS,
        options={"expand_timesteps": True},
        sharp=_SHARP,
    ),
    "wan2.2-a14b": TinyRecipe(
        partial(_components, two=True), outputs=_OUTPUTS, options={"boundary_ratio": 0.875}, sharp=_SHARP
    ),
}
