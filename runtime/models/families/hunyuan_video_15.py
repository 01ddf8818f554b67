"""HunyuanVideo 1.5, text to video."""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

SPEC = ModelSpec(
    family="hunyuan-video-1.5",
    pipeline="HunyuanVideo15Pipeline",
    transformer="HunyuanVideo15Transformer3DModel",
    block_stacks=("transformer_blocks",),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan(
                "transformer_blocks.*.attn",
                ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
                ("to_out.0", "to_add_out"),
            ),
            "transformer_blocks.*.ff.net.0.proj": COLUMN,
            "transformer_blocks.*.ff.net.2": ROW,
            "transformer_blocks.*.ff_context.net.0.proj": COLUMN,
            "transformer_blocks.*.ff_context.net.2": ROW,
        },
        head_count="num_attention_heads",
        heads={"transformer_blocks.*.attn": ("heads",)},
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=("hidden_states", "encoder_hidden_states"),
            shard_like={"freqs_cis": ShardLike("hidden_states", 0)},
            within="transformer_blocks.*",
            leave="proj_out",
            gathers="hidden_states",
            padding={"attention_mask": "encoder_hidden_states"},
        ),
    ),
    branches="calls",
    guidance="guider.guidance_scale",
    batches=False,  # its decoder's mask has one row of a batch (diffusers 0.42.1)
    encoders=("text_encoder", "text_encoder_2"),
    patch=1,
    fps=24,
    size=(848, 480),
    published=(Published("HunyuanVideo-1.5-480p_t2v", 8_326_608_160, {"task_type": "t2v"}),),
)
