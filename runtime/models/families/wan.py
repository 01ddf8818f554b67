"""Wan 2.1, and Wan 2.2 with one transformer or two."""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

SPEC = ModelSpec(
    family="wan",
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    block_stacks=("blocks",),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan("blocks.*.attn1", ("to_q", "to_k", "to_v"), ("to_out.0",)),
            **attention_plan("blocks.*.attn2", ("to_q", "to_k", "to_v"), ("to_out.0",)),
            "blocks.*.ffn.net.0.proj": COLUMN,
            "blocks.*.ffn.net.2": ROW,
        },
        head_count="num_attention_heads",
        heads={"blocks.*.attn1": ("heads",), "blocks.*.attn2": ("heads",)},
        norms=tuple(f"blocks.*.{attention}.norm_{name}" for attention in ("attn1", "attn2") for name in ("q", "k")),
    ),
    regions=(
        SequenceRegion(
            enter="blocks.0",
            segments=("hidden_states",),
            shard_like={"rotary_emb": ShardLike("hidden_states", 1), "temb": ShardLike("hidden_states", 1, ndim=4)},
            within="blocks.*",
            leave="blocks.-1",
            gathers="hidden_states",
            cross=("blocks.*.attn2",),
        ),
    ),
    branches="calls",
    transformers=("transformer", "transformer_2"),
    fps=16,
    fps_with={"expand_timesteps": 24},  # the 5B model of Wan 2.2
    size=(832, 480),
    published=(
        Published("Wan2.1-T2V-14B", 14_288_491_584),
        Published("Wan2.1-T2V-1.3B", 1_418_996_800, {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}),
        Published(
            "Wan2.2-TI2V-5B",
            4_999_787_712,
            {"ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30},
        ),
        Published("Wan2.2-T2V-A14B", 2 * 14_288_491_584, transformers=2),
    ),
)
