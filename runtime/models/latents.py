"""How many pixels and frames one latent of a VAE stands for, by its config: every class says it in its own way.

And videos that a pipeline makes chunk by chunk: all steps for one, then all for the next.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers

from crossdock.runtime.models.spec import ModelSpec


def latent_pixels(config: Mapping[str, Any]) -> int:
    """Pixels along each side of a latent."""
    for name in ("scale_factor_spatial", "spatial_compression_ratio"):
        if config.get(name):
            return int(config[name])
    if "spatial_downsample_factors" in config:
        return math.prod(config["spatial_downsample_factors"])
    if "temperal_downsample" in config:
        return 1 << len(config["temperal_downsample"])
    return 1 << max(len(config.get("block_out_channels", ())) - 1, 0)


def latent_frames(config: Mapping[str, Any]) -> int:
    """Frames per latent after the first, which stands for one; 1 where there is no time."""
    for name in ("scale_factor_temporal", "temporal_compression_ratio"):
        if config.get(name):
            return int(config[name])
    if "temporal_downsample_factors" in config:
        return math.prod(config["temporal_downsample_factors"])
    return 1 << sum(map(bool, config.get("temperal_downsample", ())))


def number_of_chunks(spec: ModelSpec, frames: int | None) -> int:
    """How often a pipeline runs its steps. `frames`: of the video; None: as many as it makes by default."""
    if spec.chunk_frames is None:
        return 1
    if frames is None:
        frames = inspect.signature(getattr(diffusers, spec.pipeline).__call__).parameters["num_frames"].default
    return -(-frames // spec.chunk_frames)
