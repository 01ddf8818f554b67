"""The demo model's networks: FLUX.2 [klein]'s classes at a size that two cores train in an hour."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from crossdock.runtime.models.tiny.parts import byte_level_bpe

TEXT_LAYERS = (9, 18, 27)
"""The hidden states of the text encoder that the pipeline joins."""
TEXT_WIDTH = 64
LATENT_CHANNELS = 6
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def tokenizer(prompts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer in the format of Qwen's, whose vocabulary are the prompts' words."""
    from tokenizers import normalizers
    from transformers import Qwen2TokenizerFast

    bpe = byte_level_bpe(SPECIAL_TOKENS, prompts, vocabulary=768)
    bpe.normalizer = normalizers.Lowercase()
    made = Qwen2TokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=list(SPECIAL_TOKENS[1:]), model_max_length=1024
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def text_encoder(vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers = TEXT_LAYERS[-1] + 1
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=96,
            num_hidden_layers=layers,
            max_window_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            dtype="float32",
        )
    )


def transformer() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=5,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=len(TEXT_LAYERS) * TEXT_WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 12, 12, 8),
        guidance_embeds=False,
    )


def vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 72),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=48,
    )


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=1.5, use_dynamic_shifting=False)
