"""A live server for tests: the web, the queue and the engine are the real ones, the rank is a fake."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from crossdock.launch.engine import ranks as ranks_module
from crossdock.launch.engine.engine import Engine
from crossdock.launch.serve.job_runner import JobRunner
from crossdock.launch.serve.jobs import JobStore
from crossdock.launch.serve.metrics import Metrics
from crossdock.launch.serve.previews import Previews
from crossdock.launch.serve.scheduler import Scheduler
from crossdock.launch.serve.service import OwnEngine, Service
from crossdock.launch.serve.web.app import build_app
from crossdock.launch.serve.web.desk import Desk
from crossdock.launch.serve.web.schemas import Defaults
from crossdock.launch.serve.web.server import ServeOptions, listen, queue_for
from crossdock.launch.video_file import write_video
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.media import Video
from crossdock.runtime.request import GenerateRequest, RequestItem
from fake_gang import LIMIT_S, FakeGang

DEFAULTS = Defaults(name="fox-1", width=32, height=32, steps=2, max_pixels=256 * 256)

FPS = 16


def colour(item: RequestItem) -> tuple[int, int, int]:
    """Of a picture that this item was asked for."""
    text = f"{item.prompt}/{item.negative_prompt}/{item.seed}".encode()
    return sum(text) % 251, len(text) % 251, item.seed % 251


def draw(item: RequestItem, asked: GenerateRequest) -> Image.Image:
    return Image.new("RGB", (asked.width, asked.height), colour(item))


def film(item: RequestItem, asked: GenerateRequest) -> Video:
    frames = np.zeros((asked.frames, asked.height, asked.width, 3), np.uint8)
    frames[:] = colour(item)
    return Video(frames, FPS)


@dataclass
class Served:
    url: str
    gang: FakeGang
    service: Service
    scheduler: Scheduler
    metrics: Metrics
    web: uvicorn.Server

    def eventually(self, true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not true():
            assert time.monotonic() < deadline, "it does not come about"
            time.sleep(0.01)


@contextmanager
def served(
    plan: RunPlan, patch: Any, *, key: str | None = None, most: int = 4, data: Path | None = None, **options: Any
) -> Iterator[Served]:
    """`data`: makes videos; `options`: of ServeOptions and `build_app`."""
    from fake_gang import TrustingCoordinator

    patch.setattr(ranks_module, "Coordinator", TrustingCoordinator)
    gang = FakeGang()
    gang.draw = draw if data is None else film
    if options.pop("waits", False):
        gang.gate.clear()

    def start(notify: Any) -> Engine:
        engine = Engine(plan, gang, owns_gang=True, notify=notify)
        engine._ranks.start(ranks_module.Survived())
        return engine

    metrics, previews = Metrics(), Previews()
    service = OwnEngine(plan, start, most, lambda line: None)
    scheduler = queue_for(service, metrics, previews, options.pop("queue", 64), options.pop("batch_wait_s", 0.0))
    jobs = None if data is None else JobRunner(JobStore(data), scheduler, 3600.0, options.pop("write", write_video))
    defaults = DEFAULTS if data is None else DEFAULTS.model_copy(update={"fps": FPS, "seconds": 0.25})
    app = build_app(
        Desk(service, scheduler, defaults, metrics, "0", previews, jobs, options.pop("logs_prompts", False), 0.01),
        key,
        **options,
    )
    listener = listen(ServeOptions(port=0))
    web = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    found = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", gang, service, scheduler, metrics, web)
    try:
        found.eventually(lambda: web.started and service.state == "ready")
        yield found
    finally:
        gang.gate.set()
        scheduler.close(LIMIT_S)
        if jobs is not None:
            jobs.close()
        service.close(LIMIT_S)
        web.should_exit = True
        thread.join(LIMIT_S)
        listener.close()
        assert not thread.is_alive(), "the web server is left"
