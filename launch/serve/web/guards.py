"""What stands before the routes: the key, the size and the time of a body, headers, a line in the log for each request.

Plain ASGI, so that a body is never read before it is allowed, and a stream is not held back.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crossdock.launch.serve.web.errors import ApiError

LOG = logging.getLogger("crossdock.serve.requests")
OPEN = frozenset({"/", "/health", "/ready", "/version", "/favicon.ico"})
"""Need no key; so do files, whose names nobody can guess."""
HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guards:
    """
    Args:
        key: what clients have to send as a bearer token; None: nobody is asked.
        refused: gets the status of every request that was not taken.
        max_body_bytes, body_s: of a request; more is not read.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, refused: Callable[[int], None], max_body_bytes: int, body_s: float
    ) -> None:
        self._app, self._key = app, None if key is None else key.encode()
        self._refused, self._max_body_bytes, self._body_s = refused, max_body_bytes, body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        body = _Body(receive, self._max_body_bytes, self._body_s, answer)
        try:
            self._admit(scope["path"], {name.lower(): value for name, value in scope["headers"]})
            await self._app(scope, body.receive, answer.send)
        except ApiError as error:
            answer.refused = answer.refused or error
        finally:
            await answer.end()
            if 400 <= answer.status < 499:
                self._refused(answer.status)

    def _admit(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise ApiError(400, "Content-Length is no number")
        if int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        if self._key is None or path in OPEN or path.startswith("/files/"):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            what = "the key is not the right one" if given else "no key was sent"
            message = f"{what}; send the server's as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is too large; allowed: {limit} bytes", code="request_too_large")


class _Body:
    """Counts what comes, and waits so long for all of it."""

    def __init__(self, receive: Receive, limit: int, within_s: float, answer: _Answer) -> None:
        self._receive, self._limit, self._until = receive, limit, time.monotonic() + within_s
        self._answer = answer
        self._count, self._whole = 0, False

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(self._until - time.monotonic(), 0)):
                message = await self._receive()
        except TimeoutError:
            late = ApiError(408, "the body did not come in time; send it in one go", code="body_timeout")
            self._answer.refused = late
            raise late from None
        self._count += len(message.get("body", b""))
        if self._count > self._limit:
            self._answer.refused = _too_large(self._limit)
            raise self._answer.refused
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class _Answer:
    """
    Attributes:
        refused: is answered, whatever the routes make of it.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send, self._began = scope, send, time.perf_counter()
        self.status = 0
        self.refused: ApiError | None = None
        self.id = scope.setdefault("state", {})["request_id"] = f"req_{uuid.uuid4().hex}"

    async def send(self, message: Message) -> None:
        if self.refused is None or self.status:
            await self._pass_on(message)

    async def end(self) -> None:
        if self.refused is not None and not self.status:
            await self.refused.response()(self._scope, _nothing, self._pass_on)
        self._log()

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            sent = {name.lower() for name, _ in message["headers"]}
            more = {**HEADERS, "x-request-id": self.id}
            own = [(k.lower().encode(), v.encode()) for k, v in more.items() if k.lower().encode() not in sent]
            message = {**message, "headers": [*message["headers"], *own]}
        await self._send(message)

    def _log(self) -> None:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self.id,
            "method": self._scope["method"],
            "path": self._scope["path"][:200],
            "status": self.status or 499,
            "ms": round((time.perf_counter() - self._began) * 1e3, 1),
            **self._scope["state"].get("log", {}),
        }
        LOG.info("%s", json.dumps(row))


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
