"""Whether a model can do what a request asks for."""

from __future__ import annotations

from crossdock.runtime.errors import RequestError
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.request import GenerateRequest


def check_request(plan: RunPlan, request: GenerateRequest) -> None:
    """
    Raises:
        RequestError: no pipeline, or not this one, can do what is asked for.
    """
    request.validate()
    for name in ("height", "width"):
        pixels, multiple = getattr(request, name), plan.pixel_multiple
        if pixels % multiple:
            below = max(pixels // multiple, 1) * multiple
            raise RequestError(
                f"{name}: found {pixels}; allowed for {plan.spec.family}: a multiple of {multiple}, such as {below}"
            )
    if request.guidance_scale is not None and plan.spec.guidance is None:
        raise RequestError(
            f"guidance_scale: found {request.guidance_scale:g}; {plan.spec.family} has no guidance: leave it out"
        )
    if request.negative_prompt is not None and not plan.spec.negative_prompt:
        raise RequestError(
            f"negative_prompt: found {request.negative_prompt!r}; the guidance of {plan.spec.family} takes none: "
            "leave it out"
        )
    if request.frames is not None:
        _check_frames(plan, request.frames)


def _check_frames(plan: RunPlan, frames: int) -> None:
    spec, chunk, counts = plan.spec, plan.spec.chunk_frames, plan.spec.frame_counts
    if spec.fps is None:
        raise RequestError(f"frames: found {frames}; {spec.family} makes pictures: leave it out")
    if counts is not None:
        if frames in counts:
            return
        near = max((count for count in counts if count < frames), default=counts[0])
        allowed = f"from {counts[0]} to {counts[-1]} in steps of {counts.step}, such as {near}"
        raise RequestError(f"frames: found {frames}; allowed for {spec.family}: {allowed}")
    multiple, more = (plan.frame_multiple, 1) if chunk is None else (chunk, 0)
    if (frames - more) % multiple:
        below = max((frames - more) // multiple, 1 - more) * multiple + more
        allowed = f"a multiple of {multiple}{', and one more' if more else ''}, such as {below}"
        raise RequestError(f"frames: found {frames}; allowed for {spec.family}: {allowed}")


def check_amounts(spec: ModelSpec, images_per_prompt: int, batch_size: int) -> None:
    """
    Raises:
        RequestError: nothing is to be made, or more at once than the pipeline does.
    """
    for name, count in (("images_per_prompt", images_per_prompt), ("batch_size", batch_size)):
        if count < 1:
            raise RequestError(f"{name}: found {count}; allowed: an integer >= 1")
    if batch_size > 1 and not spec.batches:
        raise RequestError(f"batch_size: found {batch_size}; {spec.family} takes one prompt at a time: leave it out")
