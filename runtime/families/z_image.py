"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan
from crossdock.runtime.tiny.parts import (
    HEADS,
    HIDDEN,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
    qwen3_config,
    qwen_tokenizer,
)


def _region(stack: str) -> SequenceRegion:
    return SequenceRegion(
        enter=f"{stack}.0",
        segments=("x",),
        follow={"freqs_cis": "x"},
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
    published=(Published("Z-Image-Turbo", 6.155e9, {"axes_lens": [1536, 512, 512]}),),
)


def _transformer() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=HIDDEN,
        n_layers=5,
        n_refiner_layers=2,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_HIDDEN,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 128, 128],
    )


def _components() -> dict[str, Any]:
    from transformers import Qwen3Model

    tokenizer = qwen_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=False),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": kl_vae(),
        "text_encoder": Qwen3Model(qwen3_config(len(tokenizer), layers=6)),
    }


TINY = TinyRecipe(_components, outputs=("all_final_layer.2-1.linear.weight",))
