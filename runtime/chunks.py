"""Videos that a pipeline makes chunk by chunk: all steps for one, then all for the next."""

from __future__ import annotations

import inspect

import diffusers

from crossdock.runtime.specs import ModelSpec


def number_of_chunks(spec: ModelSpec, frames: int | None) -> int:
    """How often a pipeline runs its steps. `frames`: of the video; None: as many as it makes by default."""
    if spec.chunk_frames is None:
        return 1
    if frames is None:
        frames = inspect.signature(getattr(diffusers, spec.pipeline).__call__).parameters["num_frames"].default
    return -(-frames // spec.chunk_frames)
