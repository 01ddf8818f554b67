"""Which gang a run gets: the config, what is installed, and the command in use have to agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crossdock.runtime.config.bounded_files import parse_json, read_bounded
from crossdock.runtime.config.schema import LaunchConfig, RunConfig
from crossdock.runtime.errors import ConfigError, LaunchError, UserError

if TYPE_CHECKING:
    from crossdock.runtime.watch.gang import Gang

Launcher = Literal["local", "ray", "torchrun"]
Command = Literal["crossdock", "torchrun"]
"""What the user has started: this program, or `torchrun -m crossdock.launch.torchrun`."""

MakeGang = Callable[[LaunchConfig, int, str], "Gang"]
"""Makes a gang from (launch section, number of ranks, "cpu" or "cuda")."""


_INDEX_BYTES = 2**20


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


def choose_device(config: RunConfig) -> str:
    """ "cuda" or "cpu", from `launch.device`.

    Raises:
        LaunchError: more ranks than GPUs, on this machine; a cluster is asked when the gang starts.
    """
    import torch

    from crossdock.launch.gangs.ranks.environment import check_gpus

    wanted, gpus = config.launch.device, torch.cuda.device_count()
    remote = config.launch.ray_address is not None
    device = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and not remote:
        check_gpus(config.world_size)
    return device


def choose_gang(launcher: Launcher) -> MakeGang:
    """Imports what that launcher needs, and nothing else."""
    if launcher == "local":
        from crossdock.launch.gangs.local.gang import LocalGang

        return LocalGang
    if launcher == "ray":
        from crossdock.launch.gangs.ray.gang import RayGang

        return RayGang
    from crossdock.launch.gangs.torchrun_gang import TorchrunGang

    return TorchrunGang


def begin_early(config: RunConfig, model: str) -> None:
    """Where one machine's own processes are going to run this, the one that forks them begins to import now, while this
    one does. For a program that starts one engine; whatever is wrong is said by whoever starts it in earnest.
    """
    with suppress(UserError):
        if choose_launcher(config) == "local":
            from crossdock.launch.gangs.local.process import begin

            begin(config.world_size, config.launch.device, classes_of(Path(model)))


def classes_of(model_dir: Path) -> list[tuple[str, str]]:
    """Library and class of the pipeline and its components; of what is no such directory, none."""
    try:
        index = parse_json(read_bounded(model_dir / "model_index.json", _INDEX_BYTES).decode())
    except (OSError, ValueError):
        return []
    index = index if isinstance(index, dict) else {}
    named = [("diffusers", index.get("_class_name")), *(each for each in index.values() if isinstance(each, list))]
    return [
        (each[0], each[1])
        for each in named
        if len(each) == 2 and each[0] in ("diffusers", "transformers") and isinstance(each[1], str)
    ]


def has_ray() -> bool:
    found = find_spec("ray")
    return found is not None and found.origin is not None  # not just a folder of that name
