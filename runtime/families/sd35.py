"""Stable Diffusion 3.5, large and medium."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import Join, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan
from crossdock.runtime.tiny.clip import clip_text_config, clip_tokenizer
from crossdock.runtime.tiny.parts import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
)
from crossdock.runtime.tiny.t5 import t5_sizes, t5_tokenizer

BLOCKS = "transformer_blocks.*"
TEXT, IMAGE = "encoder_hidden_states", "hidden_states"
_QKV = ("to_q", "to_k", "to_v")

SPEC = ModelSpec(
    family="sd3.5",
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    block_stacks=("transformer_blocks",),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan(
                f"{BLOCKS}.attn", (*_QKV, "add_q_proj", "add_k_proj", "add_v_proj"), ("to_out.0", "to_add_out?")
            ),
            **attention_plan(f"{BLOCKS}.attn2", ("to_q?", "to_k?", "to_v?"), ("to_out.0?",)),
            f"{BLOCKS}.ff.net.0.proj": COLUMN,
            f"{BLOCKS}.ff.net.2": ROW,
            f"{BLOCKS}.ff_context.net.0.proj?": COLUMN,  # the last block has none
            f"{BLOCKS}.ff_context.net.2?": ROW,
        },
        head_count="num_attention_heads",
        heads={f"{BLOCKS}.attn": ("heads",), f"{BLOCKS}.attn2?": ("heads",)},
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(IMAGE, TEXT),
            leave="proj_out",
            gathers=IMAGE,
            joins={f"{BLOCKS}.attn2?": Join((IMAGE,))},
        ),
    ),
    branches="batch",
    encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    published=(
        Published(
            "Stable-Diffusion-3.5-large",
            8.150e9,
            {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
        ),
        Published(
            "Stable-Diffusion-3.5-medium",
            2.470e9,
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
                "qk_norm": "rms_norm",
                "dual_attention_layers": list(range(13)),
            },
        ),
    ),
)

_CLIP_HIDDEN = (24, 40)  # side by side they are narrower than what the third encoder gives


def _transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_HIDDEN,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=sum(_CLIP_HIDDEN),
        pos_embed_max_size=20,
        dual_attention_layers=(0, 1, 2),
        qk_norm="rms_norm",
    )


def _components() -> dict[str, Any]:
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip, t5 = clip_tokenizer(), t5_tokenizer()
    encoders = (CLIPTextModelWithProjection(clip_text_config(clip, hidden)) for hidden in _CLIP_HIDDEN)
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=False),
        "tokenizer": clip,
        "tokenizer_2": clip,
        "tokenizer_3": t5,
        "transformer": _transformer(),
        "vae": kl_vae(),
        "text_encoder": next(encoders),
        "text_encoder_2": next(encoders),
        "text_encoder_3": T5EncoderModel(T5Config(**t5_sizes(len(t5)))),
    }


TINY = TinyRecipe(
    _components,
    # guidance by 7 enlarges what text does to every block at once, through the pooled half of it
    outputs=("proj_out.weight", "time_text_embed.text_embedder.linear_2.weight"),
)
