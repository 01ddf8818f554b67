"""Attention by xfuser's USP (arXiv 2405.07719) in place of this project's, for comparison. Optional; CUDA only.

xfuser cannot do everything: `xfuser_limits` says so before anything is loaded, and what shows only at run time is
an error. Its own defaults would not say so (padding attended, replicated text counted once per rank).

xfuser is imported when a rank constructs an `XFuserAttention`, and not before.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from crossdock.parallel.attention import check_inputs, check_layout, has_rows, score_bias
from crossdock.parallel.group import Group
from crossdock.parallel.kernels import keyless
from crossdock.parallel.sequence import SequenceLayout

_WAY_OUT = "use parallel.attention: native"
_OWN_KEYS = "it attends to the keys of the queries' own sequence"
_LANES = 8
"""The flash kernel beneath xfuser's ring wants a head_dim that is a multiple of this."""


def xfuser_installed() -> bool:
    return importlib.util.find_spec("xfuser") is not None


def xfuser_limits(device_type: str, tp_degree: int, heads: int, ulysses_degree: int) -> str | None:
    """Why xfuser cannot run a model with `heads` attention heads here; None when nothing is known against it."""
    if device_type != "cuda":
        return f"it runs on CUDA only, and the device is {device_type}"
    if tp_degree > 1:
        return f"it works with tp_degree 1 only, and tp_degree is {tp_degree}"
    if heads % ulysses_degree:
        return f"{heads} attention heads do not divide by ulysses_degree {ulysses_degree}"
    return None


class XFuserAttention:
    """Drop-in for `SequenceParallelAttention`, within the limits.

    xfuser keeps its groups in module globals: in one process, the last one constructed is the one that works.
    """

    def __init__(
        self,
        *,
        ulysses_group: Group | None,
        ulysses_rank: int,
        ulysses_degree: int,
        ring_group: Group | None,
        ring_rank: int,
        ring_degree: int,
        after_collective: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            after_collective: called whenever a whole attention, with its exchanges, was given to the compute stream.

        Raises:
            ImportError: xfuser, or something that it imports, is not installed.
        """
        self._after_collective = after_collective
        self._index = ring_rank * ulysses_degree + ulysses_rank
        self._parts = ring_degree * ulysses_degree
        self._ulysses_degree = ulysses_degree
        self._ring_degree = ring_degree
        self._usp = _module("model_executor.layers.usp").USP
        backends = _module("core.distributed.attention_backend").AttentionBackendType
        # the ring merges by log-sum-exp, which SDPA's own choice of kernel does not return
        self._backend = backends.SDPA if ring_degree == 1 else backends.SDPA_FLASH
        _set_globals(
            SimpleNamespace(ULYSSES_PG=_handle(ulysses_group), RING_PG=_handle(ring_group)),
            SimpleNamespace(
                world_size=self._parts,
                rank_in_group=self._index,
                ulysses_world_size=ulysses_degree,
                ulysses_rank=ulysses_rank,
                ring_world_size=ring_degree,
                ring_rank=ring_rank,
            ),
        )

    @torch.no_grad()
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: SequenceLayout,
        key_layout: SequenceLayout | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As `SequenceParallelAttention.attend`.

        Raises:
            ValueError: what neither can do, and what xfuser cannot: the keys of another sequence, a mask that differs
                from query to query, parts or heads that do not divide, another scale, and with ring a mask, float32
                or an odd head_dim.
        """
        check_layout("query", query, layout, self._parts, self._index)
        check_inputs(query, key, value, is_causal, enable_gqa)
        if key_layout not in (None, layout):
            raise ValueError(f"xfuser cannot run this: {_OWN_KEYS}, and these are of another; {_WAY_OUT}")
        check_layout("key", key, layout, self._parts, self._index)
        if reason := self._limits(query, layout, mask, scale):
            raise ValueError(f"xfuser cannot run this: {reason}; {_WAY_OUT}")
        bias = score_bias(mask, layout, layout, query, slice(self._index, self._index + 1))
        groups = query.shape[2] // key.shape[2]
        q, k, v = (
            tensor.repeat_interleave(repeats, dim=2).transpose(1, 2)
            for tensor, repeats in ((query, 1), (key, groups), (value, groups))
        )
        options = None if bias is None else {"attn_mask": bias[:, None, None, :]}
        call = {"backend": self._backend, "combine_qkv_a2a": True, "attention_kwargs": options}
        out: Tensor = self._usp(q, k, v, **call).transpose(1, 2)
        self._after_collective()
        return out if bias is None else out.masked_fill(keyless(bias)[:, None, None, None], 0.0)

    def _limits(self, query: Tensor, layout: SequenceLayout, mask: Tensor | None, scale: float | None) -> str | None:
        heads, head_dim = query.shape[2:]
        if len(set(layout.lengths)) > 1:
            return f"it needs as many tokens on every rank, and segments {layout.segments} give {layout.lengths}"
        if heads % self._ulysses_degree:
            return f"{heads} attention heads do not divide by ulysses_degree {self._ulysses_degree}"
        if scale is not None and scale != head_dim**-0.5:
            return f"it scales by head_dim ** -0.5 = {head_dim**-0.5:.4g}, and the scale asked for is {scale:.4g}"
        if has_rows(mask):
            assert mask is not None
            return (
                f"its masks say which keys are padding, and this one of shape {tuple(mask.shape)} has rows for queries"
            )
        if self._ring_degree == 1:
            return None
        if mask is not None:
            return f"it takes no mask with ring, and ring_degree is {self._ring_degree}"
        if query.dtype not in (torch.float16, torch.bfloat16) or head_dim % _LANES:
            return (
                f"its ring needs float16 or bfloat16 and a head_dim that divides by {_LANES}; "
                f"found {query.dtype} and {head_dim}"
            )
        return None


def _module(name: str) -> Any:
    return importlib.import_module(f"xfuser.{name}")


def _handle(group: Group | None) -> dist.ProcessGroup | None:
    return group.handle if group else None


def _set_globals(groups: SimpleNamespace, place: SimpleNamespace) -> None:
    """What USP reads of xfuser's parallel and runtime state.

    xfuser's own set-up is not used: it makes a second set of process groups over the whole world.
    """
    _module("model_executor.layers.usp").PROCESS_GROUP = groups
    _module("core.distributed.parallel_state")._SP = place
    _module("core.distributed.runtime_state")._RUNTIME = SimpleNamespace(
        fp8_comms=None,
        attention_backend=None,
        runtime_config=SimpleNamespace(use_spargeattn_head_balance=False),
    )
