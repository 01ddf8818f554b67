"""Which gang a run gets: the config and the launcher have to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from crossdock.runtime.config.schema import LaunchConfig, RunConfig
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.watch.gang import Gang

Launcher = Literal["ray", "torchrun"]

MakeGang = Callable[[LaunchConfig, int, str], Gang]
"""Makes a gang from (launch section, number of ranks, "cpu" or "cuda")."""


def choose_gang(config: RunConfig, launcher: Launcher, command: str) -> MakeGang | None:
    """None: the engine's own choice, Ray. `command`: for the message, when the config wants another launcher."""
    wanted = config.launch.launcher
    if wanted not in ("auto", launcher):
        way = (
            f"torchrun --nproc-per-node {config.world_size} -m crossdock.launch.torchrun {command} ..."
            if wanted == "torchrun"
            else f"crossdock {command} ..."
        )
        raise ConfigError(f"found {wanted}, but this is {launcher}; start it with: {way}", "launch.launcher")
    if launcher == "ray":
        return None
    from crossdock.launch.gangs.torchrun_gang import TorchrunGang

    return TorchrunGang
