"""Ray: one actor per rank, in a placement group. The only module that imports ray.

Environment: ranks get their place as arguments; rendezvous variables of whoever started the driver are dropped.
Every wait has a time limit, and nothing outlives `close`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from crossdock.runtime.config import LaunchConfig
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError
from crossdock.runtime.worker import RankWorker, compute_threads

T = TypeVar("T")

_RENDEZVOUS_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_POLL_S = 0.1
_OBJECT_STORE_BYTES = 256 * 2**20
"""Results and plans only travel through Ray; weights never do."""


class _RankActor:
    """Hosts one `RankWorker`; `watch` methods answer while a call is running."""

    def __init__(self, rank: int, world_size: int, device: str) -> None:
        for name in _RENDEZVOUS_VARIABLES:
            os.environ.pop(name, None)
        self._worker = RankWorker(rank, world_size, torch.device("cuda:0" if device == "cuda" else "cpu"))
        self._store: TCPStore | None = None

    def open_store(self, port: int) -> tuple[str, int]:
        """Rank 0: the rendezvous, on `port`, or on a free one that the system picks."""
        host = ray.util.get_node_ip_address()
        try:
            self._store = TCPStore(host, port, self._worker.world_size, is_master=True, wait_for_workers=False)
        except (RuntimeError, OSError) as error:
            raise LaunchError(
                f"port {port} on {host} cannot be used for the rendezvous ({error}); free it, or use port: 0",
                "launch.port",
            ) from None
        return host, self._store.port

    def join(self, host: str, port: int, timeout_s: float, collective_s: float) -> None:
        store = self._store or TCPStore(
            host, port, self._worker.world_size, is_master=False, timeout=timedelta(seconds=timeout_s)
        )
        self._worker.join(store, collective_s)

    def call(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return work(self._worker, *args)
        except CrossdockError:
            raise
        except Exception as error:
            detail = "".join(traceback.format_exception(error)).rstrip()
            raise RankError(self._worker.rank, f"{type(error).__name__}: {error}\n{detail}") from None

    def leave(self) -> None:
        self._worker.leave()

    def finished_steps(self) -> int:
        return self._worker.finished_steps


class RayGang:
    """A gang of Ray actors. Starts a local Ray, or joins the cluster that `launch.ray_address` names."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        self._device = device
        self._owns_ray = False
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []

    def start(self) -> None:
        deadline = time.monotonic() + self._config.timeouts.launch_s
        try:
            self._connect()
            self._place(deadline)
            host, port = self._await([self._actors[0].open_store.remote(self._config.port)], deadline)[0]
            limits = (self._config.timeouts.launch_s, self._config.timeouts.collective_s)
            self._await([actor.join.remote(host, port, *limits) for actor in self._actors], deadline)
        except BaseException:
            self.close()
            raise

    def call(
        self,
        work: Callable[..., T],
        *args: Any,
        timeout_s: float,
        watch: Callable[[int], None] | None = None,
    ) -> list[T]:
        if not self._actors:
            raise RankError(0, "this gang is closed; start a new engine")
        progress = _Progress(self._actors[0], watch) if watch else None
        shared = ray.put(args)
        futures = [actor.call.remote(work, shared) for actor in self._actors]
        results = self._await(futures, time.monotonic() + timeout_s, progress)
        if progress is not None:
            progress.poll(patience_s=_POLL_S)  # the steps since the last question
        return results

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        self._actors = []
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
            self._group = None
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    # -- starting ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Join a cluster, use the Ray that runs in this process, or start a local one."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if ray.is_initialized():
            return
        with _own_signal_handlers():
            self._init_ray(quiet)
        self._owns_ray = True

    def _init_ray(self, quiet: dict[str, Any]) -> None:
        if self._config.ray_address is not None:
            try:
                ray.init(address=self._config.ray_address, **quiet)
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                raise LaunchError(
                    f"no Ray cluster answers at {self._config.ray_address} ({error}); start one, or leave the key out",
                    "launch.ray_address",
                ) from None
        else:
            cpus = max(os.cpu_count() or 1, int(self.world_size * self._config.cpus_per_rank + 1))
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )

    def _place(self, deadline: float) -> None:
        need = {"CPU": self._config.cpus_per_rank} | ({"GPU": 1.0} if self._device == "cuda" else {})
        self._check_resources(need)
        self._group = placement_group([need] * self.world_size, strategy="PACK")
        if not self._group.wait(max(deadline - time.monotonic(), 0.0)):
            raise LaunchError(
                f"the cluster did not give {self.world_size} x {need} within {self._config.timeouts.launch_s:g} s; "
                "end what uses it, or raise launch.timeouts.launch_s"
            )
        remote = ray.remote(concurrency_groups={"watch": 1})(_watchable(_RankActor))
        threads = compute_threads(self.world_size)
        for rank in range(self.world_size):
            options: dict[str, Any] = {
                "num_cpus": need["CPU"],
                "num_gpus": need.get("GPU", 0),
                "max_restarts": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            }
            if self._device == "cpu":  # OpenMP reads it when a thread starts; torch.set_num_threads comes too late
                options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
            self._actors.append(remote.options(**options).remote(rank, self.world_size, self._device))

    def _check_resources(self, need: dict[str, float]) -> None:
        there = ray.cluster_resources()
        for name, amount in need.items():
            wanted = amount * self.world_size
            if there.get(name, 0.0) < wanted:
                key = "launch.device" if name == "GPU" else "launch.cpus_per_rank"
                raise LaunchError(
                    f"{self.world_size} ranks need {wanted:g} {name}s, but Ray has {there.get(name, 0.0):g}; "
                    "lower the degrees, or join a larger cluster",
                    key,
                )

    # -- waiting -------------------------------------------------------------------------------------------------

    def _await(self, futures: Sequence[Any], deadline: float, progress: _Progress | None = None) -> list[Any]:
        """All results; the first failure ends the wait, for the other ranks may hang in a collective."""
        results: dict[int, Any] = {}
        pending = {future: rank for rank, future in enumerate(futures)}
        while pending:
            if time.monotonic() > deadline:
                raise RankError(min(pending.values()), "did not answer in time; see launch.timeouts")
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)
            for future in done:
                rank = pending.pop(future)
                results[rank] = _result_of(future, rank)
            if progress is not None:
                progress.poll()
        return [results[rank] for rank in range(len(futures))]


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray puts its own handlers in place; a SIGTERM would then end the driver without closing the gang."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class _Progress:
    """Asks rank 0 for its finished steps, one question at a time."""

    def __init__(self, actor: Any, watch: Callable[[int], None]) -> None:
        self._actor = actor
        self._watch = watch
        self._before = ray.get(actor.finished_steps.remote(), timeout=60)
        self._seen = self._before
        self._question: Any = None

    def poll(self, patience_s: float = 0) -> None:
        if self._question is None:
            self._question = self._actor.finished_steps.remote()
        if ray.wait([self._question], timeout=patience_s)[0]:
            finished = ray.get(self._question, timeout=60)
            self._question = None
            for step in range(self._seen + 1, finished + 1):  # more than one may have finished since the last question
                self._watch(step - self._before)
            self._seen = finished


def _watchable(actor: type[_RankActor]) -> type[_RankActor]:
    return type("RankActor", (actor,), {"finished_steps": ray.method(concurrency_group="watch")(actor.finished_steps)})


def _result_of(future: Any, rank: int) -> Any:
    try:
        return ray.get(future, timeout=60)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CrossdockError):
            raise cause from None
        raise RankError(rank, f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RankError(rank, f"its process died: {lines[0]} {lines[-1] if len(lines) > 1 else ''}") from None
    except ray.exceptions.GetTimeoutError:
        raise RankError(rank, "its result did not arrive within 60 s") from None
