"""The tiny recipe of LTX-2."""

from __future__ import annotations

from typing import Any

from crossdock.runtime.models.tiny.parts import (
    HEAD_DIM,
    HEADS,
    LATENT_CHANNELS,
    TEXT_HIDDEN,
    TinyRecipe,
    flow_scheduler,
)

TEXT_LAYERS = 5
REGISTERS = 64  # divides the number of text tokens, which is always 1024
MEL_BINS = 24
AUDIO_CHANNELS = 2
AUDIO_FEATURES = AUDIO_CHANNELS * MEL_BINS // 4  # of an audio token; the audio VAE makes one of four mel bins


def _transformer() -> object:
    from diffusers import LTX2VideoTransformer3DModel

    audio_dim = HEADS * HEAD_DIM // 2
    return LTX2VideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        pos_embed_max_pos=1,
        base_height=256,
        base_width=256,
        audio_in_channels=AUDIO_FEATURES,
        audio_out_channels=AUDIO_FEATURES,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=HEAD_DIM // 2,
        audio_cross_attention_dim=audio_dim,
        audio_pos_embed_max_pos=1,
        num_layers=4,
        caption_channels=TEXT_HIDDEN,
        rope_type="split",
    )


def _connectors() -> object:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    sizes = {"num_attention_heads": HEADS, "attention_head_dim": TEXT_HIDDEN // HEADS, "num_layers": 2}
    each = {f"{kind}_connector_{name}": size for kind in ("video", "audio") for name, size in sizes.items()}
    return LTX2TextConnectors(
        caption_channels=TEXT_HIDDEN,
        text_proj_in_factor=TEXT_LAYERS + 1,
        video_connector_num_learnable_registers=REGISTERS,
        audio_connector_num_learnable_registers=REGISTERS,
        rope_type="split",
        **each,
    )


def _vae() -> object:
    from diffusers import AutoencoderKLLTX2Video

    return AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 32, 64),
        decoder_block_out_channels=(16, 32, 64),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def _audio_vae() -> object:
    from diffusers import AutoencoderKLLTX2Audio

    return AutoencoderKLLTX2Audio(
        base_channels=AUDIO_FEATURES,
        num_res_blocks=1,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=MEL_BINS,
    )


def _vocoder() -> object:
    from diffusers.pipelines.ltx2 import LTX2Vocoder

    return LTX2Vocoder(
        in_channels=2 * MEL_BINS,
        hidden_channels=48,
        upsample_kernel_sizes=[16, 15],
        upsample_factors=[16, 15],
        resnet_kernel_sizes=[3, 7],
        resnet_dilations=[[1, 3], [1, 3]],
    )


def _tokenizer() -> Any:
    """Byte-fallback BPE with the special tokens of Gemma's."""
    from transformers import GemmaTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = (*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters)
    return GemmaTokenizerFast(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=1024
    )


def _text_encoder(vocab_size: int) -> object:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_HIDDEN,
        "intermediate_size": 120,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 3,
        "head_dim": TEXT_HIDDEN // HEADS,
        "query_pre_attn_scalar": TEXT_HIDDEN // HEADS,
        "sliding_window": 256,
        "max_position_embeddings": 1024,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, dtype="float32")
    return Gemma3ForConditionalGeneration(config)


def _components() -> dict[str, object]:
    tokenizer = _tokenizer()
    return {
        "scheduler": flow_scheduler(shift=1.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": _transformer(),
        "vae": _vae(),
        "audio_vae": _audio_vae(),
        "vocoder": _vocoder(),
        "connectors": _connectors(),
        "text_encoder": _text_encoder(len(tokenizer)),
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight", "audio_proj_out.weight"),
    sharp=tuple(
        f"{name}.norm_{part}.weight" for name in ("attn1", "attn2") for part in "qk"
    ),  # 1024 tokens, few of text
)
