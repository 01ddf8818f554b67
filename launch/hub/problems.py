"""Why a model cannot be had from the hub, each with the way out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from crossdock.launch.hub.names import HubName
from crossdock.runtime.config.bounded_files import printable
from crossdock.runtime.errors import CheckpointError, LaunchError, UserError

_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""httpx's, under whatever name huggingface_hub imports it: also of connections that never came about."""
_WAYS = "connect once to fetch it (what is there is kept), or give a directory"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(name: HubName, cache: Path) -> Iterator[None]:
    """What huggingface_hub raises becomes one message."""
    try:
        yield
    except UserError:
        raise
    except (_HTTP_ERROR, OSError, ValueError, RevisionResolutionError) as error:
        raise _explain(error, name, cache) from None


def _explain(error: Exception, name: HubName, cache: Path) -> UserError:
    page = f"{constants.ENDPOINT}/{name.repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match error:
        case GatedRepoError():
            return CheckpointError(
                f"{name}: is gated: accept its conditions at {page}, then give that account's token: "
                "hf auth login, or HF_TOKEN"
            )
        case RepositoryNotFoundError():
            return CheckpointError(
                f"{name}: no such directory, and no such model at {constants.ENDPOINT}, or a private one; check the "
                "name, or give the token of an account that may read it: hf auth login, or HF_TOKEN"
            )
        case RevisionNotFoundError():
            return CheckpointError(
                f"{name}: {name.repo} has no revision {name.revision}; its branches, tags and commits: {page}/commits"
            )
        case HfHubHTTPError() if status in (401, 403):
            return LaunchError(
                f"{name}: the hub refuses the token ({status}); give another one: hf auth login, or HF_TOKEN"
            )
        case OSError(errno=number) if number in _FULL:
            return disk_full(name, cache)
        case PermissionError():
            return LaunchError(
                f"{name}: {error.filename}: cannot be written: no permission; set HF_HOME to another folder"
            )
        case OfflineModeIsEnabled() | EntryNotFoundError() | RevisionResolutionError() if constants.is_offline_mode():
            return LaunchError(f"{name}: is not, or not wholly, in {cache}, and HF_HUB_OFFLINE is set; {_WAYS}")
        case HfHubHTTPError() if status is not None:
            return LaunchError(
                f"{name}: {constants.ENDPOINT} answers {status}, and it is not wholly in {cache}; try later"
            )
        case _ if isinstance(error, (_HTTP_ERROR, EntryNotFoundError, RevisionResolutionError)):
            reason = _first_line(error.__cause__ or error)
            return LaunchError(
                f"{name}: {constants.ENDPOINT} cannot be reached ({reason}), and it is not, or not wholly, in {cache}; "
                f"{_WAYS}"
            )
    return LaunchError(f"{name}: cannot be fetched to {cache}: {type(error).__name__}: {_first_line(error)}; try again")


def disk_full(name: HubName, cache: Path, missing_bytes: int | None = None, free_bytes: int = 0) -> LaunchError:
    more = "" if missing_bytes is None else f": {missing_bytes} bytes are missing, and {free_bytes} are free"
    return LaunchError(
        f"{name}: the disk of {cache} is full{more}; make room, or set HF_HOME to a folder on another one"
    )


def _first_line(error: BaseException) -> str:
    return printable(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:300]
