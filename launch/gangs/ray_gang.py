"""Ray: one actor per rank, in a placement group. The only module that imports ray.

Environment: ranks get their place as arguments; rendezvous variables of whoever started the driver are dropped.
Every wait has a time limit, and nothing outlives `close`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from crossdock.launch.gangs.process_state import process_state
from crossdock.launch.gangs.reachable import check_reachable, not_reached, within
from crossdock.launch.gangs.rendezvous import LOOPBACK, open_store
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError, RequestCancelled
from crossdock.runtime.rank.weights.load import node_id
from crossdock.runtime.rank.worker import RankWorker, compute_threads
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.faults import first_cause, is_conclusive, rank_error
from crossdock.runtime.watch.gang import Notice
from crossdock.runtime.watch.watch import Watch, different_collective

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
_ASK_EVERY_S = 0.25
_SUSPECT_S = 1.5
"""A rank that has not answered for so long is looked at: is its process stopped?"""
_SILENT_S = 120.0
"""A rank that has not answered for so long is given up, although its process seems to run."""
_EXPLAIN_S = 3.0
"""How long after a rank was cut off another one may take to show that it is the cause."""
_OBJECT_STORE_BYTES = 256 * 2**20
"""Results and plans only travel through Ray; weights never do."""


class Place(NamedTuple):
    """Where a rank runs; ranks of one `node` are on one machine."""

    host: str
    pid: int
    node: str


class _RankActor:
    """Hosts one `RankWorker`; `watch` methods answer while a call is running."""

    def __init__(self, rank: int, world_size: int, device: str) -> None:
        for name in _RENDEZVOUS_VARIABLES:
            os.environ.pop(name, None)
        self._worker = RankWorker(rank, world_size, torch.device("cuda:0" if device == "cuda" else "cpu"))
        self._store: TCPStore | None = None

    def open_store(self, port: int, one_machine: bool) -> tuple[str, int]:
        """Rank 0: the rendezvous, on `port`, or on a free one that the system picks."""
        host = LOOPBACK if one_machine else ray.util.get_node_ip_address()
        self._store = open_store(host, port, self._worker.world_size)
        return host, self._store.port

    def where(self) -> Place:
        return Place(socket.gethostname(), os.getpid(), node_id())

    def join(self, host: str, port: int, timeout_s: float, collective_s: float, one_machine: bool) -> None:
        """Meet the others."""
        worker = self._worker
        try:
            store = self._store or TCPStore(
                host, port, worker.world_size, is_master=False, timeout=timedelta(seconds=timeout_s)
            )
            worker.join(store, collective_s, one_machine)
        except (RuntimeError, OSError) as error:
            raise RankError(worker.rank, f"could not meet the others: {error}", "cut off") from None

    def collective_rpc(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return work(self._worker, *args)
        except Exception as error:
            raise rank_error(self._worker.status(), error) from None

    def rpc(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return work(self._worker, *args)

    def status(self) -> RankStatus:
        return self._worker.status()

    def sees_stopped(self, pid: int) -> bool:
        return process_state(pid) == "stopped"


class RayGang:
    """A gang of Ray actors. Starts a local Ray, or joins the cluster that `launch.ray_address` names."""

    def __init__(self, config: LaunchConfig, world_size: int, device: str) -> None:
        self.world_size = world_size
        self._config = config
        self._device = device
        self._owns_ray = False
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._places: list[Place] = []  # of every rank

    can_restart = True
    own_rank = None

    def start(self) -> None:
        self._connect()
        self.restart()

    def restart(self) -> None:
        self._end_actors()
        deadline = time.monotonic() + self._config.timeouts.launch_s
        try:
            self._connect()
            self._place(deadline)
            self._places = self._await([actor.where.remote() for actor in self._actors], deadline)
            self._meet(deadline)
        except RankError:  # may be tried again, in the same Ray
            self._end_actors()
            raise
        except BaseException:
            self.close()
            raise

    def collective_rpc(
        self, work: Callable[..., T], *args: Any, timeout_s: float, notice: Notice | None = None
    ) -> list[T]:
        if not self._actors:
            raise RankError(0, "this gang is closed; start a new engine", "died")
        shared = ray.put(args)
        futures = [actor.collective_rpc.remote(work, shared) for actor in self._actors]
        return self._await(futures, time.monotonic() + timeout_s, _Watcher(self._actors, self._places, notice))

    def rpc(self, rank: int, work: Callable[..., T], *args: Any, timeout_s: float) -> T:
        try:
            result: T = ray.get(self._actors[rank].rpc.remote(work, args), timeout=timeout_s)
        except (ray.exceptions.RayError, IndexError) as error:
            raise RankError(rank, f"does not answer ({type(error).__name__})", "silent") from None
        return result

    def close(self) -> None:
        self._end_actors()
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    def _end_actors(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        for host, pid, _ in self._places:
            if host == socket.gethostname() and process_state(pid) == "stopped":  # it does not hear Ray's request
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self._actors, self._places = [], []
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
            self._group = None

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
        if (address := self._config.ray_address) is not None:
            deadline = time.monotonic() + self._config.timeouts.launch_s
            check_reachable(address, self._config.timeouts.launch_s)
            try:
                within(deadline - time.monotonic(), partial(ray.init, address=address, **quiet))
            except KeyboardInterrupt:
                raise
            except (Exception, SystemExit) as error:  # Ray exits when its own patience is over
                raise not_reached(address, str(error) if isinstance(error, Exception) else "no answer") from None
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

    def _meet(self, deadline: float) -> None:
        """Let the ranks find each other; they are watched from here on."""
        one_machine = len({place.node for place in self._places}) == 1
        opened = [self._actors[0].open_store.remote(self._config.port, one_machine)]
        host, port = self._await(opened, deadline, _Watcher(self._actors, self._places, None))[0]
        limits = (self._config.timeouts.launch_s, self._config.timeouts.collective_s)
        met = [actor.join.remote(host, port, *limits, one_machine) for actor in self._actors]
        self._await(met, deadline, _Watcher(self._actors, self._places, None))

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

    def _await(self, futures: Sequence[Any], deadline: float, watcher: _Watcher | None = None) -> list[Any]:
        """All results. The first failure that explains itself ends the wait: others may hang in a collective."""
        results: dict[int, Any] = {}
        errors: dict[int, CrossdockError] = {}
        pending = {future: rank for rank, future in enumerate(futures)}
        while pending and not any(map(is_conclusive, errors.values())) and time.monotonic() < deadline:
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=_POLL_S)
            for future in done:
                rank = pending.pop(future)
                try:
                    results[rank] = _result_of(future, rank)
                except CrossdockError as error:
                    errors[rank] = error
                    deadline = min(deadline, time.monotonic() + _EXPLAIN_S)
                else:
                    if watcher is not None:
                        watcher.end(rank)
            if watcher is not None and pending:
                watcher.poll()
                if not errors and (fault := watcher.fault()) is not None:
                    errors[fault.rank] = fault
        if pending and all(isinstance(error, RequestCancelled) for error in errors.values()):
            late = min(pending.values())
            errors = {late: RankError(late, "was not done in time; see launch.timeouts", "late")}
        if errors:
            raise first_cause(errors) if watcher is None else watcher.explain(first_cause(errors))
        if watcher is not None:
            watcher.poll(patience_s=_POLL_S)  # the steps since the last question
        return [results[rank] for rank in range(len(futures))]


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray puts its own handlers in place; a SIGTERM would then end the driver without closing the gang."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class _Watcher:
    """Asks every rank what it is doing, one question at a time each."""

    def __init__(self, actors: Sequence[Any], places: Sequence[Place], notice: Notice | None) -> None:
        self.watch = Watch()
        self._actors = actors
        self._places = places
        self._notice = notice
        self._questions: dict[Any, int] = {}
        self._asked_at: dict[int, float] = {}
        self._over: set[int] = set()  # their results are in
        self._final: set[Any] = set()  # questions that were asked since
        self._next = 0.0

    def end(self, rank: int) -> None:
        """Its result is in; the watch is told when it has also been heard since."""
        self._over.add(rank)

    def poll(self, patience_s: float = 0) -> None:
        now = time.monotonic()
        if now >= self._next or patience_s:
            self._next = now + _ASK_EVERY_S
            for rank, actor in enumerate(self._actors):
                if rank not in self._questions.values():
                    question = actor.status.remote()
                    self._questions[question] = rank
                    self._asked_at[rank] = now
                    if rank in self._over:
                        self._final.add(question)
        done, _ = ray.wait(list(self._questions), num_returns=len(self._questions), timeout=patience_s)
        for question in done:
            rank = self._questions.pop(question)
            with contextlib.suppress(Exception):  # a dead rank's call says so
                self.watch.hear(ray.get(question, timeout=1))
                if question in self._final:
                    self.watch.end(rank)
        if done and self._notice is not None:
            self._notice(self.watch.statuses)

    def fault(self) -> RankError | None:
        """A rank that is stopped or silent, or what the collectives tell."""
        now = time.monotonic()
        for rank in self._questions.values():
            silent_s = now - self._asked_at[rank]
            if silent_s > _SUSPECT_S and self._is_stopped(rank):
                return RankError(rank, "its process {1} on {0} is stopped".format(*self._places[rank]), "stopped")
            if rank in self.watch.statuses and silent_s > _SILENT_S:
                return RankError(rank, f"has not answered for {silent_s:.0f} s", "silent")
        fault = self.watch.fault()
        return None if fault is None else RankError(fault.rank, fault.what, "collectives")

    def _is_stopped(self, rank: int) -> bool:
        """Looked up here, or by another rank of the same machine."""
        host, pid, _ = self._places[rank]
        if host == socket.gethostname():
            return process_state(pid) == "stopped"
        silent = set(self._questions.values())
        peers = [peer for peer, place in enumerate(self._places) if place.host == host and peer not in silent]
        try:
            return any(ray.get([self._actors[peer].sees_stopped.remote(pid) for peer in peers[:1]], timeout=1))
        except ray.exceptions.RayError:
            return False

    def explain(self, error: CrossdockError) -> CrossdockError:
        """With where the rank was, and what the others wait for."""
        if not isinstance(error, RankError) or error.kind == "collectives":
            return error
        with contextlib.suppress(Exception):
            for _ in range(2):  # the answers to open questions may be from before
                self.poll(patience_s=_ASK_EVERY_S)
        if error.kind == "cut off" and (fault := different_collective(self.watch.statuses)) is not None:
            return RankError(fault.rank, fault.what, "collectives")
        return self.watch.explain(error)


_BESIDE = ("status", "rpc", "sees_stopped")


def _watchable(actor: type[_RankActor]) -> type[_RankActor]:
    """Its questions are answered on another thread than its calls."""
    beside = {name: ray.method(concurrency_group="watch")(getattr(actor, name)) for name in _BESIDE}
    return type("RankActor", (actor,), beside)


def _result_of(future: Any, rank: int) -> Any:
    try:
        return ray.get(future, timeout=60)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CrossdockError):
            raise cause from None
        raise RankError(rank, f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError:
        raise RankError(rank, "its process died: killed, crashed, or out of host memory", "died") from None
    except ray.exceptions.GetTimeoutError:
        raise RankError(rank, "its result did not arrive within 60 s", "silent") from None
