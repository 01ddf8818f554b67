"""torchrun: `torchrun --nproc-per-node N -m crossdock.launch.torchrun generate ...`. Needs no ray.

Every process runs the same program on its own rank. Rank 0 prints and writes; a rank that fails ends with an error,
and torchrun then ends the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from crossdock.launch.arguments import Outputs, build_app, complain_on_stderr, run_app
from crossdock.runtime.config import LaunchConfig
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.weights import exchange
from crossdock.runtime.worker import RankWorker

T = TypeVar("T")

_STARTED_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REPORTED = "crossdock/reported"
_REPORT_WAIT_S = 10.0


class TorchrunGang:
    """The gang of which this process is one rank: a call runs here, and its results are exchanged."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        local = int(os.environ["LOCAL_RANK"])
        place = torch.device(f"cuda:{local}" if device == "cuda" else "cpu")
        self._worker = RankWorker(int(os.environ["RANK"]), world_size, place)

    def start(self) -> None:
        there = int(os.environ["WORLD_SIZE"])
        if there != self.world_size:
            raise LaunchError(
                f"the degrees ask for {self.world_size} ranks, but torchrun started {there}; "
                f"use --nproc-per-node {self.world_size}",
                "parallel",
            )
        self._worker.join(connect_store(self._config.timeouts.launch_s), self._config.timeouts.collective_s)

    def call(
        self,
        work: Callable[..., T],
        *args: Any,
        timeout_s: float,
        watch: Callable[[int], None] | None = None,
    ) -> list[T]:
        """`timeout_s` does not bound the work here: torchrun's agent and the collectives' own limit do."""
        rank = self._worker.rank
        self._worker.on_progress = watch if rank == 0 else None
        try:
            result = work(self._worker, *args)
        except CrossdockError:
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error)).rstrip()
            raise RankError(rank, f"{type(error).__name__}: {error}\n{detail}") from None
        return exchange(result, self.world_size)

    def close(self) -> None:
        if self._worker.ready:
            self._worker.teardown()
        self._worker.leave()


def connect_store(timeout_s: float) -> Store:
    """torchrun's own rendezvous store."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
    )


def _run_on_torchrun(config: Path, model_dir: Path, request: GenerateRequest, outputs: Outputs) -> None:
    from crossdock.launch.generate import run_generate

    run_generate(config, model_dir, request, outputs, "torchrun", quiet=os.environ["RANK"] != "0")


def main() -> None:
    """Entry point of every rank."""
    missing = [name for name in _STARTED_BY_TORCHRUN if name not in os.environ]
    if missing:
        complain_on_stderr(
            f"error: {missing[0]} is not set; start it with: "
            "torchrun --nproc-per-node N -m crossdock.launch.torchrun generate ..."
        )
        sys.exit(LaunchError.exit_code)
    first = os.environ["RANK"] == "0"
    sys.exit(run_app(build_app(_run_on_torchrun), complain=_complain_first if first else _complain_if_first_is_silent))


def _complain_first(message: str) -> None:
    """Rank 0 speaks for all, then lets the others end."""
    complain_on_stderr(message)
    with contextlib.suppress(Exception):
        connect_store(_REPORT_WAIT_S).set(_REPORTED, "1")


def _complain_if_first_is_silent(message: str) -> None:
    """What is wrong with the input is wrong on every rank; only what rank 0 does not know of is worth a line."""
    try:
        connect_store(_REPORT_WAIT_S).wait([_REPORTED], timedelta(seconds=_REPORT_WAIT_S))
    except Exception:  # rank 0 said nothing in time
        complain_on_stderr(f"rank {os.environ['RANK']}: {message}")


if __name__ == "__main__":
    main()
