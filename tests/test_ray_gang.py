"""Errors of a gang that lives on: who raised, who is awaited, and a violation found by the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import RankError
from crossdock.runtime.watch.gang import Gang


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
