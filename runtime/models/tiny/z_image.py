"""The tiny recipe of Z-Image."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import (
    HEADS,
    HIDDEN,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
    qwen3_config,
    qwen_tokenizer,
)


def _transformer() -> object:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=HIDDEN,
        n_layers=5,
        n_refiner_layers=2,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_HIDDEN,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 128, 128],
    )


def _components() -> dict[str, object]:
    from transformers import Qwen3Model

    tokenizer = qwen_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=False),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": kl_vae(),
        "text_encoder": Qwen3Model(qwen3_config(len(tokenizer), layers=6)),
    }


TINY = TinyRecipe(_components, outputs=("all_final_layer.2-1.linear.weight",))
