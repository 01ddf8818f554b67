"""Errors in OpenAI's shape, whatever went wrong: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from crossdock.launch.serve.scheduler import DrainingError, QueueFullError
from crossdock.runtime.errors import CrossdockError, RequestCancelled, RequestError, RequestTimeout, UserError

LOG = logging.getLogger("crossdock.serve")
_OUR_FAULT = "the server could not answer; its log says why"
_NAMES = {"prompts": "prompt", "steps": "num_inference_steps", "frames": "num_frames"}
_NAMES |= dict.fromkeys(("height", "width", "height x width"), "size")
"""Field of a GenerateRequest -> the client's name for it."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Becomes an answer. `param`: the field of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def content(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.content(), self.status, headers)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request cannot be honoured as it is."""
    return ApiError(400, message, param=param, code=code)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an error."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
        case DrainingError():
            return ApiError(503, str(error), code="shutting_down", retry_after_s=5)
        case RequestTimeout():
            return ApiError(504, str(error), code="timeout")
        case RequestCancelled():
            return ApiError(503, str(error), code="cancelled")
        case RequestError():
            field = str(error).partition(":")[0].partition(" of ")[0]
            return refused(str(error), _NAMES.get(field, field if field.isidentifier() else None))
        case UserError():
            return ApiError(503, _OUR_FAULT, code="not_ready")
        case _:
            return ApiError(500, _OUR_FAULT, code=type(error).__name__)


def install(app: FastAPI) -> None:
    """Let `app` answer every error so."""

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(CrossdockError)
    async def own(request: Request, error: CrossdockError) -> JSONResponse:
        found = api_error(error)
        if found.status == 500:
            LOG.error("%s %s: %s", request.method, request.url.path, error)
        return found.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        messages = {404: f"no such route: {where}; /docs lists them", 405: f"not allowed: {where}; /docs lists what is"}
        return ApiError(error.status_code, messages.get(error.status_code, str(error.detail))).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        LOG.exception("%s %s", request.method, request.url.path, exc_info=error)
        return api_error(error).response()


def of_validation(errors: Any) -> ApiError:
    """The first thing that pydantic did not like."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return refused("the body is no JSON; send an object with a prompt", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return refused(f"{'.'.join(path)}: unknown field; leave it out", ".".join(path), "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return refused(f"{'.'.join(path) or 'body'}: {message}", ".".join(path) or None, first["type"])
