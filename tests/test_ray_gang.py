"""Errors of a gang that lives on: who raised, who is awaited, and a violation found by the coordinator."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import ConfigError, RankError
from crossdock.runtime.watch.gang import Gang
from fake_gang import FakeGang
from tiers import not_quick


def test_ranks_have_imported_what_was_named_at_the_begin(ray_gang_of: Callable[[int], Gang]) -> None:
    """Also where one of the names does not exist."""

    def imported(worker: Any) -> bool:
        import sys

        return "diffusers.pipelines.wan.pipeline_wan" in sys.modules

    assert ray_gang_of(2).collective_rpc(imported, timeout_s=60) == [True, True]


@not_quick
@pytest.mark.parametrize("starts", [False, True])
def test_a_ray_of_its_own_lives_from_begin_to_close(starts: bool) -> None:
    """In a program that has none: what `begin` has started is still there when the ranks have met, and then gone."""
    pytest.importorskip("ray")
    program = """
import sys, time
from crossdock.launch.gangs.ray.gang import RayGang
from crossdock.runtime.config.schema import RunConfig
gang = RayGang(RunConfig().launch, 1, "cpu")
gang.begin([("diffusers", "WanPipeline")])
time.sleep(3)  # what would end with a thread of `begin` is gone by then
if sys.argv[1] == "True":
    gang.start()
    print("SAID", gang.collective_rpc(lambda worker: worker.rank, timeout_s=60))
gang.close()
import ray
print("SAID", ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program, str(starts)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert said == (["SAID [0]"] if starts else []) + ["SAID False"]


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
