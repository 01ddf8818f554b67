"""Stable Diffusion 3.5, large and medium."""

from __future__ import annotations

from crossdock.parallel.regions import AttentionScope, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

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
            scopes={f"{BLOCKS}.attn2?": AttentionScope((IMAGE,))},
        ),
    ),
    branches="batch",
    encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    steps=28,
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
