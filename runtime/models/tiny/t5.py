"""Parts of tiny random pipelines whose text encoder is a T5: its tokenizer and its sizes."""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

from crossdock.runtime.models.tiny.parts import HEADS, TEXT_HIDDEN, TOKENIZER_TEXTS

_SPACE = "▁"
"""Begins a word, as SentencePiece has it."""


def t5_tokenizer() -> Any:
    """A unigram tokenizer of words and letters with the files and the special tokens of T5's.

    Its vocabulary is counted, not trained, for training does not give the same one every time.
    """
    from transformers import T5TokenizerFast

    words = Counter(word for text in TOKENIZER_TEXTS for word in text.replace(",", " ").split())
    most = max(words.values())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, _SPACE: -8.0}
    pieces |= {letter: -9.0 for letter in string.printable if not letter.isspace()}
    pieces |= {_SPACE + word: -4.0 - most / count for word, count in sorted(words.items())}
    return T5TokenizerFast(vocab=list(pieces.items()), extra_ids=4, model_max_length=512)


def t5_sizes(vocab_size: int, layers: int = 3) -> dict[str, object]:
    """Of a T5 or UMT5 encoder; arguments of its config."""
    return {
        "vocab_size": vocab_size,
        "d_model": TEXT_HIDDEN,
        "d_kv": TEXT_HIDDEN // HEADS,
        "d_ff": 120,
        "num_layers": layers,
        "num_heads": HEADS,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 16,
        "dtype": "float32",
    }
