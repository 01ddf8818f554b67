"""What a pipeline refuses: where its library says that a value does not do, the request is at fault, not the rank."""

from __future__ import annotations

import traceback
from pathlib import Path

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


def _is_of_a_library(error: ValueError) -> bool:
    """Raised in the libraries, or below them in another package that is installed."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    named = [name for name in packages if name in (*_LIBRARIES, _OURS)]
    if not named or named[-1] == _OURS:
        return False
    return packages[-1] in _LIBRARIES or not _INSTALLED.isdisjoint(Path(frames[-1].f_code.co_filename).parts)
