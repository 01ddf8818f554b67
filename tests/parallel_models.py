"""Every transformer class of the field, small, with its inputs, its TP plan and its sequence regions.

Small, but with what matters: text and image lengths that do not divide, padded text, a conditioning per token, gates,
fewer key heads than heads, tables per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from crossdock.parallel.regions import Deal, Follow, Join, SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorPlan
from crossdock.runtime.families import SPECS

QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
HALVES = LinearStyle("column", (1, 1))
TEXT, IMAGE = "encoder_hidden_states", "hidden_states"


@dataclass(frozen=True)
class Case:
    """`make` gives the model, `inputs` what it is called with."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    plan: TensorPlan
    regions: tuple[SequenceRegion, ...]


def attention(path: str, inputs: tuple[str, ...] = QKV, outputs: tuple[str, ...] = ("to_out.0",)) -> dict[str, Any]:
    return {f"{path}.{name}": COLUMN for name in inputs} | {f"{path}.{name}": ROW for name in outputs}


def joint(path: str, optional: str = "") -> dict[str, Any]:
    return attention(path, (*QKV, *ADDED), ("to_out.0", f"to_add_out{optional}"))


def feed_forward(path: str, style: LinearStyle = COLUMN, optional: str = "") -> dict[str, Any]:
    return {f"{path}.net.0.proj{optional}": style, f"{path}.net.2{optional}": ROW}


def plan(*linears: Mapping[str, LinearStyle], **options: Any) -> TensorPlan:
    merged = {name: style for each in linears for name, style in each.items()}
    return TensorPlan(merged, options.pop("head_count", "num_attention_heads"), **options)


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

FLUX_REGION = SequenceRegion(
    enter="", segments=(TEXT, IMAGE), follow={"txt_ids": TEXT, "img_ids": IMAGE}, leave="proj_out", gathers=IMAGE
)
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


FLUX = Case(
    lambda: diffusers.FluxTransformer2DModel(
        **FLUX_SIZE, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 4)
    ),
    lambda: flux_inputs(pooled_projections=randn(2, 16), guidance=torch.full((2,), 3.5, dtype=torch.float64)),
    plan(
        joint("transformer_blocks.*.attn"),
        feed_forward("transformer_blocks.*.ff"),
        feed_forward("transformer_blocks.*.ff_context"),
        attention("single_transformer_blocks.*.attn", outputs=()),
        {
            "single_transformer_blocks.*.proj_mlp": COLUMN,
            "single_transformer_blocks.*.proj_out": LinearStyle("row", "_tp_packed_row_blocks"),
        },
    ),
    (FLUX_REGION,),
)

FLUX3_BLOCKS = ("txt_mode_blocks.*", "mode_blocks.*.*", "single_transformer_blocks.*")
FLUX3_IMAGE = "image_cond_hidden_states"
FLUX3_PLAN = plan(
    *(attention(f"{block}.attn") for block in FLUX3_BLOCKS),
    {f"{block}.ff.linear_in": HALVES for block in FLUX3_BLOCKS},
    {f"{block}.ff.linear_out": ROW for block in FLUX3_BLOCKS},
    heads={f"{block}.attn": ("heads",) for block in FLUX3_BLOCKS},
)
FLUX3_REGION = SequenceRegion(
    enter="",
    segments=(TEXT, IMAGE, FLUX3_IMAGE),
    follow={"txt_ids": TEXT, "img_ids": IMAGE, "image_cond_ids": FLUX3_IMAGE},
    leave="proj_out",
    gathers=IMAGE,
    joins={
        "txt_mode_blocks.*.attn": Join((TEXT,)),
        "mode_blocks.image.*.attn": Join((IMAGE,)),
        "mode_blocks.image_cond.*.attn": Join((FLUX3_IMAGE,)),
    },
)


def make_flux3() -> nn.Module:
    return diffusers.Flux3Transformer2DModel(**FLUX_SIZE, cond_in_channels=8, axes_dims_rope=(2, 4, 4, 2))


FLUX3 = Case(make_flux3, lambda: flux_inputs(axes=4), FLUX3_PLAN, (FLUX3_REGION,))
FLUX3_EDIT = Case(
    make_flux3,
    lambda: flux_inputs(axes=4, image_cond_hidden_states=randn(2, 9, 8), image_cond_ids=grid(3, 3, axes=4) + 7),
    FLUX3_PLAN,
    (FLUX3_REGION,),
)


def flux_like(single: LinearStyle, halves: LinearStyle, **counts: tuple[str, ...]) -> TensorPlan:
    stacks = ("transformer_blocks", "single_transformer_blocks")
    return plan(
        joint("transformer_blocks.*.attn"),
        feed_forward("transformer_blocks.*.ff", halves),
        feed_forward("transformer_blocks.*.ff_context", halves),
        attention("single_transformer_blocks.*.attn", outputs=()),
        {
            "single_transformer_blocks.*.proj_mlp": single,
            "single_transformer_blocks.*.proj_out": LinearStyle("row", (1, 4)),
        },
        heads={f"{stack}.*.attn": ("heads",) for stack in stacks} | counts,
    )


LONGCAT = Case(
    lambda: diffusers.LongCatImageTransformer2DModel(**FLUX_SIZE, pooled_projection_dim=16, axes_dims_rope=[4, 4, 4]),
    flux_inputs,
    flux_like(COLUMN, COLUMN),
    (FLUX_REGION,),
)
OVIS = Case(
    lambda: diffusers.OvisImageTransformer2DModel(**FLUX_SIZE, out_channels=8, axes_dims_rope=(4, 4, 4)),
    flux_inputs,
    flux_like(HALVES, HALVES, **{"single_transformer_blocks.*": ("mlp_hidden_dim",)}),
    (FLUX_REGION,),
)

# -- Qwen-Image, Stable Diffusion, Krea ------------------------------------------------------------------------------

QWEN_IMAGE = Case(
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
    plan(
        joint("transformer_blocks.*.attn"),
        feed_forward("transformer_blocks.*.img_mlp"),
        feed_forward("transformer_blocks.*.txt_mlp"),
    ),
    (
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(TEXT, IMAGE),
            within="transformer_blocks.*",
            follow={
                "image_rotary_emb": (Follow(IMAGE, 0), Follow(TEXT, 0)),
                "modulate_index": Follow(IMAGE, 1),
            },
            padding={"encoder_hidden_states_mask": TEXT},
            leave="proj_out",
            gathers=IMAGE,
        ),
    ),
)

QWEN_IMAGE_21 = Case(
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
    plan(
        attention("transformer_blocks.*.attn"),
        {f"transformer_blocks.*.img_mlp.{name}": COLUMN for name in ("proj", "gate_layer")},
        {"transformer_blocks.*.img_mlp.out": ROW},
    ),
    (
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(IMAGE,),
            within="transformer_blocks.*",
            follow={"target_token_mask": Follow(IMAGE, 0)},
            deals={"transformer_blocks.*.attn": Deal(QKV, ("to_out.0",))},
            leave="transformer_blocks.-1",
            gathers=IMAGE,
        ),
    ),
)

SD3 = Case(
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
    plan(
        joint("transformer_blocks.*.attn", "?"),
        attention("transformer_blocks.*.attn2", ("to_q?", "to_k?", "to_v?"), ("to_out.0?",)),
        feed_forward("transformer_blocks.*.ff"),
        feed_forward("transformer_blocks.*.ff_context", optional="?"),
        heads={"transformer_blocks.*.attn": ("heads",), "transformer_blocks.*.attn2?": ("heads",)},
    ),
    (
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(IMAGE, TEXT),
            leave="proj_out",
            gathers=IMAGE,
            joins={"transformer_blocks.*.attn2?": Join((IMAGE,))},
        ),
    ),
)

KREA2 = Case(
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
    plan(
        attention("transformer_blocks.*.attn", (*QKV, "to_gate")),
        {f"transformer_blocks.*.ff.{name}": COLUMN for name in ("gate", "up")},
        {"transformer_blocks.*.ff.down": ROW},
        heads={"transformer_blocks.*.attn": ("num_heads", "num_kv_heads")},
    ),
    (
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(IMAGE,),
            within="transformer_blocks.*",
            follow={"image_rotary_emb": Follow(IMAGE, 0)},
            leave="transformer_blocks.-1",
            gathers=IMAGE,
        ),
    ),
)

# -- video -----------------------------------------------------------------------------------------------------------

WAN_REGION = SequenceRegion(
    enter="blocks.0",
    segments=(IMAGE,),
    within="blocks.*",
    follow={"rotary_emb": Follow(IMAGE, 1), "temb": Follow(IMAGE, 1, ndim=4)},
    leave="blocks.-1",
    gathers=IMAGE,
    cross=("blocks.*.attn2",),
)


def wan_plan(*more: Mapping[str, LinearStyle], vectors: tuple[str, ...] = ()) -> TensorPlan:
    norms = ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k", "attn2.norm_added_k?")
    return plan(
        attention("blocks.*.attn1"),
        attention("blocks.*.attn2", (*QKV, "add_k_proj?", "add_v_proj?")),
        feed_forward("blocks.*.ffn"),
        *more,
        norms=tuple(f"blocks.*.{norm}" for norm in norms),
        vectors=vectors,
        heads={"blocks.*.attn1": ("heads",), "blocks.*.attn2": ("heads",)},
    )


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


WAN = Case(
    lambda: diffusers.WanTransformer3DModel(**WAN_SIZE, rope_max_seq_len=32), wan_inputs, wan_plan(), (WAN_REGION,)
)
WAN_TI2V = Case(WAN.make, lambda: wan_inputs(per_token=True), wan_plan(), (WAN_REGION,))
WAN_I2V = Case(
    lambda: diffusers.WanTransformer3DModel(
        **WAN_SIZE, rope_max_seq_len=32, image_dim=24, added_kv_proj_dim=48, pos_embed_seq_len=None
    ),
    # the processor takes the last 512 tokens for text
    lambda: wan_inputs() | {"encoder_hidden_states": randn(2, 512, 20), "encoder_hidden_states_image": randn(2, 9, 24)},
    wan_plan(),
    (WAN_REGION,),
)

HELIOS_TOKENS = (IMAGE, "original_context_length")
HELIOS = Case(
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
    wan_plan(vectors=("blocks.*.attn1.history_key_scale?",)),
    (
        SequenceRegion(
            enter="blocks.0",
            segments=HELIOS_TOKENS,
            within="blocks.*",
            follow={"rotary_emb": Follow(HELIOS_TOKENS, 1), "temb": Follow(HELIOS_TOKENS, 1, ndim=4)},
            leave="blocks.-1",
            gathers=HELIOS_TOKENS,
            cross=("blocks.*.attn2",),
        ),
    ),
)

HUNYUAN_VIDEO_15 = Case(
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
    plan(
        joint("transformer_blocks.*.attn"),
        feed_forward("transformer_blocks.*.ff"),
        feed_forward("transformer_blocks.*.ff_context"),
        heads={"transformer_blocks.*.attn": ("heads",)},
    ),
    (
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(IMAGE, TEXT),
            within="transformer_blocks.*",
            follow={"freqs_cis": Follow(IMAGE, 0)},
            padding={"attention_mask": TEXT},
            leave="proj_out",
            gathers=IMAGE,
        ),
    ),
)

AUDIO = "audio_hidden_states"
LTX2_ATTENTION = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


def ltx2(rope: str, per_token: bool) -> Case:
    heads_dim = 1 if rope == "split" else -1
    own = {"query_rotary_emb": heads_dim}
    both = {**own, "key_rotary_emb": heads_dim}
    inputs = {"attn1": own, "audio_attn1": own, "audio_to_video_attn": both, "video_to_audio_attn": both}
    steps = torch.where(torch.arange(18) < 6, 0.0, torch.tensor([[700.0], [200.0]])).double()
    return Case(
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
        plan(
            *(attention(f"transformer_blocks.*.{name}", (*QKV, "to_gate_logits?")) for name in LTX2_ATTENTION),
            feed_forward("transformer_blocks.*.ff"),
            feed_forward("transformer_blocks.*.audio_ff"),
            norms=tuple(f"transformer_blocks.*.{name}.norm_{of}" for name in LTX2_ATTENTION for of in "qk"),
            heads={f"transformer_blocks.*.{name}": ("heads",) for name in LTX2_ATTENTION},
            inputs={f"transformer_blocks.*.{name}": dims for name, dims in inputs.items()},
        ),
        (
            SequenceRegion(
                enter="transformer_blocks.0",
                segments=(IMAGE, AUDIO),
                within="transformer_blocks.*",
                follow={
                    **dict.fromkeys(("video_rotary_emb", "ca_video_rotary_emb"), IMAGE),
                    **dict.fromkeys(("audio_rotary_emb", "ca_audio_rotary_emb"), AUDIO),
                    **dict.fromkeys(("temb", "temb_ca_scale_shift", "temb_ca_gate"), Follow(IMAGE, 1)),
                    **dict.fromkeys(
                        ("temb_audio", "temb_ca_audio_scale_shift", "temb_ca_audio_gate"), Follow(AUDIO, 1)
                    ),
                },
                leave="transformer_blocks.-1",
                gathers=(IMAGE, AUDIO),
                cross=("transformer_blocks.*.attn2", "transformer_blocks.*.audio_attn2"),
                joins={
                    "transformer_blocks.*.attn1": Join((IMAGE,)),
                    "transformer_blocks.*.audio_attn1": Join((AUDIO,)),
                    "transformer_blocks.*.audio_to_video_attn": Join((IMAGE,), (AUDIO,)),
                    "transformer_blocks.*.video_to_audio_attn": Join((AUDIO,), (IMAGE,)),
                },
            ),
        ),
    )


SPECIFIED = {
    "FLUX.2": Case(
        lambda: diffusers.Flux2Transformer2DModel(
            **FLUX_SIZE, timestep_guidance_channels=16, axes_dims_rope=(2, 4, 4, 2), guidance_embeds=False
        ),
        lambda: flux_inputs(axes=4),
        SPECS["flux2-klein"].tensor_plan,
        SPECS["flux2-klein"].regions,
    ),
    "Z-Image": Case(
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
        SPECS["z-image"].tensor_plan,
        SPECS["z-image"].regions,
    ),
}

MINIMAX_H3 = Case(
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
    SPECS["minimax-h3"].tensor_plan,
    SPECS["minimax-h3"].regions,
)

CASES: Mapping[str, Case] = {
    **SPECIFIED,
    "FLUX.1": FLUX,
    "FLUX.3": FLUX3,
    "FLUX.3, edit": FLUX3_EDIT,
    "LongCat": LONGCAT,
    "Ovis": OVIS,
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
