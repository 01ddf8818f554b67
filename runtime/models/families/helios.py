"""Helios: a video chunk by chunk, each with those before it in sight, the older the coarser."""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

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
            shard_like={"rotary_emb": ShardLike(TOKENS, 1), "temb": ShardLike(TOKENS, 1, ndim=4)},
            leave="blocks.-1",
            gathers=TOKENS,
            cross=("blocks.*.attn2",),
        ),
    ),
    branches="calls",
    fps=24,
    chunk_frames=33,
    resumes=False,  # the loop carries the chunks that are done
    size=(640, 384),
    published=(Published("Helios-Base", 14_312_427_584),),
)
