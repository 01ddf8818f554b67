"""What a published checkpoint holds, found out by building its transformer without weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from crossdock.offload.live.discovery import discover_blocks
from crossdock.runtime.models.meta import build_config_on_meta, build_shape
from crossdock.runtime.models.spec import ModelSpec, Published


@dataclass(frozen=True)
class RealShape:
    """Of one checkpoint's transformers.

    Attributes:
        stacks: block stack -> how many blocks each of them has in it, in execution order.
        parameters: elements of all their stored tensors.
    """

    stacks: dict[str, int]
    parameters: int

    @property
    def bf16_bytes(self) -> int:
        return self.parameters * torch.bfloat16.itemsize


def real_model(spec: ModelSpec, published: Published) -> nn.Module:
    """A transformer with the published configuration, on the meta device."""
    model = build_shape(spec.transformer, published.config)
    return build_config_on_meta(spec.transformer, published.config) if model is None else model


def real_shape(spec: ModelSpec, published: Published) -> RealShape:
    """Found once in a process: some take seconds to build."""
    if published.name not in _SHAPES:
        _SHAPES[published.name] = shape_of(spec, published, real_model(spec, published))
    return _SHAPES[published.name]


_SHAPES: dict[str, RealShape] = {}


def shape_of(spec: ModelSpec, published: Published, model: nn.Module) -> RealShape:
    """Of `real_model`."""
    blocks = Counter(block.name.rpartition(".")[0] for block in discover_blocks(model, spec.block_stacks))
    each = sum(tensor.numel() for tensor in model.state_dict().values())
    return RealShape(dict(blocks), published.transformers * each)
