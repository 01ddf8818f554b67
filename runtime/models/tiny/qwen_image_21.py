"""The tiny recipe of Qwen-Image 2.1."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
)
from crossdock.runtime.models.tiny.qwen_vl import (
    latent_statistics,
    qwen3_vl_config,
    qwen_vl_processor,
    qwen_vl_tokenizer,
)

_CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}"""


def _transformer() -> object:
    from diffusers import QwenImage21Transformer2DModel

    return QwenImage21Transformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        context_in_dim=TEXT_HIDDEN,
        axes_dims_rope=(4, 6, 6),
    )


def _vae() -> object:
    from diffusers import AutoencoderKLQwenImage21

    return AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        **latent_statistics(LATENT_CHANNELS),
    )


def _components() -> dict[str, object]:
    from transformers import Qwen3VLForConditionalGeneration

    tokenizer = qwen_vl_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=1.0, dynamic_shifting=True),
        "processor": qwen_vl_processor(tokenizer, _CHAT_TEMPLATE),
        "transformer": _transformer(),
        "vae": _vae(),
        "text_encoder": Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, layers=4)),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=("attn.norm_q.weight", "attn.norm_k.weight"),  # few of the tokens are text
)
