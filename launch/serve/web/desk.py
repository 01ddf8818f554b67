"""Where routes hand requests in and wait for the answers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from crossdock.launch.serve.job_runner import JobRunner
from crossdock.launch.serve.metrics import Metrics
from crossdock.launch.serve.previews import Previews
from crossdock.launch.serve.scheduler import Scheduler, Work
from crossdock.launch.serve.service import Service
from crossdock.launch.serve.web.errors import ApiError
from crossdock.launch.serve.web.schemas import Defaults
from crossdock.runtime.reports.media import Media
from crossdock.runtime.request import GenerateRequest


@dataclass(frozen=True)
class Desk:
    """
    Attributes:
        jobs: of a model that makes videos.
        poll_s: how often a stream looks for news.
    """

    service: Service
    scheduler: Scheduler
    defaults: Defaults
    metrics: Metrics
    version: str
    previews: Previews
    jobs: JobRunner | None = None
    logs_prompts: bool = False
    poll_s: float = 0.1

    def take(self, request: GenerateRequest, http: Request, previewed: bool = False) -> Work:
        """Check it and put it into the queue.

        Raises:
            RequestError, QueueFullError, DrainingError.
            ApiError: 503, the model is not there and will not be.
        """
        self.check(request)
        work = self.scheduler.submit(Work(request, previewed=previewed))
        http.state.log = {"steps": request.steps, "pictures": len(request.items)}
        if self.logs_prompts:
            first = request.items[0]
            http.state.log |= {"prompt": first.prompt, "negative_prompt": first.negative_prompt, "seed": first.seed}
        return work

    def check(self, request: GenerateRequest) -> None:
        """
        Raises:
            RequestError: the model cannot do this.
            ApiError: 503, the model is not there and will not be.
        """
        if self.service.failed is not None:
            raise ApiError(503, "the model could not be loaded; the server's log says why", code="not_ready")
        self.service.check(request)

    def told(self, work: Work) -> dict[str, str]:
        """Headers: the place in the queue, and when it may be done."""
        position, expected_s = self.scheduler.position(work), self.scheduler.expected_s(work)
        return {"x-queue-position": str(position), "x-expected-seconds": f"{expected_s:.1f}"}

    def about(self) -> dict[str, Any]:
        """The model, for those who ask for it."""
        plan, defaults = self.service.plan, self.defaults
        return {
            "family": plan.layout.spec.family,
            "layout": plan.layout_name,
            "makes": "pictures" if defaults.fps is None else "videos",
            "takes": {"negative_prompt": plan.layout.spec.negative_prompt and plan.layout.spec.guidance is not None},
            "defaults": {"size": f"{defaults.width}x{defaults.height}", "steps": defaults.steps},
        }

    async def wait(self, work: Work, http: Request) -> list[Media]:
        """For the answer; a client that goes meanwhile takes its request with it."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        work.outcome.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
        tasks = [asyncio.ensure_future(_gone(http)), asyncio.ensure_future(done.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            if not work.outcome.done():
                self.scheduler.cancel(work, "the client has gone")
            http.state.log |= {"queued_ms": round(work.queued_s * 1e3, 1), "batch": work.batch}
        if not work.outcome.done():
            raise ApiError(499, "the client has gone")
        return work.outcome.result()


async def _gone(http: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
