"""One rank in a process of its own, whoever started it."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from crossdock.launch.gangs.ranks.environment import RENDEZVOUS_VARIABLES
from crossdock.launch.gangs.ranks.rendezvous import open_store
from crossdock.runtime.errors import RankError
from crossdock.runtime.rank.weights.kept_stores import StoreHolder
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.faults import rank_error


def import_classes(classes: Sequence[tuple[str, str]]) -> None:
    """Library and name of each. What is not there is said where it is needed."""
    for library, name in classes:
        with contextlib.suppress(Exception):
            getattr(importlib.import_module(library), name)


class RankHost:
    """Hosts one `RankWorker`; `rpc` and `status` are for another thread than the rest."""

    def __init__(self, rank: int, world_size: int, device: str, holder: StoreHolder | None = None) -> None:
        for name in RENDEZVOUS_VARIABLES:
            os.environ.pop(name, None)
        self._worker = RankWorker(rank, world_size, torch.device(device), holder)
        self._store: TCPStore | None = None

    def open_store(self, host: str, port: int) -> int:
        """Rank 0: the rendezvous, on `port`, or on a free one that the system picks; which one it is."""
        self._store = open_store(host, port, self._worker.world_size)
        return self._store.port

    def join(self, host: str, port: int, timeout_s: float, collective_s: float, one_machine: bool) -> None:
        """Meet the others."""
        worker = self._worker
        try:
            store = self._store or TCPStore(
                host, port, worker.world_size, is_master=False, timeout=timedelta(seconds=timeout_s)
            )
            worker.join(store, collective_s, one_machine)
        except (RuntimeError, OSError) as error:
            raise RankError(worker.rank, f"could not meet the others: {error}", "cut off") from None

    def collective_rpc(self, work: Callable[..., object], args: tuple[object, ...]) -> object:
        try:
            return work(self._worker, *args)
        except Exception as error:
            raise rank_error(self._worker.status(), error) from None

    def rpc(self, work: Callable[..., object], args: tuple[object, ...]) -> object:
        return work(self._worker, *args)

    def status(self) -> RankStatus:
        return self._worker.status()
