"""Whether anybody answers at the address of a Ray cluster, within a time limit: Ray's own attempts take minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from crossdock.runtime.errors import LaunchError

T = TypeVar("T")

KEY = "launch.ray_address"


def check_reachable(address: str, timeout_s: float) -> None:
    """Connect to `host:port` or `ray://host:port` and hang up; other spellings ("auto") are Ray's to understand.

    Raises:
        LaunchError: nobody accepts the connection within `timeout_s`.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise not_reached(address, str(error)) from None
    if host is None or port is None:
        return
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except (OSError, UnicodeError) as error:
        raise not_reached(address, str(error) or "no answer") from None


def not_reached(address: str, reason: str) -> LaunchError:
    return LaunchError(f"no Ray cluster answers at {address} ({reason}); start one, or leave the key out", KEY)


GIVEN_UP = "crossdock-given-up"
"""The name of threads that may still wait for something when nobody waits for them any more."""


def within(timeout_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises. It runs on a thread of its own, which is left to itself when the time is up.

    Raises:
        TimeoutError: it took longer than `timeout_s`.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=GIVEN_UP, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    result: T = outcome[0]
    return result
