"""Several replicas of a model, each an actor of Ray Serve with ranks of its own in a placement group of their own.

Ray places the replicas, chooses an idle one for each batch, and replaces those that die. What is asked, queued and kept
is in this process alone; when it goes, the replicas go.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from torch import Tensor

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Notify, Preview, Progress
from crossdock.launch.gangs.ranks.reachable import GIVEN_UP, within
from crossdock.launch.gangs.ray.cluster import connect
from crossdock.launch.gangs.ray.gang import RayGang
from crossdock.launch.hub.locate import fetch_here
from crossdock.launch.serve.scheduler import DrainingError
from crossdock.launch.serve.service import Service, State
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CrossdockError, EngineClosedError, LaunchError, RequestCancelled
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import GenerateRequest

NAMESPACE = "crossdock"
LOOK_S = 1.0
"""Between two looks at the replicas."""
ANSWER_S = 15.0
"""For a look: Ray waits without a limit for a cluster that is gone."""
GONE_S = 45.0
"""Replicas that nobody has seen for so long are given up. After 60 s without its cluster Ray ends the process."""
HEALTH_S = 2.0
"""Between two questions whether a replica is well."""
CLOSE_S = 20.0

Hear = Callable[[str, Mapping[int, RankStatus] | None], None]


@dataclass(frozen=True)
class Step:
    """Of a request that a replica runs: how far it is, and what was heard of the ranks."""

    replica: str
    progress: tuple[int, int]
    done: int
    total: int
    statuses: Mapping[int, RankStatus]


@dataclass(frozen=True)
class Latents:
    """Of a step that is done."""

    step: int
    latents: Tensor


class Front:
    """Lives as long as the process that has the queue: an actor that Ray ends with its owner."""


class Replica:
    """The engine, in an actor of Ray Serve. It takes one request at a time."""

    def __init__(self, config: RunConfig, model_dir: str, app: str) -> None:
        self._app = app
        self._name = serve.get_replica_context().replica_id.unique_id
        fetch_here(self, directory := Path(model_dir), config.single_files)
        self._engine = Engine.start(config, directory, make_gang=RayGang, rehearse=True)

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here. One whose front has gone takes all of them down."""
        if self._engine.closed:
            raise EngineClosedError("its ranks are gone")
        await asyncio.to_thread(self._look_for_the_front)

    def _look_for_the_front(self) -> None:
        try:
            ray.get_actor(self._app, NAMESPACE)
        except ValueError:
            serve.delete(self._app, _blocking=False)

    async def generate(self, request: GenerateRequest, previewed: bool) -> AsyncIterator[Any]:
        """Each `Step`, `Latents` if they are wanted, and the `Generation`. Whoever stops listening cancels."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def tell(told: object) -> None:
            loop.call_soon_threadsafe(news.put_nowait, told)

        def end_step(done: int, total: int) -> None:
            tell(Step(self._name, run.progress, done, total, self._engine.statuses))

        def show(step: int, latents: Tensor) -> None:
            tell(Latents(step, latents))

        run = self._engine.submit(request, end_step, show if previewed else None)
        ended = asyncio.ensure_future(asyncio.to_thread(run.result))
        ended.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (told := await news.get()) is not None:
                yield told
            made = await ended
            yield replace(made, report={**made.report, "replica": self._name})
        finally:
            if not run.done:
                loop.run_in_executor(None, run.cancel, "nobody waits for it")
            if self._engine.closed:  # the next request would fail here at once, again and again
                os._exit(1)


class Replicas(Service):
    """
    Args:
        count: how many replicas.
        most: pictures that a replica computes at once, at most.

    Raises:
        LaunchError: the cluster is not reached.
    """

    def __init__(self, plan: RunPlan, count: int, most: int, notify: Notify) -> None:
        super().__init__(plan, most)
        self.lanes = count
        self._notify = notify
        self._app = f"crossdock-{uuid.uuid4().hex[:12]}"
        self._handle: Any = None
        self._running = 0  # replicas that are well
        self._gone = False  # nothing of Ray answers
        self._working: dict[str, Mapping[int, RankStatus]] = {}
        self._names: dict[str, str] = {}  # by Ray's name
        self._changed = threading.Condition()
        self._is_local = plan.config.launch.ray_address is None
        self._owns_ray = connect(plan.config.launch, plan.config.world_size * count)
        self._front = ray.remote(Front).options(name=self._app, namespace=NAMESPACE, num_cpus=0).remote()
        self._thread = threading.Thread(target=self._keep, name="crossdock replicas", daemon=True)
        self._thread.start()

    def _state(self) -> State:
        if self._handle is None:
            return "starting"
        return "ready" if self._running else "recovering"

    def statuses(self) -> Mapping[str, Mapping[int, RankStatus]]:
        return dict(self._working)

    def begin(self, request: GenerateRequest, progress: Progress, preview: Preview | None) -> RemoteRun:
        with self._changed:
            self._changed.wait_for(lambda: self._handle or self.failed or self._ended.is_set())
            if self.failed or self._ended.is_set():
                raise DrainingError
        answers = self._handle.options(stream=True).generate.remote(self.batched(request), preview is not None)
        return RemoteRun(answers, progress, preview, self._hear, lambda: self.failed)

    def learn_from(self, asked: GenerateRequest, made: Generation) -> None:
        report = {**made.report, "replica": self._number(made.report["replica"])}
        super().learn_from(asked, replace(made, report=report))

    def _hear(self, replica: str, statuses: Mapping[int, RankStatus] | None) -> None:
        if statuses is None:
            self._working.pop(self._number(replica), None)
        else:
            self._working[self._number(replica)] = statuses

    def _number(self, name: str) -> str:
        return self._names.setdefault(name, str(len(self._names)))

    def close(self, timeout_s: float = 60.0) -> None:
        self._ended.set()
        with self._changed:
            self._changed.notify_all()
        if self._handle is not None:
            self._thread.join(timeout_s)
        try:
            within(CLOSE_S, self._leave)
        except Exception as error:
            self._notify(f"not all replicas were heard to end: {error or type(error).__name__}")

    def _leave(self) -> None:
        """What others run on a cluster that was joined stays, and Ray Serve with it."""
        if not self._gone:
            with suppress(RayServeException):  # there was not even that
                serve.delete(self._app)
            ray.kill(self._front)
            if self._is_local:
                serve.shutdown()
        if self._owns_ray:
            ray.shutdown()

    def _keep(self) -> None:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            handle = self._deploy()
        except Exception as error:
            self._fail(f"the replicas did not come up: {error}")
            return
        with self._changed:
            self._handle = handle
            self._changed.notify_all()
        reason = watch(partial(_running, self._app), self._see, self._ended, self._notify)
        if reason is not None:
            self._gone = True
            self._fail(f"the replicas are gone: {reason}")

    def _see(self, running: int) -> None:
        self._running = running

    def _fail(self, message: str) -> None:
        if self._ended.is_set():
            return
        self._notify(message)
        with self._changed:
            self.failed = LaunchError(message)
            self._changed.notify_all()

    def _deploy(self) -> Any:
        """Returns when all replicas are well."""
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(Replica).options(
            num_replicas=self.lanes,
            max_ongoing_requests=1,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=HEALTH_S,
            graceful_shutdown_timeout_s=CLOSE_S,
            graceful_shutdown_wait_loop_s=0.2,
        )
        layout, config = self.plan.layout, self.plan.config
        config = config.model_copy(update={"launch": config.launch.model_copy(update={"device": layout.device})})
        replicas = deployment.bind(config, str(layout.model_dir.resolve()), self._app)
        handle = serve.run(replicas, name=self._app, route_prefix=None)
        self._running = self.lanes
        return handle


def watch(look: Callable[[], int], see: Callable[[int], None], ended: threading.Event, notify: Notify) -> str | None:
    """Look how many replicas are well until `ended`. A look that fails sees none, and is tried again.

    Returns:
        Why the last one failed, when all did for `GONE_S`.
    """
    last, failing = time.monotonic(), False
    while not ended.wait(LOOK_S):
        try:
            see(within(ANSWER_S, look))
            last, failing = time.monotonic(), False
        except (Exception, SystemExit) as error:  # Ray exits when its own patience is over
            see(0)
            reason = str(error) or type(error).__name__
            if time.monotonic() - last > GONE_S:
                return reason
            if not failing:
                notify(f"the replicas are not seen ({reason}); looking again")
            failing = True
    return None


def _running(app: str) -> int:
    there = serve.status().applications
    if app not in there:
        raise LookupError("Ray Serve does not know of them")
    return sum(deployment.replica_states.get("RUNNING", 0) for deployment in there[app].deployments.values())


class RemoteRun:
    """A request that a replica runs; it is followed while somebody waits for its result.

    Args:
        hear: gets the replica's name, and what was heard of its ranks; None: they do not work any more.
        gone: says why nothing comes any more, if so.
    """

    def __init__(
        self,
        answers: Any,
        progress: Progress,
        preview: Preview | None,
        hear: Hear,
        gone: Callable[[], Exception | None] = lambda: None,
    ) -> None:
        self.progress = (0, 0)
        self._gone = gone
        self._answers, self._progress, self._preview, self._hear = answers, progress, preview, hear
        self._replica: str | None = None
        self._reason: str | None = None

    def cancel(self, reason: str = "cancelled") -> None:
        self._reason = self._reason or reason
        self._answers.cancel()

    def result(self) -> Generation:
        """
        Raises:
            RequestCancelled: `cancel` was called.
            EngineClosedError: the replica has died, or all are gone.
            CrossdockError: what the replica's engine raised.
        """
        outcome: Future[Generation] = Future()
        threading.Thread(target=self._follow, args=[outcome], name=GIVEN_UP, daemon=True).start()
        while not wait([outcome], LOOK_S).done:
            if (reason := self._gone()) is not None:
                raise EngineClosedError(str(reason))
        return outcome.result()

    def _follow(self, outcome: Future[Generation]) -> None:
        try:
            outcome.set_result(self._told())
        except BaseException as error:
            outcome.set_exception(error)

    def _told(self) -> Generation:
        try:
            for told in self._answers:
                match told:
                    case Step():
                        self.progress, self._replica = told.progress, told.replica
                        self._hear(told.replica, told.statuses)
                        self._progress(told.done, told.total)
                    case Latents() if self._preview is not None:
                        self._preview(told.step, told.latents)
                    case Generation():
                        return told
        except Exception as error:
            if self._reason is not None:
                raise RequestCancelled(self._reason, self.progress[0]) from None
            cause = getattr(error, "cause", None)
            if isinstance(cause, CrossdockError):
                raise cause from None
            raise EngineClosedError(f"its replica is gone ({type(error).__name__})") from error
        finally:
            if self._replica is not None:
                self._hear(self._replica, None)
        raise EngineClosedError("its replica is gone")
