"""FLUX.3 [klein] base, text to image. diffusers has its pipeline as blocks only."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import Join, SequenceRegion
from crossdock.parallel.tensor import TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, gated_block_plan
from crossdock.runtime.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, VAE_CHANNELS, TinyRecipe
from crossdock.runtime.tiny.qwen_vl import qwen3_vl_config, qwen_vl_processor, qwen_vl_tokenizer

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
            follow={"txt_ids": TEXT, "img_ids": IMAGE, "image_cond_ids": REFERENCE},
            leave="proj_out",
            gathers=IMAGE,
            joins={
                "txt_mode_blocks.*.attn": Join((TEXT,)),
                "mode_blocks.image.*.attn": Join((IMAGE,)),
                "mode_blocks.image_cond.*.attn": Join((REFERENCE,)),
            },
        ),
    ),
    branches="calls",
    guidance="guider.guidance_scale",
    batches=False,
    encode=("text_encoder",),
    published=(Published("FLUX.3-image-klein-base", 5.6e9),),
)

TAPPED = 8  # hidden states of the text encoder, the last of which is its 32nd


def _transformer(flow_map: bool) -> Any:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        cond_in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TAPPED * TEXT_HIDDEN,
        timestep_channels=48,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=flow_map,
    )


def components(flow_map: bool = False) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen3VLForConditionalGeneration

    tokenizer = qwen_vl_tokenizer()
    return {
        "tokenizer": qwen_vl_processor(tokenizer),
        "transformer": _transformer(flow_map),
        "vae": AutoencoderKLFlux2(
            block_out_channels=VAE_CHANNELS,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=12,
            sample_size=256,
        ),
        "text_encoder": Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, layers=32)),
    }


TINY = TinyRecipe(
    components, outputs=("proj_out.weight",), sharp=("attn.norm_q.weight", "attn.norm_k.weight"), sharpness=1.8
)
