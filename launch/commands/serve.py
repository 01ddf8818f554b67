"""What the `serve` command does."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from crossdock.launch.commands.bars import waiting_line
from crossdock.launch.commands.generate import locating
from crossdock.launch.commands.options import ConfigFile, check_inputs, located
from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.progress import Notify
from crossdock.launch.gangs.choose import choose_gang, choose_launcher, has_ray
from crossdock.launch.hub.names import name_of_snapshot
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import LaunchError


def run_serve(source: ConfigFile, model: str, ray_address: str | None, **options: Any) -> None:
    """`options`: the fields of `ServeOptions`.

    Raises:
        UserError: with file, line and key path, where the config is to blame.
    """
    check_inputs(source, model)
    try:
        from crossdock.launch.serve.web.server import ServeOptions, serve
    except ModuleNotFoundError as error:
        message = f"serve needs the package {error.name}: pip install 'crossdock[serve]'"
        raise LaunchError(message) from None
    config = source.config
    console = Console(highlight=False, soft_wrap=True)
    model_dir = located(model, console, config)
    options["name"] = options["name"] or ((name := name_of_snapshot(model_dir)) and name.repo)
    with locating(source.path):
        if ray_address is not None or options["replicas"] > 1:
            config = _with_ray(config, ray_address, options["replicas"])
        make_gang = choose_gang(choose_launcher(config, "crossdock", "serve"))

        def start(notify: Notify) -> Engine:
            how: dict[str, Any] = {"make_gang": make_gang, "rehearse": True, "notify": notify}
            with waiting_line(Console(force_terminal=False, highlight=False, soft_wrap=True)) as waiting:
                return Engine.start(config, model_dir, waiting=waiting, **how)

        serve(config, model_dir, start, ServeOptions(**options), partial(console.print, markup=False))


def _with_ray(config: RunConfig, address: str | None, replicas: int) -> RunConfig:
    if replicas > 1 and not (has_ray() and find_spec("aiohttp")):  # which Ray Serve brings
        raise LaunchError("--replicas needs Ray Serve: pip install 'crossdock[replicas]'")
    launch = config.launch
    if launch.launcher not in ("auto", "ray"):
        raise LaunchError(
            f"found {launch.launcher}, but --replicas and --ray-address need Ray; leave it out", "launch.launcher"
        )
    changed = {"launcher": "ray"} | ({} if address is None else {"ray_address": address})
    return config.model_copy(update={"launch": launch.model_copy(update=changed)})
