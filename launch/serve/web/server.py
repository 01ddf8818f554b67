"""`crossdock serve`: the engine, the queue and the web, brought up in that order and down in the other."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import uvicorn

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Notify
from crossdock.launch.gangs.choose import choose_device
from crossdock.launch.serve.job_runner import JobRunner
from crossdock.launch.serve.jobs import JobStore
from crossdock.launch.serve.metrics import Metrics
from crossdock.launch.serve.previews import Previews
from crossdock.launch.serve.scheduler import Scheduler, Work
from crossdock.launch.serve.service import OwnEngine, Service
from crossdock.launch.serve.web.app import build_app
from crossdock.launch.serve.web.desk import Desk
from crossdock.launch.serve.web.schemas import Defaults
from crossdock.launch.video_file import write_video
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import LaunchError, RequestError
from crossdock.runtime.models.checkpoint import read_model_index
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import check_request
from crossdock.runtime.request import GenerateRequest

KEY_VARIABLE = "CROSSDOCK_API_KEY"
CLOSE_S = 60.0
BACKLOG = 2048


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; see its help."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    insecure: bool = False
    name: str | None = None
    queue: int = 64
    batch_wait_ms: float = 0.0
    max_batch: int = 4
    drain_s: float = 60.0
    size: str | None = None
    steps: int | None = None
    max_pixels: int = 2048 * 2048
    data: Path | None = None
    keep_h: float = 24.0
    replicas: int = 1
    log_prompts: bool = False


def read_key(options: ServeOptions) -> str | None:
    """The API key: of the file, or of the environment. Never of an argument, which all users of a machine can see.

    Raises:
        LaunchError: there is none, and the server would be open to others; or the file has none.
    """
    key = os.environ.get(KEY_VARIABLE)
    if options.api_key_file is not None:
        try:
            key = options.api_key_file.read_text(encoding="utf-8")[:4096]
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(f"--api-key-file {options.api_key_file}: cannot be read: {error}") from None
    if key is not None and not key.strip():
        raise LaunchError("the API key is empty: write one into the file, or leave it out")
    if key is None and not options.insecure and not _is_loopback(options.host):
        raise LaunchError(
            f"--host {options.host}: others can reach it: give --api-key-file or {KEY_VARIABLE}, or say --insecure"
        )
    return None if key is None else key.strip()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(options: ServeOptions) -> socket.socket:
    """The listening socket, before the model is loaded: a taken port shows at once, and clients may connect.

    Raises:
        LaunchError: the address is taken, or is none of this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise LaunchError(f"cannot listen on {options.host}:{options.port}: {error}; choose another --port") from None
    return listener


def serve(
    config: RunConfig, model_dir: Path, start: Callable[[Notify], Engine], options: ServeOptions, notify: Notify
) -> None:
    """Serve until SIGTERM or Ctrl-C; the second one does not wait for what is under way.

    Raises:
        UserError: the input is wrong; an engine that does not come up for that reason, too.
    """
    plan = make_plan(config, model_dir, choose_device(config))
    key, defaults = read_key(options), defaults_of(plan, options, model_dir)
    listener = listen(options)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
    store = None if defaults.fps is None else JobStore(options.data or data_folder(defaults.name))
    service = _service(plan, start, options, notify)
    metrics, previews = Metrics(), Previews()
    scheduler = queue_for(service, metrics, previews, options.queue, options.batch_wait_ms / 1e3)
    jobs = None if store is None else JobRunner(store, scheduler, options.keep_h * 3600, write_video)
    desk = Desk(service, scheduler, defaults, metrics, version("crossdock"), previews, jobs, options.log_prompts)
    app = build_app(desk, key)
    web = uvicorn.Server(
        uvicorn.Config(app, backlog=BACKLOG, log_config=None, access_log=False, timeout_keep_alive=30, lifespan="off")
    )
    stop = _Stop(web, scheduler, service, options.drain_s, notify)
    try:
        signal.signal(signal.SIGTERM, stop.signalled)
        signal.signal(signal.SIGINT, stop.signalled)
        stop.watch()
        host, port = listener.getsockname()[:2]
        notify(f"{defaults.name}: listening on http://{host}:{port}; the model is being loaded")
        web.run(sockets=[listener])
    finally:
        scheduler.close(CLOSE_S)
        if jobs is not None:
            jobs.close()
        service.close(CLOSE_S)
        listener.close()
    if service.failed is not None:
        raise service.failed


def _service(plan: RunPlan, start: Callable[[Notify], Engine], options: ServeOptions, notify: Notify) -> Service:
    if options.replicas == 1:
        return OwnEngine(plan, start, options.max_batch, notify)
    from crossdock.launch.serve.replicas import Replicas  # imports Ray Serve

    return Replicas(plan, options.replicas, options.max_batch, notify)


def queue_for(service: Service, metrics: Metrics, previews: Previews, limit: int, wait_s: float) -> Scheduler:
    """The queue before `service`; all three learn from what is made."""

    def ended(work: Work) -> None:
        metrics.ended(work, time.monotonic() - work.arrived)

    def learn_from(asked: GenerateRequest, made: Generation) -> None:
        service.learn_from(asked, made)
        metrics.learn_from(made)
        previews.learn_from(made)

    scheduler = Scheduler(service.begin, service.fits, limit, wait_s, ended, learn_from, service.lanes)
    metrics.watch(scheduler, service)
    return scheduler


def data_folder(name: str) -> Path:
    """Where jobs are kept if nobody says (XDG Base Directory Specification)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "crossdock" / re.sub(r"[^\w.-]", "_", name).lstrip(".")


class _Stop:
    """The way out: drain, then stop."""

    def __init__(
        self, web: uvicorn.Server, scheduler: Scheduler, service: Service, drain_s: float, notify: Notify
    ) -> None:
        self._web, self._scheduler, self._service = web, scheduler, service
        self._drain_s, self._notify = drain_s, notify
        self._asked = threading.Event()
        self._at_once = threading.Event()
        web.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    def signalled(self, number: int, frame: FrameType | None) -> None:
        (self._at_once if self._asked.is_set() else self._asked).set()

    def watch(self) -> None:
        threading.Thread(target=self._run, name="crossdock drain", daemon=True).start()

    def _run(self) -> None:
        while not self._asked.wait(0.2):
            if self._service.failed is not None:
                break
        self._scheduler.drain()
        if self._service.failed is None:
            self._notify(f"shutting down: what waits is answered first, for {self._drain_s:g} s at most")
            until = time.monotonic() + self._drain_s
            while time.monotonic() < until and not self._at_once.is_set() and not self._scheduler.wait_idle(0.2):
                pass
        self._web.should_exit = True


def defaults_of(plan: RunPlan, options: ServeOptions, model_dir: Path) -> Defaults:
    """What is done where a client does not say.

    Raises:
        RequestError: `--size` or `--steps` is nothing that the model can do.
    """
    width, height = plan.layout.spec.size
    if options.size is not None:
        if (found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", options.size)) is None:
            raise RequestError(f"--size: found {options.size!r}; allowed: WIDTHxHEIGHT, such as {width}x{height}")
        width, height = int(found[1]), int(found[2])
    multiple = plan.layout.pixel_multiple
    if options.size is None:
        width, height = width // multiple * multiple, height // multiple * multiple
    usual = Defaults(
        name=options.name or model_dir.resolve().name,
        width=width,
        height=height,
        steps=options.steps or plan.layout.spec.steps,
        fps=plan.layout.spec.fps_of(read_model_index(model_dir)),
        max_pixels=options.max_pixels,
    )
    check_request(plan, GenerateRequest.of("-", height=height, width=width, steps=usual.steps))
    return usual
