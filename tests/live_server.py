"""`crossdock serve` in a process of its own, and what its pictures are compared with."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from PIL import Image, ImageChops
from processes import descendants

from crossdock.runtime.reports.media import Media

CONFIG = Path(__file__).parents[1] / "launch" / "configs" / "layerwise.yaml"
LIMIT_S = 240.0


@dataclass
class Server:
    """
    Attributes:
        children: that it had when it was killed.
    """

    process: subprocess.Popen[str]
    url: str
    lines: list[str]
    children: list[psutil.Process] = field(default_factory=list)
    killed: bool = False

    def post(self, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/images/generations", json=body, timeout=LIMIT_S)

    def is_ready(self) -> bool:
        return httpx2.get(f"{self.url}/ready", timeout=30).status_code == 200

    def kill(self) -> None:
        """Nothing of it may outlive it."""
        self.children, self.killed = descendants(self.process.pid), True
        self.process.kill()

    def kill_a_rank(self) -> None:
        """The process that came last."""
        max(descendants(self.process.pid), key=lambda child: child.create_time()).kill()


@contextmanager
def server(model_dir: Path, *options: str) -> Iterator[Server]:
    """Ended by SIGTERM; unless it was killed before, it has to end well. Nothing may be left of it."""
    command = [sys.executable, "-m", "crossdock.launch.cli", "serve", str(model_dir), "--config", str(CONFIG)]
    command += ["--port", "0", "--size", "64x64", "--steps", "2", "--name", "tiny", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or []), daemon=True)
    reader.start()
    running = Server(process, "", lines)
    try:
        until(lambda: _url(lines))
        running.url = _url(lines)
        until(running.is_ready)
        yield running
    finally:
        children = running.children or descendants(process.pid)
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
        reader.join(10)
    _, alive = psutil.wait_procs(children, 20)
    assert not alive, f"left behind: {alive}"
    assert process.returncode == (-signal.SIGKILL if running.killed else 0), "".join(lines)
    assert "Traceback" not in "".join(lines), "".join(lines)


def _url(lines: list[str]) -> str:
    return next((found[1] for line in list(lines) if (found := re.search(r"listening on (http://\S+);", line))), "")


def until(true: Callable[[], Any], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.1)


def pictures_of(answer: httpx2.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text
    rows = answer.json()["data"]
    return [Image.open(io.BytesIO(base64.b64decode(row["b64_json"]))).convert("RGB") for row in rows]


def same_pictures(found: list[Image.Image], wanted: list[Media]) -> bool:
    return all(ImageChops.difference(a, b).getbbox() is None for a, b in zip(found, wanted, strict=True))
