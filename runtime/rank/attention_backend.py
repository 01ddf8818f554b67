"""The choke point: diffusers transformers call `dispatch_attention_fn`; this puts sequence parallelism behind it.

diffusers looks a backend up in its registry and hands the processor's `_parallel_config` on to it. Two backends are
registered there, once; which model one of them works for, and with which groups, travels in `_parallel_config`. A
processor that calls torch's attention itself is listened to while its module runs. No module global of ours is
involved, no model is rewritten, and `remove` gives the model back as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from crossdock.parallel.regions import ModuleAttention, SequenceParallelism
from crossdock.runtime.models.diffusers_api import dispatch_to, dispatches, register_attention


def _crossdock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: ModuleAttention | None = None,
) -> Tensor:
    """query, key, value: `[batch, seq, heads, head_dim]`; local tokens inside a sequence region, all outside."""
    if _parallel_config is None:
        raise ValueError(
            f"attention of a query {tuple(query.shape)} to a key {tuple(key.shape)} is kept from sequence parallelism; "
            "possible where every rank holds the keys whole: name the module in the region's cross"
        )
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if _parallel_config.running:
        return _parallel_config.attend(query, key, value, mask=attn_mask, **options)
    return _local_attention(query, key, value, attn_mask, **options)


def _cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query `[batch, local or all tokens, heads, head_dim]`; key, value: all of another sequence."""
    return _local_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def _local_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, mask, **options).transpose(1, 2)


BACKEND = register_attention("crossdock", _crossdock_attention)
CROSS_BACKEND = register_attention("crossdock_cross", _cross_attention)
"""Of modules whose keys every rank holds whole: some processors hand no `_parallel_config` on for those."""


class _Listening(TorchFunctionMode):
    """Sends torch's attention to `attention`. What that calls in turn is not listened to."""

    def __init__(self, attention: ModuleAttention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **options: object,
    ) -> Tensor:
        """query, key, value: `[batch, heads, local tokens, head_dim]`."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self._attention.attend(query, key, value, mask=attn_mask, **options).transpose(1, 2)


class AttentionBinding:
    """Points every attention of a model at a `SequenceParallelism`; `remove` undoes it."""

    def __init__(self, model: nn.Module, sequence: SequenceParallelism) -> None:
        """
        Raises:
            ValueError: the model has no attention processor that can be pointed elsewhere.
        """
        self._undo: list[Callable[[], None]] = []
        taken: dict[int, tuple[bool, ModuleAttention]] = {}
        scattered = False
        for path, module in model.named_modules():
            processor = getattr(module, "processor", None)
            cross, attention = sequence.is_cross(path), sequence.attention_of(path)
            backend = CROSS_BACKEND if cross else BACKEND
            scattered = scattered or sequence.scatters_heads(path)
            if processor is None or sequence.scatters_heads(path) or (cross and not dispatches(processor)):
                continue
            if not dispatches(processor):
                self._listen(module, attention)
            elif taken.setdefault(id(processor), (cross, attention)) == (cross, attention):
                self._undo.append(dispatch_to(processor, backend, attention))
            else:  # modules that share a processor do different things
                self._undo.append(dispatch_to(self._own_processor(module, processor), backend, attention))
        if not (self._undo or scattered):
            raise ValueError(f"{type(model).__name__} has no attention that diffusers dispatches")

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _own_processor(self, module: nn.Module, processor: nn.Module) -> nn.Module:
        self._undo.append(lambda: setattr(module, "processor", processor))
        module.processor = copy.copy(processor)
        return module.processor

    def _listen(self, module: nn.Module, attention: ModuleAttention) -> None:
        listening = ExitStack()

        def begin(*_: object) -> None:
            if attention.running:
                listening.enter_context(_Listening(attention))

        def end(*_: object) -> None:
            listening.close()

        self._undo.append(module.register_forward_pre_hook(begin).remove)
        self._undo.append(module.register_forward_hook(end, always_call=True).remove)
