"""Which gang a run gets: the config, what is installed, and the command in use have to agree."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

from crossdock.runtime.config.schema import LaunchConfig, RunConfig
from crossdock.runtime.errors import ConfigError, LaunchError
from crossdock.runtime.watch.gang import Gang

Launcher = Literal["local", "ray", "torchrun"]
Command = Literal["crossdock", "torchrun"]
"""What the user has started: this program, or `torchrun -m crossdock.launch.torchrun`."""

MakeGang = Callable[[LaunchConfig, int, str], Gang]
"""Makes a gang from (launch section, number of ranks, "cpu" or "cuda")."""


def choose_launcher(config: RunConfig, command: Command = "crossdock", verb: str = "generate") -> Launcher:
    """`verb`: for the message, when the config wants to be started another way.

    Raises:
        ConfigError: it does.
        LaunchError: it needs Ray, which is not installed.
    """
    launch = config.launch
    wanted = launch.launcher
    if wanted != "auto" and (wanted == "torchrun") != (command == "torchrun"):
        way = (
            f"torchrun --nproc-per-node {config.world_size} -m crossdock.launch.torchrun {verb} ..."
            if wanted == "torchrun"
            else f"crossdock {verb} ..."
        )
        raise ConfigError(f"found {wanted}, but this is {command}; start it with: {way}", "launch.launcher")
    if command == "torchrun":
        return "torchrun"
    if wanted == "local":
        return "local"
    there = has_ray()
    if not there and (wanted == "ray" or launch.ray_address is not None):
        way = "" if launch.ray_address is not None else ", or use launcher: local"
        key = "launch.launcher" if wanted == "ray" else "launch.ray_address"
        raise LaunchError(f"ray is not installed; run: pip install 'crossdock[ray]'{way}", key)
    several = config.world_size > 1 or launch.ray_address is not None
    return "ray" if wanted == "ray" or (there and several) else "local"


def choose_gang(launcher: Launcher) -> MakeGang:
    """Imports what that launcher needs, and nothing else."""
    if launcher == "local":
        from crossdock.launch.gangs.local_gang import LocalGang

        return LocalGang
    if launcher == "ray":
        from crossdock.launch.gangs.ray_gang import RayGang

        return RayGang
    from crossdock.launch.gangs.torchrun_gang import TorchrunGang

    return TorchrunGang


def check_gpus(world_size: int) -> None:
    """
    Raises:
        LaunchError: this machine has fewer GPUs than ranks.
    """
    import torch

    gpus = torch.cuda.device_count()
    if gpus < world_size:
        raise LaunchError(
            f"{world_size} ranks need {world_size} GPUs, but this machine has {gpus}; "
            "lower the degrees, or use device: cpu",
            "launch.device",
        )


def has_ray() -> bool:
    found = find_spec("ray")
    return found is not None and found.origin is not None  # not just a folder of that name
