"""Parts of tiny random pipelines with a CLIP text encoder: its tokenizer and its sizes."""

from __future__ import annotations

from typing import Any

from crossdock.runtime.models.tiny.parts import TOKENIZER_TEXTS

CLIP_HIDDEN = 48
CLIP_HEADS = 4


def clip_tokenizer() -> Any:
    """A byte-level BPE tokenizer with the files and special tokens of CLIP's, for which each known word is one token.

    Its merges are listed, not trained, for training does not give the same ones every time.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in " ".join(TOKENIZER_TEXTS).replace(",", " ").split():
        start, *others = *word[:-1], f"{word[-1]}</w>"
        for letter in others:
            merges[start, letter] = None
            start += letter
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(start + letter for start, letter in merges)]
    vocab = {token: number for number, token in enumerate((*tokens, "<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def clip_text_config(tokenizer: Any, hidden: int = CLIP_HIDDEN) -> object:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=CLIP_HEADS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
