"""What starts things: the command line, the engine, the Ray and torchrun gangs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdock.launch.engine.engine import Engine
    from crossdock.launch.engine.generation import Generation
    from crossdock.launch.engine.request_run import RequestHandle

__all__ = ["Engine", "Generation", "RequestHandle"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # torch and diffusers are imported when the engine is, not with the command line
        from crossdock.launch.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
