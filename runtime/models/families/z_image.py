"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan


def _region(stack: str) -> SequenceRegion:
    return SequenceRegion(
        enter=f"{stack}.0",
        segments=("x",),
        shard_like={"freqs_cis": "x"},
        within=f"{stack}.*",
        leave=f"{stack}.-1",
        gathers="x",
    )


STACKS = ("noise_refiner", "context_refiner", "layers")

SPEC = ModelSpec(
    family="z-image",
    pipeline="ZImagePipeline",
    transformer="ZImageTransformer2DModel",
    block_stacks=STACKS,
    tensor_plan=TensorPlan(
        linears={
            name: style
            for stack in STACKS
            for name, style in (
                *attention_plan(f"{stack}.*.attention", ("to_q", "to_k", "to_v"), ("to_out.0",)).items(),
                (f"{stack}.*.feed_forward.w1", COLUMN),
                (f"{stack}.*.feed_forward.w3", COLUMN),
                (f"{stack}.*.feed_forward.w2", ROW),
            )
        },
        head_count="n_heads",
        heads={f"{stack}.*.attention": ("heads",) for stack in STACKS},
    ),
    regions=tuple(_region(stack) for stack in STACKS),
    branches="batch",
    steps=9,
    published=(Published("Z-Image-Turbo", 6.155e9, {"axes_lens": [1536, 512, 512]}),),
)
