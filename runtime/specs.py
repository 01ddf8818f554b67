"""Model families, as data. Nothing else in the code knows a model's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorPlan

if TYPE_CHECKING:
    from crossdock.runtime.inferred_spec import InferredSpec


@dataclass(frozen=True)
class ModelSpec:
    """What crossdock knows of a family.

    Attributes:
        family: the name on the command line.
        pipeline: diffusers pipeline class, as in model_index.json.
        transformer: diffusers class of the streamed transformer.
        block_stacks: paths of the module lists of transformer blocks, in execution order.
        tensor_plan: which linears tensor parallelism cuts.
        regions: where tokens are cut and put together under sequence parallelism.
        vae_input: how the latents that the pipeline returns become the VAE decoder's input.
    """

    family: str
    pipeline: str
    transformer: str
    block_stacks: tuple[str, ...]
    tensor_plan: TensorPlan
    regions: tuple[SequenceRegion, ...]
    vae_input: Literal["as_is", "scale_and_shift"]

    @classmethod
    def from_model(cls, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> InferredSpec:
        """What a live transformer, which may be on meta, says of itself; see `inferred_spec.infer_spec`."""
        from crossdock.runtime.inferred_spec import infer_spec

        return infer_spec(model, inputs)


def _attention_plan(attention: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> dict[str, LinearStyle]:
    return {f"{attention}.{name}": COLUMN for name in inputs} | {f"{attention}.{name}": ROW for name in outputs}


_SWIGLU = LinearStyle("column", parts=(1, 1))  # the gate and the up half of one projection

FLUX2_KLEIN = ModelSpec(
    family="flux2-klein",
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    block_stacks=("transformer_blocks", "single_transformer_blocks"),
    tensor_plan=TensorPlan(
        linears={
            **_attention_plan(
                "transformer_blocks.*.attn",
                ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
                ("to_out.0", "to_add_out"),
            ),
            "transformer_blocks.*.ff.linear_in": _SWIGLU,
            "transformer_blocks.*.ff.linear_out": ROW,
            "transformer_blocks.*.ff_context.linear_in": _SWIGLU,
            "transformer_blocks.*.ff_context.linear_out": ROW,
            "single_transformer_blocks.*.attn.to_qkv_mlp_proj": LinearStyle("column", "_tp_packed_col_blocks"),
            "single_transformer_blocks.*.attn.to_out": LinearStyle("row", "_tp_packed_row_blocks"),
        },
        head_count="num_attention_heads",
    ),
    regions=(
        SequenceRegion(
            enter="",
            segments=("encoder_hidden_states", "hidden_states"),
            follow={"txt_ids": "encoder_hidden_states", "img_ids": "hidden_states"},
            within="",
            leave="proj_out",
            gathers="hidden_states",
        ),
    ),
    vae_input="as_is",
)


def _z_image_region(stack: str) -> SequenceRegion:
    return SequenceRegion(
        enter=f"{stack}.0",
        segments=("x",),
        follow={"freqs_cis": "x"},
        within=f"{stack}.*",
        leave=f"{stack}.-1",
        gathers="x",
    )


Z_IMAGE_STACKS = ("noise_refiner", "context_refiner", "layers")

Z_IMAGE = ModelSpec(
    family="z-image",
    pipeline="ZImagePipeline",
    transformer="ZImageTransformer2DModel",
    block_stacks=Z_IMAGE_STACKS,
    tensor_plan=TensorPlan(
        linears={
            name: style
            for stack in Z_IMAGE_STACKS
            for name, style in (
                *_attention_plan(f"{stack}.*.attention", ("to_q", "to_k", "to_v"), ("to_out.0",)).items(),
                (f"{stack}.*.feed_forward.w1", COLUMN),
                (f"{stack}.*.feed_forward.w3", COLUMN),
                (f"{stack}.*.feed_forward.w2", ROW),
            )
        },
        head_count="n_heads",
        heads=tuple(f"{stack}.*.attention" for stack in Z_IMAGE_STACKS),
    ),
    regions=tuple(_z_image_region(stack) for stack in Z_IMAGE_STACKS),
    vae_input="scale_and_shift",
)

SPECS: Mapping[str, ModelSpec] = {spec.family: spec for spec in (FLUX2_KLEIN, Z_IMAGE)}


def spec_of_pipeline(pipeline: str) -> ModelSpec | None:
    return next((spec for spec in SPECS.values() if spec.pipeline == pipeline), None)
