"""One generation, as asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crossdock.runtime.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts and sampling settings.

    `height` and `width` are in pixels. `guidance_scale` None takes the pipeline's own default.

    Attributes:
        frames: of a video; None takes the pipeline's own default.
        number: which request this is to an engine; a cancel names it. Never falls from one request to the next.
        time_limit_s: seconds after which it is stopped, at the next step's end. None: no limit.
        spent_s: how much of `time_limit_s` earlier attempts at it took.
        keep_every: after every so many steps, what it takes to resume is kept. 0: never.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int = 4
    height: int = 256
    width: int = 256
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    number: int = 0
    time_limit_s: float | None = None
    spent_s: float = 0.0
    keep_every: int = 0

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
        if self.frames is not None and self.frames < 1:
            raise RequestError(f"frames: found {self.frames}; allowed: an integer >= 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed: found {self.seed}; allowed: an integer from 0 to {MAX_SEED}")
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise RequestError(f"guidance_scale: found {scale}; allowed: a finite number >= 0")
        limit = self.time_limit_s
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise RequestError(f"time_limit_s: found {limit}; allowed: a finite number > 0")
        if self.keep_every < 0:
            raise RequestError(f"keep_every: found {self.keep_every}; allowed: an integer >= 0 (0: never)")
        if not 0 <= self.number <= MAX_NUMBER:
            raise RequestError(f"number: found {self.number}; allowed: an integer from 0 to {MAX_NUMBER}")
