"""Whether a model can do what a request asks for."""

from __future__ import annotations

import torch

from crossdock.offload.memory.device_memory import total_bytes
from crossdock.runtime.errors import RequestError
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.request import GenerateRequest

MOST_DEVICE_BYTES = 2**40
"""No device has more."""


def check_request(plan: RunPlan, request: GenerateRequest) -> None:
    """
    Raises:
        RequestError: no pipeline, or not this one, can do what is asked for, or no such device can hold it.
    """
    layout, spec = plan.layout, plan.layout.spec
    request.validate()
    if request.batch_size > 1 and not spec.batches:
        raise RequestError(
            f"batch_size: found {request.batch_size}; {spec.family} takes one prompt at a time: leave it out"
        )
    for name in ("height", "width"):
        pixels, multiple = getattr(request, name), layout.pixel_multiple
        if pixels % multiple:
            below = max(pixels // multiple, 1) * multiple
            raise RequestError(
                f"{name}: found {pixels}; allowed for {spec.family}: a multiple of {multiple}, such as {below}"
            )
    if request.guidance_scale is not None and spec.guidance is None:
        raise RequestError(
            f"guidance_scale: found {request.guidance_scale:g}; {spec.family} has no guidance: leave it out"
        )
    negative = request.items[0].negative_prompt  # where one has none, all have none
    if request.guidance_scale is not None and request.guidance_scale > 1:
        _check_guides(layout, request.guidance_scale, negative)
    if negative is not None and not spec.negative_prompt:
        raise RequestError(
            f"negative_prompt: found {negative!r}; the guidance of {spec.family} takes none: leave it out"
        )
    if request.frames is not None:
        _check_frames(layout, request.frames)
    _check_size(layout, _device_bytes(plan), request)


def _check_guides(layout: ModelLayout, scale: float, negative: str | None) -> None:
    """Where guidance would do nothing, and nobody would say so."""
    if not layout.guided:
        raise RequestError(
            f"guidance_scale: found {scale:g}; this checkpoint of {layout.spec.family} is distilled, and guidance does "
            "nothing in it: leave it out"
        )
    if layout.spec.guides_with_negative and negative is None:
        raise RequestError(
            f"guidance_scale: found {scale:g}; {layout.spec.family} guides only where there is a negative prompt: give "
            "one, which may be empty"
        )


def _check_size(layout: ModelLayout, device_bytes: int, request: GenerateRequest) -> None:
    """What the decoder makes has to be on one device at once: the whole result, and one frame's last features."""
    itemsize, frames = layout.pipeline_dtype.itemsize, request.frames or 1
    values, features = 3 * frames, layout.decoder_features
    pixel_bytes = max(values, features) * itemsize
    needed = request.height * request.width * pixel_bytes
    if needed > device_bytes:
        what = f"{values} values" if values >= features else f"{features} features"
        raise RequestError(
            f"height x width: {request.height} x {request.width} pixels with {what} of {itemsize} bytes each take "
            f"{needed / 2**30:.4g} GiB to decode, and a device has {device_bytes / 2**30:.4g} GiB; ask for less"
        )


def _device_bytes(plan: RunPlan) -> int:
    """Memory of a rank's device, where the ranks run on this machine."""
    there = plan.layout.device == "cpu" or torch.cuda.is_available()
    if plan.config.launch.ray_address is not None or not there:
        return MOST_DEVICE_BYTES
    return total_bytes(torch.device("cuda:0" if plan.layout.device == "cuda" else "cpu"))


def nearest_frames(layout: ModelLayout, frames: int) -> int:
    """The number of frames, at most so many if that can be, that the model can make."""
    chunk, counts = layout.spec.chunk_frames, layout.spec.frame_counts
    if counts is not None:
        return max((count for count in counts if count <= frames), default=counts[0])
    multiple, more = (layout.frame_multiple, 1) if chunk is None else (chunk, 0)
    return max((frames - more) // multiple, 1 - more) * multiple + more


def _check_frames(layout: ModelLayout, frames: int) -> None:
    spec, counts = layout.spec, layout.spec.frame_counts
    if spec.fps is None:
        raise RequestError(f"frames: found {frames}; {spec.family} makes pictures: leave it out")
    if (near := nearest_frames(layout, frames)) == frames:
        return
    multiple, one_more = (
        (layout.frame_multiple, ", and one more") if spec.chunk_frames is None else (spec.chunk_frames, "")
    )
    allowed = f"a multiple of {multiple}{one_more}"
    if counts is not None:
        allowed = f"from {counts[0]} to {counts[-1]} in steps of {counts.step}"
    raise RequestError(f"frames: found {frames}; allowed for {spec.family}: {allowed}, such as {near}")
