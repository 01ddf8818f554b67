"""Ray: one actor per rank, in a placement group.

Environment: ranks get their place as arguments; rendezvous variables of whoever started the driver are dropped.
Every wait has a time limit, and nothing outlives `close`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from crossdock.launch.gangs.ranks.host import RankHost, import_classes
from crossdock.launch.gangs.ranks.process_state import process_state
from crossdock.launch.gangs.ranks.rendezvous import LOOPBACK
from crossdock.launch.gangs.ranks.watcher import Watcher, await_results
from crossdock.launch.gangs.ray.cluster import connect
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.config.threads import compute_threads
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError
from crossdock.runtime.rank.weights.kept_stores import ANSWER_S, KeptStores, StoreHolder
from crossdock.runtime.rank.weights.load import node_id
from crossdock.runtime.watch.gang import Notice

T = TypeVar("T")


class Place(NamedTuple):
    """Where a rank runs; ranks of one `node` are on one machine."""

    host: str
    pid: int
    node: str
    ray_node: str


class _RankActor(RankHost):
    """What Ray can ask beside what every rank answers."""

    def node_address(self) -> str:
        address: str = ray.util.get_node_ip_address()
        return address

    def where(self) -> Place:
        return Place(socket.gethostname(), os.getpid(), node_id(), ray.get_runtime_context().get_node_id())

    def import_classes(self, classes: Sequence[tuple[str, str]]) -> None:
        import_classes(classes)

    def keep_with(self, stores: Any) -> None:
        """`stores`: the actor that holds this node's host memory."""

        def ask(question: str) -> str:
            try:
                answer: str = ray.get(stores.answer.remote(question), timeout=ANSWER_S)
                return answer
            except ray.exceptions.RayError as error:
                raise ConnectionError(str(error)) from None

        self._worker.holder = StoreHolder(ask)

    def sees_stopped(self, pid: int) -> bool:
        return process_state(pid) == "stopped"


class _Actors:
    """The `Ranks` of a `RayGang`: futures are Ray's object references."""

    def __init__(self, actors: Sequence[Any], places: Sequence[Place] = ()) -> None:
        self.world_size = len(actors)
        self._actors = actors
        self._places = places

    def wait(self, futures: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        done: list[Any] = ray.wait(list(futures), num_returns=len(futures), timeout=timeout_s)[0]
        return done

    def result(self, future: Any, rank: int) -> Any:
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

    def ask_status(self, rank: int) -> Any:
        return self._actors[rank].status.remote()

    def stopped(self, rank: int, silent: set[int]) -> str | None:
        """Looked up here, or by another rank of the same machine."""
        host, pid, *_ = self._places[rank]
        where = f"{pid} on {host}"
        if host == socket.gethostname():
            return where if process_state(pid) == "stopped" else None
        peers = [peer for peer, place in enumerate(self._places) if place.host == host and peer not in silent]
        try:
            seen = any(ray.get([self._actors[peer].sees_stopped.remote(pid) for peer in peers[:1]], timeout=1))
        except ray.exceptions.RayError:
            return None
        return where if seen else None


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
        self._stores: dict[str, Any] = {}  # by Ray's node: who holds the host memory there
        self._classes: tuple[tuple[str, str], ...] = ()
        self._has_begun = False

    can_restart = True
    own_rank = None

    def begin(self, classes: Sequence[tuple[str, str]] = ()) -> None:
        """What Ray starts ends with the thread that started it: whoever calls this waits for Ray, not for the ranks."""
        self._classes = tuple(classes)
        self._bring_up(time.monotonic() + self._config.timeouts.launch_s)
        self._has_begun = True

    def start(self) -> None:
        self.restart()

    def restart(self) -> None:
        deadline = time.monotonic() + self._config.timeouts.launch_s
        has_begun, self._has_begun = self._has_begun, False
        try:
            if not has_begun:
                self._bring_up(deadline)
            places = [actor.where.remote() for actor in self._actors]
            self._places = await_results(_Actors(self._actors), places, deadline)
            self._keep_stores()
            self._meet(deadline)
        except RankError:  # may be tried again, in the same Ray
            self._end_actors()
            raise
        except BaseException:
            self.close()
            raise

    def collective_rpc(
        self, work: Callable[..., T], *args: object, timeout_s: float, notice: Notice | None = None
    ) -> list[T]:
        if not self._actors:
            raise RankError(0, "this gang is closed; start a new engine", "died")
        shared = ray.put(args)
        futures = [actor.collective_rpc.remote(work, shared) for actor in self._actors]
        ranks = _Actors(self._actors, self._places)
        return await_results(ranks, futures, time.monotonic() + timeout_s, Watcher(ranks, notice))

    def rpc(self, rank: int, work: Callable[..., T], *args: object, timeout_s: float) -> T:
        try:
            result: T = ray.get(self._actors[rank].rpc.remote(work, args), timeout=timeout_s)
        except (ray.exceptions.RayError, IndexError) as error:
            raise RankError(rank, f"does not answer ({type(error).__name__})", "silent") from None
        return result

    def close(self) -> None:
        self._has_begun = False
        self._end_actors()
        while self._stores:
            with contextlib.suppress(Exception):
                ray.kill(self._stores.popitem()[1])
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    def _end_actors(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        for host, pid, *_ in self._places:
            if host == socket.gethostname() and process_state(pid) == "stopped":  # it does not hear Ray's request
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self._actors, self._places = [], []
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
            self._group = None

    # -- starting ------------------------------------------------------------------------------------------------

    def _bring_up(self, deadline: float) -> None:
        """Actors, and what they import; nobody waits for them yet."""
        self._end_actors()
        self._owns_ray = connect(self._config, self.world_size) or self._owns_ray
        self._place(deadline)
        for actor in self._actors:
            actor.import_classes.remote(self._classes)

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
        device = "cuda:0" if self._device == "cuda" else "cpu"  # Ray shows a rank its own GPU alone
        for rank in range(self.world_size):
            options: dict[str, Any] = {
                "num_cpus": need["CPU"],
                "num_gpus": need.get("GPU", 0),
                "max_restarts": 0,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            }
            if self._device == "cpu":  # OpenMP reads it when a thread starts; torch.set_num_threads comes too late
                options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(threads)}}
            self._actors.append(remote.options(**options).remote(rank, self.world_size, device))

    def _keep_stores(self) -> None:
        """On each node an actor holds the host memory; who comes later finds it."""
        for node in {place.ray_node for place in self._places}:
            if (stores := self._stores.get(node)) is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(stores.__ray_ready__.remote(), timeout=ANSWER_S)
                    continue
            options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
            self._stores[node] = ray.remote(KeptStores).options(**options).remote()
        for actor, place in zip(self._actors, self._places, strict=True):
            actor.keep_with.remote(self._stores[place.ray_node])

    def _meet(self, deadline: float) -> None:
        """Let the ranks find each other; they are watched from here on."""
        ranks = _Actors(self._actors, self._places)
        one_machine = len({place.node for place in self._places}) == 1
        host = LOOPBACK
        if not one_machine:
            host = await_results(ranks, [self._actors[0].node_address.remote()], deadline, Watcher(ranks))[0]
        opened = [self._actors[0].open_store.remote(host, self._config.port)]
        port = await_results(ranks, opened, deadline, Watcher(ranks))[0]
        limits = (self._config.timeouts.launch_s, self._config.timeouts.collective_s)
        met = [actor.join.remote(host, port, *limits, one_machine) for actor in self._actors]
        await_results(ranks, met, deadline, Watcher(ranks))

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


_BESIDE = ("status", "rpc", "sees_stopped")


def _watchable(actor: type[_RankActor]) -> type[_RankActor]:
    """Its questions are answered on another thread than its calls."""
    beside = {name: ray.method(concurrency_group="watch")(getattr(actor, name)) for name in _BESIDE}
    return type("RankActor", (actor,), beside)
