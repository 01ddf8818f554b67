"""What transformers built like FLUX have in common: blocks with a text and an image branch, then blocks with one."""

from __future__ import annotations

from collections.abc import Mapping

from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorPlan
from crossdock.runtime.models.spec import SWIGLU, attention_plan

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
STACKS = (DOUBLE, SINGLE)

REGION = SequenceRegion(
    enter="",
    segments=("encoder_hidden_states", "hidden_states"),
    shard_like={"txt_ids": "encoder_hidden_states", "img_ids": "hidden_states"},
    within="",
    leave="proj_out",
    gathers="hidden_states",
)


_QKV = ("to_q", "to_k", "to_v")
_DOUBLE_ATTENTION = attention_plan(
    f"{DOUBLE}.*.attn", (*_QKV, "add_q_proj", "add_k_proj", "add_v_proj"), ("to_out.0", "to_add_out")
)
HEAD_COUNTS = {f"{stack}.*.attn": ("heads",) for stack in STACKS}


def flux1_plan(mlp_in: LinearStyle, counts: Mapping[str, tuple[str, ...]]) -> TensorPlan:
    """The single blocks have a linear each for query, key and value, and one for the way into the MLP.

    Args:
        mlp_in: of the MLPs' first linears.
        counts: what the modules go by that must become local, as in `TensorPlan.heads`.
    """
    feed_forwards = {
        name: style
        for branch in ("ff", "ff_context")
        for name, style in ((f"{DOUBLE}.*.{branch}.net.0.proj", mlp_in), (f"{DOUBLE}.*.{branch}.net.2", ROW))
    }
    return TensorPlan(
        linears={
            **_DOUBLE_ATTENTION,
            **feed_forwards,
            **{f"{SINGLE}.*.attn.{name}": COLUMN for name in _QKV},
            f"{SINGLE}.*.proj_mlp": mlp_in,
            f"{SINGLE}.*.proj_out": LinearStyle("row", parts=(1, 4)),  # of attention, and of the MLP
        },
        head_count="num_attention_heads",
        heads=counts,
    )


FLUX2_PLAN = TensorPlan(
    linears={
        **_DOUBLE_ATTENTION,
        f"{DOUBLE}.*.ff.linear_in": SWIGLU,
        f"{DOUBLE}.*.ff.linear_out": ROW,
        f"{DOUBLE}.*.ff_context.linear_in": SWIGLU,
        f"{DOUBLE}.*.ff_context.linear_out": ROW,
        f"{SINGLE}.*.attn.to_qkv_mlp_proj": LinearStyle("column", "_tp_packed_col_blocks"),
        f"{SINGLE}.*.attn.to_out": LinearStyle("row", "_tp_packed_row_blocks"),
    },
    head_count="num_attention_heads",
)
