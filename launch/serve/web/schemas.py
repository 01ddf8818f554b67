"""What clients send. Every field of OpenAI's is honoured, or refused by its name; then those that image servers add."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from crossdock.launch.serve.encode import ImageFormat
from crossdock.launch.serve.web.errors import ApiError, refused
from crossdock.runtime.request import MAX_SEED, GenerateRequest, RequestItem

MAX_IMAGES = 10
MAX_PROMPT = 32_000
MAX_SIDE = 16_384
_RANDOM_SEEDS = 2**31
"""A seed that nobody asked for is below it: short enough to be typed again."""
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def _number_in_text(value: object) -> object:
    """Forms have texts only."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value):
        return int(value)
    return value


Whole = Annotated[int, Field(strict=True), BeforeValidator(_number_in_text)]
Real = Annotated[float, Field(allow_inf_nan=False)]


class Defaults(BaseModel):
    """What a served model does where a client does not say."""

    model_config = ConfigDict(frozen=True)

    name: str
    width: int
    height: int
    steps: int
    fps: int | None = None
    seconds: float = 4.0
    max_seconds: float = 60.0
    max_pixels: int = 2048 * 2048


class _Shared(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = None
    size: str | None = None
    user: str | None = Field(None, max_length=1024)
    seed: Whole | None = Field(None, ge=0, le=MAX_SEED - MAX_IMAGES)
    num_inference_steps: Whole | None = Field(None, ge=1, le=1000)
    guidance_scale: Real | None = Field(None, ge=0, le=100)
    true_cfg_scale: Real | None = Field(None, ge=0, le=100)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)

    @model_validator(mode="after")
    def _one_guidance(self) -> Self:
        if self.guidance_scale is not None and self.true_cfg_scale is not None:
            raise ValueError("guidance_scale and true_cfg_scale are one setting here: give one of them")
        return self

    def pixels(self, defaults: Defaults) -> tuple[int, int]:
        """Width and height.

        Raises:
            ApiError: `size` is none, or too large.
        """
        if self.size in (None, "auto"):
            return defaults.width, defaults.height
        found = _SIZE.fullmatch(self.size or "")
        if found is None:
            raise refused(f"size: found {self.size!r:.40}; allowed: WIDTHxHEIGHT, such as 1024x1024, or auto", "size")
        width, height = int(found[1]), int(found[2])
        if max(width, height) > MAX_SIDE or width * height > defaults.max_pixels:
            most = f"{defaults.max_pixels} pixels, and {MAX_SIDE} along a side"
            raise refused(f"size: found {self.size}; allowed: at most {most}", "size", "image_too_large")
        return width, height

    def check_model(self, defaults: Defaults) -> None:
        if self.model is not None and self.model != defaults.name:
            message = f"model: {self.model!r:.80} is not served here; this is {defaults.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def request(self, defaults: Defaults, pictures: int, steps: int | None = None) -> GenerateRequest:
        """Args:
        steps: where the client names none.
        """
        self.check_model(defaults)
        width, height = self.pixels(defaults)
        seed = secrets.randbelow(_RANDOM_SEEDS) if self.seed is None else self.seed
        items = tuple(RequestItem(self.prompt, self.negative_prompt, seed + n) for n in range(pictures))
        guidance = self.guidance_scale if self.guidance_scale is not None else self.true_cfg_scale
        steps = self.num_inference_steps or steps or defaults.steps
        return GenerateRequest(items, steps=steps, height=height, width=width, guidance_scale=guidance)


QUALITY = {"low": 0.5, "medium": 1.0, "auto": 1.0, "standard": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.5}
"""quality -> how many of the model's usual steps are taken."""


class ImageRequest(_Shared):
    """`POST /v1/images/generations`."""

    n: Whole | None = Field(None, ge=1, le=MAX_IMAGES)
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    background: Literal["opaque", "auto", "transparent"] | None = None
    moderation: Literal["low", "auto"] | None = None
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = None
    output_compression: Whole | None = Field(None, ge=0, le=100)
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Whole | None = Field(None, ge=0, le=3)
    style: Any = None
    complexity: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    safety_identifier: str | None = Field(None, max_length=1024)
    svg_reasoning: Any = None

    @property
    def format(self) -> ImageFormat:
        if self.output_format in ("gif", "svg"):
            allowed = "allowed: png, jpeg, webp"
            raise refused(f"output_format: {self.output_format} is not made here; {allowed}", "output_format")
        return self.output_format or "png"  # type: ignore[return-value]

    def check(self, defaults: Defaults) -> None:
        """Refuse by name what this server cannot honour.

        Raises:
            ApiError: 400, or 404 for another model.
        """
        self.check_model(defaults)
        for name in ("style", "complexity", "frame_count", "frame_duration_ms", "svg_reasoning"):
            if getattr(self, name) is not None:
                raise refused(f"{name}: not supported here; leave it out", name, "unsupported_parameter")
        if self.background == "transparent":
            raise refused("background: pictures are opaque here; allowed: opaque, auto", "background")
        if self.format == "png" and self.output_compression not in (None, 100):
            message = "output_compression: png is lossless; leave it out, or ask for jpeg or webp"
            raise refused(message, "output_compression")
        if self.partial_images and not self.stream:
            raise refused("partial_images: only with stream: true", "partial_images")
        if self.stream and self.response_format == "url":
            raise refused("response_format: a stream has b64_json only", "response_format")
        if self.num_inference_steps is not None and self.quality not in (None, "auto"):
            raise refused("quality: it is the number of steps here; give it or num_inference_steps", "quality")

    def generate_request(self, defaults: Defaults) -> GenerateRequest:
        steps = max(1, round(defaults.steps * QUALITY[self.quality or "auto"]))
        return self.request(defaults, self.n or 1, steps)


class VideoRequest(_Shared):
    """`POST /v1/videos`."""

    seconds: str | Real | None = None
    num_frames: Whole | None = Field(None, ge=1, le=100_000)
    fps: Whole | None = Field(None, ge=1, le=240)
    input_reference: Any = None
