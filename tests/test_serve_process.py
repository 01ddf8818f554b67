"""`crossdock serve` as a user starts it, with a real rank: the same pictures as `generate`, and nothing left behind."""

from __future__ import annotations

import io
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from crossdock.launch.cli import app
from crossdock.launch.commands.options import run_app
from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.reports.media import Media
from crossdock.runtime.request import GenerateRequest, RequestItem
from live_server import CONFIG, LIMIT_S, Server, pictures_of, same_pictures, server, until


@pytest.fixture(scope="module")
def expected(flux2_dir: Path) -> Callable[[GenerateRequest], list[Media]]:
    with Engine.start(load_config(CONFIG), flux2_dir) as engine:
        yield lambda request: engine.run(request).images  # type: ignore[misc]


def test_a_day_of_a_server(flux2_dir: Path, expected: Callable[[GenerateRequest], list[Media]]) -> None:
    """A picture, several, the line with curl, a rank that is killed in a request, and SIGTERM in another."""
    with server(flux2_dir) as live:
        alone = pictures_of(live.post(prompt="a red fox", seed=5))
        assert same_pictures(alone, expected(GenerateRequest.of("a red fox", seed=5, steps=2, height=64, width=64)))
        items = tuple(RequestItem("a blue whale", None, 7 + n) for n in range(3))
        several = pictures_of(live.post(prompt="a blue whale", seed=7, n=3))
        assert same_pictures(several, expected(GenerateRequest(items, steps=2, height=64, width=64, batch_size=3)))
        _curl(live)
        _previews(live)
        _killed_rank(live, expected)
        _terminated(live, expected)


def _curl(live: Server) -> None:
    if shutil.which("curl") is None or shutil.which("jq") is None:
        return
    body = '{"prompt": "a lighthouse", "size": "64x64", "seed": 42}'
    line = f"curl -s -X POST {live.url}/v1/images/generations -H 'Content-Type: application/json' -d '{body}'"
    line += " | jq -r '.data[0].b64_json' | base64 --decode"
    made = subprocess.run(["bash", "-c", line], capture_output=True, check=True, timeout=LIMIT_S).stdout
    assert Image.open(io.BytesIO(made)).size == (64, 64)


def _previews(live: Server) -> None:
    """From the latents of steps that are done, the way to colours learned from the pictures before."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=LIMIT_S) as client:
        more: Any = {"stream": True, "partial_images": 2, "extra_body": {"num_inference_steps": 60}}
        events = list(client.images.generate(prompt="a fox", **more))
    assert [event.type for event in events[-1:]] == ["image_generation.completed"]
    partial = events[:-1]
    assert 1 <= len(partial) <= 2
    assert all(event.type == "image_generation.partial_image" for event in partial)


def _killed_rank(live: Server, expected: Callable[[GenerateRequest], list[Media]]) -> None:
    answers: list[httpx2.Response] = []
    asked: dict[str, Any] = {"prompt": "a slow snail", "seed": 1, "num_inference_steps": 60}
    thread = threading.Thread(target=lambda: answers.append(live.post(**asked)))
    thread.start()
    metrics = f"{live.url}/metrics"
    until(lambda: "crossdock:num_requests_running 1.0" in httpx2.get(metrics, timeout=30).text)
    time.sleep(1)
    live.kill_a_rank()
    assert httpx2.get(f"{live.url}/health", timeout=30).status_code == 200
    thread.join(LIMIT_S)
    assert same_pictures(
        pictures_of(answers[0]), expected(GenerateRequest.of("a slow snail", seed=1, steps=60, height=64, width=64))
    )
    assert live.is_ready()


def _terminated(live: Server, expected: Callable[[GenerateRequest], list[Media]]) -> None:
    """What was taken is answered."""
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(live.post(prompt="last", seed=2, num_inference_steps=30)))
    thread.start()
    until(lambda: "crossdock:num_requests_running 1.0" in httpx2.get(f"{live.url}/metrics", timeout=30).text)
    live.process.terminate()
    thread.join(LIMIT_S)
    assert same_pictures(
        pictures_of(answers[0]), expected(GenerateRequest.of("last", seed=2, steps=30, height=64, width=64))
    )
    assert live.process.wait(LIMIT_S) == 0, "a second SIGTERM would end it at once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "others can reach it"),
        (["--host", "no.such.host.invalid", "--insecure"], "cannot listen"),
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--size", "7x7"], "height: found 7"),
        (["--size", "large"], "--size: found 'large'"),
    ],
    ids=str,
)
def test_wrong_options(flux2_dir: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    code = run_app(app, ["serve", str(flux2_dir), "--config", str(CONFIG), *options], said.append)
    assert code == 2
    assert message in said[0]
