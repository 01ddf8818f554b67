"""torchrun: `torchrun --nproc-per-node N -m crossdock.launch.torchrun generate ...`. Needs no ray.

Every process runs the same program on its own rank. Rank 0 prints and writes. When a rank fails, all end with the same
error, which is said once (`torchrun_watch`); torchrun starts them again as often as `--max-restarts` allows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from crossdock.launch.arguments import Amounts, Outputs, add_check, build_app, complain_on_stderr, run_app
from crossdock.launch.rank_messages import MessageStore
from crossdock.launch.run_secret import forget_run_secret, on_one_node, run_secret
from crossdock.launch.torchrun_watch import REPORTED, RankWatch, exit_now, is_reporter
from crossdock.runtime.config import LaunchConfig
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError, RequestCancelled
from crossdock.runtime.faults import rank_error
from crossdock.runtime.gang import Notice
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.worker import RankWorker

T = TypeVar("T")

_STARTED_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_STORE_S = 5.0
"""The longest wait for an answer of the store while the ranks work."""
_REPORT_WAIT_S = 5.0


class TorchrunGang:
    """The gang of which this process is one rank: a call runs here, and its results are exchanged."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        local = int(os.environ["LOCAL_RANK"])
        place = torch.device(f"cuda:{local}" if device == "cuda" else "cpu")
        self._worker = RankWorker(int(os.environ["RANK"]), world_size, place)
        self._watch: RankWatch | None = None
        self._broken = False  # in the middle of a call: what the ranks hold cannot be given up together

    @property
    def can_restart(self) -> bool:
        return False  # torchrun restarts all ranks itself: `--max-restarts`

    def start(self) -> None:
        there = int(os.environ["WORLD_SIZE"])
        if there != self.world_size:
            raise LaunchError(
                f"the degrees ask for {self.world_size} ranks, but torchrun started {there}; "
                f"use --nproc-per-node {self.world_size}",
                "parallel",
            )
        launch_s = self._config.timeouts.launch_s
        self._watch = RankWatch(self._worker, connect_store(launch_s, _STORE_S), run_secret(), _try_name())
        self._watch.start()
        with self._cut_off():
            store = connect_store(launch_s)
            self._worker.join(store, self._config.timeouts.collective_s, one_machine=on_one_node())
        forget_run_secret()  # every rank has read it before it joined

    def restart(self) -> None:
        raise RankError(self._worker.rank, "only torchrun itself can start its ranks again: --max-restarts")

    def call(self, work: Callable[..., T], *args: Any, timeout_s: float, notice: Notice | None = None) -> list[T]:
        """`timeout_s` does not bound the work here: torchrun's agent and the collectives' own limit do."""
        if self._watch is None:
            raise RankError(self._worker.rank, "this gang is closed; start a new engine", "died")
        worker, watch = self._worker, self._watch
        worker.on_progress = (lambda _: notice({worker.rank: worker.status()})) if notice else None
        watch.begin()
        broken, self._broken = self._broken, True
        try:
            result = work(worker, *args)
        except RequestCancelled:  # all ranks alike
            self._broken = broken
            raise
        except Exception as error:
            raise self._settled(rank_error(worker.status(), error)) from None
        watch.end_part()
        with self._cut_off():
            results = worker.exchange(result)
        self._broken = broken
        return results

    def aside(self, rank: int, work: Callable[..., T], *args: Any, timeout_s: float) -> T:
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
    return PrefixStore(_try_name(), store)


def _try_name() -> str:
    run, number = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return f"crossdock/{run}/{number}"


def _run_on_torchrun(
    config: Path, model_dir: Path, request: GenerateRequest, outputs: Outputs, amounts: Amounts
) -> None:
    from crossdock.launch.generate import run_generate

    run_generate(config, model_dir, request, outputs, amounts, "torchrun", quiet=os.environ["RANK"] != "0")


def _check_on_torchrun(config: Path, model_dir: Path, probe: bool, as_json: bool) -> None:
    from crossdock.launch.check import run_check

    run_check(config, model_dir, "torchrun", probe=probe, as_json=as_json, quiet=os.environ["RANK"] != "0")


def main() -> None:
    """Entry point of every rank."""
    missing = [name for name in _STARTED_BY_TORCHRUN if name not in os.environ]
    if missing:
        complain_on_stderr(
            f"error: {missing[0]} is not set; start it with: "
            "torchrun --nproc-per-node N -m crossdock.launch.torchrun generate ..."
        )
        sys.exit(LaunchError.exit_code)
    code = run_app(add_check(build_app(_run_on_torchrun), _check_on_torchrun), complain=_complain)
    if code:
        exit_now(code)


def _complain(message: str) -> None:
    """Said once, by rank 0 if it can: what is wrong with the input is wrong on every rank."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # torchrun's, as soon as another rank has ended
    rank = os.environ["RANK"]
    with contextlib.suppress(RuntimeError):  # nobody can be asked
        store = connect_store(_REPORT_WAIT_S)
        if rank != "0":
            with contextlib.suppress(RuntimeError):  # rank 0 said nothing in time
                store.wait([REPORTED])
        if not is_reporter(MessageStore(store, run_secret(), _try_name()), int(rank)):
            return
    complain_on_stderr(message if rank == "0" else f"rank {rank}: {message}")


if __name__ == "__main__":
    main()
