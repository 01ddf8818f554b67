"""Every transformer class of the field, small, with its inputs, its TP plan and its sequence regions.

Small, but with what matters: text and image lengths that do not divide, padded text, a conditioning per token, gates,
fewer key heads than heads, tables per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import COLUMN, TensorPlan
from crossdock.runtime.models.families import SPECS

IMAGE = "hidden_states"


@dataclass(frozen=True)
class Case:
    """`make` gives the model, `inputs` what it is called with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    plan: TensorPlan
    regions: tuple[SequenceRegion, ...]


def specified(family: str, make: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], /, **more: Any) -> Case:
    """With the plan and the regions of the family's spec.

    Args:
        more: fields of the plan -> what layers need that its published checkpoints do not have.
    """
    spec = SPECS[family]
    plan = spec.tensor_plan
    for name, own in more.items():
        kept = getattr(plan, name)
        plan = replace(plan, **{name: kept | own if isinstance(own, Mapping) else (*kept, *own)})
    return Case(make, inputs, plan, spec.regions)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def grid(*sizes: int, axes: int) -> Tensor:
    """Positions `[tokens, axes]` on a grid; the axes that it has not are 0."""
    found = torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"), -1).flatten(0, -2)
    return torch.cat([found.new_zeros(len(found), axes - len(sizes)), found], 1).double()


def real(*lengths: int, total: int) -> Tensor:
    """Padded text: the first tokens of each item are real."""
    return torch.arange(total) < torch.tensor(lengths)[:, None]


# -- FLUX ------------------------------------------------------------------------------------------------------------

FLUX_SIZE: dict[str, Any] = {
    "in_channels": 8,
    "attention_head_dim": 12,
    "num_attention_heads": 4,
    "joint_attention_dim": 20,
    "num_layers": 2,
    "num_single_layers": 2,
}


def flux_inputs(axes: int = 3, **more: Any) -> dict[str, Any]:
    tokens = {"hidden_states": randn(2, 15, 8), "encoder_hidden_states": randn(2, 7, 20)}
    where = {"img_ids": grid(3, 5, axes=axes), "txt_ids": grid(7, axes=axes)}
    return {**tokens, **where, "timestep": torch.tensor([0.7, 0.2], dtype=torch.float64), **more}


FLUX = specified(
    "flux1",
    lambda: diffusers.FluxTransformer2DModel(
        **FLUX_SIZE, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 4)
    ),
    lambda: flux_inputs(pooled_projections=randn(2, 16), guidance=torch.full((2,), 3.5, dtype=torch.float64)),
)


def make_flux3() -> nn.Module:
    return diffusers.Flux3Transformer2DModel(**FLUX_SIZE, cond_in_channels=8, axes_dims_rope=(2, 4, 4, 2))


FLUX3 = specified("flux3", make_flux3, lambda: flux_inputs(axes=4))
FLUX3_EDIT = specified(
    "flux3",
    make_flux3,
    lambda: flux_inputs(axes=4, image_cond_hidden_states=randn(2, 9, 8), image_cond_ids=grid(3, 3, axes=4) + 7),
)
LONGCAT = specified(
    "longcat-image",
    lambda: diffusers.LongCatImageTransformer2DModel(**FLUX_SIZE, pooled_projection_dim=16, axes_dims_rope=[4, 4, 4]),
    flux_inputs,
)
OVIS = specified(
    "ovis-image",
    lambda: diffusers.OvisImageTransformer2DModel(**FLUX_SIZE, out_channels=8, axes_dims_rope=(4, 4, 4)),
    flux_inputs,
)

# -- Qwen-Image, Stable Diffusion, Krea ------------------------------------------------------------------------------

QWEN_IMAGE = specified(
    "qwen-image",
    lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=20,
        axes_dims_rope=(4, 4, 4),
        zero_cond_t=True,
    ),
    lambda: {
        "hidden_states": randn(2, 15 + 4, 8),
        "encoder_hidden_states": randn(2, 7, 20),
        "encoder_hidden_states_mask": real(7, 3, total=7),
        "timestep": torch.tensor([0.7, 0.2], dtype=torch.float64),
        "img_shapes": [[(1, 3, 5), (1, 2, 2)]] * 2,
    },
)

QWEN_IMAGE_21 = specified(
    "qwen-image-2.1",
    lambda: diffusers.QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        context_in_dim=20,
        axes_dims_rope=(4, 4, 4),
    ),
    # text, a condition image of 2 x 2 slots of 4 tokens, text, and the target image of 2 x 3 slots; padded text
    lambda: {
        "hidden_states": randn(2, 16 + 24, 8),
        "encoder_hidden_states": randn(2, 3 + 4 + 4, 20),
        "timestep": torch.tensor([0.7, 0.2], dtype=torch.float64),
        "img_shapes": [[(1, 4, 4), (1, 4, 6)]] * 2,
        "img_mask": torch.tensor([[0] * 3 + [1] * 4 + [0] * 4 + [1] * 6] * 2).bool(),
        "encoder_hidden_states_mask": real(11, 9, total=11),
    },
)

SD3 = specified(
    "sd3.5",
    lambda: diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=4,
        joint_attention_dim=20,
        caption_projection_dim=48,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ),
    lambda: {
        "hidden_states": randn(2, 4, 6, 10),
        "encoder_hidden_states": randn(2, 7, 20),
        "pooled_projections": randn(2, 16),
        "timestep": torch.tensor([700.0, 200.0], dtype=torch.float64),
    },
)

KREA2 = specified(
    "krea2",
    lambda: diffusers.Krea2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    ),
    lambda: {
        "hidden_states": randn(2, 15, 8),
        "encoder_hidden_states": randn(2, 7, 3, 24),
        "timestep": torch.tensor([0.7, 0.2], dtype=torch.float64),
        "position_ids": torch.cat([grid(7, axes=3) * 0, grid(3, 5, axes=3)]),
        "encoder_attention_mask": real(4, 7, total=7),
    },
)

# -- video -----------------------------------------------------------------------------------------------------------

WAN_SIZE: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
}


def wan_inputs(per_token: bool = False, **more: Any) -> dict[str, Any]:
    """3 frames of 2 x 3 tokens; text as long as two ranks' share of the tokens."""
    timestep = torch.tensor([700.0, 200.0], dtype=torch.float64)
    if per_token:
        timestep = torch.where(torch.arange(18) < 6, 0.0, timestep[:, None])
    return {
        "hidden_states": randn(2, 4, 3, 4, 6),
        "timestep": timestep,
        "encoder_hidden_states": randn(2, 9, 20),
        **more,
    }


WAN = specified("wan", lambda: diffusers.WanTransformer3DModel(**WAN_SIZE, rope_max_seq_len=32), wan_inputs)
WAN_TI2V = specified("wan", WAN.make, lambda: wan_inputs(per_token=True))
WAN_I2V = specified(
    "wan",
    lambda: diffusers.WanTransformer3DModel(
        **WAN_SIZE, rope_max_seq_len=32, image_dim=24, added_kv_proj_dim=48, pos_embed_seq_len=None
    ),
    # the processor takes the last 512 tokens for text
    lambda: wan_inputs() | {"encoder_hidden_states": randn(2, 512, 20), "encoder_hidden_states_image": randn(2, 9, 24)},
    linears=dict.fromkeys(("blocks.*.attn2.add_k_proj", "blocks.*.attn2.add_v_proj"), COLUMN),
    norms=("blocks.*.attn2.norm_added_k",),
)

HELIOS = specified(
    "helios",
    lambda: diffusers.HeliosTransformer3DModel(**WAN_SIZE, rope_dim=(4, 4, 4), is_amplify_history=True),
    lambda: (
        wan_inputs(timestep=torch.tensor([700.0, 200.0], dtype=torch.float64))
        | {
            "indices_hidden_states": torch.arange(5, 8).expand(2, -1),
            "indices_latents_history_short": torch.arange(3, 5).expand(2, -1),
            "indices_latents_history_mid": torch.arange(1, 3).expand(2, -1),
            "indices_latents_history_long": torch.arange(4).expand(2, -1),
            "latents_history_short": randn(2, 4, 2, 4, 6),
            "latents_history_mid": randn(2, 4, 2, 4, 6),
            "latents_history_long": randn(2, 4, 4, 4, 6),
        }
    ),
    vectors=("blocks.*.attn1.history_key_scale",),
)

HUNYUAN_VIDEO_15 = specified(
    "hunyuan-video-1.5",
    lambda: diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=20,
        text_embed_2_dim=16,
        image_embed_dim=24,
        rope_axes_dim=(4, 4, 4),
    ),
    lambda: {
        "hidden_states": randn(2, 4, 3, 4, 6),
        "timestep": torch.tensor([700.0, 200.0], dtype=torch.float64),
        "encoder_hidden_states": randn(2, 7, 20),
        "encoder_attention_mask": real(4, 7, total=7),
        "encoder_hidden_states_2": randn(2, 5, 16),
        "encoder_attention_mask_2": real(5, 2, total=5),
        "image_embeds": randn(2, 3, 24) * 0,
    },
)


def ltx2(rope: str, per_token: bool) -> Case:
    inputs = SPECS["ltx2"].tensor_plan.inputs
    if rope != "split":
        inputs = {name: dict.fromkeys(tables, -1) for name, tables in inputs.items()}  # heads are in the last dim
    steps = torch.where(torch.arange(18) < 6, 0.0, torch.tensor([[700.0], [200.0]])).double()
    return specified(
        "ltx2",
        lambda: diffusers.LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=12,
            cross_attention_dim=48,
            audio_in_channels=6,
            audio_out_channels=6,
            audio_num_attention_heads=4,
            audio_attention_head_dim=6,
            audio_cross_attention_dim=24,
            num_layers=2,
            caption_channels=20,
            rope_type=rope,
            gated_attn=per_token,
            audio_gated_attn=per_token,
        ),
        lambda: {
            "hidden_states": randn(2, 18, 8),
            "audio_hidden_states": randn(2, 5, 6),
            "encoder_hidden_states": randn(2, 9, 20),
            "audio_encoder_hidden_states": randn(2, 9, 20),
            "timestep": steps if per_token else steps[:, -1],
            "audio_timestep": steps[:, -1],
            "sigma": steps[:, -1],
            "encoder_attention_mask": real(9, 4, total=9).double(),
            "audio_encoder_attention_mask": real(9, 4, total=9).double(),
            "num_frames": 3,
            "height": 2,
            "width": 3,
            "audio_num_frames": 5,
        },
        inputs=inputs,
    )


FLUX2 = specified(
    "flux2-klein",
    lambda: diffusers.Flux2Transformer2DModel(
        **FLUX_SIZE, timestep_guidance_channels=16, axes_dims_rope=(2, 4, 4, 2), guidance_embeds=False
    ),
    lambda: flux_inputs(axes=4),
)
Z_IMAGE = specified(
    "z-image",
    lambda: diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=20,
        axes_dims=[4, 4, 4],
        axes_lens=[128, 32, 32],
    ),
    lambda: {
        "x": [randn(4, 1, 6, 10), randn(4, 1, 6, 10)],
        "t": torch.tensor([0.7, 0.2], dtype=torch.float64),
        "cap_feats": [randn(7, 20), randn(40, 20)],
    },
)
MINIMAX_H3 = specified(
    "minimax-h3",
    lambda: diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        hidden_size=40,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=48,
        in_channels=2,
        audio_in_channels=6,
        text_dim=20,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=24,
        rope_freq_dim=2,
    ),
    lambda: {
        "hidden_states": randn(2, 12, 8),
        "audio_hidden_states": randn(2, 4, 6),
        "encoder_hidden_states": randn(2, 7, 20),
        "timestep": torch.tensor([0.7, 0.0], dtype=torch.float64),
        "timestep_indices": (torch.arange(23) % 5 == 0).long(),
        "token_tags": torch.tensor([1] * 7 + [0] * 12 + [2] * 4),
        "position_ids": torch.cat([grid(7, axes=3), grid(2, 2, 3, axes=3), grid(4, axes=3)]),
        "video_indices": torch.arange(7, 19),
        "audio_indices": torch.arange(19, 23),
        "text_indices": torch.arange(7),
    },
)

CASES: Mapping[str, Case] = {
    "FLUX.1": FLUX,
    "FLUX.2": FLUX2,
    "FLUX.3": FLUX3,
    "FLUX.3, edit": FLUX3_EDIT,
    "LongCat": LONGCAT,
    "Ovis": OVIS,
    "Z-Image": Z_IMAGE,
    "Qwen-Image": QWEN_IMAGE,
    "Qwen-Image 2.1": QWEN_IMAGE_21,
    "SD 3.5": SD3,
    "Krea 2": KREA2,
    "Wan": WAN,
    "Wan TI2V": WAN_TI2V,
    "Wan I2V": WAN_I2V,
    "Helios": HELIOS,
    "HunyuanVideo 1.5": HUNYUAN_VIDEO_15,
    "LTX-2": ltx2("split", per_token=False),
    "LTX-2, per token": ltx2("split", per_token=True),
    "LTX-2, interleaved": ltx2("interleaved", per_token=True),
    "MiniMax-H3": MINIMAX_H3,
}


def build(case: Case) -> nn.Module:
    """Weights that leave no part of the model without effect."""
    torch.manual_seed(0)
    model = case.make().eval().double()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return model
