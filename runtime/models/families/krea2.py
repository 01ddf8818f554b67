"""Krea 2, Raw and Turbo."""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

BLOCKS = "transformer_blocks.*"

SPEC = ModelSpec(
    family="krea2",
    pipeline="Krea2Pipeline",
    transformer="Krea2Transformer2DModel",
    block_stacks=("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks", "transformer_blocks"),
    tensor_plan=TensorPlan(
        linears={
            **attention_plan(f"{BLOCKS}.attn", ("to_q", "to_k", "to_v", "to_gate"), ("to_out.0",)),
            f"{BLOCKS}.ff.gate": COLUMN,
            f"{BLOCKS}.ff.up": COLUMN,
            f"{BLOCKS}.ff.down": ROW,
        },
        head_count="num_attention_heads",
        heads={f"{BLOCKS}.attn": ("num_heads", "num_kv_heads")},
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=("hidden_states",),  # text, then the picture
            within=BLOCKS,
            shard_like={"image_rotary_emb": ShardLike("hidden_states", 0)},
            leave="transformer_blocks.-1",
            gathers="hidden_states",
        ),
    ),
    branches="calls",
    steps=28,
    published=(Published("Krea-2-Raw", 12.820e9), Published("Krea-2-Turbo", 12.820e9)),
)
