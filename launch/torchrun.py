"""torchrun: `torchrun --nproc-per-node N -m crossdock.launch.torchrun generate ...`. Needs no ray.

Every process runs the same program on its own rank. Rank 0 prints and writes. When a rank fails, all end with the same
error, which is said once (`torchrun_watch`); torchrun starts them again as often as `--max-restarts` allows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from rich.console import Console

from crossdock.launch.commands.options import ConfigFile, Outputs, add_check, build_app, located, run_app
from crossdock.launch.console import complain_on_stderr, exit_now
from crossdock.launch.gangs.rank_messages import MessageStore
from crossdock.launch.gangs.run_secret import run_secret
from crossdock.launch.gangs.torchrun_gang import connect_store, try_name
from crossdock.launch.gangs.torchrun_watch import REPORTED, is_reporter
from crossdock.launch.hub.names import hub_name
from crossdock.launch.hub.progress import FETCH_S
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import LaunchError
from crossdock.runtime.request import GenerateRequest

_STARTED_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_REPORT_WAIT_S = 5.0
_STORE_S = 60.0
_COMMIT = "hub/commit"


def _run_on_torchrun(source: ConfigFile, model: str, request: GenerateRequest, outputs: Outputs, probe: bool) -> None:
    from crossdock.launch.commands.generate import run_generate

    quiet = os.environ["RANK"] != "0"
    run_generate(source, _fetched(model, source.config), request, outputs, "torchrun", quiet=quiet, probe=probe)


def _check_on_torchrun(source: ConfigFile, model: str, probe: bool, as_json: bool) -> None:
    from crossdock.launch.commands.check import run_check

    run_check(
        source,
        _fetched(model, source.config),
        "torchrun",
        probe=probe,
        as_json=as_json,
        quiet=os.environ["RANK"] != "0",
    )


def _fetched(model: str, config: RunConfig) -> str:
    """The model's directory. Of the hub, all ranks take the commit that rank 0 finds, one of each node fetches it, and
    none goes on before every node has it: from there on they wait for each other as long as a launch may take.

    Raises:
        UserError: it cannot be fetched here, or was not on another node in time.
    """
    if (name := hub_name(model)) is None:
        return model
    from crossdock.launch.hub.fetch import pinned

    store, rank = connect_store(_STORE_S, FETCH_S), os.environ["RANK"]
    messages = MessageStore(store, run_secret(), try_name())
    if rank == "0":
        messages.put(_COMMIT, str(pinned(name)))
    try:
        store.wait([_COMMIT])
        found = hub_name(messages.get([_COMMIT], str)[0] or "")
        if found is None or found.repo != name.repo:
            raise LaunchError(f"{model}: rank 0 names no commit of it; is CROSSDOCK_RUN_SECRET the same on all nodes?")
        console = Console(highlight=False, soft_wrap=True, stderr=True, quiet=rank != "0")
        directory = located(str(found), console, config)
        store.set(f"{_COMMIT}/{rank}", "here")
        store.wait([f"{_COMMIT}/{each}" for each in range(int(os.environ["WORLD_SIZE"]))])
    except RuntimeError as error:
        reason = str(error).split("\n")[0][:200]
        raise LaunchError(
            f"{model}: another rank did not fetch it within {FETCH_S / 3600:g} h, or ended ({reason})"
        ) from None
    return str(directory)


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
