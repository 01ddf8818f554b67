"""One generation, as asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crossdock.runtime.errors import RequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts and sampling settings.

    `height` and `width` are in pixels. `guidance_scale` None takes the pipeline's own default.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 4
    height: int = 256
    width: int = 256
    guidance_scale: float | None = None

    def validate(self) -> None:
        """Raise `RequestError` for the first setting that no pipeline could take."""
        if not self.prompts:
            raise RequestError("prompts: found none; give at least one")
        for index, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise RequestError(f"prompts: prompt {index} is empty; describe the picture")
        for name in ("steps", "height", "width"):
            value = getattr(self, name)
            if value < 1:
                raise RequestError(f"{name}: found {value}; allowed: an integer >= 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed: found {self.seed}; allowed: an integer from 0 to {MAX_SEED}")
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise RequestError(f"guidance_scale: found {scale}; allowed: a finite number >= 0")
