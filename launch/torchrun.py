"""torchrun: `torchrun --nproc-per-node N -m crossdock.launch.torchrun generate ...`. Needs no ray.

Every process runs the same program on its own rank. Rank 0 prints and writes. When a rank fails, all end with the same
error, which is said once (`torchrun_watch`); torchrun starts them again as often as `--max-restarts` allows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from crossdock.launch.commands.options import Outputs, add_check, build_app, run_app
from crossdock.launch.console import complain_on_stderr, exit_now
from crossdock.launch.gangs.rank_messages import MessageStore
from crossdock.launch.gangs.run_secret import run_secret
from crossdock.launch.gangs.torchrun_gang import connect_store, try_name
from crossdock.launch.gangs.torchrun_watch import REPORTED, is_reporter
from crossdock.runtime.errors import LaunchError
from crossdock.runtime.request import GenerateRequest

_STARTED_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REPORT_WAIT_S = 5.0


def _run_on_torchrun(config: Path, model_dir: Path, request: GenerateRequest, outputs: Outputs, probe: bool) -> None:
    from crossdock.launch.commands.generate import run_generate

    quiet = os.environ["RANK"] != "0"
    run_generate(config, model_dir, request, outputs, "torchrun", quiet=quiet, probe=probe)


def _check_on_torchrun(config: Path, model_dir: Path, probe: bool, as_json: bool) -> None:
    from crossdock.launch.commands.check import run_check

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
    exit_now(run_app(add_check(build_app(_run_on_torchrun), _check_on_torchrun), complain=_complain))


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
        if not is_reporter(MessageStore(store, run_secret(), try_name()), int(rank)):
            return
    complain_on_stderr(message if rank == "0" else f"rank {rank}: {message}")


if __name__ == "__main__":
    main()
