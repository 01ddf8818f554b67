"""What the tiny recipes of models built like FLUX have in common."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, VAE_CHANNELS

QUERY_KEY_NORMS = tuple(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k"))


def tiny_flux2_transformer(num_layers: int, num_single_layers: int, guidance_embeds: bool) -> object:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * TEXT_HIDDEN,  # the pipelines join three hidden states of the text encoder
        timestep_guidance_channels=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def tiny_flux2_vae() -> object:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=12,
        sample_size=256,
    )
