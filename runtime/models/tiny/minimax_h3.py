"""The tiny recipe of MiniMax-H3."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, TinyRecipe
from crossdock.runtime.models.tiny.qwen_vl import (
    latent_statistics,
    qwen3_vl_config,
    qwen_vl_processor,
    qwen_vl_tokenizer,
)

AUDIO_CHANNELS = 8
AUDIO_HIDDEN = 24
SAMPLING_RATE = 8000
HOP = (8, 5, 5)  # samples per audio latent, of which there are 40 a second


def _transformer() -> object:
    from diffusers import MiniMaxH3Transformer3DModel

    return MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=80,
        num_layers=5,
        ffn_dim=216,
        in_channels=LATENT_CHANNELS,
        audio_in_channels=AUDIO_CHANNELS,
        text_dim=TEXT_HIDDEN,
        freq_dim=48,
        time_embed_hidden_dim=80,
        time_embed_dim=40,
        rope_freq_dim=2,
    )


def _vae() -> object:
    from diffusers import AutoencoderKLMiniMaxH3

    return AutoencoderKLMiniMaxH3(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(12, 12, 12, 24, 24, 24),
        layers_per_block=1,
        norm_num_groups=12,
        decoder_num_layers=2,
        decoder_num_attention_heads=3,
        decoder_attention_head_dim=16,
        **latent_statistics(LATENT_CHANNELS),
    )


def _audio_vae() -> object:
    from diffusers import AutoencoderKLMiniMaxH3Audio

    return AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4,
        encoder_rates=HOP,
        latent_dim=AUDIO_HIDDEN,
        latent_channels=AUDIO_CHANNELS,
        num_attention_heads=2,
        decoder_dim=AUDIO_HIDDEN,
        decoder_rates=HOP,
        decoder_kernel_sizes=(16, 9, 9),
        resblock_kernel_sizes=(3, 7),
        resblock_dilation_sizes=((1,), (3,)),
        sampling_rate=SAMPLING_RATE,
        **latent_statistics(AUDIO_CHANNELS),
    )


def _components() -> dict[str, object]:
    from diffusers import MiniMaxH3Scheduler
    from transformers import Qwen3VLForConditionalGeneration

    tokenizer = qwen_vl_tokenizer()
    return {
        "scheduler": MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": MiniMaxH3Scheduler(shift=3.0),
        "tokenizer": tokenizer,
        "processor": qwen_vl_processor(tokenizer),
        "transformer": _transformer(),
        "vae": _vae(),
        "audio_vae": _audio_vae(),
        "text_encoder": Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, layers=51)),  # the 50th is read
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight", "audio_proj_out.weight", "decoder.conv_post.weight_g"),
    sharp=("attn.norm_q.weight", "attn.norm_k.weight"),  # few of the tokens are text
)
