"""FLUX.2 [klein], 4B and 9B."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import ROW, LinearStyle, TensorPlan
from crossdock.runtime.specs import SWIGLU, ModelSpec, Published, attention_plan
from crossdock.runtime.tiny_parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    VAE_CHANNELS,
    TinyRecipe,
    flow_scheduler,
    qwen3_config,
    qwen_tokenizer,
)

SPEC = ModelSpec(
    family="flux2-klein",
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    block_stacks=("transformer_blocks", "single_transformer_blocks"),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan(
                "transformer_blocks.*.attn",
                ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
                ("to_out.0", "to_add_out"),
            ),
            "transformer_blocks.*.ff.linear_in": SWIGLU,
            "transformer_blocks.*.ff.linear_out": ROW,
            "transformer_blocks.*.ff_context.linear_in": SWIGLU,
            "transformer_blocks.*.ff_context.linear_out": ROW,
            "single_transformer_blocks.*.attn.to_qkv_mlp_proj": LinearStyle("column", "_tp_packed_col_blocks"),
            "single_transformer_blocks.*.attn.to_out": LinearStyle("row", "_tp_packed_row_blocks"),
        },
        head_count="num_attention_heads",
    ),
    regions=(
        SequenceRegion(
            enter="",
            segments=("encoder_hidden_states", "hidden_states"),
            follow={"txt_ids": "encoder_hidden_states", "img_ids": "hidden_states"},
            within="",
            leave="proj_out",
            gathers="hidden_states",
        ),
    ),
    branches="calls",
    published=(
        Published(
            "FLUX.2-klein-4B",
            3.876e9,
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        Published(
            "FLUX.2-klein-9B",
            9.079e9,
            {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
        ),
    ),
)


def _transformer() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * TEXT_HIDDEN,  # the pipeline joins three hidden states of the text encoder
        timestep_guidance_channels=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=12,
        sample_size=256,
    )


def _components() -> dict[str, Any]:
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(qwen3_config(len(tokenizer), layers=28))  # hidden states 9, 18 and 27 are read
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": _vae(),
        "text_encoder": encoder,
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    options={"is_distilled": False},  # guidance works in the undistilled one only
    sharp=tuple(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k")),  # 512 tokens, most padding
)
