"""Joining the Ray that a config names, or starting one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address

from crossdock.launch.gangs.ranks.reachable import KEY, check_reachable, not_reached, within
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.errors import LaunchError

_native: Any = ray._raylet  # mypy sees nothing in it
_OBJECT_STORE_BYTES = 256 * 2**20
"""Results and plans only travel through Ray; weights never do."""


def connect(config: LaunchConfig, ranks: int) -> bool:
    """Join a cluster, use the Ray that runs in this process, or start a local one; whether that was done here.

    Raises:
        LaunchError: the cluster is not reached, or asks for a token that is not here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return False
    with _own_signal_handlers(), _own_token_mode():
        _init_ray(config, ranks, {"log_to_driver": False, "logging_level": logging.ERROR})
    return True


def _init_ray(config: LaunchConfig, ranks: int, quiet: dict[str, Any]) -> None:
    if (address := config.ray_address) is not None:
        deadline = time.monotonic() + config.timeouts.launch_s
        check_reachable(address, config.timeouts.launch_s)
        try:
            within(deadline - time.monotonic(), partial(_join, address, config.timeouts.launch_s, quiet))
        except (KeyboardInterrupt, LaunchError):
            raise
        except (Exception, SystemExit) as error:  # Ray exits when its own patience is over
            raise not_reached(address, str(error) if isinstance(error, Exception) else "no answer") from None
    else:
        cpus = max(os.cpu_count() or 1, int(ranks * config.cpus_per_rank + 1))
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )


def _join(address: str, timeout_s: float, quiet: dict[str, Any]) -> None:
    _agree_on_a_token(address, timeout_s)
    ray.init(address=address, **quiet)


_MODE = "RAY_AUTH_MODE"
_ASK_S, _REFUSED = 15.0, 77
_ASK = f"""
import sys, ray
from ray._raylet import Config, GcsClient
Config.initialize("")
try:  # it looks at the token before the cluster's id; with an id that it cannot have, it always answers at once
    GcsClient(address=sys.argv[1], cluster_id="00" * 28).check_alive([], timeout=float(sys.argv[2]))
except ray.exceptions.AuthenticationError as error:
    sys.exit({_REFUSED} if "InvalidAuthToken" in error.message else 0)
"""
_TOKEN_PLACES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_GIVE = "give the cluster's own: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


def _agree_on_a_token(address: str, timeout_s: float) -> None:
    """Send a token where the cluster asks for one, and none where it does not.

    Ray does not find that out: with an address it sends none, with "auto" always, and a driver whose mode is not its
    cluster's waits for workers that cannot talk to it.

    Raises:
        LaunchError: the token is missing, or another's; or RAY_AUTH_MODE says what the cluster does not do.
    """
    asked = os.environ.get(_MODE, "").lower()
    cluster = None if address.startswith("ray://") else canonicalize_bootstrap_address(address)
    if cluster is None or asked not in ("", "token", "disabled"):
        return
    where = f"the Ray cluster at {address}"
    if not _refuses(cluster, "disabled", timeout_s):
        if asked == "token":
            raise LaunchError(f"{where} asks for no token, but {_MODE} is token; unset it, or start Ray with it", KEY)
        return
    if asked == "disabled":
        raise LaunchError(f"{where} asks for a token, but {_MODE} is disabled; unset it", KEY)
    try:
        there = _native.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except ray.exceptions.AuthenticationError as error:
        raise LaunchError(f"{where} asks for a token: {error.message}; {_GIVE}", KEY) from None
    if not there:
        raise LaunchError(f"{where} asks for a token, and there is none here; {_GIVE}", KEY)
    if _refuses(cluster, "token", timeout_s):
        place = next((name for name in _TOKEN_PLACES if os.environ.get(name)), "~/.ray/auth_token")
        raise LaunchError(f"{where} does not take the token of {place}; {_GIVE}", KEY)


def _refuses(cluster: str, mode: str, timeout_s: float) -> bool:
    """Whether the cluster wants another token than is sent in that mode, which stays. A process of its own asks: where
    somebody listens who is no Ray, Ray's client ends the process that it is in.
    """
    os.environ[_MODE] = mode
    _native.Config.initialize("")
    limit_s = min(timeout_s, _ASK_S)
    try:
        done = subprocess.run([sys.executable, "-c", _ASK, cluster, str(limit_s)], capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:  # joining it says so
        return False
    return done.returncode == _REFUSED


@contextlib.contextmanager
def _own_token_mode() -> Iterator[None]:
    """What is chosen for a cluster is not for the next one that this process joins or starts."""
    asked = {name: mode for name, mode in os.environ.items() if name == _MODE}
    try:
        yield
    finally:
        os.environ.pop(_MODE, None)
        os.environ.update(asked)
        if not ray.is_initialized():
            _native.Config.initialize("")


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray puts its own handlers in place; a SIGTERM would then end the driver without closing the gang."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
