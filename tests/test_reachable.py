"""The address of a Ray cluster at which nobody answers: one message, in the time that a launch may take."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from crossdock.launch.gangs.ranks.reachable import check_reachable, within
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import LaunchError
from tiers import not_quick, some

LAUNCH_S = 4
START_S = 40
"""Imports and the plan, on a busy machine."""


@contextmanager
def _listener() -> Iterator[str]:
    """Takes connections, and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def _closed_port() -> str:
    with _listener() as address:
        return address


def test_somebody_answers() -> None:
    with _listener() as address:
        check_reachable(address, 5)
        check_reachable(f"ray://{address}", 5)


@pytest.mark.parametrize("address", ["auto", "local", "ray://", "host-without-a-port"])
def test_what_is_no_address_is_rays_to_understand(address: str) -> None:
    check_reachable(address, 5)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_answers(scheme: str) -> None:
    address = scheme + _closed_port()
    with pytest.raises(LaunchError, match=f"launch.ray_address: no Ray cluster answers at {address} .*refused"):
        check_reachable(address, 5)


@pytest.mark.parametrize("address", ["nobody.invalid:6379", "127.0.0.1:99999", "[::1:6379", "a" * 80 + ".b:1"])
def test_an_address_that_cannot_be(address: str) -> None:
    with pytest.raises(LaunchError, match=r"launch\.ray_address: no Ray cluster answers at"):
        check_reachable(address, 5)


def test_the_time_is_up() -> None:
    ends = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.2 s"):
        within(0.2, ends.wait)
    ends.set()


def test_in_time() -> None:
    assert within(30, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(30, lambda: 1 / 0)
    with pytest.raises(SystemExit):
        within(30, sys.exit)


def test_what_takes_too_long_keeps_nobody_from_leaving() -> None:
    module = "crossdock.launch.gangs.ranks.reachable"
    code = f"from {module} import within; import time; within(0.1, lambda: time.sleep(120))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "TimeoutError: no answer within 0.1 s" in run.stderr


def test_ray_loses_its_patience_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not raise then: it exits."""
    ray = pytest.importorskip("ray")
    from crossdock.launch.gangs.ray import cluster
    from crossdock.launch.gangs.ray.gang import RayGang

    def init(**options: object) -> None:
        raise SystemExit(15)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_agree_on_a_token", lambda address, timeout_s: None)  # which waits for itself
    with _listener() as address:
        gang = RayGang(RunConfig.parse({"launch": {"ray_address": address}}).launch, 1, "cpu")
        with pytest.raises(LaunchError, match=f"no Ray cluster answers at {address} .no answer.; start one"):
            gang.start()


@not_quick
@pytest.mark.parametrize("answers", some([True, False], 1))
def test_the_command_ends_in_time(answers: bool, flux2_dir: Path, tmp_path: Path) -> None:
    """Ray itself tries for two minutes where nobody listens, and the same where somebody does who is no Ray."""
    pytest.importorskip("ray")
    with _listener() as address:
        config = tmp_path / "run.yaml"
        config.write_text(
            f"launch: {{ray_address: '{address if answers else _closed_port()}', timeouts: {{launch_s: {LAUNCH_S}}}}}"
        )
        command = [sys.executable, "-m", "crossdock.launch.cli", "generate", str(flux2_dir), "--config", str(config)]
        began = time.monotonic()
        run = subprocess.run([*command, "--prompt", "a fox"], capture_output=True, text=True, timeout=100, cwd=tmp_path)
        took_s = time.monotonic() - began
    assert run.returncode == 2, run.stderr
    assert "run.yaml:1: launch.ray_address: no Ray cluster answers at 127.0.0.1:" in run.stderr
    assert ("no answer within" if answers else "refused") in run.stderr
    assert "Traceback" not in run.stderr
    print(f"told after {took_s:.1f} s, of which {LAUNCH_S if answers else 0} s were Ray's")
    assert took_s < START_S + LAUNCH_S


_GIVES_UP = """
from torch.distributed import TCPStore
from crossdock.launch import cli
from crossdock.launch.gangs.ranks.reachable import within

store = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)

def ask_forever():
    while True:
        store.set("asked", "again")

def gives_up(app):
    try:
        within(0.2, ask_forever)
    except TimeoutError:
        return 2

cli.run_app = gives_up
cli.main()
"""


def test_what_was_given_up_does_not_abort_the_way_out() -> None:
    """A thread that is still in C++ is unwound at Python's own way out, and the process ends by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", _GIVES_UP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
