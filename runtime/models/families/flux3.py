"""FLUX.3 [klein] base, text to image. diffusers has its pipeline as blocks only."""

from __future__ import annotations

from crossdock.parallel.regions import AttentionScope, SequenceRegion
from crossdock.parallel.tensor import TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, gated_block_plan

TEXT, IMAGE, REFERENCE = "encoder_hidden_states", "hidden_states", "image_cond_hidden_states"
BLOCKS = ("txt_mode_blocks.*", "mode_blocks.*.*", "single_transformer_blocks.*")


SPEC = ModelSpec(
    family="flux3",
    pipeline="Flux3ModularPipeline",
    transformer="Flux3Transformer2DModel",
    block_stacks=("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond", "single_transformer_blocks"),
    tensor_plan=TensorPlan(
        linears={
            linear: style
            for name in BLOCKS
            for linear, style in gated_block_plan(name, "ff.linear_in", "ff.linear_out").items()
        },
        head_count="num_attention_heads",
        heads={f"{name}.attn": ("heads",) for name in BLOCKS},
    ),
    regions=(
        SequenceRegion(
            enter="",
            segments=(TEXT, IMAGE, REFERENCE),
            shard_like={"txt_ids": TEXT, "img_ids": IMAGE, "image_cond_ids": REFERENCE},
            leave="proj_out",
            gathers=IMAGE,
            scopes={
                "txt_mode_blocks.*.attn": AttentionScope((TEXT,)),
                "mode_blocks.image.*.attn": AttentionScope((IMAGE,)),
                "mode_blocks.image_cond.*.attn": AttentionScope((REFERENCE,)),
            },
        ),
    ),
    branches="calls",
    guidance="guider.guidance_scale",
    batches=False,
    encode=("text_encoder",),
    published=(Published("FLUX.3-image-klein-base", 5.6e9),),
)
