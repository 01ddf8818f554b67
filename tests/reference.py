"""The independent reference: a plain single-process diffusers run of the same checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

PROMPT = (
    "a lighthouse on a cliff above a stormy sea at dusk, seen from a small boat, with gulls, long waves, a red roof "
    "and one lit window"
)
"""Long enough that its padded length differs from the empty prompt's: under guidance, Z-Image then needs a mask."""
OTHER_PROMPT = "two tin robots playing chess under a lamp"
EVEN_SIZE = (256, 256)
"""256 image tokens."""
ODD_SIZE = (208, 176)
"""13 x 11 = 143 image tokens: does not divide by 2 or 4."""
TOLERANCE = 1e-4


@cache
def _pipeline(directory: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def reference_latents(
    directory: Path, prompt: str = PROMPT, size: tuple[int, int] = EVEN_SIZE, seed: int = 0, steps: int = 4
) -> Tensor:
    """`[1, channels, height, width]`, fp32."""
    latents: Tensor = _pipeline(directory)(
        prompt=prompt,
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        return_dict=False,
    )[0]
    return latents


def max_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, f"{found.shape} instead of {expected.shape}"
    assert found.isfinite().all()
    return float((found - expected).abs().max())
