"""Tiny random checkpoints of diffusers pipelines that no family describes, one small recipe each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from crossdock.runtime.models.tiny.clip import CLIP_HIDDEN, clip_text_config, clip_tokenizer
from crossdock.runtime.models.tiny.make_checkpoint import randomise
from crossdock.runtime.models.tiny.parts import (
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
    kl_vae,
)
from crossdock.runtime.models.tiny.qwen_vl import qwen25_vl_config, qwen_vl_processor, qwen_vl_tokenizer
from crossdock.runtime.models.tiny.recipes import TINY
from crossdock.runtime.models.tiny.t5 import t5_sizes, t5_tokenizer
from tiny_transformers import TEXT_DIMS, shrunken

Parts = dict[str, Any]
_LAST = ("proj_out.weight", "norm_out.linear.weight", "norm_out.linear_2.weight", "final_layer.linear.weight")


@dataclass(frozen=True)
class Recipe:
    """
    Attributes:
        parts: the pipeline's components by name; their weights are drawn anew.
        size: height and width in pixels, of which the tokens are few.
        frames: of a video.
        tp, ulysses: why two ranks of it are refused; None: they run.
    """

    parts: Callable[[], Parts]
    size: tuple[int, int] = (96, 64)
    frames: int | None = None
    tp: str | None = None
    ulysses: str | None = "has no _cp_plan"
    options: Mapping[str, Any] = field(default_factory=dict)


def make_pipeline(name: str, directory: Path) -> Path:
    """Write a checkpoint of the class `name`."""
    recipe = RECIPES[name]
    with torch.random.fork_rng(devices=[]):
        parts = recipe.parts()
    generator = torch.Generator().manual_seed(0)
    for part in parts.values():
        if isinstance(part, nn.Module):
            randomise(part.eval(), TinyRecipe(dict, _LAST), generator)
    getattr(diffusers, name)(**parts, **recipe.options).save_pretrained(directory)
    return directory


def _model(name: str, **own: Any) -> Any:
    """A small transformer of that class, for texts of `TEXT_HIDDEN` features."""
    kind = getattr(diffusers, name)
    config = shrunken(kind, {})
    return kind(**{key: TEXT_HIDDEN if TEXT_DIMS.fullmatch(key) else value for key, value in config.items()} | own)


def _latents(**own: Any) -> Parts:
    return {"in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, **own}


def _t5() -> Parts:
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 64
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.T5EncoderModel(transformers.T5Config(**t5_sizes(len(tokenizer), 2))),
    }


def _umt5() -> Parts:
    tokenizer = t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**t5_sizes(len(tokenizer), 2))),
    }


def _decoder_only(kind: str) -> Parts:
    """A language model that reads from left to right. Its tokenizer ends every text, so that none has no tokens."""
    tokenizer = t5_tokenizer()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_HIDDEN,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 3,
        head_dim=12,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return {"tokenizer": tokenizer, "text_encoder": getattr(transformers, f"{kind}Model")(config)}


def _clip(suffix: str) -> Parts:
    tokenizer = clip_tokenizer()
    config: Any = clip_text_config(tokenizer)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": transformers.CLIPTextModel(config)}


def _flow() -> Parts:
    return {"scheduler": flow_scheduler(shift=3.0, dynamic_shifting=False)}


def _kl() -> Parts:
    return {"vae": kl_vae()}


def _ddim(**own: Any) -> Parts:
    return {"scheduler": diffusers.DDIMScheduler(**own)}


def _wan_vae() -> Parts:
    return {"vae": diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)}


def _hunyuan_vae() -> Parts:
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return {"vae": vae}


def _sana() -> Parts:
    """A latent is 32 pixels wide: the pipeline draws in one of its own sizes, and none is below 512 pixels."""
    kinds, channels, layers = ("ResBlock",) * 5 + ("EfficientViTBlock",), (4, 4, 4, 8, 8, 8), (1,) * 6
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
    )
    return {"vae": vae, **_decoder_only("Gemma2")}


def _pixart() -> Parts:
    model = _model(
        "PixArtTransformer2DModel",
        **_latents(out_channels=2 * LATENT_CHANNELS, sample_size=32, caption_channels=TEXT_HIDDEN),
    )
    return {**_t5(), **_kl(), **_ddim(), "transformer": model}


def _cogvideox() -> Parts:
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    model = _model("CogVideoXTransformer3DModel", sample_width=8, sample_height=12, sample_frames=9)
    return {**_t5(), "vae": vae, "scheduler": diffusers.CogVideoXDDIMScheduler(), "transformer": model}


def _mochi() -> Parts:
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    model = _model("MochiTransformer3DModel", pooled_projection_dim=48)
    return {**_t5(), **_flow(), "vae": vae, "transformer": model}


def _ltx() -> Parts:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=128,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return {**_t5(), **_flow(), "vae": vae, "transformer": _model("LTXVideoTransformer3DModel")}


def _hunyuan_video() -> Parts:
    model = _model("HunyuanVideoTransformer3DModel", **_latents(pooled_projection_dim=CLIP_HIDDEN))
    return {**_decoder_only("Llama"), **_clip("_2"), **_flow(), **_hunyuan_vae(), "transformer": model}


def _kandinsky() -> Parts:
    tokenizer = qwen_vl_tokenizer()
    model = _model(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=LATENT_CHANNELS,
        out_visual_dim=LATENT_CHANNELS,
        in_text_dim2=CLIP_HIDDEN,
        model_dim=128,
        ff_dim=192,
        time_dim=48,
    )
    config = qwen25_vl_config(tokenizer, 2)
    return {
        "tokenizer": qwen_vl_processor(tokenizer),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),  # type: ignore[arg-type]
        **_clip("_2"),
        **_flow(),
        **_hunyuan_vae(),
        "transformer": model,
    }


def _simple(model: str, *parts: Callable[[], Parts], **own: Any) -> Callable[[], Parts]:
    """A transformer that needs few settings, with these parts."""

    def make() -> Parts:
        made = {name: part for each in parts for name, part in each().items()}
        return {**made, "transformer": _model(model, **own)}

    return make


RECIPES: dict[str, Recipe] = {
    "AuraFlowPipeline": Recipe(_simple("AuraFlowTransformer2DModel", _umt5, _flow, _kl, **_latents())),
    "PixArtAlphaPipeline": Recipe(_pixart),
    "PixArtSigmaPipeline": Recipe(_pixart),
    "Lumina2Pipeline": Recipe(
        _simple("Lumina2Transformer2DModel", lambda: _decoder_only("Gemma2"), _flow, _kl, **_latents())
    ),
    "CogView3PlusPipeline": Recipe(_simple("CogView3PlusTransformer2DModel", _t5, _ddim, _kl, **_latents())),
    "CogView4Pipeline": Recipe(
        _simple("CogView4Transformer2DModel", lambda: _decoder_only("Glm"), _flow, _kl, **_latents())
    ),
    "CogVideoXPipeline": Recipe(_cogvideox, frames=9),
    "SanaPipeline": Recipe(
        _simple("SanaTransformer2DModel", _sana, _flow, in_channels=4, out_channels=4, sample_size=16)
    ),
    "MochiPipeline": Recipe(_mochi, frames=7, tp="cut as it was inferred it does not run"),
    "LTXPipeline": Recipe(_ltx, frames=9, ulysses="_cp_plan is no region"),
    "HunyuanVideoPipeline": Recipe(_hunyuan_video, frames=9),
    "SkyReelsV2Pipeline": Recipe(_simple("SkyReelsV2Transformer3DModel", _umt5, _flow, _wan_vae), frames=9),
    "AnyFlowPipeline": Recipe(_simple("AnyFlowTransformer3DModel", _umt5, _flow, _wan_vae), frames=9),
    "PRXPipeline": Recipe(
        _simple("PRXTransformer2DModel", _t5, _flow, _kl, in_channels=LATENT_CHANNELS),
        tp="no attention and no MLP of the blocks can be cut",
        options={"default_sample_size": 256},
    ),
    "Kandinsky5T2VPipeline": Recipe(_kandinsky, frames=9, tp="which key of the model's config is its number of heads"),
    "ChromaPipeline": Recipe(_simple("ChromaTransformer2DModel", _t5, _flow, _kl, in_channels=4 * LATENT_CHANNELS)),
    "BriaPipeline": Recipe(_simple("BriaTransformer2DModel", _t5, _flow, _kl, in_channels=4 * LATENT_CHANNELS)),
    "Flux2KleinKVPipeline": Recipe(  # it puts attention of its own in the place of what exchanges heads
        TINY["flux2-klein"].components, ulysses="same-as-one: rank", options=TINY["flux2-klein"].options
    ),
    "FluxKontextPipeline": Recipe(TINY["flux1"].components, size=(1024, 1024), ulysses=None),
    "LuminaPipeline": Recipe(
        _simple(
            "LuminaNextDiT2DModel",
            lambda: _decoder_only("Gemma"),
            _flow,
            _kl,
            in_channels=LATENT_CHANNELS,
            num_kv_heads=1,
            cross_attention_dim=TEXT_HIDDEN,
        )
    ),
}
