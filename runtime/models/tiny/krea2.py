"""The tiny recipe of Krea 2."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
)
from crossdock.runtime.models.tiny.qwen_vl import qwen3_vl_config, qwen_image_vae, qwen_vl_tokenizer

_TEXT_LAYERS = (1, 3, 4, 6)


def _transformer() -> object:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 3,
        intermediate_size=256,
        timestep_embed_dim=48,
        text_hidden_dim=TEXT_HIDDEN,
        num_text_layers=len(_TEXT_LAYERS),
        text_num_attention_heads=HEADS,
        text_num_key_value_heads=HEADS,
        text_intermediate_size=192,
        axes_dims_rope=(4, 6, 6),
    )


def _components() -> dict[str, object]:
    from transformers import Qwen3VLModel

    tokenizer = qwen_vl_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=1.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": qwen_image_vae(),
        "text_encoder": Qwen3VLModel(qwen3_vl_config(tokenizer, layers=max(_TEXT_LAYERS))),
    }


TINY = TinyRecipe(
    _components,
    outputs=("final_layer.linear.weight",),
    sharp=("attn.norm_q.weight", "attn.norm_k.weight"),
    options={"text_encoder_select_layers": _TEXT_LAYERS},
)
