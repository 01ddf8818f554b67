"""Qwen-Image, and Qwen-Image-2512."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import Follow, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan
from crossdock.runtime.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
)
from crossdock.runtime.tiny.qwen_vl import qwen25_vl_config, qwen_image_vae, qwen_vl_tokenizer

BLOCKS = "transformer_blocks.*"
TEXT, IMAGE = "encoder_hidden_states", "hidden_states"

SPEC = ModelSpec(
    family="qwen-image",
    pipeline="QwenImagePipeline",
    transformer="QwenImageTransformer2DModel",
    block_stacks=("transformer_blocks",),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan(
                f"{BLOCKS}.attn",
                ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
                ("to_out.0", "to_add_out"),
            ),
            f"{BLOCKS}.img_mlp.net.0.proj": COLUMN,
            f"{BLOCKS}.img_mlp.net.2": ROW,
            f"{BLOCKS}.txt_mlp.net.0.proj": COLUMN,
            f"{BLOCKS}.txt_mlp.net.2": ROW,
        },
        head_count="num_attention_heads",  # no module's `heads` is cut: the processor divides a whole width by it
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(TEXT, IMAGE),
            within=BLOCKS,
            follow={
                "image_rotary_emb": (Follow(IMAGE, 0), Follow(TEXT, 0)),
                "modulate_index": Follow(IMAGE, 1),
            },
            padding={"encoder_hidden_states_mask": TEXT},
            leave="proj_out",
            gathers=IMAGE,
        ),
    ),
    branches="calls",
    guidance="true_cfg_scale",
    published=(Published("Qwen-Image", 20.430e9), Published("Qwen-Image-2512", 20.430e9)),
)


def _transformer() -> Any:
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


def _components() -> dict[str, Any]:
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
