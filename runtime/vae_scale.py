"""What a VAE makes of one latent, by its config: every class says it in its own way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock.runtime.checkpoint import read_json
from crossdock.runtime.errors import CheckpointError

_MOST = 2**16
_DOUBLINGS = 64


@dataclass(frozen=True)
class VaeScale:
    """Pixels along each side of a latent, frames per latent, and features of each pixel in the decoder, at least."""

    pixels: int
    frames: int
    features: int


def vae_scale(path: Path) -> VaeScale:
    """What the config in `path` says.

    Raises:
        CheckpointError: it says nothing that could be.
    """
    config = read_json(path)
    try:
        scale = VaeScale(latent_pixels(config), latent_frames(config), decoder_features(config))
        if 1 <= scale.pixels <= _MOST and 1 <= scale.frames <= _MOST:
            return scale
        reason = f"found {scale}"
    except Exception as error:  # a config can hold anything
        reason = str(error)
    raise CheckpointError(f"{path}: does not say how large pictures are ({reason[:200]}); is the file damaged?")


def latent_pixels(config: Mapping[str, Any]) -> int:
    """Pixels along each side of a latent."""
    for name in ("scale_factor_spatial", "spatial_compression_ratio"):
        if config.get(name):
            return int(config[name])
    if "spatial_downsample_factors" in config:
        return math.prod(config["spatial_downsample_factors"])
    if "temperal_downsample" in config:
        return 1 << min(len(config["temperal_downsample"]), _DOUBLINGS)
    return 1 << min(max(len(config.get("block_out_channels", ())) - 1, 0), _DOUBLINGS)


def latent_frames(config: Mapping[str, Any]) -> int:
    """Frames per latent after the first, which stands for one; 1 where there is no time."""
    for name in ("scale_factor_temporal", "temporal_compression_ratio"):
        if config.get(name):
            return int(config[name])
    if "temporal_downsample_factors" in config:
        return math.prod(config["temporal_downsample_factors"])
    return 1 << min(sum(map(bool, config.get("temperal_downsample", ()))), _DOUBLINGS)


def decoder_features(config: Mapping[str, Any]) -> int:
    """Features of each pixel when it is decoded, at least: the last layer makes three colours of them."""
    whole = not isinstance(config.get("patch_size"), int)  # else the last layer makes several pixels at once
    return max(int(config.get("block_out_channels", (3,))[0]), 3) if whole else 3
