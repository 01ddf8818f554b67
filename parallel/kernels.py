"""Attention over the tokens that one rank holds, and how partial results are put together.

Ring attention needs the log-sum-exp of the scores next to the output, which `scaled_dot_product_attention`
does not return; the fused kernels beneath it do, each in its own way. What differs between them ends here.

The mask is a bias in the query's dtype, -inf where a key is not attended: `[batch, keys]`, or where it differs from
query to query, or from head to head, `[batch, 1 or heads, 1 or seq, keys]`. Whether a row has no key at all is read
from the bias and never from a kernel's output: what kernels return for such rows differs (the CPU one says
log-sum-exp 0).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

_LANES = 8
"""The CUDA kernels want a head_dim that is a multiple of this."""
_BIAS_ALIGNMENT = 16
"""The memory-efficient kernel reads rows of the bias that start at multiples of this many elements."""


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """All of attention at once. Rows without any key give 0.

    Args:
        query: `[batch, seq, heads, head_dim]`.
        key, value: `[batch, keys, kv_heads, head_dim]`; `kv_heads` divides `heads`.
        bias: None, or as above.

    Returns:
        `[batch, seq, heads, head_dim]`.
    """
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query)
    key, value = _repeat_heads(key, query.shape[2]), _repeat_heads(value, query.shape[2])
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    bias = by_row(bias)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2)
    return out if bias is None else out.masked_fill(_per_row(keyless(bias)), 0.0)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, and the log-sum-exp (natural) of the scores. Shapes as in `attention`.

    Returns:
        out `[batch, seq, heads, head_dim]`, lse fp32 `[batch, heads, seq]`: 0 and -inf where there is no key.
    """
    batch, seq, heads, _ = query.shape
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), query.new_full((batch, heads, seq), -torch.inf, dtype=torch.float32)
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    bias = by_row(bias)
    kernel = _cuda_kernel if query.is_cuda else _cpu_kernel
    out, lse = kernel(q, k, v, bias, scale)
    out, lse = out.transpose(1, 2), lse[..., :seq].float()
    if bias is not None:
        nothing = keyless(bias)
        out = out.masked_fill(_per_row(nothing), 0.0)
        lse = lse.masked_fill(nothing, -torch.inf)
    return out, lse


def by_row(bias: Tensor | None) -> Tensor | None:
    """`[batch, keys]` -> `[batch, 1, 1, keys]`; what has its rows already stays."""
    return bias[:, None, None, :] if bias is not None and bias.ndim == 2 else bias


def keyless(bias: Tensor) -> Tensor:
    """bias `[..., keys]` -> which rows have no key to attend to: bool `[...]`."""
    return (bias == -torch.inf).all(-1)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each (arXiv 2310.01889, 1805.02867).

    Args:
        out: fp32 `[batch, seq, heads, head_dim]`, overwritten. lse: fp32 `[batch, heads, seq]`.
        part_out, part_lse: the same for the other keys, `part_out` in any float dtype.

    Returns:
        out and lse over all the keys, fp32. A part whose lse is -inf adds nothing.
    """
    total = torch.logaddexp(lse, part_lse)
    # where neither side has a key, -inf - -inf would be NaN; any finite shift leaves both weights at 0
    shift = total.masked_fill(total == -torch.inf, 0.0)
    weight, part_weight = (_per_row(torch.exp(side - shift)) for side in (lse, part_lse))
    return out.mul_(weight).addcmul_(part_out.float(), part_weight), total


def _per_row(weight: Tensor) -> Tensor:
    """`[batch, heads, seq]` -> `[batch, seq, heads, 1]`"""
    return weight.transpose(1, 2).unsqueeze(-1)


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: every key head serves `heads / kv_heads` neighbouring query heads."""
    groups = heads // tensor.shape[2]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=2)


# -- kernels: q, k, v `[batch, heads, seq, head_dim]`, bias of four dims -> the same, lse `[batch, heads, seq or more]`


def _cpu_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, attn_mask=bias, scale=scale)
    return out, lse


def _cuda_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    q, k, v = (_pad_head_dim(tensor) for tensor in (q, k, v))
    if bias is None and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, False)):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        wide = None if bias is None else _aligned_bias(bias, (*q.shape[:3], k.shape[2]))
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse = kernel(q, k, v, wide, True, scale=scale)[:2]
    return out[..., :head_dim], lse


def _pad_head_dim(tensor: Tensor) -> Tensor:
    """Zeros in q and k leave the scores as they are; what they make in the output is cut off."""
    missing = -tensor.shape[-1] % _LANES
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _aligned_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A view of `shape`, `[batch, heads, seq, keys]`, whose rows are aligned."""
    keys = bias.shape[-1]
    storage = bias.new_zeros(*bias.shape[:-1], keys + -keys % _BIAS_ALIGNMENT)
    storage[..., :keys] = bias
    return storage[..., :keys].expand(shape)
