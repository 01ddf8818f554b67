"""The tiny recipe of LongCat-Image."""

from __future__ import annotations

from typing import Any

from crossdock.runtime.models.tiny.flux_blocks import QUERY_KEY_NORMS
from crossdock.runtime.models.tiny.parts import HEAD_DIM, HEADS, TEXT_HIDDEN, TinyRecipe, flow_scheduler, kl_vae
from crossdock.runtime.models.tiny.qwen_vl import qwen25_vl_config, qwen_vl_tokenizer

_LATENT_CHANNELS = 16  # the pipeline has this number in its code


def _transformer() -> object:
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_HIDDEN,
        pooled_projection_dim=TEXT_HIDDEN,
        axes_dims_rope=[4, 6, 6],
    )


def _text_encoder(tokenizer: Any) -> object:
    """Writes some ten tokens: every twelfth ends the text."""
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    encoder = Qwen2_5_VLForConditionalGeneration(qwen25_vl_config(tokenizer, layers=3))
    encoder.generation_config = GenerationConfig(
        min_new_tokens=8,
        eos_token_id=list(range(0, len(tokenizer), 12)),
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.05,
    )
    return encoder


def _components() -> dict[str, object]:
    from diffusers.pipelines.longcat_image.system_messages import SYSTEM_PROMPT_EN

    tokenizer = qwen_vl_tokenizer(SYSTEM_PROMPT_EN)
    tokenizer.model_max_length = 4096
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "text_processor": tokenizer,
        "transformer": _transformer(),
        "vae": kl_vae(_LATENT_CHANNELS),
        "text_encoder": _text_encoder(tokenizer),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=(*QUERY_KEY_NORMS, "input_layernorm.weight"),  # 512 tokens, most padding; 2000 before it writes
)
