"""The answer to a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crossdock.runtime.reports.media import Media
from crossdock.runtime.reports.records import RankTrace


@dataclass(frozen=True)
class Generation:
    """The answer to a request, in the order of its prompts.

    Attributes:
        images: pictures, or videos where the model makes these.
        latents: for each `[1, ...]`, fp32, as the denoise loop left them; the shape is the pipeline's own.
        returned_latents: the same as diffusers returns them with `output_type="latent"`, so that its VAE takes them.
        report: the content of `report.json`.
        trace: per rank, and per round of prompts, what it did when.
    """

    images: list[Media]
    latents: list[Tensor]
    returned_latents: list[Tensor]
    report: dict[str, Any]
    trace: list[RankTrace]
