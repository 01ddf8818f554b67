"""One generation, as asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from crossdock.runtime.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_NUMBER = 2**63 - 1
MAX_STEPS = 10_000
MAX_SIDE = 2**31 - 1
"""Of a picture, and frames of a video: what fits is a question of memory (`request_checks`)."""
MAX_CHARACTERS = 100_000
"""Of a prompt; the longest that a text encoder reads has some thousand tokens."""
_MAX_SHOWN = 60


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
        if not isinstance(self.prompts, tuple):
            raise RequestError(f"prompts: found {shown(self.prompts)}; allowed: texts")
        if not self.prompts:
            raise RequestError("prompts: found none; give at least one")
        for index, prompt in enumerate(self.prompts):
            _check_text(f"prompts: prompt {index}", prompt)
            if not prompt.strip():
                raise RequestError(f"prompts: prompt {index} is empty; describe the picture")
        if self.negative_prompt is not None:
            _check_text("negative_prompt", self.negative_prompt)
        check_whole("steps", self.steps, 1, MAX_STEPS)
        for name in ("height", "width"):
            check_whole(name, getattr(self, name), 1, MAX_SIDE)
        if self.frames is not None:
            check_whole("frames", self.frames, 1, MAX_SIDE)
        check_whole("seed", self.seed, 0, MAX_SEED - len(self.prompts) + 1)  # number i is drawn with seed + i
        check_whole("keep_every", self.keep_every, 0)
        check_whole("number", self.number, 0, MAX_NUMBER)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, ">= 0")
        _check_number("spent_s", self.spent_s, ">= 0")
        if self.time_limit_s is not None:
            _check_number("time_limit_s", self.time_limit_s, "> 0")


def as_prompts(given: object) -> tuple[str, ...]:
    """One text, or several; what is neither is left for `validate` to refuse."""
    return tuple(given) if isinstance(given, list | tuple) else (given,)  # type: ignore[return-value]


def shown(value: object) -> str:
    """A value as it was found, with its type, in one short line."""
    text = ascii(value) if isinstance(value, str | bytes | bytearray) else repr(value)
    text = " ".join(text.split())
    return f"{text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'} ({type(value).__name__})"


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise `RequestError` where a setting is no whole number from `least` to `most`."""
    allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise RequestError(f"{name}: found {shown(value)}; allowed: {allowed}")
    if int(value) < least or (most is not None and int(value) > most):
        raise RequestError(f"{name}: found {value}; allowed: {allowed}")


def _check_number(name: str, value: object, bound: Literal["> 0", ">= 0"]) -> None:
    allowed = f"a finite number {bound}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise RequestError(f"{name}: found {shown(value)}; allowed: {allowed}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (number == 0 and bound == "> 0"):
        raise RequestError(f"{name}: found {number}; allowed: {allowed}")


def _check_text(name: str, value: object) -> None:
    """Text that tokenizers, file formats and terminals take."""
    if not isinstance(value, str):
        raise RequestError(f"{name}: found {shown(value)}; allowed: a text")
    if len(value) > MAX_CHARACTERS:
        raise RequestError(f"{name}: has {len(value)} characters; allowed: at most {MAX_CHARACTERS}")
    if "\0" in value:
        raise RequestError(f"{name}: character {value.index(chr(0))} is NUL, which no text has; remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise RequestError(
            f"{name}: character {error.start} is half of a pair (U+{code:04X}), which no text has; "
            "was it cut, or is it not UTF-8?"
        ) from None
