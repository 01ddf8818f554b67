"""`crossdock serve --replicas 2`: balanced, one replica killed, nothing lost or left; also on a cluster of others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import psutil
import pytest
import torch
from processes import descendants

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.generation import Generation
from crossdock.launch.serve.scheduler import DrainingError, Scheduler, Work
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.errors import EngineClosedError, RequestCancelled, RequestError
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.request import GenerateRequest
from live_server import CONFIG, LIMIT_S, Server, pictures_of, same_pictures, server, until
from ray_cluster import cluster
from tiers import thorough

replicas = pytest.importorskip("crossdock.launch.serve.replicas", reason="needs ray[serve]")
SIDE = {"height": 64, "width": 64}


@thorough
def test_two_replicas_one_of_which_is_killed(flux2_dir: Path) -> None:
    """Twelve clients, a replica that dies while both work: every picture is the one of its seed."""
    seeds = range(6)
    with server(flux2_dir, "--replicas", "2", "--max-batch", "1") as live:
        answers: dict[int, httpx2.Response] = {}

        def ask(seed: int) -> None:
            answers[seed] = live.post(prompt="a snail", seed=seed, num_inference_steps=40)

        threads = [threading.Thread(target=ask, args=[seed]) for seed in seeds]
        for thread in threads:
            thread.start()
        until(lambda: {row["replica"] for row in _ranks(live)} == {"0", "1"})
        _replica_of(live).kill()
        for thread in threads:
            thread.join(LIMIT_S)
        held = [row for row in _ranks(live) if row["weight_bytes"]]
        assert len({row["replica"] for row in held}) >= 2
        until(lambda: len(_replicas_of(live)) == 2)
        assert pictures_of(live.post(prompt="a snail", seed=1))
    with Engine.start(load_config(CONFIG), flux2_dir) as engine:
        for seed in seeds:
            wanted = engine.run(GenerateRequest.of("a snail", seed=seed, steps=40, **SIDE)).images
            assert same_pictures(pictures_of(answers[seed]), wanted), seed


_ANOTHERS = """
from ray import serve

class Other:
    def __call__(self):
        return "here"

serve.start(proxy_location="Disabled")
serve.run(serve.deployment(ray_actor_options={"num_cpus": 0})(Other).bind(), name="other", route_prefix=None)
found = True
"""
_LEFT = """
from ray import serve
from ray.util import placement_group_table

found = {
    "applications": list(serve.status().applications),
    "other": serve.get_app_handle("other").remote().result(timeout_s=60),
    "groups": [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"],
    "CPUs": ray.available_resources()["CPU"],
}
"""
_NOTHING_OF_OURS = {"applications": ["other"], "other": "here", "groups": [], "CPUs": 4.0}
_OURS = ("ServeReplica:crossdock", "RankActor", "KeptStores", "::Front")


@thorough
@pytest.mark.timeout(1200)
def test_on_a_cluster_of_others(flux2_dir: Path, tmp_path: Path) -> None:
    """kill -9 of the server: its replicas find out, and go. A second one is asked to end. What others run stays."""
    with cluster(tmp_path / "home") as shared:
        shared.ask(_ANOTHERS)
        made = []
        for killed in (True, False):
            with server(flux2_dir, "--replicas", "2", "--ray-address", shared.address) as live:
                made.append(pictures_of(live.post(prompt="a snail", seed=1)))
                counts = [len(shared.workers(name)) for name in _OURS]
                assert counts == [2, 2, 2, 1]
                if killed:
                    live.kill()
            until(lambda: not shared.workers(*_OURS))
            until(lambda: shared.ask(_LEFT) == _NOTHING_OF_OURS)
    with Engine.start(load_config(CONFIG), flux2_dir) as engine:
        wanted = engine.run(GenerateRequest.of("a snail", seed=1, steps=2, **SIDE)).images
    assert all(same_pictures(pictures, wanted) for pictures in made)


def _ranks(live: Server) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = httpx2.get(f"{live.url}/v1/status", timeout=30).json()["ranks"]
    return rows


def _replicas_of(live: Server) -> list[psutil.Process]:
    return [child for child in descendants(live.process.pid) if "ServeReplica" in " ".join(child.cmdline())]


def _replica_of(live: Server) -> psutil.Process:
    return _replicas_of(live)[0]


class Answers:
    """What a handle returns: told in turn, then what is raised."""

    def __init__(self, *told: object, raises: Exception | None = None) -> None:
        self._told, self._raises, self.cancelled = told, raises, False

    def cancel(self) -> None:
        self.cancelled = True

    def __iter__(self) -> Any:
        yield from self._told
        if self._raises is not None:
            raise self._raises


class Forever(Answers):
    def __init__(self, over: threading.Event) -> None:
        super().__init__()
        self._over = over

    def __iter__(self) -> Any:
        self._over.wait()
        yield from ()


def hear(replica: str, statuses: Any) -> None:
    """Nobody looks."""


def _generation() -> Generation:
    return Generation([], [], [], {"ranks": [], "faults": []}, [])


def test_what_a_replica_tells_is_passed_on() -> None:
    steps: list[tuple[int, int]] = []
    previews: list[int] = []
    made = _generation()
    told = [replicas.Step("a", (1, 4), 1, 2, {}), replicas.Latents(1, torch.zeros(1, 2)), made]
    run = replicas.RemoteRun(
        Answers(*told), lambda *step: steps.append(step), lambda step, _: previews.append(step), hear
    )
    assert run.result() is made
    assert (steps, previews, run.progress) == ([(1, 2)], [1], (1, 4))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (SimpleNamespace(cause=RequestError("height: found 7")), RequestError),
        (SimpleNamespace(cause=ValueError("no")), EngineClosedError),
        (SimpleNamespace(), EngineClosedError),
        (None, EngineClosedError),
    ],
    ids=["a request's fault", "a fault of its own", "it died", "it says nothing"],
)
def test_a_replica_that_fails(raised: Any, expected: type[Exception]) -> None:
    error = None if raised is None else type("Lost", (Exception,), vars(raised))()
    run = replicas.RemoteRun(Answers(raises=error), lambda *step: None, None, hear)
    with pytest.raises(expected):
        run.result()


def test_a_look_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_S", 0.0)
    monkeypatch.setattr(replicas, "ANSWER_S", 1.0)
    ended, hangs, seen, told = threading.Event(), threading.Event(), list[int](), list[str]()

    def looks() -> Iterator[Callable[[], Any]]:
        yield from [lambda: 2, lambda: 1 // 0, hangs.wait, lambda: 1, lambda: 1 // 0]
        ended.set()
        yield lambda: 2

    each = looks()
    assert replicas.watch(lambda: next(each)(), seen.append, ended, told.append) is None
    hangs.set()
    assert seen == [2, 0, 0, 1, 0, 2]
    assert len(told) == 2, told
    assert "modulo by zero" in told[0]


class FakeRay:
    """Where nothing is far away. `gone`: nobody answers, as Ray does then, which is without end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gone, self.over = threading.Event(), threading.Event()
        self.called: list[str] = []
        this: Any = SimpleNamespace
        deployment = this(options=lambda **_: this(bind=lambda *_: "bound"))
        self._handle = this(options=lambda stream: this(generate=this(remote=lambda *_: Forever(self.over))))
        fakes = {
            "start": lambda **_: None,
            "deployment": lambda _: deployment,
            "run": self._run,
            "status": self._status,
            "delete": lambda app: self.called.append("delete"),
            "shutdown": lambda: self.called.append("shutdown"),
        }
        monkeypatch.setattr(replicas, "serve", this(**fakes))
        front = this(options=lambda **_: this(remote=lambda: "front"))
        kill = lambda actor: self.called.append(f"kill {actor}")  # noqa: E731
        leave = lambda: self.called.append("leave")  # noqa: E731
        monkeypatch.setattr(replicas, "ray", this(remote=lambda _: front, kill=kill, shutdown=leave))
        monkeypatch.setattr(replicas, "connect", lambda *_: True)
        monkeypatch.setattr(replicas, "LOOK_S", 0.01)
        monkeypatch.setattr(replicas, "ANSWER_S", 1.0)

    def _run(self, replicas: object, *, name: str, **_: Any) -> Any:
        self.app = name
        return self._handle

    def _status(self) -> Any:
        if self.gone.is_set():
            self.over.wait()
        states = SimpleNamespace(replica_states={"RUNNING": 2})
        there = SimpleNamespace(deployments={"Replica": states})
        return SimpleNamespace(applications={self.app: there})


def test_without_its_cluster(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovering; then what waits and what runs ends with one message, and nobody waits for Ray."""
    fake, told = FakeRay(monkeypatch), list[str]()
    monkeypatch.setattr(replicas, "GONE_S", 1e9)
    service = replicas.Replicas(make_plan(RunConfig(), flux2_dir, "cpu"), 2, 1, told.append)
    scheduler = Scheduler(service.begin, service.fits, 64, lanes=2)
    until(lambda: service.state == "ready")
    works = [scheduler.submit(Work(GenerateRequest.of("a fox", seed=seed, steps=2, **SIDE))) for seed in range(5)]
    fake.gone.set()
    until(lambda: service.state == "recovering")
    assert not any(work.outcome.done() for work in works)
    monkeypatch.setattr(replicas, "GONE_S", 0.0)
    for work in works:
        assert isinstance(work.outcome.exception(LIMIT_S), DrainingError)
    assert service.state == "failed"
    assert "the replicas are gone: no answer within 1 s" in str(service.failed)
    assert len(set(told)) == 2, told
    scheduler.close(LIMIT_S)
    service.close(LIMIT_S)
    fake.over.set()
    assert fake.called == ["leave"]


@pytest.mark.parametrize(("address", "more"), [(None, ["shutdown"]), ("192.0.2.1:1", [])])
def test_what_was_joined_is_left_as_it_is(
    address: str | None, more: list[str], flux2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(monkeypatch)
    config = RunConfig.parse({"launch": {"ray_address": address}})
    service = replicas.Replicas(make_plan(config, flux2_dir, "cpu"), 2, 1, lambda line: None)
    until(lambda: service.state == "ready")
    service.close(LIMIT_S)
    assert fake.called == ["delete", "kill front", *more, "leave"]


def test_a_cancel_reaches_the_replica() -> None:
    answers = Answers(replicas.Step("a", (3, 4), 3, 4, {}), raises=RuntimeError())
    run = replicas.RemoteRun(answers, lambda *step: None, None, hear)
    run.cancel("the client has gone")
    with pytest.raises(RequestCancelled, match="the client has gone") as caught:
        run.result()
    assert answers.cancelled
    assert caught.value.finished_steps == 3
