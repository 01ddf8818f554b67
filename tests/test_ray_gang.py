"""Errors of a gang that lives on: who raised, who is awaited, and a violation found by the coordinator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import LaunchConfig, RunConfig
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import ConfigError, LaunchError, RankError
from crossdock.runtime.watch.gang import Gang
from fake_gang import FakeGang


def test_ranks_have_imported_what_was_named_at_the_begin(ray_gang_of: Callable[[int], Gang]) -> None:
    """Also where one of the names does not exist."""

    def imported(worker: Any) -> bool:
        import sys

        return "diffusers.pipelines.wan.pipeline_wan" in sys.modules

    assert ray_gang_of(2).collective_rpc(imported, timeout_s=60) == [True, True]


@pytest.mark.parametrize("starts", [False, True])
def test_it_begins_beside_its_caller(starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who closes it meanwhile waits for the Ray that comes up, to end it; nothing is placed in it then. Who starts it
    hears what went wrong.
    """
    ray = pytest.importorskip("ray")
    from crossdock.launch.gangs.ray import gang as module

    goes_on, done = threading.Event(), list[str]()

    def connect(config: LaunchConfig, ranks: int) -> bool:
        assert goes_on.wait(30)
        return True

    def place(deadline: float) -> None:
        done.append("place")
        raise LaunchError("no place")

    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("shutdown"))
    gang = module.RayGang(RunConfig().launch, 1, "cpu")
    monkeypatch.setattr(gang, "_place", place)
    gang.begin()
    threading.Timer(0.2, goes_on.set).start()
    if starts:
        with pytest.raises(LaunchError, match="no place"):
            gang.start()
    else:
        gang.close()
    assert done == (["place", "shutdown"] if starts else ["shutdown"])
    assert gang._beginning is None


def test_a_ray_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from crossdock.launch.gangs.ray import gang as module

    ends = threading.Event()
    monkeypatch.setattr(module, "connect", lambda *_: ends.wait(30))
    monkeypatch.setattr(module, "_CLOSE_S", 0.1)
    gang = module.RayGang(RunConfig.parse({"launch": {"timeouts": {"launch_s": 0.3}}}).launch, 1, "cpu")
    gang.begin()
    with pytest.raises(LaunchError, match=r"Ray did not come up within 0\.3 s"):
        gang.start()
    gang.close()
    ends.set()


@pytest.mark.parametrize("begins", [RuntimeError("no more processes"), None])
def test_ranks_that_began_are_ended_where_the_plan_is_refused(begins: Exception | None, flux2_dir: Path) -> None:
    class Began(FakeGang):
        def begin(self, classes: object = ()) -> None:
            assert ("diffusers", "Flux2KleinPipeline") in list(classes)  # type: ignore[call-overload]
            if begins is not None:
                raise begins

    gang = Began()
    config = RunConfig.parse({"parallel": {"tp_degree": 7}})
    with pytest.raises(RuntimeError if begins else ConfigError):
        Engine.start(config, flux2_dir, make_gang=lambda *_: gang)
    assert gang.closed
    assert gang.starts == 0


def test_a_rank_that_raises_names_itself(ray_gang_of: Callable[[int], Gang]) -> None:
    """The error says which rank and what; the gang of an engine that failed is closed by the engine."""

    def raise_on_rank_1(worker: Any) -> None:
        if worker.rank == 1:
            raise ValueError("planted")

    with pytest.raises(RankError, match=r"rank 1: ValueError: planted"):
        ray_gang_of(2).collective_rpc(raise_on_rank_1, timeout_s=60)


def test_a_rank_that_hangs_is_not_waited_for(ray_gang_of: Callable[[int], Gang]) -> None:
    """Every wait has a limit."""

    def sleep(worker: Any) -> None:
        import time

        time.sleep(4 if worker.rank == 1 else 0)

    with pytest.raises(RankError, match="rank 1: was not done in time"):
        ray_gang_of(2).collective_rpc(sleep, timeout_s=1)
    ray_gang_of(2).collective_rpc(
        lambda worker: worker.rank, timeout_s=60
    )  # it was only slow: the next call finds it again


def test_a_violation_stops_the_run(ray_gang_of: Callable[[int], Gang], checkpoints: dict[str, Path]) -> None:
    """The coordinator fails closed: a foreign hook put on one rank's model stops the engine before any step."""
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}})
    gang = ray_gang_of(2)
    with Engine.start(config, checkpoints["z-image"], gang) as engine:

        def rebind(worker: Any) -> Any:
            import torch

            linear = worker.loaded.model.get_submodule("layers.1.feed_forward.w1")
            if worker.rank == 1:
                linear.weight = torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
            return worker.report()

        with pytest.raises(CompositionError) as caught:
            engine._ranks.coordinator.admit(gang.collective_rpc(rebind, timeout_s=60), rehearsed=False)
    assert "single-owner: rank 1: layers.1.feed_forward.w1.weight: expected slot" in str(caught.value)
