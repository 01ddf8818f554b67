"""The tiny recipe of HunyuanVideo 1.5."""

from __future__ import annotations

from crossdock.runtime.models.tiny.parts import (
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    qwen_tokenizer,
)
from crossdock.runtime.models.tiny.t5 import t5_sizes

_HEAD_DIM = 12
_SEEN = tuple(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k"))  # among some 500 text tokens


def _transformer() -> object:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,  # beside the latents those of a first frame, and where there is one
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=_HEAD_DIM,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        text_embed_dim=TEXT_HIDDEN,
        text_embed_2_dim=TEXT_HIDDEN,
        image_embed_dim=12,
        rope_axes_dim=(4, 4, 4),
        task_type="t2v",
    )


def _vae() -> object:
    from diffusers import AutoencoderKLHunyuanVideo15

    return AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS, block_out_channels=(6, 12, 12, 24, 24), layers_per_block=1
    )


def _text_encoder(vocab_size: int) -> object:
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    head_dim = TEXT_HIDDEN // HEADS
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=vocab_size,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=TEXT_HIDDEN,
            intermediate_size=120,
            num_hidden_layers=4,  # what the last but two gives is read
            max_window_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 3,
            max_position_embeddings=2048,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 6] * 3,
            },
            dtype="float32",
        )
    )


def _components() -> dict[str, object]:
    from diffusers import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer, bytes_tokenizer = qwen_tokenizer(), ByT5Tokenizer(extra_ids=4)
    return {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(len(tokenizer)),
        "tokenizer_2": bytes_tokenizer,
        "text_encoder_2": T5EncoderModel(T5Config(**t5_sizes(len(bytes_tokenizer)))),
        "transformer": _transformer(),
        "vae": _vae(),
        "scheduler": flow_scheduler(shift=5.0, dynamic_shifting=False),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=_SEEN,
)
