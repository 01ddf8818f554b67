"""Wan 2.1, and Wan 2.2 with one transformer or two."""

from __future__ import annotations

from functools import partial
from typing import Any

from crossdock.parallel.regions import Follow, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan
from crossdock.runtime.tiny.parts import HEAD_DIM, HEADS, LATENT_CHANNELS, TEXT_HIDDEN, TinyRecipe
from crossdock.runtime.tiny.t5 import t5_sizes, t5_tokenizer

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
            follow={"rotary_emb": Follow("hidden_states", 1), "temb": Follow("hidden_states", 1, ndim=4)},
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


def _transformer(channels: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_HIDDEN,
        freq_dim=48,
        ffn_dim=216,
        num_layers=5,
    )


def _vae(channels: int, **options: Any) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        num_res_blocks=1,
        latents_mean=[0.1 * (channel - 3) for channel in range(channels)],
        latents_std=[1.0 + 0.1 * channel for channel in range(channels)],
        **options,
    )


def _components(channels: int = LATENT_CHANNELS, two: bool = False, **vae: Any) -> dict[str, Any]:
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(UMT5Config(**t5_sizes(len(tokenizer)))),
        "vae": _vae(channels, **vae),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "transformer": _transformer(channels),
        "transformer_2": _transformer(channels) if two else None,
    }


_OUTPUTS = ("proj_out.weight",)
_SHARP = ("attn2.norm_q.weight", "attn2.norm_k.weight")  # 512 text tokens, most of them padding

TINY = {
    "wan2.1": TinyRecipe(_components, outputs=_OUTPUTS, sharp=_SHARP),
    "wan2.2-ti2v-5b": TinyRecipe(
        partial(
            _components,
            channels=9,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            is_residual=True,
            scale_factor_spatial=16,
            decoder_base_dim=12,
        ),
        outputs=_OUTPUTS,
        options={"expand_timesteps": True},
        sharp=_SHARP,
    ),
    "wan2.2-a14b": TinyRecipe(
        partial(_components, two=True), outputs=_OUTPUTS, options={"boundary_ratio": 0.875}, sharp=_SHARP
    ),
}
