"""One generation, as asked for. The options of the command line, the keywords of Python and what the ranks get come
from the fields of `RequestItem` and `GenerateRequest`; whoever adds one adds it there, and to the keywords' types.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, Self, TypedDict, Unpack

from crossdock.runtime.errors import RequestError

MAX_SEED = 2**63 - 1
MAX_STEPS = 10_000
MAX_SIDE = 2**31 - 1
"""Of a picture, and frames of a video: what fits is a question of memory (`request_checks`)."""
MAX_CHARACTERS = 100_000
"""Of a prompt; the longest that a text encoder reads has some thousand tokens."""
MAX_PICTURES = 100_000
"""Of one request."""
_MAX_SHOWN = 60


class SharedOptions(TypedDict, total=False):
    """The keywords for what all items share, for type checkers: the fields of `GenerateRequest`."""

    steps: int
    height: int
    width: int
    guidance_scale: float | None
    frames: int | None
    images_per_prompt: int
    batch_size: int
    time_limit_s: float | None


class RequestOptions(SharedOptions, total=False):
    """All keywords that stand beside the prompts."""

    negative_prompt: str | None
    seed: int


def _option(text: str, default: object = ...) -> Any:
    """A field that users set; `text` is its help. It has to be given where there is no default."""
    return field(metadata={"help": text}) if default is ... else field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RequestItem:
    """What may differ from picture to picture."""

    prompt: str = _option("What to draw; repeat it for several pictures.")
    negative_prompt: str | None = _option("What not to draw, where the pipeline has guidance.", None)
    seed: int = _option("Seed of the initial noise, which is drawn on the CPU.", 0)


@dataclass(frozen=True)
class GenerateRequest:
    """What one user, or several, want drawn in one go: items, and the settings that they share."""

    items: tuple[RequestItem, ...]
    steps: int = _option("Denoising steps.", 4)
    height: int = _option("Height in pixels.", 256)
    width: int = _option("Width in pixels.", 256)
    guidance_scale: float | None = _option("Guidance; by default the pipeline's own.", None)
    frames: int | None = _option("Frames of a video; by default the pipeline's own.", None)
    images_per_prompt: int = _option("Pictures of each prompt; number i is drawn with seed + i.", 1)
    batch_size: int = _option("Pictures that a replica computes at once.", 1)
    time_limit_s: float | None = _option(
        "Seconds for each round of pictures, faults included; it then ends with its step. By default, the config's.",
        None,
    )

    @classmethod
    def of(
        cls,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        **shared: Unpack[SharedOptions],
    ) -> Self:
        """Of one prompt or several, all with one negative prompt; picture i of the request is drawn with `seed + i`.

        Raises:
            RequestError: no seeds can be told from `seed` and `images_per_prompt`; `validate` checks the rest.
        """
        items = tuple(RequestItem(text, negative_prompt) for text in as_prompts(prompt))
        request = cls(items, **shared)
        check_whole("images_per_prompt", request.images_per_prompt, 1, MAX_PICTURES)
        every = request.images_per_prompt
        check_whole("seed", seed, 0, MAX_SEED - max(len(items) * every, 1) + 1)
        return replace(request, items=tuple(replace(item, seed=int(seed) + n * every) for n, item in enumerate(items)))

    @property
    def pictures(self) -> tuple[RequestItem, ...]:
        """One item for each picture or video, those of the first prompt first."""
        return tuple(replace(item, seed=item.seed + n) for item in self.items for n in range(self.images_per_prompt))

    def validate(self) -> None:
        """Raise `RequestError` for the first setting that no pipeline could take."""
        if not isinstance(self.items, tuple) or not all(isinstance(item, RequestItem) for item in self.items):
            raise RequestError(f"items: found {shown(self.items)}; allowed: a tuple of RequestItem")
        if not self.items:
            raise RequestError("prompts: found none; give at least one")
        check_whole("images_per_prompt", self.images_per_prompt, 1, MAX_PICTURES)
        check_whole("batch_size", self.batch_size, 1, MAX_PICTURES)
        check_whole("prompts x images_per_prompt", len(self.items) * self.images_per_prompt, 1, MAX_PICTURES)
        self._check_items()
        check_whole("steps", self.steps, 1, MAX_STEPS)
        for name in ("height", "width"):
            check_whole(name, getattr(self, name), 1, MAX_SIDE)
        if self.frames is not None:
            check_whole("frames", self.frames, 1, MAX_SIDE)
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, ">= 0")
        if self.time_limit_s is not None:
            _check_number("time_limit_s", self.time_limit_s, "> 0")

    def _check_items(self) -> None:
        first = self.items[0].negative_prompt
        alike = all(item.negative_prompt is first for item in self.items)
        for index, item in enumerate(self.items):
            _check_text(f"prompts: prompt {index}", item.prompt)
            if not item.prompt.strip():
                raise RequestError(f"prompts: prompt {index} is empty; describe the picture")
            negative = "negative_prompt" if alike else f"negative_prompt of prompt {index}"
            if item.negative_prompt is not None:
                _check_text(negative, item.negative_prompt)
            if (item.negative_prompt is None) != (first is None):  # without one, some pipelines leave guidance out
                here, there = ("none", "one") if item.negative_prompt is None else ("one", "none")
                raise RequestError(
                    f"{negative}: found {here}, but prompt 0 has {there}; give each one, which may be empty, or none"
                )
            check_whole("seed", item.seed, 0, MAX_SEED - self.images_per_prompt + 1)


@dataclass(frozen=True)
class RankRequest:
    """One attempt at one round of a request, as the engine sends it to the ranks.

    Attributes:
        asked: with an item for each picture of the round.
        number: of the round; a cancel names it. Never falls from one to the next.
        spent_s: how much of the time limit earlier attempts took.
        keep_every: after every so many steps, what it takes to resume is kept. 0: never.
    """

    asked: GenerateRequest
    number: int = 0
    spent_s: float = 0.0
    keep_every: int = 0


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
