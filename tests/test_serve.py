"""The server as OpenAI's own client sees it, and as those see it who mean harm or know no better."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.generation import Generation
from crossdock.launch.serve.batch_limit import BatchLimit
from crossdock.launch.serve.previews import Previews
from crossdock.launch.serve.scheduler import Scheduler, Work
from crossdock.launch.serve.web.server import ServeOptions, listen
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RankError, RequestCancelled
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.request import GenerateRequest, RequestItem
from fake_gang import LIMIT_S
from live_server import until
from serving import Served, colour, served


@pytest.fixture(scope="module")
def plan(flux2_dir: Path) -> RunPlan:
    return make_plan(RunConfig(), flux2_dir, "cpu")


@pytest.fixture(scope="module")
def live(plan: RunPlan) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch, served(plan, patch) as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        yield client


def _picture(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def _post(live: Served, body: Any, **more: Any) -> httpx2.Response:
    return httpx2.post(f"{live.url}/v1/images/generations", json=body, timeout=LIMIT_S, **more)


# -- OpenAI's client --------------------------------------------------------------------------------------------------


def test_a_picture(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", size="48x32", extra_body={"seed": 7})
    picture = _picture(answer.data[0].b64_json)
    assert picture.size == (48, 32)
    assert picture.getpixel((0, 0)) == colour(RequestItem("a fox", None, 7))
    assert (answer.size, answer.output_format, answer.background) == ("48x32", "png", "opaque")
    assert answer.usage is not None
    assert picture.text["prompt"] == "a fox"
    assert picture.text["seed"] == "7"
    assert {"steps", "size", "layout", "software", "model"} <= picture.text.keys()


def test_several_each_with_its_seed(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="foxes", n=6, extra_body={"seed": 3, "negative_prompt": None})
    found = [_picture(row.b64_json).getpixel((0, 0)) for row in answer.data]
    assert found == [colour(RequestItem("foxes", None, 3 + n)) for n in range(6)]


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats(client: openai.OpenAI, form: Any) -> None:
    answer = client.images.generate(prompt="a fox", output_format=form, model="fox-1", size="auto")
    assert _picture(answer.data[0].b64_json).format == form.upper()
    assert answer.output_format == form
    assert answer.size == "32x32"


def test_compression_is_honoured(client: openai.OpenAI) -> None:
    sizes = []
    for compression in (100, 5):
        answer = client.images.generate(
            prompt="a fox", output_format="jpeg", output_compression=compression, size="256x256"
        )
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes[1] < sizes[0]


def test_urls_are_absolute_and_can_be_fetched(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", response_format="url", extra_body={"seed": 1})
    got = httpx2.get(answer.data[0].url or "")
    assert got.status_code == 200
    assert got.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(got.content)).getpixel((0, 0)) == colour(RequestItem("a fox", None, 1))


def test_a_stream(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="a fox", stream=True, partial_images=0, extra_body={"seed": 5}))
    assert [event.type for event in events] == ["image_generation.completed"]
    assert _picture(events[0].b64_json).getpixel((0, 0)) == colour(RequestItem("a fox", None, 5))


@pytest.mark.parametrize("tokens", [False, True])
def test_previews_are_learned(tokens: bool) -> None:
    """Of colours that are linear in the latents; another picture's then follow from its latents."""
    previews, ways = Previews(), torch.rand(4, 3, generator=torch.Generator().manual_seed(0))

    def picture(seed: int) -> tuple[torch.Tensor, Image.Image]:
        latents = torch.rand(1, 4, 6, 12, generator=torch.Generator().manual_seed(seed))
        colours = (latents[0].permute(1, 2, 0) @ ways / 4 * 255).round().to(torch.uint8)
        image = Image.fromarray(colours.numpy()).resize((96, 48), Image.Resampling.NEAREST)
        return latents.flatten(2).transpose(1, 2) if tokens else latents, image

    assert previews.draw(picture(0)[0], 96, 48) is None
    previews.learn(*picture(0))
    latents, wanted = picture(1)
    drawn = previews.draw(latents, 96, 48)
    assert drawn is not None
    assert drawn.size == (256, 128)

    def away(image: Image.Image) -> float:
        small = (np.asarray(each.resize((12, 6), Image.Resampling.BOX), float) for each in (drawn, image))
        return float(np.abs(next(small) - next(small)).mean())

    assert away(wanted) < away(picture(2)[1]) / 2
    assert previews.draw(torch.zeros(1, 7, 6, 12), 96, 48) is None  # of another model


def test_the_page(live: Served) -> None:
    answer = httpx2.get(live.url)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fox-1"]
    assert client.models.retrieve("fox-1").id == "fox-1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "dall-e-3"}, openai.NotFoundError, "model"),
    ({"size": "33x32"}, openai.BadRequestError, "size"),
    ({"size": "1024"}, openai.BadRequestError, "size"),
    ({"size": "4096x4096"}, openai.BadRequestError, "size"),
    ({"n": 11}, openai.BadRequestError, "n"),
    ({"n": 0}, openai.BadRequestError, "n"),
    ({"background": "transparent"}, openai.BadRequestError, "background"),
    ({"output_format": "gif"}, openai.BadRequestError, "output_format"),
    ({"output_compression": 50}, openai.BadRequestError, "output_compression"),
    ({"partial_images": 2}, openai.BadRequestError, "partial_images"),
    ({"style": "vivid"}, openai.BadRequestError, "style"),
    ({"frame_count": 3}, openai.BadRequestError, "frame_count"),
    ({"complexity": "low"}, openai.BadRequestError, "complexity"),
    ({"quality": "ultra"}, openai.BadRequestError, "quality"),
    ({"prompt": ""}, openai.BadRequestError, "prompt"),
    ({"prompt": " "}, openai.BadRequestError, "prompt"),
    ({"prompt": "a\0b"}, openai.BadRequestError, "prompt"),
    ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed"),
    ({"extra_body": {"seed": 1.5}}, openai.BadRequestError, "seed"),
    ({"extra_body": {"num_inference_steps": 0}}, openai.BadRequestError, "num_inference_steps"),
    ({"extra_body": {"negativ_prompt": "x"}}, openai.BadRequestError, "negativ_prompt"),
    ({"extra_body": {"guidance_scale": 1, "true_cfg_scale": 1}}, openai.BadRequestError, None),
    ({"quality": "low", "extra_body": {"num_inference_steps": 3}}, openai.BadRequestError, "quality"),
]


@pytest.mark.parametrize(("asked", "kind", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, asked: dict[str, Any], kind: Any, param: str | None
) -> None:
    with pytest.raises(kind) as found:
        client.images.generate(**{"prompt": "a fox", **asked})
    assert found.value.param == param
    assert found.value.body["message"]
    assert found.value.body["type"]


def test_an_edit_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="takes no pictures"):
        client.images.edit(image=("a.png", b"123"), prompt="x")


# -- the queue --------------------------------------------------------------------------------------------------------


def _ask(live: Served, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx2.Response]]:
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(_post(live, body)), daemon=True)
    thread.start()
    return thread, answers


def test_those_that_fit_share_a_batch(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch) as live:
        live.gang.gate.clear()
        first, _ = _ask(live, {"prompt": "first"})
        live.eventually(lambda: live.scheduler.running)
        bodies = [{"prompt": f"fox {n}", "seed": n, "size": "32x32" if n != 2 else "64x32"} for n in range(5)]
        asked = []
        for n, body in enumerate(bodies):
            asked.append(_ask(live, body))
            live.eventually(lambda n=n: live.scheduler.waiting == n + 1)
        live.gang.gate.set()
        for thread, _ in [(first, None), *asked]:
            thread.join(LIMIT_S)
        # one, then four that are alike (the fourth overtakes the odd one), then the odd one
        assert [prompt for prompt, _ in live.gang.ran] == ["first", "fox 0", "fox 2"]
        for body, (_, answers) in zip(bodies, asked, strict=True):
            picture = _picture(answers[0].json()["data"][0]["b64_json"])
            assert picture.getpixel((0, 0)) == colour(RequestItem(body["prompt"], None, body["seed"]))


@dataclass
class _Run:
    """Ends when both lanes have one, or it is cancelled."""

    both: threading.Barrier
    progress: tuple[int, int] = (0, 2)
    reason: str | None = None

    def cancel(self, reason: str = "cancelled") -> None:
        self.reason = reason
        self.both.abort()

    def result(self) -> Generation:
        try:
            self.both.wait(LIMIT_S)
        except threading.BrokenBarrierError:
            raise RequestCancelled(self.reason or "", 0) from None
        return Generation(["made"], [], [], {}, [])


def test_each_lane_runs_a_batch() -> None:
    both, runs = threading.Barrier(2), list[_Run]()

    def begin(request: GenerateRequest, *_: Any) -> _Run:
        runs.append(_Run(both))
        return runs[-1]

    scheduler = Scheduler(begin, lambda request: 1, 8, lanes=2)
    works = [scheduler.submit(Work(GenerateRequest.of("a fox", seed=seed))) for seed in range(2)]
    assert [work.outcome.result(LIMIT_S) for work in works] == [["made"]] * 2
    last = scheduler.submit(Work(GenerateRequest.of("alone")))
    until(lambda: len(runs) == 3 and scheduler.running)
    scheduler.cancel(last, "the client has gone")
    with pytest.raises(RequestCancelled, match="the client has gone"):
        last.outcome.result(LIMIT_S)
    assert scheduler.wait_idle(LIMIT_S)
    scheduler.close(LIMIT_S)


def test_a_batch_has_as_many_pictures_as_fit_beside_the_weights() -> None:
    limit, asked = BatchLimit(8, measured=True), GenerateRequest.of("a fox", height=64, width=64)
    assert limit.of(asked) == 1  # nothing is known yet
    row = {"peak_device_bytes": 1000, "peak_weight_bytes": 800, "spare_device_bytes": 500}
    limit.learn(asked, [row, row | {"spare_device_bytes": 900}])
    assert limit.of(asked) == 3  # 200 bytes each, 700 on the rank that has least
    assert limit.of(replace(asked, height=128)) == 1
    assert limit.of(replace(asked, height=16)) == 8  # never more than was allowed
    assert BatchLimit(8, measured=False).of(asked) == 8


def test_a_full_queue_says_when_to_come_again(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch, queue=1) as live:
        live.gang.gate.clear()
        _ask(live, {"prompt": "runs"})
        live.eventually(lambda: live.scheduler.running)
        _ask(live, {"prompt": "waits"})
        live.eventually(lambda: live.scheduler.waiting)
        refused = _post(live, {"prompt": "too many"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_client_that_goes_takes_its_request_with_it_and_no_other(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(plan, monkeypatch) as live:
        live.gang.gate.clear()
        _ask(live, {"prompt": "first"})
        live.eventually(lambda: live.scheduler.running)
        stays, answers = _ask(live, {"prompt": "stays", "seed": 1})
        live.eventually(lambda: live.scheduler.waiting == 1)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{live.url}/v1/images/generations", json={"prompt": "goes"}, timeout=0.5)
        live.eventually(lambda: live.scheduler.waiting == 1)
        live.gang.gate.set()
        stays.join(LIMIT_S)
        assert answers[0].status_code == 200
        assert [prompt for prompt, _ in live.gang.ran] == ["first", "stays"]


def test_one_of_a_batch_goes(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch, batch_wait_s=LIMIT_S, most=2) as live:
        live.gang.gate.clear()
        stays, answers = _ask(live, {"prompt": "stays", "seed": 1})
        live.eventually(lambda: live.scheduler.waiting == 1)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{live.url}/v1/images/generations", json={"prompt": "goes"}, timeout=1.0)
        live.eventually(lambda: live.metrics.cancelled._value.get() == 1)
        live.gang.gate.set()
        stays.join(LIMIT_S)
        assert answers[0].status_code == 200
        assert live.gang.ran == [("stays", 1)]


def test_the_last_of_a_batch_that_goes_ends_it(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch) as live:
        live.gang.gate.clear()
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{live.url}/v1/images/generations", json={"prompt": "goes"}, timeout=0.5)
        live.eventually(lambda: live.gang.told)
        live.gang.gate.set()
        live.eventually(lambda: not live.scheduler.running)
        assert _post(live, {"prompt": "next"}).status_code == 200


# -- faults -----------------------------------------------------------------------------------------------------------


def test_lost_ranks_are_replaced_and_the_request_answered(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch) as live:
        live.gang.faults = [RankError(0, "its process died", "died")] * 2
        assert _post(live, {"prompt": "a fox", "num_inference_steps": 4}).status_code == 200
        assert live.gang.starts == 3
        assert 'crossdock:ranks_lost_total{kind="died"} 2.0' in httpx2.get(f"{live.url}/metrics").text


def test_a_request_that_fails_twice_fails_alone(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gives its ranks up each time; the next one answers the next request."""
    with served(plan, monkeypatch) as live:
        retries = plan.config.launch.recovery.retries
        live.gang.faults = [RankError(0, "its process died", "died")] * 2 * (retries + 1)
        failed = _post(live, {"prompt": "a fox"})
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "RankError"
        assert "Traceback" not in failed.text
        assert httpx2.get(f"{live.url}/health").status_code == 200
        assert _post(live, {"prompt": "next"}).status_code == 200


def test_ready_says_what_is(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch) as live:
        assert httpx2.get(f"{live.url}/ready").status_code == 200
        monkeypatch.setattr(Engine, "recovering", True)
        answer = httpx2.get(f"{live.url}/ready")
        assert (answer.status_code, answer.json()["status"]) == (503, "recovering")
        assert "retry-after" in answer.headers
        live.scheduler.drain()
        assert httpx2.get(f"{live.url}/ready").json()["status"] == "shutting_down"
        assert _post(live, {"prompt": "late"}).status_code == 503


# -- security ---------------------------------------------------------------------------------------------------------


def test_a_key(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch, key="s3cret") as live:
        wrong = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.images.generate(prompt="a fox")
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="s3cret", max_retries=0) as right:
            assert right.images.generate(prompt="a fox").data
        for path in ("/metrics", "/docs", "/openapi.json", "/v1/models"):
            assert httpx2.get(f"{live.url}{path}").status_code == 401, path
        for path in ("/health", "/ready", "/version"):
            assert httpx2.get(f"{live.url}{path}").status_code == 200, path


def test_bodies_are_bounded_in_size_and_time(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch, max_body_bytes=1000, body_s=0.5) as live:
        assert _post(live, {"prompt": "x" * 2000}).status_code == 413

        def chunks(wait_s: float) -> Iterator[bytes]:
            for _ in range(30):
                yield b"x" * 100
                time.sleep(wait_s)

        url = f"{live.url}/v1/images/generations"
        assert httpx2.post(url, content=chunks(0)).status_code == 413
        assert httpx2.post(url, content=chunks(0.1)).status_code in (408, 413)


def test_no_file_but_those_that_were_made(live: Served) -> None:
    for name in ("..%2f..%2fetc%2fpasswd", "x.png", "%2e%2e/x", "/etc/passwd"):
        assert httpx2.get(f"{live.url}/files/{name}").status_code == 404


def test_every_answer_has_the_headers_and_an_id(live: Served) -> None:
    for answer in (_post(live, {}), httpx2.get(f"{live.url}/nowhere"), httpx2.put(f"{live.url}/health")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.json()["error"]["message"]


def test_the_log_has_no_prompt(live: Served, caplog: pytest.LogCaptureFixture) -> None:
    def rows() -> dict[str, Any]:
        records = [record for record in caplog.records if record.name == "crossdock.serve.requests"]
        return {row["id"]: row for row in (json.loads(record.message) for record in records)}

    with caplog.at_level("INFO", "crossdock.serve.requests"):
        name = _post(live, {"prompt": "a secret fox"}).headers["x-request-id"]
        live.eventually(lambda: name in rows())  # it is written after the answer
    row = rows()[name]
    assert (row["status"], row["path"], row["pictures"]) == (200, "/v1/images/generations", 1)
    assert row["batch"][1] == 0
    assert "secret" not in json.dumps(rows())


def test_the_log_has_the_prompt_if_asked(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(plan, monkeypatch, logs_prompts=True) as live, caplog.at_level("INFO", "crossdock.serve.requests"):
        _post(live, {"prompt": "a known fox", "seed": 3})
        live.eventually(lambda: any('"prompt": "a known fox"' in record.message for record in caplog.records))


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_who_reads_that_it_listens_may_connect() -> None:
    """Before the web server runs: the line that names the address is printed when this returns."""
    with listen(ServeOptions(port=0)) as listener, socket.create_connection(listener.getsockname(), LIMIT_S):
        pass


def test_metrics(live: Served) -> None:
    _post(live, {"prompt": "a fox"})
    _post(live, {"prompt": "a fox", "size": "1x1"})
    text = httpx2.get(f"{live.url}/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "e2e_request_latency_seconds_count", "pictures_total"):
        assert f"crossdock:{name}" in text
    for name in ('request_refused_total{status="400"}', 'device_bytes{part="weight",rank="0",replica=""}'):
        assert f"crossdock:{name}" in text
