"""The tiny recipe of Qwen-Image."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
)
from crossdock.runtime.models.tiny.qwen_vl import qwen25_vl_config, qwen_image_vae, qwen_vl_tokenizer


def _transformer() -> object:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=(4, 6, 6),
    )


def _components() -> dict[str, object]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_vl_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=1.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": qwen_image_vae(),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(qwen25_vl_config(tokenizer, layers=4)),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=tuple(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),  # few of the tokens are text
)
