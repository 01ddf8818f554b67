"""Helios: a video chunk by chunk, each with those before it in sight, the older the coarser."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import Follow, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan
from crossdock.runtime.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, TinyRecipe
from crossdock.runtime.tiny.t5 import t5_sizes, t5_tokenizer

TOKENS = ("hidden_states", "original_context_length")
"""Those of the chunks before, then those of this one; a block is told how many these are."""
ATTENTION = ("blocks.*.attn1", "blocks.*.attn2")

SPEC = ModelSpec(
    family="helios",
    pipeline="HeliosPipeline",
    transformer="HeliosTransformer3DModel",
    block_stacks=("blocks",),
    tensor_plan=TensorPlan(
        linears={
            linear: style
            for name in ATTENTION
            for linear, style in attention_plan(name, ("to_q", "to_k", "to_v"), ("to_out.0",)).items()
        }
        | {"blocks.*.ffn.net.0.proj": COLUMN, "blocks.*.ffn.net.2": ROW},
        head_count="num_attention_heads",
        heads=dict.fromkeys(ATTENTION, ("heads",)),
        norms=tuple(f"{name}.{norm}" for name in ATTENTION for norm in ("norm_q", "norm_k")),
    ),
    regions=(
        SequenceRegion(
            enter="blocks.0",
            segments=TOKENS,
            within="blocks.*",
            follow={"rotary_emb": Follow(TOKENS, 1), "temb": Follow(TOKENS, 1, ndim=4)},
            leave="blocks.-1",
            gathers=TOKENS,
            cross=("blocks.*.attn2",),
        ),
    ),
    branches="calls",
    fps=24,
    chunk_frames=33,
    resumes=False,  # the loop carries the chunks that are done
    published=(Published("Helios-Base", 14_312_427_584),),
)


def _transformer() -> Any:
    from diffusers import HeliosTransformer3DModel

    return HeliosTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_HIDDEN,
        freq_dim=48,
        ffn_dim=216,
        num_layers=5,
        rope_dim=(4, 6, 6),
    )


def _vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        num_res_blocks=1,
        latents_mean=[0.1 * (channel - 3) for channel in range(LATENT_CHANNELS)],
        latents_std=[1.0 + 0.1 * channel for channel in range(LATENT_CHANNELS)],
    )


def _components() -> dict[str, Any]:
    from diffusers import HeliosScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(UMT5Config(**t5_sizes(len(tokenizer)))),
        "vae": _vae(),
        "scheduler": HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True),
        "transformer": _transformer(),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=("attn2.norm_q.weight", "attn2.norm_k.weight"),  # 512 text tokens, most of them padding
)
