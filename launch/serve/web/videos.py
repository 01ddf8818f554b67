"""`/v1/videos`: jobs that are created, looked at, fetched and deleted."""

from __future__ import annotations

import sqlite3
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from crossdock.launch.serve.jobs import Job
from crossdock.launch.serve.web.desk import Desk
from crossdock.launch.serve.web.errors import ApiError, refused
from crossdock.launch.serve.web.schemas import Defaults, VideoRequest
from crossdock.runtime.plan.request_checks import nearest_frames
from crossdock.runtime.request import GenerateRequest

POLL_MS = (500, 10_000)
"""The shortest and the longest time after which a client is told to ask again."""


def routes(desk: Desk) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/videos")
    async def create(http: Request) -> Response:
        """Make a video; JSON, or a form as OpenAI's client sends it.

        Beside OpenAI's fields: seed, num_inference_steps, guidance_scale or true_cfg_scale, negative_prompt,
        num_frames, and fps, which has to be the model's.
        """
        if desk.jobs is None:
            raise refused("this model makes pictures: POST /v1/images/generations", code="wrong_model_kind")
        asked = await _read(http)
        request = _request(desk, asked)
        desk.check(request)
        try:
            job = desk.jobs.create(request, desk.defaults.fps or 1)
        except sqlite3.Error:
            raise ApiError(507, "the job could not be stored: is the server's disk full?", code="storage") from None
        http.state.log = {"steps": request.steps, "job": job.id}
        return JSONResponse(_shown(desk, job), headers=_poll(desk, job))

    @router.get("/v1/videos")
    async def page(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """The jobs, newest first."""
        if desk.jobs is None:
            return {"object": "list", "data": [], "has_more": False}
        desk.jobs.store.expire()
        jobs = desk.jobs.store.page(after, limit + 1, order == "desc")
        data = [_shown(desk, job) for job in jobs[:limit]]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, "has_more": len(jobs) > limit, **ends}

    @router.get("/v1/videos/{name}")
    async def look(name: str) -> Response:
        job = _job(desk, name)
        return JSONResponse(_shown(desk, job), headers=_poll(desk, job))

    @router.get("/v1/videos/{name}/content")
    async def content(name: str, variant: str = "video") -> Response:
        """The MP4 file."""
        if variant != "video":
            raise refused(f"variant: found {variant!r:.40}; allowed: video", "variant")
        job = _job(desk, name)
        assert desk.jobs is not None
        if job.status != "completed":
            raise ApiError(409, f"the video is {job.status}; fetch it when it is completed", code="not_completed")
        path = desk.jobs.store.file(job.id)
        if not path.is_file():
            raise ApiError(404, "the video's file is gone", code="file_not_found")
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4")

    @router.delete("/v1/videos/{name}")
    async def delete(name: str) -> dict[str, Any]:
        """Stop it if it runs, and delete it."""
        job = _job(desk, name)
        assert desk.jobs is not None
        desk.jobs.delete(job)
        return {"id": job.id, "object": "video.deleted", "deleted": True}

    return router


async def _read(http: Request) -> VideoRequest:
    """Of JSON, or of a form."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    given: Any
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with http.form(max_files=1, max_fields=50) as form:
            if any(isinstance(value, UploadFile) for _, value in form.multi_items()):
                raise refused("input_reference: this model takes no pictures; leave it out", "input_reference")
            given = dict(form.multi_items())
    else:
        try:
            given = await http.json()
        except (ValueError, RecursionError):
            raise refused("the body is no JSON; send an object with a prompt", code="invalid_json") from None
    try:
        return VideoRequest.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _request(desk: Desk, asked: VideoRequest) -> GenerateRequest:
    defaults = desk.defaults
    if asked.input_reference is not None:
        raise refused("input_reference: this model takes no pictures; leave it out", "input_reference")
    if asked.fps not in (None, defaults.fps):
        raise refused(f"fps: found {asked.fps}; this model makes {defaults.fps}", "fps")
    request = asked.request(defaults, 1)
    frames = asked.num_frames
    if frames is None:
        frames = nearest_frames(desk.service.plan.layout, round(_seconds(asked, defaults) * (defaults.fps or 1)) + 1)
    elif asked.seconds is not None:
        raise refused("seconds: it and num_frames say the same; give one of them", "seconds")
    return GenerateRequest(**{**vars(request), "frames": frames})


def _seconds(asked: VideoRequest, defaults: Defaults) -> float:
    if asked.seconds is None:
        return defaults.seconds
    try:
        seconds = float(asked.seconds)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds <= defaults.max_seconds:
        raise refused(f"seconds: found {asked.seconds!r:.40}; allowed: up to {defaults.max_seconds:g}", "seconds")
    return seconds


def _job(desk: Desk, name: str) -> Job:
    job = desk.jobs.store.get(name) if desk.jobs is not None else None
    if job is None:
        raise ApiError(404, f"no such video: {name!r:.80}", code="video_not_found")
    return job


def _shown(desk: Desk, job: Job) -> dict[str, Any]:
    """As OpenAI shows it."""
    work = desk.jobs.work(job) if desk.jobs is not None else None
    status: str = job.status
    progress = 100 if status == "completed" else 0
    if status == "queued" and work is not None and work.began is not None:
        status, (done, of) = "in_progress", work.progress
        progress = min(99, 100 * done // of if of else 0)
    asked, item = job.request, job.request.items[0]
    return {
        "id": job.id,
        "object": "video",
        "status": status,
        "progress": progress,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "expires_at": job.expires_at,
        "model": desk.defaults.name,
        "prompt": item.prompt,
        "seed": item.seed,
        "seconds": f"{(asked.frames or 1) / job.fps:g}",
        "size": f"{asked.width}x{asked.height}",
        "num_frames": asked.frames,
        "error": None if job.code is None else {"code": job.code, "message": job.message},
    }


def _poll(desk: Desk, job: Job) -> dict[str, str]:
    work = desk.jobs.work(job) if desk.jobs is not None else None
    if work is None:
        return {}
    wait_ms = int(desk.scheduler.expected_s(work) * 1e3 / 4)
    told = {"openai-poll-after-ms": str(min(max(wait_ms, POLL_MS[0]), POLL_MS[1]))}
    return told | desk.told(work)
