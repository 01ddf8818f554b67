"""torchrun: the gang of which every process is one rank, and the store in which they meet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from crossdock.launch.gangs.run_secret import forget_run_secret, on_one_node, run_secret
from crossdock.launch.gangs.torchrun_watch import RankWatch
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.faults import AGREED, rank_error
from crossdock.runtime.watch.gang import Notice

T = TypeVar("T")

_STORE_S = 5.0
"""The longest wait for an answer of the store while the ranks work."""


class TorchrunGang:
    """The gang of which this process is one rank: a collective call runs here, and its results are exchanged."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        local = int(os.environ["LOCAL_RANK"])
        place = torch.device(f"cuda:{local}" if device == "cuda" else "cpu")
        self._worker = RankWorker(int(os.environ["RANK"]), world_size, place)
        self._watch: RankWatch | None = None
        self._broken = False  # in the middle of a call: what the ranks hold cannot be given up together

    can_restart = False  # torchrun restarts all ranks itself: `--max-restarts`

    @property
    def own_rank(self) -> int:
        return self._worker.rank

    def begin(self, classes: Sequence[tuple[str, str]] = ()) -> None:
        """This rank imports what it plans with."""

    def start(self) -> None:
        there = int(os.environ["WORLD_SIZE"])
        if there != self.world_size:
            raise LaunchError(
                f"the degrees ask for {self.world_size} ranks, but torchrun started {there}; "
                f"use --nproc-per-node {self.world_size}",
                "parallel",
            )
        launch_s = self._config.timeouts.launch_s
        self._watch = RankWatch(self._worker, connect_store(launch_s, _STORE_S), run_secret(), try_name())
        self._watch.start()
        with self._cut_off():
            store = connect_store(launch_s)
            self._worker.join(store, self._config.timeouts.collective_s, one_machine=on_one_node())
        forget_run_secret()  # every rank has read it before it joined

    def restart(self) -> None:
        raise RankError(self._worker.rank, "only torchrun itself can start its ranks again: --max-restarts")

    def collective_rpc(
        self, work: Callable[..., T], *args: object, timeout_s: float, notice: Notice | None = None
    ) -> list[T]:
        """`timeout_s` does not bound the work here: torchrun's agent and the collectives' own limit do."""
        if self._watch is None:
            raise RankError(self._worker.rank, "this gang is closed; start a new engine", "died")
        worker, watch = self._worker, self._watch
        worker.on_progress = (lambda _: notice({worker.rank: worker.status()})) if notice else None
        watch.begin()
        broken, self._broken = self._broken, True
        try:
            result = work(worker, *args)
        except AGREED:
            self._broken = broken
            raise
        except Exception as error:
            raise self._settled(rank_error(worker.status(), error)) from None
        watch.end_part()
        with self._cut_off():
            results = worker.exchange(result)
        self._broken = broken
        return results

    def rpc(self, rank: int, work: Callable[..., T], *args: object, timeout_s: float) -> T:
        if rank != self._worker.rank:
            raise RankError(rank, f"cannot be reached from rank {self._worker.rank} under torchrun", "silent")
        return work(self._worker, *args)

    def close(self) -> None:
        """Raises the verdict where this rank was only told to end because another one failed."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        try:
            verdict = watch.settle() if watch.interrupted else None
        finally:
            if self._worker.ready and not self._broken:
                self._worker.teardown()
            self._worker.leave()
            watch.stop()
        if verdict is not None:
            raise verdict

    @contextlib.contextmanager
    def _cut_off(self) -> Iterator[None]:
        """What fails here fails because another rank does not take part."""
        try:
            yield
        except Exception as error:
            status = self._worker.status()
            what = f"{type(error).__name__}: {error} (in {status})"
            raise self._settled(RankError(status.rank, what, "cut off")) from None

    def _settled(self, error: CrossdockError) -> CrossdockError:
        assert self._watch is not None
        return self._watch.settle(error) or error


def connect_store(timeout_s: float, answer_s: float | None = None) -> Store:
    """torchrun's own rendezvous store, for this try of the run: keys of an earlier one are not seen.

    Args:
        answer_s: the longest wait for an answer, if it is another than for the connection.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )
    store.set_timeout(timedelta(seconds=answer_s or timeout_s))
    return PrefixStore(try_name(), store)


def try_name() -> str:
    """Which try of which run this is."""
    run, number = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return f"crossdock/{run}/{number}"
