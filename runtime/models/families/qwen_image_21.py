"""Qwen-Image 2.1."""

from __future__ import annotations

from crossdock.parallel.regions import HeadScatter, SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

BLOCKS = "transformer_blocks.*"
QKV = ("to_q", "to_k", "to_v")

SPEC = ModelSpec(
    family="qwen-image-2.1",
    pipeline="QwenImage21Pipeline",
    transformer="QwenImage21Transformer2DModel",
    block_stacks=("transformer_blocks",),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan(f"{BLOCKS}.attn", QKV, ("to_out.0",)),
            f"{BLOCKS}.img_mlp.proj": COLUMN,
            f"{BLOCKS}.img_mlp.gate_layer": COLUMN,
            f"{BLOCKS}.img_mlp.out": ROW,
        },
        head_count="num_attention_heads",  # no module's `heads` is cut: the processor divides a whole width by it
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=("hidden_states",),  # text, then the picture; of later steps the picture only, for text is cached
            within=BLOCKS,
            shard_like={"target_token_mask": ShardLike("hidden_states", 0)},
            head_scatters={f"{BLOCKS}.attn": HeadScatter(QKV, ("to_out.0",))},
            leave="transformer_blocks.-1",
            gathers="hidden_states",
        ),
    ),
    branches="calls",
    guidance="true_cfg_scale",
    guides_with_negative=True,
    steps=40,
    published=(Published("Qwen-Image-2.1", 7.115e9),),
)
