"""The tiny recipe of Ovis-Image."""

from __future__ import annotations

from crossdock.runtime.models.tiny.flux_blocks import QUERY_KEY_NORMS
from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
    qwen3_config,
    qwen_tokenizer,
)


def _transformer() -> object:
    from diffusers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_HIDDEN,
        axes_dims_rope=(4, 6, 6),
    )


def _components() -> dict[str, object]:
    from transformers import Qwen3Model

    tokenizer = qwen_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": kl_vae(),
        "text_encoder": Qwen3Model(qwen3_config(len(tokenizer), layers=6)),
    }


TINY = TinyRecipe(_components, outputs=("proj_out.weight",), sharp=QUERY_KEY_NORMS)
