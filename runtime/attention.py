"""The choke point: diffusers transformers call `dispatch_attention_fn`; this puts sequence parallelism behind it.

diffusers looks a backend up in its registry and hands the processor's `_parallel_config` on to it. A backend is
registered there once; which model it works for, and with which groups, travels in `_parallel_config`. No module
global of ours is involved, no model is rewritten, and `remove` gives the processors back as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from crossdock.parallel.regions import SequenceParallelism


def _backend_name() -> Any:
    """A member of diffusers' enum; the enum is closed, so it is made by hand."""
    name = str.__new__(AttentionBackendName, "crossdock")
    name._name_, name._value_ = "CROSSDOCK", "crossdock"
    return name


BACKEND = _backend_name()


@_AttentionBackendRegistry.register(BACKEND)  # type: ignore[untyped-decorator, unused-ignore]
def _crossdock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: SequenceParallelism | None = None,
) -> Tensor:
    """query, key, value: `[batch, seq, heads, head_dim]`; local tokens inside a sequence region, all outside."""
    assert _parallel_config is not None
    layout = _parallel_config.layout
    if layout is not None:
        return _parallel_config.attention.attend(
            query, key, value, layout=layout, mask=attn_mask, scale=scale, is_causal=is_causal, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return output.transpose(1, 2)


class AttentionBinding:
    """Points every attention processor of a model at a `SequenceParallelism`; `remove` undoes it."""

    def __init__(self, model: nn.Module, sequence: SequenceParallelism) -> None:
        """
        Raises:
            ValueError: the model has no attention processor that can be pointed elsewhere.
        """
        self._before: list[tuple[Any, Any, Any]] = []
        for module in model.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_attention_backend") and hasattr(processor, "_parallel_config"):
                self._before.append((processor, processor._attention_backend, processor._parallel_config))
                processor._attention_backend = BACKEND
                processor._parallel_config = sequence
        if not self._before:
            raise ValueError(f"{type(model).__name__} has no attention that diffusers dispatches")

    def remove(self) -> None:
        for processor, backend, config in self._before:
            processor._attention_backend, processor._parallel_config = backend, config
        self._before.clear()
