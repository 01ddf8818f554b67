"""Tiny random pipelines in the diffusers format, for tests and the demo.

The files are what `DiffusionPipeline.save_pretrained` writes for a real model: model_index.json, one folder
for each component, sharded safetensors. Only the sizes are small, and not all powers of two. The weights are
drawn so that every tensor matters to the picture (norm weights are not 1, biases and pad tokens are not 0),
while the fp32 result stays insensitive to rounding: wrong wiring shows, another order of summation does not.
"""

from __future__ import annotations

import difflib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.runtime.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import nn

HEADS = 6  # divides by 2 and by 3, not by 4
HEAD_DIM = 16
HIDDEN = HEADS * HEAD_DIM
LATENT_CHANNELS = 6
TEXT_HIDDEN = 72
TRANSFORMER_SHARD_SIZE = "2MB"
"""Small enough that each transformer is written as several files."""

VELOCITY_SCALE = 0.35
"""Factor on the last projection; keeps rounding errors small, which guidance enlarges up to 10 times."""

_VAE_CHANNELS = (12, 24, 24, 36)
# Flux2 attends to 512 text tokens, most of them padding; norms above 1 let it pick a few, so that each shows
_SHARP_NORMS = tuple(f"attn.norm_{name}.weight" for name in ("q", "k", "added_q", "added_k"))
_OUTPUT_PROJECTIONS = ("proj_out.weight", "all_final_layer.2-1.linear.weight")
_CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
{%- endif %}"""
_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_TOKENIZER_TEXTS = (
    "a red fox in the snow, a small boat on a lake at night, a green house by the sea",
    "the quick brown fox jumps over the lazy dog while the harbour crane lifts a blue container",
    "a photo of a cat that holds a sign with the words hello world, studio light, high detail",
    "user assistant system",
)


@dataclass(frozen=True)
class Family:
    """How to build one family's pipeline with untrained weights."""

    transformer: Callable[[], Any]
    vae: Callable[[], Any]
    text_encoder: Callable[[int], Any]
    """Takes the vocabulary size."""
    pipeline: Callable[[dict[str, Any]], Any]
    """Takes the components by name."""
    scheduler_shift: float
    dynamic_shifting: bool


def make_checkpoint(family: str, directory: Path, seed: int = 0) -> None:
    """Write a random pipeline of `family` to `directory`, which must be new or empty.

    The same seed writes the same bytes. Raises `RequestError` for an unknown family, `CheckpointError` where
    the directory cannot take the files; nothing is left behind then.
    """
    recipe = _family(family)
    with _new_directory(directory) as staging:
        pipeline = _build(recipe, seed)
        with _no_progress_bars():
            pipeline.save_pretrained(staging, max_shard_size=TRANSFORMER_SHARD_SIZE)


def _family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    close = difflib.get_close_matches(name, FAMILIES, n=1)
    hint = f" did you mean {close[0]}?" if close else ""
    raise RequestError(f"family: found {name!r};{hint} allowed: {', '.join(FAMILIES)}")


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """A sibling to write into, renamed to `directory` at the end; removed when the body raises."""
    if directory.is_dir() and any(directory.iterdir()):
        raise CheckpointError(f"{directory}: is not empty; give a new directory, or empty this one")
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give a directory")
    staging = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    try:
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(f"{directory.parent}: cannot write here: {error.strerror}") from None
    try:
        yield staging
        staging.rename(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _build(recipe: Family, seed: int) -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights of their own, which are replaced
        modules = {
            "transformer": recipe.transformer(),
            "vae": recipe.vae(),
            "text_encoder": recipe.text_encoder(len(tokenizer)),
        }
    generator = torch.Generator().manual_seed(seed)
    for module in modules.values():
        _randomise(module.eval(), generator)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=recipe.scheduler_shift, use_dynamic_shifting=recipe.dynamic_shifting
    )
    return recipe.pipeline({"scheduler": scheduler, "tokenizer": tokenizer, **modules})


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter and running statistic of `module` anew, in the order of their names.

    Matrices get the variance 1 / fan_in, so that activations stay of order 1; norm weights lie around 1.
    """
    import torch
    from torch import nn

    def normal(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation + mean)

    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, tensor in sorted(module.named_parameters()):
            if id(tensor) in embeddings or name.endswith("pad_token"):
                normal(tensor, 0.0, 1.0)
            elif name.endswith("bias"):
                normal(tensor, 0.0, 0.2)
            elif name.endswith(_SHARP_NORMS):
                normal(tensor, 1.5, 0.3)
            elif tensor.ndim == 1:
                normal(tensor, 1.0, 0.2)
            else:
                scale = VELOCITY_SCALE if name in _OUTPUT_PROJECTIONS else 1.0
                normal(tensor, 0.0, scale / math.sqrt(tensor[0].numel()))
        for name, buffer in sorted(module.named_buffers()):
            if name.endswith("running_mean"):
                normal(buffer, 0.0, 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer with the files, special tokens and chat format of Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_TOKENIZER_TEXTS, trainer)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe, additional_special_tokens=list(_SPECIAL_TOKENS[1:3]), model_max_length=1024
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _flux2_transformer() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * TEXT_HIDDEN,  # the pipeline joins three hidden states of the text encoder
        timestep_guidance_channels=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _z_image_transformer() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=HIDDEN,
        n_layers=5,
        n_refiner_layers=2,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_HIDDEN,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 128, 128],
    )


def _flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        block_out_channels=_VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=12,
        sample_size=256,
    )


def _kl_vae() -> Any:
    from diffusers import AutoencoderKL

    levels = len(_VAE_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=_VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=12,
        sample_size=256,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _qwen3_config(vocab_size: int, layers: int) -> Any:
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


def _causal_qwen3(vocab_size: int) -> Any:
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM(_qwen3_config(vocab_size, layers=28))  # hidden states 9, 18 and 27 are read


def _plain_qwen3(vocab_size: int) -> Any:
    from transformers import Qwen3Model

    return Qwen3Model(_qwen3_config(vocab_size, layers=6))


def _flux2_klein_pipeline(components: dict[str, Any]) -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(**components, is_distilled=False)  # guidance works in the undistilled one only


def _z_image_pipeline(components: dict[str, Any]) -> Any:
    from diffusers import ZImagePipeline

    return ZImagePipeline(**components)


FAMILIES = {
    "flux2-klein": Family(
        _flux2_transformer,
        _flux2_vae,
        _causal_qwen3,
        _flux2_klein_pipeline,
        scheduler_shift=3.0,
        dynamic_shifting=True,
    ),
    "z-image": Family(
        _z_image_transformer,
        _kl_vae,
        _plain_qwen3,
        _z_image_pipeline,
        scheduler_shift=3.0,
        dynamic_shifting=False,
    ),
}
"""The families by name, as `make_checkpoint` and the command line take them."""
