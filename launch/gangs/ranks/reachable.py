"""Whether anybody answers at the address of a Ray cluster, within a time limit: Ray's own attempts take minutes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Generic, TypeVar
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


class Beside(Generic[T]):
    """`work` on a thread of its own, beside what the caller does meanwhile."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._outcome: list[T] = []
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=GIVEN_UP, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:
            self._failure.append(error)

    def ended(self, timeout_s: float) -> bool:
        """Waits for it, but not longer."""
        self._thread.join(max(timeout_s, 0.0))
        return not self._thread.is_alive()

    def result(self, timeout_s: float) -> T:
        """What `work` returns or raises; the thread is left to itself when the time is up.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
        """
        if not self.ended(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        if self._failure:
            raise self._failure[0]
        return self._outcome[0]


def within(timeout_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, `Beside`; raises TimeoutError."""
    return Beside(work).result(timeout_s)
