"""Qwen-Image, and Qwen-Image-2512."""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

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
            shard_like={
                "image_rotary_emb": (ShardLike(IMAGE, 0), ShardLike(TEXT, 0)),
                "modulate_index": ShardLike(IMAGE, 1),
            },
            padding={"encoder_hidden_states_mask": TEXT},
            leave="proj_out",
            gathers=IMAGE,
        ),
    ),
    branches="calls",
    guidance="true_cfg_scale",
    guides_with_negative=True,
    size=(1328, 1328),
    published=(Published("Qwen-Image", 20.430e9), Published("Qwen-Image-2512", 20.430e9)),
)
