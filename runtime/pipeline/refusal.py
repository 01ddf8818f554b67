"""What a pipeline refuses: where its library says that a value does not do, the request is at fault, not the rank."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from crossdock.runtime.reports.media import Media
from crossdock.runtime.request import GenerateRequest

_LIBRARIES = ("diffusers", "transformers")
_OURS = __package__.partition(".")[0]
_INSTALLED = frozenset({"site-packages", "dist-packages"})


class PipelineRefusedError(ValueError):
    """What the pipeline of the replica's first rank has refused, on the others."""


def refusal(error: ValueError) -> str | None:
    """What a library says of what it was given, in one line; None: the error is crossdock's own, or a patch's."""
    if not isinstance(error, PipelineRefusedError) and not _is_of_a_library(error):
        return None
    return " ".join(str(error).split()) or type(error).__name__


def check_steps(finished: int, asked: int) -> None:
    """
    Raises:
        PipelineRefusedError: the scheduler counts steps otherwise, or the loop cannot be heard.
    """
    if finished != asked:
        raise PipelineRefusedError(
            f"of {asked} steps that were asked for, its loop was heard to make {finished}: give the checkpoint a "
            "scheduler that makes as many steps as it is asked for"
        )


def other_size(media: Sequence[Media], request: GenerateRequest) -> str | None:
    """What it made, where that is not what was asked for: some pipelines draw in the nearest of their own sizes."""
    for each in media:
        if each.size != (request.width, request.height):
            asked, made = f"{request.width} x {request.height}", f"{each.size[0]} x {each.size[1]}"
            return f"it made {made} pixels where {asked} were asked for; ask for what it makes"
    return None


def _is_of_a_library(error: ValueError) -> bool:
    """Raised in the libraries, or below them in another package that is installed."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    named = [name for name in packages if name in (*_LIBRARIES, _OURS)]
    if not named or named[-1] == _OURS:
        return False
    return packages[-1] in _LIBRARIES or not _INSTALLED.isdisjoint(Path(frames[-1].f_code.co_filename).parts)
