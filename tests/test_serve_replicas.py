"""`crossdock serve --replicas 2`: a local Ray, balanced, one replica killed, nothing lost, nothing left."""

from __future__ import annotations

import threading
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
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.errors import EngineClosedError, RequestCancelled, RequestError
from crossdock.runtime.request import GenerateRequest
from live_server import CONFIG, LIMIT_S, Server, pictures_of, same_pictures, server, until
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


def test_a_cancel_reaches_the_replica() -> None:
    answers = Answers(replicas.Step("a", (3, 4), 3, 4, {}), raises=RuntimeError())
    run = replicas.RemoteRun(answers, lambda *step: None, None, hear)
    run.cancel("the client has gone")
    with pytest.raises(RequestCancelled, match="the client has gone") as caught:
        run.result()
    assert answers.cancelled
    assert caught.value.finished_steps == 3
