"""A Ray cluster as a user starts it, `ray start --head`, and who looks at it from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from processes import descendants

START_S = 120.0
_TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user who has that home, and no token but what is given."""
    own = {name: value for name, value in os.environ.items() if name not in _TOKENS}
    return own | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"} | more


@dataclass
class Cluster:
    address: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def ask(self, code: str) -> Any:
        """What a driver of its own finds: `code` sets `found`, with `ray` at hand."""
        lines = [f"import json, logging, ray\nray.init(address={self.address!r}, log_to_driver=False)", code]
        command = [sys.executable, "-c", "\n".join([*lines, "print('FOUND ' + json.dumps(found))"])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, env=self.environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))[6:])

    def workers(self, *names: str) -> list[psutil.Process]:
        """Its processes in which actors of these classes are."""
        return [p for p in descendants(self.process.pid) if any(name in _command(p) for name in names)]


@contextmanager
def cluster(home: Path, **more: str) -> Iterator[Cluster]:
    """One node, on a free port; it ends with this, and nothing else of Ray does."""
    home.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets lie in it: their paths have to be short
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", "0"]
    command += ["--num-cpus", "4", "--object-store-memory", str(2**27), "--include-dashboard", "false"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--temp-dir", str(folder)], stdout=log, stderr=log, env=environment(home, **more)
        )
    try:
        deadline = time.monotonic() + START_S
        while "will now block" not in (said := (folder / "log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield Cluster((folder / "ray_current_cluster").read_text(), process, environment(home, **more))
    finally:
        family = descendants(process.pid)
        process.terminate()
        _, alive = psutil.wait_procs(family, 60)
        for left in alive:
            left.kill()
        process.wait()
        shutil.rmtree(folder)
    assert not alive, f"Ray left {alive}"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
