"""What dashboards read, with the suffixes that vLLM's have."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from crossdock.launch.engine.generation import Generation
from crossdock.launch.serve.scheduler import Scheduler, Work
from crossdock.launch.serve.service import Service
from crossdock.runtime.errors import RequestCancelled

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """Of one server; `watch` says of whom."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.finished = Counter("crossdock:request_success", "Requests that were answered", registry=registry)
        self.failed = Counter("crossdock:request_failure", "Requests that failed", ["reason"], registry=registry)
        self.cancelled = Counter("crossdock:request_cancelled", "Requests that were stopped", registry=registry)
        self.pictures = Counter("crossdock:pictures", "Pictures and videos that were made", registry=registry)
        self.steps = Counter("crossdock:denoise_steps", "Denoise steps of answered requests", registry=registry)
        self.refused = Counter(
            "crossdock:request_refused", "Requests that were not taken", ["status"], registry=registry
        )
        self.lost = Counter("crossdock:ranks_lost", "Ranks that failed and were replaced", ["kind"], registry=registry)
        self.latency = self._histogram("crossdock:e2e_request_latency_seconds", "From arrival to answer")
        self.queued = self._histogram("crossdock:request_queue_time_seconds", "From arrival to the first step")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

    def ended(self, work: Work, latency_s: float) -> None:
        error = work.outcome.exception()
        self.latency.observe(latency_s)
        self.queued.observe(work.queued_s)
        if error is None:
            self.finished.inc()
            self.pictures.inc(len(work.request.items))
            self.steps.inc(work.request.steps)
        elif isinstance(error, RequestCancelled):
            self.cancelled.inc()
        else:
            self.failed.labels(type(error).__name__).inc()

    def learn_from(self, made: Generation) -> None:
        for fault in made.report["faults"]:
            self.lost.labels(fault["kind"]).inc()

    def refuse(self, status: int) -> None:
        self.refused.labels(str(status)).inc()

    def watch(self, scheduler: Scheduler, service: Service) -> None:
        self.registry.register(_Now(scheduler, service))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """What is read when somebody looks."""

    def __init__(self, scheduler: Scheduler, service: Service) -> None:
        self._scheduler, self._service = scheduler, service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("crossdock:num_requests_running", "Share the running batch", self._scheduler.running)
        yield GaugeMetricFamily("crossdock:num_requests_waiting", "Wait in the queue", self._scheduler.waiting)
        yield GaugeMetricFamily("crossdock:ready", "1: requests are answered", float(self._service.state == "ready"))
        held = GaugeMetricFamily("crossdock:device_bytes", "Per rank, at its peak", labels=["replica", "rank", "part"])
        for row in self._service.ranks():
            for part in ("weight", "slot", "shard", "device"):
                held.add_metric([row["replica"], str(row["rank"]), part], row[f"{part}_bytes"] or 0)
        yield held
