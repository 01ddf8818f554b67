"""Krea 2, Raw and Turbo."""

from __future__ import annotations

from typing import Any

from crossdock.parallel.regions import Follow, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan
from crossdock.runtime.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, TinyRecipe, flow_scheduler
from crossdock.runtime.tiny.qwen_vl import qwen3_vl_config, qwen_image_vae, qwen_vl_tokenizer

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
            follow={"image_rotary_emb": Follow("hidden_states", 0)},
            leave="transformer_blocks.-1",
            gathers="hidden_states",
        ),
    ),
    branches="calls",
    published=(Published("Krea-2-Raw", 12.820e9), Published("Krea-2-Turbo", 12.820e9)),
)

_TEXT_LAYERS = (1, 3, 4, 6)


def _transformer() -> Any:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 3,
        intermediate_size=256,
        timestep_embed_dim=48,
        text_hidden_dim=TEXT_HIDDEN,
        num_text_layers=len(_TEXT_LAYERS),
        text_num_attention_heads=HEADS,
        text_num_key_value_heads=HEADS,
        text_intermediate_size=192,
        axes_dims_rope=(4, 6, 6),
    )


def _components() -> dict[str, Any]:
    from transformers import Qwen3VLModel

    tokenizer = qwen_vl_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=1.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": qwen_image_vae(),
        "text_encoder": Qwen3VLModel(qwen3_vl_config(tokenizer, layers=max(_TEXT_LAYERS))),
    }


TINY = TinyRecipe(
    _components,
    outputs=("final_layer.linear.weight",),
    sharp=("attn.norm_q.weight", "attn.norm_k.weight"),
    options={"text_encoder_select_layers": _TEXT_LAYERS},
)
