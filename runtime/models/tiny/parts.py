"""Parts of tiny random pipelines that several families have in common: tokenizers, text encoders, VAEs.

Only the sizes are small, and not all powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HEADS = 6  # divides by 2 and by 3, not by 4
HEAD_DIM = 16
HIDDEN = HEADS * HEAD_DIM
LATENT_CHANNELS = 6
TEXT_HIDDEN = 72

VAE_CHANNELS = (12, 24, 24, 36)
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- endif %}"""
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TOKENIZER_TEXTS = (
    "a red fox in the snow, a small boat on a lake at night, a green house by the sea",
    "the quick brown fox jumps over the lazy dog while the harbour crane lifts a blue container",
    "a photo of a cat that holds a sign with the words hello world, studio light, high detail",
    "user assistant system",
)


@dataclass(frozen=True)
class TinyRecipe:
    """How to build a family's pipeline with untrained weights.

    Attributes:
        components: makes the pipeline's components by name; their weights are drawn anew afterwards.
        options: the pipeline's other arguments.
        outputs: names of the transformer's last projections; drawn smaller, so that rounding errors stay small. And of
            the last gain of what makes audio, so that few samples are cut off.
        sharp: ends of names of norm weights that are drawn around `sharpness`: where padding outnumbers the text,
            attention can then pick a few tokens, so that each shows in the picture.
    """

    components: Callable[[], dict[str, object]]
    outputs: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    sharp: tuple[str, ...] = ()
    sharpness: float = 1.5


def byte_level_bpe(special_tokens: Sequence[str], texts: Iterable[str] = TOKENIZER_TEXTS, vocabulary: int = 400) -> Any:
    """Trained on a few texts, for `tokenizer_object` of a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def qwen_tokenizer() -> Any:
    """A byte-level BPE tokenizer with the files, special tokens and chat format of Qwen's."""
    from transformers import Qwen2TokenizerFast

    bpe, more = byte_level_bpe(SPECIAL_TOKENS), list(SPECIAL_TOKENS[1:3])
    tokenizer = Qwen2TokenizerFast(tokenizer_object=bpe, additional_special_tokens=more, model_max_length=1024)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def kl_vae(latent_channels: int = LATENT_CHANNELS) -> object:
    from diffusers import AutoencoderKL

    levels = len(VAE_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=12,
        sample_size=256,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def qwen3_config(vocab_size: int, layers: int) -> object:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=TEXT_HIDDEN,
        intermediate_size=120,
        num_hidden_layers=layers,
        max_window_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 3,
        head_dim=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        dtype="float32",
    )


def flow_scheduler(shift: float, dynamic_shifting: bool) -> object:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic_shifting)
