"""Shrunken instances of diffusers' transformer classes, with inputs for them.

A class is one row of `TINY`: what its forward takes, and the few configuration keys that the rules of `shrunken` do
not get right. The rules keep the dims of a head, so that rotary tables and patches stay as they are, and cut the
number of heads, layers and the widths of text and feed-forward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

LAYERS = re.compile(r"(n|num)_(\w+_)?(layers|blocks)|depth|mmdit_layers|approximator_layers|LFE_depth")
HEADS = re.compile(r"(\w+_)?(num|n)_(\w+_)?heads")
WIDTHS = {"hidden_size", "dim", "model_dim", "inner_dim", "cross_attention_dim", "caption_projection_dim"}
TEXT_DIMS = re.compile(
    r"(text|joint_attention|text_embed|text_in|cap_feat|context_in|pooled_projection|in_text|llm_features|"
    r"text_hidden|condition|text_encoder)_dim2?|caption_channels|encoder_hidden_size"
)
FEED_FORWARD = re.compile(
    r"(\w+_)?(ffn_dim|ff_dim|intermediate_size|ffn_hidden_size|ff_inner_dim|hidden_dim)|\w+_moe_dim"
)
TEXT = 32
TOKENS, WORDS = 16, 5


def shrunken(cls: type[nn.Module], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a small instance of `cls`."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    heads = next((v for k, v in defaults.items() if HEADS.fullmatch(k)), None)
    config: dict[str, Any] = {}
    for name, value in defaults.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if LAYERS.fullmatch(name):
            config[name] = min(value, 2)
        elif HEADS.fullmatch(name):
            config[name] = 2
        elif name in WIDTHS and heads:
            config[name] = value * 2 // heads
        elif TEXT_DIMS.fullmatch(name):
            config[name] = TEXT
        elif FEED_FORWARD.fullmatch(name):
            config[name] = 64
    return config | dict(overrides)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def step(*shape: int) -> Tensor:
    return torch.full(shape or (1,), 0.5)


def bare_tokens(c: Any) -> dict[str, Any]:
    """Packed image tokens and text."""
    return {
        "hidden_states": rand(1, TOKENS, c.in_channels),
        "encoder_hidden_states": rand(1, WORDS, TEXT),
        "timestep": step(),
    }


def tokens(c: Any, axes: int = 3) -> dict[str, Any]:
    """The same with position ids, as in FLUX."""
    return bare_tokens(c) | {"img_ids": torch.zeros(TOKENS, axes), "txt_ids": torch.zeros(WORDS, axes)}


def picture(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": rand(1, c.in_channels, 8, 8),
        "encoder_hidden_states": rand(1, WORDS, TEXT),
        "timestep": step(),
    }


def film(c: Any) -> dict[str, Any]:
    return picture(c) | {"hidden_states": rand(1, c.in_channels, 3, 8, 8)}


def frames_first(c: Any) -> dict[str, Any]:
    return picture(c) | {"hidden_states": rand(1, 3, c.in_channels, 8, 8)}


def masked(make: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    return lambda c: make(c) | {"encoder_attention_mask": torch.ones(1, WORDS, dtype=torch.bool)}


def sizes(c: Any) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0]])
    return picture(c) | {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}


@dataclass(frozen=True)
class Tiny:
    """`inputs(config)` are the arguments of forward."""

    inputs: Callable[[Any], dict[str, Any]]
    config: Mapping[str, Any] = field(default_factory=dict)


TINY: dict[str, Tiny] = {
    "AceStepTransformer1DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, TOKENS, c.audio_acoustic_hidden_dim),
            "timestep": step(),
            "timestep_r": step(),
            "encoder_hidden_states": rand(1, WORDS, TEXT),
            "context_latents": rand(1, TOKENS, c.in_channels - c.audio_acoustic_hidden_dim),
        },
        {"encoder_hidden_size": TEXT},
    ),
    "AllegroTransformer3DModel": Tiny(film),
    "AnyFlowFARTransformer3DModel": Tiny(
        lambda c: frames_first(c) | {"r_timestep": step(1, 3), "timestep": step(1, 3), "chunk_partition": (1, 2)}
    ),
    "AnyFlowTransformer3DModel": Tiny(lambda c: frames_first(c) | {"r_timestep": step(1, 3), "timestep": step(1, 3)}),
    "AuraFlowTransformer2DModel": Tiny(picture),
    "BriaFibo2Transformer2DModel": Tiny(
        lambda c: masked(picture)(c) | {"encoder_hidden_states": rand(1, 2, WORDS, TEXT)},
        {"injection_layer_ids": (1,), "min_num_gist_tokens": 4, "max_num_gist_tokens": 8},
    ),
    "BriaFiboTransformer2DModel": Tiny(
        lambda c: tokens(c) | {"text_encoder_layers": [rand(1, WORDS, TEXT) for _ in range(4)]}
    ),
    "BriaTransformer2DModel": Tiny(tokens),
    "ChromaTransformer2DModel": Tiny(tokens),
    "ChronoEditTransformer3DModel": Tiny(film),
    "CogVideoXTransformer3DModel": Tiny(frames_first, {"use_rotary_positional_embeddings": True}),
    "CogView3PlusTransformer2DModel": Tiny(sizes),
    "CogView4Transformer2DModel": Tiny(sizes),
    "ConsisIDTransformer3DModel": Tiny(frames_first, {"use_rotary_positional_embeddings": True}),
    "CosmosTransformer3DModel": Tiny(
        lambda c: film(c) | {"encoder_hidden_states": rand(1, WORDS, c.text_embed_dim)},
        {"concat_padding_mask": False, "text_embed_dim": 1024},
    ),
    "DiTTransformer2DModel": Tiny(
        lambda c: {"hidden_states": rand(1, 4, 8, 8), "timestep": step(), "class_labels": torch.tensor([3])}
    ),
    "DreamLiteTransformer2DModel": Tiny(picture, {"in_channels": 32, "cross_attention_dim": TEXT}),
    "EasyAnimateTransformer3DModel": Tiny(film, {"in_channels": 16, "out_channels": 16, "patch_size": 2}),
    "ErnieImageTransformer2DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, c.in_channels, 4, 4),
            "timestep": step(),
            "text_bth": rand(1, WORDS, TEXT),
            "text_lens": torch.tensor([WORDS]),
        }
    ),
    "Flux2Transformer2DModel": Tiny(lambda c: tokens(c, 4) | {"guidance": step()}),
    "Flux3Transformer2DModel": Tiny(
        lambda c: (
            tokens(c, 4) | {"image_cond_hidden_states": rand(1, 4, c.in_channels), "image_cond_ids": torch.zeros(4, 4)}
        )
    ),
    "FluxTransformer2DModel": Tiny(lambda c: tokens(c) | {"pooled_projections": rand(1, TEXT)}),
    "GlmImageTransformer2DModel": Tiny(
        lambda c: (
            {name: value for name, value in sizes(c).items() if name != "original_size"}
            | {"prior_token_id": torch.arange(16).view(1, 16), "prior_token_drop": torch.tensor([False])}
        ),
        {"prior_vq_quantizer_codebook_size": 64},
    ),
    "HeliosTransformer3DModel": Tiny(film),
    "HiDreamImageTransformer2DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, c.in_channels, 8, 8),
            "timesteps": step(),
            "encoder_hidden_states_t5": rand(1, WORDS, TEXT),
            "encoder_hidden_states_llama3": [rand(1, WORDS, TEXT)] * 4,
            "pooled_embeds": rand(1, c.text_emb_dim),
        },
        {
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": (TEXT, TEXT),
            "llama_layers": [0, 1, 2, 3],
            "text_emb_dim": TEXT,
            "axes_dims_rope": (64, 32, 32),
        },
    ),
    "HunyuanImageTransformer2DModel": Tiny(masked(picture)),
    "HunyuanVideo15Transformer3DModel": Tiny(
        lambda c: (
            masked(film)(c)
            | {
                "encoder_hidden_states_2": rand(1, 3, TEXT),
                "encoder_attention_mask_2": torch.ones(1, 3),
                "image_embeds": rand(1, 4, TEXT),
            }
        ),
        {"image_embed_dim": TEXT, "text_embed_2_dim": TEXT},
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        lambda c: (
            masked(film)(c)
            | {
                "pooled_projections": rand(1, TEXT),
                "guidance": step(),
                "image_embeds": rand(1, 4, TEXT),
                "indices_latents": torch.arange(3),
                "latents_clean": rand(1, c.in_channels, 1, 8, 8),
                "indices_latents_clean": torch.zeros(1),
                "latents_history_2x": rand(1, c.in_channels, 2, 8, 8),
                "indices_latents_history_2x": torch.arange(2),
                "latents_history_4x": rand(1, c.in_channels, 4, 8, 8),
                "indices_latents_history_4x": torch.arange(4),
            }
        ),
        {"has_image_proj": True, "image_proj_dim": TEXT, "has_clean_x_embedder": True},
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        lambda c: masked(film)(c) | {"pooled_projections": rand(1, TEXT), "guidance": step()}
    ),
    "Ideogram4Transformer2DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, TOKENS, c.in_channels),
            "encoder_hidden_states": rand(1, TOKENS, TEXT),
            "timestep": step(),
            "position_ids": torch.arange(TOKENS).view(1, TOKENS, 1).expand(1, TOKENS, 3),
            "segment_ids": torch.zeros(1, TOKENS, dtype=torch.long),
            "indicator": torch.tensor([[3] * WORDS + [2] * (TOKENS - WORDS)]),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        lambda c: picture(c) | {"hidden_states": rand(1, TOKENS, c.in_channels, 1, 2, 2), "shape_list": [[(1, 4, 4)]]}
    ),
    "JoyImageEditTransformer3DModel": Tiny(film),
    "Kandinsky5Transformer3DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, 3, 8, 8, c.in_visual_dim),
            "encoder_hidden_states": rand(1, WORDS, TEXT),
            "timestep": step(),
            "pooled_projections": rand(1, TEXT),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(WORDS),
        },
        {"model_dim": 128, "time_dim": 64},
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        lambda c: {"hidden_states": rand(1, 2, 8, 8, 2 * c.in_visual_dim + 1), "timestep": step()},
        {"model_dim": 128, "time_dim": 64, "in_visual_dim": 4, "out_visual_dim": 4},
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, 3, 8, 8, 2 * c.in_visual_dim + 1),
            "encoder_hidden_states": rand(1, WORDS, TEXT),
            "timestep": step(),
            "pooled_projections": rand(1, TEXT),
            "audio_hidden_states": rand(1, 4, c.in_audio_dim),
        },
        {"model_dim": 256, "time_dim": 64},
    ),
    "Krea2Transformer2DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, TOKENS, c.in_channels),
            "encoder_hidden_states": rand(1, WORDS, c.num_text_layers, TEXT),
            "timestep": step(),
            "position_ids": torch.zeros(WORDS + TOKENS, 3),
        },
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, 48, c.in_channels),
            "audio_hidden_states": rand(1, 4, c.audio_in_channels),
            "encoder_hidden_states": rand(1, WORDS, TEXT),
            "audio_encoder_hidden_states": rand(1, WORDS, TEXT),
            "timestep": step(),
            "num_frames": 3,
            "height": 4,
            "width": 4,
            "audio_num_frames": 4,
        },
        {"cross_attention_dim": 256, "audio_cross_attention_dim": 128},
    ),
    "LTXVideoTransformer3DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, 48, c.in_channels),
            "encoder_hidden_states": rand(1, WORDS, TEXT),
            "encoder_attention_mask": torch.ones(1, WORDS),
            "timestep": step(),
            "num_frames": 3,
            "height": 4,
            "width": 4,
        },
    ),
    "LatteTransformer3DModel": Tiny(
        film,
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "caption_channels": TEXT,
            "cross_attention_dim": 176,
            "num_layers": 2,
            "norm_type": "ada_norm_single",
            "video_length": 3,
        },
    ),
    "LongCatImageTransformer2DModel": Tiny(tokens),
    "Lumina2Transformer2DModel": Tiny(masked(picture)),
    "MiniMaxH3Transformer3DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, TOKENS, 96),
            "audio_hidden_states": rand(1, 4, c.audio_in_channels),
            "encoder_hidden_states": rand(1, WORDS, TEXT),
            "timestep": step(),
            "timestep_indices": torch.zeros(TOKENS + 9, dtype=torch.long),
            "token_tags": torch.tensor([0] * WORDS + [1] * TOKENS + [2] * 4),
            "position_ids": torch.zeros(TOKENS + 9, 3),
            "text_indices": torch.arange(WORDS),
            "video_indices": torch.arange(WORDS, WORDS + TOKENS),
            "audio_indices": torch.arange(WORDS + TOKENS, WORDS + TOKENS + 4),
        },
        {"time_embed_dim": 64, "time_embed_hidden_dim": 64},
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, c.in_channels, TOKENS),
            "encoder_hidden_states": rand(1, TOKENS, TEXT),
            "timestep": step(),
        }
    ),
    "MochiTransformer3DModel": Tiny(masked(film), {"pooled_projection_dim": 48, "text_embed_dim": 32}),
    "MotifVideoTransformer3DModel": Tiny(masked(film)),
    "NucleusMoEImageTransformer2DModel": Tiny(
        lambda c: bare_tokens(c) | {"img_shapes": [(1, 4, 4)]}, {"num_experts": 4, "capacity_factors": [2.0, 2.0]}
    ),
    "OmniGenTransformer2DModel": Tiny(
        lambda c: {
            "hidden_states": rand(1, 4, 8, 8),
            "timestep": step(),
            "input_ids": torch.arange(WORDS).view(1, WORDS),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(1, WORDS + 17, WORDS + 17),
            "position_ids": torch.arange(WORDS + 17).view(1, -1),
        },
        {"vocab_size": 64, "pad_token_id": 0, "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    ),
    "OvisImageTransformer2DModel": Tiny(tokens),
    "PRXTransformer2DModel": Tiny(picture),
    "PixArtTransformer2DModel": Tiny(picture, {"caption_channels": TEXT, "sample_size": 8}),
    "QwenImage21Transformer2DModel": Tiny(
        lambda c: (
            bare_tokens(c)
            | {"img_shapes": [[(1, 4, 4)]], "img_mask": torch.tensor([[False] * WORDS + [True] * (TOKENS // 4)])}
        )
    ),
    "QwenImageTransformer2DModel": Tiny(lambda c: bare_tokens(c) | {"img_shapes": [[(1, 4, 4)]]}),
    "SD3Transformer2DModel": Tiny(lambda c: picture(c) | {"pooled_projections": rand(1, TEXT)}),
    "SanaTransformer2DModel": Tiny(picture),
    "SanaVideoTransformer3DModel": Tiny(film),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        lambda c: bare_tokens(c) | {"video_rotary_emb": (rand(1, TOKENS, 256), rand(1, TOKENS, 256))},
        {"cross_attention_dim": 256, "audio_cross_attention_dim": 128},
    ),
    "SanaWMTransformer3DModel": Tiny(
        lambda c: film(c) | {"mask": torch.ones(1, 1, 1, WORDS), "timestep": step(1, 1, 3)}
    ),
    "SkyReelsV2Transformer3DModel": Tiny(film),
    "Transformer2DModel": Tiny(picture, {"in_channels": 32, "cross_attention_dim": TEXT}),
    "TransformerTemporalModel": Tiny(
        lambda c: {"hidden_states": rand(3, 32, 4, 4), "num_frames": 3}, {"in_channels": 32, "num_layers": 2}
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        lambda c: {
            "hidden_states": [rand(16, 3, 8, 8)],
            "condition_latents": [rand(c.in_dim - 16, 3, 8, 8)],
            "encoder_hidden_states": [rand(WORDS, TEXT)],
            "encoder_hidden_states_image": rand(1, 257, 1280),
            "timestep": step(),
            "kv_cache": WanAnimate2KVCache(2),
            "kv_cache_mode": "extract",
            "seq_len": 48,
            "offset_grid_sizes": torch.tensor([[3, 4, 4]]),
        },
    ),
    "WanAnimateTransformer3DModel": Tiny(
        lambda c: (
            film(c)
            | {
                "pose_hidden_states": rand(1, c.latent_channels, 2, 8, 8),
                "face_pixel_values": rand(1, 3, 8, 64, 64),
                "encoder_hidden_states_image": rand(1, 4, TEXT),
            }
        ),
        {
            "num_layers": 4,
            "inject_face_latents_blocks": 2,
            "image_dim": TEXT,
            "motion_encoder_size": 64,
            "motion_style_dim": 32,
            "motion_dim": 8,
            "motion_encoder_dim": 32,
            "face_encoder_hidden_dim": 64,
            "face_encoder_num_heads": 2,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16, "32": 16, "64": 16},
        },
    ),
    "WanTransformer3DModel": Tiny(film),
    "WanVACETransformer3DModel": Tiny(
        lambda c: film(c) | {"control_hidden_states": rand(1, c.vace_in_channels, 3, 8, 8)},
        {"num_layers": 4, "vace_layers": [0, 2]},
    ),
    "ZImageTransformer2DModel": Tiny(
        lambda c: {"x": [rand(c.in_channels, 1, 8, 8)], "t": step(), "cap_feats": [rand(WORDS, TEXT)]}
    ),
}


def build(name: str) -> nn.Module:
    cls = getattr(diffusers, name)
    torch.manual_seed(0)
    model: nn.Module = cls(**shrunken(cls, TINY[name].config))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # or a zero projection hides what comes before it
    return model.eval().requires_grad_(False)


def make_inputs(name: str, model: Any) -> dict[str, Any]:
    """The same ones each time."""
    torch.manual_seed(1)
    return TINY[name].inputs(model.config) | {"return_dict": False}


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of what a model returns."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]
