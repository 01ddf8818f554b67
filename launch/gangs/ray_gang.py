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
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from crossdock.launch.gangs.ranks.host import RankHost
from crossdock.launch.gangs.ranks.process_state import process_state
from crossdock.launch.gangs.ranks.reachable import KEY, check_reachable, not_reached, within
from crossdock.launch.gangs.ranks.rendezvous import LOOPBACK
from crossdock.launch.gangs.ranks.watcher import Watcher, await_results
from crossdock.runtime.config.schema import LaunchConfig
from crossdock.runtime.config.threads import compute_threads
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError
from crossdock.runtime.rank.weights.kept_stores import ANSWER_S, KeptStores, StoreHolder
from crossdock.runtime.rank.weights.load import node_id
from crossdock.runtime.watch.gang import Notice

T = TypeVar("T")

_native: Any = ray._raylet  # mypy sees nothing in it
_OBJECT_STORE_BYTES = 256 * 2**20
"""Results and plans only travel through Ray; weights never do."""


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

    def _connect(self) -> None:
        self._owns_ray = connect(self._config, self.world_size) or self._owns_ray

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


def connect(config: LaunchConfig, ranks: int) -> bool:
    """Join a cluster, use the Ray that runs in this process, or start a local one; whether that was done here.

    Raises:
        LaunchError: the cluster is not reached, or asks for a token that is not here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return False
    with _own_signal_handlers(), _own_token_mode():
        _init_ray(config, ranks, {"log_to_driver": False, "logging_level": logging.ERROR})
    return True


def _init_ray(config: LaunchConfig, ranks: int, quiet: dict[str, Any]) -> None:
    if (address := config.ray_address) is not None:
        deadline = time.monotonic() + config.timeouts.launch_s
        check_reachable(address, config.timeouts.launch_s)
        try:
            within(deadline - time.monotonic(), partial(_join, address, config.timeouts.launch_s, quiet))
        except (KeyboardInterrupt, LaunchError):
            raise
        except (Exception, SystemExit) as error:  # Ray exits when its own patience is over
            raise not_reached(address, str(error) if isinstance(error, Exception) else "no answer") from None
    else:
        cpus = max(os.cpu_count() or 1, int(ranks * config.cpus_per_rank + 1))
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            **quiet,
        )


def _join(address: str, timeout_s: float, quiet: dict[str, Any]) -> None:
    _agree_on_a_token(address, timeout_s)
    ray.init(address=address, **quiet)


_MODE = "RAY_AUTH_MODE"
_ASK_S, _REFUSED = 15.0, 77
_ASK = f"""
import sys, ray
from ray._raylet import Config, GcsClient
Config.initialize("")
try:  # it looks at the token before the cluster's id; with an id that it cannot have, it always answers at once
    GcsClient(address=sys.argv[1], cluster_id="00" * 28).check_alive([], timeout=float(sys.argv[2]))
except ray.exceptions.AuthenticationError as error:
    sys.exit({_REFUSED} if "InvalidAuthToken" in error.message else 0)
"""
_TOKEN_PLACES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_GIVE = "give the cluster's own: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


def _agree_on_a_token(address: str, timeout_s: float) -> None:
    """Send a token where the cluster asks for one, and none where it does not.

    Ray does not find that out: with an address it sends none, with "auto" always, and a driver whose mode is not its
    cluster's waits for workers that cannot talk to it.

    Raises:
        LaunchError: the token is missing, or another's; or RAY_AUTH_MODE says what the cluster does not do.
    """
    asked = os.environ.get(_MODE, "").lower()
    cluster = None if address.startswith("ray://") else canonicalize_bootstrap_address(address)
    if cluster is None or asked not in ("", "token", "disabled"):
        return
    where = f"the Ray cluster at {address}"
    if not _refuses(cluster, "disabled", timeout_s):
        if asked == "token":
            raise LaunchError(f"{where} asks for no token, but {_MODE} is token; unset it, or start Ray with it", KEY)
        return
    if asked == "disabled":
        raise LaunchError(f"{where} asks for a token, but {_MODE} is disabled; unset it", KEY)
    try:
        there = _native.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except ray.exceptions.AuthenticationError as error:
        raise LaunchError(f"{where} asks for a token: {error.message}; {_GIVE}", KEY) from None
    if not there:
        raise LaunchError(f"{where} asks for a token, and there is none here; {_GIVE}", KEY)
    if _refuses(cluster, "token", timeout_s):
        place = next((name for name in _TOKEN_PLACES if os.environ.get(name)), "~/.ray/auth_token")
        raise LaunchError(f"{where} does not take the token of {place}; {_GIVE}", KEY)


def _refuses(cluster: str, mode: str, timeout_s: float) -> bool:
    """Whether the cluster wants another token than is sent in that mode, which stays. A process of its own asks: where
    somebody listens who is no Ray, Ray's client ends the process that it is in.
    """
    os.environ[_MODE] = mode
    _native.Config.initialize("")
    limit_s = min(timeout_s, _ASK_S)
    try:
        done = subprocess.run([sys.executable, "-c", _ASK, cluster, str(limit_s)], capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:  # joining it says so
        return False
    return done.returncode == _REFUSED


@contextlib.contextmanager
def _own_token_mode() -> Iterator[None]:
    """What is chosen for a cluster is not for the next one that this process joins or starts."""
    asked = {name: mode for name, mode in os.environ.items() if name == _MODE}
    try:
        yield
    finally:
        os.environ.pop(_MODE, None)
        os.environ.update(asked)
        if not ray.is_initialized():
            _native.Config.initialize("")


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Ray puts its own handlers in place; a SIGTERM would then end the driver without closing the gang."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


_BESIDE = ("status", "rpc", "sees_stopped")


def _watchable(actor: type[_RankActor]) -> type[_RankActor]:
    """Its questions are answered on another thread than its calls."""
    beside = {name: ray.method(concurrency_group="watch")(getattr(actor, name)) for name in _BESIDE}
    return type("RankActor", (actor,), beside)
