"""From what went wrong on the ranks to the one error that says why."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

import torch

from crossdock.runtime.errors import (
    CrossdockError,
    EncodingRefused,
    FaultKind,
    RankError,
    RequestCancelled,
    RequestRefused,
)
from crossdock.runtime.reports.status import RankStatus

_RANKING: tuple[FaultKind, ...] = (
    "died",
    "stopped",
    "memory",
    "raised",
    "collectives",
    "silent",
    "hangs",
    "late",
    "cut off",
)

AGREED = (RequestCancelled, RequestRefused, EncodingRefused)
"""How all ranks end a request or a load together: none of them is at fault, and they wait for work."""


def rank_error(status: RankStatus, error: Exception) -> CrossdockError:
    """What a rank hands out for an exception of its own: with the traceback, and where it happened."""
    if isinstance(error, CrossdockError):
        return error
    kind: FaultKind = "raised"
    if isinstance(error, torch.OutOfMemoryError):
        kind = "memory"
    elif isinstance(error, RuntimeError | OSError) and _in_collective(status):
        kind = "cut off"  # its own collective failed: as a rule, because another rank is gone
    detail = "".join(traceback.format_exception(error)).rstrip()
    return RankError(status.rank, f"{type(error).__name__}: {error} (in {status})\n{detail}", kind)


def _in_collective(status: RankStatus) -> bool:
    """Outside the denoise loop it is not known whether the rank waits for a gather that is under way."""
    loads = status.phase in ("load", "verify", "rehearsal")
    if status.phase == "connect":  # the groups that the ranks make together are not there yet
        return True
    return status.waiting is not None or (loads and any(group.waiting_s is not None for group in status.groups))


def is_conclusive(error: CrossdockError) -> bool:
    """Whether no other rank can have a better explanation; an agreed end is waited for on all ranks."""
    if isinstance(error, AGREED):
        return False
    return not (isinstance(error, RankError) and error.kind == "cut off")


def first_cause(errors: Mapping[int, CrossdockError]) -> CrossdockError:
    """Of several ranks' errors, the one that explains the others: not that some were stopped as agreed."""

    def order(item: tuple[int, CrossdockError]) -> tuple[int, int]:
        rank, error = item
        if isinstance(error, AGREED):
            return len(_RANKING), rank
        return (_RANKING.index(error.kind) if isinstance(error, RankError) else 0, rank)

    return min(errors.items(), key=order)[1]
