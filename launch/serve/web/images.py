"""`POST /v1/images/generations`, and the files that `response_format: url` points to."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image

from crossdock.launch.serve.encode import MEDIA_TYPES, encode_image
from crossdock.launch.serve.scheduler import Work
from crossdock.launch.serve.web.desk import Desk
from crossdock.launch.serve.web.errors import ApiError, api_error, refused
from crossdock.launch.serve.web.schemas import ImageRequest
from crossdock.runtime.request import GenerateRequest

URL_S = 3600
"""How long a picture can be fetched by its URL."""
MAX_FILE_BYTES = 256 * 2**20
"""Of all pictures that wait to be fetched; the oldest go first."""


class Files:
    """Pictures in memory, under names that nobody can guess."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()

    def add(self, content: bytes, form: str) -> str:
        self._forget()
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._files[name] = time.monotonic(), form, content
        return name

    def get(self, name: str) -> Response:
        self._forget()
        found = self._files.get(name)
        if found is None:
            raise ApiError(404, f"no such file: it is kept for {URL_S // 60} minutes", code="file_not_found")
        return Response(found[2], media_type=MEDIA_TYPES[found[1]])

    def _forget(self) -> None:
        held = sum(len(content) for *_, content in self._files.values())
        for name, (made, _, content) in list(self._files.items()):
            if time.monotonic() - made < URL_S and held <= MAX_FILE_BYTES:
                return
            held -= len(content)
            del self._files[name]


def routes(desk: Desk) -> APIRouter:
    router, files = APIRouter(), Files()

    @router.post("/v1/images/generations")
    async def generate(asked: ImageRequest, http: Request) -> Response:
        """Draw pictures of a prompt.

        Beside OpenAI's fields: seed, num_inference_steps, guidance_scale or true_cfg_scale, negative_prompt.
        """
        if desk.defaults.fps is not None:
            raise refused("this model makes videos: POST /v1/videos", code="wrong_model_kind")
        asked.check(desk.defaults)
        request = asked.generate_request(desk.defaults)
        work = desk.take(request, http, previewed=bool(asked.partial_images))
        if asked.stream:
            return StreamingResponse(
                _events(desk, work, asked, http), media_type="text/event-stream", headers=desk.told(work)
            )
        headers = desk.told(work)
        images = await desk.wait(work, http)
        answer = await asyncio.to_thread(_answer, desk, asked, request, images, files, str(http.base_url))
        return JSONResponse(answer, headers=headers)

    @router.post("/v1/images/edits")
    async def edit() -> Response:
        """Refused: the families that are served here take no pictures."""
        raise refused("edits: this model takes no pictures as input; use /v1/images/generations", code="unsupported")

    @router.get("/files/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return files.get(name)

    return router


def _encoded(desk: Desk, asked: ImageRequest, request: GenerateRequest, number: int, image: Any) -> bytes:
    assert isinstance(image, Image.Image)
    item = request.items[number]
    made = {
        "prompt": item.prompt,
        "negative_prompt": item.negative_prompt,
        "seed": item.seed,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "size": f"{request.width}x{request.height}",
        "model": desk.defaults.name,
        "layout": desk.service.plan.layout_name,
        "software": f"crossdock {desk.version}",
    }
    return encode_image(image, asked.format, asked.output_compression, made)


def _common(asked: ImageRequest, request: GenerateRequest) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": asked.format,
        "quality": {"standard": "medium", "hd": "high"}.get(asked.quality or "", asked.quality) or "auto",
        "size": f"{request.width}x{request.height}",
        "usage": _usage(request),
    }


def _usage(request: GenerateRequest) -> dict[str, Any]:
    """Nothing is billed, and no tokens are counted: the fields are there because clients read them."""
    nothing = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": nothing, "output_tokens": 0, "total_tokens": 0}


def _answer(
    desk: Desk, asked: ImageRequest, request: GenerateRequest, images: list[Any], files: Files, base: str
) -> dict[str, Any]:
    rows = []
    for number, image in enumerate(images):
        content = _encoded(desk, asked, request, number, image)
        row: dict[str, Any] = {"seed": request.items[number].seed}
        if asked.response_format == "url":
            row["url"] = f"{base}files/{files.add(content, asked.format)}"
        else:
            row["b64_json"] = base64.b64encode(content).decode()
        rows.append(row)
    return {"created": int(time.time()), "data": rows, **_common(asked, request)}


async def _events(desk: Desk, work: Work, asked: ImageRequest, http: Request) -> AsyncIterator[str]:
    """Server-sent events (WHATWG HTML, 9.2): progress as comments, previews, then each picture."""
    waits = asyncio.ensure_future(desk.wait(work, http))
    try:
        seen, shown = None, 0
        while not waits.done():
            await asyncio.wait([waits], timeout=desk.poll_s)
            if waits.done():
                break
            if (now := (desk.scheduler.position(work), *work.progress)) != seen:
                seen = now
                yield f": position {now[0]}, step {now[1]} of {now[2]}\n\n"
            if _is_due(work, shown, asked.partial_images or 0):
                for event in await asyncio.to_thread(_partial, desk, work, asked, shown):
                    shown += 1
                    yield _event(event)
        for number, image in enumerate(waits.result()):
            content = await asyncio.to_thread(_encoded, desk, asked, work.request, number, image)
            more = {"b64_json": base64.b64encode(content).decode(), "seed": work.request.items[number].seed}
            yield _event({"type": "image_generation.completed", **more, **_common(asked, work.request)})
    except Exception as error:
        yield f"event: error\ndata: {json.dumps(api_error(error).content())}\n\n"
    finally:
        waits.cancel()  # the client has gone: so does its request


def _event(content: dict[str, Any]) -> str:
    content |= {"created_at": int(time.time())}
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n"


def _is_due(work: Work, shown: int, partial_images: int) -> bool:
    """Previews come at even distances over the steps."""
    if work.preview is None or shown >= partial_images:
        return False
    return work.preview[0] * (partial_images + 1) >= work.request.steps * (shown + 1)


def _partial(desk: Desk, work: Work, asked: ImageRequest, index: int) -> list[dict[str, Any]]:
    assert work.preview is not None
    request = work.request
    image = desk.previews.draw(work.preview[1][:1], request.width, request.height)
    if image is None:
        return []
    content = base64.b64encode(encode_image(image, asked.format, asked.output_compression, {})).decode()
    kind = {"type": "image_generation.partial_image", "partial_image_index": index, "b64_json": content}
    return [kind | _common(asked, request)]
