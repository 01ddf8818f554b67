"""A secret that the ranks of one torchrun share: what they put into its store is signed with it.

`CROSSDOCK_RUN_SECRET`, set where torchrun is started (to the same text on every node), reaches the ranks with their
environment. Without it the ranks of a single node make one: in the folder that torchrun has made for their try, which
only its user can read. Ranks on several nodes without the variable have none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import stat
import tempfile
from pathlib import Path

from crossdock.runtime.errors import LaunchError

VARIABLE = "CROSSDOCK_RUN_SECRET"
_LEAST = 16
_FILE = "crossdock-secret"
_BYTES = 32


@functools.cache  # the file goes when the ranks have met
def run_secret() -> bytes | None:
    """The secret of this try of the run; None: there is none that all ranks could know.

    Raises:
        LaunchError: the variable holds less than 16 characters.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        if len(given) < _LEAST:
            raise LaunchError(
                f"{VARIABLE}: has {len(given)} characters; allowed: {_LEAST} or more that nobody can guess"
            )
        return given.encode("utf-8", "surrogateescape")
    path = _path()
    if path is None:
        return None
    with contextlib.suppress(OSError):
        _make(path)
    return _read(path)


def forget_run_secret() -> None:
    """Remove the file, once every rank has read it."""
    path = _path()
    if path is not None:
        path.unlink(missing_ok=True)


def on_one_node() -> bool:
    """Whether torchrun started all ranks on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _path() -> Path | None:
    """In the folder of this try, one above the rank's own."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(own).parent.parent / _FILE if own and on_one_node() else None


def _make(path: Path) -> None:
    """Whole or not at all, and not where there is one: of several ranks, the first one's stays."""
    fd, draft = tempfile.mkstemp(dir=path.parent)  # for its owner alone
    try:
        os.write(fd, secrets.token_bytes(_BYTES))
        os.link(draft, path)
    finally:
        os.close(fd)
        os.unlink(draft)


def _read(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        state = os.fstat(fd)
        own = state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        secret = file.read(_BYTES)
    return secret if own and len(secret) == _BYTES else None
