"""The tiny recipe of FLUX.3 [klein] base."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, VAE_CHANNELS, TinyRecipe
from crossdock.runtime.models.tiny.qwen_vl import qwen3_vl_config, qwen_vl_processor, qwen_vl_tokenizer

TAPPED = 8  # hidden states of the text encoder, the last of which is its 32nd


def _transformer(flow_map: bool) -> object:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        cond_in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TAPPED * TEXT_HIDDEN,
        timestep_channels=48,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )


def components(flow_map: bool = False) -> dict[str, object]:
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen3VLForConditionalGeneration

    tokenizer = qwen_vl_tokenizer()
    return {
        "tokenizer": qwen_vl_processor(tokenizer),
        "transformer": _transformer(flow_map),
        "vae": AutoencoderKLFlux2(
            block_out_channels=VAE_CHANNELS,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=12,
            sample_size=256,
        ),
        "text_encoder": Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, layers=32)),
    }


TINY = TinyRecipe(
    components, outputs=("proj_out.weight",), sharp=("attn.norm_q.weight", "attn.norm_k.weight"), sharpness=1.8
)
