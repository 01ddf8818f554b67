"""Parts of tiny pipelines that read prompts with a Qwen vision-language model: its tokenizer, the model, a VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crossdock.runtime.models.tiny.parts import (
    CHAT_TEMPLATE,
    HEADS,
    LATENT_CHANNELS,
    SPECIAL_TOKENS,
    TEXT_HIDDEN,
    TOKENIZER_TEXTS,
)

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE_TEXTS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    "Comprehend and analyze the provided prompt.",
    "system",
    "user",
    "assistant",
)
"""Pipelines drop as many tokens as these are long in the published tokenizer, where each word is one."""
_VISION = {
    "depth": 2,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_heads": 4,
    "out_hidden_size": TEXT_HIDDEN,
}


def qwen_vl_tokenizer(*known: str) -> Any:
    """A byte-level BPE tokenizer like Qwen's, for which each known word is one token.

    Its merges are listed, not trained: training stops at a number of tokens, and breaks words.

    Args:
        known: texts whose words it knows as well.
    """
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = (*_TEMPLATE_TEXTS, *TOKENIZER_TEXTS, *known)
    words = {word for text in texts for word, _ in byte_level.pre_tokenize_str(text)}
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(words, key=lambda word: (word[0] != "Ġ", word)):  # within a sentence, words begin with a space
        start, others = word[0], word[1:]
        for letter in others:
            merges[start, letter] = None
            start += letter
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(start + letter for start, letter in merges)]
    special = [*SPECIAL_TOKENS, *VISION_TOKENS]
    vocab = {token: number for number, token in enumerate((*special, *tokens))}
    tokenizer = Qwen2TokenizerFast(
        vocab=vocab, merges=list(merges), additional_special_tokens=special[1:], model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _image_tokens(tokenizer: Any) -> dict[str, int]:
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    return {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
    }


def _text_config(tokenizer: Any, layers: int, rope: Mapping[str, object]) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_HIDDEN,
        "intermediate_size": 120,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 3,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], **rope},
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen25_vl_config(tokenizer: object, layers: int) -> object:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, layers, {"rope_theta": 1e6}) | {"max_window_layers": layers},
        vision_config={**_VISION, "fullatt_block_indexes": [1]},
        **_image_tokens(tokenizer),
        dtype="float32",
    )


def qwen3_vl_config(tokenizer: Any, layers: int) -> object:
    from transformers import Qwen3VLConfig

    rope = {"rope_theta": 5e6, "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=_text_config(tokenizer, layers, rope) | {"head_dim": 12},
        vision_config={**_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_image_tokens(tokenizer),
        tie_word_embeddings=True,
        dtype="float32",
    )


def qwen_vl_processor(tokenizer: object, chat_template: str = CHAT_TEMPLATE) -> object:
    """Another one than the published checkpoints', whose video part needs torchvision; for text they are the same."""
    from transformers import LlavaProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil()
    return LlavaProcessor(images, tokenizer, chat_template=chat_template, image_token="<|image_pad|>")


def latent_statistics(channels: int) -> dict[str, list[float]]:
    """What a VAE's config says of its latents: no two channels alike."""
    return {
        "latents_mean": [0.3 * channel - 0.7 for channel in range(channels)],
        "latents_std": [1.2 + 0.25 * channel for channel in range(channels)],
    }


def qwen_image_vae() -> object:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1, **latent_statistics(LATENT_CHANNELS)
    )
