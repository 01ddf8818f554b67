"""Requests that are wrong in every way: an answer in OpenAI's shape, never 500, no traceback, no hang."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan
from serving import Served, served
from tiers import how_many

LIMIT_S = 30.0
IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"
FIELDS = (
    *("prompt", "model", "n", "size", "quality", "background", "moderation", "output_format", "output_compression"),
    *("response_format", "stream", "partial_images", "user", "style", "seed", "num_inference_steps", "guidance_scale"),
    *("true_cfg_scale", "negative_prompt", "num_frames", "fps", "seconds", "input_reference", "mask", "image", "lora"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 10**30, -(10**30), 0.5, 1e308, -0.0, "", " ", "a fox", "auto", "png", "jpeg"),
    *("32x32", "16x16", "0x0", "99999x99999", "32X32", "-32x32", "32x32x32", "1" * 5000, "x" * 40_000, "a\0b", "low"),
    *("\ud800", "../../etc/passwd", "http://127.0.0.1:1/", "data:image/png;base64,AAAA", "🦊" * 50, "url", "high"),
    *("NaN", "1e9", "٣", "1_000", "0x10", [], {}, [[]], ["a"], [1] * 1000, {"a": {"b": []}}, {"image_url": "file:///"}),
)
BOUNDS: dict[str, Any] = {"max_body_bytes": 200_000, "body_s": 1.0}


@pytest.fixture(scope="module")
def pictures(flux2_dir: Path) -> Iterator[Served]:
    plan = make_plan(RunConfig(), flux2_dir, "cpu")
    with pytest.MonkeyPatch.context() as patch, served(plan, patch, **BOUNDS) as found:
        yield found


@pytest.fixture(scope="module")
def films(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    plan, data = make_plan(RunConfig(), checkpoint_of("wan2.1"), "cpu"), tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch, served(plan, patch, data=data, queue=1000, **BOUNDS) as found:
        yield found


def _check(answer: httpx2.Response, what: object) -> None:
    assert answer.status_code < 500 or answer.status_code in (503, 507), f"{what!r:.500}: {answer.text[:500]}"
    assert "Traceback" not in answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"], what


def _body(chance: random.Random) -> dict[str, Any]:
    """Mostly right, with something wrong."""
    body: dict[str, Any] = {"prompt": "a fox", "size": "32x32", "num_inference_steps": 1, "num_frames": 5}
    for _ in range(chance.randint(1, 4)):
        body[chance.choice(FIELDS)] = chance.choice(VALUES)
    if chance.random() < 0.1:
        body.pop("prompt", None)
    return body


@pytest.mark.parametrize("kind", ["pictures", "films"])
def test_bodies(kind: str, request: pytest.FixtureRequest) -> None:
    live: Served = request.getfixturevalue(kind)
    with httpx2.Client(base_url=live.url, timeout=LIMIT_S) as client:
        for seed in range(how_many(100, 150, 1500)):
            chance = random.Random(seed)
            body, path = _body(chance), chance.choice([IMAGES, VIDEOS])
            if chance.random() < 0.25:
                form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
                form = {name: value.encode("utf-8", "replace").decode() for name, value in form.items()}
                files = {"input_reference": ("a.png", b"123")} if chance.random() < 0.5 else None
                _check(client.post(path, data=form, files=files), (seed, form))
            else:
                _check(
                    client.post(path, content=json.dumps(body).encode("utf-8", "surrogatepass"), headers=JSON),
                    (seed, body),
                )


JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}
RAW: list[tuple[bytes, dict[str, str]]] = [
    (b"", JSON),
    (b"{", JSON),
    (b"[]", JSON),
    (b"null", JSON),
    (b'"text"', JSON),
    (b"NaN", JSON),
    (b'{"prompt": "a", "seed": Infinity}', JSON),
    (b'{"prompt": "a", "prompt": 1}', JSON),
    (b"[" * 50_000, JSON),
    (b'{"a":' * 20_000, JSON),
    (b"\xff\xfe\x00", JSON),
    (b'{"prompt": "\\ud800"}', JSON),
    (b'{"prompt": "a fox"}', {}),
    (b'{"prompt": "a fox"}', {"content-type": "text/plain"}),
    (b'{"prompt": "a fox"}', {"content-type": "application/json; charset=utf-16"}),
    (b"prompt=a+fox", {"content-type": "application/x-www-form-urlencoded"}),
    (b"x", {"content-type": "multipart/form-data"}),
    (b"x", FORM),
    (b"--b\r\nContent-Disposition: form-data; name=prompt\r\n\r\n", FORM),
    (b'--b\r\nContent-Disposition: form-data; name="' + b"a" * 9000, FORM),
    (b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % n for n in range(999)) + b"--b--",
     FORM),
    (b"{}", {**JSON, "authorization": "Basic x"}),
    (b"{}", {**JSON, "x-forwarded-for": "a" * 5000, "host": "evil.example"}),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["pictures", "films"])
@pytest.mark.parametrize("number", range(len(RAW)))
def test_raw_bodies(kind: str, number: int, request: pytest.FixtureRequest) -> None:
    content, headers = RAW[number]
    live: Served = request.getfixturevalue(kind)
    for path in (IMAGES, VIDEOS, "/v1/images/edits"):
        _check(httpx2.post(f"{live.url}{path}", content=content, headers=headers, timeout=LIMIT_S), RAW[number])


PATHS = (
    *("/v1/videos/%00", "/v1/videos/..%2f..", "/v1/videos?limit=x", "/v1/videos?after=%27--", "/v1/videos?order=up"),
    *("/v1/videos/x/content?variant=y", "/v1/models/%ff", "//", "/v1"),
)


@pytest.mark.parametrize("path", PATHS)
def test_paths(films: Served, path: str) -> None:
    for method in ("GET", "DELETE", "PATCH", "OPTIONS", "HEAD", "POST"):
        answer = httpx2.request(method, f"{films.url}{path}", timeout=LIMIT_S)
        if method != "HEAD":
            _check(answer, (method, path))


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
        b"",
    ],
    ids=range(7),
)
def test_what_is_no_http(pictures: Served, sent: bytes) -> None:
    """And clients that stop in the middle: the next one is answered."""
    where = urlsplit(pictures.url)
    with socket.create_connection((where.hostname or "", where.port or 0), timeout=LIMIT_S) as connection:
        connection.sendall(sent)
        connection.settimeout(3)
        try:
            answered = connection.recv(65536)
        except TimeoutError:
            answered = b""
        except ConnectionError:
            answered = b""
    assert b"Traceback" not in answered
    assert b" 500 " not in answered.split(b"\r\n")[0]
    assert httpx2.get(f"{pictures.url}/health", timeout=LIMIT_S).status_code == 200


def test_many_slow_clients_stop_nobody(pictures: Served) -> None:
    where = urlsplit(pictures.url)
    slow = [socket.create_connection((where.hostname or "", where.port or 0), timeout=LIMIT_S) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.1)
        body = {"prompt": "a fox", "size": "32x32", "num_inference_steps": 1}
        assert httpx2.post(f"{pictures.url}{IMAGES}", json=body, timeout=LIMIT_S).status_code == 200
    finally:
        for connection in slow:
            connection.close()
