"""The web application: routes, and what watches over them."""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware

from crossdock.launch.serve.web import errors, images, videos
from crossdock.launch.serve.web.desk import Desk
from crossdock.launch.serve.web.errors import ApiError
from crossdock.launch.serve.web.guards import Guards

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _only(tag: str) -> str:
    """A source for a policy: the one inline element of the page (CSP 3, 2.3.1)."""
    inside = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


PAGE_POLICY = (
    f"default-src 'none'; script-src {_only('script')}; style-src {_only('style')}; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

MAX_BODY_BYTES = 64 * 2**20
BODY_S = 60.0


def build_app(desk: Desk, key: str | None, *, max_body_bytes: int = MAX_BODY_BYTES, body_s: float = BODY_S) -> FastAPI:
    """
    Args:
        key: what clients have to send; None: nobody is asked for one.
    """
    guards = Middleware(Guards, key=key, refused=desk.metrics.refuse, max_body_bytes=max_body_bytes, body_s=body_s)
    app = FastAPI(title="crossdock", version=desk.version, middleware=[guards], redirect_slashes=False)
    errors.install(app)
    started = int(time.time())

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive, whatever its ranks do."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are answered at once: the model is loaded and verified, and no rank is being replaced."""
        state = desk.service.state
        if state == "ready" and not desk.scheduler.draining:
            return JSONResponse({"status": "ready", "model": desk.defaults.name})
        named = "shutting_down" if desk.scheduler.draining else state
        content = {"status": named, **ApiError(503, f"not ready: {named}", code=named).content()}
        return JSONResponse(content, 503, {"Retry-After": "5"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": desk.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model() -> dict[str, Any]:
        row = {"id": desk.defaults.name, "object": "model", "created": started, "owned_by": "crossdock"}
        return row | desk.about()

    @app.get("/v1/status")
    async def status() -> dict[str, Any]:
        """What the ranks hold, and do."""
        scheduler = desk.scheduler
        counts = {"state": desk.service.state, "running": scheduler.running, "waiting": scheduler.waiting}
        return counts | {"ranks": desk.service.ranks()}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != desk.defaults.name:
            raise ApiError(404, f"{name!r:.80} is not served here", param="model", code="model_not_found")
        return model()

    app.include_router(images.routes(desk))
    app.include_router(videos.routes(desk))
    return app
