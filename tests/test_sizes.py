"""Collectives of different sizes, on real gloo ranks: it ends a process at once, and as a rule not the wrong one's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import rank_request
from torch import Tensor, nn

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RankError
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.request import RankRequest
from crossdock.runtime.watch.gang import Gang
from reference import PROMPT
from tiers import thorough

GangOf = Callable[[int], Gang]
TIMEOUT_S = 90.0
BLOCK = "single_transformer_blocks.2"


@pytest.fixture
def fragile(gang_of: GangOf) -> Iterator[GangOf]:
    """A gang that everybody shares, which a test may break."""
    used: list[Gang] = []

    def fragile(world_size: int) -> Gang:
        used.append(gang_of(world_size))
        return used[-1]

    yield fragile
    for gang in used:
        gang.restart()


def _error(gang: Gang, work: Callable[..., Any], *args: Any) -> RankError:
    with pytest.raises(RankError) as caught:
        gang.collective_rpc(work, *args, timeout_s=TIMEOUT_S)
    print(caught.value)
    return caught.value


def _reduced(at: int, odd: int) -> Callable[[RankWorker, RankRequest], Any]:
    """A request in which a block's last all-reduce has another size on one rank, in step `at`."""

    def run(worker: RankWorker, request: RankRequest) -> Any:
        from crossdock.parallel.tensor import RowParallelLinear

        block = worker.loaded.model.get_submodule(BLOCK)
        last = [module for module in block.modules() if isinstance(module, RowParallelLinear)][-1]
        group = last.group

        def before(module: nn.Module, args: Any) -> None:
            state = worker._state
            if worker.rank == odd and state is not None and state.log.running == at:
                group.all_reduce(torch.ones(7))

        last.register_forward_pre_hook(before)
        return worker.generate(request)

    return run


@pytest.mark.parametrize("odd", [0, pytest.param(1, marks=thorough)])
def test_in_a_block(odd: int, fragile: GangOf, flux2_dir: Path) -> None:
    """Which collective of which group, in which step and block, and the sizes of both: of two, neither is known to be
    right. Whoever was ended by gloo is not blamed for that.
    """
    config = {"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}}
    plan, gang = make_plan(RunConfig.parse(config), flux2_dir, "cpu"), fragile(2)
    gang.collective_rpc(RankWorker.setup, plan, timeout_s=TIMEOUT_S)
    request = rank_request(PROMPT, steps=3, height=64, width=64)
    error = _error(gang, _reduced(2, odd), request)
    assert error.kind == "collectives"
    text = str(error)
    assert "all_reduce torch.float32 7" in text
    assert "of group tp (ranks (0, 1)) in step 2, block " + BLOCK in text
    assert f"rank {1 - error.rank} issued all_reduce torch.float32" in text
    assert "which of them is wrong is not known" in text


def _all_reduce(worker: RankWorker, group: Any, extra: int) -> None:
    group.all_reduce(torch.ones(100 + extra))


def _all_gather(worker: RankWorker, group: Any, extra: int) -> None:
    group.all_gather(torch.ones(group.size * (100 + extra)), torch.ones(100 + extra))


def _all_to_all(worker: RankWorker, group: Any, extra: int) -> None:
    sizes = [100 + extra] * group.size
    group.all_to_all(torch.ones(sum(sizes)), torch.ones(sum(sizes)), sizes, sizes, (sizes[0],))


def _broadcast(worker: RankWorker, group: Any, extra: int) -> None:
    group.broadcast(torch.ones(100 + extra), 0)


def _pass_on(worker: RankWorker, group: Any, extra: int) -> None:
    sent: Tensor = torch.ones(100 + extra)
    group.pass_on(sent, torch.ones(100), (len(sent),))()


def _aborts(worker: RankWorker, group: Any, extra: int) -> None:
    """As gloo does, with what was issued known to nobody else."""
    group._begin("all_reduce", "torch.float32", 100 + extra)
    if extra:
        os.abort()
    group.all_reduce(torch.ones(1))


@thorough
@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("issue", [_all_reduce, _all_gather, _all_to_all, _broadcast, _pass_on, _aborts])
def test_the_odd_one_of_three(issue: Callable[..., None], odd: int, fragile: GangOf) -> None:
    """It is named, whichever process ended, with what all had issued."""

    def work(worker: RankWorker) -> None:
        group = worker.world
        assert group is not None
        group.all_gather_object("before")
        issue(worker, group, 7 if worker.rank == odd else 0)
        for _ in range(40):  # a receiver with too much room has noticed nothing: the watch has
            time.sleep(0.5)
            group.all_reduce(torch.ones(4))

    error = _error(fragile(3), work)
    assert (error.rank, error.kind) == (odd, "collectives")
    others = ", ".join(str(rank) for rank in range(3) if rank != odd)
    first, second = str(error).split(", where ")
    assert "107" in first or "321" in first
    assert "of group world (ranks (0, 1, 2)) in idle" in first
    assert f"ranks {others} issued" in second
    assert "100" in second or "300" in second


@thorough
def test_a_killed_rank_is_not_taken_for_an_odd_one(fragile: GangOf) -> None:
    """It had issued what the others had."""

    def work(worker: RankWorker) -> None:
        group = worker.world
        assert group is not None
        group.all_reduce(torch.ones(4))
        if worker.rank == 1:
            os.abort()
        group.all_reduce(torch.ones(4))

    error = _error(fragile(3), work)
    assert (error.rank, error.kind) == (1, "died")
