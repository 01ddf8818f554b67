"""Parts of tiny random pipelines with a Mistral 3 text encoder: its tokenizer and its sizes."""

from __future__ import annotations

from typing import Any

from crossdock.runtime.models.tiny.parts import HEADS, TEXT_HIDDEN, byte_level_bpe

_IMAGE_TOKEN = "[IMG]"
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", _IMAGE_TOKEN)
_PAD_TOKEN = "<pad>"
_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set frame = "SYSTEM_PROMPT" if message.role == "system" else "INST" %}
{{- "[" + frame + "]" }}
{%- for part in message.content %}{{ part.text }}{% endfor %}
{{- "[/" + frame + "]" }}
{%- endfor %}"""


def mistral_tokenizer() -> Any:
    """A byte-level BPE tokenizer with the special tokens and the chat format of Mistral's; it pads on the left.

    The published checkpoints wrap theirs in a processor of texts and images, which cannot be loaded without
    torchvision. Pipelines call either in the same way.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([*_SPECIAL_TOKENS, _PAD_TOKEN]),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=_PAD_TOKEN,
        additional_special_tokens=list(_SPECIAL_TOKENS[3:]),
        padding_side="left",
        model_max_length=1024,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def mistral3_config(tokenizer: Any, layers: int) -> object:
    """With a vision tower, which no pipeline runs that is given text only."""
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

    return Mistral3Config(
        text_config=MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_HIDDEN,
            intermediate_size=120,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 3,
            head_dim=12,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            sliding_window=None,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56, head_dim=12
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
        dtype="float32",
    )
