"""What a pipeline refuses: where its library says that a value does not do, the request is at fault, not the rank."""

from __future__ import annotations

import traceback

_LIBRARIES = ("diffusers", "transformers")
_OURS = __package__.partition(".")[0]


class PipelineRefusedError(ValueError):
    """What the pipeline of the replica's first rank has refused, on the others."""


def refusal(error: ValueError) -> str | None:
    """What a library says of what it was given, in one line; None: the error is crossdock's own."""
    if not isinstance(error, PipelineRefusedError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
        if [name for name in packages if name in (*_LIBRARIES, _OURS)][-1:] in ([], [_OURS]):
            return None
    return " ".join(str(error).split()) or type(error).__name__
