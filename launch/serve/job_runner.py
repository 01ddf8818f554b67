"""Lets the queue work on video jobs, and those on that another server left behind."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crossdock.launch.serve.jobs import Job, JobStore
from crossdock.launch.serve.scheduler import DrainingError, QueueFullError, Scheduler, Work
from crossdock.runtime.errors import CrossdockError, RequestCancelled, RequestError
from crossdock.runtime.reports.media import Media, Video
from crossdock.runtime.request import GenerateRequest

LOG = logging.getLogger("crossdock.serve")
_DELETED = "the job was deleted"


class JobRunner:
    """
    Args:
        keep_s: how long a job stays after its end.
        write: writes a video to a file.
    """

    def __init__(
        self, store: JobStore, scheduler: Scheduler, keep_s: float, write: Callable[[Video, Path], None]
    ) -> None:
        self.store = store
        self._scheduler, self._keep_s, self._write = scheduler, keep_s, write
        self._works: dict[str, Work] = {}
        self._lock = threading.Lock()
        self._writers = ThreadPoolExecutor(1, "crossdock videos")
        left = [(job, Work(job.request)) for job in store.unfinished()]
        for job, work in left:
            self._follow(job, work)
        scheduler.put_back([work for _, work in left])

    def create(self, request: GenerateRequest, fps: int) -> Job:
        """
        Raises:
            QueueFullError, DrainingError: and there is no such job.
            sqlite3.Error: nothing can be written.
        """
        self.store.expire()
        job = self.store.add(request, fps)
        try:
            work = self._scheduler.submit(Work(request))
        except (QueueFullError, DrainingError):
            self.store.delete(job.id)
            raise
        self._follow(job, work)
        return job

    def work(self, job: Job) -> Work | None:
        """Of one that is not done."""
        with self._lock:
            return self._works.get(job.id)

    def delete(self, job: Job) -> None:
        """Stop it, if it runs, and forget it."""
        self.store.delete(job.id)
        if (work := self.work(job)) is not None:
            self._scheduler.cancel(work, _DELETED)

    def close(self) -> None:
        """What has been made is written; what has not stays queued, for the next server."""
        self._writers.shutdown(wait=True)
        self.store.close()

    def _follow(self, job: Job, work: Work) -> None:
        with self._lock:
            self._works[job.id] = work
        work.outcome.add_done_callback(lambda _: self._writers.submit(self._finish, job, work))

    def _finish(self, job: Job, work: Work) -> None:
        try:
            error = work.outcome.exception()
            if error is None:
                self._keep(job, work.outcome.result()[0])
            elif not isinstance(error, (RequestCancelled, DrainingError)):  # the next server goes on with it
                self._fail(job, error)
        except (OSError, sqlite3.Error) as full:
            LOG.error("%s: %s", job.id, full)
            self._fail(job, full)
        finally:
            with self._lock:
                self._works.pop(job.id, None)

    def _keep(self, job: Job, made: Media) -> None:
        assert isinstance(made, Video)
        self.store.complete(job.id, self._keep_s, lambda path: self._write(made, path))

    def _fail(self, job: Job, error: BaseException) -> None:
        match error:
            case RequestError():
                code, message = "invalid_request", str(error)
            case OSError() | sqlite3.Error():
                code, message = "storage", "the video could not be stored: is the server's disk full?"
            case CrossdockError():
                code, message = type(error).__name__, "the server could not make it; its log says why"
            case _:
                code, message = "server_error", "the server could not make it; its log says why"
        try:
            self.store.fail(job.id, self._keep_s, code, message)
        except sqlite3.Error as full:  # it stays unfinished: the next server tries again
            LOG.error("%s: cannot be noted as failed: %s", job.id, full)
